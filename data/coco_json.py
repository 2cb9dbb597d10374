"""Reads a COCO JSON file into arrays; segmentations are skipped, as this is box detection.

Every rule that needs no image is applied, and all findings are returned. Files that are not to the
letter of the format go through `lenient`.

Source: the COCO data format, https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from data import checks, lenient
from data.checks import Columns
from data.coco_arrays import Annotations
from data.coco_rules import Finding, finding, require_no_errors
from data.lenient import LISTS
from utils import UserError, file_errors

PIECE = 2**24  # bytes decoded at a time: the structs of a whole file fill more memory than it
_GAP = re.compile(rb"}\s*(,)\s*{")  # between two objects of a list, or within a text
_DTYPES: dict[str, Any] = {
    "bbox": (np.float64, 4),
    "area": np.float64,
    "file_name": object,
    "name": object,
}  # all others are int64


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


def examine(path: Path) -> tuple[Annotations | None, list[Finding]]:
    """Read a COCO JSON file; return arrays where it has COCO's shape, and all findings.

    With errors the arrays only serve to look further: annotations whose image or category does not
    exist are not in them. If all errors are among `UNANNOTATED`, they serve to detect.

    Raises:
        UserError: if there is no such file.
    """
    if not path.is_file():
        raise UserError(f"the annotation file {path} does not exist; check --data-path")
    data, findings = _read(path), []
    if data.startswith(codecs.BOM_UTF8):
        data[:3] = b"   "
        findings = finding("annotation file with a byte order mark", [path.name])
    is_broken = False
    try:
        _require_utf8(data)
        spans = _find_lists(data)
        findings += _repeated_lists(data, spans)
        columns = {
            name: _columns(_decode_in_pieces(data, *span, LISTS[name]), LISTS[name])
            for name, span in spans.items()
        }
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        lists, more = lenient.read(path, str(error))
        findings += more
        if lists is None:
            return None, findings
        is_broken = any(problem.severity == "error" for problem in more)
        columns = {
            name: _columns([msgspec.convert(rows, list[LISTS[name]])], LISTS[name])  # type: ignore[valid-type]
            for name, rows in lists.items()
        }
    is_annotated = "annotations" in columns
    annotations, more = checks.check(
        path, *(columns.get(name) or _columns([[]], kind) for name, kind in LISTS.items())
    )
    if is_broken:  # warnings on a part of the boxes, such as on classes without any, would mislead
        more = [error for error in more if error.severity == "error"]
    if not is_annotated:
        more = [other for other in more if other.what != "categories without boxes"]
        findings += finding("no list of annotations", ["$.annotations"])
    return dataclasses.replace(annotations, is_annotated=is_annotated), findings + more


def _read(path: Path) -> bytearray:
    """Return the bytes of a file.

    The file is not mapped into memory: if somebody cuts it meanwhile, the process would get SIGBUS.

    Raises:
        UserError: if the file cannot be read, or becomes shorter meanwhile.
    """
    with file_errors("read", path), path.open("rb") as file:
        data = bytearray(os.fstat(file.fileno()).st_size)
        if file.readinto(data) < len(data):
            raise UserError(
                f"{path} became shorter while it was read; start again when it is complete"
            )
    return data


def _require_utf8(data: bytearray) -> None:
    """Raise UnicodeDecodeError unless all is UTF-8; msgspec does not check what it skips."""
    if not data.isascii():
        pieces = (bytes(data[start : start + PIECE]) for start in range(0, len(data), PIECE))
        for _ in codecs.iterdecode(pieces, "utf-8"):
            pass


def _find_lists(data: bytearray) -> dict[str, tuple[int, int]]:
    """Return where the value of each of `LISTS` begins and ends; check that all is JSON."""
    document = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    base = np.frombuffer(data, np.uint8).ctypes.data
    spans = {}
    for name in lenient.expected_lists(document):
        if name not in document:
            raise msgspec.ValidationError(f"{name} missing")
        view = np.frombuffer(document[name], np.uint8)
        start = view.ctypes.data - base
        spans[name] = (start, start + len(view))
    return spans


def _repeated_lists(data: bytearray, spans: dict[str, tuple[int, int]]) -> list[Finding]:
    """Find a second "annotations", say: JSON readers take the last and drop the others unseen."""
    rest, done = b"", 0
    for start, end in sorted(spans.values()):
        rest, done = rest + data[done:start] + b"0", end
    return lenient.repeated_lists(json.loads(rest + data[done:], object_pairs_hook=list))


def _columns(pieces: Iterable[list[Any]], kind: type[msgspec.Struct]) -> Columns:
    """Turn a list of objects, which comes in pieces, into one array per field."""
    parts: dict[str, list[np.ndarray]] = {field: [] for field in kind.__struct_fields__}
    for rows in pieces:
        for field, part in parts.items():
            dtype = _DTYPES.get(field, np.int64)
            part.append(np.fromiter(map(attrgetter(field), rows), dtype, len(rows)))
    return {field: np.concatenate(part) for field, part in parts.items()}


def _decode_in_pieces(
    data: bytearray, start: int, end: int, kind: type[msgspec.Struct]
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
