"""Processes, logging, seeds and records: what every script needs and PyTorch does not bring."""

from __future__ import annotations

import sys

if sys.platform == "win32":  # before fcntl, which is not there
    sys.exit("error: this project needs Linux, macOS or WSL (wsl --install); Windows lacks fork")

import argparse
import ctypes
import datetime
import errno
import fcntl
import io
import json
import logging
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import IO, Any, TextIO, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

logger = logging.getLogger("retinanet")

# Rank 0 scores and writes while the others wait, so the host group waits long. A peer that hangs
# where all come at about the same time, as in the training step, must be noticed far sooner.
HOST_TIMEOUT = datetime.timedelta(hours=2)
STEP_TIMEOUT = datetime.timedelta(minutes=10)
NAMING_TIMEOUT = datetime.timedelta(seconds=10)  # torchrun kills survivors of a failure after 30
LAUNCHER_GRACE = 8.0  # seconds to end a step and save in, once the launcher is gone
MEETING_EVERY = 10.0  # seconds between the meetings of an evaluation
# Less than STEP_TIMEOUT, so that the process that waits for its workers speaks before the others.
LOADER_TIMEOUT = 540.0  # seconds without a batch from any worker

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# One press of Ctrl-C reaches a process twice, from the terminal and from torchrun.
SAME_SIGNAL = 1.0  # seconds

T = TypeVar("T")


class UserError(Exception):
    """What a user can mend: the message names the flag or the file, and the fix.

    Commands print the message without a traceback. Every other exception keeps its traceback.
    """


class LocalError(UserError):
    """A UserError that perhaps only one of the processes sees: each prints its own."""


class PeerError(Exception):
    """Another process of the run died, or does not answer."""


@dataclass(frozen=True)
class Processes:
    """The processes of one run, as one of them sees it.

    `host_group` is a gloo group for what is not tensors on a device: checkpoints, evaluation. In
    `meeting_group`, another, all come at about the same time. Both are None where there is a single
    process, and then every collective below is skipped.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    host_group: Any = None
    meeting_group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process logs and writes."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` (anything plain) on every process."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """Return on every process what `action` returns on rank 0.

        All processes come here at about the same time; the action may take long.

        Raises:
            PeerError: names those that did not come.
            UserError: on every process, with its text, if `action` raises one.
        """
        self.barrier()
        result, problem = None, None
        if self.is_main:
            try:
                result = action()
            except UserError as error:
                problem = str(error)
        result, problem = self.broadcast((result, problem))
        if problem is not None:
            raise UserError(problem)
        return result

    def sum(self, values: list[float]) -> list[float]:
        """Return the sums of `values` over all processes, which come here at about the same time.

        Raises:
            PeerError: names those that did not.
        """
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            self.barrier()
            dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def equalize(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite `tensors`, on this process's device, with those of rank 0."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def barrier(self, timeout: datetime.timedelta | None = None) -> None:
        """Wait for every process, `STEP_TIMEOUT` at most unless told otherwise.

        Raises:
            PeerError: names those that did not come, as far as rank 0 came.
        """
        if self.world_size == 1:
            return
        try:
            # All but rank 0 wait as long as the group does, whatever the timeout given here.
            dist.monitored_barrier(self.meeting_group, timeout or STEP_TIMEOUT, wait_all_ranks=True)
        except RuntimeError as error:
            raise PeerError(
                "another process of the run died or hangs; look for its own message. "
                + str(error).split("\n")[0]
            ) from None


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the process group that torchrun describes, if it does, and leave it at the end.

    Args:
        device: "cuda" (this process takes GPU number LOCAL_RANK) or "cpu".

    After an exception the group stays: end the process by `end_failed`.

    Raises:
        PeerError: names the processes that did not come to a collective operation of gloo. NCCL
            ends a process that waits in vain by itself.
        LocalError: if the launcher's variables are wrong, or there is no GPU for this process.
    """
    rank, world_size, local_rank = _check_launch()
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", place.index or 0 if local_rank is None else local_rank)
        if place.index >= torch.cuda.device_count():
            raise LocalError(
                f"LOCAL_RANK {place.index}: this machine has {torch.cuda.device_count()} GPUs for "
                "this run; start one process for each with --nproc_per_node"
            )
        torch.cuda.set_device(place)
    if world_size == 1:
        yield Processes(place)
        return
    backend = "nccl" if place.type == "cuda" else "gloo"
    device_id = place if place.type == "cuda" else None
    dist.init_process_group(
        backend,
        store=_store_of_this_attempt(),
        rank=rank,
        world_size=world_size,
        timeout=STEP_TIMEOUT,
        device_id=device_id,
    )
    group = None
    try:
        host_group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
        meeting_group = dist.new_group(backend="gloo", timeout=STEP_TIMEOUT)
        group = Processes(place, rank, world_size, host_group, meeting_group)
        group.barrier()
        yield group
    except RuntimeError as error:
        if group is not None and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            group.barrier(NAMING_TIMEOUT)  # gloo itself says a port at best
        raise
    # Not after an exception: NCCL would wait here for operations that the others never join. See
    # `end_failed`.
    dist.destroy_process_group()


