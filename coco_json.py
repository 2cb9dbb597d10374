"""COCO JSON to packed arrays, and every rule on what such a file may say.

One file becomes a handful of contiguous NumPy arrays, so that DataLoader workers share the memory
and no Python object per annotation survives. Segmentations are never decoded: this is box
detection. The rules are applied to the arrays, and all findings are listed, not the first.

Source: the COCO data format, https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from utils import UserError

MAX_PIXELS = 89_478_485  # Pillow's limit against decompression bombs: 2**30 / 4 / 3
# A side below this many pixels may round to zero when the model resizes it, and log(0) is NaN.
MIN_SIDE = 1e-3
PIECE = 2**24  # bytes of JSON decoded at a time: the structs of a file fill more room than it does
DIAGNOSED = 2**31  # bytes up to which Python reads a broken file again, to list every fault
NOT_GIVEN = -(2**62)  # stands for a missing iscrowd

# What can be wrong with a data set: severity, and the fix, or what is done about it.
_SHAPE = ("error", "give it COCO's layout, https://cocodataset.org/#format-data")
_UNIQUE = ("error", "make them unique")
# What a file of images to be submitted, such as COCO's image_info_test-dev2017.json, may lack.
UNANNOTATED = ("no list of annotations", "no categories")
RULES = {
    "annotation file that is empty": ("error", "write it again"),
    "annotation file that is not UTF-8": ("error", "save it as UTF-8, without a byte order mark"),
    "annotation file that is not JSON, or cut short": ("error", "write it again"),
    "annotation file that is not COCO's": _SHAPE,
    "list missing": _SHAPE,
    "no list of annotations": (
        "error",
        "add it to train or to score; train.py --test-only --save-detections needs none",
    ),
    "list given twice, of which one would be lost": ("error", "join the two"),
    "entries that are not an object": _SHAPE,
    "no images": ("error", "add them"),
    "no categories": ("error", "add them"),
    "image ids that occur twice": _UNIQUE,
    "annotation ids that occur twice": _UNIQUE,
    "category ids that occur twice": _UNIQUE,
    "category names that occur twice": _UNIQUE,
    "width or height not positive": ("error", "give the image's size in pixels"),
    "images over 89 megapixels": ("error", "make them smaller"),
    "file_name not below the image folder": ("error", "no '..', NUL, drive or leading slash"),
    "annotations of an unknown image_id": ("error", "remove them, or add the image"),
    "annotations of an unknown category_id": ("error", "remove them, or add the category"),
    "annotations with iscrowd other than 0 or 1": ("error", "correct it"),
    "annotations without iscrowd": ("warning", "taken as 0"),
    "annotations without area": ("warning", "taken as w * h"),
    "annotations with the id 0": ("warning", "numbered anew to evaluate: pycocotools loses it"),
    "boxes without width or height": ("warning", "not trained on"),
    "boxes outside of their image, or thinner than 0.001 px": ("warning", "not trained on"),
    "boxes partly outside of their image": ("warning", "clipped to train"),
    "categories without boxes": ("warning", "kept as classes"),
    "images that share a file": ("warning", "each is used with its own boxes"),
    "annotations that cannot be cached": ("warning", "read anew at every start"),
    "image files missing": ("error", "add them, or correct file_name: '/' ends a folder"),
    "image files outside of the image folder": ("error", "copy them into it"),
    "image files that cannot be read": ("error", "see to the permissions, or the disk"),
    "image files that are empty": ("error", "copy them again"),
    "image files of another format": ("error", "convert them: magick FILE NEW.png"),
    "image files that are damaged": ("error", "copy them again"),
    "image files of another size than annotated": ("error", "correct width and height"),
    "image files with 16 bits per channel": (
        "error",
        "convert them to 8 bits: magick FILE -depth 8 NEW.png",
    ),
    "image files with too many scans": ("error", "write them again: magick FILE NEW.jpg"),
    "image files in a slow format": ("warning", "read by PIL; JPEG, PNG and WebP are faster"),
    "image files turned by EXIF, which their size cannot confirm": (
        "warning",
        "turned as viewers show them; look at them with tools.visualize batch",
    ),
    "image files with stray bytes": ("warning", "decoded all the same"),
    "image files with an alpha channel": ("warning", "alpha is dropped"),
    "splits that name different classes": ("error", "give both the same categories"),
}
# Empty, absolute (also as Windows writes it), with ".." between separators, or with NUL.
_UNSAFE_NAME = re.compile(r"\A\Z|\A[/\\]|\A[a-zA-Z]:[/\\]|(\A|[/\\])\.\.([/\\]|\Z)|\0")
_GAP = re.compile(rb"}\s*(,)\s*{")  # between two objects of a list, or within a text

_Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Float = Annotated[float, msgspec.Meta(ge=-1.7976931348623157e308, le=1.7976931348623157e308)]


class _Image(msgspec.Struct, gc=False):
    id: _Int
    file_name: str
    width: _Int
    height: _Int


class _Annotation(msgspec.Struct, gc=False):
    id: _Int
    image_id: _Int
    category_id: _Int
    bbox: tuple[_Float, _Float, _Float, _Float]
    area: _Float = math.nan
    iscrowd: _Int | bool = NOT_GIVEN


class _Category(msgspec.Struct, gc=False):
    id: _Int
    name: str


class _Coco(msgspec.Struct):
    images: msgspec.Raw
    annotations: msgspec.Raw = msgspec.Raw(b"")
    categories: msgspec.Raw = msgspec.Raw(b"")


_LISTS: dict[str, type[msgspec.Struct]] = {
    **{"images": _Image, "annotations": _Annotation, "categories": _Category}
}
_DTYPES: dict[str, Any] = {
    **{"bbox": (np.float64, 4), "area": np.float64, "file_name": object, "name": object}
}
_EXPECTED = {
    **{"bbox": "four finite numbers", "area": "a finite number", "iscrowd": "0 or 1"},
    **{"file_name": "text", "name": "text"},
}


@dataclass(frozen=True)
class Annotations:
    """A COCO file as arrays: I images in file order, N annotations grouped by image.

    Attributes:
        path: the JSON file.
        image_ids: `[I]` int64.
        sizes: `[I, 2]` int32 (H, W), pixels.
        names, name_offsets: uint8 text of all file names, and `[I + 1]` where each begins.
        offsets: `[I + 1]` int64; image i has the annotations offsets[i] to offsets[i + 1].
        ids: `[N]` int64 annotation ids; within an image in file order.
        boxes_xywh: `[N, 4]` float64 as in the file, pixels.
        area: `[N]` float64, square pixels (w * h where the file has none).
        iscrowd: `[N]` bool (False where the file has none).
        category_index: `[N]` int32 into `categories`.
        categories: (id, name), ascending by id.
        is_annotated: False if the file has no list of annotations, so that nothing can be scored.
    """

    path: Path
    image_ids: np.ndarray
    sizes: np.ndarray
    names: np.ndarray
    name_offsets: np.ndarray
    offsets: np.ndarray
    ids: np.ndarray
    boxes_xywh: np.ndarray
    area: np.ndarray
    iscrowd: np.ndarray
    category_index: np.ndarray
    categories: tuple[tuple[int, str], ...]
    is_annotated: bool = True

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, image: int) -> str:
        """Return the file name of image number `image`, relative to the image folder."""
        start, end = self.name_offsets[image : image + 2]
        return self.names[start:end].tobytes().decode()

    def image_of_annotation(self) -> np.ndarray:
        """Return `[N]` int64, the image number of each annotation."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def fingerprint(self) -> str:
        """Return a hash of all that training sees of the annotations."""
        content = hashlib.sha256(json.dumps(self.categories).encode())
        for array in (self.image_ids, self.sizes, self.names, self.offsets, self.boxes_xywh):
            content.update(np.ascontiguousarray(array).data)
        content.update(self.category_index.tobytes() + self.iscrowd.tobytes())
        return content.hexdigest()

    def summary(self, per_part: int | None = None) -> dict[str, Any]:
        """Return what `differences` needs to compare other annotations with these: 50 KB at most.

        Args:
            per_part: images that share a hash; by default so many that there are 1024 hashes.
        """
        per_part = per_part or max(1, math.ceil(len(self) / 1024))
        starts = range(0, len(self), per_part)
        parts = []
        for start in starts:
            end = min(start + per_part, len(self))
            letters = slice(*self.name_offsets[[start, end]])
            boxes = slice(*self.offsets[[start, end]])
            content = hashlib.sha256(self.names[letters].tobytes())
            for array in (self.image_ids[start:end], self.sizes[start:end]):
                content.update(array.tobytes())
            content.update(np.diff(self.offsets[start : end + 1]).tobytes())
            for array in (self.boxes_xywh, self.category_index, self.iscrowd):
                content.update(array[boxes].tobytes())
            parts.append(content.hexdigest()[:16])
        counts = np.bincount(self.category_index, minlength=len(self.categories))
        return {
            "images": len(self),
            "boxes": len(self.ids),
            "classes": {name: int(n) for (_, name), n in zip(self.categories, counts, strict=True)},
            "per_part": per_part,
            "parts": parts,
            "first_ids": self.image_ids[::per_part].tolist(),
        }


