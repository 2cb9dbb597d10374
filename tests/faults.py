"""Launch real runs, inject faults at chosen moments, and compare the results: for test_faults.py.

Run as a script, this is train.py with a recorder and the faults that the environment asks for:

    FAULTS='[{"at": "step:3", "rank": 1, "do": "SIGKILL"}]' RECORD=folder python faults.py FLAGS

A fault happens once per process, at one of these moments (counted from 1): "start" (before main),
"joined" (in the process group), "step:N" (the N-th of the run, losses known, nothing changed),
"save:N" (before the N-th save of the process), "save:N:K" (its K-th file operation), "eval:N" (its
N-th batch evaluated), "file:N" (the N-th file operation in the output folder), "remove:NAME" (of
that file).
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from runtime.records import read_json_lines
from runtime.train_state import TrainState

# Not from helpers.py: as a script, this imports only what train.py imports.
ROOT = Path(__file__).parents[1]
# 15 images that count: on three ranks an epoch is three steps, and its last one is not full.
SMALL = tuple(
    "--model retinanet_resnet18_fpn --min-size 64 --max-size 64 --device cpu --workers 2 "
    "--batch-size 2 --print-freq 1 --opt sgd --lr 1e-3 --clip-grad-norm 1 --epochs 2 "
    "--keep-checkpoints 1 --score-thresh 0.001".split()
)
WITHOUT_PROMISE = ("images_per_second", "data_time_share", "memory_mb")  # of a line of the log
FILE_EVENTS = {"open", "os.rename", "os.link", "os.remove", "shutil.copyfile", "os.truncate"}
Fault = dict[str, Any]


# --- the recorder and the faults, inside of a run -------------------------------------------------


class Injector:
    """Injects the faults of this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.rank = int(os.environ.get("RANK", 0))
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        wanted: list[Fault] = json.loads(os.environ.get("FAULTS", "[]"))
        self.faults = {
            fault["at"]: fault
            for fault in wanted
            if fault.get("rank", 0) == self.rank and fault.get("attempt", 0) == attempt
        }
        self.saves = self.operations = self.in_save = self.evaluated = 0
        self.is_saving = False
        self.main = os.getpid()

    def reach(self, moment: str) -> bool:
        """Do what is to be done at `moment`; return whether there was a fault."""
        fault = self.faults.pop(moment, None)
        if fault is None or os.getpid() != self.main:
            return False
        with (Path(os.environ["RECORD"]) / "faults.txt").open("a") as file:
            file.write(f"{moment} on rank {self.rank}: {fault['do']} at {time.time():.2f}\n")
        if fault["do"] != "nan":
            self._send(fault)
        return True

    def _send(self, fault: Fault) -> None:
        workers = multiprocessing.active_children()
        target = {"launcher": os.getppid, "worker": lambda: workers[0].pid}
        process = target.get(fault.get("to", "self"), os.getpid)()
        for _ in range(fault.get("times", 1)):
            os.kill(process, getattr(signal, fault["do"]))
            time.sleep(fault.get("pause", 0.03))
        time.sleep(fault.get("dwell", 0.0))  # let it arrive here, of all places

    def operation(self) -> None:
        """Count an operation on a file of the run."""
        self.operations += 1
        self.reach(f"file:{self.operations}")
        if self.is_saving:
            self.in_save += 1
            self.reach(f"save:{self.saves}:{self.in_save}")

    def watch_files(self) -> None:
        """Count what this process opens for writing, renames, links, deletes and syncs."""

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in FILE_EVENTS or not str(arguments[0]).startswith(self.folder):
                return
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            if event == "os.remove":
                self.reach(f"remove:{Path(arguments[0]).name}")
            self.operation()

        fsync = os.fsync

        def counted_fsync(descriptor: int) -> None:
            self.operation()
            fsync(descriptor)
            self.operation()

        os.fsync = counted_fsync
        sys.addaudithook(audit)


