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
SWITCH = argparse.BooleanOptionalAction


def build_parser() -> ArgumentParser:
    """Declare every flag."""
    parser = ArgumentParser("Train and evaluate box detectors: RetinaNet by its published recipe.")
    _add_data_flags(parser)
    _add_model_flags(parser)
    _add_optimization_flags(parser)
    _add_evaluation_flags(parser)
    _add_run_flags(parser)
    return parser


def _add_data_flags(parser: ArgumentParser) -> None:
    # A resume compares the content of the data, not its path.
    add = parser.group("data", remember=True)
    add("--dataset", choices=LAYOUTS, default="coco", help="layout; shapes is drawn on the fly")
    add("--data-path", type=Path, help="data folder; for shapes, where to keep the images")
    add("--train-images", type=Path, remember=False, help="instead of DATA_PATH/train2017")
    add(
        "--train-annotations",
        type=Path,
        remember=False,
        help="instead of DATA_PATH/annotations/instances_train2017.json",
    )
    add("--val-images", type=Path, help="instead of DATA_PATH/val2017")
    add(
        "--val-annotations",
        type=Path,
        help="instead of DATA_PATH/annotations/instances_val2017.json",
    )
    add = parser.group("training data", on_resume=REFUSE)
    add(
        "--data-augmentation",
        choices=("hflip", "multiscale", "lsj", "ssd", "ssdlite"),
        default="hflip",
        help="augmentation policy",
    )
    add(
        "--aspect-ratio-group-factor",
        type=between(int, -1, 1000),
        default=3,
        help="aspect-ratio groups per octave; -1 switches grouping off",
    )
    add("-b", "--batch-size", type=positive(int), default=2, help="images per process and batch")
    add(
        "-j",
        "--workers",
        type=non_negative(int, at_most=1024),
        default=4,
        on_resume=IGNORE,
        help="loader workers per process",
    )
    add("--keep-empty", action="store_true", help="train on images without boxes, too")
    add(
        "--repeat-threshold",
        type=between(float, 0, 1),
        default=0.0,
        help="show images of classes that less than this share of the images has more often, by "
        "sqrt(threshold / share); 0 shows each image once",
    )


def _add_model_flags(parser: ArgumentParser) -> None:
    add = parser.group("detector", on_resume=REFUSE, remember=True)
    add(
        "--model",
        default="retinanet_resnet50_fpn",
        help="detector: a torchvision name, or retinanet_RESNET_fpn",
    )
    add = parser.group("model", on_resume=REFUSE, remember=True)
    add("--weights", help="weights of the whole detector: a torchvision name, or a file")
    add("--weights-backbone", help="weights of the backbone: a torchvision name, or a file")
    pixels = positive(int, at_most=20_000)
    unset = "the model's default if not set"
    add("--min-size", type=pixels, help=f"shorter side of the resized image, pixels; {unset}")
    add("--max-size", type=pixels, help=f"limit of the longer side, pixels; {unset}")
    add("--anchor-sizes", type=positive(int), nargs="+", help="anchor sides of P3 to P7, pixels")
    add("--anchor-ratios", type=positive(float), nargs="+", help="height / width of the anchors")
    share, count = between(float, 0, 1), positive(int)
    add("--score-thresh", type=share, on_resume=LOG, help=f"least score of a detection; {unset}")
    add("--nms-thresh", type=share, on_resume=LOG, help=f"IoU above which NMS drops a box; {unset}")
    add("--detections-per-image", type=count, on_resume=LOG, help=f"limit after NMS; {unset}")
    add(
        "--topk-candidates",
        type=count,
        on_resume=LOG,
        help=f"limit before NMS, per level (SSD: per class); {unset}",
    )
    # Inference does not use the rest.
    add(
        "--trainable-backbone-layers",
        type=between(int, 0, 6),
        remember=False,
        help=f"backbone layers to train, 0 to 5 from the last; {unset}",
    )
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
    add(
        "--sync-bn",
        action=SWITCH,
        default=False,
        remember=False,
        help="batch statistics over all processes; CUDA only, and the host waits in every layer",
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
        help=f"--lr is for {RECIPE_BATCH} images per step: scale it to the global batch in use",
    )
    add("--momentum", type=between(float, 0, 1), default=0.9, help="momentum of SGD")
    decay = non_negative(float)
    add("--wd", "--weight-decay", dest="wd", type=decay, default=1e-4, help="weight decay")
    add("--norm-weight-decay", type=decay, help="weight decay of normalisation; --wd if not set")
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
        help="average the weights with this decay per step, and evaluate the average",
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
        help="length of the whole run",
    )
    add(
        "--lr-scheduler",
        choices=("multisteplr", "cosineannealinglr"),
        default="multisteplr",
        help="learning rate schedule",
    )
    add(
        "--lr-steps",
        type=non_negative(int),
        nargs="+",
        default=[16, 22],
        help="epochs after which multisteplr decays the learning rate",
    )
    add("--lr-gamma", type=between(float, 0, 1), default=0.1, help="factor of each decay")
    add(
        "--warmup-steps",
        type=non_negative(int),
        help="optimizer steps of warm-up; 1000, or fewer in a shorter epoch, if not set",
    )


