"""Fixtures that several test files share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CAT_AND_DOG, ROOT, TINY, run_script

from data import shapes
from data.worker_processes import start_worker_server
from models.build import build_model
from runtime import checkpoint

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
