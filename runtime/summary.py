"""The table and the warnings that a run logs before its first step."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from runtime import checkpoint
from utils import file_errors, logger, printable, usable_cores

if TYPE_CHECKING:
    from runtime.run_folder import Run
    from runtime.train_state import TrainState

RECIPE_BATCH = 16  # the global batch that the recipe's learning rate is for: 8 GPUs, 2 images each
RECIPE_RATES = {"sgd": 0.01, "sgd_nesterov": 0.01, "adamw": 1e-4}  # published for that batch
WAITING = 0.2  # warn if a larger share of the time is spent waiting for data


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


def describe_weights(weights: str | None, weights_backbone: str | None, step: int) -> str:
    """Describe the weights of a run that starts or resumes at optimizer step `step`."""
    start = "none: everything random"
    if weights:  # the backbone's are then replaced
        start = f"{weights}, of the detector"
    elif weights_backbone:
        start = f"{weights_backbone}, of the backbone; the rest is random"
    return f"of step {step}; at the start {start}" if step else start


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


def log_setup(run: Run) -> dict[str, str]:
    """Log the setup of a run and what may be wrong with it; return the setup as text, by name."""
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    pixels = run.train_data.sizes().astype(np.float64).prod(axis=1).mean()
    shared_memory = math.inf
    if Path("/dev/shm").is_dir():  # not on macOS
        shared_memory = shutil.disk_usage("/dev/shm").free
    warnings = setup_warnings(
        run.settings,
        run.lr,
        processes_here,
        usable_cores(),
        batch_bytes=int(run.settings["batch_size"] * 3 * pixels),
        shared_memory=shared_memory,
    )
    steps_per_epoch = run.sampler.steps_per_epoch
    disk, more = disk_use(run.folder, run.settings, checkpoint_bytes(run.state), steps_per_epoch)
    table = setup_table(run, disk)
    rows = "".join(f"\n  {name:14} {text}" for name, text in table.items())
    logger.info("%s from step %d%s", run.folder, run.state.step, rows)
    for warning in [*warnings, *more]:
        logger.warning("warning: %s", warning)
    return table


def checkpoint_bytes(state: TrainState) -> int:
    """Return the size of a checkpoint, but for the few bytes of plain values."""
    weights = list(state.model.state_dict().values())
    averages = [t for values in state.optimizer.state.values() for t in values.values()]
    tensors = weights + (weights if state.ema is not None else []) + averages
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def setup_warnings(
    settings: Mapping[str, Any],
    lr: float,
    processes_here: int,
    cores: int,
    batch_bytes: int,
    shared_memory: float,
) -> list[str]:
    """Return what may be wrong with the settings of a run, on this machine.

    Args:
        settings: the flags, "batches_per_step" and "device".
        lr: the base learning rate in use.
        processes_here: of the run, on this machine, which has `cores`.
        batch_bytes: of the images of a micro-batch, on average.
        shared_memory: bytes that are free in /dev/shm.
    """
    opt, workers, batch = settings["opt"], settings["workers"], settings["batch_size"]
    warnings = []
    batch *= settings["batches_per_step"]
    expected = RECIPE_RATES[opt] * batch / RECIPE_BATCH
    highest = 1.5 * expected
    if opt == "adamw":  # its step does not grow with the gradient: 5e-4 works at any batch size
        highest = 10 * max(expected, RECIPE_RATES[opt])
    is_too_low = lr * 2 <= expected and not settings["weights"]  # fine-tuning often has less
    if lr > highest or is_too_low:
        warnings.append(
            f"--lr {lr:g} with {opt} and a global batch of {batch}: the recipe's "
            f"{RECIPE_RATES[opt]:g} for {RECIPE_BATCH} images would be {expected:g}; give that, or "
            "--scale-lr, or keep the batch with --batch-size and --accumulate-steps"
        )
    is_random = not (settings["weights"] or settings["weights_backbone"])
    if is_random and opt != "adamw" and settings["clip_grad_norm"] is None:
        warnings.append(
            f"everything is random and {opt} does not clip: such runs often end in NaN, at any "
            "batch size; give --weights or --weights-backbone, or from scratch --opt adamw "
            "--lr 5e-4 --wd 0.05 --clip-grad-norm 1"
        )
    if workers * processes_here > cores:
        warnings.append(
            f"--workers {workers} for {processes_here} processes on {cores} cores: they will wait "
            f"for each other; --workers {max(1, cores // processes_here)} uses every core once"
        )
    if settings["amp"] == "fp16" and settings["device"] == "cpu":
        warnings.append(
            "--amp fp16 on a CPU: convolutions have no fast kernels for it there and take many "
            "times as long as in fp32; --amp bf16 is the fast one"
        )
    size = settings["max_size"]
    if settings["data_augmentation"] == "lsj" and size is not None and settings["min_size"] == size:
        warnings.append(
            f"--min-size {size} --max-size {size} with lsj: lsj trains at its own 1024 pixels, so "
            f"these only limit the longer side in evaluation, to {size}; published numbers are at "
            "800 and 1333, the model's own: leave both flags out"
        )
    # DataLoader keeps two batches per worker in shared memory, and one is in use.
    needed = 3 * workers * processes_here * batch_bytes
    if needed > shared_memory:
        warnings.append(
            f"/dev/shm has {shared_memory / 1e6:.0f} MB free and the loader workers may need "
            f"{needed / 1e6:.0f} MB; start docker with --ipc=host, or give --workers 0"
        )
    return warnings


def setup_table(run: Run, disk: str) -> dict[str, str]:
    """Return the setup of a run as text, by name."""
    settings, versions, processes = run.settings, run.extra["versions"], run.processes
    batch, per_step = settings["batch_size"], settings["batches_per_step"]
    parameters, sampler, train = list(run.state.model.parameters()), run.sampler, run.train_data
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    classes = [printable(category["name"]) for category in train.label_map]
    names = ", ".join(classes)
    length = f"{settings['epochs']} epochs of {sampler.steps_per_epoch} steps"
    if settings["patience"]:
        length += f", at most: until {settings['patience']} evaluations bring no better AP"
    device = f"cpu, {torch.get_num_threads()} threads each"
    if processes.device.type == "cuda":
        device = torch.cuda.get_device_name(processes.device)
    pairs = train.annotations.classes_in_images(train.keep)
    repeats = describe_repeats(sampler.factors, pairs, [n for _, n in train.annotations.categories])
    weights, backbone = settings["weights"], settings["weights_backbone"]
    return {
        "data": f"{len(train)} of {len(train.annotations)} images to train on, "
        f"{len(run.val_data)} to evaluate",
        "classes": f"{len(classes)}: {names if len(names) <= 70 else names[:69] + '…'}",
        "model": f"{settings['model']}, {sum(p.numel() for p in parameters):,} parameters, "
        f"{trained:,} of them trained",
        "weights": describe_weights(weights, backbone, run.state.step),
        "global batch": f"{run.global_batch} images: {batch} x {processes.world_size} processes x "
        f"{per_step // processes.world_size} accumulated",
        "learning rate": f"{run.lr:g}, {settings['opt']}",
        "samples": printable(repeats),
        "length": length,
        "disk": disk,
        "precision": describe_precision(settings["amp"], processes.device),
        "devices": f"{processes.world_size} x {device}",
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items() if k != "revision"),
        "git revision": versions["revision"],
    }


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
