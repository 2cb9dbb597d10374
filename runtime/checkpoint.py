"""Save checkpoints so that a crash at any point leaves a verified one; load only verified ones.

A checkpoint `NAME.pth` counts if its sidecar `NAME.pth.sha256`, which `sha256sum -c` accepts, holds
its hash. The sidecar is written last: it is the commit. What differs from torchvision: its scripts
overwrite one file in place, and `torch.load` does not detect flipped bits.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from utils import UserError, file_errors, load_tensors, new_file, rename

logger = logging.getLogger("retinanet")

NEWEST, PREVIOUS, BEST = "checkpoint.pth", "checkpoint.previous.pth", "best.pth"
# The files of a run in its folder. All other files belong to the user: they are not read, counted
# or deleted.
_EPOCH = re.compile(r"model_(0|[1-9][0-9]{0,17})\.pth")
_CHECKPOINT = re.compile(rf"{re.escape(NEWEST)}|{re.escape(PREVIOUS)}|{BEST}|{_EPOCH.pattern}")
_RECORD = re.compile(r"metrics\.jsonl(\.bad)?|args\.json|preempted")
_TEMPORARY = re.compile(rf"(({_CHECKPOINT.pattern})(\.sha256)?|{_RECORD.pattern})\.tmp")

PATIENCE = 1.0  # seconds for another process to finish replacing the file that is read here


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write `state`, plain types and tensors, to `path`; the checkpoint before it stays valid.

    The old one stays as `checkpoint.previous.pth`.

    Raises:
        UserError: names the path, if the disk is full or not writable; old checkpoints stay intact.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    data = buffer.getbuffer()
    temporary, previous = path.with_name(path.name + ".tmp"), path.with_name(PREVIOUS)
    with file_errors("write", path):
        with new_file(temporary) as file:
            file.write(data)
        # If the one before holds more steps, a resume chose that one, and it stays.
        if is_verified(path) and not (_order(previous) < _order(path) and is_verified(previous)):
            copy(path, previous, link=True)
        rename(temporary, path)
        _commit(path, hashlib.sha256(data).hexdigest())


def copy(source: Path, target: Path, link: bool = False) -> None:
    """Copy a verified checkpoint to `target`, with its sidecar.

    `link` makes a hard link where the file system can. Use it for a source that will be replaced.

    Raises:
        UserError: names the path, if it cannot be written.
    """
    temporary = target.with_name(target.name + ".tmp")
    with file_errors("write", target):
        digest = _sidecar(source).read_text().split()[0]
        temporary.unlink(missing_ok=True)
        if not (link and _link(source, temporary)):
            with source.open("rb") as old, new_file(temporary) as new:
                shutil.copyfileobj(old, new, 2**20)
        rename(temporary, target)
        _commit(target, digest)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest `model_N.pth` in `folder`, and nothing else.

    Raises:
        UserError: names the folder, if they cannot be deleted.
    """
    numbered = [
        path for path in checkpoints_in(folder) if _EPOCH.fullmatch(path.name) and path.is_file()
    ]
    numbered.sort(key=_epoch)
    with file_errors("delete checkpoints in", folder):
        for path in numbered[: max(0, len(numbered) - keep)]:
            _sidecar(path).unlink(missing_ok=True)  # first, as nothing deletes a lone sidecar
            path.unlink()


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the paths in `folder` that have the name of a checkpoint, sorted by name."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in files if is_checkpoint_name(path.name))


def is_checkpoint_name(name: str) -> bool:
    """Return whether a run gives one of its checkpoints this name."""
    return _CHECKPOINT.fullmatch(name) is not None


def is_verified(path: Path) -> bool:
    """Return whether `path` has the content that its sidecar states."""
    if not path.is_file():  # opening another kind, such as a FIFO, may block forever
        return False
    try:
        with path.open("rb") as file:
            return _matches_sidecar(file, path)
    except OSError:
        return False


def _is_verified_soon(path: Path) -> bool:
    """Do what `is_verified` does, but look again while another process replaces `path`.

    It renames the file first and the sidecar a moment later.
    """
    deadline, seen = time.monotonic() + PATIENCE, None
    while True:
        state = _state(path)
        if state != seen and is_verified(path):
            return True
        if time.monotonic() >= deadline:
            return False
        seen = state
        time.sleep(0.02)


def _state(path: Path) -> list[Any]:
    """Return a value that changes when a file or its sidecar is replaced."""
    state: list[Any] = []
    for one in (path, _sidecar(path)):
        try:
            stat = one.stat()
            state.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except OSError:
            state.append(None)
    return state


def _matches_sidecar(file: IO[bytes], path: Path) -> bool:
    """Return whether an open file has the content that the sidecar of `path` states."""
    sidecar = _sidecar(path)
    try:
        stated = sidecar.read_text().split() if sidecar.is_file() else []
    except UnicodeDecodeError:
        return False
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return stated[:1] == [digest.hexdigest()]


