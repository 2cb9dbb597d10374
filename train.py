"""Train and evaluate box detectors: RetinaNet by its published recipe, unless told otherwise.

    torchrun --nproc_per_node=8 train.py --data-path /coco \\
        --weights-backbone ResNet50_Weights.IMAGENET1K_V1 --output-dir runs/coco --resume auto

This is the file to read first. `main` is the whole run in order; everything else here is flags and
wiring. Source of the recipe and of the flag names: torchvision's references/detection/train.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import coco_utils
import engine
import presets
import utils
from data import coco_json, locate
from data.loading import make_loader
from data.splits import PATHS, data_paths, read_splits
from data.worker_processes import kill_workers, start_worker_server, worker_errors
from group_by_aspect_ratio import GroupedBatchSampler, aspect_ratio_groups, same_size_batches
from models.build import (
    build_model,
    load_trained,
    make_ema,
    padded_sizes,
    wrap,
)
from runtime import checkpoint
from runtime.distributed import PeerError, Processes, launch_rank, processes
from runtime.flags import (
    LOG,
    REFUSE,
)
from runtime.optimization import build_optimizer, lr_factor
from runtime.progress import RECIPE_BATCH
from runtime.run_folder import Evaluation, Run, open_folder
from runtime.signals import StopSignal, end_failed, follow_launcher
from utils import UserError, logger

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {True: torch.channels_last, False: torch.contiguous_format}


def batches_per_step(accumulate_steps: int, world_size: int, saved: dict[str, Any]) -> int:
    """Return the micro-batches of an optimizer step, over all processes.

    A resumed run keeps its own number, and accumulates more or less where there are now fewer or
    more processes.

    Raises:
        UserError: names what would keep the number, if this does not divide.
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


def evaluation_of(
    model: nn.Module,
    data: coco_utils.CocoDetection,
    processes: Processes,
    *,
    eval_batch_size: int,
    workers: int,
    **settings: Any,
) -> Evaluation:
    """Build this process's share of the evaluation; `settings` are fields of `Evaluation`."""
    if settings["val_loss"] and not data.annotations.is_annotated:
        raise UserError(f"--val-loss: {data.annotations.path} has no annotations; leave it out")
    if eval_batch_size > len(data):
        raise UserError(
            f"--eval-batch-size {eval_batch_size} is more than the {len(data)} images to evaluate"
        )
    padded = padded_sizes(model, data.sizes())
    batches = same_size_batches(padded, eval_batch_size)
    shard = [[(0, i) for i in batch] for batch in batches[processes.rank :: processes.world_size]]
    loader = make_loader(data, shard, workers, processes.device, keep=False)
    return Evaluation(data, loader, processes, **settings)


def with_classes(
    annotations: coco_json.Annotations, label_map: Sequence[dict[str, Any]] | None
) -> coco_json.Annotations:
    """Return `annotations`, with the classes of a checkpoint if they name none.

    Raises:
        UserError: if the checkpoint names none either.
    """
    if annotations.categories:
        return annotations
    if not label_map:
        raise UserError(
            f"{annotations.path} has no categories; add them, or give by --resume a checkpoint of "
            "train.py, which knows its classes"
        )
    categories = sorted((category["id"], category["name"]) for category in label_map)
    return dataclasses.replace(annotations, categories=tuple(categories))


def evaluate_only(
    model: nn.Module, evaluation: Evaluation, saved: dict[str, Any], args: argparse.Namespace
) -> int:
    """Evaluate `--resume` or `--weights`, into OUTPUT_DIR/eval/test where there is a folder.

    Returns:
        The exit status: 1 if a signal stopped it.
    """
    place, processes = None, evaluation.processes
    if args.output_dir:
        place = args.output_dir / "eval" / "test"
        processes.on_main(functools.partial(_make_folder, place))  # before the work, not after it
    if args.resume:
        load_trained(model, saved, args.resume)
        # A run that goes on may have replaced the file before another process read it.
        processes.equalize([*model.parameters(), *model.buffers()])
    tested = {"weights": args.resume or args.weights, "step": saved.get("step")}
    step = "" if tested["step"] is None else f" of step {tested['step']}"
    logger.info("evaluating %s%s%s", tested["weights"], step, ", EMA" if saved.get("ema") else "")
    finished, _ = evaluation.run(model, place, tested)
    if not finished:
        logger.info("stopped by a signal: there is no result")
    return 0 if finished else 1


