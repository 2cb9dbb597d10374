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
import importlib.util
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import coco_eval
import coco_utils
import engine
import presets
import utils
from data import checks, coco_arrays, formats
from data.loading import make_loader
from data.splits import PATHS, data_paths, read_splits
from group_by_aspect_ratio import GroupedBatchSampler, aspect_ratio_groups, same_size_batches
from models import retinanet
from models.build import (
    build_model,
    check_model_name,
    load_trained,
    make_anchor_generator,
    make_ema,
    padded_sizes,
    wrap,
)
from runtime import checkpoint
from runtime.flags import (
    IGNORE,
    LOG,
    REFUSE,
    ArgumentParser,
    between,
    inside,
    non_negative,
    positive,
)
from runtime.optimization import build_optimizer, lr_factor
from runtime.progress import RECIPE_BATCH
from runtime.run_folder import Evaluation, Run, open_folder
from utils import Processes, UserError, logger

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {True: torch.channels_last, False: torch.contiguous_format}


def build_parser() -> ArgumentParser:
    """Declare every flag, once; the defaults are the published recipe."""
    parser = ArgumentParser(__doc__.split("\n\n")[0])
    _add_data_flags(parser)
    _add_model_flags(parser)
    _add_optimization_flags(parser)
    _add_evaluation_flags(parser)
    _add_run_flags(parser)
    return parser


def _add_data_flags(parser: ArgumentParser) -> None:
    # What the data holds is compared on a resume, not where it lies.
    add = parser.group("data and detector")
    layouts = ("coco", "shapes", *formats.LAYOUTS)
    add(
        "--dataset",
        choices=layouts,
        default="coco",
        remember=True,
        help="layout of the data; shapes is drawn on the fly",
    )
    add(
        "--data-path",
        type=Path,
        remember=True,
        help="COCO, VOC or YOLO folder; for shapes, where to keep the images",
    )
    add("--train-images", type=Path, help="folder, in place of DATA_PATH/train2017")
    add(
        "--train-annotations",
        type=Path,
        help="file, in place of DATA_PATH/annotations/instances_train2017.json",
    )
    add("--val-images", type=Path, remember=True, help="folder, in place of DATA_PATH/val2017")
    add(
        "--val-annotations",
        type=Path,
        remember=True,
        help="file, in place of DATA_PATH/annotations/instances_val2017.json",
    )
    add(
        "--model",
        default="retinanet_resnet50_fpn",
        on_resume=REFUSE,
        remember=True,
        help="detector: a name of torchvision's, or retinanet_RESNET_fpn",
    )
    add = parser.group("training data", on_resume=REFUSE)
    add(
        "--data-augmentation",
        choices=presets.POLICIES,
        default="hflip",
        help="augmentation policy of the training images",
    )
    add(
        "--aspect-ratio-group-factor",
        type=between(int, -1, 1000),
        default=3,
        help="groups of aspect ratios per octave; -1 switches grouping off",
    )
    add(
        "-b",
        "--batch-size",
        type=positive(int),
        default=2,
        help="training images per process and batch",
    )
    add(
        "-j",
        "--workers",
        type=non_negative(int, at_most=1024),
        default=4,
        on_resume=IGNORE,
        help="loader processes of each process",
    )
    add("--keep-empty", action="store_true", help="train on images without boxes as well")


