"""The progress of a run: a bar, lines of figures, the time left.

A terminal shows a bar. Everywhere else, also in a log file, there is a line every few steps.
"""

from __future__ import annotations

import datetime
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tqdm import tqdm

from utils import is_terminal, logger


class Progress:
    """Shows the progress of a run on rank 0: steps, rate, and the time left.

    Args:
        steps_per_epoch, epochs: of the run, optimizer steps.
        global_batch: images per optimizer step.
        is_shown: whether this process shows it.
    """

    def __init__(
        self, steps_per_epoch: int, epochs: int, global_batch: int, is_shown: bool = True
    ) -> None:
        self.steps_per_epoch, self.epochs = steps_per_epoch, epochs
        self.global_batch, self.is_shown = global_batch, is_shown
        self.bar: tqdm[Any] | None = None

    def step(self, step: int) -> None:
        """Move the bar to optimizer step `step` of the run, counted from 1."""
        if not self.is_shown or not is_terminal(sys.stdout):
            return
        epoch, done = divmod(step - 1, self.steps_per_epoch)
        if self.bar is None:
            self.bar = tqdm(
                total=self.steps_per_epoch,
                initial=done,
                desc=f"epoch {epoch} of {self.epochs}",
                unit="step",
                file=sys.stdout,
                dynamic_ncols=True,
                leave=False,
            )
        self.bar.update(done + 1 - self.bar.n)
        if done + 1 == self.steps_per_epoch:
            self.close()

    def line(self, step: int, record: Mapping[str, Any]) -> None:
        """Log a line of figures after optimizer step `step`, with the time left; feed the bar."""
        if not self.is_shown:
            return
        left = self.time_left(step, record["images_per_second"])
        shown = {**{name: short(value) for name, value in record.items()}, **left}
        logger.info("  ".join(f"{k} {v}" for k, v in shown.items()), extra={"is_on_bar": True})
        if self.bar is not None:
            names = {
                "loss": "loss",
                "lr": "lr",
                "images_per_second": "img/s",
                "data_time_share": "data",
                "memory_mb": "MB",
                "run_left": "run left",
            }
            figures = {short_name: shown[name] for name, short_name in names.items()}
            self.bar.set_postfix(figures, refresh=False)

    def time_left(self, step: int, images_per_second: float) -> dict[str, str]:
        """Return how long the epoch and the run still train at this rate, without evaluations."""
        seconds = self.global_batch / images_per_second
        steps = {
            "epoch_left": -step % self.steps_per_epoch,
            "run_left": max(0, self.epochs * self.steps_per_epoch - step),
        }
        return {
            name: str(datetime.timedelta(seconds=round(count * seconds)))
            for name, count in steps.items()
        }

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def short(value: float) -> str:
    """Return a number as logs show it."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def mean_line(log_sums: dict[str, float]) -> dict[str, float]:
    """Return the means of the losses, and of the gradient norms that are finite.

    Norms that are not finite are of steps that fp16 skipped; if it skipped all, the norm is 0.
    """
    sums = dict(log_sums)
    steps, norm, norms = (sums.pop(name, 0.0) for name in ("steps", "grad_norm", "norms"))
    return {name: s / steps for name, s in sums.items()} | {"grad_norm": norm / max(norms, 1)}


class Clock:
    """Measure images per second, the share of time spent waiting for data, and peak memory."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self.start, self.waited, self.images = time.perf_counter(), 0.0, 0

    def watch(self, steps: Iterator[Any]) -> Iterator[Any]:
        """Yield from `steps`, timing each wait."""
        while True:
            begin = time.perf_counter()
            step = next(steps, None)
            self.waited += time.perf_counter() - begin
            if step is None:
                return
            yield step

    def count(self, images: int) -> None:
        """Count images that all processes together have trained on."""
        self.images += images

    def read(self, device: torch.device) -> dict[str, float]:
        """Return the figures since the last call, and start again."""
        elapsed = time.perf_counter() - self.start
        figures = {
            "images_per_second": self.images / elapsed,
            "data_time_share": self.waited / elapsed,
        }
        if device.type == "cuda":
            figures["memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
            figures["memory_mb"] = peak / (2**20 if sys.platform == "darwin" else 2**10)
        self._restart()
        return figures
