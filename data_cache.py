"""The user's cache folder: what is derived from a data set, built once per machine.

Packed annotations lie there as plain arrays that processes map into memory: all of a machine share
one copy, and a second start reads next to nothing. Nothing is ever unpickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import coco_json
from coco_json import Annotations, Finding
from utils import UserError

CACHED_FROM = 50_000_000  # bytes: smaller files are read in 0.3 s, which is not worth a copy
ARRAYS = (
    *("image_ids", "sizes", "names", "name_offsets", "offsets"),
    *("ids", "boxes_xywh", "area", "iscrowd", "category_index"),
)
_BLOCK = 2**20  # bytes
_ABOUT = "about.json"

T = TypeVar("T")


def folder() -> Path:
    """Return where this project keeps what it can build anew: `$XDG_CACHE_HOME`, or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "retinanet-reference"


def built_once(place: Path, load: Callable[[Path], T | None], build: Callable[[Path], None]) -> T:
    """Load what lies in the folder `place`, after building it if it is not there or not right.

    Of all processes that ask at once, on a machine or over a shared disk, one builds; the others
    wait for it. What a killed process left is built again.

    Args:
        load: returns None for what is missing, unfinished, stale or damaged.
        build: fills the new folder it is given, which then takes its place in one step.

    Raises:
        OSError: if the cache folder cannot be written.
    """
    loaded = load(place)
    if loaded is not None:
        return loaded
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.with_name(f".{place.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
        loaded = load(place)
        if loaded is None:
            unfinished = place.with_name(f".{place.name}.tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            build(unfinished)
            shutil.rmtree(place, ignore_errors=True)
            os.replace(unfinished, place)
            loaded = load(place)
    assert loaded is not None, f"{place} was just built"
    return loaded


def examine(path: Path) -> tuple[Annotations | None, list[Finding]]:
    """Do what `coco_json.examine` does; for a large file without errors only once per machine.

    Raises:
        UserError: if there is no such file.
    """
    if not path.is_file() or path.stat().st_size < CACHED_FROM:
        return coco_json.examine(path)
    key, examined = _key(path), []

    def load(place: Path) -> tuple[Annotations, list[Finding]] | None:
        return _load(place, path, key)

    def build(place: Path) -> None:
        examined.append(coco_json.examine(path))
        annotations, findings = examined[0]
        coco_json.require_no_errors(path, findings)
        assert annotations is not None
        _save(place, key, annotations, findings)

    try:
        name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
        return built_once(folder() / "annotations" / f"{path.stem}-{name}", load, build)
    except UserError:  # with errors in it, it is not kept
        return examined[0]
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        annotations, findings = examined[0] if examined else coco_json.examine(path)
        case = f"{type(error).__name__}: {error}"
        return annotations, findings + coco_json.finding(
            "annotations that cannot be cached", [case]
        )


def _key(path: Path) -> dict[str, Any]:
    """Describe a file and the code that reads it, so that what changes with either is built anew.

    The hash is of 65 blocks, not of everything: it has to be quick for files of gigabytes. It is
    there for files that were changed without a change of size and time.
    """
    about = path.stat()
    content = hashlib.sha256(Path(coco_json.__file__).read_bytes())
    with path.open("rb") as file:
        for place in np.linspace(0, max(0, about.st_size - _BLOCK), 65, dtype=np.int64).tolist():
            file.seek(place)
            content.update(file.read(_BLOCK // 16))
        content.update(file.read())
    return {
        "path": os.path.realpath(path),
        "size": about.st_size,
        "time": about.st_mtime_ns,
        "hash": content.hexdigest(),
    }


def _save(
    place: Path, key: dict[str, Any], annotations: Annotations, findings: list[Finding]
) -> None:
    for name in ARRAYS:
        np.save(place / f"{name}.npy", getattr(annotations, name), allow_pickle=False)
    about = {
        "key": key,
        "sums": {name: _sum(place / f"{name}.npy") for name in ARRAYS},
        "categories": annotations.categories,
        "findings": [asdict(found) for found in findings],
    }
    (place / _ABOUT).write_text(json.dumps(about))


def _load(place: Path, path: Path, key: dict[str, Any]) -> tuple[Annotations, list[Finding]] | None:
    """Map the arrays into memory; None where they are not those of `key`, or damaged."""
    try:
        about = json.loads((place / _ABOUT).read_text())
        if about["key"] != key:
            return None
        if any(_sum(place / f"{name}.npy") != about["sums"][name] for name in ARRAYS):
            return None
        arrays: dict[str, Any] = {
            # As plain arrays: each slice of a memmap object costs microseconds more.
            name: np.asarray(np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False))
            for name in ARRAYS
        }
        categories = tuple((number, name) for number, name in about["categories"])
        findings = [
            Finding(**found | {"cases": tuple(found["cases"])}) for found in about["findings"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Annotations(path=path, categories=categories, **arrays), findings


def _sum(path: Path) -> int:
    """Add up a file as 64-bit words: reads gigabytes per second and sees lost or zeroed blocks."""
    total, size = 0, os.path.getsize(path)
    block = np.empty(_BLOCK // 8, dtype=np.uint64)
    with path.open("rb") as file:
        for _ in range(0, size, _BLOCK):
            block[:] = 0
            file.readinto(block.view(np.uint8).data)
            total += int(block.sum())
    return (total + size) % 2**64
