"""Signals: every stop signal ends a run after the step; a launcher that dies ends its processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from utils import STOP_SIGNALS, logger

LAUNCHER_GRACE = 8.0  # seconds to end a step and save in, once the launcher is gone
# One press of Ctrl-C reaches a process twice, from the terminal and from torchrun.
SAME_SIGNAL = 1.0  # seconds


class StopSignal:
    """Remembers that one of `STOP_SIGNALS` came; the training loop asks between two steps.

    A second SIGTERM or SIGINT, more than `SAME_SIGNAL` seconds after the first, ends the
    process and its loader workers at once. SIGHUP stays ignored under `nohup`.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._remember)
        # Python calls a handler only after the main thread stops waiting, for example for another
        # process. This thread reads the signal numbers from a pipe at once.
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
        is_logged = False
        while True:
            number = os.read(reader, 1)[0]
            if number not in STOP_SIGNALS:
                continue
            if not is_logged:
                text = "%s: the run stops after this step; a second one ends it at once"
                _log_in_thread(logging.INFO, text, signal.Signals(number).name)
                is_logged = True
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
    text = "a second %s: ended at once; --resume auto resumes from the last save"
    _log_in_thread(logging.WARNING, text, signal.Signals(number).name).join(1.0)
    os._exit(128 + number)


def follow_launcher() -> None:
    """End this process when the torchrun that started it dies, so that no orphan keeps training.

    It gets SIGUSR1, so that it can save, and SIGKILL `LAUNCHER_GRACE` seconds later. A process
    without a launcher goes on: `nohup python train.py &` outlives its shell.
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

    A shell that passes on torchrun's variables is no torchrun. torchrun starts every process in a
    new session, with variables that torchrun itself does not have.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.getsid(0) != os.getpid():
        return False
    parent = os.getppid()
    if parent == 1 or not Path("/proc/self/environ").exists():  # it died, or this is macOS
        return True
    try:
        of_parent = Path(f"/proc/{parent}/environ").read_bytes().split(b"\0")
    except PermissionError:  # another user's
        return False
    except OSError:  # it died just now
        return True
    if of_parent == [b""]:  # it is dying; its children have no other parent yet
        return True
    here = {os.fsencode(f"{k}={v}") for k, v in os.environ.items() if k.startswith("TORCHELASTIC")}
    return _is_python(parent) and not here <= set(of_parent)


def _is_python(process: int) -> bool:
    """Return whether `process` runs this interpreter, as torchrun does, also as process 1."""
    try:
        return os.readlink(f"/proc/{process}/exe") == os.readlink("/proc/self/exe")
    except OSError:  # another user's
        return False
