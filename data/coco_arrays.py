"""A COCO file as a handful of arrays, and arithmetic on its boxes.

Processes share the memory of the arrays; no Python object per annotation survives.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# A side below this many pixels may round to zero when the model resizes it, and log(0) is NaN.
MIN_SIDE = 1e-3


@dataclass(frozen=True)
class Annotations:
    """A COCO file as arrays: I images in file order, N annotations grouped by image.

    Attributes:
        path: the JSON file.
        image_ids: `[I]` int64.
        sizes: `[I, 2]` int32 (H, W), pixels; 0 where the file has none (`locate.locate_images`
            takes them from the images).
        names, name_offsets: uint8 text of all file names, and `[I + 1]` where each begins.
        offsets: `[I + 1]` int64; image i has the annotations offsets[i] to offsets[i + 1].
        ids: `[N]` int64 annotation ids; within an image in file order.
        boxes_xywh: `[N, 4]` float64 as in the file, pixels.
        area: `[N]` float64, square pixels (w * h where the file has none).
        iscrowd: `[N]` bool (False where the file has none).
        category_index: `[N]` int32 into `categories`.
        categories: (id, name), ascending by id.
        is_annotated: False if the file has no list of annotations, so that nothing can be scored.
        source: what messages call the file where the user did not write it.
    """

    path: Path
    image_ids: np.ndarray
    sizes: np.ndarray
    names: np.ndarray
    name_offsets: np.ndarray
    offsets: np.ndarray
    ids: np.ndarray
    boxes_xywh: np.ndarray
    area: np.ndarray
    iscrowd: np.ndarray
    category_index: np.ndarray
    categories: tuple[tuple[int, str], ...]
    is_annotated: bool = True
    source: str = ""

    @property
    def title(self) -> str:
        """What messages call the file."""
        return self.source or str(self.path)

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, image: int) -> str:
        """Return the file name of image number `image`, relative to the image folder."""
        start, end = self.name_offsets[image : image + 2]
        return self.names[start:end].tobytes().decode()

    def describe(self, image: int) -> str:
        """Return the id and the file name of image number `image`, for a finding."""
        return f"{self.image_ids[image]} {self.file_name(image)!r}"

    def image_of_annotation(self) -> np.ndarray:
        """Return `[N]` int64, the image number of each annotation."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def images_with_objects(self) -> np.ndarray:
        """Return the numbers of the images that training keeps without `--keep-empty`.

        Torchvision's rule, so that COCO gives the same 117,266 images: one annotation at least,
        crowds included, is wider and higher than one pixel.
        """
        width, height = self.boxes_xywh[:, 2:].T
        # Four times as fast as `all` over the axis.
        total = np.concatenate([[0], np.cumsum((width > 1) & (height > 1))])
        return np.flatnonzero(np.diff(total[self.offsets]))

    def classes_in_images(self, images: np.ndarray) -> np.ndarray:
        """Return `[P, 2]` int64 (position in `images`, category index), each pair once.

        Crowds do not count, because training leaves them out.

        Args:
            images: `[n]` numbers of images.
        """
        position = np.full(len(self), -1)
        position[images] = np.arange(len(images))
        of_row = position[self.image_of_annotation()]
        counts = (of_row >= 0) & ~self.iscrowd
        num_classes = max(1, len(self.categories))
        keys = np.unique(of_row[counts] * num_classes + self.category_index[counts])
        return np.stack(np.divmod(keys, num_classes), axis=1)

    def fingerprint(self) -> str:
        """Return a hash of all that training sees of the annotations."""
        content = hashlib.sha256(json.dumps(self.categories).encode())
        arrays = (self.image_ids, self.sizes, self.names, self.offsets, self.boxes_xywh)
        for array in (*arrays, self.category_index, self.iscrowd):
            content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()

    def summary(self, per_part: int | None = None) -> dict[str, Any]:
        """Return what `differences` needs to compare other annotations with these: 50 KB at most.

        Args:
            per_part: images that share a hash; by default so many that there are 1024 hashes.
        """
        per_part = per_part or max(1, math.ceil(len(self) / 1024))
        parts = []
        for start in range(0, len(self), per_part):
            end = min(start + per_part, len(self))
            images, rows = slice(start, end), slice(*self.offsets[[start, end]])
            content = hashlib.sha256()
            for array in (
                self.names[slice(*self.name_offsets[[start, end]])],
                self.image_ids[images],
                self.sizes[images],
                np.diff(self.offsets[start : end + 1]),
                self.boxes_xywh[rows],
                self.category_index[rows],
                self.iscrowd[rows],
            ):
                content.update(np.ascontiguousarray(array).data)
            parts.append(content.hexdigest()[:16])
        counts = np.bincount(self.category_index, minlength=len(self.categories)).tolist()
        return {
            "images": len(self),
            "boxes": len(self.ids),
            "classes": {name: n for (_, name), n in zip(self.categories, counts, strict=True)},
            "per_part": per_part,
            "parts": parts,
            "first_ids": self.image_ids[::per_part].tolist(),
        }


def differences(what: str, old: dict[str, Any] | None, annotations: Annotations) -> str:
    """Describe how annotations, called `what`, differ from a `summary`, None if unknown."""
    if old is None:
        return f"{what}: changed (this checkpoint does not remember how it was)"
    new = annotations.summary(old["per_part"])
    changes = [f"{n} {old[n]} → {new[n]}" for n in ("images", "boxes") if old[n] != new[n]]
    before, after = old["classes"], new["classes"]
    both = [name for name in before if name in after]
    for change, names in {
        "classes removed": [name for name in before if name not in after],
        "classes added": [name for name in after if name not in before],
        "boxes by class": [f"{n} {before[n]} → {after[n]}" for n in both if before[n] != after[n]],
    }.items():
        if names:
            changes.append(f"{change}: {_first_five(names)}")
    for part, (a, b) in enumerate(itertools.zip_longest(old["parts"], new["parts"])):
        if a != b:
            size = old["per_part"]
            where = "at" if size == 1 else f"within the {size} images that begin with"
            image_id = (new if a is None else old)["first_ids"][part]
            changes.append(f"the first difference is {where} image id {image_id}")
            break
    return f"{what}: {', '.join(changes or ['ids of classes changed'])}"


def _first_five(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - 5} more" if len(texts) > 5 else ""
    return ", ".join(texts[:5]) + more


def pack_names(names: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the `names` and `name_offsets` of `Annotations`."""
    offsets = np.cumsum([0, *map(len, names)], dtype=np.int64)
    return np.frombuffer(b"".join(names), dtype=np.uint8), offsets


def to_xyxy(boxes_xywh: np.ndarray) -> np.ndarray:
    """Convert `[n, 4]` float64 to float32, in torchvision's order of operations."""
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows lies outside in any case
        xywh = boxes_xywh.astype(np.float32)
        return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


def clip(boxes: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Clip `[n, 4]` xyxy boxes to `limit` (W, H), `[n, 2]` or `[2]`."""
    corners = [np.clip(boxes[:, :2], 0, limit), np.clip(boxes[:, 2:], 0, limit)]
    return np.concatenate(corners, axis=1)


def has_extent(boxes: np.ndarray) -> np.ndarray:
    """Return `[n]` bool: whether xyxy boxes are `MIN_SIDE` wide and high."""
    return (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)
