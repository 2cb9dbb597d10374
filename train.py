"""Train and evaluate box detectors: RetinaNet by its published recipe, unless told otherwise.

    torchrun --nproc_per_node=8 train.py --data-path /coco \\
        --weights-backbone ResNet50_Weights.IMAGENET1K_V1 --output-dir runs/coco --resume auto

This is the file to read first. `main` is the whole run in order; everything else here is flags and
wiring. Source of the recipe and of the flag names: torchvision's references/detection/train.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import checkpoint
import coco_eval
import coco_json
import coco_utils
import data_cache
import engine
import formats
import presets
import retinanet
import shapes
import utils
from group_by_aspect_ratio import GroupedBatchSampler, aspect_ratio_groups, same_size_batches
from model import (
    INFERENCE,
    build_model,
    check_model_name,
    load_trained,
    make_anchor_generator,
    make_ema,
    padded_sizes,
    wrap,
)
from progress import RECIPE_BATCH
from run import Evaluation, Run, open_folder
from utils import Processes, UserError, logger

PATH_FLAGS = ("train_images", "train_annotations", "val_images", "val_annotations")
DETECTION_FLAGS = ("score_thresh", "nms_thresh", "detections_per_image", "topk_candidates")
MODEL_FLAGS = (
    *("weights", "weights_backbone", "trainable_backbone_layers", "min_size", "max_size"),
    *("assigner", "box_subnet", "anchor_sizes", "anchor_ratios", "sync_bn", *DETECTION_FLAGS),
)
EVALUATION_FLAGS = ("eval_batch_size", "workers", "coco_eval", "save_detections", "val_loss")
ORDER_FLAGS = (
    *("aspect_ratio_group_factor", "batch_size", "data_augmentation", "seed", "workers"),
)
OPTIMIZER_FLAGS = ("opt", "momentum", "wd", "norm_weight_decay")
LOOP_FLAGS = ("seed", "clip_grad_norm", "print_freq")
SCHEDULE_FLAGS = ("epochs", "lr_scheduler", "lr_steps", "lr_gamma", "warmup_steps")
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {True: torch.channels_last, False: torch.contiguous_format}
# What `--test-only` takes from the checkpoint unless a flag says otherwise.
REMEMBERED_DATA = ("dataset", "data_path", "val_images", "val_annotations")
REMEMBERED = (*REMEMBERED_DATA, "model", *INFERENCE)
# What cannot change between the parts of one run, as `args.json` and checkpoints name it; and what
# can and is said, as it has a say in the numbers. The other flags have none.
FIXED = (
    *("seed", "batch_size", "data_augmentation", "aspect_ratio_group_factor", "keep_empty"),
    *("model", "weights", "weights_backbone", "trainable_backbone_layers", "min_size", "max_size"),
    *("assigner", "anchor_sizes", "anchor_ratios", "ema_decay", "amp", "scale_lr", "sync_bn"),
    *OPTIMIZER_FLAGS,
)
MAY_CHANGE = (
    *("lr", *SCHEDULE_FLAGS, "clip_grad_norm", "box_subnet", "channels_last", "compile"),
    *("use_deterministic_algorithms", *DETECTION_FLAGS),
)


def build_parser() -> argparse.ArgumentParser:
    """Declare the flags; their defaults are the published recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_data_flags(parser.add_argument_group("data").add_argument)
    _add_model_flags(parser.add_argument_group("model").add_argument)
    _add_optimization_flags(parser.add_argument_group("optimization").add_argument)
    _add_evaluation_flags(parser.add_argument_group("evaluation").add_argument)
    _add_run_flags(parser.add_argument_group("speed and run").add_argument)
    return parser


def _add_data_flags(add: Callable[..., Any]) -> None:
    layouts = ("coco", "shapes", *formats.LAYOUTS)
    add("--dataset", choices=layouts, default="coco", help="layout; shapes is drawn on the fly")
    add("--data-path", type=Path, help="COCO, VOC or YOLO folder; for shapes, where to keep them")
    add("--train-images", type=Path, help="instead of DATA_PATH/train2017")
    add("--train-annotations", type=Path, help="instead of …/instances_train2017.json")
    add("--val-images", type=Path, help="instead of DATA_PATH/val2017")
    add("--val-annotations", type=Path, help="instead of …/instances_val2017.json")
    add("--data-augmentation", choices=presets.POLICIES, default="hflip", help="policy")
    add("--aspect-ratio-group-factor", type=int, default=3, help="groups per octave; -1 is off")
    add("-b", "--batch-size", type=int, default=2, help="images per process")
    add("-j", "--workers", type=int, default=4, help="loader processes per process")
    add("--keep-empty", action="store_true", help="train on images without boxes, too")


