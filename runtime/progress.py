"""The log of a run and its progress: a bar, lines of figures, the time left.

A terminal shows a bar. Everywhere else, also in a log file, there is a line every few steps.
"""

from __future__ import annotations

import datetime
import logging
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from utils import logger, printable


class PrintableFormatter(logging.Formatter):
    """Formats a record without control characters; line breaks stay, for tables."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as safe text."""
        return printable(super().format(record), keep="\n\t")


def is_terminal(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal, wide enough for a progress bar."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns >= 40
    except (OSError, ValueError):
        return False


class TerminalHandler(logging.StreamHandler):
    """Logs to a terminal above the progress bar, which replaces the lines of figures."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record above the bar, unless the bar shows it."""
        if getattr(record, "is_on_bar", False):
            return
        with suppress(OSError):  # the terminal was closed; the run goes on
            tqdm.write(self.format(record), file=self.stream)


def set_up_logging(rank: int, log_file: Path | None = None) -> None:
    """Send the log to standard output and, if not None, to `log_file`; other ranks only warn."""
    terminal = TerminalHandler if is_terminal(sys.stdout) else logging.StreamHandler
    handlers: list[logging.Handler] = [terminal(sys.stdout)]
    if log_file is not None:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace"))
    layout = f"%(asctime)s [rank {rank}] %(message)s" if rank else "%(asctime)s %(message)s"
    for handler in handlers:
        handler.setFormatter(PrintableFormatter(layout, "%H:%M:%S"))
    logger.handlers = handlers
    logger.propagate = False
    logger.setLevel(logging.WARNING if rank else logging.INFO)


class Progress:
    """Shows the progress of a run: steps, rate, and the time left. Only rank 0 calls it.

    Args:
        steps_per_epoch, epochs: of the run, optimizer steps.
        global_batch: images per optimizer step.
    """

    def __init__(self, steps_per_epoch: int, epochs: int, global_batch: int) -> None:
        self.steps_per_epoch, self.epochs = steps_per_epoch, epochs
        self.global_batch = global_batch
        self.bar: tqdm[Any] | None = None
        self.has_figures = False  # the bar, from a line
        self.first: tuple[int, float] | None = None  # step, and when it was done

    def step(self, step: int) -> None:
        """Move the bar to optimizer step `step` of the run, counted from 1."""
        if not is_terminal(sys.stdout):
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
            self.has_figures = False
        now = time.perf_counter()
        first_step, first_time = self.first = self.first or (step, now)
        if not self.has_figures and step > first_step:
            rate = self.global_batch * (step - first_step) / (now - first_time)
            left = self.time_left(step, rate)["run_left"]
            self.bar.set_postfix_str(f"run left={left}", refresh=False)
        self.bar.update(done + 1 - self.bar.n)
        if done + 1 == self.steps_per_epoch:
            self.close()

    def line(self, step: int, record: Mapping[str, Any]) -> None:
        """Log a line of figures after optimizer step `step`, with the time left; feed the bar."""
        left = self.time_left(step, record["images_per_second"])
        shown = {**{name: short(value) for name, value in record.items()}, **left}
        logger.info("  ".join(f"{k} {v}" for k, v in shown.items()), extra={"is_on_bar": True})
        if self.bar is not None:
            figures = (
                f"loss={shown['loss']}, lr={shown['lr']}, img/s={shown['images_per_second']}, "
                f"data={shown['data_time_share']}, MB={shown['memory_mb']}, "
                f"run left={left['run_left']}"
            )
            self.bar.set_postfix_str(figures, refresh=False)
            self.has_figures = True

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
