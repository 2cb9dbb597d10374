"""The user's cache folder: what is derived from a data set, built once per machine.

Packed annotations lie there as plain arrays that processes map into memory: all of a machine share
one copy. Every start checks the SHA-256 of what it uses, and builds again what does not match.
Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import utils
from data import coco_json
from data.coco_arrays import Annotations
from data.coco_rules import Finding, finding, require_no_errors
from utils import UserError

CACHED_FROM = 50_000_000  # bytes: smaller files are read in 0.3 s, which is not worth a copy
ARRAYS = [field.name for field in fields(Annotations) if field.type == "np.ndarray"]
CLOCK_TICK = 0.02  # seconds: the times of files move every 10 ms at worst (Linux with HZ=100)
_PIECE = 2**22  # bytes hashed at a time
_REST, _WRITTEN = "about.json", "written.json"


def folder() -> Path:
    """Return where this project keeps what it can build again: `$XDG_CACHE_HOME`, or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "retinanet-reference"
    except RuntimeError:
        raise OSError("there is no home folder; set XDG_CACHE_HOME to a folder") from None


def built_once(target: Path, key: Any, build: Callable[[Path], None]) -> None:
    """Make the folder `target` hold what `build` wrote for `key`, to the last bit.

    What is missing, unfinished, of another key, or changed since, is built again. Of all processes
    that ask at once, on a machine or over a shared disk, one builds; the others wait for it.

    Args:
        key: describes what the content is made from; anything that JSON can hold.
        build: fills the new folder it is given, which then replaces `target` in one step.

    Raises:
        OSError: if the cache folder cannot be written.
    """
    if _holds(target, key):
        return
    with _locked(target):
        if _holds(target, key):
            return
        unfinished = target.with_name(f".{target.name}.tmp")
        _remove(unfinished)
        unfinished.mkdir()
        build(unfinished)
        written = {"key": key, "hashes": _hashes(unfinished)}
        (unfinished / _WRITTEN).write_text(json.dumps(written))
        _remove(target)
        os.replace(unfinished, target)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time, on a machine or over a shared disk, write `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with utils.open_lock(path.with_name(f".{path.name}.lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
        yield


def _remove(path: Path) -> None:
    """Delete a folder, a file or a symbolic link (not what it points to), if there is one."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _holds(target: Path, key: Any) -> bool:
    """Return whether `target` holds the files that were written for `key`, unchanged."""
    try:
        written = json.loads((target / _WRITTEN).read_text())
        return written == {"key": key, "hashes": _hashes(target)}
    except (OSError, ValueError):
        return False


def _hashes(target: Path) -> dict[str, str]:
    """Return a hash of each file below a folder, but for the one that keeps the hashes."""
    files = sorted(path for path in target.rglob("*") if not path.is_dir())
    names = {path.relative_to(target).as_posix(): path for path in files}
    return {name: _hash(path) for name, path in names.items() if name != _WRITTEN}


def _hash(path: Path) -> str:
    """Return the SHA-256 of the SHA-256 of each piece, so that all cores work on a large file."""
    whole = hashlib.sha256()
    with path.open("rb") as file, ThreadPoolExecutor() as pool:

        def digest(start: int) -> bytes:
            piece = os.pread(file.fileno(), _PIECE, start)
            return hashlib.sha256(piece).digest()  # lets other threads run

        for part in pool.map(digest, range(0, path.stat().st_size, _PIECE)):
            whole.update(part)
    return whole.hexdigest()


def examine(path: Path) -> tuple[Annotations | None, list[Finding]]:
    """Do what `coco_json.examine` does; for a large file without errors only once per machine.

    Raises:
        UserError: if there is no such file.
    """
    if not path.is_file() or path.stat().st_size < CACHED_FROM:
        return coco_json.examine(path)
    state, examined = file_state(path), []

    def build(target: Path) -> None:
        annotations, findings = coco_json.examine(path)
        examined.append((annotations, findings))
        require_no_errors(path, findings)
        if file_state(path) != state:
            raise UserError(f"{path} changed while it was read; start again when it is complete")
        assert annotations is not None
        _save(target, annotations, findings)

    try:
        name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
        target = folder() / "annotations" / f"{path.stem}-{name}"
        built_once(target, [_content(path, state, target), hash_code()], build)
        return _load(target, path)
    except UserError:  # with errors in it, it is not kept
        if not examined or file_state(path) != state:
            raise
        return examined[0]
    except OSError as error:  # also where there is no home
        annotations, findings = examined[0] if examined else coco_json.examine(path)
        case = f"{type(error).__name__}: {error}"
        return annotations, findings + finding("annotations that cannot be cached", [case])


def hash_code() -> str:
    """Return a hash of all code in this folder, which decides what is derived from data."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def file_state(path: Path) -> list[int]:
    """Return what changes with every write to a file: size, mtime and ctime.

    No program can set back the ctime, unlike the mtime. File systems without a ctime of their own
    leave it to size and mtime.
    """
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _content(path: Path, state: list[int], target: Path) -> str:
    """Return the hash of a whole file, which is read only if its `state` is not known yet.

    Known hashes are kept beside `target`: one for each machine that shares the cache, and has its
    own copy of the file.
    """
    seen, name = target.with_name(f".{target.name}.seen.json"), str(state)

    def read_hashes() -> dict[str, str]:
        try:
            return dict(json.loads(seen.read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    if name in (hashes := read_hashes()):
        return hashes[name]
    with _locked(seen):
        if name not in (hashes := read_hashes()):
            time.sleep(CLOCK_TICK)  # a change in the tick of `state` comes before the file is read
            hashes[name] = _hash(path)
            seen.write_text(json.dumps(dict(list(hashes.items())[-100:])))
    return hashes[name]


def _save(target: Path, annotations: Annotations, findings: list[Finding]) -> None:
    for name in ARRAYS:
        np.save(target / f"{name}.npy", getattr(annotations, name), allow_pickle=False)
    rest = {"categories": annotations.categories, "findings": list(map(asdict, findings))}
    (target / _REST).write_text(json.dumps(rest))


def _load(target: Path, path: Path) -> tuple[Annotations, list[Finding]]:
    """Map the arrays into memory."""
    rest = json.loads((target / _REST).read_text())
    arrays: dict[str, Any] = {
        # As plain arrays: each slice of a memmap object costs microseconds more.
        name: np.asarray(np.load(target / f"{name}.npy", mmap_mode="r", allow_pickle=False))
        for name in ARRAYS
    }
    categories = tuple(map(tuple, rest["categories"]))
    findings = msgspec.convert(rest["findings"], list[Finding])
    return Annotations(path=path, categories=categories, **arrays), findings
