"""The house holds: who imports whom, nothing works on import, nothing unpickles or calls a shell.

pytest tests/test_house.py
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

TOP = {path.stem for path in ROOT.glob("*.py")}
FOLDERS = ("models", "data", "runtime")
SOURCES = sorted(
    path
    for folder in (".", *FOLDERS, "tools", "docs")
    for path in ROOT.glob(f"{folder}/*.py" if folder == "." else f"{folder}/**/*.py")
    if path.name != "__init__.py"
)
SCRIPTS = sorted([*ROOT.glob("recipes/*.sh"), ROOT / ".ci" / "run", ROOT / "Makefile"])


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- the house: who imports whom ------------------------------------------------------------------


def imported_modules(tree: ast.AST) -> set[str]:
    """Return the top-level names of all that is imported, also inside functions."""
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("relative" if node.level else (node.module or "").split(".")[0])
    return names


def imported_rooms(source: str) -> set[str]:
    """Return which rooms of the house, or files at the top, a source imports."""
    return imported_modules(ast.parse(source)) & {
        *TOP,
        *FOLDERS,
        "tools",
        "tests",
        "docs",
        "relative",
    }


def wrong_imports(path: str, source: str) -> set[str]:
    """Return what the file at `path`, relative to the top, imports and may not."""
    room = path.split("/")[0]
    allowed = {"utils", room} if room in FOLDERS else {*TOP, *FOLDERS}
    if room in ("tools", "docs"):
        allowed |= {"tools", "docs"}
    if path == "utils.py":
        allowed = set()
    return imported_rooms(source) - allowed | (imported_rooms(source) & {"train"})


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_folders_import_utils_and_themselves_the_top_imports_folders_and_nothing_imports_tools(
    path: Path,
) -> None:
    assert wrong_imports(relative(path), path.read_text()) == set()


@pytest.mark.parametrize(
    "path, source",
    [
        ("utils.py", "import engine"),
        ("utils.py", "from runtime.run import Run"),
        ("models/build.py", "def f():\n    from engine import logger"),
        ("models/build.py", "from data import coco_json"),
        ("data/voc.py", "import coco_utils"),
        ("train.py", "import tools.report"),
        ("train.py", "from . import utils"),
        ("engine.py", "from train import main"),
        ("tools/report.py", "import train"),
    ],
)
def test_an_import_that_points_the_wrong_way_is_found(path: str, source: str) -> None:
    assert wrong_imports(path, source)


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=relative)
def test_no_test_file_imports_another(path: Path) -> None:
    names = imported_modules(ast.parse(path.read_text()))
    assert not {name for name in names if name.startswith("test_") or name == "conftest"}


def test_folders_export_nothing() -> None:
    for path in ROOT.glob("*/**/__init__.py"):
        if not any(part.startswith(".venv") for part in path.parts):
            assert not ast.parse(path.read_text()).body, path


IMPORT_EACH = """
import os, random, signal, sys, threading, warnings
import hotcoco, msgspec, numpy, PIL.Image, pycocotools.cocoeval, torch, torchvision
from torchvision.transforms import v2
from torch.utils import data
folder, *names = sys.argv[1:]
sys.argv = ["script", "--help"]  # who parses flags on import, prints and exits

def state():
    numbers = range(1, signal.NSIG)
    import logging
    return {
        "random": random.getstate(),
        "numpy.random": str(numpy.random.get_state()),
        "torch.random": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "signals": [signal.getsignal(n) for n in numbers if n in signal.valid_signals()],
        "threads": (threading.active_count(), torch.get_num_threads()),
        "handlers": (logging.root.handlers[:], logging.getLogger("retinanet").handlers[:]),
        "level": logging.root.level,
        "process group": torch.distributed.is_initialized(),
        "cuda": torch.cuda.is_initialized(),
        "default": (torch.get_default_dtype(), torch.is_grad_enabled()),
        "files": sorted(os.listdir(".")),
    }

