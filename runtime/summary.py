"""The table and the warnings that a run logs before its first step."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime import checkpoint
from runtime.distributed import Processes
from utils import file_errors, logger, printable, usable_cores

RECIPE_BATCH = 16  # the global batch that the recipe's learning rate is for: 8 GPUs, 2 images each
RECIPE_RATES = {"sgd": 0.01, "sgd_nesterov": 0.01, "adamw": 1e-4}  # published for that batch


WAITING = 0.2  # warn if a larger share of the time is spent waiting for data


def describe_devices(device: torch.device, world_size: int) -> str:
    """Return the number and kind of the devices in use."""
    if device.type == "cuda":
        return f"{world_size} x {torch.cuda.get_device_name(device)}"
    return f"{world_size} x cpu, {torch.get_num_threads()} threads each"


def describe_precision(amp: str | None, device: torch.device) -> str:
    """Return the precision of a run, and on CUDA where TF32 takes the place of fp32."""
    if amp or device.type != "cuda":
        return amp or "fp32"
    used = {
        "convolutions": torch.backends.cudnn.conv.fp32_precision == "tf32",  # type: ignore
        "matrix products": torch.get_float32_matmul_precision() != "highest",
    }
    parts = " and ".join(name for name, is_tf32 in used.items() if is_tf32)
    return f"fp32, with TF32 in {parts}" if parts else "fp32, without TF32"


def rate_warnings(opt: str, lr: float, global_batch: int, is_from_detector: bool) -> list[str]:
    """Return a warning if a learning rate is not that of the recipe for the global batch.

    Fine-tuning (`is_from_detector`) often uses a lower rate, so that is no warning.
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
    """Describe the weights of a run that starts or resumes at optimizer step `step`."""
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


def size_warnings(policy: str, min_size: int | None, max_size: int | None) -> list[str]:
    """Return a warning if an evaluation takes the square training size of `lsj`."""
    if policy != "lsj" or min_size is None or min_size != max_size:
        return []
    return [
        f"--min-size {min_size} --max-size {max_size} with lsj: lsj trains at its own 1024 pixels, "
        f"so these only limit the longer side in evaluation, to {max_size}; published numbers are "
        "at 800 and 1333, the model's own: leave both flags out"
    ]


