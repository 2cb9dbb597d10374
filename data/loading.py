"""The DataLoader of a run, and its worker processes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from data import worker_processes
from data.worker_processes import ignore_stop_signals

WORKER_CHECK = 5.0  # seconds without a batch before dead loader workers are looked for


class _PatientLoader(DataLoader):
    """A loader that fails soon if a worker died, and late if none delivers a batch.

    DataLoader looks for dead workers when its `timeout` is over, and then can be asked again.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches, asked = super().__iter__(), time.monotonic()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                is_late = time.monotonic() - asked > worker_processes.LOADER_TIMEOUT
                if is_late or "DataLoader timed out" not in str(error):
                    raise
                continue
            yield batch
            asked = time.monotonic()


def make_loader(
    dataset: Any, batches: Any, workers: int, device: torch.device, keep: bool
) -> DataLoader:
    """Build a loader over `batches` of (epoch, index); `keep` its workers between epochs."""
    # Once a loader is used; `runtime.summary` has better words for it.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    return _PatientLoader(
        dataset.for_workers(),
        batch_sampler=dataset.with_entries(batches),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        timeout=WORKER_CHECK if workers else 0,
        persistent_workers=keep and workers > 0,
        worker_init_fn=ignore_stop_signals,
        multiprocessing_context="forkserver" if workers else None,
        generator=torch.Generator(),  # else it would draw from the main process's random numbers
    )


class _Batch(tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]):
    """Images and targets; from a worker the targets travel by value.

    PyTorch sends each tensor as a file descriptor, which takes longer than a target's few bytes.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        images, targets = self
        values = [{name: value.numpy() for name, value in target.items()} for target in targets]
        return _received, (images, values)


def _received(images: list[torch.Tensor], values: list[dict[str, np.ndarray]]) -> _Batch:
    targets = [{name: torch.from_numpy(v) for name, v in target.items()} for target in values]
    return _Batch((images, targets))


def collate(
    samples: list[tuple[torch.Tensor, dict[str, torch.Tensor]]],
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Make a batch: images of different sizes stay a list."""
    images, targets = zip(*samples, strict=True)
    return _Batch((list(images), list(targets)))
