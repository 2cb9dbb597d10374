"""Pascal VOC and YOLO folders as COCO JSON, through hotcoco's converters.

By itself hotcoco (1.3.0) loses in silence what a training set cannot do without: objects in XML
that is cut short, letters of names with `&`, images without a YOLO label file. So every file is
read strictly first, handed over under a number, and the boxes that come out are counted.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import hotcoco
from PIL import Image

import data_cache
from coco_utils import IMAGE_FORMATS
from utils import UserError

LAYOUTS = ("voc", "yolo")
SPLITS = ("train", "val")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_OTHER_SUFFIXES = (".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif", ".jp2", ".dng")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# An entry of a list or map, with its number where it has one.
_YAML_VALUE = re.compile(r"""(?:(\d+)\s*:\s+)?("[^"]*"|'[^']*'|[^\s,\[\]{}"'][^,\[\]{}]*)""")


@dataclass
class _Split:
    """One split in its own layout: `labels[i]` describes `images[i]`, relative to `folder`."""

    folder: Path
    images: list[str]
    labels: list[Path]


@dataclass
class _Source:
    """What hotcoco is to convert for one image, written by `write(folder, stem)`."""

    write: Callable[[Path, str], None]
    num_boxes: int
    is_turned: bool = False  # the boxes are those of the image as EXIF turns it


def coco_paths(layout: str, root: Path) -> dict[str, Path]:
    """Convert a folder to COCO JSON in the cache, once per machine, and return where things are.

    Categories get the ids 1 … K: those of VOC by name, those of YOLO in the order of data.yaml.

    Args:
        layout: one of `LAYOUTS`.

    Returns:
        "train_images", "train_annotations", "val_images" and "val_annotations".

    Raises:
        UserError: lists what the folder lacks, or what is wrong in its files.
    """
    if not root.is_dir():
        raise UserError(f"--data-path {root} is no folder; --dataset {layout} needs one")
    root = root.resolve()
    names, splits = _find_voc(root) if layout == "voc" else _find_yolo(root)
    key = _key(root, splits)

    def build(place: Path) -> None:
        """Convert all splits, with one numbering of the classes."""
        convert = _convert_voc if layout == "voc" else _convert_yolo
        datasets = {split: convert(splits[split], names) for split in SPLITS}
        found = {category["name"] for d in datasets.values() for category in d["categories"]}
        for split, dataset in datasets.items():
            _number_categories(dataset, names or sorted(found))
            (place / f"{split}.json").write_text(json.dumps(dataset))

    name = f"{root.name}-{hashlib.sha256(bytes(root)).hexdigest()[:16]}"
    try:
        place = data_cache.folder() / layout / name
        data_cache.built_once(place, key, build)
    except OSError as error:
        raise UserError(f"cannot keep {root} as COCO JSON: {error}; set XDG_CACHE_HOME") from None
    folders = {f"{split}_images": splits[split].folder for split in SPLITS}
    return folders | {f"{split}_annotations": place / f"{split}.json" for split in SPLITS}


