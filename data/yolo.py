"""YOLO folders: one text file of boxes for each image, and a YAML file with classes and splits.

Source: the layout that Ultralytics trains on, https://docs.ultralytics.com/datasets/detect.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import yaml

from data.checks import FEW_BOXES, corner_statistics
from data.coco_rules import Findings
from data.files import number, read_lines, read_text
from data.labelled import Layout, Sample, Split, images_below, read_header
from utils import UserError

_VAL_KEYS = ("val", "validation", "valid", "test")  # what to evaluate on: the first that exists
_MARGIN = 0.01  # shares that a centre or a side may be over the border


def find(root: Path, chosen: Mapping[str, Path]) -> Layout:
    """Find the class names, and the images of each split with their label files.

    Args:
        root: the folder, or its YAML file.
        chosen: the user's lists of images by split; they replace those in the YAML file.

    Raises:
        UserError: if names or images are missing or ambiguous.
    """
    path = root if root.is_file() else _choose_yaml(root)
    base = root if root.is_dir() else root.parent
    findings = Findings(base)
    if path is None:
        path, config, names = _without_yaml(root)
    else:
        config, names = _read_yaml(path)
        for other in _class_lists(base):
            if [line for _, line in read_lines(other, "replace")] != names:
                findings.add("class lists that differ from the one used", other)
    if twice := _twice(names):
        raise UserError(f"{path}: the name {twice[0]!r} occurs twice; name each class once")
    if not names:
        raise UserError(f"{path} names no class; write one name a line")
    val = next((key for key in _VAL_KEYS if config.get(key)), "val")
    if val != "val":
        findings.add("no val in the YAML file", path, f" has {val}")
    bases = [base]
    if folder := str(config.get("path") or "").strip():
        if data_folder := _resolve(folder, bases, findings):
            bases.insert(0, data_folder)
        else:
            findings.add("paths in the YAML file that are not here", folder)
    entries = {"train": _entries(config, "train", path), "val": _entries(config, val, path)}
    entries = {split: [os.fspath(path)] for split, path in chosen.items()} or entries
    if not entries["train"]:
        raise UserError(f"{path} has no train: a folder of images, or a list of folders")
    splits, sources = {}, [path, *_class_lists(base)]
    for split, texts in entries.items():
        images = list[Path]()
        for text in texts:
            source = _resolve(text, bases, findings)
            if source is None:
                folders = " or ".join(map(str, bases))
                here = sorted(path.name for path in base.iterdir() if path.is_dir())[:10]
                there = f"{base} has {', '.join(here)}" if here else f"{base} has no folder"
                raise UserError(
                    f"{path}: {split}: {text!r} is not in {folders}; correct it: {there}"
                )
            sources.append(source)
            if source.is_dir():
                images += images_below(source, findings)
            else:
                images += _listed(source, bases, findings)
        if texts:
            splits[split] = _pair(images, f"{path}: {split}: {texts}", findings)
        findings = Findings(base)
    keypoints: Any = config.get("kpt_shape")
    is_shape = isinstance(keypoints, list) and all(type(n) is int for n in keypoints)
    columns = math.prod(keypoints) if is_shape else 0
    return Layout(splits, lambda split: read_split(split, names, columns), names, sources)


def _choose_yaml(root: Path) -> Path | None:
    """Return the folder's YAML file: the only one, or data.yaml among several."""
    files = sorted(path for path in root.iterdir() if path.suffix.lower() in (".yaml", ".yml"))
    files = [path for path in files if path.stem.lower() == "data"] or files
    if len(files) > 1:
        count = f"{len(files)} YAML files and no data.yaml"
        raise UserError(f"{root} has {count}; give the right one, such as --data-path {files[0]}")
    return files[0] if files else None


