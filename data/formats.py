"""Pascal VOC and YOLO folders as COCO JSON.

Each reader makes one list of `Sample` per split, and collects what it finds: what is unambiguous is
used, and a warning counts it; what is ambiguous or would lose boxes is refused, all of it at once.

Sources: the VOC2012 development kit (boxes count pixels from 1, both ends included), and the layout
that Ultralytics trains on, https://docs.ultralytics.com/datasets/detect.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from data import cache as data_cache
from data import coco_arrays, coco_rules, image_files
from data.coco_rules import Finding
from data.image_files import SUFFIXES, ImageError
from utils import UserError, file_errors

LAYOUTS = ("voc", "yolo")
SPLITS = ("train", "val")
# What may be wrong with such a folder: the fix, or what is done about it.
_ERRORS = {
    "images that a list names and that are missing": "add them, or correct the list",
    "XML files that a list names and that are missing": "add them, or correct the list",
    "XML files that cannot be read": "correct them, or export them again",
    "XML files that are not in the encoding they declare": "save them in it, or declare theirs",
    "XML files without an image": "add the image, or take the file out",
    "XML files with several images of their name": "rename the images",
    "images with several XML files": "keep one of them",
    "images of another size than in their XML": "correct <size> and the boxes",
    "images whose width and height are swapped in their XML": "swap them in <size>",
    "objects that cannot be read": "correct them, or take them out",
    "images that share a label file": "rename them",
    "label files that cannot be read": "write them again, in UTF-8",
    "label lines that cannot be read": "write: class x y w h",
    "label lines of an unknown class": "classes count from 0, in the order of names",
    "boxes that are not shares of their image": "pixels? divide them by its width and height",
}
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
    "no val in the YAML file": "test is used",
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
_OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".jp2", ".dng", ".jxl", ".ppm")
_OVER_BORDER = 0.01  # pixels that rounding may add to a box, without a warning
_MARGIN = 0.01  # shares that a centre or a side may be over the border


@dataclass
class Sample:
    """An image and its boxes: [x, y, w, h] in pixels of the image as EXIF turns it."""

    image: Path
    size: tuple[int, int]  # (H, W)
    boxes: list[list[float]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    is_crowd: list[bool] = field(default_factory=list)


@dataclass
class Found:
    """Cases by rule; paths are shown relative to `base`."""

    base: Path
    cases: dict[str, list[str]] = field(default_factory=dict)

    def add(self, rule: str, path: Path | str, detail: str = "") -> None:
        """Add the case `path` + `detail` to a rule of `RULES`, here or in `coco_json`."""
        text = os.fspath(path)
        if text.startswith(os.path.join(self.base, "")):
            text = os.path.relpath(text, self.base)
        self.cases.setdefault(rule, []).append(text + detail)

    def findings(self) -> list[Finding]:
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
    found: Found
    is_listed: bool = False  # `images` are all of a folder, of which a list chooses


@dataclass
class Layout:
    """What a folder holds: splits "train" and "val", or "all" where it has none."""

    splits: dict[str, Split]
    read: Callable[[Split], list[Sample]]
    names: list[str]  # of the classes in order; none where the label files name them
    sources: list[Path] = field(default_factory=list)  # other files that the conversion depends on


def coco_paths(layout: str, root: Path) -> dict[str, Path]:
    """Convert a folder to COCO JSON in the cache, once per machine, and return where things are.

    Categories get the ids 1 … K: those of VOC by name, those of YOLO in the order of data.yaml.

    Args:
        layout: one of `LAYOUTS`.
        root: the folder; for YOLO also its YAML file.

    Returns:
        "train_images", "train_annotations", "val_images" and "val_annotations".

    Raises:
        UserError: lists what the folder lacks, or what is wrong in its files.
    """
    about = find(layout, root)
    if "val" not in about.splits:
        raise UserError(
            f"--data-path {root} has no split to evaluate on; make one: "
            f"python -m tools.convert {layout} {root} NEW_FOLDER --val-share 0.2"
        )
    root = Path(os.path.abspath(root))
    key = _key(about)
    name = f"{root.name}-{hashlib.sha256(bytes(root)).hexdigest()[:16]}"
    place = data_cache.folder() / layout / name

    def build(place: Path) -> None:
        samples = read(about, root)
        names = about.names or class_names(samples.values())
        for split, rows in samples.items():
            document = as_coco(rows, about.splits[split].root, list(enumerate(names, start=1)))
            (place / f"{split}.json").write_text(json.dumps(document))
            found = [asdict(finding) for finding in about.splits[split].found.findings()]
            (place / f"{split}.findings.json").write_text(json.dumps(found))

    try:
        data_cache.built_once(place, key, build)
    except OSError as error:
        raise UserError(f"cannot keep {root} as COCO JSON: {error}; set XDG_CACHE_HOME") from None
    folders = {f"{split}_images": about.splits[split].root for split in SPLITS}
    return folders | {f"{split}_annotations": place / f"{split}.json" for split in SPLITS}


def kept_findings(annotations: Path) -> list[Finding]:
    """Return the warnings of the conversion that made `annotations`; none for any other file."""
    path = annotations.with_suffix(".findings.json")
    if not path.is_file():
        return []
    rows = json.loads(path.read_text())
    return [Finding(**row | {"cases": tuple(row["cases"])}) for row in rows]


def find(layout: str, root: Path) -> Layout:
    """Find the splits of a folder, without opening images or label files.

    Raises:
        UserError: if the folder has another layout.
    """
    if not root.is_dir() and not (layout == "yolo" and root.is_file()):
        raise UserError(f"--data-path {root} is no folder; --dataset {layout} needs one")
    root = Path(os.path.abspath(root))  # links stay: labels lie beside them
    return _find_voc(root) if layout == "voc" else _find_yolo(root)


def read(about: Layout, root: Path) -> dict[str, list[Sample]]:
    """Read all splits.

    Raises:
        UserError: lists every error in all of them.
    """
    samples = {name: about.read(split) for name, split in about.splits.items()}
    found = [f for split in about.splits.values() for f in split.found.findings()]
    errors = dict.fromkeys(str(finding) for finding in found if finding.severity == "error")
    if errors:
        raise UserError("\n  ".join([f"{root} cannot be used", *errors]))
    return samples


def class_names(splits: Iterable[Sequence[Sample]]) -> list[str]:
    """Return the names of all classes that occur, sorted."""
    return sorted({name for rows in splits for sample in rows for name in sample.classes})


def as_coco(
    samples: Sequence[Sample], root: Path, categories: Sequence[tuple[int, str]]
) -> dict[str, Any]:
    """Return COCO JSON; images and annotations are numbered from 1, file names are below `root`."""
    id_of = {name: number for number, name in categories}
    annotations: list[dict[str, Any]] = []
    for number, sample in enumerate(samples, start=1):
        rows = zip(sample.boxes, sample.classes, sample.is_crowd, strict=True)
        for box, name, crowd in rows:
            about = {"id": len(annotations) + 1, "image_id": number, "category_id": id_of[name]}
            shape = {"bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd)}
            annotations.append(about | shape)
    return {
        "images": [
            {
                "id": number,
                "file_name": Path(os.path.relpath(sample.image, root)).as_posix(),
                "height": sample.size[0],
                "width": sample.size[1],
            }
            for number, sample in enumerate(samples, start=1)
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in categories],
    }


def _key(about: Layout) -> str:
    """Hash the code, and name, size and times of all files that a conversion reads."""
    content = hashlib.sha256(Path(__file__).read_bytes() + Path(image_files.__file__).read_bytes())
    splits = about.splits.values()
    files = {path for split in splits for path in (*split.images, *split.labels)}
    for path in sorted(files | set(about.sources)):
        about_file = path.stat() if path.is_file() else None
        times = about_file and (about_file.st_size, about_file.st_mtime_ns, about_file.st_ctime_ns)
        content.update(bytes(path) + f" {times}\n".encode())
    content.update(str([sorted(map(str, split.labels)) for split in splits]).encode())
    return content.hexdigest()


def _files_below(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted, also those in folders that are links."""
    files, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        files += [Path(place, name) for name in names]
    return sorted(path for path in files if path.is_file())