for name in names:
    child = os.fork()
    if child == 0:
        log = os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1), os.dup2(log, 2)
        before = state()
        __import__(name)
        after = state()
        for key in before:
            if before[key] != after[key]:
                print("changed:", key, before[key], after[key])
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        with open(os.path.join(folder, name), "a") as log:
            log.write("the import failed")
"""


def imports_do(names: list[str], folder: Path, work: Path, other: Path) -> dict[str, str]:
    """Import each module in a process of its own; return what it printed or changed."""
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, str(folder), *names],
        cwd=work,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(other)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        },
        check=True,
    )
    return {name: (folder / name).read_text() for name in names}


def test_no_module_does_work_when_it_is_imported(tmp_path: Path) -> None:
    work = tmp_path / "empty"
    work.mkdir()
    names = [relative(path)[:-3].replace("/", ".") for path in SOURCES]
    names = [name for name in names if name.split(".")[0] in {*TOP, *FOLDERS}]
    # One that does, to see that this is noticed.
    guilty = tmp_path / "guilty.py"
    guilty.write_text("import torch\nprint('hello')\ntorch.manual_seed(1)\nopen('file', 'w')\n")
    done = imports_do([*names, "guilty"], tmp_path / "said", work, tmp_path)
    printed = done.pop("guilty")
    assert "hello" in printed and "changed: torch.random" in printed and "changed: files" in printed
    assert done == dict.fromkeys(names, "")


# --- what no source may contain -------------------------------------------------------------------


def forbidden(source: str) -> list[str]:
    """Return each call in `source` that unpickles, evaluates text, or gives text to a shell."""
    calls = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        arguments = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        is_bad = (
            name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
            or re.fullmatch(r"(pickle|cPickle|dill|marshal|joblib|shelve)\.(load|loads|open)", name)
            or name.split(".")[-1] in ("Unpickler",)
            or (re.fullmatch(r"yaml\.\w*load\w*", name) and name != "yaml.safe_load")
            or arguments.get("weights_only", True) is not True
            or arguments.get("shell", False) is not False
            or arguments.get("allow_pickle", False) is not False
            or (name == "torch.load" and "weights_only" not in arguments)
            or (name.endswith("get_state_dict") and "weights_only" not in arguments)
        )
        if is_bad:
            calls.append(f"line {node.lineno}: {ast.unparse(node)}")
    return calls


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_evaluates_or_calls_a_shell(path: Path) -> None:
    assert forbidden(path.read_text()) == []
    imported = imported_modules(ast.parse(path.read_text()))
    assert not imported & {"dill", "marshal", "shelve", "joblib", "http", "socketserver"}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "pickle.load(file)",
        "pickle.loads(data)",
        "pickle.Unpickler(file).load()",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.unsafe_load(text)",
        "yaml.safe_load_all(text)",
        "eval(text)",
        "exec(text)",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
        "subprocess.Popen(command, shell=flag)",
        "np.load(path, allow_pickle=True)",
        "weights.get_state_dict(progress=True)",
    ],
)
def test_each_forbidden_call_is_found(source: str) -> None:
    assert forbidden(f"def f():\n    return {source}")


def test_similar_but_harmless_calls_are_allowed() -> None:
    source = """
model.eval()
torch.load(path, map_location="cpu", weights_only=True)
"weights_only=False; pickle.load(; eval("
subprocess.run(["ls"], check=True)
json.load(file)
yaml.safe_load(text)
except_ = pickle.UnpicklingError
"""
    assert forbidden(source) == []


def test_shell_scripts_evaluate_nothing_and_pipe_nothing_from_the_network() -> None:
    assert len(SCRIPTS) > 1
    for path in SCRIPTS:
        text = re.sub(r"#.*", "", path.read_text())
        assert not re.search(r"(^|[;&|`(\s])(eval|sudo)\s|(curl|wget)[^\n]*\|", text), path