def differences(what: str, old: dict[str, Any] | None, annotations: Annotations) -> str:
    """Say how annotations, called `what`, differ from those of a `summary`, None if unknown."""
    if old is None:
        return f"{what}: changed (this checkpoint does not remember how it was)"
    new = annotations.summary(old["per_part"])
    told = [f"{n} {old[n]} → {new[n]}" for n in ("images", "boxes") if old[n] != new[n]]
    gone = [name for name in old["classes"] if name not in new["classes"]]
    added = [name for name in new["classes"] if name not in old["classes"]]
    for verb, names in (("removed", gone), ("added", added)):
        if names:
            told.append(f"classes {verb}: {_some(names)}")
    counts = [
        f"{name} {count} → {new['classes'][name]}"
        for name, count in old["classes"].items()
        if new["classes"].get(name, count) != count
    ]
    if counts:
        told.append(f"boxes by class: {_some(counts)}")
    pairs = zip(old["parts"], new["parts"], strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        place = min(len(old["parts"]), len(new["parts"]))
    if place < max(len(old["parts"]), len(new["parts"])):
        ids = (old if place < len(old["parts"]) else new)["first_ids"]
        size = old["per_part"]
        where = "at" if size == 1 else f"within the {size} images that begin with"
        told.append(f"the first difference is {where} image id {ids[place]}")
    return f"{what}: {', '.join(told or ['ids of classes changed'])}"


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - 5} more" if len(texts) > 5 else ""
    return ", ".join(texts[:5]) + more


@dataclass(frozen=True)
class Finding:
    """All cases of one thing wrong with a data set: the first ten, the count, the fix or rule."""

    severity: str  # "error" or "warning"
    what: str
    cases: tuple[str, ...]
    count: int
    fix: str

    def __str__(self) -> str:
        more = f" and {self.count - len(self.cases)} more" if self.count > len(self.cases) else ""
        return f"{self.severity}: {self.what}: {', '.join(self.cases)}{more} ({self.fix})"


def finding(
    what: str, cases: Sequence[Any] | np.ndarray, show: Callable[[Any], str] = str
) -> list[Finding]:
    """Return one `Finding` over `cases` of the rule `what`, or none where there are no cases.

    Args:
        what: a key of `RULES`; any other is an error to be corrected.
        cases: a list or array, or `[n]` bool that says of each number whether it is a case.
        show: what to print of a case.
    """
    if isinstance(cases, np.ndarray) and cases.dtype == bool:
        cases = np.flatnonzero(cases)
    if len(cases) == 0:
        return []
    severity, fix = RULES.get(what, ("error", "correct it"))
    return [Finding(severity, what, tuple(map(show, cases[:10])), len(cases), fix)]


def read_annotations(path: Path) -> tuple[Annotations, list[Finding]]:
    """Read a COCO JSON file into arrays, checked by every rule that needs no image.

    Returns:
        The arrays, and the warnings.

    Raises:
        UserError: with all errors listed, if the file is missing, is not such JSON, or has errors
            in it.
    """
    annotations, findings = examine(path)
    require_no_errors(path, findings)
    assert annotations is not None
    return annotations, findings


