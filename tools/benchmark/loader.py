"""Images per second of the loader, against torchvision's parts and against bare JPEG decoding.

torchvision's side is what references/detection runs for RetinaNet too: PIL, polygons to masks by
pycocotools, float images. Both sides flip at random; bare decoding reads the same files in order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

import coco_utils
import presets
import utils
from data import cache as data_cache
from data import coco_arrays, coco_json, shapes
from data.loading import make_loader
from data.worker_processes import ignore_stop_signals
from group_by_aspect_ratio import GroupedBatchSampler, aspect_ratio_groups
from runtime.flags import non_negative, positive
from tools.benchmark import measuring
from tools.benchmark.measuring import Row

BATCH_SIZE = 2  # the recipe's


def add_flags(add: Callable[..., Any]) -> None:
    """Declare the flags of `run`."""
    add("--data-path", type=Path, help="COCO folder; default: the embedded shapes")
    add(
        "--workers",
        type=non_negative(int),
        nargs="+",
        default=[0, 2],
        help="numbers of loader processes",
    )
    add("--repeats", type=positive(int), default=5, help="epochs of either side")
    add("--max-images", type=positive(int), help="of an epoch; default: all")


def run(
    data_path: Path | None, workers: Sequence[int], repeats: int, max_images: int | None
) -> list[Row]:
    """Measure; the flags are those of `add_flags`."""
    with utils.file_errors("draw the data set in", "the cache"):
        folder = data_path or shapes.make_shapes(data_cache.folder())
    images = folder / "train2017"
    path = folder / "annotations" / "instances_train2017.json"
    annotations, _ = coco_json.read_annotations(path)
    keep = np.arange(len(annotations))[:max_images]
    rows = []
    torch.set_num_threads(1)  # as in a worker: several only get in each other's way
    for count in workers:
        ours = _ours(annotations, images, keep, count)
        theirs = _torchvision(path, images, annotations.image_ids[keep], count)
        sides: list[Callable[[], None]] = [_epoch(ours, len(keep)), _epoch(theirs, len(keep))]
        if count == 0:
            sides.append(lambda: _decode(annotations, images, keep))
        for side in sides:  # starts workers, fills the file cache
            side()
        speeds = measuring.in_turn(sides, repeats, rate=len(keep))
        unit, name = "images/s", f"loader, {count} workers"
        rows.append(Row(name, unit, speeds[0], speeds[1], more_is_better=True, budget=6))
        if count == 0:
            name += ", against bare decode_image"
            rows.append(Row(name, unit, speeds[0], speeds[2], more_is_better=True, budget=1 / 1.5))
    return rows


def _epoch(loader: Iterable[Any], expected: int) -> Callable[[], None]:
    def load() -> None:
        seen = sum(len(images) for images, _ in loader)
        assert seen == expected, f"{seen} images of {expected}"

    return load


def _decode(annotations: coco_arrays.Annotations, images: Path, keep: np.ndarray) -> None:
    for number in keep.tolist():
        decode_image(str(images / annotations.file_name(number)), ImageReadMode.RGB)


def _ours(
    annotations: coco_arrays.Annotations, images: Path, keep: np.ndarray, workers: int
) -> DataLoader:
    """Build the loader of `train.py`, with the recipe's augmentation."""
    data = coco_utils.CocoDetection(
        images,
        annotations,
        coco_utils.label_categories(annotations.categories),
        presets.training_transforms("hflip"),
        keep=keep,
    )
    sampler = GroupedBatchSampler(aspect_ratio_groups(data.sizes(), 3), BATCH_SIZE, 0)
    return make_loader(data, sampler, workers, torch.device("cpu"), keep=True)


class TorchvisionSamples(Dataset[Any]):
    """Samples as the reference scripts make them: float image, boxes, masks, and the rest."""

    def __init__(self, path: Path, images: Path, image_ids: np.ndarray) -> None:
        with contextlib.redirect_stdout(None):
            self.data = torchvision.datasets.CocoDetection(str(images), str(path))
        wanted = set(image_ids.tolist())
        self.keep = [i for i, image_id in enumerate(self.data.ids) if image_id in wanted]

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        image, rows = self.data[self.keep[index]]
        rows = [row for row in rows if row["iscrowd"] == 0]
        boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, image.width)
        boxes[:, 1::2].clamp_(0, image.height)
        masks = _masks([row["segmentation"] for row in rows], image.height, image.width)
        keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
        target = {
            "boxes": boxes[keep],
            "labels": torch.tensor([row["category_id"] for row in rows])[keep],
            "masks": masks[keep],
            "image_id": self.data.ids[self.keep[index]],
            "area": torch.tensor([row["area"] for row in rows])[keep],
            "iscrowd": torch.tensor([row["iscrowd"] for row in rows])[keep],
        }
        if torch.rand(1) < 0.5:
            image = F.horizontal_flip(image)
            target["boxes"][:, [0, 2]] = image.width - target["boxes"][:, [2, 0]]
            target["masks"] = target["masks"].flip(-1)
        return F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True), target


def _masks(outlines: list[list[list[float]]], height: int, width: int) -> torch.Tensor:
    """Return `[n, H, W]` uint8, 1 within the polygons of an object."""
    masks = [
        torch.from_numpy(coco_mask.decode(coco_mask.frPyObjects(polygons, height, width))).any(2)
        for polygons in outlines
    ]
    return (
        torch.stack(masks).byte() if masks else torch.zeros((0, height, width), dtype=torch.uint8)
    )


def _torchvision(path: Path, images: Path, image_ids: np.ndarray, workers: int) -> DataLoader:
    return DataLoader(
        TorchvisionSamples(path, images, image_ids),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=workers,
        collate_fn=_transposed,
        worker_init_fn=ignore_stop_signals,
        persistent_workers=workers > 0,  # theirs start again each epoch, which is not measured
        multiprocessing_context="fork" if workers else None,
    )


def _transposed(samples: list[Any]) -> tuple[Any, ...]:
    return tuple(zip(*samples, strict=True))
