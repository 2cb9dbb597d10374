"""Seeds, records, locks and processes: pytest tests/test_utils.py."""

import ctypes
import errno
import fcntl
import json
import logging
import math
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.multiprocessing as mp
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import utils
from data.worker_processes import end_with_parent, ignore_stop_signals
from runtime import progress, signals
from runtime.distributed import Processes, join_process_group
from runtime.records import append_json_line, read_json_lines, rewind_json_lines
from runtime.signals import StopSignal, follow_launcher
from utils import UserError, derive_seed, lock_folder, replace_file

HOUSE = {path.stem: path for path in ROOT.glob("*.py")}
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/**/*.py")])
SCRIPTS = sorted([*ROOT.glob("recipes/*.sh"), ROOT / ".ci" / "run", ROOT / "Makefile"])

# --- seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts, seed",
    [
        ((0,), 7896617691693857887),
        ((1, 2, 3), 6498626229777268288),
        ((42, 25, 118286), 7747144459599563115),
        ((2**63 - 1, 0, 1), 415738565470188732),
    ],
)
def test_a_seed_is_the_same_on_every_platform_and_release(
    parts: tuple[int, ...], seed: int
) -> None:
    # A run that is resumed after an upgrade must augment alike: these numbers never change.
    assert derive_seed(*parts) == seed


def test_seeding_a_device_draws_what_seeding_all_of_them_draws() -> None:
    utils.seed_device(torch.device("cpu"), 1, 2, 3)
    drawn = torch.rand(5)
    torch.manual_seed(derive_seed(1, 2, 3))
    assert torch.equal(torch.rand(5), drawn)