def newest(folder: Path) -> Path | None:
    """Return the checkpoint in `folder` that verifies and holds the most steps, or None.

    Only names that a run writes count. File times do not count: a copy changes them. Newer ones
    that do not verify are logged.

    Raises:
        UserError: names every checkpoint in `folder`, if there are some and none verifies.
    """
    candidates = sorted(checkpoints_in(folder), key=_order)
    for path in candidates:
        if _is_verified_soon(path):
            return path
        logger.warning("%s is damaged: it does not match %s", path, _sidecar(path).name)
    if candidates:
        names = ", ".join(path.name for path in candidates)
        raise UserError(
            f"no checkpoint in {folder} verifies ({names}); restore one with its .sha256 from a "
            "copy, or start again in another --output-dir"
        )
    return None


def step_of(path: Path) -> int | None:
    """Return the optimizer step that a checkpoint holds, without reading its tensors.

    None if it holds none, or cannot be read.
    """
    step = _peek(path).get("step")
    return step if type(step) is int else None


def _peek(path: Path) -> dict[str, Any]:
    """Load a checkpoint without reading its tensors; return an empty dict if it cannot be read."""
    if not path.is_file():
        return {}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # any bytes can be in the file, and raise anything
        return {}
    return content if isinstance(content, dict) else {}


def _order(path: Path) -> tuple[float, int, int]:
    """Return a key that sorts checkpoints: the most steps first, then the usual name.

    A checkpoint without a step comes first: `newest` logs it if it is damaged, and `load` refuses
    it otherwise.
    """
    step = step_of(path)
    names = (NEWEST, PREVIOUS, BEST)
    priority = names.index(path.name) if path.name in names else len(names)
    return -math.inf if step is None else -step, priority, -_epoch(path)


def _epoch(path: Path) -> int:
    match = _EPOCH.fullmatch(path.name)
    return int(match[1]) if match else -1


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, verified if it has a sidecar; only tensors and plain types.

    One of torchvision's scripts is read as well; the `argparse.Namespace` in it becomes a dict.

    Raises:
        UserError: names the file and the fix, if it is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise UserError(f"--resume {path}: the file does not exist")
    if os.path.lexists(_sidecar(path)) and not _is_verified_soon(path):
        raise UserError(
            f"--resume {path}: damaged, it does not match {_sidecar(path).name}; take another one"
        )
    content = load_tensors(path, f"--resume {path}")
    require_kinds(content, path, ("args", "categories"))  # `main` reads these first
    return content


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """Return whether `value` is an int or a float, and no bool."""
    return type(value) in (int, float)


def _are_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


def _is_optimizer(value: Any) -> bool:
    """Return whether `value` has the layout of an optimizer's state."""
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    groups = value.get("param_groups")
    return (
        isinstance(groups, list)
        and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
        and all(isinstance(state, dict) for state in value["state"].values())
    )


def _are_classes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(c, dict)
        and isinstance(c.get("name"), str)
        and type(c.get("id")) is int
        and type(c.get("label")) is int
        and c["label"] > 0
        for c in value
    )


def _is_args(value: Any) -> bool:
    per_step = value.get("batches_per_step", 1) if isinstance(value, dict) else 0
    return _is_count(per_step) and per_step > 0


# By name: a check of a value's layout, and a description of that layout.
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_are_tensors, "tensors by name"),
    "ema": (lambda v: v is None or _are_tensors(v), "tensors by name, or None"),
    "optimizer": (_is_optimizer, "the state of an optimizer"),
    "scaler": (lambda v: isinstance(v, dict), "the state of a gradient scaler"),
    "epoch": (_is_count, "a whole number of at least 0"),
    "step": (_is_count, "a whole number of at least 0"),
    "position": (_is_count, "a whole number of at least 0"),
    "window": (
        lambda v: isinstance(v, dict) and all(map(is_number, v.values())),
        "numbers by name",
    ),
    "evaluations": (
        lambda v: isinstance(v, dict) and all(_is_count(k) and is_number(v[k]) for k in v),
        "AP by epoch",
    ),
    "args": (_is_args, "flags by name"),
    "categories": (_are_classes, "a list of classes with id, name and label"),
}


def require_kinds(content: Mapping[str, Any], path: Path, names: Collection[str]) -> None:
    """Raise UserError if a part in `names` does not have the layout that train.py writes."""
    for name in names:
        fits, words = KINDS[name]
        if name in content and not fits(content[name]):
            raise UserError(
                f"--resume {path}: damaged, its {name!r} is not {words}; take another checkpoint"
            )


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed run left in `folder`, and no other files."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and (path.is_symlink() or path.is_file()):
            path.unlink(missing_ok=True)


def require_unused(folder: Path) -> None:
    """Raise UserError if `folder` holds a run, or a part of one that a new run would overwrite."""
    names = [path.name for path in checkpoints_in(folder)]
    names += [name for name in ("args.json", "metrics.jsonl") if os.path.lexists(folder / name)]
    if names:
        raise UserError(
            f"--output-dir {folder} holds a run ({', '.join(names[:5])}); continue it with "
            "--resume auto, or choose another --output-dir"
        )


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _link(source: Path, target: Path) -> bool:
    """Make `target` a hard link to `source`; return whether the file system can."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        return False
    return True


def _commit(path: Path, digest: str) -> None:
    sidecar = _sidecar(path)
    temporary = sidecar.with_name(sidecar.name + ".tmp")
    with new_file(temporary) as file:
        file.write(f"{digest}  {path.name}\n".encode())
    rename(temporary, sidecar)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Sync a folder's list of files to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
