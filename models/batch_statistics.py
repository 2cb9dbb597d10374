"""The running statistics of trained batch normalisation: what must leave no trace in them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class BatchStatistics:
    """The running statistics of a model's trained batch normalisation, which a step may restore."""

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.buffers = [buffer for module in norms for buffer in module.buffers()]
        self.synchronized = [m for m in norms if isinstance(m, nn.SyncBatchNorm)]

    @contextmanager
    def only_of_real_batches(self, weights: Sequence[float], rank: int) -> Iterator[None]:
        """Let a batch of weight 0, a stand-in, leave no trace; it normalises by itself.

        Args:
            weights: of the micro-batches of all processes; those of weight 0 come last.
        """
        num_real = sum(weight > 0 for weight in weights)
        for module in self.synchronized:
            is_some = 0 < num_real < len(weights)
            module.process_group = _first_processes(num_real) if is_some else None
        before = self.copy() if weights[rank] == 0 else None
        yield
        if before is not None:
            self.restore(before)

    def copy(self) -> list[Tensor]:
        """Return copies, for `restore`."""
        return [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def restore(self, values: list[Tensor], condition: Tensor | None = None) -> None:
        """Set the statistics to `values`; given a `condition`, only if that is true."""
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer.copy_(value if condition is None else torch.where(condition, value, buffer))


@functools.cache
def _first_processes(count: int) -> Any:
    """Return the group of the first processes; all processes make it once, at the same time."""
    return dist.new_group(list(range(count)))