def _add_model_flags(parser: ArgumentParser) -> None:
    add = parser.group("model", on_resume=REFUSE)
    add(
        "--weights",
        remember=True,
        help="weights of the whole detector: a name of torchvision's, or a file",
    )
    add(
        "--weights-backbone",
        remember=True,
        help="weights of the backbone: a name of torchvision's, or a file",
    )
    add(
        "--trainable-backbone-layers",
        type=between(int, 0, 6),
        help="layers of the backbone to train, 0 to 5 from the last; the model's own if not given",
    )
    add(
        "--min-size",
        type=positive(int, at_most=20_000),
        remember=True,
        help="shorter side of the resized image, pixels; the model's own if not given",
    )
    add(
        "--max-size",
        type=positive(int, at_most=20_000),
        remember=True,
        help="limit of the longer side of the resized image, pixels; the model's own if not given",
    )
    add(
        "--assigner",
        choices=retinanet.ASSIGNERS,
        default="torchvision",
        help="rule that assigns anchors to boxes; RetinaNet only",
    )
    add(
        "--box-subnet",
        choices=retinanet.BOX_SUBNETS,
        on_resume=LOG,
        help="where training computes the box head: sparse on a CPU, else dense; RetinaNet only",
    )
    add(
        "--anchor-sizes",
        type=positive(int),
        nargs="+",
        remember=True,
        help="sides of the anchors of P3 to P7, pixels; 32 to 512 if not given; RetinaNet only",
    )
    add(
        "--anchor-ratios",
        type=positive(float),
        nargs="+",
        remember=True,
        help="height / width of the anchors; 0.5 1 2 if not given; RetinaNet only",
    )
    switch = argparse.BooleanOptionalAction
    add(
        "--sync-bn",
        action=switch,
        default=False,
        help="batch statistics over all processes; CUDA only",
    )
    thresholds = {"on_resume": LOG, "remember": True}
    add(
        "--score-thresh",
        type=between(float, 0, 1),
        **thresholds,
        help="score above which a detection counts; the model's own if not given",
    )
    add(
        "--nms-thresh",
        type=between(float, 0, 1),
        **thresholds,
        help="IoU above which the worse detection is dropped; the model's own if not given",
    )
    add(
        "--detections-per-image",
        type=positive(int),
        **thresholds,
        help="limit after suppression (COCO counts 100); the model's own if not given",
    )
    add(
        "--topk-candidates",
        type=positive(int),
        **thresholds,
        help="limit before suppression, per level (SSD: per class); the model's own if not given",
    )


def _add_optimization_flags(parser: ArgumentParser) -> None:
    add = parser.group("optimization", on_resume=REFUSE)
    add("--opt", choices=("sgd", "sgd_nesterov", "adamw"), default="sgd", help="optimizer")
    add(
        "--lr",
        type=positive(float),
        default=0.01,
        on_resume=LOG,
        help="base learning rate, for the global batch in use",
    )
    add(
        "--scale-lr",
        action="store_true",
        help=f"--lr is for a global batch of {RECIPE_BATCH}: scale it to the global batch in use",
    )
    add("--momentum", type=between(float, 0, 1), default=0.9, help="momentum of SGD")
    add(
        "--wd",
        "--weight-decay",
        dest="wd",
        type=non_negative(float),
        default=1e-4,
        help="weight decay",
    )
    add(
        "--norm-weight-decay",
        type=non_negative(float),
        help="weight decay of normalisation layers; that of --wd if not given",
    )
    add(
        "--accumulate-steps",
        type=positive(int),
        default=1,
        on_resume=IGNORE,
        help="batches per process and optimizer step",
    )
    add(
        "--ema-decay",
        type=inside(0, 1),
        help="average the weights with this decay per optimizer step, and evaluate the average",
    )
    add(
        "--clip-grad-norm",
        type=positive(float),
        on_resume=LOG,
        help="limit of the L2 norm of all gradients together",
    )
    add = parser.group("schedule", on_resume=LOG)
    add(
        "--epochs",
        type=positive(int, at_most=1_000_000),
        default=26,
        help="epochs of the whole run",
    )
    add(
        "--lr-scheduler",
        choices=("multisteplr", "cosineannealinglr"),
        default="multisteplr",
        help="schedule of the learning rate",
    )
    add(
        "--lr-steps",
        type=non_negative(int),
        nargs="+",
        default=[16, 22],
        help="epochs after which multisteplr decays the rate",
    )
    add(
        "--lr-gamma",
        type=between(float, 0, 1),
        default=0.1,
        help="factor of each decay of multisteplr",
    )
    add(
        "--warmup-steps",
        type=non_negative(int),
        help="optimizer steps of warm-up; 1000, or fewer in a shorter epoch, if not given",
    )


def _add_evaluation_flags(parser: ArgumentParser) -> None:
    add = parser.group("evaluation")
    add(
        "--test-only",
        action="store_true",
        help="evaluate --resume or --weights, into OUTPUT_DIR/eval/test",
    )
    add(
        "--eval-every",
        type=non_negative(int),
        default=1,
        help="epochs between evaluations; 0 is never",
    )
    add(
        "--eval-batch-size",
        type=positive(int),
        default=1,
        help="images of one padded size per process and batch of an evaluation",
    )
    add(
        "--coco-eval",
        choices=coco_eval.BACKENDS,
        default="hotcoco",
        help="library that scores; both give the same numbers, hotcoco faster",
    )
    add(
        "--save-detections", action="store_true", help="write the detections as a COCO results file"
    )
    add(
        "--val-loss",
        action="store_true",
        help="compute the losses of the validation images as well",
    )


