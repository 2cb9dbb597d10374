"""The training loop and the evaluation loop: plain values in, plain values out.

What differs from torchvision's references/detection/engine.py: the loop can start and stop at any
optimizer step and ends bit-identical to one that did not; a step waits for the device once, for the
losses and the flags of all processes together, and that while the backward pass is still running.
A step whose gradients are not finite changes nothing: the device skips it. The host reads their
norm with the flags of the next step, and stops the run; with fp16 the scale drops and it goes on.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import utils
from coco_eval import Analysis, CocoEvaluator, gather_rows, scores_of
from models.build import EMA
from runtime.distributed import MEETING_EVERY, Processes
from utils import UserError, logger

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]

MIN_SCALE = 1e-4  # of fp16's gradients; fairseq's --min-loss-scale: what overflows below diverges


@dataclass
class TrainState:
    """All that changes while a run trains, which is what a checkpoint must hold.

    Attributes:
        epoch: the one in progress, or next.
        step: optimizer steps done in the whole run.
        position: micro-batches of this epoch done, over all processes.
        window: sums since the last logged line, by name; the same on every process.
        best: the best AP so far, None before the first evaluation.
        unread: what the host has yet to learn of the last step; not part of a checkpoint.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    ema: EMA | None = None
    epoch: int = 0
    step: int = 0
    position: int = 0
    window: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    unread: _Unread | None = None

    def settle(self) -> None:
        """Wait for the gradient norm of the last step, and count it in `window`.

        Raises:
            UserError: on every process, if it is not finite and no smaller fp16 scale can mend it;
                the step has changed neither weights nor averages, and must not be saved.
        """
        if self.unread is None:
            return
        assert self.unread.norm is not None
        (norm,) = self.unread.norm.wait()
        if math.isfinite(norm):
            for name, value in (("grad_norm", norm), ("norms", 1.0)):
                self.window[name] = self.window.get(name, 0.0) + value
        elif not self.scaler.is_enabled() or self.scaler.get_scale() < MIN_SCALE:
            self.unread.log_images()
            raise UserError(
                f"the gradients of step {self.unread.step} are not finite (norm {norm}); "
                + self.unread.advice
            )
        self.unread = None

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
            "window": dict(self.window),
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, perhaps in another process."""
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
        self.window, self.best = dict(state["window"]), state["best"]
        # The schedule is a function of the step: this is where it would be had it never stopped.
        self.scheduler.last_epoch, self.scheduler._step_count = self.step, self.step + 1
        for group, rate, factor in zip(
            self.optimizer.param_groups, rates, self.scheduler.lr_lambdas, strict=True
        ):
            group["initial_lr"] = rate
            group["lr"] = rate * factor(self.step)
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def model_to_evaluate(self) -> nn.Module:
        """The averaged weights where there are some."""
        return self.model if self.ema is None else self.ema.module


def train_one_epoch(
    model: nn.Module,
    state: TrainState,
    batches: Iterable[Batch],
    processes: Processes,
    *,
    seed: int,
    batches_per_step: int,
    weight: Callable[[int], float],
    after_step: Callable[[dict[str, float] | None, bool], bool],
    amp_dtype: torch.dtype | None = None,
    clip_grad_norm: float | None = None,
    print_freq: int = 50,
    should_stop: Callable[[], bool] = lambda: False,
    image_name: Callable[[int], object] = str,
) -> bool:
    """Train from `state.position` to the end of the epoch, or to a stop between two steps.

    Args:
        model: `state.model`, or that wrapped in DistributedDataParallel.
        batches: this process's micro-batches from `state.position` on.
        seed: of random numbers that the model draws, with epoch and position.
        batches_per_step: micro-batches per optimizer step, over all processes.
        weight: what the loss of the micro-batch at a position of the epoch counts. One of weight 0
            stands in for none, and leaves no trace in batch statistics.
        after_step: called after each step with a line for the log (every `print_freq` steps, else
            None) and whether any process asked to stop; returns whether to stop. A line has the
            means over its steps: of the losses, and of the gradient norm before clipping.
        amp_dtype: of autocast; None is fp32.
        clip_grad_norm: the largest L2 norm of all gradients together; None is no limit.
        should_stop: whether this process was asked to stop.
        image_name: what a message calls the image with an id: its file and the id.

    Returns:
        Whether the epoch was finished.

    Raises:
        UserError: on every process at the same step, if a loss is not finite, before the step is
            taken, and the process where it happened names the images; or if the gradients are not,
            before the next step is taken or anything of this one is logged or saved.
    """
    model.train()
    statistics = _BatchStatistics(state.model)
    clock = _Clock()
    steps = _steps(batches, batches_per_step // processes.world_size)
    for micro_batches in clock.watch(steps):
        sums: dict[str, Tensor] = {}
        before_step = statistics.copy() if state.scaler.is_enabled() else []
        for number, (images, targets) in enumerate(micro_batches):
            position = state.position + number * processes.world_size + processes.rank
            # Whatever the model draws depends on its place in the run, not on what came before.
            torch.manual_seed(utils.derive_seed(seed, state.epoch, position))
            first = position - processes.rank
            statistics.synchronize([weight(first + i) for i in range(processes.world_size)])
            before = statistics.copy() if weight(position) == 0 else None
            is_last = number == len(micro_batches) - 1
            with _no_sync(model, is_last), _autocast(processes.device, amp_dtype):
                losses = model(*to_device(images, targets, processes.device))
                loss = torch.stack(list(losses.values())).sum() * weight(position)
            for name, value in {"loss": loss, **losses}.items():
                share = value.detach() * (1.0 if name == "loss" else weight(position))
                sums[name] = sums[name] + share if name in sums else share
            if is_last:
                flags = _Flags(sums, should_stop(), processes)
            with _no_sync(model, is_last):
                state.scaler.scale(loss).backward()
            if before is not None:
                statistics.put_back(before)

        stop, means = flags.wait()
        state.settle()  # what the last step left on its way came before these flags: no wait
        learning_rate = state.optimizer.param_groups[0]["lr"]
        image_ids = [int(t["image_id"]) for _, targets in micro_batches for t in targets]
        advice = _advice(state.optimizer, learning_rate, amp_dtype, clip_grad_norm)
        unread = _Unread(state.step + 1, image_ids, image_name, advice)
        if not all(map(math.isfinite, means.values())):
            if not all(bool(value.isfinite()) for value in sums.values()):
                unread.log_images()
            raise UserError(f"the loss of step {unread.step} is not finite ({means}); {advice}")
        norm, is_skipped = _take_step(state, clip_grad_norm)
        unread.norm = _Copy(norm[None])
        state.unread = unread
        state.scheduler.step()
        if state.scaler.is_enabled():  # where a run goes on after a step that was skipped
            statistics.put_back(before_step, is_skipped)
        if state.ema is not None:
            state.ema.update_parameters(state.model, is_skipped)

        state.step += 1
        state.position += batches_per_step
        for name, value in {"steps": 1.0, **means}.items():
            state.window[name] = state.window.get(name, 0.0) + value
        images_done = sum(len(images) for images, _ in micro_batches) * processes.world_size
        clock.count(images_done)
        line = None
        if state.step % print_freq == 0:
            state.settle()
            line = _line(state.window)
            line |= {"lr": learning_rate, **clock.read(processes.device)}
            state.window.clear()
        if after_step(line, stop):
            state.settle()
            return False
    state.settle()
    return True


def _steps(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Group this process's micro-batches by optimizer step."""
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _line(window: dict[str, float]) -> dict[str, float]:
    """Return the means of a window: of losses over its steps, of norms over those that are finite.

    Others are of steps that fp16 skipped; if it skipped them all, the norm is 0.
    """
    sums = dict(window)
    steps, norm, norms = (sums.pop(name, 0.0) for name in ("steps", "grad_norm", "norms"))
    return {name: s / steps for name, s in sums.items()} | {"grad_norm": norm / max(norms, 1)}


