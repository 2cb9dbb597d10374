"""The training loop and the evaluation loop: plain values in, plain values out.

What differs from torchvision's references/detection/engine.py: the loop can start and stop at any
optimizer step, and ends bit-identical to one that never stopped. A step waits for the device once,
for the losses and flags of all processes, while the backward pass is still running. The device
skips a step whose gradients are not finite. The host reads their norm with the flags of the next
step, and stops the run; with fp16 the scale drops and the run goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import coco_eval
import utils
from coco_eval import CocoEvaluator, ImageLosses, Results
from models.batch_statistics import BatchStatistics
from models.loss_terms import total_loss
from models.precision import autocast
from models.transform import memory_errors
from runtime import distributed
from runtime.distributed import Processes
from runtime.progress import Clock, mean_line
from runtime.train_state import LastStep, StepSums, TrainState, advice_on_not_finite
from utils import UserError

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def train_one_epoch(
    model: nn.Module,
    state: TrainState,
    batches: Iterable[Batch],
    processes: Processes,
    *,
    seed: int,
    batches_per_step: int,
    batch_weight: Callable[[int], float],
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
        batch_weight: the weight of the loss of the micro-batch at a position of the epoch. The last
            step of an epoch may have too few; it is filled with others, of weight 0.
        after_step: called after each step with a line for the log (every `print_freq` steps, else
            None) and whether any process asked to stop; returns whether to stop. A line has the
            means over its steps: of the losses, and of the gradient norm before clipping.
        amp_dtype: of autocast; None is fp32.
        clip_grad_norm: the largest L2 norm of all gradients together; None is no limit.
        should_stop: whether this process was asked to stop.
        image_name: the name of an image in messages, by its id.

    Returns:
        Whether the epoch was finished.

    Raises:
        UserError: on every process at the same step. If a loss is not finite, before the step is
            taken; the process where it happened names the images. If the gradients are not finite,
            before the next step is taken or anything of this one is logged or saved.
    """
    model.train()
    statistics = BatchStatistics(state.model)
    clock = Clock()
    steps = _steps(batches, batches_per_step // processes.world_size)
    for micro_batches in clock.watch(steps):
        log_sums: dict[str, Tensor] = {}
        before_step = statistics.copy() if state.scaler.is_enabled() else []
        for number, (images, targets) in enumerate(micro_batches):
            first = state.position + number * processes.world_size
            weights = [batch_weight(first + rank) for rank in range(processes.world_size)]
            weight = weights[processes.rank]
            # What the model draws depends on its position in the run, not on what came before.
            utils.seed_device(processes.device, seed, state.epoch, first + processes.rank)
            is_last = number == len(micro_batches) - 1
            with (
                _no_sync(model, is_last),
                statistics.only_of_real_batches(weights, processes.rank),
            ):
                with autocast(processes.device, amp_dtype):
                    outputs = model(*to_device(images, targets, processes.device))
                    loss = total_loss(outputs) * weight
                for name, value in {"loss": loss, **outputs}.items():
                    share = value.detach() * (1.0 if name == "loss" else weight)
                    log_sums[name] = log_sums[name] + share if name in log_sums else share
                if is_last:
                    step_sums = StepSums(log_sums, should_stop(), processes)
                state.scaler.scale(loss).backward()

        stop, means = step_sums.wait()
        state.settle()  # the norm of the last step was sent before these sums: no wait
        learning_rate = state.optimizer.param_groups[0]["lr"]
        advice = advice_on_not_finite(state.optimizer, learning_rate, amp_dtype, clip_grad_norm)
        all_targets = [target for _, targets in micro_batches for target in targets]
        this_step = LastStep(state.step + 1, all_targets, image_name, advice)
        this_step.require_finite_loss(means, log_sums["loss"])
        norm, is_skipped = _take_step(state, clip_grad_norm)
        state.last_step = this_step.with_norm(norm)
        state.scheduler.step()
        if state.scaler.is_enabled():  # a run with fp16 goes on after a step that was skipped
            statistics.restore(before_step, is_skipped)
        if state.ema is not None:
            state.ema.update_parameters(state.model, is_skipped)

        state.step += 1
        state.position += batches_per_step
        state.add_to_log({"steps": 1.0, **means})
        clock.count(sum(len(images) for images, _ in micro_batches) * processes.world_size)
        line = None
        if state.step % print_freq == 0:
            state.settle()
            line = mean_line(state.log_sums)
            line |= {"lr": learning_rate, **clock.read(processes.device)}
            state.log_sums.clear()
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


@dataclass
class Evaluation:
    """This process's share of the validation images, and how it is evaluated.

    Attributes:
        data: all validation images, a `coco_utils.CocoDetection`.
        loader: of this process's share.
        backend: one of `coco_eval.BACKENDS`.
        amp_dtype: of the model's backbone and head; None is fp32.
    """

    data: Any
    loader: Iterable[Batch]
    processes: Processes
    backend: str
    save_detections: bool
    val_loss: bool
    amp_dtype: torch.dtype | None
    should_stop: Callable[[], bool]

    def __post_init__(self) -> None:
        if self.val_loss and not self.data.annotations.is_annotated:
            path = self.data.annotations.title
            raise UserError(f"--val-loss: {path} has no annotations; leave it out")

    def run(
        self, model: nn.Module, folder: Path | None, tested: Mapping[str, Any] | None = None
    ) -> tuple[bool, dict[str, float]]:
        """Evaluate on all processes, log the table, write the results to `folder`.

        Args:
            tested: what `--test-only` evaluates, for `analysis.json`: "weights" and "step".

        Returns:
            Whether it was finished; the metrics.

        Raises:
            UserError: on every process, if the folder cannot be written.
        """
        # Batch statistics differ between processes; a checkpoint has those of rank 0.
        self.processes.equalize(model.buffers())
        evaluator = CocoEvaluator(self.data.annotations, self.data.label_map)
        with (
            autocast(self.processes.device, self.amp_dtype),
            memory_errors(model, 1, self.amp_dtype is not None),
        ):
            finished, results = evaluate(
                model,
                self.loader,
                evaluator,
                self.processes,
                backend=self.backend,
                with_losses=self.val_loss,
                should_stop=self.should_stop,
            )
        if not finished:
            return False, {}

        def write() -> dict[str, float]:
            assert results is not None, "rank 0 has it"
            coco_eval.log_results(results, len(self.data))
            description = {
                "data": {
                    "images": str(self.data.root.resolve()),
                    "annotations": str(self.data.annotations.path.resolve()),
                    "categories": self.data.label_map,
                },
                "tested": tested,
            }
            coco_eval.write_results(results, evaluator, folder, self.save_detections, description)
            return results.metrics

        self.processes.broadcast(None)  # the others wait here while rank 0 scores
        return True, self.processes.on_main(write)


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
) -> tuple[bool, Results | None]:
    """Run the model over this process's share of the images, and score all shares on rank 0.

    Returns:
        Whether it finished: not if any process was asked to stop. The results, on rank 0.

    Raises:
        ValueError: if the processes did not see each image of the ground truth once.
        UserError: on rank 0, if a box, score or loss is not finite.
    """
    model.eval()
    start, model_seconds, images_done = time.perf_counter(), 0.0, 0
    losses = ImageLosses(model, evaluator)

    def meet(is_done: bool) -> list[float]:
        return processes.sum([float(should_stop()), float(is_done), images_done, model_seconds])

    # Shares may take very different times. The processes meet now and then: a slow process is not
    # mistaken for one that hangs, and a process that was asked to stop tells the others.
    met = time.monotonic()
    for images, targets in batches:
        if should_stop():
            break
        if processes.world_size > 1 and time.monotonic() - met > distributed.MEETING_EVERY:
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
        scored = evaluator.evaluation(rows)
        analysis = evaluator.analyze(scored, rows)
        if backend != "hotcoco":
            scored = evaluator.evaluation(rows, backend)
        metrics, table = coco_eval.scores_of(scored)
    seconds = time.perf_counter() - start
    speed = {
        "images_per_second": all_images / seconds,
        "model_images_per_second": all_images * processes.world_size / all_model_seconds,
        "scoring_share": (time.perf_counter() - detected) / seconds,
    }
    return True, Results(metrics | mean_losses, table, rows, analysis, speed)