def test_seeds_differ_and_fit_every_generator() -> None:
    parts = [(s, e, i) for s in (0, 1, 2**40) for e in range(10) for i in range(200)]
    seeds = [derive_seed(*p) for p in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # all bits are in use
    torch.Generator().manual_seed(max(seeds))


# --- records --------------------------------------------------------------------------------------


NAMES = st.text(max_size=5) | st.sampled_from(["a\nb", "\u2028", "\x85", "\x1c", "ä"])
OTHER_NAMES = NAMES.filter(lambda name: name not in ("step", "epoch", "AP"))
RECORDS = st.lists(
    st.builds(
        lambda values, step: values | {"step": step},
        st.dictionaries(OTHER_NAMES, st.floats(allow_nan=False) | st.integers(), max_size=3),
        st.integers(0, 20),
    ),
    max_size=8,
)


@settings(deadline=None, max_examples=50)
@given(records=RECORDS, step=st.integers(0, 20), data=st.data())
def test_records_survive_a_crash_at_any_byte_and_a_rewind(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[dict[str, Any]],
    step: int,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.getbasetemp() / "records.jsonl"
    path.unlink(missing_ok=True)
    ends = [0]
    for record in records:
        append_json_line(path, record)
        ends.append(path.stat().st_size)
    assert read_json_lines(path) == records
    if not records:
        return
    size = data.draw(st.integers(0, ends[-1]))
    os.truncate(path, size)
    whole = records[: sum(end <= size for end in ends) - 1]
    assert read_json_lines(path) == whole
    kept = rewind_json_lines(path, step)
    assert kept == [record for record in whole if record["step"] <= step]
    # The cut line is gone from the file, so that the next one begins a line of its own.
    append_json_line(path, {"step": step + 1})
    assert read_json_lines(path) == [*kept, {"step": step + 1}]
    assert len(path.read_text().split("\n")) == len(kept) + 2
    assert not list(path.parent.glob("records*tmp"))


def test_without_a_file_there_are_no_records(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "metrics.jsonl") == []
    assert rewind_json_lines(tmp_path / "metrics.jsonl", 5) == []
    assert read_json_lines(tmp_path / "metrics.jsonl") == []


def test_a_kill_while_rewinding_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(4):
        append_json_line(path, {"step": step})
    before = path.read_bytes()

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        rewind_json_lines(path, 2)
    assert path.read_bytes() == before


NO_RECORDS = [
    *(b"garbage", b"null", b"\0" * 40, b"", b"[1]", b"7", b'{"loss": 1}', b'{"step": "3"}'),
    *(b'{"step": 1.5}', b'{"step": null}', b'{"step": true}', b'{"step": 3, "loss": "low"}'),
    *(b'{"step": 3, "loss": null}', b'{"step": 3, "epoch": 0.5}', b'{"step": 3, "AP": 0.5}'),
    *(b'{"step": 3, "AP": [1], "epoch": 0}', b"\xff\xfe{}", b'{"step": 3', b"[" * 100_000),
]


@pytest.mark.parametrize("line", NO_RECORDS)
def test_a_line_that_is_no_record_is_moved_and_no_other_is_lost(
    tmp_path: Path,
    line: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(utils.logger, "propagate", True)
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 5):
        append_json_line(path, {"step": step, "epoch": 0, "loss": math.nan})
        if step == 2:
            path.write_bytes(path.read_bytes() + line + b"\n")
    whole = path.read_bytes()
    assert [record["step"] for record in read_json_lines(path)] == [1, 2, 3, 4]
    assert f"{path}, line 3" in caplog.text and path.read_bytes() == whole
    caplog.clear()
    assert [record["step"] for record in rewind_json_lines(path, 3)] == [1, 2, 3]
    assert f"{path}, line 3" in caplog.text and "metrics.jsonl.bad" in caplog.text
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == line + b"\n"
    caplog.clear()
    assert [record["step"] for record in rewind_json_lines(path, 3)] == [1, 2, 3]
    assert caplog.text == ""


def test_a_record_that_does_not_fit_on_the_disk_leaves_no_part(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_json_line(path, {"step": 1})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl"):
            append_json_line(path, {"step": 2})
        assert path.read_bytes() == before
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl"):
            replace_file(path, "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    append_json_line(path, {"step": 2})
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]


def test_files_are_written_beside_links_and_not_through_them(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "a.json.tmp").symlink_to(victim)
    replace_file(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new" and victim.read_text() == "precious"
    assert not (tmp_path / "a.json.tmp").is_symlink()


# --- the lock -------------------------------------------------------------------------------------


class Holder:
    """Another process that holds the lock, and perhaps has a child as DataLoader's workers are."""

    def __init__(self, folder: Path, with_worker: bool = False) -> None:
        reader, writer = os.pipe()
        self.worker = None
        self.process = os.fork()
        if self.process == 0:
            self._hold(folder, with_worker, writer)
        os.close(writer)
        with os.fdopen(reader) as file:
            line = file.readline().strip()
        assert line.isdigit(), line
        if with_worker:
            self.worker = int(line)

    @staticmethod
    def _hold(folder: Path, with_worker: bool, writer: int) -> None:
        try:
            lock = lock_folder(folder)
            worker = os.fork() if with_worker else os.getpid()
            if worker:
                os.write(writer, f"{worker}\n".encode())
            os.close(writer)
            time.sleep(60)
            lock.close()
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)


@pytest.fixture
def holder() -> Iterator[Callable[..., Holder]]:
    made: list[Holder] = []

    def make(folder: Path, **options: Any) -> Holder:
        made.append(Holder(folder, **options))
        return made[-1]

    yield make
    for one in made:
        for process in (one.process, one.worker):
            if process is not None:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        try:
            os.waitpid(one.process, 0)
        except ChildProcessError:
            pass


def test_a_second_process_is_refused_until_the_first_is_killed(
    tmp_path: Path, holder: Callable[..., Holder]
) -> None:
    first = holder(tmp_path)
    with pytest.raises(UserError, match="another run is writing there") as error:
        lock_folder(tmp_path)
    assert "--output-dir" in str(error.value) and str(tmp_path) in str(error.value)
    first.kill()
    with lock_folder(tmp_path):
        pass


def test_a_closed_lock_is_free(tmp_path: Path, holder: Callable[..., Holder]) -> None:
    lock_folder(tmp_path).close()
    assert holder(tmp_path)


def test_locks_of_two_folders_are_independent(
    tmp_path: Path, holder: Callable[..., Holder]
) -> None:
    holder(tmp_path)
    (tmp_path / "other").mkdir()
    assert not lock_folder(tmp_path / "other").closed


def test_the_lock_of_a_killed_run_is_free_while_its_workers_still_end(
    tmp_path: Path, holder: Callable[..., Holder]
) -> None:
    # DataLoader's workers are forks; they notice within seconds that their parent is gone. A
    # restart must not wait for that.
    first = holder(tmp_path, with_worker=True)
    first.kill()
    assert first.worker is not None
    os.kill(first.worker, 0)  # it lives
    lock_folder(tmp_path).close()


def test_a_lock_that_is_a_link_is_refused_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match=r"cannot write .*\.lock"):
        lock_folder(tmp_path)
    assert victim.read_text() == "precious"


def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: Any, operation: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(utils.logger, "propagate", True)
    lock_folder(tmp_path).close()
    assert f"{tmp_path} cannot be locked" in caplog.text and "no other run" in caplog.text


# --- processes ------------------------------------------------------------------------------------


def test_a_single_process_needs_no_group() -> None:
    single = Processes(torch.device("cpu"))
    assert (
        single.is_main
        and single.broadcast({"a": 1}) == {"a": 1}
        and single.sum([1, 2.5]) == [1, 2.5]
    )
    single.barrier()


def _take_part(rank: int, world_size: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join_process_group("cpu") as processes:
        processes.barrier()
        seen = {
            "rank": processes.rank,
            "world_size": processes.world_size,
            "is_main": processes.is_main,
            "device": str(processes.device),
            "broadcast": processes.broadcast(["from", rank]),
            "sum": processes.sum([float(rank), 0.1]),
        }
    seen["left"] = not torch.distributed.is_initialized()
    (folder / f"{rank}.json").write_text(json.dumps(seen))


def test_an_exception_leaves_the_group_and_its_process_ends_all_the_same(tmp_path: Path) -> None:
    # NCCL's destroy_process_group waits for operations that the others never join; gloo's does not.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "script.py"
    script.write_text(FAIL)
    ranks = [
        subprocess.Popen(
            [sys.executable, script],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "PYTHONPATH": str(ROOT),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 0]
    assert "Traceback" in outputs[0] and "ValueError: on rank 0" in outputs[0]
    assert outputs[1] == ""


FAIL = """
import atexit, os, sys, time
from pathlib import Path
import torch.distributed as dist
import train
from runtime.distributed import join_process_group

rank, left = os.environ["RANK"], Path(__file__).with_name("left")
destroy = dist.destroy_process_group
dist.destroy_process_group = lambda: destroy() if rank == "1" else time.sleep(1000)
if rank == "0":
    atexit.register(time.sleep, 1000)  # as NCCL, when Python itself ends the process

def main(args):
    with join_process_group("cpu"):
        if rank == "0":
            while not left.exists():  # else rank 1, which may still be joining, fails as well
                time.sleep(0.01)
            raise ValueError("on rank 0")
    left.touch()

train.main = main
train.parse_args = lambda: None
train.run_from_command_line()
"""


def test_processes_join_agree_and_leave(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_take_part, args=(2, port, tmp_path), nprocs=2, start_method="fork")
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "rank": rank,
            "world_size": 2,
            "is_main": rank == 0,
            "device": "cpu",
            "broadcast": ["from", 0],
            "sum": [1.0, 0.2],
            "left": True,
        }


@pytest.fixture
def old_handlers() -> Iterator[None]:
    """Give back, after a test, the handlers that `StopSignal` replaces."""
    handlers = {number: signal.getsignal(number) for number in utils.STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
@pytest.mark.usefixtures("old_handlers")
def test_a_stop_signal_is_remembered_and_does_nothing_else(name: str) -> None:
    stop = StopSignal()
    assert not stop() and stop.received is None
    for _ in range(3):
        os.kill(os.getpid(), getattr(signal, name))
    assert stop() and stop.received == name


@pytest.mark.usefixtures("old_handlers")
def test_sighup_stays_ignored_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == "SIGTERM"


def test_the_first_signal_that_stops_a_run_is_the_one_it_names() -> None:
    def run(writer: int) -> None:
        stop = StopSignal()
        for number in (signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        os.write(writer, str(stop.received).encode())

    process, output = _forked(run)
    assert output.read() == "SIGHUP"
    assert os.waitpid(process, 0)[1] == 0


def _forked(run: Callable[[int], None]) -> tuple[int, IO[str]]:
    """Fork a process that calls `run` with where to write; return it, and what reads from there."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            run(writer)
        finally:
            os._exit(0)
    os.close(writer)
    return process, os.fdopen(reader)


def _ended(process: int, seconds: float) -> int | None:
    """Return the exit code of a child, None if it is alive after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(process, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


def _hang_in_c(writer: int) -> None:
    """Be a run with a loader worker that waits for another process and sees no Python any more."""
    worker = multiprocessing.get_context("fork").Process(target=_worker, daemon=True)
    worker.start()
    StopSignal()
    os.write(writer, f"{worker.pid}\n".encode())
    mutex, libc = ctypes.create_string_buffer(256), ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # for ever; signals do not interrupt it


def _worker() -> None:
    ignore_stop_signals(0)
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_blocked_run_and_its_workers_at_once(
    number: signal.Signals,
) -> None:
    process, output = _forked(_hang_in_c)
    worker = int(output.readline())
    for _ in range(3):  # of one press of Ctrl-C, from the terminal and from torchrun
        os.kill(process, number)
        assert _ended(process, 0.2) is None
    time.sleep(0.6)
    os.kill(process, number)
    assert _ended(process, 1.5) == 128 + number
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(worker, 0)
            time.sleep(0.02)


@pytest.mark.parametrize(
    "first, second", [("SIGHUP", "SIGTERM"), ("SIGTERM", "SIGUSR1"), ("SIGUSR1", "SIGTERM")]
)
def test_what_a_closed_terminal_and_a_dead_launcher_send_is_no_second_signal(
    first: str, second: str
) -> None:
    process, output = _forked(_hang_in_c)
    worker = int(output.readline())
    os.kill(process, getattr(signal, first))
    time.sleep(1.1)
    os.kill(process, getattr(signal, second))
    assert _ended(process, 0.5) is None
    for one in (process, worker):
        os.kill(one, signal.SIGKILL)
    os.waitpid(process, 0)


def _after_the_parent_died(trainer: Callable[[int], None]) -> str:
    """Fork a launcher that forks `trainer`, kill it, and return all that the trainer wrote then."""
    reader, writer = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:
            try:
                trainer(writer)
            finally:
                os._exit(0)
        time.sleep(60)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        assert file.readline() == "ready\n"
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
        return file.read()  # until the trainer's end of the pipe is closed


def test_a_loader_worker_dies_with_its_process() -> None:
    def worker(writer: int) -> None:
        end_with_parent()
        os.write(writer, b"ready\n")
        time.sleep(60)
        os.write(writer, b"survived")

    assert _after_the_parent_died(worker) == ""


def test_a_process_without_torchrun_keeps_running(monkeypatch: pytest.MonkeyPatch) -> None:
    # As after `nohup python train.py &` and a logout.
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def trainer(writer: int) -> None:
        follow_launcher()
        os.write(writer, b"ready\n")
        time.sleep(2)
        os.write(writer, b"survived")

    assert _after_the_parent_died(trainer) == "survived"


def test_a_process_may_save_when_its_torchrun_dies_but_not_linger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(signals, "LAUNCHER_GRACE", 0.5)

    def trainer(writer: int) -> None:
        os.setsid()  # as torchrun does it
        stop = StopSignal()
        follow_launcher()
        os.write(writer, b"ready\n")
        while not stop():
            time.sleep(0.02)
        os.write(writer, f"saved at {stop.received}".encode())
        time.sleep(60)
        os.write(writer, b", lingered")

    assert _after_the_parent_died(trainer) == "saved at SIGUSR1"


def test_a_process_of_a_shell_with_torchruns_variables_keeps_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")

    def trainer(writer: int) -> None:  # in the session of its parent, as every command of a shell
        follow_launcher()
        os.write(writer, b"ready\n")
        time.sleep(2)
        os.write(writer, b"survived")

    assert _after_the_parent_died(trainer) == "survived"


HAND_ON = """
import os, subprocess, sys
environment = {**os.environ, **({"TORCHELASTIC_ERROR_FILE": "2"} if sys.argv[1] == "new" else {})}
child = "from runtime.signals import _is_launched; print(_is_launched())"
subprocess.run([sys.executable, "-c", child], env=environment, start_new_session=True, check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("variables, is_launched", [("new", True), ("handed on", False)])
def test_the_launcher_is_the_parent_that_set_the_variables(
    variables: str, is_launched: bool
) -> None:
    # Also in a session of its own, as after `setsid`; and torchrun may run below another torchrun.
    environment = {
        **os.environ,
        "TORCHELASTIC_RUN_ID": "1",
        "TORCHELASTIC_ERROR_FILE": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", HAND_ON, variables]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(is_launched)


PRINT = """
import logging, sys
from pathlib import Path
import utils
from runtime import progress

def main():
    progress.set_up_logging(0, Path(sys.argv[1]))
    for number in range(200):
        utils.logger.info("line %d é → 猫", number)
        print("printed é → 猫", flush=True)
        print("complained é → 猫", file=sys.stderr)
    with open(sys.argv[1]) as file:
        assert file.fileno() > 2

utils.run_command(main)
"""


@pytest.mark.parametrize(
    "shell",
    [
        '"$@" >&-',
        '"$@" 2>&-',
        '"$@" <&- >&- 2>&-',
        '"$@" | head -1',
        '"$@" 2>&1 | head -1',
        '"$@" >/dev/full 2>/dev/full',
        'PYTHONIOENCODING=ascii "$@"',
        'LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 "$@"',
    ],
)
def test_a_run_that_cannot_print_continues_and_keeps_its_log(shell: str, tmp_path: Path) -> None:
    log, script = tmp_path / "log.txt", tmp_path / "script.py"
    script.write_text(PRINT, encoding="utf-8")
    command = ["bash", "-c", f"set -o pipefail; {shell}", "bash", sys.executable, script, log]
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = log.read_text(encoding="utf-8").splitlines()
    assert [line[9:] for line in lines] == [f"line {n} é → 猫" for n in range(200)]
    printed = done.stdout + done.stderr
    assert "Error" not in printed and "Exception" not in printed and "Traceback" not in printed
    if shell.startswith(("PYTHONIOENCODING", "LC_ALL")):
        assert r"line 199 \xe9 \u2192 \u732b" in done.stdout
        assert done.stderr.count(r"complained \xe9 \u2192 \u732b") == 200


@pytest.mark.parametrize("rank", [0, 1])
def test_other_processes_log_only_warnings(
    tmp_path: Path, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = utils.logger.handlers, utils.logger.propagate, utils.logger.level
    try:
        progress.set_up_logging(rank, tmp_path / "log.txt" if rank == 0 else None)
        utils.logger.info("a step")
        utils.logger.warning("a warning")
        printed = capsys.readouterr().out
        assert ("a step" in printed) == (rank == 0) and "a warning" in printed
        assert ("[rank 1]" in printed) == (rank == 1)
        if rank == 0:
            text = (tmp_path / "log.txt").read_text()
            assert "a step" in text and "a warning" in text
    finally:
        for handler in utils.logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.close()
        utils.logger.handlers, utils.logger.propagate = before[:2]
        utils.logger.setLevel(before[2])


def test_versions_are_plain_text_and_name_the_revision() -> None:
    versions = utils.versions()
    assert torch.__version__.startswith(versions["torch"].split("+")[0])
    assert {"python", "torchvision", "numpy", "hotcoco", "pycocotools", "revision"} <= set(versions)
    assert all(type(value) is str and value for value in versions.values())
    assert json.loads(json.dumps(versions)) == versions


def test_control_characters_of_data_do_not_reach_the_log_or_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert utils.printable("猫 é\x1b[31m\n\x7f\x9b\udcff") == r"猫 é\x1b[31m\n\x7f\x9b\udcff"
    handlers = utils.logger.handlers, utils.logger.propagate, utils.logger.level
    try:
        progress.set_up_logging(0, tmp_path / "log.txt")
        utils.logger.info("class %s\nnext line", "cat\x1b[2J\x9b")
    finally:
        for handler in utils.logger.handlers:
            handler.close()
        utils.logger.handlers, utils.logger.propagate = handlers[:2]
        utils.logger.setLevel(handlers[2])
    for text in ((tmp_path / "log.txt").read_text(), capsys.readouterr().out):
        assert text.endswith("class cat\\x1b[2J\\x9b\nnext line\n")

    def fails() -> None:
        raise utils.UserError("cat\x1b[2J\n  second finding")

    with pytest.raises(SystemExit) as raised:
        utils.run_command(fails)
    assert raised.value.code == 1
    assert capsys.readouterr().err == "error: cat\\x1b[2J\n  second finding\n"


INTERRUPTED = """
import utils
from data.worker_processes import start_worker_server

def main():
    start_worker_server("slow")
    raise KeyboardInterrupt

utils.run_command(main)
"""


def test_ctrl_c_ends_the_server_of_workers_that_still_starts(tmp_path: Path) -> None:
    # Otherwise a worker that it forks later fails with a traceback below the message.
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(80)\n")  # as the import of PyTorch
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, script]  # whose output stays open as long as the server lives
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