def _add_model_flags(add: Callable[..., Any]) -> None:
    add("--model", default="retinanet_resnet50_fpn", help="or retinanet_RESNET_fpn, fcos_…, ssd…")
    add("--weights", help="of the detector: a torchvision name, or a file")
    add("--weights-backbone", help="of the backbone: a torchvision name, or a file")
    add("--trainable-backbone-layers", type=int, help="from the last, 0-5; the model's default")
    add("--min-size", type=int, help="shorter side after resizing, pixels; the model's default")
    add("--max-size", type=int, help="longer side after resizing at most, pixels; likewise")
    add("--assigner", choices=retinanet.ASSIGNERS, default="torchvision", help="of RetinaNet")
    add(
        "--box-subnet",
        choices=retinanet.BOX_SUBNETS,
        help="in training; sparse on a CPU, else dense",
    )
    add("--anchor-sizes", type=int, nargs="+", help="of P3 … P7, pixels; 32 64 128 256 512")
    add("--anchor-ratios", type=float, nargs="+", help="height / width of each; 0.5 1 2")


def _add_optimization_flags(add: Callable[..., Any]) -> None:
    add("--epochs", type=int, default=26, help="in all")
    add("--opt", choices=("sgd", "sgd_nesterov", "adamw"), default="sgd", help="optimizer")
    add("--lr", type=float, default=0.01, help="base rate, for the global batch that is used")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--wd", "--weight-decay", dest="wd", type=float, default=1e-4, help="weight decay")
    add("--norm-weight-decay", type=float, help="weight decay of normalisation layers; as --wd")
    add("--lr-scheduler", choices=("multisteplr", "cosineannealinglr"), default="multisteplr")
    add("--lr-steps", type=int, nargs="+", default=[16, 22], help="epochs after which to decay")
    add("--lr-gamma", type=float, default=0.1, help="factor of each decay")
    add("--warmup-steps", type=int, help="optimizer steps; 1000, or all but one of a shorter epoch")
    add("--scale-lr", action="store_true", help=f"lr is for a global batch of {RECIPE_BATCH}")
    add("--accumulate-steps", type=int, default=1, help="batches per process and optimizer step")
    add("--clip-grad-norm", type=float, help="largest L2 norm of the gradients")
    add(
        "--ema-decay", type=float, help="average the weights, per optimizer step, and evaluate that"
    )
    add("--sync-bn", action="store_true", help="batch statistics over all processes (CUDA)")


def _add_evaluation_flags(add: Callable[..., Any]) -> None:
    add("--test-only", action="store_true", help="evaluate --resume or --weights, do not train")
    add("--eval-every", type=int, default=1, help="epochs; 0 is never")
    add("--eval-batch-size", type=int, default=1, help="images of one padded size per process")
    add("--coco-eval", choices=coco_eval.BACKENDS, default="hotcoco", help="same numbers, faster")
    add("--save-detections", action="store_true", help="as a COCO results file")
    add("--val-loss", action="store_true", help="losses on the validation images as well")
    add("--score-thresh", type=float, help="detect above this score; the model's default")
    add("--nms-thresh", type=float, help="suppress above this IoU with a better one; likewise")
    add("--detections-per-image", type=int, help="at most, after NMS; likewise (COCO counts 100)")
    add("--topk-candidates", type=int, help="before NMS, per level (SSD: per class); likewise")


