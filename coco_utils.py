"""The COCO data set as (image, target), and its label map.

`coco_json` reads the annotations; here an image and its boxes come together.

Source: the 91-label space and the rule for images without boxes are those of torchvision's
references/detection/coco_utils.py.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights
from torchvision.transforms import v2

import coco_json
from coco_json import Annotations, Finding, read_annotations
from utils import LocalError, UserError, derive_seed

__all__ = [
    "Annotations",
    "CocoDetection",
    "Finding",
    "ImageError",
    "collate",
    "images_with_objects",
    "label_categories",
    "missing_images",
    "num_classes",
    "read_annotations",
    "read_image",
    "require_same_classes",
]

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
# EXIF orientations that swap the sides: which axes of the transposed image [3, H, W] to flip.
_FLIPS: dict[int, tuple[int, ...]] = {5: (), 6: (2,), 7: (1, 2), 8: (1,)}


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
        {"id": number, "name": name, "label": number if is_coco else place}
        for place, (number, name) in enumerate(categories, start=1)
    ]


def num_classes(label_map: Sequence[dict[str, Any]]) -> int:
    """Return the number of classes, background included, that a label map needs."""
    return max(category["label"] for category in label_map) + 1


def require_same_classes(
    label_map: Sequence[dict[str, Any]], annotations: Annotations, source: str
) -> None:
    """Raise UserError unless `annotations` have the classes of `label_map`, which `source` has."""
    expected = {category["name"] for category in label_map}
    given = {name for _, name in annotations.categories}
    if expected != given:
        raise UserError(
            f"{annotations.path} and {source} name different classes: only the former has "
            f"{sorted(given - expected)[:10]}, only the latter {sorted(expected - given)[:10]}; "
            "give data with the same classes"
        )


class ImageError(LocalError):
    """An image that cannot be read as its annotations say; `rule` is one of `coco_json.RULES`."""

    def __init__(self, message: str, rule: str = "") -> None:
        super().__init__(message)
        self.rule = rule


class CocoDetection(Dataset[tuple[torch.Tensor, dict[str, torch.Tensor]]]):
    """Images and boxes by (epoch, index): the same pair is the same sample in any worker.

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

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the image, uint8 `[3, H, W]`, and its target.

        The target holds "boxes" `[n, 4]` float32 xyxy in pixels, clipped to the image, without
        crowds and boxes of no extent; "labels" `[n]` int64; "image_id" int64 scalar.

        Raises:
            ImageError: names the file and the image id.
        """
        epoch, index = key
        number = int(self.keep[index])
        image = tv_tensors.Image(self._read_image(number))
        target = self._target(number)
        if self.transforms is not None:
            with torch.random.fork_rng(devices=[]):
                # Of the CPU alone: `torch.manual_seed` takes as long as a fifth of decoding.
                torch.default_generator.manual_seed(derive_seed(self.seed, epoch, index))
                image, target = self.transforms(image, target)
        return image.as_subclass(torch.Tensor), {
            name: value.as_subclass(torch.Tensor) for name, value in target.items()
        }

    def _target(self, number: int) -> dict[str, torch.Tensor]:
        start, end = self.annotations.offsets[number : number + 2]
        height, width = self.annotations.sizes[number].tolist()
        limit = np.array([width, height], dtype=np.float32)
        boxes = coco_json.clip(coco_json.to_xyxy(self.annotations.boxes_xywh[start:end]), limit)
        keep = ~self.annotations.iscrowd[start:end] & coco_json.has_extent(boxes)
        labels = self.labels[self.annotations.category_index[start:end]]
        box_format = tv_tensors.BoundingBoxFormat.XYXY
        return {
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(boxes[keep]), format=box_format, canvas_size=(height, width)
            ),
            "labels": torch.from_numpy(labels[keep]),
            "image_id": torch.tensor(self.annotations.image_ids[number]),
        }

    def _read_image(self, number: int) -> torch.Tensor:
        path = self.root / self.annotations.file_name(number)
        try:
            return read_image(path, self.root, tuple(self.annotations.sizes[number].tolist()))
        except ImageError as error:
            raise ImageError(
                f"image id {self.annotations.image_ids[number]}, {path}: {error}; correct it or "
                "take it out of the annotations (python -m tools.check_data finds all such images)",
                error.rule,
            ) from None


def read_image(path: Path, root: Path, size: tuple[int, int]) -> torch.Tensor:
    """Decode an image file to uint8 RGB, `[3, H, W]`.

    Alpha is dropped, gray repeated; a file that is turned by its EXIF orientation is turned where,
    and only where, `size` (H, W) says so. PNG is decoded by PIL, which takes 1.2 times as long:
    torchvision's decoder crashes the process on most damaged PNG files (0.29.1).

    Raises:
        ImageError: if it leaves `root`, is of another format than `IMAGE_FORMATS`, is damaged, has
            16 bits per channel, or has another size than the annotations say.
    """
    if not path.is_file():
        raise ImageError("is missing", "image files missing")
    if not os.path.realpath(path).startswith(os.path.join(os.path.realpath(root), "")):
        raise ImageError("lies outside", "image files outside of the image folder")
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        raise ImageError(reason, "image files that cannot be read") from None
    if not data:
        raise ImageError("is empty", "image files that are empty")
    try:
        header = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        turn = _check_header(header, data, size)
        if header.format == "PNG":
            image = torch.from_numpy(np.array(header.convert("RGB"))).permute(2, 0, 1)
        else:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image = decode_image(encoded, ImageReadMode.RGB)
    except ImageError:
        raise
    except UnidentifiedImageError:
        what = "image files that are no JPEG, PNG or WebP"
        raise ImageError("is no JPEG, PNG or WebP", what) from None
    except Image.DecompressionBombError as error:
        raise ImageError(str(error), "images over 89 megapixels") from None
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error ...
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).split("\n")[0])
        raise ImageError(f"is damaged: {reason}", "image files that are damaged") from None
    return image.transpose(1, 2).flip(_FLIPS[turn]) if turn else image


def _check_header(header: Image.Image, data: bytes, size: tuple[int, int]) -> int:
    """Check what can be before decoding; return the EXIF orientation to undo, or 0."""
    width, height = header.size
    if width * height > coco_json.MAX_PIXELS:
        raise ImageError(f"has {width} x {height} pixels", "images over 89 megapixels")
    if header.format == "PNG" and data[24] == 16:  # the bit depth, of each channel
        raise ImageError("has 16 bits per channel", "image files with 16 bits per channel")
    if header.format == "PNG" and b"IEND" not in data:
        raise ImageError("is truncated", "image files that are damaged")
    if (height, width) == size:
        return 0
    orientation = header.getexif().get(0x0112)
    if (width, height) == size and orientation in _FLIPS:
        return orientation
    raise ImageError(
        f"is {width} x {height}, the annotations say {size[1]} x {size[0]}",
        "image files of another size than annotated",
    )


def missing_images(annotations: Annotations, root: Path) -> list[Finding]:
    """Find images that are not files in `root`, by listing it instead of asking for each."""
    text, offsets = annotations.names.tobytes(), annotations.name_offsets.tolist()
    listed: dict[bytes, set[bytes]] = {}
    missing = []
    for number, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        folder, _, name = text[start:end].rpartition(b"/")
        if folder not in listed:
            path = os.path.join(os.fsencode(root), folder)
            entries = os.scandir(path) if os.path.isdir(path) else ()
            listed[folder] = {entry.name for entry in entries if entry.is_file()}
        if name not in listed[folder]:
            missing.append(number)
    return coco_json.finding(
        "image files missing",
        missing,
        lambda number: f"{annotations.image_ids[number]} {root / annotations.file_name(number)}",
    )


def images_with_objects(annotations: Annotations) -> np.ndarray:
    """Return the numbers of the images that training keeps without `--keep-empty`.

    Torchvision's rule, so that COCO gives the same 117,266 images: one annotation at least, crowds
    included, is wider and higher than one pixel.
    """
    width, height = annotations.boxes_xywh[:, 2:].T
    total = np.concatenate([[0], np.cumsum((width > 1) & (height > 1))])
    return np.flatnonzero(np.diff(total[annotations.offsets]))


class _Batch(tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]):
    """Images and targets; from a worker the targets travel by value.

    PyTorch sends each tensor as a file descriptor, which takes longer than a target's few bytes.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        images, targets = self
        values = [{name: value.numpy() for name, value in target.items()} for target in targets]
        return _received, (images, values)


def _received(images: list[torch.Tensor], values: list[dict[str, np.ndarray]]) -> _Batch:
    targets = [{name: torch.from_numpy(v) for name, v in target.items()} for target in values]
    return _Batch((images, targets))


def collate(
    samples: list[tuple[torch.Tensor, dict[str, torch.Tensor]]],
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Make a batch: images of different sizes stay a list."""
    images, targets = zip(*samples, strict=True)
    return _Batch((list(images), list(targets)))
