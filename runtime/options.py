"""The flags of train.py, each declared once; the defaults are the published recipe.

To add a flag: declare it here, and use it in `main` as `args.NAME`. `on_resume` is what happens
when a resumed run has another value. `remember` lets `--test-only` take it from the checkpoint.
Source of the names: torchvision's references/detection/train.py.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch

import utils
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
from runtime.summary import RECIPE_BATCH
from utils import UserError

PATHS = ("train_images", "train_annotations", "val_images", "val_annotations")
LAYOUTS = ("coco", "voc", "yolo", "shapes")
POLICIES = ("hflip", "multiscale", "lsj", "ssd", "ssdlite")  # of presets.py
SCHEDULES = ("multisteplr", "cosineannealinglr")
SWITCH = argparse.BooleanOptionalAction
COUNT, WHOLE, SHARE = positive(int), non_negative(int), between(float, 0, 1)
PIXELS = positive(int, at_most=20_000)
UNSET = "the model's default if not set"
DESCRIPTION = "Train and evaluate box detectors: RetinaNet by its published recipe."


def build_parser(description: str = DESCRIPTION) -> ArgumentParser:
    """Declare every flag of train.py, which some tools take too."""
    parser = ArgumentParser(description)
    _add_data_flags(parser)
    _add_model_flags(parser)
    _add_optimization_flags(parser)
    _add_evaluation_flags(parser)
    _add_run_flags(parser)
    return parser


def _add_data_flags(parser: ArgumentParser) -> None:
    # A resume compares the content of the data, not its path.
    add = parser.group("data", remember=True)
    annotations = "instead of DATA_PATH/annotations/instances_{}2017.json"
    add("--dataset", choices=LAYOUTS, default="coco", help="layout; shapes is drawn on the fly")
    add("--data-path", type=Path, help="data folder; for shapes, where to keep the images")
    add("--train-images", type=Path, remember=False, help="instead of DATA_PATH/train2017")
    add("--train-annotations", type=Path, remember=False, help=annotations.format("train"))
    add("--val-images", type=Path, help="instead of DATA_PATH/val2017")
    add("--val-annotations", type=Path, help=annotations.format("val"))
    add = parser.group("training data", on_resume=REFUSE)
    add("--data-augmentation", choices=POLICIES, default="hflip", help="augmentation policy")
    add(
        "--aspect-ratio-group-factor",
        type=between(int, -1, 1000),
        default=3,
        help="aspect-ratio groups per octave; -1 switches grouping off",
    )
    add("-b", "--batch-size", type=COUNT, default=2, help="images per process and batch")
    workers = non_negative(int, at_most=1024)
    text = "loader workers per process"
    add("-j", "--workers", type=workers, default=4, on_resume=IGNORE, help=text)
    add("--keep-empty", action="store_true", help="train on images without boxes, too")
    add(
        "--repeat-threshold",
        type=SHARE,
        default=0.0,
        help="show images of classes that less than this share of the images has more often, by "
        "sqrt(threshold / share); 0 shows each image once",
    )


def _add_model_flags(parser: ArgumentParser) -> None:
    add = parser.group("detector", on_resume=REFUSE, remember=True)
    text = "detector: a torchvision name, or retinanet_RESNET_fpn"
    add("--model", default="retinanet_resnet50_fpn", help=text)
    add = parser.group("model", on_resume=REFUSE, remember=True)
    add("--weights", help="weights of the whole detector: a torchvision name, or a file")
    add("--weights-backbone", help="weights of the backbone: a torchvision name, or a file")
    add("--min-size", type=PIXELS, help=f"shorter side of the resized image, pixels; {UNSET}")
    add("--max-size", type=PIXELS, help=f"limit of the longer side, pixels; {UNSET}")
    add("--anchor-sizes", type=COUNT, nargs="+", help="anchor sides of P3 to P7, pixels")
    add("--anchor-ratios", type=positive(float), nargs="+", help="height / width of the anchors")
    add("--score-thresh", type=SHARE, on_resume=LOG, help=f"least score of a detection; {UNSET}")
    add("--nms-thresh", type=SHARE, on_resume=LOG, help=f"IoU above which NMS drops a box; {UNSET}")
    add("--detections-per-image", type=COUNT, on_resume=LOG, help=f"limit after NMS; {UNSET}")
    text = f"limit before NMS, per level (SSD: per class); {UNSET}"
    add("--topk-candidates", type=COUNT, on_resume=LOG, help=text)
    # Inference does not use the rest.
    text = f"backbone layers to train, 0 to 5 from the last; {UNSET}"
    add("--trainable-backbone-layers", type=between(int, 0, 6), remember=False, help=text)
    add(
        "--assigner",
        choices=("torchvision", "max-iou"),
        default="torchvision",
        remember=False,
        help="rule that assigns anchors to boxes; RetinaNet only",
    )
    add(
        "--box-subnet",
        choices=("dense", "sparse"),
        on_resume=LOG,
        remember=False,
        help="where training computes the box head: sparse on a CPU, else dense; RetinaNet only",
    )
    text = "batch statistics over all processes; CUDA only, and the host waits in every layer"
    add("--sync-bn", action=SWITCH, default=False, remember=False, help=text)


def _add_optimization_flags(parser: ArgumentParser) -> None:
    add = parser.group("optimization", on_resume=REFUSE)
    add("--opt", choices=("sgd", "sgd_nesterov", "adamw"), default="sgd", help="optimizer")
    text = "base learning rate, for the global batch in use"
    add("--lr", type=positive(float), default=0.01, on_resume=LOG, help=text)
    add(
        "--scale-lr",
        action="store_true",
        help=f"--lr is for {RECIPE_BATCH} images per step: scale it to the global batch in use",
    )
    add("--momentum", type=SHARE, default=0.9, help="momentum of SGD")
    decay = non_negative(float)
    add("--wd", "--weight-decay", dest="wd", type=decay, default=1e-4, help="weight decay")
    add("--norm-weight-decay", type=decay, help="weight decay of normalisation; --wd if not set")
    text = "batches per process and optimizer step"
    add("--accumulate-steps", type=COUNT, default=1, on_resume=IGNORE, help=text)
    text = "average the weights with this decay per step, and evaluate the average"
    add("--ema-decay", type=inside(0, 1), help=text)
    text = "limit of the L2 norm of all gradients together"
    add("--clip-grad-norm", type=positive(float), on_resume=LOG, help=text)
    add = parser.group("schedule", on_resume=LOG)
    epochs = positive(int, at_most=1_000_000)
    add("--epochs", type=epochs, default=26, help="length of the whole run")
    add("--lr-scheduler", choices=SCHEDULES, default=SCHEDULES[0], help="learning rate schedule")
    text = "epochs after which multisteplr decays the learning rate"
    add("--lr-steps", type=WHOLE, nargs="+", default=[16, 22], help=text)
    add("--lr-gamma", type=SHARE, default=0.1, help="factor of each decay")
    text = "optimizer steps of warm-up; 1000, or fewer in a shorter epoch, if not set"
    add("--warmup-steps", type=WHOLE, help=text)


def _add_evaluation_flags(parser: ArgumentParser) -> None:
    add = parser.group("evaluation")
    text = "evaluate --resume or --weights into OUTPUT_DIR/eval/test; train nothing"
    add("--test-only", action="store_true", help=text)
    text = "epochs between evaluations; 0 never evaluates"
    add("--eval-every", type=WHOLE, default=1, help=text)
    text = "stop after this many evaluations without a better AP; never if not given"
    add("--patience", type=COUNT, on_resume=LOG, help=text)
    text = "images of one padded size per process and batch of an evaluation"
    add("--eval-batch-size", type=COUNT, default=1, help=text)
    add(
        "--coco-eval",
        choices=("hotcoco", "pycocotools"),
        default="hotcoco",
        help="library that scores; both give the same numbers, hotcoco faster",
    )
    text = "write the detections as a COCO results file"
    add("--save-detections", action="store_true", help=text)
    add("--val-loss", action="store_true", help="compute the losses of the validation images, too")


def _add_run_flags(parser: ArgumentParser) -> None:
    add = parser.group("speed", on_resume=LOG)
    add(
        "--amp",
        choices=("fp16", "bf16"),
        nargs="?",
        const="bf16",
        on_resume=REFUSE,
        help="mixed precision; --amp without a value is bf16",
    )
    add(
        "--tf32",
        action=SWITCH,
        help="use TF32 for fp32 on CUDA; in convolutions only, PyTorch's default, if not set",
    )
    add("--compile", action="store_true", help="compile backbone and head (torch.compile)")
    add("--channels-last", action=SWITCH, default=True, help="memory format of weights and images")
    text = "device; cuda if there is one, else cpu, if not set"
    add("--device", choices=("cuda", "cpu"), on_resume=IGNORE, help=text)
    text = "the same bits in every run on CUDA, slower"
    add("--use-deterministic-algorithms", action="store_true", help=text)
    add = parser.group("run")
    add("--output-dir", type=Path, help="folder of the run; runs/MODEL if not set")
    add("--resume", help="checkpoint to continue, or 'auto' for the newest in --output-dir")
    text = "seed of the order, the augmentation and the initial weights"
    largest = non_negative(int, at_most=2**63 - 1)
    add("--seed", type=largest, default=0, on_resume=REFUSE, help=text)
    text = "optimizer steps between saves; 0 saves after each epoch only"
    add("--checkpoint-every", type=WHOLE, default=1000, help=text)
    text = "how many model_EPOCH.pth to keep, the newest; all if not set"
    add("--keep-checkpoints", type=WHOLE, help=text)
    add("--max-steps", type=COUNT, help="stop cleanly after this optimizer step of the run")
    add("--print-freq", type=COUNT, default=20, help="optimizer steps per line of the log")
    text = "write scalars and sample images for TensorBoard"
    add("--tensorboard", action="store_true", help=text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse flags; with `--test-only`, take remembered flags from the checkpoint.

    Raises:
        UserError: if the checkpoint that `--test-only` is to evaluate is missing or damaged.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.test_only and args.resume:
        # From here on "auto" is a file name, so nothing else can be evaluated.
        resume = _newest(output_folder(args)) if args.resume == "auto" else Path(args.resume)
        saved = checkpoint.load(resume).get("args", {})
        # With other data than the checkpoint's, its other paths do not apply.
        flags = parser.parse_args(argv, argparse.Namespace(dataset=None, data_path=None))
        forgotten: tuple[str, ...] = ()
        if flags.dataset not in (None, saved.get("dataset")):
            forgotten = ("data_path", *PATHS)
        elif flags.data_path is not None and str(flags.data_path) != str(saved.get("data_path")):
            forgotten = PATHS
        known = {name: value for name, value in saved.items() if name not in forgotten}
        args = parser.parse_args(argv, parser.recall(known, f"--resume {resume}"))
        args.resume = str(resume)
    return args


def output_folder(args: argparse.Namespace) -> Path:
    """Return `--output-dir`, or its default, which depends on the model."""
    return args.output_dir or Path("runs") / args.model


def _newest(folder: Path) -> Path:
    """Return the newest checkpoint of `folder`; raise UserError if there is none."""
    path = checkpoint.newest(folder)
    if path is None:
        raise UserError(
            f"--test-only --resume auto: no checkpoint in {folder}; name the folder of a run with "
            "--output-dir, or a file with --resume"
        )
    return path


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict each other, before any data is read."""
    device = args.device or utils.default_device()
    if args.lr_steps != sorted(set(args.lr_steps)):
        raise UserError(f"--lr-steps {args.lr_steps}: epochs must increase, such as 16 22")
    if args.opt == "sgd_nesterov" and not args.momentum:
        raise UserError("--opt sgd_nesterov needs a --momentum greater than 0")
    layers = args.trainable_backbone_layers
    if layers == 6 and "mobilenet" not in args.model:
        raise UserError(f"--trainable-backbone-layers {layers}: {args.model} has 5; give 0 to 5")
    if args.min_size and args.max_size and args.min_size > args.max_size:
        raise UserError(f"--min-size {args.min_size} is larger than --max-size {args.max_size}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    if args.compile and args.box_subnet == "sparse":
        raise UserError("--box-subnet sparse cannot be compiled; leave out one of the two flags")
    if args.patience and not args.eval_every:
        raise UserError("--patience counts evaluations, and --eval-every 0 makes none")
    if args.tf32 and device != "cuda":
        raise UserError("--tf32 is for CUDA, and this run is on a CPU; leave it out")
    if args.sync_bn and device != "cuda":
        raise UserError("--sync-bn works on CUDA only, and this run is on a CPU; leave it out")
    if args.dataset == "coco" and not args.data_path:
        needed = PATHS[2:] if args.test_only else PATHS
        if not all(getattr(args, name) for name in needed):
            raise UserError("--data-path is missing: a folder in COCO layout, or --dataset shapes")
    if args.dataset in ("voc", "yolo") and not args.data_path:
        raise UserError(f"--data-path is missing: the folder for --dataset {args.dataset}")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: the package is missing; pip install -e '.[tensorboard]'")
    if args.test_only and not args.resume and not args.weights:
        raise UserError("--test-only needs what to test: --resume CHECKPOINT or --weights NAME")


def check_sizes(args: argparse.Namespace, num_train: int, num_val: int, num_processes: int) -> None:
    """Raise UserError for a batch or a step that is larger than the data, in images."""
    sizes = [("--eval-batch-size", args.eval_batch_size, num_val, "to evaluate")]
    if not args.test_only:
        sizes.append(("--batch-size", args.batch_size, num_train, "to train on"))
    for flag, size, count, what in sizes:
        if size > count:
            raise UserError(f"{flag} {size} is more than the {count} images {what}")
    per_step, batches = args.accumulate_steps * num_processes, -(-num_train // args.batch_size)
    if args.accumulate_steps > 1 and per_step > batches and not args.test_only:
        raise UserError(
            f"--accumulate-steps {args.accumulate_steps} on {num_processes} processes makes steps "
            f"of {per_step} batches, and an epoch has {batches}"
        )
