"""What people see while a run trains: what it is about to do, how far it is, what may be wrong.

On a terminal there is a bar; everywhere else, a log file included, the same is a line now and then.
"""

from __future__ import annotations

import datetime
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from utils import is_terminal, logger

RECIPE_BATCH = 16  # the global batch that the recipe's learning rate is for: 8 GPUs, 2 images each
RECIPE_RATES = {"sgd": 0.01, "sgd_nesterov": 0.01, "adamw": 1e-4}  # published for that batch
WAITING = 0.2  # share of a step spent waiting for data from which on it is worth a warning


class Progress:
    """Shows where a run is, on rank 0: steps, rate, and the time that the epoch and the run need.

    Args:
        steps_per_epoch, epochs: of the run, optimizer steps.
        global_batch: images per optimizer step.
        is_shown: whether this process shows anything.
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
                **{"loss": "loss", "lr": "lr", "images_per_second": "img/s"},
                **{"data_time_share": "data", "memory_mb": "MB", "run_left": "run left"},
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
        """Take the bar from the terminal."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def short(value: float) -> str:
    """Return a number as logs show it."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def describe_devices(device: torch.device, world_size: int) -> str:
    """Return how many of which device a run uses."""
    if device.type == "cuda":
        return f"{world_size} x {torch.cuda.get_device_name(device)}"
    return f"{world_size} x cpu, {torch.get_num_threads()} threads each"


def rate_warnings(opt: str, lr: float, global_batch: int, is_from_detector: bool) -> list[str]:
    """Return a warning if a learning rate is not that of the recipe for the global batch.

    Fine-tuning (`is_from_detector`) with a lower one is what one does.
    """
    expected = RECIPE_RATES[opt] * global_batch / RECIPE_BATCH
    # Adam's step does not grow with the gradient, and rates of ten times the recipe's are in use.
    too_high = 1.5 if opt != "adamw" else 20
    if lr <= too_high * expected and (is_from_detector or lr * 2 > expected):
        return []
    published = f"{RECIPE_RATES[opt]:g} for {RECIPE_BATCH} images"
    return [
        f"--lr {lr:g} with {opt} and a global batch of {global_batch}: the recipe's {published} "
        f"would be {expected:g}; give that, or --scale-lr, or keep the batch with "
        "--accumulate-steps"
    ]


def describe_weights(weights: str | None, weights_backbone: str | None, step: int) -> str:
    """Return what a run's weights are when it goes on at optimizer step `step`."""
    start = "none: everything random"
    if weights:  # the backbone's are then replaced
        start = f"{weights}, of the detector"
    elif weights_backbone:
        start = f"{weights_backbone}, of the backbone; the rest is random"
    return f"of step {step}; at the start {start}" if step else start


def scratch_warnings(opt: str, is_from_scratch: bool, clip_grad_norm: float | None) -> list[str]:
    """Return a warning if SGD trains random weights without clipping, which ends in NaN."""
    if opt == "adamw" or not is_from_scratch or clip_grad_norm is not None:
        return []
    return [
        f"everything is random and {opt} does not clip: such runs often end in NaN, at any batch "
        "size; give --weights or --weights-backbone, or from scratch --opt adamw --lr 5e-4 "
        "--wd 0.05 --clip-grad-norm 1"
    ]


def worker_warnings(workers: int, processes_here: int, cores: int) -> list[str]:
    """Return a warning if there are more loader workers on this machine than cores for them."""
    if workers * processes_here <= cores:
        return []
    return [
        f"--workers {workers} for {processes_here} processes on {cores} cores: they will wait for "
        f"each other; --workers {max(1, cores // processes_here)} uses every core once"
    ]


def shared_memory_warnings(workers: int, processes_here: int, batch: int, free: int) -> list[str]:
    """Return a warning if /dev/shm, with `free` bytes, may not hold the batches of the workers.

    DataLoader keeps two batches per worker there, of `batch` bytes each, and one is in use.
    """
    needed = 3 * workers * processes_here * batch
    if needed <= free:
        return []
    return [
        f"/dev/shm has {free / 1e6:.0f} MB free and the loader workers may need "
        f"{needed / 1e6:.0f} MB; start docker with --ipc=host, or give --workers 0"
    ]


def waiting_warnings(share: float, workers: int) -> list[str]:
    """Return a warning if the device waits for data for `share` of the time, at most 1."""
    if share <= WAITING:
        return []
    needed = "as many as there are cores"
    if workers:  # they now deliver at the rate at which the device works 1 - share of the time
        needed = f"at least {math.ceil(workers / max(1 - share, 0.05))}"
    return [
        f"{share:.0%} of the time goes into waiting for images: the {workers} loader workers of "
        f"each process are too few, give --workers {needed} if the machine has the cores"
    ]


def precision_warnings(amp: str | None, device: torch.device) -> list[str]:
    """Return a warning if `amp` is a precision that the device computes slowly in."""
    if amp != "fp16" or device.type != "cpu":
        return []
    return [
        "--amp fp16 on a CPU: convolutions have no fast kernels for it there and take many times "
        "as long as in fp32; --amp bf16 is the fast one"
    ]


def processes_on_this_machine() -> int:
    """Return how many processes of the run share this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def log_table(title: str, rows: Mapping[str, str], warnings: Sequence[str]) -> None:
    """Log what will run as a table, then each warning."""
    logger.info("%s%s", title, "".join(f"\n  {name:14} {text}" for name, text in rows.items()))
    for warning in warnings:
        logger.warning("warning: %s", warning)
