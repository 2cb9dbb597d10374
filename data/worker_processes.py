"""The worker processes of a DataLoader: how they start and end, and what their errors mean."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker

import torch

from utils import STOP_SIGNALS, LocalError

# Less than STEP_TIMEOUT, so that the process that waits for its workers speaks before the others.
LOADER_TIMEOUT = 540.0  # seconds without a batch from any worker


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