def images_below(folder: Path, found: Found | None = None) -> list[Path]:
    """Return all images below a folder; `found` gets those of a format that is not read."""
    files = _files_below(folder)
    for path in files:
        if found is not None and path.suffix.lower() in _OTHER_SUFFIXES:
            found.add("image files of another format", path)
    return [path for path in files if path.suffix.lower() in SUFFIXES]


def _stem(name: str) -> str:
    """Return a file name without folders and without the suffix of an image."""
    name = name.replace("\\", "/").rsplit("/", 1)[-1]
    base, suffix = os.path.splitext(name)
    return base if suffix.lower() in (*SUFFIXES, *_OTHER_SUFFIXES) else name


def _header(path: Path, found: Found) -> image_files.Header | None:
    try:
        header = image_files.read_header(path)
    except ImageError as error:
        found.add(error.rule, path, f" {error}")
        return None
    if header.is_slow:
        found.add("image files in a slow format", path)
    return header


def _add_box(
    sample: Sample, corners: Sequence[float], name: str, crowd: bool, found: Found, place: str
) -> None:
    """Add a box (x1, y1, x2, y2) to `sample`, clipped to the image; `place` names it."""
    height, width = sample.size
    limits = (width, height, width, height)
    clipped = [min(max(value, 0.0), limit) for value, limit in zip(corners, limits, strict=True)]
    x1, y1, x2, y2 = clipped
    if min(x2 - x1, y2 - y1) < coco_arrays.MIN_SIDE:
        found.add("boxes outside of their image", place)
        return
    if max(abs(a - b) for a, b in zip(corners, clipped, strict=True)) > _OVER_BORDER:
        found.add("boxes over the border of their image", place)
    sample.boxes.append([x1, y1, x2 - x1, y2 - y1])
    sample.classes.append(name)
    sample.is_crowd.append(crowd)


# --- VOC ------------------------------------------------------------------------------------------

_DECLARED = re.compile(rb"""\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["']""")
_OBJECT = re.compile(r"<object[\s>/]")


def _find_voc(root: Path) -> Layout:
    """Find splits as in VOC2012 (ImageSets/Main), or folders of images and XML files."""
    lists = {
        path.stem: path
        for folder in (root / "ImageSets", root / "ImageSets" / "Main")
        for path in folder.glob("*.txt")
        if path.stem in ("train", "val", "trainval", "test")
    }
    inner = sorted(
        p.parent for p in [*root.glob("*/ImageSets"), *root.glob("VOCdevkit/*/ImageSets")]
    )
    folders = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    for name in ("valid", "validation"):
        if name in folders:
            folders.setdefault("val", folders[name])
    if lists:
        pair = next(
            (
                pair
                for pair in (("train", "val"), ("trainval", "test"), ("train", "test"))
                if set(pair) <= set(lists)
            ),
            None,
        )
        widest = next(name for name in ("trainval", "train", "val", "test") if name in lists)
        chosen = dict(zip(SPLITS, pair, strict=True)) if pair else {"all": widest}
        splits = {name: _voc_list(root, folders, lists[given]) for name, given in chosen.items()}
        if pair and pair != SPLITS:
            case = f"{pair[0]} for train, {pair[1]} for val"
            splits["train"].found.add("no lists train and val", case)
    elif len(inner) > 1:
        raise UserError(
            f"--data-path {root} holds several VOC folders; give one of them: "
            + ", ".join(map(str, inner))
        )
    elif inner:
        about = _find_voc(inner[0])
        next(iter(about.splits.values())).found.add("a single VOC folder below", inner[0])
        return about
    elif "train" in folders and ("val" in folders or "test" in folders):
        val = "val" if "val" in folders else "test"
        splits = {"train": _voc_folder(folders["train"]), "val": _voc_folder(folders[val])}
        if val == "test":
            splits["train"].found.add("no lists train and val", "train for train, test for val")
    else:
        splits = {"all": _voc_folder(root)}
    for name, split in splits.items():
        if not split.labels and not split.found.cases:
            where = split.root if name != "all" else root
            raise UserError(
                f"--data-path {root}: no XML files in {where}; give a folder with "
                "ImageSets/Main/{train,val}.txt, or with train/ and val/ of images and XML files"
            )
    return Layout(splits, _read_voc, [], sorted(lists.values()))


