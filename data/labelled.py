"""What the readers of VOC and YOLO folders share: samples, splits and layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data import coco_arrays, image_files
from data.coco_rules import Findings
from data.files import OTHER_SUFFIXES, files_below
from data.image_files import SUFFIXES, ImageError

SPLITS = ("train", "val")
_OVER_BORDER = 0.01  # pixels that rounding may add to a box, without a warning


@dataclass
class Sample:
    """An image and its boxes: [x, y, w, h] in pixels of the image as EXIF turns it."""

    image: Path
    size: tuple[int, int]  # (H, W)
    boxes: list[list[float]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    is_crowd: list[bool] = field(default_factory=list)

    def add_box(
        self, corners: Sequence[float], name: str, crowd: bool, findings: Findings, where: str
    ) -> None:
        """Add a box (x1, y1, x2, y2), clipped to the image; `where` names it in a finding."""
        height, width = self.size
        limits = (width, height, width, height)
        clipped = [min(max(value, 0.0), end) for value, end in zip(corners, limits, strict=True)]
        x1, y1, x2, y2 = clipped
        if min(x2 - x1, y2 - y1) < coco_arrays.MIN_SIDE:
            findings.add("boxes outside of their image", where)
            return
        if max(abs(a - b) for a, b in zip(corners, clipped, strict=True)) > _OVER_BORDER:
            findings.add("boxes over the border of their image", where)
        self.boxes.append([x1, y1, x2 - x1, y2 - y1])
        self.classes.append(name)
        self.is_crowd.append(crowd)


@dataclass
class Split:
    """The files of one split: for YOLO `labels[i]` belongs to `images[i]`; VOC pairs by name."""

    root: Path  # image folder
    images: list[Path]
    labels: list[Path]
    findings: Findings
    is_listed: bool = False  # a list chooses among `images`


@dataclass
class Layout:
    """The content of a folder: splits "train" and "val", or only one."""

    splits: dict[str, Split]
    read: Callable[[Split], list[Sample]]
    names: list[str]  # of the classes in order; empty where the label files name them
    sources: list[Path] = field(default_factory=list)  # other files that the conversion depends on


def images_below(folder: Path, findings: Findings) -> list[Path]:
    """Return all images below a folder; report those of a format that is not read."""
    images = []
    for path in files_below(folder, *SUFFIXES, *OTHER_SUFFIXES):
        if path.suffix.lower() in SUFFIXES:
            images.append(path)
        else:
            findings.add("image files of another format", path)
    return images


def read_header(path: Path, findings: Findings) -> image_files.Header | None:
    """Read the header of an image; report an error, or a slow format."""
    try:
        header = image_files.read_header(path)
    except ImageError as error:
        findings.add(error.rule, path, f" {error}")
        return None
    if header.is_slow:
        findings.add("image files in a slow format", path)
    if header.is_animated:
        findings.add("image files that are animated", path)
    return header
