"""The COCO data set as (image, target), and its label map.

`coco_json` reads the annotations; here an image and its boxes come together.

Source: the 91-label space and the rule for images without boxes are those of torchvision's
references/detection/coco_utils.py.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import re
import urllib.parse
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights
from torchvision.transforms import v2

import coco_json
from coco_json import Annotations, Finding, read_annotations
from utils import LocalError, UserError, derive_seed, logger, printable

__all__ = [
    "Annotations",
    "CocoDetection",
    "Entry",
    "Finding",
    "ImageError",
    "Header",
    "collate",
    "images_with_objects",
    "label_categories",
    "locate_images",
    "match_classes",
    "num_classes",
    "read_annotations",
    "read_header",
    "read_image",
    "require_boxes",
]

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_SCANS = 100  # of a progressive JPEG: encoders write about ten, and each costs a full decoding
# EXIF orientations: which axes of the image [3, H, W] to flip, from 5 on after transposing it.
_EXIF_FLIPS: dict[int, tuple[int, ...]] = {
    **{2: (2,), 3: (1, 2), 4: (1,), 5: (), 6: (2,), 7: (1, 2), 8: (1,)}
}


def label_categories(categories: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    """Give every category its label, the class number that a model predicts; 0 is background.

    The official COCO categories keep torchvision's 91-label space (label = id), so its weights
    and ours interchange. Any other list gets the labels 1 … K in the order of its ids.

    Returns:
        The label map: `{"id", "name", "label"}` per category, ascending by id.
    """
    official = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    is_coco = list(categories) == [
        (i, name) for i, name in enumerate(official) if name not in ("__background__", "N/A")
    ]
    return [
        {"id": number, "name": name, "label": number if is_coco else place}
        for place, (number, name) in enumerate(categories, start=1)
    ]


def num_classes(label_map: Sequence[dict[str, Any]]) -> int:
    """Return the number of classes, background included, that a label map needs."""
    return max(category["label"] for category in label_map) + 1


def match_classes(
    label_map: Sequence[dict[str, Any]], annotations: Annotations, source: str
) -> None:
    """Match the classes of `annotations` by name with `label_map`, and log where they differ.

    Args:
        source: where `label_map` comes from.

    Raises:
        UserError: if `annotations` have a class that the label map does not have, or none of them.
    """
    id_of = {category["name"]: category["id"] for category in label_map}
    extra = [name for _, name in annotations.categories if name not in id_of]
    if extra or not annotations.categories:
        missing = sorted(set(id_of) - {name for _, name in annotations.categories})
        raise UserError(
            f"{annotations.path} and {source} name different classes: only the former has "
            f"{sorted(extra)[:10]}, only the latter {missing[:10]}; give data with the same classes"
        )
    for warning in class_findings(label_map, annotations):
        logger.warning("%s: %s", annotations.path.name, warning)


def class_findings(label_map: Sequence[dict[str, Any]], annotations: Annotations) -> list[Finding]:
    """Find classes of training that a split names under another id, does not name, or adds."""
    id_of = {category["name"]: category["id"] for category in label_map}
    given = {name: number for number, name in annotations.categories}
    other = [
        f"{name!r} is {number}, in training {id_of[name]}"
        for name, number in given.items()
        if id_of.get(name, number) != number
    ]
    extra, lacking = sorted(set(given) - set(id_of)), [name for name in id_of if name not in given]
    if extra:
        return coco_json.finding("splits that name different classes", extra + lacking, repr)
    return [
        *coco_json.finding("classes of training that val does not name", lacking, repr),
        *coco_json.finding("classes with another id in val", other),
    ]


class ImageError(LocalError):
    """An image that cannot be read as its annotations say; `rule` is one of `coco_json.RULES`."""

    def __init__(self, message: str, rule: str = "") -> None:
        super().__init__(message)
        self.rule = rule


@dataclass(frozen=True)
class Entry:
    """What the annotations say of one image: all that a loader worker is told of it.

    Attributes:
        size: (H, W), pixels.
        boxes_xywh, iscrowd, labels: `[n, 4]`, `[n]`, `[n]`, one row per annotation.
    """

    image_id: int
    file_name: str
    size: tuple[int, int]
    boxes_xywh: np.ndarray
    iscrowd: np.ndarray
    labels: np.ndarray


class CocoDetection(Dataset[tuple[torch.Tensor, dict[str, torch.Tensor]]]):
    """Images and boxes by (epoch, index): the same pair is the same sample in any worker.

    Loader workers get no copy of the annotations, which may be gigabytes: `for_workers` and
    `with_entries` send them the entries of each batch.

    Args:
        root: image folder.
        annotations: of its images.
        label_map: as `label_categories` makes it; the names of `annotations` lead to labels.
        transforms: a `torchvision.transforms.v2` transform of (image, target), or None.
        seed: of the transforms' random numbers, with epoch and index.
        keep: `[n]` the image numbers that form the data set; None is all.
    """

    def __init__(
        self,
        root: Path,
        annotations: Annotations,
        label_map: Sequence[dict[str, Any]],
        transforms: v2.Transform | None = None,
        seed: int = 0,
        keep: np.ndarray | None = None,
    ) -> None:
        label_of = {category["name"]: category["label"] for category in label_map}
        self.labels = np.array([label_of[name] for _, name in annotations.categories], np.int64)
        self.root, self.annotations, self.label_map = root, annotations, label_map
        self.transforms, self.seed = transforms, seed
        self.keep = np.arange(len(annotations)) if keep is None else keep

    def __len__(self) -> int:
        return len(self.keep)

    def sizes(self) -> np.ndarray:
        """Return `[len(self), 2]` (H, W) of every image, pixels, without opening one."""
        return self.annotations.sizes[self.keep]

    def describe(self, image_id: int) -> str:
        """Return the file and the id of an image, for a message."""
        (number,) = np.flatnonzero(self.annotations.image_ids == image_id)
        return f"{self.root / self.annotations.file_name(int(number))} (id {image_id})"

    def entry(self, index: int) -> Entry:
        """Return what the annotations say of an image of the data set."""
        number, annotations = int(self.keep[index]), self.annotations
        rows = slice(*annotations.offsets[number : number + 2])
        height, width = annotations.sizes[number].tolist()
        return Entry(
            int(annotations.image_ids[number]),
            annotations.file_name(number),
            (height, width),
            annotations.boxes_xywh[rows],
            annotations.iscrowd[rows],
            self.labels[annotations.category_index[rows]],
        )

    def for_workers(self) -> CocoDetection:
        """Return a copy without annotations, which takes (epoch, index, entry)."""
        data = copy.copy(self)
        del data.annotations, data.keep
        return data

    def with_entries(self, batches: Collection[list[tuple[int, int]]]) -> WithEntries:
        """Return `batches` of (epoch, index) as what the copy of `for_workers` takes."""
        return WithEntries(self, batches)

    def __getitem__(
        self, key: tuple[int, int] | tuple[int, int, Entry]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the image, uint8 `[3, H, W]`, and its target.

        The target holds "boxes" `[n, 4]` float32 xyxy in pixels, clipped to the image, without
        crowds and boxes of no extent; "labels" `[n]` int64; "image_id" int64 scalar.

        Raises:
            ImageError: names the file and the image id.
        """
        epoch, index = key[:2]
        entry = key[2] if len(key) == 3 else self.entry(index)
        image = tv_tensors.Image(self._read_image(entry))
        target = self._target(entry)
        if self.transforms is not None:
            with torch.random.fork_rng(devices=[]):
                # Of the CPU alone: `torch.manual_seed` takes as long as a fifth of decoding.
                torch.default_generator.manual_seed(derive_seed(self.seed, epoch, index))
                image, target = self.transforms(image, target)
        return image.as_subclass(torch.Tensor), {
            name: value.as_subclass(torch.Tensor) for name, value in target.items()
        }

    def _target(self, entry: Entry) -> dict[str, torch.Tensor]:
        limit = np.array(entry.size[::-1], dtype=np.float32)
        boxes = coco_json.clip(coco_json.to_xyxy(entry.boxes_xywh), limit)
        keep = ~entry.iscrowd & coco_json.has_extent(boxes)
        box_format = tv_tensors.BoundingBoxFormat.XYXY
        return {
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(boxes[keep]), format=box_format, canvas_size=entry.size
            ),
            "labels": torch.from_numpy(entry.labels[keep]),
            "image_id": torch.tensor(entry.image_id),
        }

    def _read_image(self, entry: Entry) -> torch.Tensor:
        path = self.root / entry.file_name
        try:
            return read_image(path, self.root, entry.size)
        except ImageError as error:
            raise ImageError(
                f"image id {entry.image_id}, {printable(str(path))}: {error}; correct it or take "
                "it out of the annotations (python -m tools.check_data finds all such images)",
                error.rule,
            ) from None


