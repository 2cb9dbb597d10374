"""Fixtures that several test files share."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CAT_AND_DOG, ROOT, TINY, run_script

import train as train_script
from data import shapes
from data.worker_processes import start_worker_server
from models.build import build_model
from runtime import checkpoint
from utils import STOP_SIGNALS, logger

BCCD = ROOT.parent / "shared" / "data" / "bccd"

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder of 16 training and 7 validation images of 64 px."""
    return shapes.make_shapes(tmp_path_factory.mktemp("shapes"), 16, 7, size=64)


@pytest.fixture(scope="session")
def bccd() -> Path:
    """364 real images in COCO layout, where they are."""
    if not BCCD.is_dir():
        pytest.skip(f"the real images are not in {BCCD}")
    return BCCD


@pytest.fixture(scope="session")
def worker_server() -> None:
    """Loader workers start at once; otherwise each imports PyTorch by itself."""
    start_worker_server("train")


@pytest.fixture(scope="session")
def train(tiny_shapes: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run train.py, tiny, on shapes: `train(*flags, processes=1, check=True)`."""

    def run(
        *flags: str | Path, processes: int = 1, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        command = ("train.py", "--data-path", tiny_shapes, *TINY, *flags)
        return run_script(*command, processes=processes, check=check)

    return run


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Run train.py's command line in this process: `command_line(*flags)`."""
    numbers = (*STOP_SIGNALS, signal.SIGCHLD)
    handlers = {number: signal.getsignal(number) for number in numbers}
    log = logger.handlers, logger.propagate, logger.level

    def run(*flags: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        train_script.run_from_command_line()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logger.handlers, logger.propagate, logger.level = log


@pytest.fixture
def start(
    command_line: Callable[..., None], tiny_shapes: Path, tmp_path: Path
) -> Callable[..., None]:
    """Run train.py in this process, tiny, on shapes, for an epoch: `start(*flags)`."""
    data = ("--data-path", tiny_shapes, "--output-dir", tmp_path / "run")
    return lambda *flags: command_line(*data, *TINY, "--epochs", "1", *flags)


@pytest.fixture
def error_of(start: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run train.py like `start`, to a status of 1; return its one message: `error_of(*flags)`."""

    def run(*flags: str | Path) -> str:
        with pytest.raises(SystemExit) as raised:
            start(*flags)
        assert raised.value.code == 1
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("error: ") == 1
        assert "Traceback" not in message
        return message

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a detector whose scores all lie near one half, so that it has detections."""
    args: dict[str, Any] = {"model": "retinanet_resnet18_fpn", "min_size": 64, "max_size": 64}
    torch.manual_seed(0)
    model = build_model(args["model"], CAT_AND_DOG, min_size=64, max_size=64)
    torch.nn.init.zeros_(model.head.classification_head.cls_logits.bias)
    path = tmp_path_factory.mktemp("run") / "best.pth"
    content = {"model": model.state_dict(), "ema": None, "args": args, "categories": CAT_AND_DOG}
    checkpoint.save(content, path)
    return path