def _store_of_this_attempt() -> dist.Store:
    """Return where processes find each other, apart from what they wrote there before a restart.

    torchrun keeps one store over all restarts on a machine; without a prefix of its own a restarted
    process may read the address of one that is gone ("connectFullMesh … Connection refused").
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=STEP_TIMEOUT))
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":  # each machine counts its own restarts
        return store
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def launch_rank() -> int:
    """Return this process's rank as its launcher says, 0 without a launcher."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0  # `processes` refuses it


def _check_launch() -> tuple[int, int, int | None]:
    """Return rank, number of processes and LOCAL_RANK, as torchrun sets them for each process.

    Raises:
        LocalError: names the variable that is missing or wrong.
    """
    least = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    numbers = {name: os.environ[name] for name in least if name in os.environ}
    for name, text in numbers.items():
        if not text.isdecimal() or int(text) < least[name]:
            raise LocalError(
                f"{name}={text} in the environment is no number from {least[name]}; start with "
                "torchrun, or unset it"
            )
    rank, world_size = int(numbers.get("RANK", 0)), int(numbers.get("WORLD_SIZE", 1))
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT") if world_size > 1 else ()
    needed = ("WORLD_SIZE", *needed) if "RANK" in numbers else needed
    for name in needed:
        if name not in os.environ:
            given = "RANK" if name == "WORLD_SIZE" else "WORLD_SIZE"
            raise LocalError(
                f"{given}={numbers[given]} is in the environment and {name} is not; start with "
                f"torchrun, or unset {given}"
            )
    if rank >= world_size:
        raise LocalError(
            f"RANK={rank} in the environment is not less than WORLD_SIZE={world_size}; start with "
            "torchrun, or unset both"
        )
    port = os.environ.get("MASTER_PORT", "")
    if world_size > 1 and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise LocalError(
            f"MASTER_PORT={port} in the environment is no port; start with torchrun, or unset it"
        )
    return rank, world_size, int(numbers["LOCAL_RANK"]) if "LOCAL_RANK" in numbers else None


