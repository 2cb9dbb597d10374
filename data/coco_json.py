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

from utils import UserError, file_errors, printable

MAX_PIXELS = 89_478_485  # Pillow's limit against decompression bombs: 2**30 / 4 / 3
# A side below this many pixels may round to zero when the model resizes it, and log(0) is NaN.
MIN_SIDE = 1e-3
PIECE = 2**24  # bytes of JSON decoded at a time: the structs of a file fill more room than it does
DIAGNOSED = 2**31  # bytes up to which Python reads a broken file again, to list every fault
NOT_GIVEN = -(2**62)  # stands for a missing iscrowd, or a missing annotation id
LINE = 200  # characters that a finding may take
# Statistics of boxes are conclusive from so many on.
FEW_BOXES = 4

# What can be wrong with a data set: severity, and the fix, or what is done about it.
_SHAPE = ("error", "give it COCO's layout, https://cocodataset.org/#format-data")
_UNIQUE = ("error", "make them unique")
# What a file of images to be submitted, such as COCO's image_info_test-dev2017.json, may lack.
UNANNOTATED = ("no list of annotations", "no categories")
RULES = {
    "annotation file that is empty": ("error", "export it again"),
    "annotation file in UTF-16 or UTF-32": (
        "error",
        "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW; UTF-32 likewise",
    ),
    "annotation file that is not UTF-8": ("error", "save it as UTF-8"),
    "annotation file that is not JSON, or cut short": (
        "error",
        "correct it there, or export again",
    ),
    "annotation file with a byte order mark": ("warning", "skipped"),
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
    "whole numbers written as 1.0": ("warning", "read as 1"),
    "whole numbers written as text": ("warning", "read as numbers"),
    "bbox with numbers written as text": ("error", "write the numbers without quotes"),
    "image ids that occur twice": _UNIQUE,
    "annotation ids that occur twice": _UNIQUE,
    "annotations without id": ("warning", "all are numbered by their place in the file"),
    "annotation ids that start again in each image": (
        "warning",
        "all are numbered by their place in the file",
    ),
    "category ids that occur twice": _UNIQUE,
    "category names that occur twice": _UNIQUE,
    "unused categories with the name of another": ("warning", "left out"),
    "categories named background": (
        "warning",
        "kept as classes; remove them, as the model has a background of its own",
    ),
    "images without width or height": ("warning", "taken from the image as viewers show it"),
    "width or height not positive": ("error", "give the image's size in pixels"),
    "width and height that are swapped": ("error", "write each in the place of the other"),
    "images over 89 megapixels": ("error", "make them smaller"),
    "file_name not below the image folder": (
        "error",
        "give the path relative to the image folder, without '..', NUL or drive",
    ),
    "annotations of an unknown image_id": ("warning", "left out, as where a subset was cut"),
    "annotations that all are of an unknown image_id": (
        "error",
        "give the ids that the images have",
    ),
    "image_id shifted by one against the images": ("error", "number both alike"),
    "category_id shifted by one against the categories": ("error", "number both alike"),
    "annotations of an unknown category_id": ("error", "remove them, or add the category"),
    "annotations with iscrowd other than 0 or 1": ("error", "correct it"),
    "annotations without iscrowd": ("warning", "taken as 0"),
    "annotations without area": ("warning", "taken as w * h"),
    "boxes that look like shares of the image": (
        "error",
        "multiply x and w by the width, y and h by the height",
    ),
    "boxes that look like x1 y1 x2 y2": (
        "warning",
        "are they? COCO has x y w h; look at them with tools.check_data --plot",
    ),
    "no box to train on": (
        "error",
        "correct the boxes; or, if images without boxes are meant, --keep-empty",
    ),
    "no box to evaluate with": ("warning", "AP will be -1"),
    "annotations with the id 0": ("warning", "gets another id to evaluate: pycocotools loses 0"),
    "boxes without width or height": ("warning", "not trained on"),
    "boxes outside of their image, or thinner than 0.001 px": ("warning", "not trained on"),
    "boxes partly outside of their image": ("warning", "clipped to train"),
    "categories without boxes": ("warning", "kept as classes"),
    "images that share a file": (
        "warning",
        "join them: each is used with its boxes only, the others' become background",
    ),
    "annotations that cannot be cached": ("warning", "read again at every start"),
    "image files missing": ("error", "add them, or take them out of the annotations"),
    "file names with a backslash": ("warning", "read as /"),
    "file names that are URL-encoded": ("warning", "decoded: %20 is a space"),
    "file names that repeat the image folder": ("warning", "used without it"),
    "file names with a suffix in another case": ("warning", "the file is used"),
    "image files outside of the image folder": ("error", "copy them into it"),
    "image files that cannot be read": ("error", "see to the permissions, or the disk"),
    "image files that are empty": ("error", "copy them again, or take them out"),
    "image files of another format": ("error", "convert them: magick FILE NEW.png"),
    "image files that are damaged": ("error", "copy them again, or take them out"),
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
    "classes of training that val does not name": ("warning", "matched by name"),
    "classes with another id in val": ("warning", "matched by name"),
    "annotation file that is both train and val": (
        "warning",
        "give other images to evaluate on: scores on these say nothing",
    ),
    "images that are in train and val": ("warning", "take them out of one: scores on them mislead"),
}
# Empty, absolute (also as Windows writes it), with ".." between separators, or with NUL.
_UNSAFE_NAME = re.compile(r"\A\Z|\A[/\\]|\A[a-zA-Z]:[/\\]|(\A|[/\\])\.\.([/\\]|\Z)|\0")
_NUMERAL = re.compile(r"-?[0-9]{1,18}")
_GAP = re.compile(rb"}\s*(,)\s*{")  # between two objects of a list, or within a text

_Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Float = Annotated[float, msgspec.Meta(ge=-1.7976931348623157e308, le=1.7976931348623157e308)]


class _Image(msgspec.Struct, gc=False):
    id: _Int
    file_name: str
    width: _Int = 0
    height: _Int = 0


class _Annotation(msgspec.Struct, gc=False, kw_only=True):
    id: _Int = NOT_GIVEN
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
        sizes: `[I, 2]` int32 (H, W), pixels; 0 where the file has none (`coco_utils.locate_images`
            takes them from the images).
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
        """Return one line of at most `LINE` characters, with the count and the fix."""
        head = f"{self.severity}: {self.what}"
        head += f" ({self.count:,}): " if self.count > 1 else ": "
        tail = f" ({self.fix})"
        for shown in range(len(self.cases), 0, -1):
            more = ", …" if self.count > shown else ""
            cases = ", ".join(map(one_line, self.cases[:shown])) + more
            if len(head + cases + tail) <= LINE:
                return head + cases + tail
        more = ", …" if self.count > 1 else ""
        room = max(20, LINE - len(head + more + tail))
        return head + one_line("".join(self.cases[:1]), room) + more + tail


def one_line(text: str, length: int = LINE) -> str:
    """Return `text` as one line of printable characters, its middle cut if it is too long."""
    text = printable(text)
    if len(text) <= length:
        return text
    end = (length - 1) * 2 // 3  # of a path the end tells more
    return text[: length - 1 - end] + "…" + text[-end:]


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
    data = _read(path)
    bom: list[Finding] = []
    if data[:3] == codecs.BOM_UTF8:
        data[:3] = b"   "
        bom = finding("annotation file with a byte order mark", [path.name])
    try:
        _require_utf8(data)
        spans = _find_lists(data)
        found = _repeated_lists(data, spans)
        columns = [
            _columns(_decode_in_pieces(data, *spans[name], kind) if name in spans else [[]], kind)
            for name, kind in _LISTS.items()
        ]
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        annotations, found = _read_leniently(path, str(error))
        return annotations, bom + found
    annotations, more = _check(path, *columns)
    if "annotations" not in spans:
        annotations = dataclasses.replace(annotations, is_annotated=False)
        more = [other for other in more if other.what != "categories without boxes"]
        found += finding("no list of annotations", ["$.annotations"])
    return annotations, bom + found + more


