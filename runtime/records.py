"""Records of a run: one JSON object per line, whole after any crash."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils import file_errors, logger, replace_file


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append `record` as one line of JSON, and sync it to the disk.

    Raises:
        UserError: if the file cannot be written; it is then unchanged.
    """
    with file_errors("write", path):
        _append(path, (json.dumps(record) + "\n").encode())


def _append(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while data:  # a disk that runs full may take only a part
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of `path`; skip a last line that a crash cut short.

    Other lines that are no record are logged with their number and skipped.

    Raises:
        UserError: if the file cannot be read.
    """
    records, bad_lines = _parse_json_lines(path)
    for number in bad_lines:
        logger.warning("%s, line %d: not a record, skipped", path, number)
    return records


def _parse_json_lines(path: Path) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """Return the records, and by number the lines that are none."""
    records, bad_lines = [], {}
    if not path.exists():
        return [], {}
    with file_errors("read", path):
        lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):  # not UTF-8, or not JSON
            record = None
        if _is_record(record):
            records.append(record)
        else:
            bad_lines[number] = line
    return records, bad_lines


def _is_record(value: Any) -> bool:
    """Return whether `value` is a line of a run: numbers by name, the step among them."""
    if not isinstance(value, dict) or not all(type(v) in (int, float) for v in value.values()):
        return False
    whole = {"step", "epoch"} if "AP" in value else {"step"} | (value.keys() & {"epoch"})
    return all(type(value.get(name)) is int for name in whole)


def rewind_json_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the records after optimizer step `step` from the file, and return the others.

    A run that resumes at `step` writes the later ones again, so each record appears once. A line
    that is no record is logged and moved to `NAME.bad`.

    Raises:
        UserError: if the file cannot be read or written.
    """
    records, bad_lines = _parse_json_lines(path)
    kept = [record for record in records if record["step"] <= step]
    aside = path.with_name(path.name + ".bad")
    for number, line in bad_lines.items():
        logger.warning("%s, line %d: not a record, moved to %s", path, number, aside.name)
        with file_errors("write", aside):
            _append(aside, line + b"\n")
    replace_file(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept
