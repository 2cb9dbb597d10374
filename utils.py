"""User errors, seeds and safe files, for every script."""

from __future__ import annotations

import sys

if sys.platform == "win32":  # before fcntl, which Windows lacks
    sys.exit("error: this project needs Linux, macOS or WSL (wsl --install); Windows lacks fork")

import argparse
import errno
import fcntl
import hashlib
import io
import logging
import math
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist

logger = logging.getLogger("retinanet")


AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds, and in how many
PATIENCE = 1.0  # seconds for another process to finish replacing a file that is read here
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class UserError(Exception):
    """An error that a user can mend: the message names the flag or the file, and the fix.

    Commands print the message without a traceback. Every other exception keeps its traceback.
    """


class LocalError(UserError):
    """A UserError that may occur in only one process, so each process prints it."""


class _QuietFile(io.FileIO):
    """A standard stream that drops its output once the reader or terminal is gone."""

    def write(self, data: Any) -> int:
        """Write what can be written; report that everything was."""
        with suppress(OSError):
            return super().write(data)
        return memoryview(data).nbytes


def mend_streams() -> None:
    """Keep printing from ending a run: on closed streams, closed pipes and narrow encodings.

    A stream that was closed (`>&-`) leads to /dev/null. Otherwise the next opened file, such as a
    checkpoint, would get its number, and a C library would print into it. Characters that the
    encoding lacks are escaped. Streams that were replaced before stay.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            with suppress(OSError):
                os.fstat(number)
                continue  # something else has that number already
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which is this
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
        if number and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            quiet = io.TextIOWrapper(
                io.BufferedWriter(_QuietFile(number, "w", closefd=False)),
                stream.encoding,
                "backslashreplace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, quiet)


def usable_cores() -> int:
    """Return how many cores this process may use; the machine may have more."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = len(os.sched_getaffinity(0))
    # The quota of a container, such as "150000 100000"; "max 100000" is none.
    with suppress(OSError, ValueError):
        quota, period = map(int, CPU_QUOTA.read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return cores


def default_device() -> str:
    """Return "cuda" where PyTorch finds such a device, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def set_determinism(deterministic: bool) -> None:
    """Choose between bit-exact and fastest kernels; call it before CUDA starts."""
    torch.backends.cudnn.benchmark = False  # detection's shapes change with every batch
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def set_tf32(allowed: bool | None) -> None:
    """Allow or forbid TF32 in fp32 convolutions and matrix products on CUDA.

    None keeps PyTorch's default, which allows it in convolutions only.
    """
    if allowed is not None:
        cudnn: Any = torch.backends.cudnn
        cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
        torch.set_float32_matmul_precision("high" if allowed else "highest")


def derive_seed(*parts: int) -> int:
    """Mix non-negative integers, such as (seed, epoch, index), into one 63-bit seed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1


def seed_device(device: torch.device, *parts: int) -> None:
    """Seed the generators of the CPU and of `device` from `parts`; see `derive_seed`.

    `torch.manual_seed` takes 0.2 ms: it formats a stack trace for each kind of device not in use.
    """
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@contextmanager
def file_errors(verb: str, path: Path | str) -> Iterator[None]:
    """Turn an `OSError` into a `UserError`: "cannot write /runs/log.txt: No space left on device".

    Args:
        verb: what is done to the file: "read", "write", "create".
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {verb} {path}: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """Create a folder and those above it.

    Raises:
        UserError: if it cannot be created.
    """
    with file_errors("create", path):
        path.mkdir(parents=True, exist_ok=True)


def printable(text: str, keep: str = "") -> str:
    """Return text from data, such as a class name, safe to print: control characters are escaped.

    A terminal executes ANSI sequences, and a line break would fake a line of the log.

    Args:
        keep: characters that are left as they are.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def run_command(main: Callable[[], int | None]) -> None:
    """Call the `main` of a command, and exit with its status; of train.py in each process.

    A `UserError` is printed as one message, any other error with its traceback. An error or Ctrl-C
    also ends the worker processes.
    """
    mend_streams()
    status: int | None = 1
    try:
        try:
            status = main()
        finally:  # while the exception holds the loader, which would wait for its workers
            kill_workers()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        # Else a worker that the server is about to fork fails with a traceback.
        server = getattr(forkserver._forkserver, "_forkserver_pid", None)
        if server is not None:
            os.kill(server, signal.SIGKILL)
        print("error: interrupted", file=sys.stderr)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        # All processes see the same flags and data: rank 0 prints. A LocalError is one process's.
        if not rank.isdecimal() or int(rank) == 0 or isinstance(error, LocalError):
            text = str(error).strip()
            if "Original Traceback" in text:  # raised in a DataLoader worker
                text = text.splitlines()[-1].split(": ", 1)[-1]
            print(printable(f"error: {text}", keep="\n"), file=sys.stderr)
    except Exception as error:
        traceback.print_exception(error)
    if status and dist.is_available() and dist.is_initialized():
        # A normal exit of Python would leave NCCL's process group, and wait there for operations
        # that the other processes never join.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def kill_workers() -> None:
    """End the worker processes of this one; those of a DataLoader ignore Python's SIGTERM."""
    for worker in multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else DataLoader complains of its death
        worker.kill()


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file at `path` for writing; sync it at the end, delete it if that fails.

    An old file is removed first. A symbolic link is never followed.
    """
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o666)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            path.unlink()  # the part that was written
        raise


def replace_file(path: Path, content: str | bytes) -> None:
    """Write `path` in one step: a crash or a full disk leaves the old content.

    Raises:
        UserError: if the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with file_errors("write", path):
        with new_file(temporary) as file:
            file.write(content.encode() if isinstance(content, str) else content)
        rename(temporary, path)


def rename(temporary: Path, path: Path) -> None:
    """Rename a new file to `path`, and delete it if that fails."""
    try:
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def sidecar(path: Path) -> Path:
    """Return the path of the file that states the SHA-256 of the file at `path`."""
    return path.with_name(path.name + ".sha256")


def is_verified(path: Path, patience: float = 0.0) -> bool:
    """Return whether the file at `path` has the content that its sidecar states.

    It looks again for `patience` seconds: another process may be replacing the file, and renames
    its sidecar a moment later.
    """
    deadline = time.monotonic() + patience
    while not _has_stated_hash(path):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def _has_stated_hash(path: Path) -> bool:
    if not (path.is_file() and sidecar(path).is_file()):  # opening a FIFO may block forever
        return False
    digest = hashlib.sha256()
    try:
        stated = sidecar(path).read_text().split()
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except (OSError, UnicodeDecodeError):
        return False
    return stated[:1] == [digest.hexdigest()]


def require_stated_hash(path: Path, source: str) -> None:
    """Raise a UserError that names `source` if the file has a sidecar and does not match it."""
    if os.path.lexists(sidecar(path)) and not is_verified(path, PATIENCE):
        raise UserError(
            f"{source}: damaged, it does not match {sidecar(path).name}; take another one"
        )


def load_tensors(path: Path, source: str, mmap: bool = False) -> dict[str, Any]:
    """Read a file of tensors and plain types to the CPU; `source` names it in messages.

    With `mmap`, a tensor is read when it is used. The `argparse.Namespace` in a checkpoint of
    torchvision's scripts becomes a dict.

    Raises:
        UserError: if it is damaged or of another kind.
    """
    try:
        # A Namespace takes attributes and runs no code, so it is as safe as a dict.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # any bytes can be in the file, and raise anything
        # Its first lines are advice to load the file without safety.
        match = re.search(r"WeightsUnpickler error: (.*)", str(error))
        reason = (match[1] if match else str(error).split("\n")[0])[:200]
        raise UserError(
            f"{source}: not a file of tensors and plain types, or damaged: {reason}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: holds a {type(content).__name__}, not weights or a checkpoint")
    if isinstance(content.get("args"), argparse.Namespace):
        content["args"] = vars(content["args"])
    return content


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, and the project's git revision."""
    names = ("torch", "torchvision", "numpy", "hotcoco", "pycocotools", "msgspec")
    packages = {name: version(name) for name in names}
    return {"python": platform.python_version(), **packages, "revision": _git_revision()}


def _git_revision() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return "unknown"
    return done.stdout.strip() or "unknown"


def open_lock(path: Path) -> IO[str]:
    """Open or create a file to lock, and keep its content; do not follow a symbolic link."""
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")


def lock_folder(folder: Path) -> IO[str]:
    """Lock `folder` until this process ends; keep the returned file open.

    Some file systems, such as those over cloud storage, have no locks; then log a warning.

    Raises:
        UserError: if another process holds it.
    """
    with file_errors("write", folder / ".lock"):
        file = open_lock(folder / ".lock")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise UserError(
                f"--output-dir {folder}: another run is writing there; wait for it or choose "
                "another"
            ) from None
        logger.warning("%s cannot be locked (%s): see that no other run writes", folder, error)
    return file