def _add_run_flags(parser: ArgumentParser) -> None:
    add = parser.group("speed", on_resume=LOG)
    add(
        "--amp",
        nargs="?",
        const="bf16",
        choices=("fp16", "bf16"),
        on_resume=REFUSE,
        help="mixed precision; --amp without a value is bf16",
    )
    add("--compile", action="store_true", help="compile backbone and head (torch.compile)")
    add(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="memory format of weights and images",
    )
    add(
        "--device",
        choices=("cuda", "cpu"),
        on_resume=IGNORE,
        help="device; cuda if there is one, else cpu, if not given",
    )
    add(
        "--use-deterministic-algorithms",
        action="store_true",
        help="the same bits in every run on CUDA, slower",
    )
    add = parser.group("run")
    add("--output-dir", type=Path, help="folder of the run; runs/MODEL if not given")
    add("--resume", help="checkpoint to continue, or 'auto' for the newest in --output-dir")
    add(
        "--seed",
        type=non_negative(int, at_most=2**63 - 1),
        default=0,
        on_resume=REFUSE,
        help="seed of the order, the augmentation and the initial weights",
    )
    add(
        "--checkpoint-every",
        type=non_negative(int),
        default=1000,
        help="optimizer steps between saves; 0 saves after each epoch only",
    )
    add(
        "--keep-checkpoints",
        type=non_negative(int),
        help="how many model_EPOCH.pth to keep, the newest; all if not given",
    )
    add("--max-steps", type=positive(int), help="stop cleanly after this optimizer step of the run")
    add("--print-freq", type=positive(int), default=20, help="optimizer steps per line of the log")
    add(
        "--tensorboard", action="store_true", help="write scalars and sample images for TensorBoard"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse flags; with `--test-only`, what a checkpoint remembers takes the place of defaults.

    Raises:
        UserError: if the checkpoint that `--test-only` is to evaluate is missing or damaged.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.test_only and args.resume:
        # From here on "auto" is the name of a file, so that nothing else can be evaluated.
        resume = _newest(output_folder(args)) if args.resume == "auto" else Path(args.resume)
        saved = checkpoint.load(resume).get("args", {})
        # Other data than the checkpoint's: its other paths do not belong to them.
        unset = argparse.Namespace(dataset=None, data_path=None)
        given = parser.parse_args(argv, unset)
        known = dict(saved)
        if given.dataset not in (None, saved.get("dataset")):
            known = {k: v for k, v in saved.items() if k not in ("data_path", *PATHS)}
        elif given.data_path is not None and str(given.data_path) != str(saved.get("data_path")):
            known = {k: v for k, v in saved.items() if k not in PATHS}
        args = parser.parse_args(argv, parser.recall(known))
        args.resume = str(resume)
    return args


def output_folder(args: argparse.Namespace) -> Path:
    """Return `--output-dir`, or its default, which depends on the model."""
    return args.output_dir or Path("runs") / args.model


def _newest(folder: Path) -> Path:
    """Return the newest checkpoint of `folder`, as `--resume auto` means it with `--test-only`."""
    found = checkpoint.newest(folder)
    if found is None:
        raise UserError(
            f"--test-only --resume auto: no checkpoint in {folder}; name the folder of a run with "
            "--output-dir, or a file with --resume"
        )
    return found


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together, before any data is read."""
    check_model_name(args.model)
    device = args.device or utils.default_device()
    if args.lr_steps != sorted(set(args.lr_steps)):
        raise UserError(f"--lr-steps {args.lr_steps}: epochs must increase, such as 16 22")
    if args.opt == "sgd_nesterov" and not args.momentum:
        raise UserError("--opt sgd_nesterov needs a --momentum greater than 0")
    layers = args.trainable_backbone_layers
    if layers == 6 and "mobilenet" not in args.model:
        raise UserError(f"--trainable-backbone-layers {layers}: {args.model} has 5; give 0 to 5")
    make_anchor_generator(args.anchor_sizes, args.anchor_ratios)
    if args.min_size and args.max_size and args.min_size > args.max_size:
        raise UserError(f"--min-size {args.min_size} is larger than --max-size {args.max_size}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    if args.compile and args.box_subnet == "sparse":
        raise UserError("--box-subnet sparse cannot be compiled; leave out one of the two flags")
    if args.sync_bn and device != "cuda":
        raise UserError("--sync-bn works on CUDA only, and this run is on a CPU; leave it out")
    if args.dataset == "coco" and not args.data_path:
        needed = PATHS[2:] if args.test_only else PATHS
        if not all(getattr(args, name) for name in needed):
            raise UserError("--data-path is missing: a folder in COCO layout, or --dataset shapes")
    if args.dataset in formats.LAYOUTS and not args.data_path:
        raise UserError(f"--data-path is missing: the folder for --dataset {args.dataset}")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: the package is missing; pip install -e '.[tensorboard]'")
    if args.test_only and not args.resume and not args.weights:
        raise UserError("--test-only needs what to test: --resume CHECKPOINT or --weights NAME")


def check_sizes(args: argparse.Namespace, num_images: int, num_processes: int) -> None:
    """Raise UserError for a batch or a step that is larger than the training data."""
    if args.batch_size > num_images:
        raise UserError(
            f"--batch-size {args.batch_size} is more than the {num_images} images to train on"
        )
    batches = -(-num_images // args.batch_size)
    if args.accumulate_steps > 1 and args.accumulate_steps * num_processes > batches:
        raise UserError(
            f"--accumulate-steps {args.accumulate_steps} on {num_processes} processes makes steps "
            f"of {args.accumulate_steps * num_processes} batches, and an epoch has {batches}"
        )


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
    annotations: coco_arrays.Annotations, label_map: Sequence[dict[str, Any]] | None
) -> coco_arrays.Annotations:
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
    saved: dict[str, Any], train: coco_arrays.Annotations, val: coco_arrays.Annotations
) -> dict[str, Callable[[], str]]:
    """Return what says how the data differs from that of a checkpoint; `saved` as it remembers."""
    splits = {"data": ("training data", train), "val_data": ("validation data", val)}
    return {
        key: functools.partial(coco_arrays.differences, name, saved.get(key), annotations)
        for key, (name, annotations) in splits.items()
    }


def main(args: argparse.Namespace) -> int:
    """Train, or with `--test-only` evaluate: the whole run in order. Returns the exit status."""
    check_flags(args)
    parser = build_parser()
    with contextlib.ExitStack() as stack:
        # Processes, output folder, log
        utils.follow_launcher()
        if args.workers:
            utils.start_worker_server("train")
        utils.set_determinism(args.use_deterministic_algorithms)
        processes = stack.enter_context(utils.processes(args.device or utils.default_device()))
        stack.enter_context(utils.worker_errors())
        should_stop = utils.StopSignal()
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
            checks.require_boxes(train)

        # Model
        torch.manual_seed(args.seed)
        resize = args.data_augmentation not in presets.RESIZING
        options = parser.values(args, "model")
        model = build_model(
            args.model, label_map, resize, not resume, not args.test_only, **options
        )
        for split in (val, *rest):
            checks.require_pixels(split, padded_sizes(model, split.sizes))
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
        keep = None if args.keep_empty else train.images_with_objects()
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
    except KeyboardInterrupt:  # later ones are taken by `utils.StopSignal`
        status = 128 + signal.SIGINT
        print("error: interrupted before the run began", file=sys.stderr)
    except Exception as error:
        _print_error(error)
    finally:
        utils.kill_workers()
    if status:
        utils.end_failed()
        sys.exit(status)


def _print_error(error: Exception) -> None:
    """Print what a user can mend as one message, and anything else with its traceback."""
    if isinstance(error, utils.PeerError):
        print(f"error: [rank {utils.launch_rank()}] {error}", file=sys.stderr)
    elif not isinstance(error, UserError):
        traceback.print_exception(error)
    # All processes see the same flags and data, so one speaks; an image only one process saw.
    elif utils.launch_rank() == 0 or isinstance(error, utils.LocalError):
        text = str(error).strip()
        if "Original Traceback" in text:  # raised in a DataLoader worker
            text = text.splitlines()[-1].split(": ", 1)[-1]
        print(utils.printable(f"error: {text}", keep="\n"), file=sys.stderr)


if __name__ == "__main__":
    run_from_command_line()