def _add_evaluation_flags(parser: ArgumentParser) -> None:
    add = parser.group("evaluation")
    add(
        "--test-only",
        action="store_true",
        help="evaluate --resume or --weights into OUTPUT_DIR/eval/test; train nothing",
    )
    add(
        "--eval-every",
        type=non_negative(int),
        default=1,
        help="epochs between evaluations; 0 never evaluates",
    )
    add(
        "--patience",
        type=positive(int),
        on_resume=LOG,
        help="stop after this many evaluations without a better AP; never if not given",
    )
    add(
        "--eval-batch-size",
        type=positive(int),
        default=1,
        help="images of one padded size per process and batch of an evaluation",
    )
    add(
        "--coco-eval",
        choices=("hotcoco", "pycocotools"),
        default="hotcoco",
        help="library that scores; both give the same numbers, hotcoco faster",
    )
    add(
        "--save-detections", action="store_true", help="write the detections as a COCO results file"
    )
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
    add(
        "--device",
        choices=("cuda", "cpu"),
        on_resume=IGNORE,
        help="device; cuda if there is one, else cpu, if not set",
    )
    add(
        "--use-deterministic-algorithms",
        action="store_true",
        help="the same bits in every run on CUDA, slower",
    )
    add = parser.group("run")
    add("--output-dir", type=Path, help="folder of the run; runs/MODEL if not set")
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
        help="how many model_EPOCH.pth to keep, the newest; all if not set",
    )
    add("--max-steps", type=positive(int), help="stop cleanly after this optimizer step of the run")
    add("--print-freq", type=positive(int), default=20, help="optimizer steps per line of the log")
    add(
        "--tensorboard", action="store_true", help="write scalars and sample images for TensorBoard"
    )


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
        unset = argparse.Namespace(dataset=None, data_path=None)
        flags = parser.parse_args(argv, unset)
        known = dict(saved)
        if flags.dataset not in (None, saved.get("dataset")):
            known = {k: v for k, v in saved.items() if k not in ("data_path", *PATHS)}
        elif flags.data_path is not None and str(flags.data_path) != str(saved.get("data_path")):
            known = {k: v for k, v in saved.items() if k not in PATHS}
        args = parser.parse_args(argv, parser.recall(known))
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
    if args.eval_batch_size > num_val:
        raise UserError(
            f"--eval-batch-size {args.eval_batch_size} is more than the {num_val} images to "
            "evaluate"
        )
    if args.test_only:
        return
    if args.batch_size > num_train:
        raise UserError(
            f"--batch-size {args.batch_size} is more than the {num_train} images to train on"
        )
    batches = -(-num_train // args.batch_size)
    if args.accumulate_steps > 1 and args.accumulate_steps * num_processes > batches:
        raise UserError(
            f"--accumulate-steps {args.accumulate_steps} on {num_processes} processes makes steps "
            f"of {args.accumulate_steps * num_processes} batches, and an epoch has {batches}"
        )