class _Copy:
    """A small tensor on its way to the host, where it is read only when something else was done."""

    def __init__(self, values: Tensor) -> None:
        self.event, self.values = None, values
        if values.is_cuda:
            self.values = torch.empty(values.shape, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def wait(self) -> list[float]:
        """Return the values, once they are there."""
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


@dataclass
class _Unread:
    """What to say of a step if it is not finite, and the norm that tells, on its way to the host.

    Gradients are reduced over processes, so that the norm is the same on all.
    """

    step: int
    image_ids: list[int]
    image_name: Callable[[int], object]
    advice: str
    norm: _Copy | None = None

    def log_images(self) -> None:
        """Log which images the step had on this process."""
        names = ", ".join(str(self.image_name(image_id)) for image_id in self.image_ids)
        logger.error("step %d is not finite; its images: %s", self.step, names)


class _Flags:
    """A step's losses and the wish to stop, summed over processes, on their way to the host.

    Made before the backward pass and read after it: by the time that the host has launched that,
    the copy is long done, and the device does not run dry.
    """

    def __init__(self, sums: dict[str, Tensor], should_stop: bool, processes: Processes) -> None:
        self.names = list(sums)
        # Each process's sum counts `weight`, whose average over processes is the mean of the step.
        values = [value.float() / processes.world_size for value in sums.values()]
        stop = values[0].new_full((), float(should_stop))
        packed = torch.stack([stop, *values])
        if processes.world_size > 1:
            dist.all_reduce(packed)
        self.packed = _Copy(packed)

    def wait(self) -> tuple[bool, dict[str, float]]:
        """Return whether any process wants to stop, and the mean losses over processes."""
        stop, *means = self.packed.wait()
        return stop > 0, dict(zip(self.names, means, strict=True))


def _take_step(state: TrainState, clip_grad_norm: float | None) -> tuple[Tensor, Tensor]:
    """Clip, and take the step unless the gradients are not finite, without a wait.

    Returns:
        The L2 norm of all gradients together, before clipping, and whether the step was skipped.
    """
    optimizer = state.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state.scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_grad_norm, norm)
    is_skipped = ~norm.isfinite()
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # A fused optimizer reads this on the device, as torch's GradScaler has it.
        optimizer.found_inf = is_skipped.float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not is_skipped:  # any other is worth a wait
        optimizer.step()
    state.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm, is_skipped


