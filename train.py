"""Train and evaluate box detectors: by default RetinaNet by its published recipe.

    torchrun --nproc_per_node=8 train.py --data-path /coco \\
        --weights-backbone ResNet50_Weights.IMAGENET1K_V1 --output-dir runs/coco --resume auto

This is the file to read first: `main` is the whole run in order. Flags are declared in
runtime/options.py. Source of the recipe: torchvision's references/detection/train.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import engine
import presets
import utils
from coco_utils import CocoDetection, label_categories, match_classes, trained_images, with_classes
from data.checks import require_pixels
from data.coco_arrays import Annotations, differences
from data.loading import make_loader
from data.splits import data_paths, read_splits
from data.worker_processes import start_worker_server, worker_errors
from group_by_aspect_ratio import GroupedBatchSampler, groups_and_factors, same_size_batches
from models.averaging import make_ema
from models.build import build_model, check_model_name
from models.parallel import wrap
from models.retinanet import make_anchor_generator
from models.transform import memory_errors, padded_sizes
from models.weights import load_trained
from runtime import checkpoint
from runtime.distributed import Processes, join_process_group
from runtime.optimization import build_optimizer, build_scheduler
from runtime.options import PATHS, build_parser, check_flags, check_sizes, output_folder, parse_args
from runtime.resuming import batches_per_step, resume_run
from runtime.run_folder import Run, open_folder
from runtime.signals import StopSignal, follow_launcher
from runtime.summary import RECIPE_BATCH
from runtime.train_state import TrainState
from utils import logger

MEMORY_FORMATS = {True: torch.channels_last, False: torch.contiguous_format}


def main(args: argparse.Namespace) -> int:
    """Train, or with `--test-only` evaluate: the whole run in order. Returns the exit status."""
    check_flags(args)
    check_model_name(args.model)
    make_anchor_generator(args.anchor_sizes, args.anchor_ratios)
    parser = build_parser()
    utils.set_determinism(args.use_deterministic_algorithms)
    utils.set_tf32(args.tf32)
    with start_processes(args.device, args.workers) as processes, contextlib.ExitStack() as stack:
        # Stop signals, log, output folder
        device, rank, world_size = processes.device, processes.rank, processes.world_size
        should_stop = StopSignal()
        processes.barrier()  # a signal that reaches one process from here on finds all prepared
        folder = output_folder(args)
        resume = open_folder(folder, args.resume, args.test_only, processes, stack)
        saved = checkpoint.load(resume) if resume else {}

        # Data and classes
        val_set, train_set = read_data(args, saved, resume)
        check_sizes(args, len(train_set), len(val_set), world_size)

        # Model
        torch.manual_seed(args.seed)
        model = build_model(
            args.model,
            val_set.label_map,
            resize_in_training=args.data_augmentation not in presets.RESIZING,
            load=not resume,
            allow_new_classes=not args.test_only,
            **parser.values(args, "model"),
        )
        for split in (val_set.annotations, train_set.annotations):
            require_pixels(split, padded_sizes(model, split.sizes))
        model = model.to(device).to(memory_format=MEMORY_FORMATS[args.channels_last])

        # Evaluation, which is all there is to do with --test-only
        amp_dtype = utils.AMP_DTYPES.get(args.amp)
        batches = same_size_batches(padded_sizes(model, val_set.sizes()), args.eval_batch_size)
        shard = [[(0, i) for i in batch] for batch in batches[rank::world_size]]
        evaluation = engine.Evaluation(
            val_set,
            make_loader(val_set, shard, args.workers, device, keep=False),
            processes,
            backend=args.coco_eval,
            save_detections=args.save_detections,
            val_loss=args.val_loss,
            amp_dtype=amp_dtype,
            should_stop=should_stop,
        )
        if args.test_only:
            return evaluate_only(model, evaluation, saved, args)

        # Order of the training images
        per_step = batches_per_step(args.accumulate_steps, world_size, saved)
        groups, factors = groups_and_factors(
            train_set, args.data_augmentation, args.aspect_ratio_group_factor, args.repeat_threshold
        )
        sampler = GroupedBatchSampler(
            groups, args.batch_size, args.seed, rank, world_size, per_step, factors
        )
        loader = make_loader(train_set, sampler, args.workers, device, keep=True)

        # Optimizer, the one schedule, EMA, DDP
        optimizer = build_optimizer(
            model,
            args.lr * (args.batch_size * per_step / RECIPE_BATCH if args.scale_lr else 1),
            opt=args.opt,
            momentum=args.momentum,
            wd=args.wd,
            norm_weight_decay=args.norm_weight_decay,
        )
        schedule = parser.values(args, "schedule")
        scheduler = build_scheduler(optimizer, sampler.steps_per_epoch, **schedule)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        state = TrainState(model, optimizer, scheduler, scaler, make_ema(model, args.ema_decay))
        wrapped = wrap(model, device, world_size, args.compile, amp_dtype)

        # Resume, and log the setup
        train, val = train_set.annotations, val_set.annotations
        settings = vars(args) | {
            "data": train.fingerprint(),
            "batches_per_step": per_step,
            "device": device.type,
            "torch": str(torch.__version__),
            "val_data": val.fingerprint(),
        }
        if resume:
            resume_run(
                state,
                saved,
                resume,
                settings=settings,
                parser=parser,
                explained=data_changes(saved.get("data", {}), train, val),
                steps_per_epoch=sampler.steps_per_epoch,
            )
        run = Run(
            folder, state, processes, should_stop, settings, train_set, val_set, sampler, stack
        )
        run.start()

        # Epochs: evaluate the one that was saved last, train the next, save it
        while not run.is_stopped():
            if run.evaluation_is_due():
                finished, metrics = evaluation.run(state.model_to_evaluate, run.evaluation_folder)
                if not finished:
                    break
                run.record_evaluation(metrics)
            if run.is_complete():
                break
            sampler.set_epoch(state.epoch, state.position)
            with memory_errors(model, per_step // world_size, amp_dtype is not None):
                finished = engine.train_one_epoch(
                    wrapped,
                    state,
                    loader,
                    processes,
                    seed=args.seed,
                    batches_per_step=per_step,
                    batch_weight=sampler.weight,
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


@contextlib.contextmanager
def start_processes(device: str | None, workers: int) -> Iterator[Processes]:
    """Start what loader workers are forked from, and join the other processes of the run."""
    follow_launcher()
    if workers:
        start_worker_server("data.loading")
    with join_process_group(device or utils.default_device()) as processes, worker_errors():
        yield processes


def read_data(
    args: argparse.Namespace, saved: Mapping[str, Any], resume: Path | None
) -> tuple[CocoDetection, CocoDetection]:
    """Read and check the validation and the training data; with `--test-only` both are the former.

    Args:
        saved: the checkpoint `resume`, whose classes count; empty if there is none.

    Raises:
        UserError: lists what is missing or wrong.
    """
    paths = data_paths(args.dataset, args.data_path, {k: getattr(args, k) for k in PATHS})
    names = ["val"] if args.test_only else ["val", "train"]
    splits = read_splits(paths, names, args.test_only and args.save_detections)
    splits[0] = with_classes(splits[0], saved.get("categories"))
    val, train = splits[0], splits[-1]
    label_map = saved.get("categories") or label_categories(train.categories)
    for split in splits:
        match_classes(label_map, split, str(resume or train.title))
    val_set = CocoDetection(paths["val_images"], val, label_map)
    if args.test_only:
        return val_set, val_set
    keep, folder = trained_images(train, args.keep_empty), paths["train_images"]
    transforms = presets.training_transforms(args.data_augmentation)
    return val_set, CocoDetection(folder, train, label_map, transforms, args.seed, keep)


def evaluate_only(
    model: nn.Module, evaluation: engine.Evaluation, saved: dict[str, Any], args: argparse.Namespace
) -> int:
    """Evaluate `--resume` or `--weights`, into OUTPUT_DIR/eval/test if there is a folder.

    Returns:
        The exit status: 1 if a signal stopped it.
    """
    folder = args.output_dir / "eval" / "test" if args.output_dir else None
    if folder is not None:  # a folder that cannot be written fails before the work, not after it
        evaluation.processes.on_main(functools.partial(utils.make_folder, folder))
    if args.resume:
        load_trained(model, saved, args.resume)
        # A run in progress may have replaced the file before another process read it.
        evaluation.processes.equalize(model.parameters())
    tested = {"weights": args.resume or args.weights, "step": saved.get("step")}
    step = "" if tested["step"] is None else f" of step {tested['step']}"
    logger.info("evaluating %s%s%s", tested["weights"], step, ", EMA" if saved.get("ema") else "")
    finished, _ = evaluation.run(model, folder, tested)
    if not finished:
        logger.info("stopped by a signal: there is no result")
    return 0 if finished else 1


def data_changes(
    saved: dict[str, Any], train: Annotations, val: Annotations
) -> dict[str, Callable[[], str]]:
    """Return, by setting, a function that describes how the data differs from the checkpoint's."""
    return {
        "data": lambda: differences("training data", saved.get("data"), train),
        "val_data": lambda: differences("validation data", saved.get("val_data"), val),
    }


def run_from_command_line() -> None:
    """Run `main` with the flags of the command line."""
    utils.run_command(lambda: main(parse_args()))


if __name__ == "__main__":
    run_from_command_line()
