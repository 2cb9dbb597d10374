"""The COCO data set as (image, target), and its label map.

`coco_json` reads the annotations; here an image and its boxes come together.

Source: the 91-label space and the rule for images without boxes are those of torchvision's
references/detection/coco_utils.py.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights
from torchvision.transforms import v2

from data.checks import require_boxes
from data.coco_arrays import Annotations, clip, has_extent, to_xyxy
from data.coco_rules import Finding, finding, require_no_errors
from data.image_files import ImageError, read_image
from data.splits import log_warnings
from utils import UserError, derive_seed, printable


def label_categories(categories: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    """Give every category its label, the class number that a model predicts; 0 is background.

    The official COCO categories keep torchvision's 91-label space (label = id), so its weights
    and ours interchange. Any other list gets the labels 1 … K in the order of its ids.

    Returns:
        The label map: `{"id", "name", "label"}` per category, ascending by id.
    """
    official = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    is_coco = list(categories) == [
        (i, name) for i, name in enumerate(official) if name not in ("__background__", "N/A")
    ]
    return [
        {"id": number, "name": name, "label": number if is_coco else position}
        for position, (number, name) in enumerate(categories, start=1)
    ]


def num_classes(label_map: Sequence[dict[str, Any]]) -> int:
    """Return the number of classes, background included, that a label map needs."""
    return max(category["label"] for category in label_map) + 1


def class_findings(
    label_map: Sequence[dict[str, Any]], annotations: Annotations, source: str = "training"
) -> list[Finding]:
    """Compare the classes of `annotations` by name with `label_map`, which comes from `source`.

    It is an error if `annotations` have a class that the label map does not have, or none of them.
    """
    ids = {category["name"]: category["id"] for category in label_map}
    names = {name: number for number, name in annotations.categories}
    extra, missing = sorted(names.keys() - ids), sorted(ids.keys() - names)
    if extra or not names:
        case = f"only here {extra[:10]}, only in {source} {missing[:10]}"
        return finding("splits that name different classes", [case])
    differs = [
        f"{name!r} is {names.get(name, 'missing')}, in training {number}"
        for name, number in ids.items()
        if names.get(name) != number
    ]
    return finding("classes of training that val lacks, or numbers otherwise", differs)


def match_classes(
    label_map: Sequence[dict[str, Any]], annotations: Annotations, source: str
) -> None:
    """Match the classes of `annotations` by name with `label_map`, and log where they differ.

    Args:
        source: where `label_map` comes from.

    Raises:
        UserError: if `annotations` have a class that the label map does not have, or none of them.
    """
    findings = class_findings(label_map, annotations, source)
    require_no_errors(annotations.title, findings)
    log_warnings(annotations, findings)


def trained_images(annotations: Annotations, keep_empty: bool) -> np.ndarray | None:
    """Return the numbers of the images with boxes; None, which is all, with `keep_empty`.

    Raises:
        UserError: if there is no box to train on.
    """
    if keep_empty:
        return None
    require_boxes(annotations)
    return annotations.images_with_objects()


@dataclass(frozen=True)
class Entry:
    """The annotations of one image, which are all that a loader worker gets.

    Attributes:
        size: (H, W), pixels.
        boxes_xywh, iscrowd, labels: `[n, 4]`, `[n]`, `[n]`, one row per annotation.
    """

    image_id: int
    file_name: str
    size: tuple[int, int]
    boxes_xywh: np.ndarray
    iscrowd: np.ndarray
    labels: np.ndarray


class CocoDetection(Dataset[tuple[torch.Tensor, dict[str, torch.Tensor]]]):
    """Images and boxes by (epoch, index): the same pair is the same sample in any worker.

    `index + k * len(self)` is the same image with other random numbers: its k-th copy of an epoch.

    Loader workers get no copy of the annotations, which may be gigabytes: `for_workers` and
    `with_entries` send them the entries of each batch.

    Args:
        root: image folder.
        annotations: of its images.
        label_map: as `label_categories` makes it; the names of `annotations` lead to labels.
        transforms: a `torchvision.transforms.v2` transform of (image, target), or None.
        seed: of the transforms' random numbers, with epoch and index.
        keep: `[n]` the image numbers that form the data set; None is all.
    """

    def __init__(
        self,
        root: Path,
        annotations: Annotations,
        label_map: Sequence[dict[str, Any]],
        transforms: v2.Transform | None = None,
        seed: int = 0,
        keep: np.ndarray | None = None,
    ) -> None:
        label_of = {category["name"]: category["label"] for category in label_map}
        self.labels = np.array([label_of[name] for _, name in annotations.categories], np.int64)
        self.root, self.annotations, self.label_map = root, annotations, label_map
        self.transforms, self.seed = transforms, seed
        self.keep = np.arange(len(annotations)) if keep is None else keep

    def __len__(self) -> int:
        return len(self.keep)

    def sizes(self) -> np.ndarray:
        """Return `[len(self), 2]` (H, W) of every image, pixels, without opening one."""
        return self.annotations.sizes[self.keep]

    def describe(self, image_id: int) -> str:
        """Return the file and the id of an image, for a message."""
        (number,) = np.flatnonzero(self.annotations.image_ids == image_id)
        return f"{self.root / self.annotations.file_name(int(number))} (id {image_id})"

    def entry(self, index: int) -> Entry:
        """Return the annotations of one image; `index + k * len(self)` is its k-th copy."""
        number, annotations = int(self.keep[index % len(self.keep)]), self.annotations
        rows = slice(*annotations.offsets[number : number + 2])
        height, width = annotations.sizes[number].tolist()
        return Entry(
            int(annotations.image_ids[number]),
            annotations.file_name(number),
            (height, width),
            annotations.boxes_xywh[rows],
            annotations.iscrowd[rows],
            self.labels[annotations.category_index[rows]],
        )

    def for_workers(self) -> CocoDetection:
        """Return a copy without annotations, which takes (epoch, index, entry)."""
        data = copy.copy(self)
        del data.annotations, data.keep
        return data

    def with_entries(self, batches: Collection[list[tuple[int, int]]]) -> WithEntries:
        """Return `batches` of (epoch, index) as what the copy of `for_workers` takes."""
        return WithEntries(self, batches)

    def __getitem__(
        self, key: tuple[int, int] | tuple[int, int, Entry]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the image, uint8 `[3, H, W]`, and its target.

        The target holds "boxes" `[n, 4]` float32 xyxy in pixels, clipped to the image, without
        crowds and boxes of no extent; "labels" `[n]` int64; "image_id" int64 scalar.

        Raises:
            ImageError: names the file and the image id.
        """
        epoch, index = key[:2]
        entry = key[2] if len(key) == 3 else self.entry(index)
        image = tv_tensors.Image(self._read_image(entry))
        target = self._target(entry)
        if self.transforms is not None:
            with torch.random.fork_rng(devices=[]):
                # Only the CPU's: `torch.manual_seed` takes as long as a fifth of decoding.
                torch.default_generator.manual_seed(derive_seed(self.seed, epoch, index))
                image, target = self.transforms(image, target)
        return image.as_subclass(torch.Tensor), {
            name: value.as_subclass(torch.Tensor) for name, value in target.items()
        }

    def _target(self, entry: Entry) -> dict[str, torch.Tensor]:
        limit = np.array(entry.size[::-1], dtype=np.float32)
        boxes = clip(to_xyxy(entry.boxes_xywh), limit)
        keep = ~entry.iscrowd & has_extent(boxes)
        box_format = tv_tensors.BoundingBoxFormat.XYXY
        return {
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(boxes[keep]), format=box_format, canvas_size=entry.size
            ),
            "labels": torch.from_numpy(entry.labels[keep]),
            "image_id": torch.tensor(entry.image_id),
        }

    def _read_image(self, entry: Entry) -> torch.Tensor:
        path = self.root / entry.file_name
        try:
            return read_image(path, self.root, entry.size)
        except ImageError as error:
            raise ImageError(
                f"image id {entry.image_id}, {printable(str(path))}: {error}; correct it or take "
                "it out of the annotations (python -m tools.check_data finds all such images)",
                error.rule,
            ) from None


class WithEntries:
    """Batches of (epoch, index, entry) from batches of (epoch, index)."""

    def __init__(self, data: CocoDetection, batches: Collection[list[tuple[int, int]]]) -> None:
        self.data, self.batches = data, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int, Entry]]]:
        for batch in self.batches:
            yield [(epoch, index, self.data.entry(index)) for epoch, index in batch]


def with_classes(
    annotations: Annotations, label_map: Sequence[dict[str, Any]] | None
) -> Annotations:
    """Return `annotations`, with the classes of a checkpoint if they name none.

    Raises:
        UserError: if the checkpoint names none either.
    """
    if annotations.categories:
        return annotations
    if not label_map:
        raise UserError(
            f"{annotations.title} has no categories; add them, or give by --resume a checkpoint of "
            "train.py, which knows its classes"
        )
    categories = sorted((category["id"], category["name"]) for category in label_map)
    return dataclasses.replace(annotations, categories=tuple(categories))