def record_and_hurt() -> None:
    """Patch the product so that it records what it trains on, and suffers `FAULTS`."""
    import engine
    import train
    from data import worker_processes
    from runtime import checkpoint, distributed, signals
    from runtime import run_folder as run_module

    folder = Path(sys.argv[sys.argv.index("--output-dir") + 1])
    injector = Injector(folder)
    injector.reach("start")
    injector.watch_files()
    record = Path(os.environ["RECORD"]) / f"rank{injector.rank}.jsonl"
    state: list[TrainState] = []
    batches: list[dict[str, Any]] = []
    for name, seconds in json.loads(os.environ.get("PATIENCE", "{}")).items():
        (owner,) = (m for m in (distributed, signals, worker_processes) if hasattr(m, name))
        is_plain = isinstance(getattr(owner, name), float)
        setattr(owner, name, seconds if is_plain else datetime.timedelta(seconds=seconds))

    def train_one_epoch(model: Any, its_state: Any, *rest: Any, **options: Any) -> bool:
        state[:] = [its_state]
        batches.clear()
        try:
            return original["train_one_epoch"](model, its_state, *rest, **options)
        finally:
            state.clear()

    def to_device(images: Any, targets: Any, device: Any) -> Any:
        moved, moved_targets = original["to_device"](images, targets, device)
        if not state:
            injector.evaluated += 1
            injector.reach(f"eval:{injector.evaluated}")
            return moved, moved_targets
        parts = [*images, *(t[key] for t in targets for key in ("boxes", "labels"))]
        ids = [int(t["image_id"]) for t in targets]
        batches.append({"ids": ids, "sample": digest(parts)})
        fault = injector.faults.get(f"step:{state[0].step + 1}")
        if fault and fault["do"] == "nan" and injector.reach(f"step:{state[0].step + 1}"):
            moved = [image * float("nan") for image in moved]
        return moved, moved_targets

    def step_sums(sums: Any, *rest: Any) -> Any:
        # Before the processes meet: who has a checkpoint of this step, has all ranks' records.
        step = state[0].step + 1
        bits = {name: digest(value.detach()) for name, value in sums.items()}
        line = {"step": step, "rank": injector.rank, "batches": [*batches], "losses": bits}
        with record.open("a") as file:
            file.write(json.dumps(line) + "\n")
        batches.clear()
        injector.reach(f"step:{step}")
        return original["StepSums"](sums, *rest)

    def save(run: Any, name: str | None = None) -> None:
        injector.saves += 1
        injector.in_save, injector.is_saving = 0, True
        injector.reach(f"save:{injector.saves}")
        try:
            original["save"](run, name)
        finally:
            injector.is_saving = False

    @contextlib.contextmanager
    def new_file(path: Path) -> Iterator[Any]:
        moment = f"save:{injector.saves}:half"

        def write_half(data: Any) -> None:
            file.write(data[: len(data) // 2])
            file.flush()
            injector.reach(moment)

        with original["new_file"](path) as file:
            is_hurt = path.name.endswith(".pth.tmp") and moment in injector.faults
            yield SimpleNamespace(write=write_half) if is_hurt else file

    def open_folder(*rest: Any) -> Any:
        injector.reach("joined")
        return original["open_folder"](*rest)

    original: dict[str, Any] = {}
    for owner, replacement in (
        *((engine, train_one_epoch), (engine, to_device), (checkpoint, new_file)),
        *((engine, step_sums), (run_module.Run, save), (train, open_folder)),
    ):
        name = {"step_sums": "StepSums"}.get(replacement.__name__, replacement.__name__)
        original[name] = getattr(owner, name)
        setattr(owner, name, replacement)
    for mutation in json.loads(os.environ.get("MUTATIONS", "[]")):
        MUTATIONS[mutation]()
    train.run_from_command_line()


def _no_warm_up() -> None:
    from models import parallel

    parallel._warm_up = lambda *inputs: None


def _mortal_workers() -> None:

    from data import loading

    signal.pthread_sigmask = lambda how, numbers: set()
    loading.ignore_stop_signals = _be_mortal


def _be_mortal(worker: int) -> None:
    torch.set_num_threads(1)


def _save_in_place() -> None:
    from runtime import checkpoint

    def save(state: Any, path: Path) -> None:
        with path.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        written = hashlib.sha256(path.read_bytes()).hexdigest()
        path.with_name(path.name + ".sha256").write_text(f"{written}  {path.name}\n")

    checkpoint.save = save


def _unverified() -> None:
    import utils

    utils.is_verified = lambda path, patience=0.0: path.is_file()


# What the promise rests on, taken away: the fault tests must notice.
MUTATIONS: dict[str, Callable[[], None]] = {
    "no warm-up": _no_warm_up,
    "mortal workers": _mortal_workers,
    "save in place": _save_in_place,
    "unverified": _unverified,
}


# --- launching, outside ---------------------------------------------------------------------------


class Runs:
    """Runs of the real script with one output folder, one after the other."""

    def __init__(
        self, work_dir: Path, data: Path, *flags: str, mutations: Sequence[str] = ()
    ) -> None:
        self.work_dir = work_dir
        self.folder, self.record = work_dir / "run", work_dir / "record"
        self.record.mkdir(parents=True)
        self.flags = ("--data-path", str(data), *SMALL, *flags)
        self.mutations, self.count = list(mutations), 0

    def start(
        self,
        *flags: str,
        ranks: int = 1,
        restarts: int = 0,
        standalone: bool = False,
        faults: Sequence[Fault] = (),
        resume: str | None = "auto",
        patience: dict[str, float] | None = None,
    ) -> Launched:
        """Start a run, by torchrun unless it is one process.

        Args:
            patience: other values of timeouts in utils.py, by name, seconds.
        """
        self.count += 1
        script = str(Path(__file__).resolve())
        command = [sys.executable]
        if ranks > 1 or restarts:
            port = ("--nnodes=1", f"--master-port={free_port()}")
            launch = (*(("--standalone",) if standalone else port), f"--max-restarts={restarts}")
            command += ["-m", "torch.distributed.run", *launch, f"--nproc_per_node={ranks}"]
        command += [script, *self.flags, "--output-dir", str(self.folder), *flags]
        if resume is not None:
            command += ["--resume", resume]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "RECORD": str(self.record),
            "FAULTS": json.dumps(list(faults)),
            "MUTATIONS": json.dumps(self.mutations),
            "PATIENCE": json.dumps(patience or {}),
        }
        console = self.work_dir / f"console{self.count}.txt"
        return Launched(command, environment, console, self.folder)

    def run(self, *flags: str, check: bool = True, **options: Any) -> Launched:
        """Start a run and wait for its end; `check` that it ends well."""
        launched = self.start(*flags, **options)
        status = launched.wait()
        if check and status:
            raise AssertionError(f"exit status {status}:\n{launched.output()}")
        return launched

    def gate(self) -> dict[str, str]:
        """Return hashes of all that has to be equal to a run without faults."""
        return gate(self.folder, self.record)

    def since_last_fault(self) -> float:
        """Return the seconds since a fault happened here last."""
        lines = (self.record / "faults.txt").read_text().splitlines()
        return time.time() - float(lines[-1].split()[-1])

    def verified(self) -> list[str]:
        """Return which checkpoints of the run count."""
        import utils

        return sorted(p.name for p in self.folder.glob("*.pth") if utils.is_verified(p))


class Launched:
    """A command in the background, and all processes that came of it."""

    def __init__(
        self, command: list[str], environment: dict[str, str], console: Path, folder: Path
    ) -> None:
        self.console, self.folder = console, folder
        with console.open("w") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def wait(self, seconds: float = 200.0) -> int:
        """Return the exit status; what takes longer than `seconds` hangs."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            stuck = sorted(living(self.folder))
            self.end()
            raise AssertionError(f"hangs: {stuck}\n{self.output()}") from None

    def output(self) -> str:
        """Return what was printed."""
        return self.console.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 200.0) -> None:
        """Wait until `text` is printed."""
        end = time.monotonic() + seconds
        while text not in self.output():
            assert self.process.poll() is None, f"ended before {text!r}:\n{self.output()}"
            assert time.monotonic() < end, f"no {text!r} in:\n{self.output()}"
            time.sleep(0.02)

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to the launcher."""
        os.kill(self.process.pid, number)

    def end(self) -> None:
        """Kill what is left of it."""
        for process in living(self.folder):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()


def living(folder: Path) -> set[int]:
    """Return all processes of the runs in `folder`, loader workers included."""
    record = f"RECORD={folder.parent / 'record'}".encode()
    pids = set()
    for entry in Path("/proc").iterdir():
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except (OSError, IndexError):
            continue
        if record in variables and state != "Z":
            pids.add(int(entry.name))
    return pids


def seconds_until_gone(folder: Path, limit: float = 60.0) -> float:
    """Wait until no process of the run in `folder` is alive; return how long that took."""
    start = time.monotonic()
    while left := living(folder):
        assert time.monotonic() - start < limit, f"still alive: {left}"
        time.sleep(0.05)
    return time.monotonic() - start


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


# --- the gate -------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """Return a hash of plain values and tensors, to the bit."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        sha.update(b"{")
        for key in sorted(value, key=repr):
            sha.update(repr(key).encode())
            _feed(sha, value[key])
    elif isinstance(value, list | tuple):
        sha.update(b"[")
        for item in value:
            _feed(sha, item)
    else:
        sha.update(repr(value).encode())


def gate(folder: Path, record: Path) -> dict[str, str]:
    """Hash a run: model, EMA, optimizer, schedule, position, the ordered log, and its records."""
    from runtime import checkpoint

    state = checkpoint.load(folder / checkpoint.NEWEST)
    names = ("model", "ema", "optimizer", "scaler", "epoch", "step", "position", "window")
    hashes = {name: digest(state[name]) for name in (*names, "evaluations")}
    schedule = state["lr_scheduler"]
    hashes["schedule"] = digest([schedule["last_epoch"], schedule["_last_lr"]])
    hashes["log"] = digest(training_log(record, state["step"]))
    records = read_json_lines(folder / "metrics.jsonl")
    steps = [r["step"] for r in records if "loss" in r]
    assert steps == list(range(1, state["step"] + 1)), steps
    kept = [{k: v for k, v in r.items() if k not in WITHOUT_PROMISE} for r in records]
    hashes["metrics"] = digest(kept)
    for path in sorted(folder.glob("*.pth")):
        if path.name != checkpoint.PREVIOUS:  # which steps that is depends on where one stopped
            hashes[path.name] = digest(checkpoint.load(path)["model"])
    return hashes


def training_log(record: Path, last: int) -> list[dict[str, Any]]:
    """Return what was trained on, by step and rank: done again after a fault, it must be equal."""
    seen: dict[tuple[int, int], dict[str, Any]] = {}
    for path in sorted(record.glob("rank*.jsonl")):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            key = line["step"], line["rank"]
            assert seen.setdefault(key, line) == line, f"step and rank {key} differ when repeated"
    ranks = {rank for _, rank in seen}
    assert set(seen) >= {(step, rank) for step in range(1, last + 1) for rank in ranks}
    return [seen[key] for key in sorted(seen) if key[0] <= last]


def assert_same(actual: dict[str, str], expected: dict[str, str]) -> None:
    """Compare two gates; the error names what differs."""
    different = [name for name in {**actual, **expected} if actual.get(name) != expected.get(name)]
    assert not different, f"not as in the run without faults: {different}"


def clean_up(folder: Path) -> None:
    """End all processes below `folder`, and delete its checkpoints."""
    for process in living(folder / "run"):
        os.kill(process, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    record_and_hurt()
