"""The state of training, and values of a step that the host reads after the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.distributed import Processes
from utils import UserError, logger

MIN_SCALE = 1e-4  # of fp16's gradients; fairseq's --min-loss-scale: what overflows below diverges


@dataclass
class TrainState:
    """The state of training: all that a checkpoint must hold to continue bit-identical.

    Attributes:
        epoch: the one in progress, or next.
        step: optimizer steps done in the whole run.
        position: micro-batches of this epoch done, over all processes.
        log_sums: sums since the last logged line, by name; the same on every process. A checkpoint
            calls them "window".
        evaluations: the AP of every epoch that was evaluated, in order.
        last_step: whose gradient norm the host has yet to read; not part of a checkpoint.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    ema: Any = None  # a models.EMA
    epoch: int = 0
    step: int = 0
    position: int = 0
    log_sums: dict[str, float] = field(default_factory=dict)
    evaluations: dict[int, float] = field(default_factory=dict)
    last_step: LastStep | None = None

    def settle(self) -> None:
        """Wait for the gradient norm of the last step, and count it in `log_sums`.

        Raises:
            UserError: on every process, if it is not finite and no smaller fp16 scale can mend it;
                the step has changed neither weights nor averages, and must not be saved.
        """
        if self.last_step is None:
            return
        may_skip = self.scaler.is_enabled() and self.scaler.get_scale() >= MIN_SCALE
        norm = self.last_step.checked_norm(may_skip)
        if norm is not None:
            self.add_to_log({"grad_norm": norm, "norms": 1.0})
        self.last_step = None

    def add_to_log(self, values: dict[str, float]) -> None:
        """Add values to the sums for the next line of the log."""
        for name, value in values.items():
            self.log_sums[name] = self.log_sums.get(name, 0.0) + value

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types and tensors, for `checkpoint.save`.

        Raises:
            UserError: if anything in it is not finite, so that no such checkpoint is ever written.
        """
        self.settle()
        state = self._state_dict()
        tensors = {**state["model"], **{f"ema.{k}": v for k, v in (state["ema"] or {}).items()}}
        for number, values in state["optimizer"]["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
        floats = {k: v for k, v in tensors.items() if v.is_floating_point() and v.numel()}
        # The largest magnitude of all, with one wait; a NaN stays one.
        if not nn.utils.get_total_norm(list(floats.values()), math.inf).isfinite():
            wrong = [name for name, value in floats.items() if not value.isfinite().all()]
            raise UserError(
                f"{len(wrong)} tensors are not finite after step {self.step}, such as {wrong[0]}; "
                "nothing was saved, and checkpoints are of steps before it. Most likely the "
                "learning rate is too high: resume with a lower --lr or with --clip-grad-norm 1"
            )
        return state

    def _state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "position": self.position,
            "window": dict(self.log_sums),
            "evaluations": dict(self.evaluations),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"] or state["model"])
            self.ema.n_averaged.fill_(state["step"])
        # The rate of each group comes from the schedule, so that another one takes effect.
        rates = [group["initial_lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        # Fused optimizers walk raw memory: a tensor of another layout than its parameter's, as
        # after --no-channels-last or from torchvision's scripts, would update the wrong weights.
        for parameter, tensors in self.optimizer.state.items():
            for name, value in tensors.items():
                if name != "step" and torch.is_tensor(value):
                    tensors[name] = torch.empty_like(parameter).copy_(value)
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.position = state["epoch"], state["step"], state["position"]
        self.log_sums, self.evaluations = dict(state["window"]), dict(state["evaluations"])
        # The schedule is a function of the step: this is where it would be had it never stopped.
        self.scheduler.last_epoch, self.scheduler._step_count = self.step, self.step + 1
        for group, rate, factor in zip(
            self.optimizer.param_groups, rates, self.scheduler.lr_lambdas, strict=True
        ):
            group["initial_lr"] = rate
            group["lr"] = rate * factor(self.step)
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def best_epoch(self) -> int | None:
        """The epoch with the best AP, the first of equals; None before the first evaluation."""
        return max(self.evaluations, key=self.evaluations.__getitem__, default=None)

    @property
    def best(self) -> float | None:
        """The best AP so far; None before the first evaluation."""
        return max(self.evaluations.values(), default=None)

    @property
    def evaluations_since_best(self) -> int:
        """How many evaluations followed that with the best AP."""
        if self.best_epoch is None:
            return 0
        return sum(epoch > self.best_epoch for epoch in self.evaluations)

    @property
    def model_to_evaluate(self) -> nn.Module:
        """The averaged weights where there are some."""
        return self.model if self.ema is None else self.ema.module


class HostCopy:
    """A small tensor on its way to the host, read later so that the host need not wait."""

    def __init__(self, values: Tensor) -> None:
        self.event, self.values = None, values
        if values.is_cuda:
            self.values = torch.empty(values.shape, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def wait(self) -> list[float]:
        """Wait for the values and return them."""
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


@dataclass
class LastStep:
    """The last step's gradient norm, on its way to the host, and messages in case it is not finite.

    Gradients are reduced over processes, so that the norm is the same on all.
    """

    step: int
    targets: list[dict[str, Tensor]]
    image_name: Callable[[int], object]
    advice: str
    norm: HostCopy | None = None

    def require_finite_loss(self, means: dict[str, float], loss_here: Tensor) -> None:
        """Raise a UserError if the mean loss over processes is not finite, before the step."""
        if not math.isfinite(means["loss"]):
            if not loss_here.isfinite():
                self.log_images()
            raise UserError(f"the loss of step {self.step} is not finite ({means}); {self.advice}")

    def with_norm(self, norm: Tensor) -> LastStep:
        """Send the norm of the gradients to the host, without a wait; return this step."""
        self.norm = HostCopy(norm[None])
        return self

    def checked_norm(self, may_skip: bool) -> float | None:
        """Wait for the norm and return it; None if it is not finite and the step may be skipped.

        Raises:
            UserError: if it is not finite otherwise.
        """
        assert self.norm is not None
        (norm,) = self.norm.wait()
        if math.isfinite(norm):
            return norm
        if may_skip:
            return None
        self.log_images()
        raise UserError(
            f"the gradients of step {self.step} are not finite (norm {norm}); {self.advice}"
        )

    def log_images(self) -> None:
        """Log which images the step had on this process."""
        image_ids = [int(target["image_id"]) for target in self.targets]
        names = ", ".join(str(self.image_name(image_id)) for image_id in image_ids)
        logger.error("step %d is not finite; its images: %s", self.step, names)


class StepSums:
    """A step's losses and the wish to stop, summed over processes, on their way to the host.

    Make it before the backward pass and read it after: the copy ends while the host launches that
    pass, so the device is never idle.
    """

    def __init__(self, sums: dict[str, Tensor], should_stop: bool, processes: Processes) -> None:
        self.names = list(sums)
        # Each process's sum counts `weight`, whose average over processes is the mean of the step.
        values = [value.float() / processes.world_size for value in sums.values()]
        stop = values[0].new_full((), float(should_stop))
        packed = torch.stack([stop, *values])
        if processes.world_size > 1:
            dist.all_reduce(packed)
        self.packed = HostCopy(packed)

    def wait(self) -> tuple[bool, dict[str, float]]:
        """Return whether any process wants to stop, and the mean losses over processes."""
        stop, *means = self.packed.wait()
        return stop > 0, dict(zip(self.names, means, strict=True))


def advice_on_not_finite(
    optimizer: torch.optim.Optimizer,
    lr: float,
    amp_dtype: torch.dtype | None,
    clip_grad_norm: float | None,
) -> str:
    """Return advice on a step that is not finite, the most likely cause first."""
    causes = [f"the learning rate ({lr:g}) is too high: resume with a lower --lr"]
    if clip_grad_norm is None:
        causes[0] += " or with --clip-grad-norm 1"
        if isinstance(optimizer, torch.optim.SGD):
            causes[0] += (
                "; SGD from scratch needs that, or a new run with --weights-backbone or with "
                "--opt adamw --lr 5e-4 --wd 0.05 --clip-grad-norm 1"
            )
    if amp_dtype is torch.float16:
        causes.insert(0, "a value overflowed in fp16: begin a new run with --amp bf16")
    return (
        "the step was not taken, and checkpoints are of steps before it. Most likely "
        f"{', or '.join(causes)}. Only then check the boxes of the images that the log names "
        "(python -m tools.check_data)"
    )
