"""Pascal VOC folders: one XML file for each image, split by lists or by folders.

Source: the VOC2012 development kit. Boxes count pixels from 1, both ends included.
"""

from __future__ import annotations

import codecs
import io
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError, XMLPullParser

from data.coco_rules import Findings
from data.files import files_below, number, read_bytes, read_lines, without_suffix
from data.labelled import SPLITS, Layout, Sample, Split, images_below, read_header
from utils import UserError

# What to train and evaluate on, in the order of preference.
_PAIRS = (SPLITS, ("trainval", "test"), ("train", "test"))
_CHOICES = (*_PAIRS, ("trainval",), ("train",), ("val",), ("test",))
_VAL = ("valid", "validation")  # other names of a folder val
_DECLARED = re.compile(rb"""(?:\xef\xbb\xbf)?\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["']""")
# Files that say GB2312 hold letters of its supersets as well.
_CODECS = {"utf-8": "utf-8-sig", "gb2312": "gb18030", "gbk": "gb18030"}
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def find(root: Path, chosen: Mapping[str, Path]) -> Layout:
    """Find splits as in VOC2012 (ImageSets/Main), or in folders of images and XML files.

    Args:
        chosen: the user's lists by split: files, or names of lists in ImageSets/Main.

    Raises:
        UserError: if there are several VOC folders, or no XML files.
    """
    paths = [*root.glob("ImageSets/*.txt"), *root.glob("ImageSets/Main/*.txt")]
    all_lists = {path.stem: path for path in paths}
    lists = {split: all_lists.get(str(path), path) for split, path in chosen.items()}
    lists = lists or {name: path for name, path in all_lists.items() if (name,) in _CHOICES}
    if not lists and "default" in all_lists:  # as CVAT calls it
        lists = {"train": all_lists["default"]}
    inner = [*root.glob("*/ImageSets"), *root.glob("VOCdevkit/*/ImageSets")]
    inner = sorted(path.parent for path in inner)
    if not all_lists and len(inner) > 1:
        folders = ", ".join(map(str, inner))
        raise UserError(f"{root} holds several VOC folders; give one of them: {folders}")
    if not all_lists and inner:
        layout = find(inner[0], chosen)
        layout.splits["train"].findings.add("a single VOC folder below", inner[0])
        return layout
    sources: Any = lists or _split_folders(root)
    choice = next((names for names in _CHOICES if sources.keys() >= set(names)), ())
    splits = {
        split: _listed(root, lists[name]) if lists else _below(sources[name])
        for split, name in zip(SPLITS, choice, strict=False)
    } or {"train": _below([root])}
    if choice in _PAIRS[1:]:
        case = f"{choice[0]} for train, {choice[1]} for val"
        splits["train"].findings.add("no lists train and val", case)
    elif not chosen and lists.keys() - all_lists.keys():  # it is default.txt
        splits["train"].findings.add("no lists train and val", lists["train"])
    for name, split in zip(choice or ("train",), splits.values(), strict=True):
        if split.is_listed and not split.labels and not split.findings.cases:
            raise UserError(f"--data-path {root}: {lists[name]} names no image")
        if not split.images and not split.findings.cases:
            raise UserError(
                f"--data-path {root}: no images in {split.root}; put them there, or, beside "
                "Annotations/, in JPEGImages/"
            )
        if not split.labels and not split.findings.cases:
            raise UserError(
                f"--data-path {root}: no XML files in {split.root}; give a folder with "
                "ImageSets/Main/{train,val}.txt, or with train/ and val/ of images and XML files"
            )
    return Layout(splits, read_split, [], sorted(lists.values()))


def _split_folders(root: Path) -> dict[str, list[Path]]:
    """Return the folders of each split: train/ and val/, or images/train/, xml/train/ and so on."""
    for pattern in ("*", "*/*"):
        folders = dict[str, list[Path]]()
        for path in sorted(path for path in root.glob(pattern) if path.is_dir()):
            name = path.name.lower()
            folders.setdefault("val" if name in _VAL else name, []).append(path)
        has_xml = any(files_below(path, ".xml") for path in folders.get("train", []))
        if (pattern == "*" or has_xml) and any(folders.keys() >= set(pair) for pair in _PAIRS):
            return folders
    return {}


