"""Look at what goes into training, and at how RetinaNet works on it.

    python -m tools.visualize batch --data-path /coco --data-augmentation multiscale

draws batches as the model sees them: after augmentation, resizing and padding, with their boxes.

    python -m tools.visualize anchor-fit --data-path mydata

prints how well RetinaNet's anchors cover the boxes, and which would do better.

    python -m tools.visualize assignment photo.jpg --dataset voc --data-path VOC2012
    python -m tools.visualize assignment street.jpg --annotations instances.json

draws one step of the method on an image and its boxes, as docs/retinanet.md explains it; `anchors`,
`coding`, `focal` and `pipeline` are the others. All take the flags of train.py, so that one writes
`tools.visualize batch` in place of `train.py`.
"""

from __future__ import annotations

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
import torchvision
from torch import Tensor, nn

import coco_utils
import presets
import utils
from data import coco_arrays, coco_json, image_files
from data.loading import make_loader
from data.splits import read_splits
from group_by_aspect_ratio import GroupedBatchSampler, groups_and_factors
from models.build import build_model, load_detector
from models.retinanet import make_anchor_generator
from runtime import options
from runtime.flags import ArgumentParser, non_negative, positive
from tools import anchor_fit
from tools.plots import drawing, method
from utils import UserError, run_command

STEPS = ("anchors", "assignment", "coding", "focal", "pipeline")


def draw_batches(
    batches: Sequence[tuple[list[Tensor], list[dict[str, Tensor]]]],
    model: nn.Module,
    data: coco_utils.CocoDetection,
    column: int,
) -> Tensor:
    """Draw batches, one per row, as the transform of `model` (in training mode) leaves them.

    Args:
        data: where the batches are from.
        column: width of an image in the picture, pixels.

    Returns:
        uint8 `[3, H, W]`; gray is padding.
    """
    transform: Any = model.transform
    names, ids = drawing.class_names(data.label_map), data.annotations.image_ids
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (transform.image_mean, transform.image_std)
    )
    tiles = []
    for images, targets in batches:
        batch, targets = transform([image / 255 for image in images], targets)
        for pixels, target in zip(batch.tensors, targets, strict=True):
            image = ((pixels * std + mean) * 255).round().clamp(0, 255).byte()
            labels = target["labels"].tolist()
            (number,) = np.flatnonzero(ids == int(target["image_id"]))
            caption = drawing.image_caption(data.annotations, int(number))
            texts = [names[label] for label in labels]
            size = f"{len(labels)} boxes, padded to {image.shape[2]} × {image.shape[1]}"
            boxes = target["boxes"].numpy()
            tiles.append(drawing.Tile(image, boxes, labels, texts, [caption, size]))
    colours = drawing.class_colours(data.label_map)
    return drawing.draw_sheet(tiles, colours, len(batches[0][0]), column)


def build_parser(step: str = "batch") -> ArgumentParser:
    """Declare the flags: those of train.py, and what is drawn."""
    parser = options.build_parser(f"Draw {step}. Flags are train.py's, and those of the picture.")
    add = parser.add_argument_group("picture").add_argument
    name = f"{step}.jpg" if step == "batch" else f"{step}.png"
    add("--picture", type=Path, default=Path(name), help="file to write, in --output-dir if given")
    if step == "batch":
        add("--batches", type=positive(int, 1000), default=4, help="batches to draw, one per row")
        add("--epoch", type=non_negative(int), default=0, help="the epoch to take them from")
        add(
            "--side",
            type=positive(int, at_most=20_000),
            default=480,
            help="width of an image in the picture, pixels",
        )
        return parser
    add("image", type=Path, help="image file of the data set")
    add("--annotations", type=Path, help="COCO JSON with the image, in place of the data's flags")
    if step == "pipeline":
        add("--checkpoint", help="draw what this detector finds, too: a file or a weights' name")
    return parser


def draw_batch(argv: list[str]) -> None:
    """Draw batches as the model sees them, by the flags of `build_parser`."""
    parser = build_parser()
    flags = parser.parse_args(argv)
    options.check_flags(flags)
    paths = anchor_fit.paths_of(flags)
    (annotations,) = read_splits(paths, ["train"])
    label_map, policy = coco_utils.label_categories(annotations.categories), flags.data_augmentation
    keep = coco_utils.trained_images(annotations, flags.keep_empty)
    transforms = presets.training_transforms(policy)
    folder = paths["train_images"]
    data = coco_utils.CocoDetection(folder, annotations, label_map, transforms, flags.seed, keep)
    groups, factors = groups_and_factors(
        data, policy, flags.aspect_ratio_group_factor, flags.repeat_threshold
    )
    sampler = GroupedBatchSampler(groups, flags.batch_size, flags.seed, factors=factors)
    sampler.set_epoch(flags.epoch, 0)
    loader = make_loader(data, sampler, flags.workers, torch.device("cpu"), keep=False)
    resize = flags.data_augmentation not in presets.RESIZING
    values = parser.values(flags, "model")
    model = build_model(flags.model, label_map, resize, load=False, **values).train()
    torch.manual_seed(utils.derive_seed(flags.seed, flags.epoch, 0))
    batches = list(itertools.islice(loader, flags.batches))
    picture = draw_batches(batches, model, data, flags.side)
    path = (flags.output_dir or Path()) / flags.picture
    drawing.write_picture(picture, path)
    print(f"{len(batches)} batches of epoch {flags.epoch}, one per row: {path}")