def processes_on_this_machine() -> int:
    """Return the number of the run's processes on this machine, from torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def log_table(title: str, rows: Mapping[str, str], warnings: Sequence[str]) -> None:
    """Log the setup as a table, then each warning."""
    logger.info("%s%s", title, "".join(f"\n  {name:14} {text}" for name, text in rows.items()))
    for warning in warnings:
        logger.warning("warning: %s", warning)


def describe_repeats(factors: np.ndarray, pairs: np.ndarray, names: Sequence[str]) -> str:
    """Return how many samples an epoch has, and how often it shows the three rarest classes.

    Args:
        factors: `[I]` how often an epoch shows each image.
        pairs: `[P, 2]` (image, class) for each class that an image has.
        names: of the classes.
    """
    samples = round(factors.sum())
    if samples == len(factors):
        return f"{samples:,} an epoch, each image once"
    images, classes = pairs.T
    counts = np.bincount(classes)
    shown = np.bincount(classes, factors[images])
    rarest = [c for c in np.argsort(counts, kind="stable") if counts[c]][:3]
    texts = [f"{names[c]} in {counts[c]:,} images comes {shown[c]:,.0f} times" for c in rarest]
    return f"{samples:,} an epoch of {len(factors):,} images; {', '.join(texts)}"


def setup_table(
    settings: Mapping[str, Any],
    model: torch.nn.Module,
    train_data: Any,
    val_data: Any,
    processes: Processes,
    versions: Mapping[str, str],
    *,
    lr: float,
    steps_per_epoch: int,
    samples: str,
    step: int,
    disk: str,
) -> dict[str, str]:
    """Return the setup of the run as text, by name.

    Args:
        settings: the flags, and "batches_per_step".
        train_data, val_data: `coco_utils.CocoDetection` each.
        samples: how many an epoch has and how often classes come, for people.
    """
    per_step = settings["batches_per_step"]
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    images = f"{len(train_data)} of {len(train_data.annotations)} images to train on"
    classes = [printable(category["name"]) for category in train_data.label_map]
    names = ", ".join(classes)
    length = f"{settings['epochs']} epochs of {steps_per_epoch} steps"
    if settings["patience"]:
        length += f", at most: until {settings['patience']} evaluations bring no better AP"
    return {
        "data": f"{images}, {len(val_data)} to evaluate",
        "classes": f"{len(classes)}: {names if len(names) <= 70 else names[:69] + '…'}",
        "model": f"{settings['model']}, {count:,} parameters, {trained:,} of them trained",
        "weights": describe_weights(settings["weights"], settings["weights_backbone"], step),
        "global batch": f"{settings['batch_size'] * per_step} images: {settings['batch_size']} "
        f"x {processes.world_size} processes x {per_step // processes.world_size} accumulated",
        "learning rate": f"{lr:g}, {settings['opt']}",
        "samples": printable(samples),
        "length": length,
        "disk": disk,
        "precision": describe_precision(settings["amp"], processes.device),
        "devices": describe_devices(processes.device, processes.world_size),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items() if k != "revision"),
        "git revision": versions["revision"],
    }


def setup_warnings(
    settings: Mapping[str, Any], train_data: Any, processes: Processes, lr: float
) -> list[str]:
    """Return what may be wrong with the settings of a run, on this machine."""
    global_batch = settings["batch_size"] * settings["batches_per_step"]
    is_from_scratch = not (settings["weights"] or settings["weights_backbone"])
    workers, processes_here = settings["workers"], processes_on_this_machine()
    warnings = [
        *rate_warnings(settings["opt"], lr, global_batch, settings["weights"]),
        *scratch_warnings(settings["opt"], is_from_scratch, settings["clip_grad_norm"]),
        *worker_warnings(workers, processes_here, usable_cores()),
        *precision_warnings(settings["amp"], processes.device),
        *size_warnings(*(settings[k] for k in ("data_augmentation", "min_size", "max_size"))),
    ]
    if Path("/dev/shm").is_dir():  # not on macOS
        pixels = float(train_data.sizes().astype(np.float64).prod(axis=1).mean())
        batch = int(settings["batch_size"] * 3 * pixels)
        free = shutil.disk_usage("/dev/shm").free
        warnings += shared_memory_warnings(workers, processes_here, batch, free)
    return warnings


def disk_use(
    folder: Path, settings: Mapping[str, Any], checkpoint_bytes: int, steps_per_epoch: int
) -> tuple[str, list[str]]:
    """Return the disk space that checkpoints need and that is free, as text, and warnings."""
    epochs = settings["epochs"]
    if settings["max_steps"]:
        epochs = min(epochs, settings["max_steps"] // steps_per_epoch)
    keep = settings["keep_checkpoints"]
    kept = epochs if keep is None else min(epochs, keep)
    others = 3  # checkpoint.pth, the one before, best.pth
    existing = [path for path in checkpoint.checkpoints_in(folder) if path.is_file()]
    # For a moment there is one more, a temporary file beside the others.
    needed = (kept + others + 1) * checkpoint_bytes - sum(p.stat().st_size for p in existing)
    with file_errors("read", folder):
        free = shutil.disk_usage(folder).free
    text = (
        f"{kept} model_EPOCH.pth and {others} more checkpoints of {checkpoint_bytes / 1e9:.2g} GB: "
        f"{(kept + others) * checkpoint_bytes / 1e9:.3g} GB; {free / 1e9:.3g} GB free"
    )
    if needed <= free:
        return text, []
    return text, [
        f"{folder} needs {needed / 1e9:.3g} GB for checkpoints and has {free / 1e9:.3g} GB free; "
        "--keep-checkpoints 1 keeps one epoch and the best"
    ]