def _without_yaml(root: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """Return classes.txt, what a YAML file would say, and the names of the classes."""
    files = _class_lists(root)
    if not files:
        raise UserError(
            f"{root} has no YAML file; give the folder with data.yaml (names, train "
            "and val), or one with classes.txt beside images/ and labels/, or beside all images "
            "and their labels"
        )
    lists = [_read_names(path) for path in files]
    names = lists[0]
    if lists[1:] not in ([], [names]):
        raise UserError(f"{files[0]} and {files[1]} name different classes; keep the right one")
    if not (root / "images").is_dir():  # labels lie beside the images, as labelImg writes them
        return files[0], {"train": "."}, names
    folders = {key: f"images/{key}" for key in ("train", *_VAL_KEYS)}
    splits = {key: folder for key, folder in folders.items() if (root / folder).is_dir()}
    is_split = "train" in splits and len(splits) > 1
    return files[0], splits if is_split else {"train": "images"}, names


def _class_lists(root: Path) -> list[Path]:
    return [path for path in (root / "classes.txt", root / "labels/classes.txt") if path.is_file()]


def _read_names(path: Path) -> list[str]:
    """Read one class a line.

    Raises:
        UserError: if a line is blank, a comment, or holds more than a name.
    """
    lines = [line.strip() for line in read_text(path).rstrip().splitlines()]
    found = [re.match(r"(\d+)[\s:,]", line) for line in lines]
    numbers = [int(match[1]) for match in found if match]
    is_numbered = bool(lines) and numbers in ([*range(len(lines))], [*range(1, len(lines) + 1)])
    for row, line in enumerate(lines, start=1):
        if not line or line.startswith("#") or is_numbered or (len(lines) == 1 and "," in line):
            reason = f"{line[:40]!r} is no name of a class" if line else "is blank"
            raise UserError(f"{path}:{row} {reason}; write one name a line, in order")
    return lines


def _read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read a YAML file; return it and its names, a list or a map that counts from 0.

    Raises:
        UserError: if it is no map, gives a key twice (YAML would keep the last), or if its
            names are no names, or disagree with their numbers or with `nc`.
    """
    text = read_text(path)
    try:
        config = yaml.safe_load(text)
        tree: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    except Exception as error:  # PyYAML raises nearly anything on damaged text
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        reason = getattr(error, "problem", None) or type(error).__name__
        raise UserError(f"{where} is no YAML: {str(reason)[:80]}; correct it") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is no map with names, train and val; give the data set's file")
    for node in (tree, *(value for _, value in tree.value)):
        is_map = isinstance(node, yaml.MappingNode)
        if is_map and (twice := _twice(str(key.value) for key, _ in node.value)):
            line = node.start_mark.line + 1
            raise UserError(f"{path}:{line} gives {twice[0]!r} twice; keep one of them")
    names = config.get("names")
    if not isinstance(names, list | dict) or not names:
        raise UserError(f"{path}: names is missing or no list; write names: [cat, dog]")
    numbered = names if isinstance(names, dict) else dict(enumerate(names))
    nodes: list[Any] = next((value.value for key, value in tree.value if key.value == "names"), [])
    for i, name in enumerate(numbered.values()):
        if type(name) not in (str, int) or not str(name).strip():
            node = nodes[i] if i < len(nodes) else tree
            line = (node[1] if isinstance(node, tuple) else node).start_mark.line + 1
            raise UserError(f"{path}:{line}: name {i} is read as {name!r}, no text; quote it")
    keys = [int(key) if str(key).isdecimal() else -1 for key in numbered]
    if sorted(keys) != list(range(len(keys))):
        first = next(iter(numbered))
        if 0 in keys:
            raise UserError(f"{path}: names are numbered with gaps; number them 0, 1, 2 …")
        raise UserError(f"{path}: names are numbered from {first!r}; label files count from 0")
    names = [str(name) for _, name in sorted(zip(keys, numbered.values(), strict=True))]
    if (count := config.get("nc", len(names))) != len(names):
        raise UserError(f"{path}: nc is {count!r}, but there are {len(names)} names; correct one")
    return config, names


def _twice(values: Iterable[str]) -> list[str]:
    return [value for value, count in Counter(values).items() if count > 1]


def _entries(config: dict[str, Any], key: str, path: Path) -> list[str]:
    """Return the folders and lists that a YAML file gives for a split."""
    value = config.get(key) or []
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{path}: {key}: give folders or .txt lists as text, not {entries!r}")
    return [entry for entry in entries if entry.strip()]


def _resolve(text: str, bases: Sequence[Path], findings: Findings) -> Path | None:
    """Return the file or folder of a name, absolute or relative to one of `bases`."""
    if "\\" in text:
        findings.add("paths with a backslash", text)
        text = text.replace("\\", "/")
    # Roboflow writes ../train/images, and means the folder that data.yaml is in.
    paths = [base / name for base in bases for name in (text, text.removeprefix("../"))]
    # Links stay: label files lie beside them.
    return next((Path(os.path.abspath(path)) for path in paths if path.exists()), None)


def _listed(path: Path, bases: Sequence[Path], findings: Findings) -> list[Path]:
    """Return the images that a .txt list names."""
    images = dict[Path, None]()
    for where, line in read_lines(path, "surrogateescape"):
        image = _resolve(line, [path.parent, *bases], findings)
        if image is None:
            findings.add("images that a list names and that are missing", where, f" {line}")
        elif image in images:
            findings.add("images that a list names twice", where)
        else:
            images[image] = None
    return list(images)


def _pair(images: Sequence[Path], title: str, findings: Findings) -> Split:
    """Pair images with label files: the last /images/ of a path becomes /labels/."""
    images = list(dict.fromkeys(images))
    if not images and not findings.cases:
        raise UserError(f"{title}: no images there; give a folder of images")
    texts = ["/labels/".join(os.fspath(image).rsplit("/images/", 1)) for image in images]
    labels = [Path(text).with_suffix(".txt") for text in texts]
    folders = sorted({label.parent for label in labels})
    listed = {
        (path.parent, normalize("NFC", path.stem)): path  # macOS writes ü as two characters
        for folder in folders
        for path in sorted(folder.glob("[!.]*.[tT][xX][tT]"))
    }
    keys = [(label.parent, normalize("NFC", label.stem)) for label in labels]
    labels = [listed.get(key, label) for key, label in zip(keys, labels, strict=True)]
    there, unused = set(listed.values()), dict.fromkeys(listed.values())
    if images and there.isdisjoint(labels):
        more = f" and {len(folders) - 1} more" if len(folders) > 1 else ""
        raise UserError(
            f"{title}: no label file for any of {len(images)} images; looked in {folders[0]}{more} "
            "(the last /images/ of a path becomes /labels/)"
        )
    count = Counter(labels)
    for image, label in zip(images, labels, strict=True):
        if count[label] > 1:
            findings.add("images that share a label file", image)
        if label not in there:
            findings.add("images without a label file", image)
        unused.pop(label, None)
    for path in unused:
        if path.name != "classes.txt":
            findings.add("label files without an image", path)
    parents = [os.fspath(image.parent) for image in images]
    return Split(Path(os.path.commonpath(parents) if parents else "."), images, labels, findings)


def read_split(split: Split, names: Sequence[str], columns: int) -> list[Sample]:
    """Read one split. Boxes are shares of the image as EXIF turns it.

    Args:
        columns: numbers that describe the keypoints of an object, behind its box.
    """
    samples, findings = [], split.findings
    centred, limits = [], []  # all boxes but polygons, and the sizes of their images
    for image, label in zip(split.images, split.labels, strict=True):
        header = read_header(image, findings)
        sample = Sample(image, header.shown if header else (1, 1))
        if header and header.orientation > 1:
            findings.add("image files turned by EXIF, which their size cannot confirm", image)
        samples.append(sample)
        try:
            lines = read_lines(label) if os.path.lexists(label) else []
        except UserError as error:
            reason, *_ = str(error).rsplit("; ", 1)  # the rule has a fix of its own
            findings.add("label files that cannot be read", reason)
            continue
        seen = set[tuple[int, tuple[float, ...]]]()
        for where, line in lines:
            rule, detail, row = _parse_line(line, len(names), columns)
            if row in seen:
                rule, row = "label lines that occur twice in a file", None
            if rule:
                findings.add(rule, where, detail)
            if row:
                seen.add(row)
                (height, width), (x1, y1, x2, y2) = sample.size, row[1]
                corners = (x1 * width, y1 * height, x2 * width, y2 * height)
                if rule != "polygons":
                    centred.append(corners)
                    limits.append((width, height))
                sample.add_box(corners, names[row[0]], False, findings, where)
    if len(centred) >= FEW_BOXES:
        _check_centres(np.array(centred), np.array(limits), findings)
    return samples


def _check_centres(xyxy: np.ndarray, limit: np.ndarray, findings: Findings) -> None:
    """Report boxes whose numbers show that they are not centre, width and height."""
    first, last = xyxy[:, :2], xyxy[:, 2:]
    point, size = (first + last) / 2, last - first  # as the file has them
    leaves = np.any((first < -1) | (last > limit + 1), axis=1)
    is_within = np.all(point + size <= limit + 1, axis=1)
    if cases := corner_statistics(np.concatenate([point, size], axis=1), limit, leaves):
        findings.add("boxes that look like x1 y1 x2 y2", cases[0])
    elif leaves.mean() >= 0.1 and is_within.mean() >= 0.98:
        case = f"{leaves.sum():,} of {len(leaves):,} leave the image around a centre"
        case += f", {(~is_within).sum():,} from a corner"
        findings.add("boxes whose x and y look like a corner", case)


def _parse_line(
    line: str, num_names: int, columns: int
) -> tuple[str, str, tuple[int, tuple[float, ...]] | None]:
    """Return a rule, a detail, and class and corners (shares of the image), or None if refused."""
    parts = line.rstrip(",").split(",")
    parts = parts if len(parts) > 1 else line.split()  # "0 0,25" is ambiguous, and gives NaN
    label, *values = (number(part.strip()) for part in parts)
    count, rule = len(values), ""
    if columns and count == 4 + columns:
        rule = "label lines with keypoints"
    elif count == 5 and 0 <= values[4] <= 1:
        rule = "label lines with a confidence"
    elif count >= 6 and count % 2 == 0 and not columns:
        rule = "polygons"
    if any(map(math.isnan, (label, *values))):
        return "label lines that cannot be read", f" {line[:40]!r}", None
    if not (0 <= label < num_names and label.is_integer()):
        return "label lines of an unknown class", f" class {label:g} of {num_names}", None
    if count != 4 and not rule:
        return "label lines that cannot be read", f" {count + 1} numbers", None
    if rule == "polygons":
        shares, xs, ys = values, values[::2], values[1::2]
        x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
    else:
        shares = x, y, w, h = values[:4]
        x1, y1, x2, y2 = x - w / 2, y - h / 2, x + w / 2, y + h / 2
    if min(shares) < -_MARGIN or max(shares) > 1 + _MARGIN or x1 > x2 or y1 > y2:
        return "boxes that are not shares of their image", f" {shares[:4]}", None
    if x1 == x2 or y1 == y2:
        return "label lines without width or height", "", None
    return rule, "", (int(label), (x1, y1, x2, y2))
