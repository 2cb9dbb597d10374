"""Proves what happens on macOS and Windows, which are imitated: pytest tests/test_platforms.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import utils

COMMANDS = (
    "train",
    "tools.benchmark",
    "tools.check_data",
    "docs.explain",
    "tools.export",
    "tools.predict",
    "tools.report",
    "tools.score",
    "tools.visualize",
)
# Libraries load as on this machine; then the project meets a Python without what Windows lacks.
WINDOWS = """
import runpy, sys
import hotcoco, matplotlib.pyplot, msgspec, numpy, PIL.Image, torch, torchvision, tqdm
import torch.utils.data, torch.nn.parallel, torch.optim.swa_utils, torch.utils.tensorboard
import torchvision.models.detection, torchvision.transforms.v2, pycocotools.coco
sys.modules["fcntl"] = sys.modules["resource"] = None
sys.platform = "win32"
for name in {names!r}:
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(name, run_name="__main__")
    except SystemExit as error:
        print(name, error, file=sys.stderr)
    for module in [m for m in sys.modules.values() if {root!r} in str(getattr(m, "__file__", ""))]:
        if ".venv" not in module.__file__:
            sys.modules.pop(module.__name__, None)
"""
MACOS = """
import os, runpy, sys
del os.sched_getaffinity, os.sched_setaffinity
sys.argv = ["check_data", "--help"]
runpy.run_module("tools.check_data", run_name="__main__")
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200
    )


def test_every_command_refuses_windows_first() -> None:
    done = run_python(WINDOWS.format(names=COMMANDS, root=str(ROOT)))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    for line in lines:
        assert "needs Linux, macOS or WSL" in line
    assert done.stdout == ""


def test_check_data_shows_its_help_where_there_is_no_sched_getaffinity() -> None:
    done = run_python(MACOS)
    assert done.returncode == 0, done.stderr
    assert "--workers" in done.stdout


def test_cores_are_those_that_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(utils, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 5, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert utils.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert utils.usable_cores() == 64
    # A container's quota: microseconds of all cores together, in how many.
    for quota, cores in (("max 100000", 64), ("250000 100000", 3), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        assert utils.usable_cores() == cores


def test_one_function_counts_cores() -> None:
    counting = [
        path.name
        for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]
        if re.search(r"cpu_count|sched_getaffinity", path.read_text())
    ]
    assert counting == ["utils.py"]