def require_no_errors(path: Path, findings: Sequence[Finding]) -> None:
    """Raise UserError that lists all errors among `findings` about `path`, if there are any."""
    errors = [found for found in findings if found.severity == "error"]
    if errors:
        raise UserError("\n  ".join([f"{path} cannot be used", *map(str, errors)]))


def examine(path: Path) -> tuple[Annotations | None, list[Finding]]:
    """Read a COCO JSON file; return arrays where it has COCO's shape, and all findings.

    With errors the arrays only serve to look further: annotations whose image or category does not
    exist are not in them. If all errors are among `UNANNOTATED`, they serve to detect.

    Raises:
        UserError: if there is no such file.
    """
    if not path.is_file():
        raise UserError(f"the annotation file {path} does not exist; check --data-path")
    if path.stat().st_size == 0:
        return None, finding("annotation file that is empty", [path.name])
    with path.open("rb") as file:  # a private copy, of which only pages written to take room
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        _require_utf8(data)
        spans = _find_lists(data)
        found = _repeated_lists(data, spans)
        columns = [
            _columns(_decode_in_pieces(data, *spans[name], kind) if name in spans else [[]], kind)
            for name, kind in _LISTS.items()
        ]
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return _diagnose(path, str(error))
    annotations, more = _check(path, *columns)
    if "annotations" not in spans:
        annotations = dataclasses.replace(annotations, is_annotated=False)
        more = [other for other in more if other.what != "categories without boxes"]
        found += finding("no list of annotations", ["$.annotations"])
    return annotations, found + more


def _check(
    path: Path,
    images: dict[str, np.ndarray],
    rows: dict[str, np.ndarray],
    categories: dict[str, np.ndarray],
) -> tuple[Annotations, list[Finding]]:
    """Apply the rules on what the lists say, and pack them."""
    by_id = np.argsort(categories["id"], kind="stable")
    categories = {field: column[by_id] for field, column in categories.items()}
    rows["image"] = _positions(images["id"], rows["image_id"])
    rows["category"] = _positions(categories["id"], rows["category_id"])
    with np.errstate(over="ignore", invalid="ignore"):  # boxes of 1e308, reported as outside
        found = _check_images(images, categories) + _check_boxes(images, rows, categories)
        return _pack(path, images, rows, categories), found


def _require_utf8(data: mmap.mmap) -> None:
    """Raise UnicodeDecodeError unless all is UTF-8; msgspec does not look at what it skips."""
    if np.frombuffer(data, np.uint8).max() < 128:
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), PIECE):
        decoder.decode(data[start : start + PIECE])
    decoder.decode(b"", final=True)