def _listed(root: Path, path: Path) -> Split:
    """Take the XML files that a list names, and all images to pair them with."""
    folders = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    images = next((folders[n] for n in ("jpegimages", "images") if n in folders), root)
    labels = next((folders[n] for n in ("annotations", "labels") if n in folders), root)
    known = {without_suffix(os.path.relpath(p, labels)): p for p in files_below(labels, ".xml")}
    findings, listed = Findings(root), dict[Path, None]()
    for where, line in read_lines(path, "surrogateescape"):
        # A name may have blanks, folders before it, a suffix, and 1, 0 or -1 behind it.
        first, *rest = line.split()
        names = [line, without_suffix(line), first, without_suffix(first)]
        names += [re.split(r"[/\\]", name)[-1] for name in names]
        name = next((name for name in names if name in known), None)
        if name is None:
            case = labels / f"{first}.xml"
            findings.add("XML files that a list names and that are missing", case)
            continue
        if rest and name not in names[:2] + names[4:6]:  # the first word is the name
            if rest not in (["1"], ["0"], ["-1"]):
                findings.add("list lines that name several images", where, f" {line}")
                continue
            findings.add("list lines with 1, 0 or -1 of one class", where)
        if known[name] in listed:
            findings.add("images that a list names twice", where)
        listed[known[name]] = None
    return Split(images, images_below(images, Findings(root)), list(listed), findings, True)


def _below(folders: list[Path]) -> Split:
    """Take all images and XML files below folders."""
    root = Path(os.path.commonpath(folders))
    findings = Findings(root.parent)
    images = [path for folder in folders for path in images_below(folder, findings)]
    labels = [path for folder in folders for path in files_below(folder, ".xml")]
    return Split(root, images, labels, findings)


def read_split(split: Split) -> list[Sample]:
    """Read one split. What VOC calls difficult becomes a crowd: neither trained on nor scored."""
    findings, by_stem = split.findings, dict[str, list[Path]]()
    for path in split.images:
        by_stem.setdefault(path.stem, []).append(path)
    samples, used = [], Counter[Path]()
    for label in split.labels:
        tree = _read_xml(label, findings)
        image = None if tree is None else _find_image(tree, label, by_stem, findings)
        if tree is None or image is None:
            continue
        used[image] += 1
        size = _read_size(tree, label, image, findings)
        # Without a size the objects are read all the same, for what is wrong with them.
        sample = Sample(image, size or (2**31, 2**31))
        _read_objects(tree, label, sample, findings)
        samples.append(sample)
    for image in split.images:
        if used[image] > 1:
            findings.add("images with several XML files", image)
        if not used[image] and not split.is_listed:
            findings.add("images without an XML file", image)
    return samples


def _read_xml(label: Path, findings: Findings) -> Element | None:
    """Return the root of an XML file; each element has its line as an attribute.

    The text is decoded here: Expat knows no encoding of several bytes but UTF-8 and UTF-16.
    """
    encoding, elements = "utf-8", list[Element]()
    parser: Any = XMLPullParser(["start"])
    try:
        content = read_bytes(label)
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            encoding = "utf-16"
        elif match := _DECLARED.match(content):
            encoding = match[1].decode()
        text = content.decode(_CODECS.get(codecs.lookup(encoding).name, encoding))
        start = text[: len(text) - len(text.lstrip())].count("\n") + 1
        for line_number, line in enumerate(io.StringIO(text.lstrip()), start):
            parser.feed(line)
            for _, element in parser.read_events():
                element.set("line", f"{line_number}")
                elements.append(element)
        parser.close()
        if elements[0].tag.lower() != "annotation":
            raise ValueError(f"its root is <{elements[0].tag}>, not <annotation>")
    except UnicodeDecodeError as error:
        case = f" byte {error.start} is not {encoding}"
        findings.add("XML files that are not in the encoding they declare", label, case)
    except (UserError, LookupError, ParseError, ValueError) as error:
        findings.add("XML files that cannot be read", label, f" {error}")
    else:
        return elements[0]
    return None


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _find_image(
    tree: Element, label: Path, by_stem: dict[str, list[Path]], findings: Findings
) -> Path | None:
    """Return the image of the XML file's name; only if there is none, that of <filename>."""
    name = re.split(r"[/\\]", _text(tree, "filename"))[-1]
    same, named = by_stem.get(label.stem, []), by_stem.get(without_suffix(name), [])
    images = same or named
    for is_nearer in (lambda path: path.parent == label.parent, lambda path: path.name == name):
        if len(images) > 1:
            images = list(filter(is_nearer, images)) or images
    if not images:
        findings.add("XML files without an image", label, f" ({name!r})" if name else "")
    elif len(images) > 1:
        findings.add("XML files with several images of their name", label)
    elif not same:
        findings.add("XML files paired by <filename>", label, f" with {images[0].name!r}")
    elif named and without_suffix(name) != label.stem:
        rule = "XML files whose <filename> names another image"
        findings.add(rule, label, f" names {name!r}")
    return images[0] if len(images) == 1 else None


