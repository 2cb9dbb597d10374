"""Look at what goes into training, and at how RetinaNet works on it.

    python -m tools.visualize batch --data-path /coco --data-augmentation multiscale

draws batches as the model sees them: after augmentation, resizing and padding, with their boxes. It
takes the flags of train.py, so that one puts `tools.visualize batch` where `train.py` stood.

    python -m tools.visualize anchor-fit --data-path mydata

prints how well RetinaNet's anchors cover the boxes, and which would do better.

    python -m tools.visualize assignment street.jpg --annotations instances.json

draws one step of the method on an image and its boxes, as docs/retinanet.md explains it; `anchors`,
`coding`, `focal` and `pipeline` are the others.
"""

from __future__ import annotations

from data import checks, coco_arrays, image_files
from data.splits import PATHS, data_paths, read_splits

if not __package__:  # run as a file, it would not find the modules beside tools/
    raise SystemExit("run it as: python -m tools.visualize")

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.io import write_jpeg

import coco_utils
import presets
import train
import utils
from data import coco_json
from docs.explain import pictures as explain_pictures
from models.build import build_model, load_detector
from runtime.flags import ArgumentParser, non_negative, positive
from tools import anchor_fit
from tools.plots import drawing
from utils import UserError, run_command


def draw_batches(
    batches: Sequence[tuple[list[Tensor], list[dict[str, Tensor]]]],
    model: nn.Module,
    label_map: Sequence[dict[str, Any]],
    side: int,
) -> Tensor:
    """Draw batches, one per row, as the transform of `model` (in training mode) leaves them.

    Returns:
        uint8 `[3, H, W]`; gray is padding.
    """
    transform: Any = model.transform
    colours = drawing.class_colours(label_map)
    names = {category["label"]: category["name"] for category in label_map}
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (transform.image_mean, transform.image_std)
    )
    tiles = []
    for images, targets in batches:
        seen, targets = transform([image / 255 for image in images], targets)
        for pixels, target in zip(seen.tensors, targets, strict=True):
            image = ((pixels * std + mean) * 255).round().clamp(0, 255).byte()
            labels = target["labels"].tolist()
            texts = [names[label] for label in labels]
            boxes = target["boxes"].numpy()
            tiles.append(drawing.draw_boxes(image, boxes, labels, texts, colours, side))
    return drawing.mosaic(tiles, columns=len(batches[0][0]))


def build_parser() -> ArgumentParser:
    """Declare the flags: those of train.py, and what is drawn."""
    parser = train.build_parser()
    add = parser.add_argument_group("picture").add_argument
    add("--picture", type=Path, default=Path("batch.jpg"), help="file to write")
    add("--batches", type=positive(int), default=4, help="batches to draw, one per row")
    add("--epoch", type=non_negative(int), default=0, help="the epoch to take them from")
    add(
        "--side",
        type=positive(int, at_most=20_000),
        default=480,
        help="longer side of an image in the picture, pixels",
    )
    return parser


def draw_batch(argv: list[str]) -> None:
    """Draw batches as the model sees them, by the flags of `build_parser`."""
    parser = build_parser()
    flags = parser.parse_args(argv)
    train.check_flags(flags)
    overrides = {name: getattr(flags, name) for name in PATHS}
    paths = data_paths(flags.dataset, flags.data_path, overrides)
    (annotations,) = read_splits(paths, ["train"])
    if not flags.keep_empty:
        checks.require_boxes(annotations)
    label_map = coco_utils.label_categories(annotations.categories)
    transforms = presets.training_transforms(flags.data_augmentation)
    keep = None if flags.keep_empty else annotations.images_with_objects()
    data = coco_utils.CocoDetection(
        paths["train_images"], annotations, label_map, transforms, flags.seed, keep
    )
    processes = utils.Processes(torch.device("cpu"))
    sampler, loader = train.training_data(
        data,
        processes,
        flags.accumulate_steps,
        aspect_ratio_group_factor=flags.aspect_ratio_group_factor,
        batch_size=flags.batch_size,
        data_augmentation=flags.data_augmentation,
        seed=flags.seed,
        workers=flags.workers,
    )
    sampler.set_epoch(flags.epoch, 0)
    resize = flags.data_augmentation not in presets.RESIZING
    options = parser.values(flags, "model")
    model = build_model(flags.model, label_map, resize, load=False, **options).train()
    torch.manual_seed(utils.derive_seed(flags.seed, flags.epoch, 0))
    batches = list(itertools.islice(loader, flags.batches))
    picture = draw_batches(batches, model, label_map, flags.side)
    flags.picture.parent.mkdir(parents=True, exist_ok=True)
    write_jpeg(picture, str(flags.picture), quality=90)
    print(f"{len(batches)} batches of epoch {flags.epoch}, one per row: {flags.picture}")