def _find_lists(data: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Return where the value of each of `_LISTS` begins and ends, having seen that all is JSON.

    Annotations may be missing, and then categories may be, too.
    """
    coco, base = msgspec.json.decode(data, type=_Coco), np.frombuffer(data, np.uint8).ctypes.data
    if coco.annotations and not coco.categories:
        raise msgspec.ValidationError("the categories are missing")
    given = [name for name in _LISTS if getattr(coco, name)]
    views = {name: np.frombuffer(getattr(coco, name), np.uint8) for name in given}
    starts = {name: view.ctypes.data - base for name, view in views.items()}
    return {name: (start, start + len(views[name])) for name, start in starts.items()}


def _repeated_lists(data: mmap.mmap, spans: dict[str, tuple[int, int]]) -> list[Finding]:
    """Find a second "annotations", say: JSON readers take the last and drop the others unseen."""
    rest, done = b"", 0
    for start, end in sorted(spans.values()):
        rest, done = rest + data[done:start] + b"0", end
    names = [name for name, _ in json.loads(rest + data[done:], object_pairs_hook=list)]
    twice = [f"$.{name}" for name in _LISTS if names.count(name) > 1]
    return finding("list given twice, of which one would be lost", twice)


def _columns(pieces: Iterable[list[Any]], kind: type[msgspec.Struct]) -> dict[str, np.ndarray]:
    """Turn a list of objects, which comes in pieces, into one array per field."""
    parts: dict[str, list[np.ndarray]] = {field: [] for field in kind.__struct_fields__}
    for rows in pieces:
        for field, part in parts.items():
            dtype = _DTYPES.get(field, np.int64)
            part.append(np.fromiter(map(attrgetter(field), rows), dtype, len(rows)))
    return {field: np.concatenate(part) for field, part in parts.items()}


def _decode_in_pieces(
    data: mmap.mmap, start: int, end: int, kind: type[msgspec.Struct]
) -> Iterator[list[Any]]:
    """Decode the JSON list that is `data[start:end]` some megabytes at a time.

    To save copying, a bracket is written over the comma where a piece ends and the next begins.
    Where that is, is a guess: `_GAP` may also stand within a text, or deeper down. But what begins
    with an object and is a valid list up to the cut ends with an object; else the cut moves on.

    Raises:
        msgspec.DecodeError: if it is not a list of such objects.
    """
    decoder, text = msgspec.json.Decoder(list[kind]), memoryview(data)  # type: ignore[valid-type]
    comma = start
    while gap := _GAP.search(data, max(comma, start + PIECE), end):
        comma = gap.start(1)
        data[comma] = ord("]")
        try:
            rows = decoder.decode(text[start : comma + 1])
        except msgspec.ValidationError:  # also a DecodeError, but no matter of where to cut
            raise
        except msgspec.DecodeError:
            data[comma] = ord(",")
            continue
        yield rows
        start, data[comma] = comma, ord("[")
    yield decoder.decode(text[start:end])


def _pack(
    path: Path,
    images: dict[str, np.ndarray],
    rows: dict[str, np.ndarray],
    categories: dict[str, np.ndarray],
) -> Annotations:
    """Group annotations by image, and leave out those whose image or category does not exist."""
    names = [name.encode() for name in images["file_name"]]
    order = np.argsort(rows["image"], kind="stable")
    order = order[(rows["image"][order] >= 0) & (rows["category"][order] >= 0)]
    boxes, area = rows["bbox"][order], rows["area"][order]
    sizes = np.stack([images["height"], images["width"]], axis=1)
    return Annotations(
        path=path,
        image_ids=images["id"],
        sizes=sizes.clip(-1, 2**31 - 1).astype(np.int32),
        names=np.frombuffer(b"".join(names), dtype=np.uint8),
        name_offsets=np.cumsum([0, *map(len, names)], dtype=np.int64),
        offsets=np.searchsorted(rows["image"][order], np.arange(len(names) + 1)),
        ids=rows["id"][order],
        boxes_xywh=boxes,
        area=np.where(np.isnan(area), boxes[:, 2] * boxes[:, 3], area),
        iscrowd=rows["iscrowd"][order] == 1,
        category_index=rows["category"][order].astype(np.int32),
        categories=tuple(zip(categories["id"].tolist(), categories["name"], strict=True)),
    )


def _check_images(
    images: dict[str, np.ndarray], categories: dict[str, np.ndarray]
) -> list[Finding]:
    ids, names, width, height = (images[k] for k in ("id", "file_name", "width", "height"))
    is_unsafe = [number for number, name in enumerate(names) if _UNSAFE_NAME.search(name)]
    too_large = width.astype(np.float64) * height > MAX_PIXELS

    def named(number: int) -> str:
        return f"{ids[number]} {names[number]!r}"

    def sized(number: int) -> str:
        return f"{ids[number]} {names[number]!r} of {width[number]} x {height[number]}"

    return [
        *finding("no images", [] if len(ids) else ["$.images"]),
        *finding("no categories", [] if len(categories["id"]) else ["$.categories"]),
        *finding("image ids that occur twice", _repeated(ids)),
        *finding("category ids that occur twice", _repeated(categories["id"])),
        *finding("category names that occur twice", _repeated(categories["name"])),
        *finding("width or height not positive", (width <= 0) | (height <= 0), sized),
        *finding("images over 89 megapixels", too_large, sized),
        *finding("file_name not below the image folder", is_unsafe, named),
        *finding("images that share a file", _repeated(names), repr),
    ]


def _check_boxes(
    images: dict[str, np.ndarray], rows: dict[str, np.ndarray], categories: dict[str, np.ndarray]
) -> list[Finding]:
    ids, boxes, crowd = rows["id"], rows["bbox"], rows["iscrowd"]
    limit = np.stack([images["width"], images["height"]], axis=1)
    limit = np.append(limit, [[2**31, 2**31]], axis=0)[rows["image"]]  # [N, 2]; -1 is no limit
    is_flat = (boxes[:, 2] <= 0) | (boxes[:, 3] <= 0)
    is_lost = ~is_flat & ~has_extent(clip(to_xyxy(boxes), limit.astype(np.float32)))
    ends = boxes[:, :2] + boxes[:, 2:]
    is_cut = ((boxes[:, :2] < -MIN_SIDE) | (ends > limit + MIN_SIDE)).any(axis=1)
    is_used = np.isin(categories["id"], rows["category_id"])
    is_missing = np.isin(crowd, NOT_GIVEN)
    is_known = np.isin(crowd, (0, 1)) | is_missing

    def box(row: int) -> str:
        return f"{ids[row]} {boxes[row].tolist()}"

    def of(field: str) -> Callable[[int], str]:
        return lambda row: f"{ids[row]} ({field} {rows[field][row]})"

    return [
        *finding("annotation ids that occur twice", _repeated(ids)),
        *finding("annotations of an unknown image_id", rows["image"] < 0, of("image_id")),
        *finding("annotations of an unknown category_id", rows["category"] < 0, of("category_id")),
        *finding("annotations with iscrowd other than 0 or 1", ~is_known, of("iscrowd")),
        *finding("annotations without iscrowd", ids[is_missing]),
        *finding("annotations without area", ids[np.isnan(rows["area"])]),
        *finding("annotations with the id 0", np.isin(ids, 0), of("image_id")),
        *finding("boxes without width or height", is_flat, box),
        *finding("boxes outside of their image, or thinner than 0.001 px", is_lost, box),
        *finding("boxes partly outside of their image", is_cut & ~is_lost & ~is_flat, box),
        *finding("categories without boxes", categories["name"][~is_used]),
    ]


def _positions(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return where each of `wanted` stands in `ids` (-1: nowhere)."""
    if len(ids) == 0:
        return np.full(len(wanted), -1)
    order = np.argsort(ids, kind="stable")
    place = order[np.clip(np.searchsorted(ids, wanted, sorter=order), 0, len(ids) - 1)]
    return np.where(ids[place] == wanted, place, -1)


def _repeated(values: np.ndarray) -> np.ndarray:
    values = np.sort(values)
    return np.unique(values[1:][values[1:] == values[:-1]])


def to_xyxy(boxes_xywh: np.ndarray) -> np.ndarray:
    """Convert `[n, 4]` float64 to float32, in torchvision's order of operations."""
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows lies outside in any case
        xywh = boxes_xywh.astype(np.float32)
        return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


def clip(boxes: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Clip `[n, 4]` xyxy boxes to `limit` (W, H), `[n, 2]` or `[2]`."""
    corners = [np.clip(boxes[:, :2], 0, limit), np.clip(boxes[:, 2:], 0, limit)]
    return np.concatenate(corners, axis=1)


def has_extent(boxes: np.ndarray) -> np.ndarray:
    """Return `[n]` bool: whether xyxy boxes are `MIN_SIDE` wide and high."""
    return (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)


def _diagnose(path: Path, message: str) -> tuple[Annotations | None, list[Finding]]:
    """Find everything that keeps a file from being COCO JSON; slow, for files that failed.

    Where only annotations are wrong, the others are held to all other rules, and returned.
    """
    other = finding("annotation file that is not COCO's", [message])
    if os.path.getsize(path) > DIAGNOSED:
        return None, other
    data = path.read_bytes()
    try:
        document = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, finding("annotation file that is not UTF-8", [f"byte {error.start}"])
    except (ValueError, RecursionError) as error:
        bom = data.startswith(codecs.BOM_UTF8)
        what = "not UTF-8" if bom else "not JSON, or cut short"
        return None, finding(f"annotation file that is {what}", ["byte 0" if bom else error])
    if not isinstance(document, dict):
        is_list = isinstance(document, list)
        seen = "$ is a list, as in a file of detections" if is_list else "$ is no object"
        return None, finding("annotation file that is not COCO's", [seen])
    found: list[Finding] = []
    wrong = {
        name: _wrong_rows(document.get(name), name, kind, found) for name, kind in _LISTS.items()
    }
    if (
        not found
        or wrong["images"] != set()
        or wrong["categories"] != set()
        or (wrong["annotations"] is None)
    ):
        return None, found or other
    rest = [row for i, row in enumerate(document["annotations"]) if i not in wrong["annotations"]]
    lists = document | {"annotations": rest}
    columns = [
        _columns([msgspec.convert(lists[name], list[kind])], kind)  # type: ignore[valid-type]
        for name, kind in _LISTS.items()
    ]
    annotations, more = _check(path, *columns)
    # Of a part of the boxes warnings, such as of classes without any, would mislead.
    return annotations, found + [error for error in more if error.severity == "error"]


def _wrong_rows(
    rows: Any, name: str, kind: type[msgspec.Struct], found: list[Finding]
) -> set[int] | None:
    """Return which rows of a list are not of its kind, None if it is no list; add to `found`."""
    if not isinstance(rows, list):
        found += finding("list missing", [f"$.{name}"])
        return None
    places = [i for i, row in enumerate(rows) if not isinstance(row, dict)]
    found += finding("entries that are not an object", [f"$.{name}[{i}]" for i in places])
    wrong = set(places)
    for field in msgspec.structs.fields(kind):
        what = f"{field.name} that is not {_EXPECTED.get(field.name, 'a 64-bit integer')}"
        misfits = [
            i for i, row in enumerate(rows) if isinstance(row, dict) and not _fits(row, field)
        ]
        shown = [
            f"$.{name}[{i}].{field.name} {_quote(rows[i], field.name)} (id {rows[i].get('id')})"
            for i in misfits
        ]
        found += finding(what, shown)
        wrong |= set(misfits)
    return wrong


def _fits(row: dict[str, Any], field: msgspec.structs.FieldInfo) -> bool:
    if field.name not in row:
        return not field.required
    try:
        msgspec.json.encode(msgspec.convert(row[field.name], field.type))
    except (msgspec.MsgspecError, ValueError, OverflowError):  # half a surrogate pair, 10**400
        return False
    return True


def _quote(row: dict[str, Any], field: str) -> str:
    return f"= {json.dumps(row[field])[:60]}" if field in row else "is missing"
