"""Load a checkpoint into a run, or refuse one that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint import PARTS
from runtime.flags import IGNORE, LOG, REFUSE, ArgumentParser
from runtime.train_state import TrainState
from utils import UserError, logger

# The options of an optimizer that a step needs, as far as it has them.
HYPERPARAMETERS = {"lr", "weight_decay", "momentum", "betas", "eps"}
# What a resume does if one of these, which are no flags, differs from the checkpoint's.
ON_RESUME = {
    "data": REFUSE,
    "batches_per_step": REFUSE,
    "val_data": LOG,
    "device": LOG,
    "torch": LOG,
}


def resume_run(
    state: TrainState,
    saved: dict[str, Any],
    source: Path,
    *,
    settings: Mapping[str, Any],
    parser: ArgumentParser,
    explained: Mapping[str, Callable[[], str]],
    steps_per_epoch: int,
) -> None:
    """Load a checkpoint, `saved`, into `state`, if it continues this run.

    Args:
        settings: of this run, by name: the flags, which `parser` declares, and those in
            `ON_RESUME`.
        explained: functions that describe a change of a setting whose values say nothing.

    Raises:
        UserError: lists the settings that differ, or what does not fit the model.
    """
    saved = from_torchvision(saved, settings, steps_per_epoch, source)
    on_resume = parser.on_resume | ON_RESUME
    check_same_run(parser.defaults() | saved["args"], settings, on_resume, source, explained)
    require_fitting(saved, state, source)
    state.load_state_dict(saved)


def require_fitting(saved: Mapping[str, Any], state: TrainState, source: Path) -> None:
    """Raise UserError unless a checkpoint has all parts that a run of this model needs.

    The message names what is missing, or the first tensors that differ.
    """
    missing = [name for name in PARTS if name not in saved and name not in ("categories", "data")]
    problem = f"it lacks {', '.join(missing)}" if missing else ""
    weights = state.model.state_dict()
    for name in ("model", "ema"):
        if not problem and saved[name]:
            problem = _difference(saved[name], weights, name)
    problem = problem or _optimizer_difference(saved["optimizer"], state.optimizer)
    if not problem:
        lacks = [name for name in state.scaler.state_dict() if name not in saved["scaler"]]
        problem = f"its 'scaler' lacks {', '.join(lacks)}" if lacks else ""
    if problem:
        raise UserError(
            f"--resume {source} does not fit this run: {problem}; take another checkpoint, or "
            "begin from its weights with --weights"
        )


def _difference(
    saved: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], part: str
) -> str:
    """Return how the tensors differ in name or shape, the first three; empty if they do not."""
    differing = [f"{name} is missing" for name in expected if name not in saved]
    differing += [f"{name} is unknown" for name in saved if name not in expected]
    differing += [
        f"{name} has the shape {list(saved[name].shape)}, not {list(value.shape)}"
        for name, value in expected.items()
        if name in saved and saved[name].shape != value.shape
    ]
    if not differing:
        return ""
    return f"of its {part!r}, {len(differing)} tensors differ: {', '.join(differing[:3])}"


def _optimizer_difference(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> str:
    """Return why the state of an optimizer does not fit this one; empty if it does."""
    groups, saved_groups = optimizer.param_groups, saved["param_groups"]
    sizes, saved_sizes = ([len(g["params"]) for g in some] for some in (groups, saved_groups))
    if sizes != saved_sizes:
        return f"its 'optimizer' is for {saved_sizes} parameters by group, not {sizes}"
    for group, saved_group in zip(groups, saved_groups, strict=True):
        lacks = sorted(HYPERPARAMETERS & group.keys() - saved_group.keys())
        if lacks:
            return f"its 'optimizer' lacks {', '.join(lacks)}"
        for parameter, number in zip(group["params"], saved_group["params"], strict=True):
            state = optimizer.state[parameter]
            old = {k: v for k, v in saved["state"].get(number, {}).items() if v is not None}
            if not state or not old:  # of an optimizer that makes it in its first step
                continue
            if old.keys() != state.keys():
                return f"its 'optimizer' holds {', '.join(map(str, old))}, not {', '.join(state)}"
            for name, value in old.items():
                shape = list(state[name].shape)
                actual = list(value.shape) if isinstance(value, torch.Tensor) else value
                if actual != shape:
                    return f"{name} {number} of its 'optimizer' is {actual}, not of shape {shape}"
    return ""


def from_torchvision(
    saved: dict[str, Any], now: Mapping[str, Any], steps_per_epoch: int, source: Path
) -> dict[str, Any]:
    """Convert a checkpoint of torchvision's detection scripts to ours; return ours.

    Weights, optimizer, epoch and gradient scale are kept. The order of images is ours, and the
    schedule continues at the epoch. `now` describes this run; it fills in what torchvision's
    scripts do not save, such as a seed.

    Raises:
        UserError: names what the checkpoint lacks, if it cannot be continued.
    """
    if "step" in saved:
        saved.setdefault("evaluations", {})  # older ones have the best AP only
        return saved
    missing = [name for name in ("model", "optimizer", "epoch", "args") if name not in saved]
    if missing:
        raise UserError(
            f"--resume {source}: no checkpoint of a run, it lacks {', '.join(missing)}; to begin "
            "from its weights give it as --weights"
        )
    theirs = saved["args"] | {"amp": "fp16" if saved["args"].get("amp") else None}
    if "weight_decay" in theirs:
        theirs["wd"] = theirs["weight_decay"]
    # Their groups have normalisation first, ours last; their steps are not fused.
    groups = [group | {"fused": True} for group in reversed(saved["optimizer"]["param_groups"])]
    epoch = saved["epoch"] + 1
    logger.info("%s comes from torchvision's scripts: resuming at epoch %d", source, epoch)
    return {
        "model": saved["model"],
        "ema": None,
        "scaler": saved.get("scaler", {}),
        "optimizer": saved["optimizer"] | {"param_groups": groups},
        "epoch": epoch,
        "step": epoch * steps_per_epoch,
        "position": 0,
        "window": {},
        "evaluations": {},
        "args": {name: theirs.get(name, value) for name, value in now.items()},
    }


def check_same_run(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    on_resume: Mapping[str, str],
    source: Path,
    explained: Mapping[str, Callable[[], str]],
) -> None:
    """Raise UserError, listing old → new, unless a checkpoint continues the run described `now`.

    Args:
        saved: settings of the checkpoint; those that it lacks count as unchanged.
        on_resume: for each setting that is compared, whether a change is refused or logged.
        explained: functions that describe a change of a setting whose values say nothing.
    """
    changes: dict[str, list[str]] = {REFUSE: [], LOG: [], IGNORE: []}
    for name, what in on_resume.items():
        old, new = saved.get(name, now.get(name)), now.get(name)
        if old != new and what != IGNORE:
            explain = explained.get(name)
            changes[what].append(explain() if explain else f"{name}: {old} → {new}")
    if changes[REFUSE]:
        raise UserError(
            f"--resume {source} is a run with other settings: {'; '.join(changes[REFUSE])}; give "
            "the old ones, or start again in another --output-dir (with --weights to begin from "
            "its weights)"
        )
    for change in changes[LOG]:
        logger.warning("resuming with another %s", change)


def batches_per_step(accumulate_steps: int, world_size: int, saved: dict[str, Any]) -> int:
    """Return the micro-batches of an optimizer step, over all processes.

    A resumed run keeps its number. It accumulates more on fewer processes, and less on more.

    Raises:
        UserError: lists the numbers of processes that divide it, if this one does not.
    """
    wanted = saved.get("args", {}).get("batches_per_step")
    if wanted is None:  # a new run, or one of torchvision's scripts
        return accumulate_steps * world_size
    if wanted % world_size:
        fitting = [str(n) for n in range(1, wanted + 1) if wanted % n == 0]
        raise UserError(
            f"the run has {wanted} batches per optimizer step, which {world_size} processes cannot "
            f"share evenly; continue it on a number of processes that can: {', '.join(fitting)} "
            "(--accumulate-steps adjusts by itself)"
        )
    if wanted != accumulate_steps * world_size:
        logger.warning("--accumulate-steps %d keeps the global batch", wanted // world_size)
    return wanted