def _read(path: Path) -> mmap.mmap:
    """Return a copy of a file, in memory that goes back to the system when it is no longer used.

    The file itself is not mapped: if somebody cuts it meanwhile, the process would get SIGBUS.

    Raises:
        UserError: if the file cannot be read, or becomes shorter meanwhile.
    """
    with file_errors("read", path), path.open("rb") as file:
        data = mmap.mmap(-1, max(1, os.fstat(file.fileno()).st_size))
        done = 0
        while count := file.readinto(memoryview(data)[done:]):
            done += count
    if done < len(data):
        raise UserError(f"{path} became shorter while it was read; start again when it is complete")
    return data


def _check(
    path: Path,
    images: dict[str, np.ndarray],
    rows: dict[str, np.ndarray],
    categories: dict[str, np.ndarray],
) -> tuple[Annotations, list[Finding]]:
    """Apply the rules on what the lists say, and pack them."""
    found = _leave_out_doubles(rows, categories) + _number_annotations(rows)
    by_id = np.argsort(categories["id"], kind="stable")
    categories = {field: column[by_id] for field, column in categories.items()}
    rows["image"] = _positions(images["id"], rows["image_id"])
    rows["category"] = _positions(categories["id"], rows["category_id"])
    with np.errstate(over="ignore", invalid="ignore"):  # boxes of 1e308, reported as outside
        found += _check_images(images, categories) + _check_rows(images, rows, categories)
        annotations = _pack(path, images, rows, categories)
        if (annotations.sizes != 0).all():  # else `coco_utils.locate_images` finds the sizes first
            found += check_boxes(annotations)
        return annotations, found


def _leave_out_doubles(
    rows: dict[str, np.ndarray], categories: dict[str, np.ndarray]
) -> list[Finding]:
    """Leave out categories without boxes that have the name of another, as Roboflow writes them.

    Where no category of a name has boxes, the one with the highest id stays.
    """
    ids, names = categories["id"], categories["name"]
    if len(_repeated(names)) == 0:
        return []
    is_used = np.isin(ids, rows["category_id"])
    is_double = np.zeros(len(ids), bool)
    for name in _repeated(names):
        same = np.flatnonzero(names == name)
        kept = same[is_used[same]] if is_used[same].any() else same[[ids[same].argmax()]]
        is_double[np.setdiff1d(same, kept)] = True
    is_double &= ~np.isin(ids, _repeated(ids))  # two of one id are an error of their own
    doubles = [f"{ids[i]} {names[i]!r}" for i in np.flatnonzero(is_double)]
    for field, column in categories.items():
        categories[field] = column[~is_double]
    return finding("unused categories with the name of another", doubles)


def _number_annotations(rows: dict[str, np.ndarray]) -> list[Finding]:
    """Number annotations by their place where ids are missing or are unique within images only.

    No id is used elsewhere. An id twice in one image may be a box twice, and is an error.
    """
    ids, images = rows["id"], rows["image_id"]
    places = np.arange(1, len(ids) + 1)
    is_missing = np.isin(ids, NOT_GIVEN)
    if is_missing.any():
        rows["id"] = places
        return finding("annotations without id", places[is_missing], lambda i: f"number {i}")
    repeated = _repeated(ids)
    if len(repeated) == 0:
        return []
    order = np.lexsort((ids, images))
    is_same = (np.diff(ids[order]) == 0) & (np.diff(images[order]) == 0)
    if is_same.any():
        return finding("annotation ids that occur twice", np.unique(ids[order][1:][is_same]))
    rows["id"] = places
    return finding("annotation ids that start again in each image", repeated)


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
    is_unsafe = [number for number, name in enumerate(names) if is_unsafe_name(name)]
    is_unknown = (width == 0) | (height == 0)
    background = [name for name in categories["name"] if name.strip("_ ").lower() == "background"]
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
        *finding("categories named background", background, repr),
        *finding("images without width or height", is_unknown, named),
        *finding("width or height not positive", (width < 0) | (height < 0), sized),
        *finding("images over 89 megapixels", too_large, sized),
        *finding("file_name not below the image folder", is_unsafe, named),
        *finding("images that share a file", _repeated(names), repr),
    ]


