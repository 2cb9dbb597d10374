"""Save checkpoints so that a crash at any point leaves a verified one; load only verified ones.

A checkpoint `NAME.pth` counts if its sidecar `NAME.pth.sha256`, which `sha256sum -c` accepts, holds
its hash. The sidecar is written last: it is the commit. What differs from torchvision: its scripts
overwrite one file in place, and `torch.load` does not detect flipped bits.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import torch

import utils
from utils import UserError, file_errors, load_tensors, logger, new_file, rename, sidecar

NEWEST, PREVIOUS, BEST = "checkpoint.pth", "checkpoint.previous.pth", "best.pth"
# The files of a run in its folder. All other files belong to the user: they are not read, counted
# or deleted.
_EPOCH = re.compile(r"model_(0|[1-9][0-9]{0,17})\.pth")
_CHECKPOINT = re.compile(rf"{re.escape(NEWEST)}|{re.escape(PREVIOUS)}|{BEST}|{_EPOCH.pattern}")
_RECORD = re.compile(r"metrics\.jsonl(\.bad)?|args\.json|preempted")
_TEMPORARY = re.compile(rf"(({_CHECKPOINT.pattern})(\.sha256)?|{_RECORD.pattern})\.tmp")

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, msgspec.Meta(gt=0)]
Tensors = dict[str, torch.Tensor]


class _Group(TypedDict):
    params: list[int]


class _Optimizer(TypedDict):
    state: dict[int, dict[str, Any]]
    param_groups: list[_Group]


class _Flags(TypedDict, total=False):
    batches_per_step: Positive


class _Class(TypedDict):
    id: int
    name: str
    label: Positive


# The parts of a checkpoint that are read, and their types.
PARTS: dict[str, Any] = {
    "model": Tensors,
    "ema": Tensors | None,
    "optimizer": _Optimizer,
    "scaler": dict[str, float],
    "epoch": Count,
    "step": Count,
    "position": Count,
    "window": dict[str, float],
    "evaluations": dict[Count, float],
    "args": _Flags,
    "categories": list[_Class],
    "data": dict[str, Any],
}


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
        if utils.is_verified(path) and not (
            _order(previous) < _order(path) and utils.is_verified(previous)
        ):
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
        digest = sidecar(source).read_text().split()[0]
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
            sidecar(path).unlink(missing_ok=True)  # first, as nothing deletes a lone sidecar
            path.unlink()


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the paths in `folder` that have the name of a checkpoint, sorted by name."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in files if is_checkpoint_name(path.name))


def is_checkpoint_name(name: str) -> bool:
    """Return whether a run gives one of its checkpoints this name."""
    return _CHECKPOINT.fullmatch(name) is not None


def newest(folder: Path) -> Path | None:
    """Return the checkpoint in `folder` that verifies and holds the most steps, or None.

    Only names that a run writes count. File times do not count: a copy changes them. Newer ones
    that do not verify are logged.

    Raises:
        UserError: names every checkpoint in `folder`, if there are some and none verifies.
    """
    candidates = sorted(checkpoints_in(folder), key=_order)
    for path in candidates:
        if utils.is_verified(path, utils.PATIENCE):
            return path
        logger.warning("%s is damaged: it does not match %s", path, sidecar(path).name)
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
    if not path.is_file():
        return None
    try:
        step = load_tensors(path, str(path), mmap=True).get("step")
    except UserError:
        return None
    return step if type(step) is int else None


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
    utils.require_stated_hash(path, f"--resume {path}")
    content = load_tensors(path, f"--resume {path}")
    for name, kind in PARTS.items():
        try:
            if name in content:
                msgspec.convert(content[name], kind)
        except msgspec.ValidationError as error:
            raise UserError(
                f"--resume {path}: damaged, its {name!r} is not what train.py writes: {error}; "
                "take another checkpoint"
            ) from None
    return content


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
    sidecar_path = sidecar(path)
    temporary = sidecar_path.with_name(sidecar_path.name + ".tmp")
    with new_file(temporary) as file:
        file.write(f"{digest}  {path.name}\n".encode())
    rename(temporary, sidecar_path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Sync a folder's list of files to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
