"""What a user can mend ends in one message: pytest tests/test_user_errors.py."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pwd
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, TINY, run_script

import engine
import presets
import train as train_script
from data import cache as data_cache
from data import image_files, loading
from data.splits import data_paths
from data.worker_processes import worker_errors
from models import retinanet
from runtime.distributed import join_process_group
from utils import LocalError, UserError

Start = Callable[..., int]


def _unpack(samples: Any) -> Any:
    a, b = (1, 2, 3)
    return a, b


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_mistake_in_the_code_keeps_its_traceback(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    workers: str,
) -> None:
    if workers == "0":  # `for number, (images, targets) in …` of engine.py
        monkeypatch.setattr(loading, "collate", lambda samples: (1, 2, 3))
    else:
        monkeypatch.setattr(loading, "collate", _unpack)
    with pytest.raises(SystemExit) as raised:
        start("--workers", workers)
    assert raised.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):")
    assert "ValueError: " in printed and "too many values to unpack" in printed
    assert f'File "{engine.__file__}", line ' in printed
    assert ("Original Traceback" in printed) == (workers == "1")


def test_a_user_error_is_one_line_and_status_1(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        start("--batch-size", "1000")
    assert raised.value.code == 1
    text = "error: --batch-size 1000 is more than the 15 images to train on\n"
    assert capsys.readouterr().err == text


# Transforms, which a loader worker imports from here.


def _find_damage(image: Any, target: Any) -> Any:
    raise image_files.ImageError("is damaged")


def _die(image: Any, target: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_error_of_a_loader_worker_is_one_line(
    start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "training_transforms", lambda policy: _find_damage)
    with pytest.raises(SystemExit) as raised:
        start("--workers", "1")
    assert raised.value.code == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("error: ") and "is damaged" in text


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "1"}, "RANK=1 .* WORLD_SIZE is not"),
        ({"RANK": "abc"}, "RANK=abc"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK=2 .*=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "2"}, "RANK is not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "MASTER_PORT is not"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "x"},
            "MASTER_PORT=x",
        ),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
    ],
)
def test_a_wrong_launch_is_refused_with_the_variable(
    variables: dict[str, str],
    named: str,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LocalError, match=named), join_process_group("cpu"):
        pass
    with pytest.raises(SystemExit) as raised:
        start()
    assert raised.value.code == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "start with torchrun, or unset" in text


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "out of memory"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "out of memory"),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"
            ),
            "--ipc=host",
        ),
        (
            RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_51_21_1>: No space left on "
                "device (28)"
            ),
            "--workers 0",
        ),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
    ],
)
def test_a_missing_resource_of_workers_is_named(error: Exception, advice: str) -> None:
    with pytest.raises(LocalError) as raised, worker_errors():
        raise error
    assert advice in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [RuntimeError("out of shared memory"), OSError(5, "I/O")])
def test_other_errors_of_workers_are_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, worker_errors():
        raise error
    assert raised.value is error


def test_a_killed_worker_of_one_process_is_one_line(
    start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "training_transforms", lambda policy: _die)
    with pytest.raises(SystemExit) as raised:
        start("--workers", "1")
    assert raised.value.code == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "a loader worker was killed" in text


# --- out of memory --------------------------------------------------------------------------------


def out_of_memory_at(call: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `original`, which from its `call`-th call on finds no memory left."""
    calls = itertools.count(1)

    def method(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 …")
        return original(*args, **kwargs)

    return method


@pytest.mark.parametrize(
    ("flags", "call", "message"),
    [
        (
            (),
            1,
            "2 images of 64 x 64 pixels (none fitted); give --batch-size 1 --accumulate-steps 2, "
            "or --amp, or smaller --min-size and --max-size",
        ),
        (
            ("--batch-size", "6", "--accumulate-steps", "2"),
            2,
            "3 images of 64 x 64 pixels (the largest that fitted is 6 images of 64 x 64 pixels); "
            "give --batch-size 3 --accumulate-steps 4, or --amp, or smaller --min-size and "
            "--max-size",
        ),
        (
            ("--batch-size", "1", "--amp", "bf16", "--data-augmentation", "lsj"),
            1,
            "1 image of 1024 x 1024 pixels (none fitted); give a smaller --model",
        ),
    ],
)
def test_out_of_memory_in_training_names_the_batch_and_the_flags(
    error_of: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    call: int,
    message: str,
) -> None:
    loss = out_of_memory_at(call, retinanet.RetinaNet.compute_loss)
    monkeypatch.setattr(retinanet.RetinaNet, "compute_loss", loss)
    assert error_of(*flags) == f"error: out of memory in a batch of {message}\n"


def test_out_of_memory_in_an_evaluation_names_its_batch_size(
    error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    detect = out_of_memory_at(1, retinanet.RetinaNet.detect)
    monkeypatch.setattr(retinanet.RetinaNet, "detect", detect)
    flags = ("--batch-size", "5", "--eval-batch-size", "5", "--ema-decay", "0.9")
    assert error_of(*flags) == (
        "error: out of memory in a batch of 5 images of 64 x 64 pixels (none fitted); give "
        "--eval-batch-size 2, or --amp, or smaller --min-size and --max-size\n"
    )


OUT_OF_MEMORY_ON_RANK_1 = """
import os
import torch, train
from models.retinanet import RetinaNet

calls = []

def compute_loss(*args):
    calls.append(args)
    if len(calls) > 2:  # the warm-up of DDP
        raise torch.OutOfMemoryError("CUDA out of memory")
    return original(*args)

if __name__ == "__main__":
    original = RetinaNet.compute_loss
    if os.environ["RANK"] == "1":
        RetinaNet.compute_loss = compute_loss
    train.run_from_command_line()
"""


def test_out_of_memory_in_one_process_ends_all(
    tiny_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = tmp_path / "rank_1_fails.py"
    script.write_text(OUT_OF_MEMORY_ON_RANK_1)
    flags = ("--data-path", tiny_shapes, *TINY, "--batch-size", "5")
    command = (script, *flags, "--output-dir", tmp_path / "run")
    done = run_script(*command, processes=2, check=False)
    assert done.returncode == 1
    assert done.stderr.count("error: out of memory in a batch of 5 images of 64 x 64 pix") == 1
    assert "torch.OutOfMemoryError" not in done.stderr


def test_tensorboard_without_its_package_is_refused_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert importlib.util.find_spec("tensorboard") is not None
    command = ["--dataset", "shapes", "--tensorboard", "--output-dir", str(tmp_path / "run")]
    args = train_script.parse_args(command)
    train_script.check_flags(args)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tensorboard\]'"):
        train_script.main(args)
    assert not (tmp_path / "run").exists()


def test_without_a_home_the_variable_to_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        data_paths("shapes", None, {})


def test_a_full_cache_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = tmp_path / "cache"
    full.write_text("")  # what is no folder takes no files, as little as a full disk
    monkeypatch.setenv("XDG_CACHE_HOME", str(full))
    with pytest.raises(UserError, match=f"{full}"):
        data_paths("shapes", None, {})
    assert data_cache.folder().parent == full