def _make_folder(path: Path) -> None:
    with utils.file_errors("create", path):
        path.mkdir(parents=True, exist_ok=True)


def training_data(
    data: coco_utils.CocoDetection,
    processes: Processes,
    per_step: int,
    *,
    aspect_ratio_group_factor: int,
    batch_size: int,
    data_augmentation: str,
    seed: int,
    workers: int,
) -> tuple[GroupedBatchSampler, DataLoader]:
    """Build the order of the run, and the loader of this process's part of it."""
    if data_augmentation in presets.FIXED_SIZE and aspect_ratio_group_factor >= 0:
        logger.info("no aspect-ratio groups: %s makes all images one size", data_augmentation)
        aspect_ratio_group_factor = -1
    groups = aspect_ratio_groups(data.sizes(), aspect_ratio_group_factor)
    rank, world_size = processes.rank, processes.world_size
    sampler = GroupedBatchSampler(groups, batch_size, seed, rank, world_size, per_step)
    return sampler, make_loader(data, sampler, workers, processes.device, keep=True)


def data_changes(
    saved: dict[str, Any], train: coco_json.Annotations, val: coco_json.Annotations
) -> dict[str, Callable[[], str]]:
    """Return what says how the data differs from that of a checkpoint; `saved` as it remembers."""
    splits = {"data": ("training data", train), "val_data": ("validation data", val)}
    return {
        key: functools.partial(coco_json.differences, name, saved.get(key), annotations)
        for key, (name, annotations) in splits.items()
    }


