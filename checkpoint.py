"""Checkpoints: written so that a crash at any point leaves a verified one, read only if verified.

A checkpoint `NAME.pth` counts if its sidecar `NAME.pth.sha256`, which `sha256sum -c` accepts, holds
its hash. The sidecar is written last: it is the commit. What differs from torchvision: its scripts
overwrite the one file in place, and `torch.load` does not notice flipped bits.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import io
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from utils import UserError, file_errors

logger = logging.getLogger("retinanet")

NEWEST, PREVIOUS = "checkpoint.pth", "checkpoint.previous.pth"


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write `state`, plain types and tensors, to `path`; the checkpoint that was there stays valid.

    While the new one replaces it, the old one is at hand as `checkpoint.previous.pth`.

    Raises:
        UserError: names the path, if the disk is full or not writable; what was there is intact.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    data = buffer.getbuffer()
    temporary = path.with_name(path.name + ".tmp")
    with file_errors("write", path):
        _write(temporary, data)
        if is_verified(path):
            copy(path, path.with_name(PREVIOUS), link=True)
        os.replace(temporary, path)
        _commit(path, hashlib.sha256(data).hexdigest())


def copy(source: Path, target: Path, link: bool = False) -> None:
    """Make `target` a second verified checkpoint like `source`, which has to be one.

    `link` shares the file instead of its content, for a source that is about to be replaced, where
    the file system can: those over cloud storage cannot.

    Raises:
        UserError: names the path, if it cannot be written.
    """
    temporary = target.with_name(target.name + ".tmp")
    with file_errors("write", target):
        digest = _sidecar(source).read_text().split()[0]
        temporary.unlink(missing_ok=True)
        if not (link and _link(source, temporary)):
            shutil.copyfile(source, temporary)
            _sync(temporary)
        os.replace(temporary, target)
        _commit(target, digest)


def prune(folder: Path, keep: int) -> None:
    """Delete the oldest `model_N.pth` in `folder`, all but `keep`; other names are left alone."""
    numbered = sorted(folder.glob("model_*.pth"), key=lambda path: int(path.stem[len("model_") :]))
    for path in numbered[: max(0, len(numbered) - keep)]:
        _sidecar(path).unlink(missing_ok=True)  # first, as a lone sidecar would stay for ever
        path.unlink()


def is_verified(path: Path) -> bool:
    """Return whether `path` has a sidecar and the content that it states."""
    try:
        stated = _sidecar(path).read_text().split()
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return stated[:1] == [digest.hexdigest()]
    except (OSError, UnicodeDecodeError):
        return False


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint in `folder` that verifies, None if there never was one.

    Each newer one that does not verify is reported.

    Raises:
        UserError: names every checkpoint in `folder`, if there are some and none verifies.
    """
    older = sorted(folder.glob("*.pth"), key=lambda path: -path.stat().st_mtime_ns)
    candidates = [path for path in older if path.name == NEWEST]
    candidates += [path for path in older if path.name != NEWEST]
    for path in candidates:
        if is_verified(path):
            return path
        logger.warning("%s is damaged: it does not match %s", path, _sidecar(path).name)
    if candidates:
        names = ", ".join(path.name for path in candidates)
        raise UserError(
            f"no checkpoint in {folder} verifies ({names}); restore one with its .sha256 from a "
            "copy, or start anew in another --output-dir"
        )
    return None


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, verified if it has a sidecar; only tensors and plain types.

    One of torchvision's scripts is read as well; the `argparse.Namespace` in it becomes a dict.

    Raises:
        UserError: names the file and the fix, if it is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise UserError(f"--resume {path}: the file does not exist")
    if _sidecar(path).exists() and not is_verified(path):
        raise UserError(
            f"--resume {path}: damaged, it does not match {_sidecar(path).name}; take another one"
        )
    try:
        # A Namespace takes attributes and runs nothing, so that it is as plain as a dict.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any bytes can be in the file, and raise anything
        reason = str(error).split("\n")[0][:200]
        raise UserError(
            f"--resume {path}: not a file of tensors and plain types, or damaged: {reason}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"--resume {path}: holds a {type(content).__name__}, not a checkpoint")
    if isinstance(content.get("args"), argparse.Namespace):
        content["args"] = vars(content["args"])
    return content


def as_own(
    saved: dict[str, Any], now: Mapping[str, Any], steps_per_epoch: int, source: Path
) -> dict[str, Any]:
    """Return a checkpoint of torchvision's detection scripts as one of train.py, which stay as is.

    Weights, optimizer, epoch and gradient scale are taken over; the order of images is that of
    train.py, and the schedule goes on at the epoch. `now` describes this run; what torchvision's
    scripts do not remember, such as a seed, is taken from it.

    Raises:
        UserError: if it cannot be continued, with what it lacks.
    """
    if "step" in saved:
        return saved
    missing = [name for name in ("model", "optimizer", "epoch", "args") if name not in saved]
    if missing:
        raise UserError(
            f"--resume {source}: no checkpoint of a run, it lacks {', '.join(missing)}; to begin "
            "from its weights give it as --weights"
        )
    theirs = saved["args"] | {"amp": "fp16" if saved["args"].get("amp") else None}
    if "weight_decay" in theirs:
        theirs["wd"] = theirs["weight_decay"]
    # They put normalisation first, train.py last; and do not know of fused steps.
    groups = [group | {"fused": True} for group in reversed(saved["optimizer"]["param_groups"])]
    epoch = saved["epoch"] + 1
    logger.info("%s is of torchvision's scripts: going on at epoch %d", source, epoch)
    return {
        **{"model": saved["model"], "ema": None, "scaler": saved.get("scaler", {})},
        "optimizer": saved["optimizer"] | {"param_groups": groups},
        **{"epoch": epoch, "step": epoch * steps_per_epoch, "position": 0},
        **{"window": {}, "best": None},
        "args": {name: theirs.get(name, value) for name, value in now.items()},
    }


def check_same_run(
    saved: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str], source: Path
) -> None:
    """Raise UserError, listing old → new, unless a checkpoint continues the run described `now`.

    Settings in `may_change`, such as another learning rate, are legal and said.
    """
    differing = [name for name in now if saved.get(name) != now[name]]
    changes = [f"{name}: {saved.get(name)} → {now[name]}" for name in differing]
    refused = [c for name, c in zip(differing, changes, strict=True) if name not in may_change]
    if refused:
        raise UserError(
            f"--resume {source} is a run with other settings: {'; '.join(refused)}; give the old "
            "ones, or start anew in another --output-dir (with --weights to begin from its weights)"
        )
    for change in changes:
        logger.warning("resuming with another %s", change)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in `folder`."""
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _link(source: Path, target: Path) -> bool:
    """Let `target` share the file of `source`; return whether the file system can."""
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
    _write(temporary, f"{digest}  {path.name}\n".encode())
    os.replace(temporary, sidecar)
    _sync(path.parent)


def _write(path: Path, data: bytes | memoryview) -> None:
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()  # the half of it that fits
        raise


def _sync(path: Path) -> None:
    """See a file, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