def is_unsafe_name(name: str) -> bool:
    """Return whether a file name leads out of the image folder, or is none."""
    return _UNSAFE_NAME.search(name) is not None


def _check_rows(
    images: dict[str, np.ndarray], rows: dict[str, np.ndarray], categories: dict[str, np.ndarray]
) -> list[Finding]:
    """Apply the rules on annotations that need no size of an image."""
    ids, crowd = rows["id"], rows["iscrowd"]
    is_used = np.isin(categories["id"], rows["category_id"])
    is_missing = np.isin(crowd, NOT_GIVEN)
    is_known = np.isin(crowd, (0, 1)) | is_missing
    is_lost = rows["image"] < 0
    if len(images["id"]) and is_lost.all():
        unknown = "annotations that all are of an unknown image_id"
    else:
        unknown = "annotations of an unknown image_id"

    def of(field: str) -> Callable[[int], str]:
        return lambda row: f"{ids[row]} ({field} {rows[field][row]})"

    return [
        *finding(unknown, is_lost, of("image_id")),
        *_find_shift("image_id shifted by one against the images", images, rows["image_id"]),
        *finding("annotations of an unknown category_id", rows["category"] < 0, of("category_id")),
        *_find_shift(
            "category_id shifted by one against the categories", categories, rows["category_id"]
        ),
        *finding("annotations with iscrowd other than 0 or 1", ~is_known, of("iscrowd")),
        *finding("annotations without iscrowd", ids[is_missing]),
        *finding("annotations without area", ids[np.isnan(rows["area"])]),
        *finding("annotations with the id 0", np.isin(ids, 0), of("image_id")),
        *finding("categories without boxes", categories["name"][~is_used]),
    ]


def _find_shift(what: str, entries: dict[str, np.ndarray], wanted: np.ndarray) -> list[Finding]:
    """Find ids of which some are unknown, and all are known after adding or taking off 1."""
    ids, wanted = np.unique(entries["id"]), np.unique(wanted)
    if len(ids) == 0 or len(wanted) == 0 or np.isin(wanted, ids).all():
        return []
    shifts = [shift for shift in (1, -1) if np.isin(wanted + shift, ids).all()]
    spans = f"{wanted[0]} to {wanted[-1]}, but the ids are {ids[0]} to {ids[-1]}"
    return finding(what, [spans] if shifts else [])


def check_boxes(annotations: Annotations) -> list[Finding]:
    """Hold all boxes to the sizes of their images, which must be known."""
    ids, boxes = annotations.ids, annotations.boxes_xywh
    with np.errstate(over="ignore", invalid="ignore"):  # boxes of 1e308, reported as outside
        limit = annotations.sizes[annotations.image_of_annotation(), ::-1]  # [N, 2]
        is_flat = (boxes[:, 2] <= 0) | (boxes[:, 3] <= 0)
        is_lost = ~is_flat & ~has_extent(clip(to_xyxy(boxes), limit.astype(np.float32)))
        is_out = boxes[:, :2] + boxes[:, 2:] > limit + MIN_SIDE  # [N, 2]
        is_cut = ((boxes[:, :2] < -MIN_SIDE) | is_out).any(axis=1) & ~is_lost & ~is_flat
        is_share = ((boxes >= 0) & (boxes <= 1)).all(axis=1) & ~is_flat
        most = is_share.sum() >= FEW_BOXES and is_share.sum() * 2 > (~is_flat).sum()
        if not most or (boxes[is_share] % 1 == 0).all():
            is_share[:] = False

    def box(row: int) -> str:
        return f"{ids[row]} {[float(f'{number:.6g}') for number in boxes[row]]}"

    return [
        *finding("boxes without width or height", is_flat, box),
        *finding("boxes outside of their image, or thinner than 0.001 px", is_lost, box),
        *finding("boxes partly outside of their image", is_cut, box),
        *finding("boxes that look like shares of the image", is_share, box),
        *finding(
            "boxes that look like x1 y1 x2 y2", _corner_statistics(boxes[~is_flat], limit[~is_flat])
        ),
    ]