def is_terminal(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal, wide enough for a bar."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns >= 40
    except (OSError, ValueError):
        return False


class TerminalHandler(logging.StreamHandler):
    """Logs to a terminal without tearing the bar there, which stands for its lines of figures."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record above the bar, but for one that the bar shows."""
        if getattr(record, "is_on_bar", False):
            return
        with suppress(OSError):  # the terminal was closed; the run goes on
            tqdm.write(self.format(record), file=self.stream)


class _QuietFile(io.FileIO):
    """A standard stream that drops what nobody can read: its reader or terminal is gone."""

    def write(self, data: Any) -> int:
        """Write what can be written; claim that all was."""
        with suppress(OSError):
            return super().write(data)
        return memoryview(data).nbytes


def mend_streams() -> None:
    """Let printing never end a run: closed streams, closed pipes and narrow encodings included.

    A stream that was closed (`>&-`) leads to /dev/null; otherwise the next file that is opened, say
    a checkpoint, would get its number, and what a C library prints. Characters that the encoding
    lacks are escaped. Streams that somebody has replaced stay.
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


def set_up_logging(is_main: bool, log_file: Path | None = None) -> None:
    """Send the log to standard output and, on the main process, to `log_file` as well."""
    terminal = TerminalHandler if is_terminal(sys.stdout) else logging.StreamHandler
    handlers: list[logging.Handler] = [terminal(sys.stdout)]
    if is_main and log_file is not None:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace"))
    layout = (
        "%(asctime)s %(message)s" if is_main else f"%(asctime)s [rank {launch_rank()}] %(message)s"
    )
    for handler in handlers:
        handler.setFormatter(PrintableFormatter(layout, "%H:%M:%S"))
    logger.handlers = handlers
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main else logging.WARNING)


def usable_cores() -> int:
    """Return how many cores this process may use; the machine may have more."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_device() -> str:
    """Return "cuda" where PyTorch finds such a device, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def set_determinism(deterministic: bool) -> None:
    """Choose between bit-exact and fastest kernels; to be called before CUDA starts."""
    torch.backends.cudnn.benchmark = False  # detection's shapes change with every batch
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def derive_seed(*parts: int) -> int:
    """Mix non-negative integers, say (seed, epoch, index), into one 63-bit seed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1


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


def printable(text: str, keep: str = "") -> str:
    """Return text from data, such as a class name, safe to print: control characters are escaped.

    Terminals obey ANSI sequences, and a line break would forge a line of the log.

    Args:
        keep: characters that are left as they are.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


class PrintableFormatter(logging.Formatter):
    """Formats a record without control characters; line breaks stay, for tables."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as safe text."""
        return printable(super().format(record), keep="\n\t")


def run_command(main: Callable[[], int | None]) -> None:
    """Call the `main` of a command and exit with its status; print a `UserError` as one message."""
    mend_streams()
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(printable(f"error: {error}", keep="\n"))


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file at `path` for writing; sync it at the end, delete it if that fails.

    What was there is removed first. A symbolic link is never followed.
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
            path.unlink()  # the half that fits
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
    """Let a new file take the place of `path`; delete it if it cannot."""
    try:
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append `record` as one line of JSON and see it to the disk.

    Raises:
        UserError: if the file cannot be written; it is then as it was.
    """
    with file_errors("write", path):
        _append(path, (json.dumps(record) + "\n").encode())


def _append(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while data:  # a disk that fills takes a part, and refuses the rest
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of `path`; a last line that a crash cut short is left out.

    A line that is no record is logged with its number, and left out.

    Raises:
        UserError: if the file cannot be read.
    """
    records, bad_lines = _parse_json_lines(path)
    for number in bad_lines:
        logger.warning("%s, line %d: not a record, left out", path, number)
    return records


def _parse_json_lines(path: Path) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """Return the records, and by their numbers the lines that are none."""
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
    needed = ("step", "epoch") if "AP" in value else ("step",)
    return all(name in value for name in needed) and all(
        type(value[name]) is int for name in ("step", "epoch") if name in value
    )


def rewind_json_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the records after optimizer step `step`, in place, and return the others.

    A run that resumes at `step` writes the later ones again, so every record stands once. A line
    that is no record is logged and moved to a file beside, `NAME.bad`.

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


def load_tensors(path: Path, source: str) -> dict[str, Any]:
    """Read a file of tensors and plain types to the CPU; `source` names it in messages.

    The `argparse.Namespace` in a checkpoint of torchvision's scripts becomes a dict.

    Raises:
        UserError: if it is damaged or of another kind.
    """
    try:
        # A Namespace takes attributes and runs nothing, so that it is as plain as a dict.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any bytes can be in the file, and raise anything
        reason = str(error).split("\n")[0][:200]
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
    found = {name: version(name) for name in names}
    return {"python": platform.python_version(), **found, "revision": _git_revision()}


def _git_revision() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return "unknown"
    return done.stdout.strip() or "unknown"


class StopSignal:
    """Remember that one of `STOP_SIGNALS` came; whoever trains asks between two steps.

    SIGTERM or SIGINT that comes again, more than `SAME_SIGNAL` seconds after the first, ends the
    process and its loader workers at once. SIGHUP stays ignored where `nohup` made it so.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._remember)
        # Python calls a handler only when the main thread returns from what it waits for, such as
        # another process. This thread reads the numbers that the system's handler writes.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def _remember(self, number: int, frame: Any) -> None:
        self.received = self.received or signal.Signals(number).name

    def __call__(self) -> bool:
        """Return whether a signal came."""
        return self.received is not None

    def _watch(self, reader: int) -> None:
        first = None  # when SIGTERM or SIGINT came for the first time
        is_told = False
        while True:
            number = os.read(reader, 1)[0]
            if number not in STOP_SIGNALS:
                continue
            if not is_told:
                text = "%s: the run stops after this step; a second one ends it at once"
                _log_in_thread(logging.INFO, text, signal.Signals(number).name)
                is_told = True
            if number in (signal.SIGTERM, signal.SIGINT):
                now = time.monotonic()
                first = first or now
                if now - first > SAME_SIGNAL:
                    _end_at_once(number)


def _log_in_thread(level: int, *message: Any) -> threading.Thread:
    """Log without waiting: the main thread may be blocked while it prints."""
    thread = threading.Thread(target=logger.log, args=(level, *message), daemon=True)
    thread.start()
    return thread


def _end_at_once(number: int) -> None:
    for worker in multiprocessing.active_children():
        worker.kill()
    text = "a second %s: ended at once; --resume auto goes on from the last save"
    _log_in_thread(logging.WARNING, text, signal.Signals(number).name).join(1.0)
    os._exit(128 + number)


def start_worker_server(*modules: str) -> None:
    """Start the process that loader workers are forked from, multiprocessing's "forkserver".

    A fork of this process would have the locks, but not the threads, of gloo, NCCL and CUDA:
    Python warns of it from 3.12 on, and PyTorch's page on DistributedDataParallel asks for
    "forkserver" with NCCL. With "spawn" each worker would import PyTorch by itself, for 3 seconds
    and 380 MB; the server does it once, and its workers share that memory. It does so in the
    background: call this as early as possible.

    Args:
        modules: what the workers import.
    """
    multiprocessing.set_forkserver_preload(list(modules))
    variables = {
        # Before Python 3.13 the server itself does not get `sys.path`.
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
        "OMP_NUM_THREADS": "1",  # NumPy starts threads where it is imported
        # If this process is killed, its semaphores are removed; nobody has to know.
        "PYTHONWARNINGS": ",".join(
            filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"])
        ),
    }
    before = dict(os.environ)
    os.environ |= variables
    try:
        resource_tracker.ensure_running()
        # The server and its workers inherit this; what comes here now, comes a moment later.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        for name in variables:
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]


def ignore_stop_signals(worker: int) -> None:
    """Let a DataLoader worker outlive the signal that torchrun sends to the whole process group.

    Otherwise the rank fails with "DataLoader worker killed" before it has saved its state. It ends
    with the rank, however that ends.
    """
    end_with_parent()
    torch.set_num_threads(1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn what DataLoader raises if its workers lack memory, hang or die into a LocalError.

    It raises them wherever the main process happens to be.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        problem = _worker_problem(error)
        if problem is None:
            raise
        raise LocalError(problem) from error


def _worker_problem(error: BaseException) -> str | None:
    """Return what a user can do about an error of DataLoader or its workers; None if unknown."""
    text, cause = str(error), error.__cause__ or error.__context__
    while cause is not None:
        text, cause = f"{text}\n{cause}", cause.__cause__ or cause.__context__
    if "Too many open files" in text or "received 0 items of ancdata" in text:
        return "too many open files; allow more with ulimit -n 65536, or give a smaller --workers"
    if re.search(r"DataLoader worker .*Bus error|</torch_.*No space left on device", text):
        return (
            "the loader workers have no room left in /dev/shm; start docker with --ipc=host (or "
            "--shm-size=8g), or give --workers 0"
        )
    if re.search(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)", text):
        return (
            "a loader worker was killed, perhaps as the machine ran out of memory (see dmesg); "
            "give a smaller --workers or --batch-size"
        )
    if "DataLoader timed out" in text:
        return (
            f"no loader worker delivered a batch for {LOADER_TIMEOUT:.0f} seconds: the storage of "
            "the images does not answer, or a worker is stopped (state D or T in ps), or /dev/shm "
            "is full (docker: --ipc=host); then go on with --resume auto"
        )
    return None


def kill_workers() -> None:
    """End the DataLoader workers of a failed process, which ignore Python's SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else DataLoader complains of their death
    for worker in multiprocessing.active_children():
        worker.kill()


def end_failed() -> None:
    """End this process after its exception was printed, if it is one of several.

    Python's own way out would leave NCCL's process group, and wait there for operations that the
    others never join.
    """
    if dist.is_available() and dist.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)