def _voc_list(root: Path, folders: dict[str, Path], path: Path) -> Split:
    """Take the XML files that a list names, and all images to pair them with."""
    images = next((folders[n] for n in ("jpegimages", "images") if n in folders), root)
    labels = next((folders[n] for n in ("annotations", "labels") if n in folders), root)
    found, chosen = Found(root), dict[Path, None]()
    with file_errors("read", path):
        text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        first = line.split()[0]
        ways = [line.strip(), _stem(line.strip()), first, _stem(first)]
        label = next((p for w in ways if (p := labels / f"{w}.xml").is_file()), None)
        if label is None:
            found.add("XML files that a list names and that are missing", labels / f"{first}.xml")
            continue
        if label.stem != line.strip() and re.search(r"\s(-?1|0)\s*$", line):
            found.add("list lines with 1, 0 or -1 of one class", path, f":{number}")
        if label in chosen:
            found.add("images that a list names twice", path, f":{number}")
        chosen[label] = None
    return Split(images, images_below(images), list(chosen), found, is_listed=True)


def _voc_folder(folder: Path) -> Split:
    """Take all images and XML files below a folder."""
    found = Found(folder.parent)
    labels = [path for path in _files_below(folder) if path.suffix.lower() == ".xml"]
    return Split(folder, images_below(folder, found), labels, found)


def _read_voc(split: Split) -> list[Sample]:
    """Read one split. What VOC calls difficult becomes a crowd: neither trained on nor scored."""
    found, by_stem = split.found, dict[str, list[Path]]()
    for path in split.images:
        by_stem.setdefault(path.stem, []).append(path)
    samples, used = [], Counter[Path]()
    for label in split.labels:
        parsed = _parse_xml(label, found)
        if parsed is None:
            continue
        tree, text = parsed
        image = _voc_image(tree, label, by_stem, found)
        if image is None:
            continue
        used[image] += 1
        header = _header(image, found)
        size = header and _voc_size(tree, label, image, header, found)
        # Without a size the objects are read all the same, for what is wrong with them.
        sample = Sample(image, size or (2**31, 2**31))
        _read_objects(tree, text, label, sample, found)
        samples.append(sample)
    for image, count in used.items():
        if count > 1:
            found.add("images with several XML files", image)
    for image in split.images:
        if image not in used and not split.is_listed:
            found.add("images without an XML file", image)
    return samples


def _parse_xml(label: Path, found: Found) -> tuple[ElementTree.Element, str] | None:
    """Return the tree and the text of an XML file, decoded as it declares.

    Expat by itself knows no encoding of several bytes per character but UTF-8 and UTF-16.
    """
    try:
        data = label.read_bytes()
    except OSError as error:
        found.add("XML files that cannot be read", label, f" {error.strerror}")
        return None
    match = _DECLARED.match(data.removeprefix(b"\xef\xbb\xbf"))
    declared = match[1].decode("ascii", "replace").lower() if match else "utf-8"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        declared = "utf-16"
    # Files that say GB2312 hold letters of its supersets as well.
    codec = "gb18030" if declared in ("gb2312", "gbk") else declared
    codec = "utf-8-sig" if codec in ("utf-8", "utf8") else codec
    try:
        text = data.decode(codec)
        tree = ElementTree.fromstring(re.sub(r"\A\s*<\?xml.*?\?>", "", text, flags=re.DOTALL))
    except UnicodeDecodeError as error:
        case = f" byte {error.start} is not {declared}"
        found.add("XML files that are not in the encoding they declare", label, case)
    except (LookupError, ElementTree.ParseError, ValueError) as error:
        found.add("XML files that cannot be read", label, f" {error}")
    else:
        if tree.tag.lower() == "annotation":
            return tree, text
        case = f" its root is <{tree.tag}>, not <annotation>"
        found.add("XML files that cannot be read", label, case)
    return None