@functools.cache
def _first_processes(count: int) -> Any:
    """Return the group of the first processes; made once, by all at the same time."""
    return dist.new_group(list(range(count)))


class _BatchStatistics:
    """The running statistics of trained batch normalisation, and what must leave no trace there."""

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.buffers = [buffer for module in norms for buffer in module.buffers()]
        self.synchronized = [m for m in norms if isinstance(m, nn.SyncBatchNorm)]

    def synchronize(self, weights: list[float]) -> None:
        """Share the statistics of a forward pass only among processes whose weight is not 0.

        These are the first ones; each of the others then normalises by itself.
        """
        real = sum(weight > 0 for weight in weights)
        for module in self.synchronized:
            module.process_group = _first_processes(real) if 0 < real < len(weights) else None

    def copy(self) -> list[Tensor]:
        """Return copies to put back."""
        return [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def put_back(self, values: list[Tensor], condition: Tensor | None = None) -> None:
        """Set the statistics to `values`, with a `condition` only where that is true."""
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer.copy_(value if condition is None else torch.where(condition, value, buffer))


def _advice(
    optimizer: torch.optim.Optimizer,
    lr: float,
    amp_dtype: torch.dtype | None,
    clip_grad_norm: float | None,
) -> str:
    """Return what to do about a step that is not finite, the most likely cause first."""
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


class _Clock:
    """Measure images per second, the share of time spent waiting for data, and peak memory."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self.start, self.waited, self.images = time.perf_counter(), 0.0, 0

    def watch(self, steps: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
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
        """Return the figures since the last call, and start anew."""
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


def to_device(
    images: list[Tensor], targets: list[dict[str, Tensor]], device: torch.device
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Move a batch without waiting; uint8 images `[3, H, W]` become float32 in 0..1 there."""
    moved = [image.to(device, non_blocking=True).float().div_(255) for image in images]
    keys = ("boxes", "labels")
    return moved, [{k: t[k].to(device, non_blocking=True) for k in keys} for t in targets]


def _no_sync(model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[None]:
    """Keep DDP from reducing gradients before the last micro-batch of a step."""
    if is_last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def _autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gives on rank 0.

    Attributes:
        metrics: COCO's twelve numbers by name, and the losses where asked for: "val_loss", and
            "val_" with the name of each part.
        table: the twelve as COCO prints them.
        detections: `[D, 7]`, as `CocoEvaluator.gather` returns them.
        analysis: what lies behind the numbers. Images without annotations have none, and no
            metrics and no table either.
        speed: images per second of the whole evaluation and of the model alone, of all processes,
            and the share of the time that scoring took.
    """

    metrics: dict[str, float]
    table: str
    detections: np.ndarray
    analysis: Analysis | None
    speed: dict[str, float]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    evaluator: CocoEvaluator,
    processes: Processes,
    *,
    backend: str = "hotcoco",
    with_losses: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[bool, Evaluation | None]:
    """Run the model over this process's share of the images, and score all shares on rank 0.

    Returns:
        Whether it was finished (not, if any process was asked to stop); the result on rank 0.

    Raises:
        ValueError: if the processes did not see each image of the ground truth once, or on rank 0
            if what was found is not finite: such numbers could not be compared with any other.
    """
    model.eval()
    start, model_seconds, images_done = time.perf_counter(), 0.0, 0
    losses = _ImageLosses(model, evaluator)

    def meet(is_done: bool) -> list[float]:
        return processes.sum([float(should_stop()), float(is_done), images_done, model_seconds])

    # Shares may take very different times. The processes meet on the way, so that one that is slow
    # is not taken for one that hangs, and one that was asked to stop tells the others.
    met = time.monotonic()
    for images, targets in batches:
        if should_stop():
            break
        if processes.world_size > 1 and time.monotonic() - met > MEETING_EVERY:
            if meet(is_done=False)[0] > 0:
                return False, None
            met = time.monotonic()
        begin = time.perf_counter()
        moved, moved_targets = to_device(images, targets, processes.device)
        detections = model(moved)
        image_ids = [int(t["image_id"]) for t in targets]
        evaluator.update(image_ids, detections)
        model_seconds += time.perf_counter() - begin  # `update` has waited for the device
        images_done += len(images)
        if with_losses:
            losses.update(image_ids, moved, moved_targets)
    num_done = 0.0
    while num_done < processes.world_size:
        num_stopped, num_done, all_images, all_model_seconds = meet(is_done=True)
        if num_stopped > 0:
            return False, None
    if all_images != len(evaluator.sorted_ids):
        raise ValueError(
            f"{all_images:.0f} images were evaluated and {len(evaluator.sorted_ids)} are "
            "annotated; each must be seen once"
        )
    detected = time.perf_counter()
    rows = evaluator.gather(processes)
    mean_losses = losses.gather(processes) if with_losses else {}
    if rows is None:
        return True, None
    metrics: dict[str, float] = {}
    table, analysis = "", None
    if evaluator.ground_truth.is_annotated:
        evaluation = evaluator.evaluation(rows)
        analysis = evaluator.analyze(evaluation, rows)
        if backend != "hotcoco":
            evaluation = evaluator.evaluation(rows, backend)
        metrics, table = scores_of(evaluation)
    seconds = time.perf_counter() - start
    speed = {
        "images_per_second": all_images / seconds,
        "model_images_per_second": all_images * processes.world_size / all_model_seconds,
        "scoring_share": (time.perf_counter() - detected) / seconds,
    }
    return True, Evaluation(metrics | mean_losses, table, rows, analysis, speed)


class _ImageLosses:
    """The losses of each image by itself, as some detectors divide by the boxes of a whole batch.

    Layers stay in evaluation mode, so that neither weights nor batch statistics change. Faster
    R-CNN, which samples boxes, samples from the same random numbers for each image.
    """

    def __init__(self, model: nn.Module, evaluator: CocoEvaluator) -> None:
        self.model, self.evaluator = model, evaluator
        self.names: list[str] = []
        self.rows: list[np.ndarray] = []  # [n, 1 + L]: rank of the image's id, losses
        # Only these ask `training` what to return; what lies below them does not see it.
        stages = [part for name, part in model.named_children() if name in ("rpn", "roi_heads")]
        self.stages = [model, *stages]

    # Out of inference mode: what the model keeps from here, as anchors, must be fit to train with.
    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self, image_ids: list[int], images: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> None:
        """Take the losses of images on the device, with one copy to the host."""
        device = images[0].device
        values = []
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for stage in self.stages:
                stage.training = True
            for image, target in zip(images, targets, strict=True):
                torch.manual_seed(0)
                losses = self.model([image], [target])
                self.names = list(losses)
                values.append(torch.stack([loss.float() for loss in losses.values()]))
            for stage in self.stages:
                stage.training = False
        ranks = np.searchsorted(self.evaluator.sorted_ids, image_ids)
        self.rows.append(np.column_stack([ranks, torch.stack(values).cpu().numpy()]))

    def gather(self, processes: Processes) -> dict[str, float]:
        """Return the means over the images of all processes on rank 0, by name."""
        own = np.concatenate(self.rows or [np.empty((0, 1))])
        rows = gather_rows(own, processes)
        if rows is None:
            return {}
        self.evaluator.require_finite(rows, "losses")
        # fsum rounds once, so that the order of the images cannot matter.
        means = [math.fsum(column) / len(rows) for column in rows[:, 1:].T.tolist()]
        parts = {f"val_{name}": mean for name, mean in zip(self.names, means, strict=True)}
        return {"val_loss": math.fsum(means), **parts}