def _read_size(
    tree: Element, label: Path, image: Path, findings: Findings
) -> tuple[int, int] | None:
    """Return the size (H, W) in the XML file, if the image has it, turned or as stored."""
    header = read_header(image, findings)
    if header is None:
        return None
    width, height = (number(_text(tree, f"size/{side}")) for side in ("width", "height"))
    size = header.shown
    if not (width >= 1 and height >= 1):
        findings.add("XML files without a size", label)
    elif (int(height), int(width)) in (header.stored, header.shown):
        size = (int(height), int(width))
    else:
        case = f" is {size[1]} x {size[0]}, not {width:g} x {height:g}"
        case += " (swapped)" * ((width, height) == size)
        findings.add("images of another size than in their XML", image, case)
        return None
    if header.is_ambiguous:
        findings.add("image files turned by EXIF, which their size cannot confirm", image)
    return size


def _read_objects(tree: Element, label: Path, sample: Sample, findings: Findings) -> None:
    seen = set[tuple[str, ...]]()
    for element in tree.findall("object"):
        name, difficult = _text(element, "name"), _text(element, "difficult")
        corners = {corner: _text(element, f"bndbox/{corner}") for corner in _CORNERS}
        x1, y1, x2, y2 = map(number, corners.values())
        where = f"{label}:{element.get('line')}" + (f" {name!r}" if name else "")
        problem = ""
        counts = {tag: len(element.findall(tag)) for tag in ("name", "bndbox")}
        counts |= {corner: len(element.findall(f"bndbox/{corner}")) for corner in _CORNERS}
        if twice := [f"{count} <{tag}>" for tag, count in counts.items() if count > 1]:
            problem = f"has {twice[0]}"
        elif element.find("bndbox") is None:
            shapes = [tag for tag in ("robndbox", "polygon") if element.find(tag) is not None]
            problem = "has no <bndbox>" + "".join(f", but <{tag}>" for tag in shapes)
        elif not name:
            problem = "has no <name>"
        elif wrong := [corner for corner in _CORNERS if math.isnan(number(corners[corner]))]:
            value = corners[wrong[0]][:20]
            problem = f"<{wrong[0]}> is {value!r}" if value else f"<{wrong[0]}> is empty or missing"
        elif x1 > x2:
            problem = f"xmin {x1:g} is above xmax {x2:g}"
        elif y1 > y2:
            problem = f"ymin {y1:g} is above ymax {y2:g}"
        if problem:
            findings.add("objects that cannot be read", where, f" {problem}")
            continue
        is_difficult = difficult.lower() in ("1", "true")
        if not is_difficult and difficult.lower() not in ("", "0", "false"):
            findings.add("<difficult> that is neither 0 nor 1", where, f" {difficult[:20]!r}")
        if (name, *corners.values()) in seen:
            findings.add("objects that occur twice in a file", where)
            continue
        seen.add((name, *corners.values()))
        # The first pixel is number 1, and the last one belongs to the box.
        sample.add_box((x1 - 1, y1 - 1, x2, y2), name, is_difficult, findings, where)