def end_with_parent() -> None:
    """End this process, started by multiprocessing, when the process that started it ends."""
    if sys.platform == "linux":  # which knows the server that it was forked from, if there is one
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def follow_launcher() -> None:
    """End this process when the torchrun that started it dies, so that no orphan keeps training.

    It gets SIGUSR1, which lets it save, and `LAUNCHER_GRACE` later SIGKILL. A process without a
    launcher is left alone: `nohup python train.py &` outlives its shell.
    """
    if not _is_launched():
        return
    launcher = os.getppid()
    if launcher == 1 and not _is_python(launcher):  # it died while this process was starting
        sys.exit("the launcher died")

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        # Not SIGTERM, which may have come before: the second one would end the process at once.
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(LAUNCHER_GRACE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _is_launched() -> bool:
    """Return whether the parent is a torchrun, or was one until it died.

    A shell that hands on torchrun's variables is none. torchrun gives every process a session of
    its own, and variables that it does not have itself.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.getsid(0) != os.getpid():
        return False
    parent = os.getppid()
    if parent == 1 or not Path("/proc/self/environ").exists():  # it died, or this is macOS
        return True
    try:
        of_parent = Path(f"/proc/{parent}/environ").read_bytes().split(b"\0")
    except OSError:  # another user's
        return False
    own = {os.fsencode(f"{k}={v}") for k, v in os.environ.items() if k.startswith("TORCHELASTIC")}
    return _is_python(parent) and not own <= set(of_parent)


def _is_python(process: int) -> bool:
    """Return whether `process` runs this interpreter, as torchrun does, even as a container's 1."""
    try:
        return os.readlink(f"/proc/{process}/exe") == os.readlink("/proc/self/exe")
    except OSError:  # another user's
        return False


def open_lock(path: Path) -> IO[str]:
    """Open, or create, a file to lock. What it holds stays; a symbolic link is not followed."""
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")


def lock_folder(folder: Path) -> IO[str]:
    """Claim `folder` until this process ends, however it ends; keep the result.

    A file system that has no locks, as some over cloud storage, is used without, with a warning.

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