def main(args: argparse.Namespace) -> int:
    """Train, or with `--test-only` evaluate: the whole run in order. Returns the exit status."""
    check_flags(args)
    parser = build_parser()
    with contextlib.ExitStack() as stack:
        # Processes, output folder, log
        follow_launcher()
        if args.workers:
            start_worker_server("train")
        utils.set_determinism(args.use_deterministic_algorithms)
        processes = stack.enter_context(processes(args.device or utils.default_device()))
        stack.enter_context(worker_errors())
        should_stop = StopSignal()
        folder = output_folder(args)
        resume = open_folder(folder, args.resume, args.test_only, processes, stack)

        # Data and classes
        overrides = {name: getattr(args, name) for name in PATHS}
        paths = data_paths(args.dataset, args.data_path, overrides)
        splits = ["val"] if args.test_only else ["val", "train"]
        val, *rest = read_splits(paths, splits, args.test_only and args.save_detections)
        saved = checkpoint.load(resume) if resume else {}
        val = with_classes(val, saved.get("categories"))
        train = rest[0] if rest else val
        label_map = saved.get("categories") or coco_utils.label_categories(train.categories)
        if not args.test_only:
            coco_utils.match_classes(label_map, train, str(resume))
        coco_utils.match_classes(label_map, val, str(resume or train.path))
        if not args.test_only and not args.keep_empty:
            locate.require_boxes(train)

        # Model
        torch.manual_seed(args.seed)
        resize = args.data_augmentation not in presets.RESIZING
        options = parser.values(args, "model")
        model = build_model(
            args.model, label_map, resize, not resume, not args.test_only, **options
        )
        model = model.to(processes.device).to(memory_format=MEMORY_FORMATS[args.channels_last])

        # Evaluation, which is all there is to do with --test-only
        amp_dtype = AMP_DTYPES.get(args.amp)
        val_set = coco_utils.CocoDetection(paths["val_images"], val, label_map)
        evaluation = evaluation_of(
            model,
            val_set,
            processes,
            eval_batch_size=args.eval_batch_size,
            workers=args.workers,
            coco_eval=args.coco_eval,
            save_detections=args.save_detections,
            val_loss=args.val_loss,
            amp_dtype=amp_dtype,
            should_stop=should_stop,
        )
        if args.test_only:
            return evaluate_only(model, evaluation, saved, args)

        # Training data, in the order of the run
        keep = None if args.keep_empty else locate.images_with_objects(train)
        transforms = presets.training_transforms(args.data_augmentation)
        train_set = coco_utils.CocoDetection(
            paths["train_images"], train, label_map, transforms, args.seed, keep
        )
        check_sizes(args, len(train_set), processes.world_size)
        per_step = batches_per_step(args.accumulate_steps, processes.world_size, saved)
        sampler, loader = training_data(
            train_set,
            processes,
            per_step,
            aspect_ratio_group_factor=args.aspect_ratio_group_factor,
            batch_size=args.batch_size,
            data_augmentation=args.data_augmentation,
            seed=args.seed,
            workers=args.workers,
        )

        # Optimizer, the one schedule, EMA, DDP
        lr = args.lr * (args.batch_size * per_step / RECIPE_BATCH if args.scale_lr else 1)
        optimizer = build_optimizer(
            model,
            lr,
            opt=args.opt,
            momentum=args.momentum,
            wd=args.wd,
            norm_weight_decay=args.norm_weight_decay,
        )
        schedule = parser.values(args, "schedule")
        factor = functools.partial(lr_factor, sampler.steps_per_epoch, **schedule)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        scaler = torch.amp.GradScaler(processes.device.type, enabled=args.amp == "fp16")
        ema = make_ema(model, args.ema_decay)
        state = engine.TrainState(model, optimizer, scheduler, scaler, ema)
        wrapped = wrap(model, processes.device, processes.world_size, args.compile, amp_dtype)

        # Resume
        may_change = {"device": processes.device.type, "torch": str(torch.__version__)}
        may_change |= {"val_data": val.fingerprint(), **parser.compared(args, LOG)}
        identity = {"data": train.fingerprint(), "batches_per_step": per_step}
        identity |= {**parser.compared(args, REFUSE), **may_change}
        if resume:
            saved = checkpoint.as_own(saved, identity, sampler.steps_per_epoch, resume)
            explained = data_changes(saved.get("data", {}), train, val)
            # A flag that is newer than the checkpoint had its default.
            checkpoint.check_same_run(
                saved["args"],
                identity,
                may_change,
                resume,
                defaults=parser.defaults(),
                explained=explained,
            )
            checkpoint.require_fitting(saved, model, optimizer, scaler, resume)
            state.load_state_dict(saved)
        run = Run(folder, state, evaluation, vars(args) | identity, paths, stack)
        run.start(train_set, lr, sampler.steps_per_epoch)

        # Epochs: evaluate the one that was saved last, train the next, save it
        while not run.is_stopped():
            if run.evaluation_is_due() and not run.evaluate():
                break
            if run.is_complete():
                break
            sampler.set_epoch(state.epoch, state.position)
            finished = engine.train_one_epoch(
                wrapped,
                state,
                loader,
                processes,
                seed=args.seed,
                batches_per_step=per_step,
                weight=sampler.weight,
                after_step=run.after_step,
                amp_dtype=amp_dtype,
                clip_grad_norm=args.clip_grad_norm,
                print_freq=args.print_freq,
                should_stop=should_stop,
                image_name=train_set.describe,
            )
            if not finished:
                break
            state.epoch, state.position = state.epoch + 1, 0
            run.save(f"model_{state.epoch - 1}.pth")
        run.finish()
        return 0


def run_from_command_line() -> None:
    """Call `main`; what a user can mend ends in one message, not in a stack trace."""
    utils.mend_streams()
    status: int | None = 1
    try:
        status = main(parse_args())
    except KeyboardInterrupt:  # later ones are taken by `StopSignal`
        status = 128 + signal.SIGINT
        print("error: interrupted before the run began", file=sys.stderr)
    except Exception as error:
        _print_error(error)
    finally:
        kill_workers()
    if status:
        end_failed()
        sys.exit(status)


def _print_error(error: Exception) -> None:
    """Print what a user can mend as one message, and anything else with its traceback."""
    if isinstance(error, PeerError):
        print(f"error: [rank {launch_rank()}] {error}", file=sys.stderr)
    elif not isinstance(error, UserError):
        traceback.print_exception(error)
    # All processes see the same flags and data, so one speaks; an image only one process saw.
    elif launch_rank() == 0 or isinstance(error, utils.LocalError):
        text = str(error).strip()
        if "Original Traceback" in text:  # raised in a DataLoader worker
            text = text.splitlines()[-1].split(": ", 1)[-1]
        print(utils.printable(f"error: {text}", keep="\n"), file=sys.stderr)


if __name__ == "__main__":
    run_from_command_line()