def _add_run_flags(add: Callable[..., Any]) -> None:
    add("--amp", nargs="?", const="bf16", choices=("fp16", "bf16"), help="alone: bf16")
    add("--compile", action="store_true", help="compile backbone and head (torch.compile)")
    add("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    add("--device", choices=("cuda", "cpu"), help="cuda where there is one, else cpu")
    add("--output-dir", type=Path, help="default: runs/MODEL")
    add("--resume", help="a checkpoint, or 'auto' for the newest in --output-dir")
    add("--seed", type=int, default=0, help="of order, augmentation and initial weights")
    add("--checkpoint-every", type=int, default=1000, help="optimizer steps; 0: every epoch")
    add("--keep-checkpoints", type=int, help="newest model_EPOCH.pth to keep; all")
    add("--max-steps", type=int, help="stop cleanly after this many optimizer steps in all")
    add("--print-freq", type=int, default=20, help="optimizer steps per line of the log")
    add("--tensorboard", action="store_true", help="write scalars and sample images there")
    add("--use-deterministic-algorithms", action="store_true", help="bit-exact on CUDA, slower")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse flags; with `--test-only`, what a checkpoint remembers are the defaults."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.test_only and args.resume and args.resume != "auto":
        remembered = checkpoint.load(Path(args.resume)).get("args", {})
        given = build_parser()
        given.set_defaults(dataset=..., data_path=...)
        values = vars(given.parse_args(argv))
        forgotten: Sequence[str] = ()
        for place, name in enumerate(REMEMBERED_DATA[:2], start=1):
            if values[name] not in (..., _typed(name, remembered.get(name))):
                forgotten = REMEMBERED_DATA[place:]  # they belong to other data
                break
        known = [name for name in REMEMBERED if name in remembered and name not in forgotten]
        parser.set_defaults(**{name: _typed(name, remembered[name]) for name in known})
        args = parser.parse_args(argv)
    return args


def _typed(name: str, value: Any) -> Any:
    return (
        Path(value)
        if value is not None and name.endswith(("path", "images", "annotations"))
        else value
    )


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for values that cannot work, before any data is read."""
    check_model_name(args.model)
    positive = ("batch_size", "epochs", "lr", "accumulate_steps", "eval_batch_size", "print_freq")
    optional = (
        *("min_size", "max_size", "clip_grad_norm", "max_steps", "ema_decay"),
        *("detections_per_image", "topk_candidates"),
    )
    for name in positive + optional:
        value = getattr(args, name)
        if value is not None and value <= 0 or value is None and name in positive:
            raise UserError(f"{_flag(name)} {value}: must be greater than 0")
    for name in (
        "keep_checkpoints",
        "workers",
        "seed",
        "wd",
        "momentum",
        "warmup_steps",
        "checkpoint_every",
        "eval_every",
    ):
        if (getattr(args, name) or 0) < 0:
            raise UserError(f"{_flag(name)} {getattr(args, name)}: must not be negative")
    if args.lr_steps != sorted(set(args.lr_steps)):
        raise UserError(f"--lr-steps {args.lr_steps}: epochs must increase, such as 16 22")
    if args.ema_decay is not None and args.ema_decay >= 1:
        raise UserError(f"--ema-decay {args.ema_decay}: must be below 1, such as 0.9998")
    if args.trainable_backbone_layers is not None and not 0 <= args.trainable_backbone_layers <= 6:
        raise UserError(f"--trainable-backbone-layers {args.trainable_backbone_layers}: use 0 to 5")
    for name in ("score_thresh", "nms_thresh"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= 1:
            raise UserError(f"{_flag(name)} {getattr(args, name)}: must be between 0 and 1")
    make_anchor_generator(args.anchor_sizes, args.anchor_ratios)
    if args.min_size and args.max_size and args.min_size > args.max_size:
        raise UserError(f"--min-size {args.min_size} is larger than --max-size {args.max_size}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    if args.compile and args.box_subnet == "sparse":
        raise UserError("--box-subnet sparse cannot be compiled; leave out one of the two flags")
    if args.device != "cuda" and args.sync_bn:
        raise UserError("--sync-bn works on CUDA only; leave it out")
    if args.dataset == "coco" and not args.data_path:
        needed = PATH_FLAGS[2:] if args.test_only else PATH_FLAGS
        if not all(getattr(args, name) for name in needed):
            raise UserError("--data-path is missing: a folder in COCO layout, or --dataset shapes")
    if args.dataset in formats.LAYOUTS and not args.data_path:
        raise UserError(f"--data-path is missing: the folder for --dataset {args.dataset}")
    if args.test_only and not args.resume and not args.weights:
        raise UserError("--test-only needs what to test: --resume CHECKPOINT or --weights NAME")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def data_paths(
    dataset: str, folder: Path | None, overrides: dict[str, Path | None]
) -> dict[str, Path]:
    """Return where "train_images", "train_annotations", "val_images" and "val_annotations" are."""
    if dataset == "shapes":
        folder = shapes.make_shapes(folder or data_cache.folder())
    folder = folder or Path()
    paths = {f"{split}_images": folder / f"{split}2017" for split in ("train", "val")}
    for split in ("train", "val"):
        paths[f"{split}_annotations"] = folder / "annotations" / f"instances_{split}2017.json"
    if dataset in formats.LAYOUTS:
        paths = formats.coco_paths(dataset, folder)
    return paths | {name: path for name, path in overrides.items() if path is not None}


def read_splits(paths: dict[str, Path], splits: Sequence[str]) -> list[coco_utils.Annotations]:
    """Read the annotations of `splits`, find the images, and log all warnings.

    Raises:
        UserError: lists what is missing or wrong, in all splits.
    """
    read: list[coco_utils.Annotations] = []
    problems = []
    for split in splits:
        images, annotations = paths[f"{split}_images"], paths[f"{split}_annotations"]
        if not images.is_dir():
            problems.append(f"the image folder {images} does not exist; check --data-path")
            continue
        try:
            packed, findings = data_cache.examine(annotations)
            if packed is not None:
                packed, more = coco_utils.locate_images(packed, images)
                findings = findings + more
            coco_json.require_no_errors(annotations, findings)
        except UserError as error:
            problems.append(str(error))
            continue
        assert packed is not None
        read.append(packed)
        for warning in findings:
            logger.warning("%s: %s", annotations.name, warning)
    if problems:
        raise UserError("\n".join(problems))
    if len(read) == 2:
        val, train = ((read[splits.index(s)], paths[f"{s}_images"]) for s in ("val", "train"))
        for warning in coco_utils.overlap_findings(train, val):
            logger.warning("%s: %s", val[0].path.name, warning)
    return read


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
    if opt == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    nesterov = opt == "sgd_nesterov"
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)


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


def make_loader(
    dataset: coco_utils.CocoDetection, batches: Any, workers: int, device: torch.device, keep: bool
) -> DataLoader:
    """Build a loader over `batches` of (epoch, index); `keep` its workers between epochs."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=coco_utils.collate,
        pin_memory=device.type == "cuda",
        persistent_workers=keep and workers > 0,
        worker_init_fn=utils.ignore_stop_signals,
        multiprocessing_context="fork" if workers else None,  # shares the packed annotations
        generator=torch.Generator(),  # else it would draw from the main process's random numbers
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
    padded = padded_sizes(model, data.sizes())
    batches = same_size_batches(padded, eval_batch_size)
    shard = [[(0, i) for i in batch] for batch in batches[processes.rank :: processes.world_size]]
    loader = make_loader(data, shard, workers, processes.device, keep=False)
    return Evaluation(data, loader, processes, **settings)


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


def main(args: argparse.Namespace) -> None:
    """Train, or with `--test-only` evaluate: the whole run in order."""
    check_flags(args)
    pick = functools.partial(_pick, vars(args))
    with contextlib.ExitStack() as stack:
        # Processes, output folder, log
        utils.follow_launcher()
        utils.set_determinism(args.use_deterministic_algorithms)
        processes = stack.enter_context(utils.processes(args.device or utils.default_device()))
        should_stop = utils.StopSignal()
        folder = args.output_dir or Path("runs") / args.model
        resume = open_folder(folder, args.resume, args.test_only, processes, stack)

        # Data and classes
        paths = data_paths(args.dataset, args.data_path, pick(PATH_FLAGS))
        val, *rest = read_splits(paths, ["val"] if args.test_only else ["val", "train"])
        train = rest[0] if rest else val
        saved = checkpoint.load(resume) if resume else {}
        label_map = saved.get("categories") or coco_utils.label_categories(train.categories)
        if not args.test_only:
            coco_utils.match_classes(label_map, train, str(resume))
        coco_utils.match_classes(label_map, val, str(resume or train.path))
        if not args.test_only and not args.keep_empty:
            coco_utils.require_boxes(train)

        # Model
        torch.manual_seed(args.seed)
        resize = args.data_augmentation not in presets.RESIZING
        model = build_model(
            args.model, label_map, resize, not saved, not args.test_only, **pick(MODEL_FLAGS)
        )
        model = model.to(processes.device).to(memory_format=MEMORY_FORMATS[args.channels_last])

        # Evaluation, which is all there is to do with --test-only
        amp: dict[str, Any] = {"amp_dtype": AMP_DTYPES.get(args.amp), "should_stop": should_stop}
        val_set = coco_utils.CocoDetection(paths["val_images"], val, label_map)
        evaluation = evaluation_of(model, val_set, processes, **amp, **pick(EVALUATION_FLAGS))
        if args.test_only:
            if saved:
                load_trained(model, saved, str(resume))
            evaluation.run(model, args.output_dir)
            return

        # Training data, in the order of the run
        keep = None if args.keep_empty else coco_utils.images_with_objects(train)
        transforms = presets.training_transforms(args.data_augmentation)
        train_set = coco_utils.CocoDetection(
            paths["train_images"], train, label_map, transforms, args.seed, keep
        )
        per_step = batches_per_step(args.accumulate_steps, processes.world_size, saved)
        sampler, loader = training_data(train_set, processes, per_step, **pick(ORDER_FLAGS))

        # Optimizer, the one schedule, EMA, DDP
        lr = args.lr * (args.batch_size * per_step / RECIPE_BATCH if args.scale_lr else 1)
        optimizer = build_optimizer(model, lr, **pick(OPTIMIZER_FLAGS))
        factor = functools.partial(lr_factor, sampler.steps_per_epoch, **pick(SCHEDULE_FLAGS))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        scaler = torch.amp.GradScaler(processes.device.type, enabled=args.amp == "fp16")
        ema = make_ema(model, args.ema_decay)
        state = engine.TrainState(model, optimizer, scheduler, scaler, ema)
        wrapped = wrap(model, processes.device, processes.world_size, args.compile)

        # Resume
        changeable = {"device": processes.device.type, "torch": str(torch.__version__)}
        changeable |= {"val_data": val.fingerprint(), **pick(MAY_CHANGE)}
        identity = {"data": train.fingerprint(), "batches_per_step": per_step, **pick(FIXED)}
        identity |= changeable
        if resume:
            saved = checkpoint.as_own(saved, identity, sampler.steps_per_epoch, resume)
            checkpoint.check_same_run(saved["args"], identity, changeable, resume)
            state.load_state_dict(saved)
        run = Run(folder, state, evaluation, vars(args) | identity, paths, stack)
        run.start(train_set, lr, sampler.steps_per_epoch)

        # Epochs: train, save, then evaluate
        loop = {"batches_per_step": per_step, "weight": sampler.weight, **amp, **pick(LOOP_FLAGS)}
        while not run.is_stopped():
            if run.evaluation_is_due() and not run.evaluate():
                break
            if run.is_complete():
                break
            sampler.set_epoch(state.epoch, state.position)
            finished = engine.train_one_epoch(
                wrapped, state, loader, processes, after_step=run.after_step, **loop
            )
            if not finished:
                break
            state.epoch, state.position = state.epoch + 1, 0
            run.save(f"model_{state.epoch - 1}.pth")
        run.finish()


def _pick(flags: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: flags[name] for name in names}


def run_from_command_line() -> None:
    """Call `main`; what a user can mend ends in one message, not in a stack trace."""
    try:
        main(parse_args())
    except utils.PeerError as error:
        print(f"error: [rank {utils.launch_rank()}] {error}", file=sys.stderr)
        sys.exit(1)
    except UserError as error:
        is_image = isinstance(error, coco_utils.ImageError)
        # All processes see the same flags and data, so one speaks; an image only one process saw.
        if utils.launch_rank() == 0 or is_image:
            text = str(error).strip()
            if "Original Traceback" in text:  # raised in a DataLoader worker
                text = text.splitlines()[-1].split(": ", 1)[-1]
            print(f"error: {text}", file=sys.stderr)
        sys.exit(1)
    finally:
        utils.kill_workers()


if __name__ == "__main__":
    run_from_command_line()