def _key(root: Path, splits: dict[str, _Split]) -> str:
    """Hash the code, and name, size and times of all files that a conversion reads."""
    content = hashlib.sha256(Path(__file__).read_bytes())
    files = {path for split in splits.values() for path in split.labels}
    files |= {split.folder / name for split in splits.values() for name in split.images}
    for path in sorted(files | set(root.glob("*.y*ml"))):
        about = path.stat() if path.is_file() else None
        times = about and (about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        content.update(bytes(path) + f" {times}\n".encode())
    return content.hexdigest()


def _convert(
    split: _Split, sources: list[_Source], read: Callable[[str], hotcoco.COCO]
) -> dict[str, Any]:
    """Let hotcoco `read` a folder of numbered files, and give the images their names back.

    Raises:
        UserError: lists the files that hotcoco refuses, with its reasons.
    """

    def convert(numbers: Sequence[int]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as place:
            for number in numbers:
                sources[number].write(Path(place), f"{number:09d}")
            return read(place).dataset

    try:
        dataset = convert(range(len(sources)))
    except ValueError:  # it names the first
        wrong = []
        for number, label in enumerate(split.labels):
            try:
                convert([number])
            except ValueError as error:
                wrong.append(f"{label}: {str(error).split(': ', 2)[-1]}")
        _require_none(wrong, "label files that cannot be read", "correct them")
        raise
    number_of = {image["id"]: int(Path(image["file_name"]).stem) for image in dataset["images"]}
    counts = Counter(number_of[annotation["image_id"]] for annotation in dataset["annotations"])
    assert sorted(number_of.values()) == list(range(len(sources))), "hotcoco lost images"
    assert all(counts[i] == source.num_boxes for i, source in enumerate(sources)), "… boxes"
    wrong = [
        f"{split.labels[number_of[annotation['image_id']]]}: {annotation['bbox']}"
        for annotation in dataset["annotations"]
        if not all(map(math.isfinite, annotation["bbox"]))
    ]
    _require_none(wrong, "boxes that are not finite", "correct them")
    for image in dataset["images"]:
        image["file_name"] = split.images[number_of[image["id"]]]
    for category in dataset["categories"]:
        category["name"] = bytes.fromhex(category["name"][1:]).decode()
    return {name: dataset[name] for name in ("images", "annotations", "categories")}


def _coded(name: str) -> str:
    """Write a class name, unless it is empty, in letters that are safe in XML and YAML."""
    return name and "n" + name.encode().hex()


def _number_categories(dataset: dict[str, Any], names: list[str]) -> None:
    """Give the categories the ids 1 … K in the order of `names`, also those without boxes."""
    id_of = {name: place for place, name in enumerate(names, start=1)}
    new = {category["id"]: id_of[category["name"]] for category in dataset["categories"]}
    for annotation in dataset["annotations"]:
        annotation["category_id"] = new[annotation["category_id"]]
    dataset["categories"] = [{"id": number, "name": name} for name, number in id_of.items()]


def _require_none(wrong: Sequence[str], problem: str, fix: str) -> None:
    """Raise UserError with the first ten of `wrong` and how many there are, if there are any."""
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise UserError(f"{problem}: {'; '.join(wrong[:10])}{more} ({fix})")


def _find_voc(root: Path) -> tuple[list[str], dict[str, _Split]]:
    """Find splits as in VOC2012 (ImageSets/Main), or folders of images with their XML beside."""
    splits = {}
    for split in SPLITS:
        listed = root / "ImageSets" / "Main" / f"{split}.txt"
        names = (split, "valid") if split == "val" else (split,)
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        if listed.is_file():
            stems = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
            labels = [root / "Annotations" / f"{stem}.xml" for stem in stems]
            folder = root / "JPEGImages"
        elif folder is not None:
            labels = sorted(folder.rglob("*.xml"))
        else:
            raise UserError(
                f"--data-path {root} has neither ImageSets/Main/{split}.txt, as VOC2012 has, nor a "
                f"folder {split} with images and XML files; give the folder that has"
            )
        missing = [str(label) for label in labels if not label.is_file()]
        _require_none(missing, f"files missing that {listed} lists", "add them")
        _require_none([] if labels else [str(folder)], "folders without XML files", "add them")
        splits[split] = _Split(folder, [""] * len(labels), labels)
    return [], splits


def _convert_voc(split: _Split, names: list[str]) -> dict[str, Any]:
    """Convert one split. What VOC calls difficult becomes a crowd: neither trained on nor scored.

    The image is the file that <filename> names or, if there is none, the one called like the XML.
    """
    by_stem: dict[str, list[str]] = {}
    for path in sorted(split.folder.rglob("*")):
        if path.suffix.lower() in _SUFFIXES:
            by_stem.setdefault(path.stem, []).append(path.relative_to(split.folder).as_posix())
    known = {name for group in by_stem.values() for name in group}
    sources, wrong = [], []
    for place, label in enumerate(split.labels):
        try:
            root = ElementTree.fromstring(label.read_bytes())
        except ElementTree.ParseError as error:
            wrong.append(f"{label}: {error}")
            continue
        if root.find("size") is None:
            wrong.append(f"{label}: no <size>")
        name = (root.findtext("filename") or "").strip()
        same_stem = by_stem.get(label.stem, [])
        split.images[place] = same_stem[0] if name not in known and len(same_stem) == 1 else name
        sources.append(_voc_source(root))
    _require_none(wrong, "XML files that cannot be read", "write them again")
    return _convert(split, sources, hotcoco.COCO.from_voc)


def _voc_source(root: ElementTree.Element) -> _Source:
    for name in root.findall("object/name"):
        name.text = _coded((name.text or "").strip())
    for old in root.findall("filename"):
        root.remove(old)
    file_name = ElementTree.SubElement(root, "filename")

    def write(folder: Path, stem: str) -> None:
        file_name.text = f"{stem}.jpg"
        ElementTree.ElementTree(root).write(folder / f"{stem}.xml", encoding="utf-8")

    return _Source(write, len(root.findall("object")))


def _find_yolo(root: Path) -> tuple[list[str], dict[str, _Split]]:
    """Find the class names and the folders of images that data.yaml tells."""
    found = sorted(root.glob("*.y*ml"))
    if len(found) != 1:
        raise UserError(
            f"--data-path {root} has {len(found)} YAML files; give the folder that has one, "
            "data.yaml, with names, train and val"
        )
    text = found[0].read_text(encoding="utf-8-sig")
    names, count = _yaml_values(text, "names"), _yaml_values(text, "nc")
    if not names or count not in ([], [str(len(names))]) or len(set(names)) < len(names):
        raise UserError(f"{found[0]}: nc is {count}, names are {names}; name each class once")
    splits = {}
    for split in SPLITS:
        given = _yaml_values(text, split)
        # Roboflow writes ../train/images, and means the folder that data.yaml is in.
        bases = [root / base for base in (*_yaml_values(text, "path"), ".")]
        ways = [base / way for base in bases for way in (*given, *(g[3:] for g in given))]
        folder = next((way.resolve() for way in ways if way.is_dir()), None)
        if folder is None or len(given) != 1:
            raise UserError(f"{found[0]}: {split}: {given}: give one folder of images")
        splits[split] = _find_labels(folder)
    return names, splits


def _yaml_values(text: str, key: str) -> list[str]:
    """Return what a top-level key of simple YAML holds: a value, a list, or a map of numbers."""
    match = re.search(rf"^{key}\s*:(.*(?:\n(?:[ \t-].*|#.*|\s*))*)", text, re.MULTILINE)
    if match is None:
        return []
    values = []
    for line in match[1].splitlines():
        values += _YAML_VALUE.findall(re.sub(r"(^|\s)#.*|^\s*-\s+", "", line))
    numbers = [int(number) for number, _ in values if number]
    if numbers and numbers != list(range(len(values))):
        raise UserError(f"data.yaml: {key}: number the entries from 0, in order: {numbers}")
    return [value.strip().strip("\"'") for _, value in values]


def _find_labels(folder: Path) -> _Split:
    """Pair each image in `folder` with its label file: below labels/ where it is below images/."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    other = [str(path) for path in files if path.suffix.lower() in _OTHER_SUFFIXES]
    _require_none(other, "images that are no JPEG, PNG or WebP", "convert them")
    images = [path for path in files if path.suffix.lower() in _SUFFIXES]
    _require_none([] if images else [str(folder)], "folders without images", "correct data.yaml")
    parts = list(folder.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    below = Path(*parts)
    labels = [below / path.relative_to(folder).with_suffix(".txt") for path in images]
    used = Counter(labels)
    twice = [str(p) for p, label in zip(images, labels, strict=True) if used[label] > 1]
    _require_none(twice, "images that share a label file", "rename them")
    used[below / "classes.txt"] += 1
    lost = [str(path) for path in sorted(below.rglob("*.txt")) if path not in used]
    _require_none(lost, "label files without an image", "add the images, or remove the files")
    return _Split(folder, [path.relative_to(folder).as_posix() for path in images], labels)


def _convert_yolo(split: _Split, names: list[str]) -> dict[str, Any]:
    """Convert one split. An image without a label file has no boxes."""
    sources, wrong = [], []
    for name, label in zip(split.images, split.labels, strict=True):
        try:
            sources.append(_yolo_source(split.folder / name, label))
        except Exception as error:  # whatever a damaged image makes PIL raise
            wrong.append(f"{split.folder / name}: {error}")
    _require_none(wrong, "images or labels that cannot be read", "write them again")

    def read(place: str) -> hotcoco.COCO:
        (Path(place) / "data.yaml").write_text(f"names: [{', '.join(map(_coded, names))}]\n")
        return hotcoco.COCO.from_yolo(place, images_dir=place)

    dataset = _convert(split, sources, read)
    place_of = {name: place for place, name in enumerate(split.images)}
    images = {image["id"]: image for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        image, (x, y, w, h) = images[annotation["image_id"]], annotation["bbox"]
        width, height = image["width"], image["height"]
        shares = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
        label = split.labels[place_of[image["file_name"]]]
        if not all(-1e-3 <= share <= 1 + 1e-3 for share in shares):
            wrong.append(f"{label}: {[round(share, 6) for share in shares]}")
        if sources[place_of[image["file_name"]]].is_turned:
            across, down = height / width, width / height
            annotation["bbox"] = [x * across, y * down, w * across, h * down]
    _require_none(wrong, "boxes that are not in shares of their image", "divide by its size")
    for image in dataset["images"]:
        if sources[place_of[image["file_name"]]].is_turned:
            image["width"], image["height"] = image["height"], image["width"]
    return dataset


def _yolo_source(image: Path, label: Path) -> _Source:
    with Image.open(image, formats=IMAGE_FORMATS) as header:
        is_turned = header.getexif().get(0x0112) in _TURNED
    text = label.read_text(encoding="utf-8-sig") if label.is_file() else ""

    def write(folder: Path, stem: str) -> None:
        (folder / f"{stem}.jpg").symlink_to(image)
        (folder / f"{stem}.txt").write_text(text)

    return _Source(write, sum(bool(line.strip()) for line in text.splitlines()), is_turned)
