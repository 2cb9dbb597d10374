"""Look at what goes into training.

    python -m tools.visualize batch --data-path /coco --data-augmentation multiscale

draws batches as the model sees them: after augmentation, resizing and padding, with their boxes. It
takes the flags of train.py, so that one puts `tools.visualize batch` where `train.py` stood.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.io import write_jpeg

import coco_utils
import presets
import train
import utils
from model import build_model
from tools import drawing


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


def build_parser() -> argparse.ArgumentParser:
    """Declare the flags: those of train.py, and what is drawn."""
    parser = train.build_parser()
    add = parser.add_argument_group("picture").add_argument
    add("--picture", type=Path, default=Path("batch.jpg"), help="file to write")
    add("--batches", type=int, default=4, help="batches to draw, one per row")
    add("--epoch", type=int, default=0, help="the epoch to take them from")
    add("--side", type=int, default=480, help="longer side of an image in the picture, pixels")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Draw what the command line asks for."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] != ["batch"]:
        raise ValueError("say what to draw: python -m tools.visualize batch, with train.py's flags")
    flags = build_parser().parse_args(argv[1:])
    train.check_flags(flags)
    values = vars(flags)
    paths = train.data_paths(
        flags.dataset, flags.data_path, {name: values[name] for name in train.PATH_FLAGS}
    )
    (annotations,) = train.read_splits(paths, ["train"])
    label_map = coco_utils.label_categories(annotations.categories)
    transforms = presets.training_transforms(flags.data_augmentation)
    keep = None if flags.keep_empty else coco_utils.images_with_objects(annotations)
    data = coco_utils.CocoDetection(
        paths["train_images"], annotations, label_map, transforms, flags.seed, keep
    )
    processes = utils.Processes(torch.device("cpu"))
    order = {name: values[name] for name in train.ORDER_FLAGS}
    sampler, loader = train.training_data(data, processes, flags.accumulate_steps, **order)
    sampler.set_epoch(flags.epoch, 0)
    resize = flags.data_augmentation not in presets.RESIZING
    model_flags = {name: values[name] for name in train.MODEL_FLAGS}
    model = build_model(flags.model, label_map, resize, load=False, **model_flags).train()
    torch.manual_seed(utils.derive_seed(flags.seed, flags.epoch, 0))
    batches = list(itertools.islice(loader, flags.batches))
    picture = draw_batches(batches, model, label_map, flags.side)
    flags.picture.parent.mkdir(parents=True, exist_ok=True)
    write_jpeg(picture, str(flags.picture), quality=90)
    print(f"{len(batches)} batches of epoch {flags.epoch}, one per row: {flags.picture}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
