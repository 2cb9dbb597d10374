"""Finds the file of every image, and what is wrong with a split or with two together.

Names are matched with the files that are there. Missing sizes come from the images.
"""

from __future__ import annotations

import dataclasses
import os
import urllib.parse
from collections import Counter
from pathlib import Path

import numpy as np

from data import coco_json
from data.coco_json import Annotations, Finding
from data.image_files import ImageError, read_header


def locate_images(annotations: Annotations, root: Path) -> tuple[Annotations, list[Finding]]:
    """Find the file of every image in `root`, and the size of every image that has none annotated.

    The folder is listed, instead of asking for each file. A name that is no file is tried with
    other spellings, as `_spellings` makes them.

    Returns:
        The annotations with the names of the files and all sizes, and what was found.
    """
    listed = _Listing(root)
    folders = listed.folders
    offsets, text = annotations.name_offsets.tolist(), annotations.names.tobytes()
    changed: dict[int, bytes] = {}
    cases: dict[str, list[int]] = {rule: [] for rule in _SPELLINGS}
    missing = []
    for number, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        folder, _, last = text[start:end].rpartition(b"/")
        if folder not in folders:
            listed.files(folder)
        if last in folders[folder]:
            continue
        spelling = _find_spelling(text[start:end], root, listed)
        if spelling is None:
            missing.append(number)
            continue
        rules, changed[number] = spelling
        for rule in rules:
            cases[rule].append(number)

    def named(number: int) -> str:
        was = f"{annotations.image_ids[number]} {annotations.file_name(number)!r}"
        return f"{was} is {changed[number].decode()!r}"

    found = [f for rule, numbers in cases.items() for f in coco_json.finding(rule, numbers, named)]
    found += coco_json.finding(
        "image files missing",
        [n for n in missing if not coco_json.is_unsafe_name(annotations.file_name(n))],
        lambda number: f"{annotations.image_ids[number]} {root / annotations.file_name(number)}",
    )
    if changed:
        before = [text[start:end] for start, end in zip(offsets, offsets[1:], strict=False)]
        names = [changed.get(number, name) for number, name in enumerate(before)]
        count, had = Counter(names), Counter(before)
        shared = {names[i].decode() for i in changed if count[names[i]] > had[before[i]]}
        found += coco_json.finding("images that share a file", sorted(shared), repr)
        annotations = dataclasses.replace(
            annotations,
            names=np.frombuffer(b"".join(names), dtype=np.uint8),
            name_offsets=np.cumsum([0, *map(len, names)], dtype=np.int64),
        )
    is_there = np.ones(len(annotations), bool)
    is_there[missing] = False
    return _find_sizes(annotations, root, is_there, found)


class _Listing:
    """The files below a folder; each folder is listed once."""

    def __init__(self, root: Path) -> None:
        self.root, self.folders = os.fsencode(root), dict[bytes, dict[bytes, None]]()

    def files(self, folder: bytes) -> dict[bytes, None]:
        if folder not in self.folders:
            path = os.path.join(self.root, folder)
            entries = os.scandir(path) if b"\0" not in path and os.path.isdir(path) else ()
            self.folders[folder] = dict.fromkeys(entry.name for entry in entries if entry.is_file())
        return self.folders[folder]

    def __contains__(self, name: bytes) -> bool:
        folder, _, name = name.rpartition(b"/")
        return name in self.files(folder)


def _slashes(name: str, root: Path) -> str:
    return name.replace("\\", "/")


def _decoded(name: str, root: Path) -> str:
    return urllib.parse.unquote(name, errors="surrogateescape")


def _without_folder(name: str, root: Path) -> str:
    """Leave out the folders with which `root` ends, the most that fit."""
    parts, last = name.split("/"), Path(os.path.abspath(root)).parts
    counts = [n for n in range(len(parts) - 1, 0, -1) if tuple(parts[:n]) == last[-n:]]
    return "/".join(parts[counts[0] :]) if counts else name


# Other ways to read a name, in the order in which they are tried; later ones after earlier ones.
_SPELLINGS = {
    "file names with a backslash": _slashes,
    "file names that are URL-encoded": _decoded,
    "file names that repeat the image folder": _without_folder,
    "file names with a suffix in another case": None,
}


def _find_spelling(name: bytes, root: Path, listed: _Listing) -> tuple[list[str], bytes] | None:
    """Return the rules by which a file is found for `name`, and its name, or None."""
    ways: list[tuple[list[str], str]] = [([], name.decode())]
    for rule, spell in _SPELLINGS.items():
        for rules, known in list(ways):
            if spell is None:
                spelled = _other_suffix(known, listed)
            else:
                spelled = spell(known, root)
            if spelled == known or coco_json.is_unsafe_name(spelled):
                continue
            encoded = os.fsencode(spelled)
            if encoded in listed:
                return [*rules, rule], encoded
            ways.append(([*rules, rule], spelled))
    return None


def _other_suffix(name: str, listed: _Listing) -> str:
    """Return the one file that differs from `name` in the case of its suffix only, else `name`."""
    folder, slash, last = os.fsencode(name).rpartition(b"/")
    stem, dot, suffix = last.rpartition(b".")
    found = [
        other
        for other in listed.files(folder)
        if other.rpartition(b".")[:2] == (stem, dot)
        and other[len(stem) :].lower() == b"." + suffix.lower()
    ]
    return os.fsdecode(folder + slash + found[0]) if len(found) == 1 else name


LOOKED_AT = 32  # images of each split whose headers are read at the start


def _find_sizes(
    annotations: Annotations, root: Path, is_there: np.ndarray, found: list[Finding]
) -> tuple[Annotations, list[Finding]]:
    """Take unknown sizes from the images, and see whether width and height are swapped."""
    sizes = annotations.sizes
    unknown = np.flatnonzero((sizes == 0).any(axis=1))
    if len(unknown):
        sizes = sizes.copy()
        lost = []
        for number in unknown[is_there[unknown]]:
            try:
                sizes[number] = read_header(root / annotations.file_name(number)).shown
            except ImageError as error:
                name = annotations.file_name(number)
                lost.append(f"{annotations.image_ids[number]} {name!r}: {error}")
        found = found + coco_json.finding("width or height not positive", lost)
        annotations = dataclasses.replace(annotations, sizes=sizes)
        if not (sizes == 0).any():
            found += coco_json.check_boxes(annotations)
        return annotations, found
    numbers = np.flatnonzero(is_there)
    numbers = numbers[np.linspace(0, len(numbers) - 1, min(LOOKED_AT, len(numbers))).astype(int)]
    swapped = 0
    for number in numbers.tolist():
        try:
            header = read_header(root / annotations.file_name(number))
        except ImageError:  # reported when the image is opened, by a rule of its own
            return annotations, found
        (height, width), is_turned = header.stored, header.orientation >= 5
        if is_turned or height != width:
            # An image that EXIF turns may be annotated either way.
            if is_turned or sizes[number].tolist() != [width, height]:
                return annotations, found
            swapped += 1
    if swapped:
        case = f"in all {swapped} images looked at" if swapped > 1 else "in the image looked at"
        found = found + coco_json.finding("width and height that are swapped", [case])
    return annotations, found


def overlap_findings(
    train: tuple[Annotations, Path], val: tuple[Annotations, Path]
) -> list[Finding]:
    """Find images that are in both splits, each of which is (annotations, image folder)."""
    if os.path.samefile(train[0].path, val[0].path):
        what = "annotation file that is both train and val"
        return coco_json.finding(what, [str(val[0].path)])
    if not os.path.samefile(train[1], val[1]):
        return []
    names = [{a.file_name(i) for i in range(len(a))} for a, _ in (train, val)]
    return coco_json.finding("images that are in train and val", sorted(names[0] & names[1]), repr)


def boxes_findings(annotations: Annotations, for_training: bool) -> list[Finding]:
    """Say why there is no box to train on (or to evaluate with), if there is none."""
    is_box = ~annotations.iscrowd
    if not for_training and is_box.any():
        return []
    is_thin = is_box & ~(annotations.boxes_xywh[:, 2:] > 1).all(axis=1)
    limit = annotations.sizes[annotations.image_of_annotation(), ::-1].astype(np.float32)
    boxes = coco_json.clip(coco_json.to_xyxy(annotations.boxes_xywh), limit)
    is_outside = is_box & ~is_thin & ~coco_json.has_extent(boxes)
    if for_training and (is_box & ~is_thin & ~is_outside).any():
        return []
    counts = {
        "crowds": annotations.iscrowd,
        "outside of their image": is_outside,
        "thinner than a pixel (are they shares of the image?)": is_thin,
    }
    reasons = [f"{cases.sum():,} are {what}" for what, cases in counts.items() if cases.any()]
    of_all = f" of {len(is_box):,} boxes are "
    reason = ", ".join(reasons).replace(" are ", of_all, 1) if reasons else "no annotations"
    what = "no box to train on" if for_training else "no box to evaluate with"
    return coco_json.finding(what, [reason])


def require_boxes(annotations: Annotations) -> None:
    """Raise UserError, with the reason, if there is no box to train on."""
    coco_json.require_no_errors(annotations.path, boxes_findings(annotations, for_training=True))


def images_with_objects(annotations: Annotations) -> np.ndarray:
    """Return the numbers of the images that training keeps without `--keep-empty`.

    Torchvision's rule, so that COCO gives the same 117,266 images: one annotation at least, crowds
    included, is wider and higher than one pixel.
    """
    width, height = annotations.boxes_xywh[:, 2:].T
    total = np.concatenate([[0], np.cumsum((width > 1) & (height > 1))])
    return np.flatnonzero(np.diff(total[annotations.offsets]))
