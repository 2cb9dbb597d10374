"""Every rule on data, and the findings by it: one line with the count, the cases and the fix.

What has one meaning is used, and a warning counts it. What is ambiguous, or would lose something,
is an error. A new rule is a row here and in docs/data.md, and a test.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils import UserError, printable

MAX_PIXELS = 89_478_485  # Pillow's limit against decompression bombs: 2**30 / 4 / 3
LINE = 200  # characters of a finding at most

# Rules that stop a run, each with the fix.
_ERRORS = {
    "annotation file that is not UTF-8": "convert it: iconv -f ENCODING -t UTF-8 FILE > NEW",
    "annotation file that is not JSON, or cut short": "correct it there, or export again",
    "annotation file that is not COCO's": "see https://cocodataset.org/#format-data",
    "lists that occur twice": "join the two: readers keep only the last",
    "no list of annotations": "add it, or detect only: train.py --test-only --save-detections",
    "no images": "add them",
    "no categories": "add them",
    "bbox with numbers written as text": "write the numbers without quotes",
    "image ids that occur twice": "make them unique",
    "annotation ids that occur twice": "make them unique",
    "category ids that occur twice": "make them unique",
    "category names that occur twice": "make them unique",
    "category names that are empty": "name them",
    "ids shifted by one": "number both alike",
    "annotations that all are of an unknown image_id": "use the ids of the images",
    "annotations of an unknown category_id": "remove them, or add the category",
    "iscrowd that is not 0 or 1": "correct it",
    "width or height not positive": "give the image's size in pixels",
    "width and height that are swapped": "swap them",
    "images over 89 megapixels": "make them smaller",
    "images that resizing makes 0 pixels wide or high": "crop them, or take them out",
    "boxes that look like shares of the image": "multiply x, w by the width, y, h by the height",
    "no box to train on": "correct the boxes; or, if images without boxes are meant, --keep-empty",
    "file_name not below the image folder": "make it relative, without '..', NUL or drive",
    "image files missing": "add them, or take them out of the annotations",
    "image files that cannot be read": "check the permissions, or the disk",
    "image files that are damaged": "copy them again, or take them out",
    "image files of another format": "convert them: magick FILE NEW.png",
    "image files of another size than annotated": "correct width and height",
    "image files with 16 bits per channel": "convert them to 8 bits: magick FILE -depth 8 NEW.png",
    "image files with too many scans": "write them again: magick FILE NEW.jpg",
    "image files that crash their decoder": "write them again, or take them out",
    "splits that name different classes": "give both the same categories",
}
# Rules that let a run go on, each with what is done about a case.
_WARNINGS = {
    "annotation file with a byte order mark": "skipped",
    "annotations that cannot be cached": "read again at every start",
    "numbers written as 1.0 or as text": "read as whole numbers",
    "annotations without an id of their own": "all are numbered by position",
    "annotations with the id 0": "gets another id to evaluate: pycocotools loses 0",
    "annotations of an unknown image_id": "left out, as where a subset was cut",
    "annotations without iscrowd": "taken as 0",
    "annotations without area": "taken as w * h",
    "unused categories with the name of another": "left out",
    "categories that differ in case or blanks only": "kept as classes",
    "categories named background": "kept as classes; remove them: the model has its own background",
    "categories without boxes": "kept as classes",
    "images without width or height": "taken from the image as viewers show it",
    "images that share a file": "join them: of one entry, the boxes of the others are background",
    "boxes without width or height in their image": "not trained on",
    "boxes partly outside of their image": "clipped to train",
    "boxes that look like x1 y1 x2 y2": "are they? look: check_data --plot",
    "boxes that occur twice in an image": "all are used: delete the copies",
    "no box to evaluate with": "AP will be -1",
    "file names in another spelling": "the matching files are used",
    "image files in a slow format": "read by PIL; JPEG and PNG are faster",
    "image files that are animated": "the first frame is read",
    "image files turned by EXIF, which their size cannot confirm": "turned as viewers show them; "
    "look at them with tools.visualize batch",
    "image files with stray bytes": "decoded all the same",
    "image files with an alpha channel": "alpha is dropped",
    "classes of training that val lacks, or numbers otherwise": "matched by name",
    "images that are in train and val": "take them out of one: scores on them mislead",
}
# The same on VOC and YOLO folders.
_FOLDER_ERRORS = {
    "images that a list names and that are missing": "add them, or correct the list",
    "XML files that a list names and that are missing": "add them, or correct the list",
    "list lines that name several images": "write one name a line",
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
_FOLDER_WARNINGS = {
    "images that a list names twice": "used once",
    "boxes over the border of their image": "clipped",
    "boxes outside of their image": "left out",
    "boxes whose x and y look like a corner": "read as the centre; look: check_data --plot",
    "XML files whose <filename> names another image": "paired by the file's name",
    "XML files paired by <filename>": "no image has the file's name",
    "XML files without a size": "taken from the image as viewers show it",
    "<difficult> that is neither 0 nor 1": "taken as 0",
    "images without an XML file": "left out",
    "list lines with 1, 0 or -1 of one class": "all images are used, for all classes",
    "no lists train and val": "others are used",
    "a single VOC folder below": "it is used",
    "paths in the YAML file that are not here": "read relative to the YAML file",
    "paths with a backslash": "read as /",
    "class lists that differ from the one used": "are they of other data?",
    "no val in the YAML file": "validation, valid or test is used",
    "images without a label file": "used as images without objects",
    "label files without an image": "not used",
    "polygons": "their extent is the box",
    "label lines with a confidence": "used without it",
    "label lines with keypoints": "used without them",
    "label lines without width or height": "left out",
    "label lines that occur twice in a file": "used once",
    "objects that occur twice in a file": "used once",
}
# What can be wrong with data: severity, and the fix, or what is done about it.
FOLDER_RULES = {what: ("error", fix) for what, fix in _FOLDER_ERRORS.items()} | {
    what: ("warning", rule) for what, rule in _FOLDER_WARNINGS.items()
}
RULES = {what: ("error", fix) for what, fix in _ERRORS.items()} | {
    what: ("warning", rule) for what, rule in _WARNINGS.items()
}
RULES |= FOLDER_RULES
# What a file of images to be submitted, such as COCO's image_info_test-dev2017.json, may lack.
UNANNOTATED = ("no list of annotations", "no categories")

# Empty, absolute (also as Windows writes it), with ".." between separators, or with NUL.
_UNSAFE_NAME = re.compile(r"\A\Z|\A[/\\]|\A[a-zA-Z]:[/\\]|(\A|[/\\])\.\.([/\\]|\Z)|\0")


@dataclass(frozen=True)
class Finding:
    """All cases of one thing wrong with a data set: the first ten, the count, the fix or rule."""

    severity: str  # "error" or "warning"
    what: str
    cases: tuple[str, ...]
    count: int
    fix: str

    def __str__(self) -> str:
        """Return one line of at most `LINE` characters, with the count and the fix."""
        head = ("warning: " if self.severity == "warning" else "") + self.what
        head += f" ({self.count:,}): " if self.count > 1 else ": "
        room = LINE - len(head) - len(f" ({self.fix})")
        for shown in range(len(self.cases), 0, -1):
            more = ", …" if self.count > shown else ""
            cases = ", ".join(map(one_line, self.cases[:shown])) + more
            if len(cases) <= room:
                break
        else:
            cases = one_line(self.cases[0], max(20, room - len(more))) + more
        return f"{head}{cases} ({self.fix})"


def one_line(text: str, length: int = LINE) -> str:
    """Return `text` as one line of printable characters, its middle cut if it is too long."""
    text = printable(text)
    if len(text) <= length:
        return text
    end = (length - 1) * 2 // 3  # the end of a path tells more than its start
    return text[: length - 1 - end] + "…" + text[-end:]


def finding(
    what: str, cases: Sequence[Any] | np.ndarray, show: Callable[[Any], str] = str, fix: str = ""
) -> list[Finding]:
    """Return one `Finding` over `cases` of the rule `what`, or none where there are no cases.

    Args:
        what: a key of `RULES`; any other is an error to be corrected.
        cases: a list or array, or `[n]` bool that says of each number whether it is a case.
        show: what to print of a case.
        fix: replaces that of the rule.
    """
    if isinstance(cases, np.ndarray) and cases.dtype == bool:
        cases = np.flatnonzero(cases)
    if len(cases) == 0:
        return []
    severity, usual_fix = RULES.get(what, ("error", "correct it"))
    return [Finding(severity, what, tuple(map(show, cases[:10])), len(cases), fix or usual_fix)]


@dataclass
class Findings:
    """Cases by rule, as they come in; paths are shown relative to `base`."""

    base: Path = Path()
    cases: dict[str, list[str]] = field(default_factory=dict)

    def add(self, rule: str, case: Path | str, detail: str = "") -> None:
        """Add `case` + `detail` to a rule."""
        text = os.fspath(case).removeprefix(os.path.join(self.base, ""))
        self.cases.setdefault(rule, []).append(text + detail)

    def as_list(self) -> list[Finding]:
        """Return one finding per rule."""
        return [each for rule, cases in self.cases.items() for each in finding(rule, cases)]


def is_unsafe_name(name: str) -> bool:
    """Return whether a file name is empty or leads out of the image folder."""
    return _UNSAFE_NAME.search(name) is not None


def require_no_errors(source: Path | str, findings: Sequence[Finding]) -> None:
    """Raise UserError that lists all errors among `findings` on `source`, each once, if any."""
    errors = dict.fromkeys(str(finding) for finding in findings if finding.severity == "error")
    if errors:
        raise UserError("\n  ".join([f"{source} cannot be used", *errors]))