class WithEntries:
    """Batches of (epoch, index, entry) from batches of (epoch, index)."""

    def __init__(self, data: CocoDetection, batches: Collection[list[tuple[int, int]]]) -> None:
        self.data, self.batches = data, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int, Entry]]]:
        for batch in self.batches:
            yield [(epoch, index, self.data.entry(index)) for epoch, index in batch]


@dataclass(frozen=True)
class Header:
    """What an image file says of itself before it is decoded; sizes are (H, W)."""

    stored: tuple[int, int]
    orientation: int  # of EXIF, 1 to 8
    is_slow: bool  # not decoded by torchvision, nor a PNG

    @property
    def shown(self) -> tuple[int, int]:
        """The size after EXIF turned the image, as viewers show it."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored

    @property
    def is_ambiguous(self) -> bool:
        """Whether EXIF turns the image and its size does not tell."""
        return self.orientation > 1 and self.shown == self.stored


def read_header(path: Path) -> Header:
    """Read the header of an image file.

    Raises:
        ImageError: if it is missing, of another format than `IMAGE_FORMATS`, or damaged.
    """
    if not path.is_file():
        raise ImageError("is missing", "image files missing")
    with _image_errors(), Image.open(path, formats=IMAGE_FORMATS) as image:
        return _header_of(image)


def _header_of(image: Image.Image) -> Header:
    width, height = image.size
    orientation = 1
    # PIL turns TIFF by itself. Asking costs 0.1 ms, so files without EXIF or XMP are not asked.
    may_be_turned = image.format == "PNG" or not image.info.keys().isdisjoint(("exif", "xmp"))
    if image.format != "TIFF" and may_be_turned:
        orientation = image.getexif().get(0x0112, 1)
    if orientation not in _EXIF_FLIPS:
        orientation = 1
    is_animated = image.format == "WEBP" and getattr(image, "is_animated", False)
    is_slow = image.format in ("BMP", "TIFF", "GIF") or is_animated
    return Header((height, width), orientation, is_slow)


@contextmanager
def _image_errors() -> Iterator[None]:
    """Turn whatever a decoder raises into an `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        reason = "is no JPEG, PNG, WebP, BMP, TIFF or GIF"
        raise ImageError(reason, "image files of another format") from None
    except Image.DecompressionBombError as error:
        raise ImageError(str(error), "images over 89 megapixels") from None
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error ...
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).split("\n")[0])
        raise ImageError(f"is damaged: {reason}", "image files that are damaged") from None


def read_image(path: Path, root: Path, size: tuple[int, int]) -> torch.Tensor:
    """Decode an image file to uint8 RGB, `[3, H, W]`.

    Alpha is dropped, gray repeated; of an animation the first frame is read. EXIF turns the image,
    as viewers show it, unless `size` (H, W) is that of the stored pixels only. PNG is decoded by
    PIL, which takes 1.2 times as long: torchvision's decoder crashes the process on most damaged
    PNG files (0.29.1).

    Raises:
        ImageError: if its name leaves `root` (links may), or the file is of another format than
            `IMAGE_FORMATS`, is damaged, has 16 bits per channel, or has another size than `size`.
    """
    if not path.is_file():  # a folder, or a pipe, which would keep its reader waiting
        reason = "is missing" + (": not a regular file" if path.exists() else "")
        raise ImageError(reason, "image files missing")
    if not os.path.abspath(path).startswith(os.path.join(os.path.abspath(root), "")):
        raise ImageError("lies outside", "image files outside of the image folder")
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        raise ImageError(reason, "image files that cannot be read") from None
    if not data:
        raise ImageError("is empty", "image files that are empty")
    with _image_errors():
        file = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        header = _check_header(file, data, size)
        if file.format == "PNG" or header.is_slow:
            image = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        else:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image = decode_image(encoded, ImageReadMode.RGB)
    if header.orientation == 1 or header.shown != size:
        return image
    turned = image.transpose(1, 2) if header.orientation >= 5 else image
    return turned.flip(_EXIF_FLIPS[header.orientation])


def _check_header(file: Image.Image, data: bytes, size: tuple[int, int]) -> Header:
    """Check what can be checked before decoding."""
    width, height = file.size
    if width * height > coco_json.MAX_PIXELS:
        raise ImageError(f"has {width} x {height} pixels", "images over 89 megapixels")
    if _bits_per_channel(file, data) > 8:
        raise ImageError("has 16 bits per channel", "image files with 16 bits per channel")
    if file.format == "PNG" and b"IEND" not in data:
        raise ImageError("is truncated", "image files that are damaged")
    if "progressive" in file.info and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise ImageError(f"has {scans} scans", "image files with too many scans")
    header = _header_of(file)
    if size in (header.stored, header.shown):
        return header
    raise ImageError(
        f"is {width} x {height}, the annotations say {size[1]} x {size[0]}",
        "image files of another size than annotated",
    )


def _bits_per_channel(file: Image.Image, data: bytes) -> int:
    if file.format == "PNG":
        return data[24]
    if file.format == "TIFF":  # PIL would cut RGB of 16 bits down to 8
        bits = file.tag_v2.get(258, 1)  # type: ignore[attr-defined]
        return max(bits) if isinstance(bits, tuple) else bits
    return 8


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


class _Batch(tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]):
    """Images and targets; from a worker the targets travel by value.

    PyTorch sends each tensor as a file descriptor, which takes longer than a target's few bytes.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        images, targets = self
        values = [{name: value.numpy() for name, value in target.items()} for target in targets]
        return _received, (images, values)


def _received(images: list[torch.Tensor], values: list[dict[str, np.ndarray]]) -> _Batch:
    targets = [{name: torch.from_numpy(v) for name, v in target.items()} for target in values]
    return _Batch((images, targets))


def collate(
    samples: list[tuple[torch.Tensor, dict[str, torch.Tensor]]],
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Make a batch: images of different sizes stay a list."""
    images, targets = zip(*samples, strict=True)
    return _Batch((list(images), list(targets)))