def _voc_image(
    tree: ElementTree.Element, label: Path, by_stem: dict[str, list[Path]], found: Found
) -> Path | None:
    """Return the image of the XML file's name; only if there is none, that of <filename>."""
    given = (tree.findtext("filename") or "").strip()
    named = by_stem.get(_stem(given), []) if given else []
    same = by_stem.get(label.stem, [])
    if len(same) > 1:  # of several, the one in the same folder, or the one that <filename> says
        beside = [path for path in same if path.parent == label.parent]
        said = [path for path in same if path.name == Path(given.replace("\\", "/")).name]
        same = next((ways for ways in (beside, said) if len(ways) == 1), same)
    if len(same) > 1 or (not same and len(named) > 1):
        found.add("XML files with several images of their name", label)
        return None
    if same:
        if named and _stem(given) != label.stem:
            case = f" names {given!r}"
            found.add("XML files of which <filename> names another image", label, case)
        return same[0]
    if named:
        found.add("XML files paired by <filename>", label, f" with {named[0].name!r}")
        return named[0]
    found.add("XML files without an image", label, f" nor {given!r}" if given else "")
    return None


def _voc_size(
    tree: ElementTree.Element,
    label: Path,
    image: Path,
    header: image_files.Header,
    found: Found,
) -> tuple[int, int] | None:
    """Return the size (H, W) that the XML file says, if the image has it, turned or as stored."""
    try:
        width, height = (int(float(tree.findtext(f"size/{n}") or 0)) for n in ("width", "height"))
    except (ValueError, OverflowError):
        width = height = 0
    if width <= 0 or height <= 0:
        found.add("XML files without a size", label)
        height, width = header.shown
    elif (height, width) not in (header.stored, header.shown):
        rule = "images of another size than in their XML"
        if (width, height) == header.shown:
            rule = "images whose width and height are swapped in their XML"
        seen = f" is {header.shown[1]} x {header.shown[0]}, not {width} x {height}"
        found.add(rule, image, seen)
        return None
    if header.is_ambiguous:
        found.add("image files turned by EXIF, which their size cannot confirm", image)
    return height, width


def _read_objects(
    tree: ElementTree.Element, text: str, label: Path, sample: Sample, found: Found
) -> None:
    starts = [match.start() for match in _OBJECT.finditer(text)]
    for number, element in enumerate(tree.findall("object")):
        name = (element.findtext("name") or "").strip()
        place = label.as_posix()
        if number < len(starts):
            place += f":{text.count(chr(10), 0, starts[number]) + 1}"
        place += f" {name!r}" if name else ""
        corners = [(element.findtext(f"bndbox/{c}") or "").strip() for c in _CORNERS]
        difficult = (element.findtext("difficult") or "0").strip()
        problem = "" if name else "has no <name>"
        if element.find("bndbox") is None:
            problem = "has no <bndbox>"
        values = [_number(value) for value in corners]
        for corner, given, value in zip(_CORNERS, corners, values, strict=True):
            if not problem and math.isnan(value):
                problem = f"<{corner}> is {given[:20]!r}"
        x1, y1, x2, y2 = values
        if not problem and (x1 > x2 or y1 > y2):
            axis, low, high = ("x", x1, x2) if x1 > x2 else ("y", y1, y2)
            problem = f"{axis}min {low:g} is above {axis}max {high:g}"
        if problem:
            found.add("objects that cannot be read", place, f" {problem}")
            continue
        if difficult not in ("0", "1"):
            found.add("<difficult> that is neither 0 nor 1", place, f" {difficult[:20]!r}")
        # The first pixel is number 1, and the last one belongs to the box.
        _add_box(sample, (x1 - 1, y1 - 1, x2, y2), name, difficult == "1", found, place)


