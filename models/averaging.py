"""The exponential moving average (EMA) of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class EMA(AveragedModel):
    """The exponential average of a model's weights and batch statistics over optimizer steps.

    It begins with the weights after the first step. What differs from torch's own update: that
    copies the number of updates to the device, and the host waits for each copy.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.move = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module, is_skipped: Tensor | None = None) -> None:
        """Move the average towards the weights of `model`.

        `is_skipped`, on the device, is true for a step that was not taken: nothing changes then.
        """
        averaged, current = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        if is_skipped is not None:  # the average of a value with itself is that value, to the bit
            pairs = zip(averaged, current, strict=True)
            current = [torch.where(is_skipped, old, new) for old, new in pairs]
        is_first = self.n_averaged == 0  # n_averaged stays on the CPU
        moving = []
        for old, new in zip(averaged, current, strict=True):
            if is_first or not old.is_floating_point():  # integers: a number of batches
                old.copy_(new)
            else:
                moving.append((old, new))
        if moving:
            self.move([old for old, _ in moving], [new for _, new in moving], self.n_averaged)
        self.n_averaged += 1


def make_ema(model: nn.Module, decay: float | None) -> EMA | None:
    """Return the average that `--ema-decay` asks for, or None."""
    return None if decay is None else EMA(model, decay)