STEPS = ("anchors", "assignment", "coding", "focal", "pipeline")


def read_boxes(image: Path, annotations: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Read an image, uint8 `[3, H, W]`, its boxes `[M, 4]` xyxy and the names of their classes.

    The annotations are found by the image's file name; crowds are left out, as in training.

    Raises:
        UserError: if either file cannot be used, or the annotations do not have the image.
    """
    coco, _ = coco_json.read_annotations(annotations)
    names = [coco.file_name(i) for i in range(len(coco))]
    found = [i for i, name in enumerate(names) if Path(name).name == image.name]
    if len(found) > 1:  # in several folders: as much of the path as the annotations have decides
        found = [i for i in found if image.resolve().as_posix().endswith(f"/{names[i]}")]
    if len(found) != 1:
        how_many = "several images" if found else "no image"
        raise UserError(f"{annotations} has {how_many} named {image.name}: give the one it is of")
    height, width = coco.sizes[found[0]].tolist()
    try:
        pixels = image_files.read_image(image, image.parent, (height, width))
    except image_files.ImageError as error:
        raise UserError(f"{image} {error}") from None
    rows = np.arange(*coco.offsets[found[0] : found[0] + 2])
    rows = rows[~coco.iscrowd[rows]]
    boxes = torch.from_numpy(coco_arrays.to_xyxy(coco.boxes_xywh[rows])).float()
    return pixels, boxes, [coco.categories[k][1] for k in coco.category_index[rows]]


def draw_step(step: str, argv: list[str]) -> None:
    """Draw one of `STEPS` on an image of the user's."""
    parser = argparse.ArgumentParser(prog=f"python -m tools.visualize {step}")
    add = parser.add_argument
    add("image", type=Path, help="image file")
    add("--annotations", type=Path, required=True, help="COCO JSON that has the image")
    add("--picture", type=Path, default=Path(f"{step}.png"), help="file to write")
    what_size = "the checkpoint's, else " if step == "pipeline" else ""
    add("--min-size", type=positive(int), help=f"shorter side, pixels ({what_size}800)")
    add("--max-size", type=positive(int), help=f"longer side at most, pixels ({what_size}1333)")
    if step == "pipeline":
        add("--checkpoint", help="also draw what this detector finds: a file or a weights' name")
    flags = parser.parse_args(argv)
    image, boxes, names = read_boxes(flags.image, flags.annotations)
    size = {"min_size": flags.min_size, "max_size": flags.max_size}
    size = {name: value for name, value in size.items() if value is not None}
    model: Any = None
    if step == "pipeline" and flags.checkpoint:  # both pictures show what this model sees
        model, label_map = load_detector(flags.checkpoint, **size)
        size = {"min_size": model.transform.min_size[0], "max_size": model.transform.max_size}
    scene = explain_pictures.make_scene(image, boxes, names, **size)
    flags.picture.parent.mkdir(parents=True, exist_ok=True)
    if step == "pipeline":
        figure = explain_pictures.draw_pipeline(image, boxes, scene)
    else:
        figure = getattr(explain_pictures, f"draw_{step}")(scene)
    figure.savefig(flags.picture)
    print(f"{len(boxes)} boxes, {len(scene.anchors):,} anchors: {flags.picture}")
    if model is not None:
        classes = {category["label"]: category["name"] for category in label_map}
        path = flags.picture.with_stem(f"{flags.picture.stem}_detections")
        explain_pictures.draw_detections(model, image, classes).savefig(path)
        print(f"from scores to detections: {path}")


DRAW: dict[str, Callable[[list[str]], None]] = {
    "batch": draw_batch,
    "anchor-fit": anchor_fit.main,
    **{step: functools.partial(draw_step, step) for step in STEPS},
}


def main(argv: list[str] | None = None) -> None:
    """Draw what the command line asks for: the name of a picture, then the picture's own flags."""
    argv = sys.argv[1:] if argv is None else argv
    usage = f"python -m tools.visualize {{{','.join(DRAW)}}} …"
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(f"{__doc__}\n{usage}\n\n--help after the name of a picture lists its flags.")
        return
    if argv[0] not in DRAW:
        raise UserError(f"{argv[0]!r} cannot be drawn; say what to draw: {usage}")
    DRAW[argv[0]](argv[1:])


if __name__ == "__main__":
    run_command(main)