def read_boxes(
    image: Path, sources: Sequence[tuple[Path | None, coco_arrays.Annotations]]
) -> tuple[Tensor, Tensor, list[str]]:
    """Read an image, uint8 `[3, H, W]`, its boxes `[M, 4]` xyxy and the names of their classes.

    The annotations are looked up by the image's file name. Of several images of this name it is the
    one in the folder of its annotations, or the one with most of the path in common. Crowds are
    left out, as in training.

    Args:
        sources: annotations, each with its image folder if that is known.

    Raises:
        UserError: if the image cannot be read, or the annotations do not have it.
    """
    matches = []
    for folder, coco in sources:
        names = [coco.file_name(i) for i in range(len(coco))]
        numbers = [i for i, name in enumerate(names) if Path(name).name == image.name]
        matches += [(folder, coco, i, names[i]) for i in numbers]
    if len(matches) > 1:
        path = image.resolve()
        same = [m for m in matches if m[0] and (m[0] / m[3]).resolve() == path]
        matches = same or [m for m in matches if path.as_posix().endswith(f"/{m[3]}")]
    if len(matches) != 1:
        files = " and ".join(coco.title for _, coco in sources)
        how_many = "several images" if matches else "no image"
        raise UserError(f"{files}: {how_many} named {image.name}; give an image of this data")
    _, coco, number, _ = matches[0]
    height, width = coco.sizes[number].tolist()
    try:
        pixels = image_files.read_image(image, image.parent, (height, width))
    except image_files.ImageError as error:
        raise UserError(f"{image} {error}") from None
    rows = np.arange(*coco.offsets[number : number + 2])
    rows = rows[~coco.iscrowd[rows]]
    boxes = torch.from_numpy(coco_arrays.to_xyxy(coco.boxes_xywh[rows])).float()
    return pixels, boxes, [coco.categories[k][1] for k in coco.category_index[rows]]


def read_sources(flags: argparse.Namespace) -> list[tuple[Path | None, coco_arrays.Annotations]]:
    """Read `--annotations`, or else both splits of the data set as far as they exist."""
    if flags.annotations:
        return [(None, coco_json.read_annotations(flags.annotations)[0])]
    options.check_flags(flags)
    paths = anchor_fit.paths_of(flags)
    splits = [s for s in ("train", "val") if paths[f"{s}_annotations"].is_file()] or ["train"]
    folders = [paths[f"{split}_images"] for split in splits]
    return list(zip(folders, read_splits(paths, splits), strict=True))


def draw_step(step: str, argv: list[str]) -> None:
    """Draw one of `STEPS` on an image of the user's."""
    flags = build_parser(step).parse_args(argv)
    anchor_fit.require_retinanet(flags.model)
    image, boxes, names = read_boxes(flags.image, read_sources(flags))
    size = {"min_size": flags.min_size, "max_size": flags.max_size}
    size = {name: value for name, value in size.items() if value is not None}
    generator = make_anchor_generator(flags.anchor_sizes, flags.anchor_ratios)
    model: Any = None
    if step == "pipeline" and flags.checkpoint:  # both pictures show what this model sees
        model, label_map = load_detector(flags.checkpoint, **size)
        if not isinstance(model, torchvision.models.detection.RetinaNet):
            raise UserError(f"--checkpoint {flags.checkpoint}: holds no RetinaNet")
        size = {"min_size": model.transform.min_size[-1], "max_size": model.transform.max_size}
        generator = model.anchor_generator
    scene = method.make_scene(image, boxes, names, **size, generator=generator)
    if step == "pipeline":
        figure = method.draw_pipeline(image, boxes, scene)
    else:
        figure = getattr(method, f"draw_{step}")(scene)
    path = (flags.output_dir or Path()) / flags.picture
    drawing.save(figure, path)
    print(f"{len(boxes)} boxes, {len(scene.anchors):,} anchors: {path}")
    if model is not None:
        path = path.with_stem(f"{path.stem}_detections")
        drawing.save(method.draw_detections(model, image, label_map), path)
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
        raise UserError(f"{argv[0]!r} cannot be drawn; choose what to draw: {usage}")
    DRAW[argv[0]](argv[1:])


if __name__ == "__main__":
    run_command(main)