_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _number(text: str) -> float:
    """Return a finite number, or NaN for any other text."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) and "_" not in text else math.nan


# --- YOLO -----------------------------------------------------------------------------------------


def _find_yolo(root: Path) -> Layout:
    """Find the class names, and the images of each split with their label files."""
    path = root if root.is_file() else _choose_yaml(root)
    if path is None:
        return _find_yolo_without_yaml(root)
    about, lines = _read_yaml(path)
    names = _class_names(about, lines, path)
    found = Found(path.parent)
    given = {split: _listed(about.get(split), split, path) for split in (*SPLITS, "test")}
    if not given["val"] and given["test"]:
        given["val"] = given["test"]
        found.add("no val in the YAML file", path)
    if not given["train"]:
        raise UserError(f"{path} has no train: a folder of images, or a list of folders")
    bases = _bases(about.get("path"), path, found)
    splits, sources = {}, [path]
    for split in SPLITS:
        if given[split]:
            images = []
            for entry in given[split]:
                images += _yolo_images(entry, split, bases, path, found, sources)
            splits[split] = _pair_yolo(images, f"{path}: {split}: {given[split]}", found)
            found = Found(path.parent)
    keypoints = about.get("kpt_shape")
    columns = 0
    if isinstance(keypoints, list) and all(type(n) is int for n in keypoints):
        columns = math.prod(keypoints)
    return Layout(splits, lambda split: _read_yolo(split, names, columns), names, sources)


def _choose_yaml(root: Path) -> Path | None:
    """Return the folder's YAML file: the only one, or data.yaml among several."""
    found = sorted(path for path in root.iterdir() if path.suffix.lower() in (".yaml", ".yml"))
    if len(found) > 1:
        found = [path for path in found if path.stem.lower() == "data"] or found
    if len(found) > 1:
        raise UserError(
            f"--data-path {root} has {len(found)} YAML files and no data.yaml; give the file that "
            f"names classes and folders, such as --data-path {found[0]}"
        )
    return found[0] if found else None


