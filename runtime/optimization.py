"""The optimizer, and the one schedule of its learning rate.

Source: torchvision's references/detection/train.py.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def build_optimizer(
    model: nn.Module,
    lr: float,
    *,
    opt: str,
    momentum: float,
    wd: float,
    norm_weight_decay: float | None,
) -> torch.optim.Optimizer:
    """Build the optimizer of the trainable parameters, fused; flags as in `--help`."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    of_norms = {p for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained, "weight_decay": wd}]
    if norm_weight_decay is not None:
        groups[0]["params"] = [p for p in trained if p not in of_norms]
        norms_only = [p for p in trained if p in of_norms]
        groups.append({"params": norms_only, "weight_decay": norm_weight_decay})
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if opt == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
        averages = ["exp_avg", "exp_avg_sq"]
    else:
        nesterov = opt == "sgd_nesterov"
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
        averages = ["momentum_buffer"] if momentum else []
    # The state that torch makes in the first step. It makes none if that step is skipped, and a
    # resume compares the state in a checkpoint with this one.
    for parameter in itertools.chain(*(group["params"] for group in groups)):
        if opt == "adamw":
            optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device)
        for name in averages:
            optimizer.state[parameter][name] = torch.zeros_like(parameter)
    return optimizer


def build_scheduler(
    optimizer: torch.optim.Optimizer, steps_per_epoch: int, **schedule: Any
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule of the learning rate, a pure function of the step; see `lr_factor`."""
    factor = functools.partial(lr_factor, steps_per_epoch, **schedule)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def lr_factor(
    steps_per_epoch: int,
    step: int,
    *,
    epochs: int,
    lr_scheduler: str = "multisteplr",
    lr_steps: Sequence[int] = (16, 22),
    lr_gamma: float = 0.1,
    warmup_steps: int | None = None,
) -> float:
    """Return the factor on the base learning rate at optimizer step `step`, counted from 0.

    Warm-up is linear from 1/1000; None is the recipe's 1,000 steps, but over before the first epoch
    ends, so that an epoch of one step has none. After it, `lr_gamma` for each of `lr_steps` passed,
    or half a cosine over all steps.
    """
    warmup = min(1000, steps_per_epoch - 1) if warmup_steps is None else warmup_steps
    if lr_scheduler == "cosineannealinglr":
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, step / (steps_per_epoch * epochs))))
    else:
        factor = lr_gamma ** sum(step >= epoch * steps_per_epoch for epoch in lr_steps)
    if step < warmup:
        factor *= 1e-3 + (1 - 1e-3) * step / warmup
    return factor
