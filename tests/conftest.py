"""What several test files share: small data sets, and a way to run the real scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data import shapes
from data.worker_processes import start_worker_server

ROOT = Path(__file__).parents[1]
BCCD = ROOT.parent / "shared" / "data" / "bccd"
# Flags that make any run small: 64 px, a ResNet-18, no worker processes.
TINY = (
    *("--model", "retinanet_resnet18_fpn", "--min-size", "64", "--max-size", "64"),
    *("--device", "cpu", "--workers", "0", "--batch-size", "2", "--print-freq", "1"),
    *("--opt", "adamw", "--lr", "1e-4", "--clip-grad-norm", "1"),
)

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


def run_script(
    *command: str | Path, processes: int = 1, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND`, or torchrun with several processes, from the project's folder."""
    launch = [sys.executable]
    if processes > 1:
        distributed = ["-m", "torch.distributed.run", "--standalone"]
        launch += [*distributed, f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launch, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    if check and done.returncode:
        raise AssertionError(f"{command} failed:\n{done.stdout}\n{done.stderr}")
    return done


@pytest.fixture(scope="session")
def train(tiny_shapes: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run train.py, tiny, on shapes: `train(*flags, processes=1, check=True)`."""

    def run(
        *flags: str | Path, processes: int = 1, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        command = ("train.py", "--data-path", tiny_shapes, *TINY, *flags)
        return run_script(*command, processes=processes, check=check)

    return run
