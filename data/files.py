"""Finding files below a folder, and reading text that people and tools wrote."""

from __future__ import annotations

import math
import os
from pathlib import Path

from data.image_files import SUFFIXES
from utils import UserError, file_errors

OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".jp2", ".dng", ".jxl", ".ppm")  # not read here


def files_below(folder: Path, *suffixes: str) -> list[Path]:
    """Return all regular files with such a suffix below a folder, sorted; links are followed.

    A link to nothing counts as a file, so that reading it says what is missing. Hidden files and
    folders are skipped: macOS adds ._x.jpg, Jupyter .ipynb_checkpoints/x.jpg.
    """
    files, seen = [], set()
    for current, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(current)
        is_new = real not in seen  # otherwise a link leads back up
        seen.add(real)
        folders[:] = [name for name in folders if is_new and not name.startswith(".")]
        files += [Path(current, name) for name in names if is_new and not name.startswith(".")]
    files = [path for path in files if path.suffix.lower() in suffixes]
    return sorted(path for path in files if path.is_file() or not path.exists())


def without_suffix(name: str) -> str:
    """Return a path without the suffix of an image or an XML file."""
    base, suffix = os.path.splitext(name)
    return base if suffix.lower() in (*SUFFIXES, *OTHER_SUFFIXES, ".xml") else name


def read_bytes(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        UserError: if it cannot be read, or is no regular file: a pipe keeps its reader waiting.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing, or no regular file; correct it")
    with file_errors("read", path):
        return path.read_bytes()


def read_text(path: Path, errors: str = "strict") -> str:
    """Return the content of a file in UTF-8; `errors` is that of `bytes.decode`.

    Raises:
        UserError: if it cannot be read, or is not in UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None


def read_lines(path: Path, errors: str = "strict") -> list[tuple[str, str]]:
    """Return ("path:number", text) of each line of a file that is not blank."""
    lines = read_text(path, errors).splitlines()
    return [(f"{path}:{n}", line.strip()) for n, line in enumerate(lines, 1) if line.strip()]


def number(text: str) -> float:
    """Return a finite number, or NaN for any other text."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) and "_" not in text else math.nan
