"""Finds the file of every image, and the size of every image that has none annotated."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import unicodedata
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.checks import check_boxes
from data.coco_arrays import Annotations, pack_names
from data.coco_rules import Finding, finding, is_unsafe_name
from data.image_files import ImageError, read_header

LOOKED_AT = 32  # images of each split whose headers are read at the start


class _Folders:
    """The names of the files in each folder below `root`; each folder is listed once."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.abspath(root)
        self.files = functools.cache(self._files)
        self.by_lower_suffix = functools.cache(self._by_lower_suffix)

    def _files(self, folder: bytes) -> set[bytes]:
        path = os.path.join(os.fsencode(self.root), folder)
        entries = os.scandir(path) if b"\0" not in path and os.path.isdir(path) else ()
        return {entry.name for entry in entries if entry.is_file()}

    def _by_lower_suffix(self, folder: str) -> dict[str, list[str]]:
        table = defaultdict(list)
        for name in map(os.fsdecode, self.files(os.fsencode(folder))):
            table[_lower_suffix(name)].append(name)
        return table


def _lower_suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem + suffix.lower()


def locate_images(annotations: Annotations, root: Path) -> tuple[Annotations, list[Finding]]:
    """Find the file of every image in `root`, and the size of every image that has none annotated.

    The folder is listed, instead of asking for each file. A name that is no file is tried with
    other spellings, as `_find_spelling` makes them.

    Returns:
        The annotations with the names of the files and all sizes, and the findings.
    """
    folders = _Folders(root)
    offsets, text = annotations.name_offsets.tolist(), annotations.names.tobytes()
    names = [text[start:end] for start, end in itertools.pairwise(offsets)]
    spelled: dict[int, bytes] = {}
    missing = []
    for number, name in enumerate(names):
        folder, _, last = name.rpartition(b"/")
        if last not in folders.files(folder):
            spelling = _find_spelling(name.decode(), folders)
            if spelling is None:
                missing.append(number)
            else:
                spelled[number] = os.fsencode(spelling)
    findings = finding(
        "file names in another spelling",
        list(spelled),
        lambda n: f"{annotations.describe(n)} is {spelled[n].decode()!r}",
    )
    findings += finding(
        "image files missing",
        [n for n in missing if not is_unsafe_name(annotations.file_name(n))],
        lambda n: f"{annotations.image_ids[n]} {root / annotations.file_name(n)}",
    )
    located = annotations
    if spelled:
        used = [spelled.get(number, name) for number, name in enumerate(names)]
        count, old_count = Counter(used), Counter(names)
        shared = {used[i].decode() for i in spelled if count[used[i]] > old_count[names[i]]}
        findings += finding("images that share a file", sorted(shared), repr)
        packed, name_offsets = pack_names(used)
        located = dataclasses.replace(annotations, names=packed, name_offsets=name_offsets)
    is_there = np.ones(len(annotations), bool)
    is_there[missing] = False
    if (annotations.sizes == 0).any():
        located, more = _read_sizes(located, root, is_there)
    else:
        more = _find_swapped(located, root, np.flatnonzero(is_there))
    return located, findings + more


def _without_folder(name: str, folders: _Folders) -> str:
    """Leave out the folders with which the image folder's path ends, the most that fit."""
    parts, last = name.split("/"), Path(folders.root).parts
    counts = [n for n in range(len(parts) - 1, 0, -1) if tuple(parts[:n]) == last[-n:]]
    return "/".join(parts[counts[0] :]) if counts else name


def _other_suffix(name: str, folders: _Folders) -> str:
    """Return the one file that differs from `name` in the case of its suffix only, else `name`."""
    folder, slash, last = name.rpartition("/")
    same = folders.by_lower_suffix(folder).get(_lower_suffix(last), [])
    return folder + slash + same[0] if len(same) == 1 else name


def _find_spelling(name: str, folders: _Folders) -> str | None:
    """Return the name of the file that `name` means, None if there is none.

    Each change is tried by itself and on top of those before it.
    """
    changes: list[Callable[[str], str]] = [
        lambda name: name.replace("\\", "/"),
        urllib.parse.unquote,
        functools.partial(unicodedata.normalize, "NFC"),
        functools.partial(unicodedata.normalize, "NFD"),  # as macOS writes ü
        lambda name: _without_folder(name, folders),
        lambda name: _other_suffix(name, folders),
    ]
    spellings = [name]
    for change in changes:
        for spelled in map(change, list(spellings)):
            if spelled not in spellings and not is_unsafe_name(spelled):
                folder, _, last = os.fsencode(spelled).rpartition(b"/")
                if last in folders.files(folder):
                    return spelled
                spellings.append(spelled)
    return None


def _read_sizes(
    annotations: Annotations, root: Path, is_there: np.ndarray
) -> tuple[Annotations, list[Finding]]:
    """Take unknown sizes from the images, and then check the boxes."""
    sizes, unreadable = annotations.sizes.copy(), []
    for number in np.flatnonzero((sizes == 0).any(axis=1) & is_there).tolist():
        try:
            sizes[number] = read_header(root / annotations.file_name(number)).shown
        except ImageError as error:
            unreadable.append(f"{annotations.describe(number)}: {error}")
    annotations = dataclasses.replace(annotations, sizes=sizes)
    findings = finding("width or height not positive", unreadable)
    if (sizes != 0).all():
        findings += check_boxes(annotations)
    return annotations, findings


def _find_swapped(annotations: Annotations, root: Path, numbers: np.ndarray) -> list[Finding]:
    """Find out from some of the images `numbers` whether width and height are swapped in all."""
    chosen = np.linspace(0, len(numbers) - 1, min(LOOKED_AT, len(numbers))).astype(int)
    swapped = 0
    for number in numbers[chosen].tolist():
        try:
            header = read_header(root / annotations.file_name(number))
        except ImageError:  # reported when the image is opened, by its own rule
            return []
        if header.orientation >= 5:  # an image that EXIF turns may be annotated either way
            return []
        if header.stored[0] != header.stored[1]:
            if tuple(annotations.sizes[number].tolist()) != header.stored[::-1]:
                return []
            swapped += 1
    case = f"in all {swapped} images looked at" if swapped > 1 else "in the image looked at"
    return finding("width and height that are swapped", [case] if swapped else [])
