"""What a COCO file must hold, and reading one that is not to the letter of it.

What has one meaning is corrected and counted: floats and text for whole numbers, null for a missing
field. All else is listed by its position. Slow, as Python reads the file.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from data.checks import MISSING
from data.coco_rules import Finding, Findings, finding

DIAGNOSED = 2**31  # bytes up to which Python reads a file again, to list every fault
_NOT_COCO = "annotation file that is not COCO's"
_NOT_JSON = "annotation file that is not JSON, or cut short"
_NUMERAL = re.compile(r"(-?[0-9]{1,18})(\.0*)?")
_EXPECTED = {
    "bbox": "four finite numbers",
    "area": "a finite number",
    "iscrowd": "0 or 1",
    "file_name": "text",
    "name": "text",
}
_WHOLE = "a 64-bit integer"  # all others

_Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Float = Annotated[float, msgspec.Meta(ge=-1.7976931348623157e308, le=1.7976931348623157e308)]


class _Image(msgspec.Struct, gc=False):
    id: _Int
    file_name: str
    width: _Int = 0
    height: _Int = 0


class _Annotation(msgspec.Struct, gc=False, kw_only=True):
    id: _Int = MISSING
    image_id: _Int
    category_id: _Int
    bbox: tuple[_Float, _Float, _Float, _Float]
    area: _Float = math.nan
    iscrowd: _Int | bool = MISSING


class _Category(msgspec.Struct, gc=False):
    id: _Int
    name: str


LISTS: dict[str, type[msgspec.Struct]] = {
    "images": _Image,
    "annotations": _Annotation,
    "categories": _Category,
}


def expected_lists(document: Container[str]) -> list[str]:
    """Return which of `LISTS` a file must have: a file without annotations needs images only."""
    if "annotations" in document:
        return list(LISTS)
    return [name for name in LISTS if name == "images" or name in document]


def repeated_lists(pairs: Sequence[tuple[str, Any]]) -> list[Finding]:
    """Find lists that occur twice among the names and values of the whole file."""
    names = [name for name, _ in pairs]
    return finding("lists that occur twice", [f"$.{n}" for n in LISTS if names.count(n) > 1])


def read(path: Path, message: str) -> tuple[dict[str, list[Any]] | None, list[Finding]]:
    """Read a file that the strict reader refused with `message`.

    Returns:
        The lists without the annotations that are wrong, None if other parts are; and all findings.
    """
    if os.path.getsize(path) > DIAGNOSED:
        return None, finding(_NOT_COCO, [message])
    document, findings = _parse(path)
    if not isinstance(document, dict):
        seen = "a list, as in a file of detections" if isinstance(document, list) else "no object"
        return None, findings or finding(_NOT_COCO, [f"$ is {seen}"])
    problems = Findings()
    lists, is_whole = {}, True
    for name in expected_lists(document):
        rows = document.get(name)
        if isinstance(rows, list):
            lists[name] = _correct_rows(f"$.{name}", rows, LISTS[name], problems)
            is_whole &= name == "annotations" or len(lists[name]) == len(rows)
        else:
            seen = "an object, not a list" if isinstance(rows, dict) else "no list"
            problems.add(_NOT_COCO, f"$.{name} is {seen}")
            is_whole = False
    return lists if is_whole else None, findings + problems.as_list()


def _parse(path: Path) -> tuple[Any, list[Finding]]:
    """Read JSON as Python does; find where it is none, and which lists occur twice."""
    data = path.read_bytes()
    encoding = json.detect_encoding(data)
    if not encoding.startswith("utf-8"):
        name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")  # as iconv calls it
        fix = f"convert it: iconv -f {name} -t UTF-8 {shlex.quote(str(path))} > new.json"
        return None, finding("annotation file that is not UTF-8", [f"it is {name}"], fix=fix)
    outermost: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        outermost[:] = pairs
        return dict(pairs)

    try:
        text = data.decode(encoding)
        document = json.loads(text, object_pairs_hook=keep)
    except UnicodeDecodeError as error:
        return None, finding("annotation file that is not UTF-8", [f"byte {error.start}"])
    except json.JSONDecodeError as error:
        problem = error.msg.removesuffix(" at")
        problem = problem.replace("Extra data", "a second value, as in JSON Lines,")
        start = len(text[: error.pos].encode())
        where = f"{problem} at byte {start} of {len(data)} (line {error.lineno})"
        return None, finding(_NOT_JSON, [where])
    except (ValueError, RecursionError) as error:
        return None, finding(_NOT_JSON, [error])
    return document, repeated_lists(outermost if isinstance(document, dict) else [])


def _correct_rows(
    path: str, rows: list[Any], kind: type[msgspec.Struct], findings: Findings
) -> list[dict[str, Any]]:
    """Correct the entries of a list in place; return those that are right; add to `findings`."""

    def add(rule: str, row: int, field: str = "") -> None:
        text = f"{path}[{row}]"
        if field:
            value = f"= {json.dumps(rows[row][field])[:60]}" if field in rows[row] else "is missing"
            text += f".{field} {value} (id {rows[row].get('id')})"
        findings.add(rule, text)

    wrong = {i for i, row in enumerate(rows) if not isinstance(row, dict)}
    for i in sorted(wrong):
        add(_NOT_COCO, i)
    entries = [(i, row) for i, row in enumerate(rows) if i not in wrong]
    for field in msgspec.structs.fields(kind):
        name, expected = field.name, _EXPECTED.get(field.name, _WHOLE)
        reads_text = not name.endswith("id") or _are_ids([row.get(name) for _, row in entries])
        for i, row in entries:
            value = number = row.get(name)
            if not field.required and (value is None or value != value):  # null or NaN
                row.pop(name, None)
                continue
            if expected in (_WHOLE, _EXPECTED["iscrowd"]) and (
                reads_text or not isinstance(value, str)
            ):
                number = _whole_number(value)
            if type(number) is not type(value):
                add("numbers written as 1.0 or as text", i, name)
                row[name] = number
            elif name not in row or not _fits(value, field.type):
                wrong.add(i)
                has_text = isinstance(value, list) and any(isinstance(v, str) for v in value)
                rule = f"{name} that is not {expected}"
                add("bbox with numbers written as text" if has_text else rule, i, name)
    return [row for i, row in enumerate(rows) if i not in wrong]


def _are_ids(values: list[Any]) -> bool:
    """Return whether a column of ids is text that means numbers, each written in one way."""
    numbers = {value: _whole_number(value) for value in values if isinstance(value, str)}
    is_text = all(isinstance(value, str) for value in values)
    is_number = all(isinstance(number, int) for number in numbers.values())
    return is_text and is_number and len(set(numbers.values())) == len(numbers)


def _whole_number(value: Any) -> Any:
    """Return a whole number that is written as 1.0 or "1" as an integer, all else as it is."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, str) and (numeral := _NUMERAL.fullmatch(value)):
        return int(numeral[1])
    return value


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.json.encode(msgspec.convert(value, kind))
    except (msgspec.MsgspecError, ValueError, OverflowError):  # half a surrogate pair, 10**400
        return False
    return True