def _corner_statistics(boxes: np.ndarray, limit: np.ndarray) -> list[str]:
    """Say how boxes (x, y, w, h) show that they hold two corners; nothing where they do not.

    All but 2 % must be right as corners, within the image. And a tenth must leave it as x y w h, or
    the third and fourth number grow with the first and second, against which w and h fall.
    """
    if len(boxes) < FEW_BOXES:
        return []
    first, last = boxes[:, :2], boxes[:, 2:]
    if (last[:, 0] > first[:, 0]).mean() < 0.98:  # so for most sets, and quickly seen
        return []
    fits = ((first >= 0) & (last > first) & (last <= limit + 1)).all(axis=1)
    leaves = (first + last > limit + 1).any(axis=1)
    if fits.mean() < 0.98:
        return []
    if leaves.mean() >= 0.1:
        return [
            f"{leaves.sum():,} of {len(boxes):,} leave the image as x y w h, {(~fits).sum()} so"
        ]
    if len(boxes) < 10 * FEW_BOXES:
        return []
    first, last = first / limit, last / limit
    if (first.std(axis=0) == 0).any() or (last.std(axis=0) == 0).any():
        return []
    x, y = (float(np.corrcoef(first[:, axis], last[:, axis])[0, 1]) for axis in (0, 1))
    if min(x, y) < 0.5:
        return []
    return [f"w grows with x, and h with y, in {len(boxes):,} boxes (correlation {x:.2f}, {y:.2f})"]


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


def _read_leniently(path: Path, message: str) -> tuple[Annotations | None, list[Finding]]:
    """Read a file that the strict reader refused: mend what has one meaning, list what is wrong.

    Slow, as Python reads it. Where only annotations are wrong, the others are held to all other
    rules, and returned.
    """
    other = finding("annotation file that is not COCO's", [message])
    if os.path.getsize(path) > DIAGNOSED:
        return None, other
    document, found = _parse(path.read_bytes())
    if document is None and found:
        return None, found
    if not isinstance(document, dict):
        is_list = isinstance(document, list)
        seen = "$ is a list, as in a file of detections" if is_list else "$ is no object"
        return None, finding("annotation file that is not COCO's", [seen])
    mended = _mend(document)
    wrong = {
        name: _wrong_rows(document.get(name), name, kind, found) for name, kind in _LISTS.items()
    }
    if wrong["images"] != set() or wrong["categories"] != set() or wrong["annotations"] is None:
        return None, mended + found
    rest = [row for i, row in enumerate(document["annotations"]) if i not in wrong["annotations"]]
    lists = document | {"annotations": rest}
    columns = [
        _columns([msgspec.convert(lists[name], list[kind])], kind)  # type: ignore[valid-type]
        for name, kind in _LISTS.items()
    ]
    annotations, more = _check(path, *columns)
    if found:  # of a part of the boxes warnings, such as of classes without any, would mislead
        more = [error for error in more if error.severity == "error"]
    return annotations, mended + found + more


def _parse(data: bytes) -> tuple[Any, list[Finding]]:
    """Read JSON as Python does; say where it is none, and which lists are given twice."""
    encoding = json.detect_encoding(data)
    if not encoding.startswith("utf-8"):
        return None, finding("annotation file in UTF-16 or UTF-32", [f"it is {encoding.upper()}"])
    outermost: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal outermost
        outermost = pairs
        return dict(pairs)

    try:
        text = data.decode(encoding)
        document = json.loads(text, object_pairs_hook=keep)
    except UnicodeDecodeError as error:
        return None, finding("annotation file that is not UTF-8", [f"byte {error.start}"])
    except json.JSONDecodeError as error:
        problem, start = error.msg.removesuffix(" at"), len(text[: error.pos].encode())
        if problem == "Extra data":
            problem = "a second value, as in JSON Lines,"
        place = f"{problem} at byte {start} (line {error.lineno})"
        return None, finding("annotation file that is not JSON, or cut short", [place])
    except (ValueError, RecursionError) as error:
        return None, finding("annotation file that is not JSON, or cut short", [error])
    names = [name for name, _ in outermost] if isinstance(document, dict) else []
    twice = [f"$.{name}" for name in _LISTS if names.count(name) > 1]
    return document, finding("list given twice, of which one would be lost", twice)


