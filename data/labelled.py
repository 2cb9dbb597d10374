"""What the readers of VOC and YOLO folders share: samples, splits, and the rules on them.

What is unambiguous is used, and a warning counts it. What is ambiguous, or would lose boxes, is
refused; all errors are listed at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data import coco_arrays, coco_rules, image_files
from data.coco_rules import Finding
from data.files import OTHER_SUFFIXES, files_below
from data.image_files import SUFFIXES, ImageError

SPLITS = ("train", "val")
# What may be wrong with such a folder, and the fix.
_ERRORS = {
    "images that a list names and that are missing": "add them, or correct the list",
    "XML files that a list names and that are missing": "add them, or correct the list",
    "XML files that cannot be read": "correct them, or export them again",
    "XML files that are not in the encoding they declare": "save them in it, or declare theirs",
    "XML files without an image": "add the image, or take the file out",
    "XML files with several images of their name": "rename the images",
    "images with several XML files": "keep one of them",
    "images of another size than in their XML": "correct <size>, and the boxes if they follow it",
    "objects that cannot be read": "correct them, or take them out",
    "images that share a label file": "rename them",
    "label files that cannot be read": "write them again, or take them out",
    "label lines that cannot be read": "write: class x y w h",
    "label lines of an unknown class": "classes count from 0, in the order of names",
    "boxes that are not shares of their image": "pixels? divide them by its width and height",
}
# What is odd and has one meaning, and how it is read.
_WARNINGS = {
    "images that a list names twice": "used once",
    "boxes over the border of their image": "clipped",
    "boxes outside of their image": "left out",
    "XML files of which <filename> names another image": "paired by the file's name",
    "XML files paired by <filename>": "no image has the file's name",
    "XML files without a size": "taken from the image as viewers show it",
    "<difficult> that is neither 0 nor 1": "taken as 0",
    "images without an XML file": "left out",
    "list lines with 1, 0 or -1 of one class": "all images are used, for all classes",
    "no lists train and val": "others are used",
    "a single VOC folder below": "it is used",
    "paths in the YAML file that are not here": "read relative to the YAML file",
    "paths with a backslash": "read as /",
    "no val in the YAML file": "validation, valid or test is used",
    "images without a label file": "used as images without objects",
    "label files without an image": "not used",
    "polygons": "their extent is the box",
    "label lines with a confidence": "used without it",
    "label lines with keypoints": "used without them",
    "label lines without width or height": "left out",
    "label lines that occur twice in a file": "used once",
}
RULES = {
    **{rule: ("error", fix) for rule, fix in _ERRORS.items()},
    **{rule: ("warning", fix) for rule, fix in _WARNINGS.items()},
}
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
class Findings:
    """Cases by rule; paths are shown relative to `base`."""

    base: Path
    cases: dict[str, list[str]] = field(default_factory=dict)

    def add(self, rule: str, path: Path | str, detail: str = "") -> None:
        """Add the case `path` + `detail` to a rule of `RULES`, here or in `coco_json`."""
        text = os.fspath(path).removeprefix(os.path.join(self.base, ""))
        self.cases.setdefault(rule, []).append(text + detail)

    def as_list(self) -> list[Finding]:
        """Return one finding per rule."""
        return [
            Finding(severity, rule, tuple(self.cases[rule][:10]), len(self.cases[rule]), fix)
            for rule, (severity, fix) in (coco_rules.RULES | RULES).items()
            if rule in self.cases
        ]


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
