"""What several test files share."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from runtime.distributed import Processes
from runtime.run_folder import Run
from runtime.train_state import TrainState

ROOT = Path(__file__).parents[1]
CPU = Processes(torch.device("cpu"))


def make_run(folder: Path, processes: Processes = CPU, **settings: Any) -> Run:
    """Make a run of three epochs of five steps, after its first epoch, without data."""
    model = torch.nn.Linear(1, 1)
    nothing: Any = None
    state = TrainState(model, nothing, nothing, nothing, epoch=1, step=3)
    data = SimpleNamespace(label_map=[], annotations=SimpleNamespace(summary=dict))
    flags: dict[str, Any] = {
        "batch_size": 2,
        "batches_per_step": 1,
        "epochs": 3,
        "eval_every": 1,
        "keep_checkpoints": None,
        "max_steps": None,
        "momentum": 0.9,
        "opt": "sgd",
        "patience": None,
        "resume": None,
        "tensorboard": False,
    }
    return Run(
        folder,
        state,
        processes,
        _Stop(),  # type: ignore[arg-type]
        settings=flags | settings,
        train_data=data,
        val_data=data,
        lr=0.1,
        steps_per_epoch=5,
        samples="10",
        stack=contextlib.ExitStack(),
    )


class _Stop:
    """A `StopSignal` that has received SIGTERM, without handlers."""

    received = "SIGTERM"

    def __call__(self) -> bool:
        return True