# Fields that hold whole numbers. Within a group a number written as text must be one number only.
_WHOLE = {
    "images": ("id", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "iscrowd"),
    "categories": ("id",),
}
_GROUPS = (
    (("images", "id"), ("annotations", "image_id")),
    (("categories", "id"), ("annotations", "category_id")),
    *(((name, field),) for name, field in (("annotations", "id"), ("annotations", "iscrowd"))),
    *((("images", field),) for field in ("width", "height")),
)
_ABSENT = {("images", "width"), ("images", "height")} | {
    ("annotations", field) for field in ("id", "area", "iscrowd")
}  # null and NaN say no more than a missing field does


def _mend(document: dict[str, Any]) -> list[Finding]:
    """Rewrite in place what is not COCO's type and has one meaning; return what was rewritten."""
    lists = {name: document.get(name) for name in _LISTS}
    rows: dict[str, list[Any]] = {k: v if isinstance(v, list) else [] for k, v in lists.items()}
    for name, field in _ABSENT:
        for row in rows[name]:
            if isinstance(row, dict) and field in row:
                value = row[field]
                if value is None or isinstance(value, float) and math.isnan(value):
                    del row[field]
    floats: list[tuple[str, int, str, Any]] = []
    for name, fields in _WHOLE.items():
        for i, row in enumerate(rows[name]):
            for field in fields if isinstance(row, dict) else ():
                value = row.get(field)
                if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
                    floats.append((name, i, field, value))
                    row[field] = int(value)
    texts: list[tuple[str, int, str, Any]] = []
    for group in _GROUPS:
        found = [
            (name, i, field, row[field])
            for name, field in group
            for i, row in enumerate(rows[name])
            if isinstance(row, dict) and isinstance(row.get(field), str)
        ]
        values = {value for *_, value in found}
        if not all(_NUMERAL.fullmatch(value) for value in values):
            continue
        counts = [sum(f[:1] + f[2:3] == key for f in found) for key in group]
        all_or_none = all(
            count in (0, len(rows[key[0]])) for key, count in zip(group, counts, strict=True)
        )
        is_flag = group[0][1] == "iscrowd"
        if is_flag or all_or_none and len({int(value) for value in values}) == len(values):
            for name, i, field, value in found:
                rows[name][i][field] = int(value)
            texts += found

    def show(case: tuple[str, int, str, Any]) -> str:
        name, i, field, value = case
        return f"$.{name}[{i}].{field} = {json.dumps(value)}"

    return [
        *finding("whole numbers written as 1.0", floats, show),
        *finding("whole numbers written as text", texts, show),
    ]


def _wrong_rows(
    rows: Any, name: str, kind: type[msgspec.Struct], found: list[Finding]
) -> set[int] | None:
    """Return which rows of a list are not of its kind, None if it is no list; add to `found`."""
    if not isinstance(rows, list):
        kind_of = " is an object, not a list" if isinstance(rows, dict) else ""
        found += finding("list missing", [f"$.{name}{kind_of}"])
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
        if field.name == "bbox" and all(_is_text_box(rows[i].get("bbox")) for i in misfits):
            what = "bbox with numbers written as text"
        found += finding(what, shown)
        wrong |= set(misfits)
    return wrong


def _is_text_box(box: Any) -> bool:
    return isinstance(box, list) and any(isinstance(number, str) for number in box)


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