def _find_yolo_without_yaml(root: Path) -> Layout:
    """Take classes.txt with images/ and labels/."""
    path = next(
        (p for p in (root / "classes.txt", root / "labels/classes.txt") if p.is_file()), None
    )
    if path is None or not (root / "images").is_dir():
        raise UserError(
            f"--data-path {root} has no YAML file; give the folder with data.yaml (names, train "
            "and val), or one with classes.txt, images/ and labels/"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    names = [line.strip() for line in lines if line.strip()]
    _require_unique(names, path)
    folders = {name: root / "images" / name for name in ("train", "val", "valid")}
    val = folders["val"] if folders["val"].is_dir() else folders["valid"]
    if folders["train"].is_dir() and val.is_dir():
        chosen = {"train": folders["train"], "val": val}
    else:
        chosen = {"all": root / "images"}
    splits = {}
    for name, folder in chosen.items():
        found = Found(root)
        splits[name] = _pair_yolo(images_below(folder, found), str(folder), found)
    return Layout(splits, lambda split: _read_yolo(split, names, 0), names, [path])


def _read_yaml(path: Path) -> tuple[dict[str, Any], list[int]]:
    """Read a YAML file that is a map; return it, and the line of each of its `names`.

    Raises:
        UserError: if it is none, or gives a key twice, of which YAML would keep the last.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        about, tree = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except Exception as error:  # PyYAML raises nearly anything on damaged text
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = path if line is None else f"{path}:{line + 1}"
        reason = getattr(error, "problem", None) or type(error).__name__
        raise UserError(f"{place} is no YAML: {str(reason)[:80]}; correct it") from None
    if not isinstance(about, dict) or not isinstance(tree, yaml.MappingNode):
        raise UserError(f"{path} is no map with names, train and val; give the data set's file")
    maps = [tree, *(value for _, value in tree.value if isinstance(value, yaml.MappingNode))]
    for node in maps:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [key for key, count in keys.items() if count > 1]
        if twice:
            line = node.start_mark.line + 1
            raise UserError(f"{path}:{line} gives {twice[0]!r} twice; keep one of them")
    names = next((value for key, value in tree.value if key.value == "names"), tree)
    entries = names.value if isinstance(names.value, list) else []
    nodes = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    return about, [node.start_mark.line + 1 for node in nodes]


def _class_names(about: dict[str, Any], lines: Sequence[int], path: Path) -> list[str]:
    """Return `names` of a YAML file, a list or a map that counts from 0.

    Raises:
        UserError: if they are not names, or their numbers or `nc` disagree.
    """
    given = about.get("names")
    if isinstance(given, dict):
        keys = [int(k) if isinstance(k, str) and k.isdecimal() else k for k in given]
        if not all(type(key) is int for key in keys):
            raise UserError(f"{path}: names: number the classes 0, 1, 2 …; the keys are {keys[:5]}")
        if sorted(keys) != list(range(len(keys))):
            least = min(keys, default=0)
            hint = "; label files count classes from 0" if least == 1 else ""
            raise UserError(
                f"{path}: names are numbered from {least}, or with gaps{hint}: number them from 0"
            )
        order = sorted(range(len(keys)), key=keys.__getitem__)
        given, lines = [list(given.values())[i] for i in order], [lines[i] for i in order]
    if not isinstance(given, list) or not given:
        raise UserError(f"{path}: names is missing or no list; write names: [cat, dog]")
    for number, name in enumerate(given):
        if type(name) not in (str, int) or str(name).strip() == "":
            raise UserError(
                f"{path}:{lines[number]}: name {number} is read as {name!r}, no text; quote it"
            )
    names = [str(name) for name in given]
    count = about.get("nc", len(names))
    if count != len(names):
        raise UserError(f"{path}: nc is {count!r}, but there are {len(names)} names; correct one")
    _require_unique(names, path)
    return names


def _require_unique(names: Sequence[str], path: Path) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path}: the name {twice[0]!r} occurs twice; name each class once")
    if not names:
        raise UserError(f"{path} names no class; write one name a line")


def _listed(given: Any, split: str, path: Path) -> list[str]:
    """Return the folders and lists that a YAML file gives for a split."""
    entries = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{path}: {split}: give folders or .txt lists as text, not {entries!r}")
    return [entry for entry in entries if entry.strip()]


def _bases(given: Any, path: Path, found: Found) -> list[Path]:
    """Return the folders that paths of a YAML file may be relative to."""
    if given is None or str(given).strip() == "":
        return [path.parent]
    base = path.parent / _slashes(str(given), path, found)
    if not base.is_dir():
        found.add("paths in the YAML file that are not here", str(given))
        return [path.parent]
    return [base, path.parent]


def _slashes(text: str, path: Path, found: Found) -> str:
    if "\\" not in text:
        return text
    found.add("paths with a backslash", text)
    return text.replace("\\", "/")


def _yolo_images(
    entry: str, split: str, bases: Sequence[Path], path: Path, found: Found, sources: list[Path]
) -> list[Path]:
    """Return the images of a folder, or of a .txt list, which becomes one of `sources`."""
    text = _slashes(entry, path, found)
    # Roboflow writes ../train/images, and means the folder that data.yaml is in.
    ways = [base / way for base in bases for way in (text, text.removeprefix("../"))]
    place = next((Path(os.path.abspath(way)) for way in ways if way.exists()), None)
    if place is None:
        raise UserError(
            f"{path}: {split}: {entry!r} does not exist below "
            + " or ".join(dict.fromkeys(map(str, bases)))
            + "; correct it"
        )
    if place.is_dir():
        return images_below(place, found)
    sources.append(place)
    images = dict[Path, None]()
    with file_errors("read", place):
        lines = place.read_bytes().decode("utf-8-sig", errors="surrogateescape").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = _slashes(line.strip(), path, found)
        ways = [base / name for base in (place.parent, *bases)]
        image = next((Path(os.path.abspath(way)) for way in ways if way.is_file()), None)
        if image is None:
            found.add("images that a list names and that are missing", place, f":{number} {name}")
        elif image in images:
            found.add("images that a list names twice", place, f":{number}")
        else:
            images[image] = None
    return list(images)


def _pair_yolo(images: Sequence[Path], given: str, found: Found) -> Split:
    """Pair images with label files: the last /images/ of a path becomes /labels/."""
    images = list(dict.fromkeys(images))
    if not images and not found.cases:
        raise UserError(f"{given}: no images there; give a folder of images")
    labels = [_label_path(image) for image in images]
    folders = sorted({label.parent for label in labels})
    count = Counter(labels)
    for image, label in zip(images, labels, strict=True):
        if count[label] > 1:
            found.add("images that share a label file", image)
    listed = {path for folder in folders if folder.is_dir() for path in folder.glob("*.txt")}
    if images and not listed & set(labels):
        more = f" and {len(folders) - 1} more" if len(folders) > 1 else ""
        raise UserError(
            f"{given}: no label file for any of {len(images)} images; looked in {folders[0]}{more} "
            "(the last /images/ of a path becomes /labels/)"
        )
    for image, label in zip(images, labels, strict=True):
        if label not in listed:
            found.add("images without a label file", image)
    for path in sorted(listed - set(labels)):
        if path.name != "classes.txt":
            found.add("label files without an image", path)
    parents = [os.fspath(image.parent) for image in images]
    return Split(Path(os.path.commonpath(parents) if parents else "."), images, labels, found)


def _label_path(image: Path) -> Path:
    head, images, tail = os.fspath(image).rpartition(f"{os.sep}images{os.sep}")
    text = f"{head}{os.sep}labels{os.sep}{tail}" if images else os.fspath(image)
    return Path(text).with_suffix(".txt")


def _read_yolo(split: Split, names: Sequence[str], keypoint_columns: int) -> list[Sample]:
    """Read one split. Boxes are shares of the image as EXIF turns it."""
    samples = []
    for image, label in zip(split.images, split.labels, strict=True):
        header = _header(image, split.found)
        sample = Sample(image, header.shown if header else (1, 1))
        samples.append(sample)
        try:
            text = label.read_bytes().decode("utf-8-sig") if label.is_file() else ""
        except UnicodeDecodeError as error:
            case = f" byte {error.start} is not UTF-8"
            split.found.add("label files that cannot be read", label, case)
            continue
        except OSError as error:
            split.found.add("label files that cannot be read", label, f" {error.strerror}")
            continue
        seen = set[tuple[int, tuple[float, ...]]]()
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            place = f"{label}:{number}"
            row = _parse_line(line, place, len(names), keypoint_columns, split.found)
            if row is None:
                continue
            if row in seen:
                split.found.add("label lines that occur twice in a file", place)
                continue
            seen.add(row)
            (height, width), (x1, y1, x2, y2) = sample.size, row[1]
            corners = (x1 * width, y1 * height, x2 * width, y2 * height)
            _add_box(sample, corners, names[row[0]], False, split.found, place)
    return samples


def _parse_line(
    line: str, place: str, num_names: int, keypoint_columns: int, found: Found
) -> tuple[int, tuple[float, ...]] | None:
    """Return class and corners (shares of the image) of a label line, or None, with a finding."""
    parts = [part.strip() for part in line.strip().rstrip(",").split(",")]
    if len(parts) == 1:
        parts = line.split()
    label, *values = map(_number, parts)  # "0 0,25 0,5": NaN, as decimal commas are ambiguous
    count = len(values)
    if any(map(math.isnan, (label, *values))):
        found.add("label lines that cannot be read", place, f" {line.strip()[:40]!r}")
    elif not (0 <= label < num_names and label.is_integer()):
        found.add("label lines of an unknown class", place, f" class {label:g} of {num_names}")
    elif keypoint_columns and count == 4 + keypoint_columns:
        found.add("label lines with keypoints", place)
        return _corners(int(label), values[:4], place, found)
    elif count == 5 and 0 <= values[4] <= 1:
        found.add("label lines with a confidence", place)
        return _corners(int(label), values[:4], place, found)
    elif count == 4:
        return _corners(int(label), values, place, found)
    elif count >= 6 and count % 2 == 0 and not keypoint_columns:
        xs, ys = values[::2], values[1::2]
        if not all(-_MARGIN <= value <= 1 + _MARGIN for value in values):
            found.add("boxes that are not shares of their image", place, f" {values[:4]}")
            return None
        found.add("polygons", place)
        if max(xs) > min(xs) and max(ys) > min(ys):
            return int(label), (min(xs), min(ys), max(xs), max(ys))
        found.add("label lines without width or height", place)
    else:
        found.add("label lines that cannot be read", place, f" {count + 1} numbers")
    return None


def _corners(
    label: int, box: Sequence[float], place: str, found: Found
) -> tuple[int, tuple[float, ...]] | None:
    x, y, w, h = box
    if not all(-_MARGIN <= value <= 1 + _MARGIN for value in box) or w < 0 or h < 0:
        found.add("boxes that are not shares of their image", place, f" {list(box)}")
    elif w == 0 or h == 0:
        found.add("label lines without width or height", place)
    else:
        return label, (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    return None
