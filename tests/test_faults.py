"""Exact after any fault, numbered as in docs/reliability.md: pytest tests/test_faults.py.

Real runs by the real torchrun, with loader workers, hurt by real signals. What they leave in the
end must equal, to the bit, what a run without faults leaves (`faults.gate`).
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import (
    Launched,
    Runs,
    assert_same,
    clean_up,
    seconds_until_gone,
)
from helpers import flip_a_bit, sidecar, write_malice

from runtime import checkpoint
from runtime.records import read_json_lines

pytestmark = pytest.mark.faults
smoke = pytest.mark.smoke
# One process takes the batches of a step one after the other: two steps an epoch.
ALONE = ("--accumulate-steps", "4")
MakeRuns = Callable[..., Runs]
Baseline = Callable[..., dict[str, str]]


@pytest.fixture
def make_runs(tiny_shapes: Path, tmp_path: Path) -> Iterator[MakeRuns]:
    """Runs in a folder of their own: `make_runs(*flags, mutations=())`."""
    folders: list[Path] = []

    def make(*flags: str, data: Path = tiny_shapes, **options: Any) -> Runs:
        folders.append(tmp_path / str(len(folders)))
        return Runs(folders[-1], data, *flags, **options)

    yield make
    for folder in folders:
        clean_up(folder)


@pytest.fixture(scope="session")
def baseline(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    """The gate of a run without faults, made once: `baseline(ranks, *flags)`."""
    known: dict[Any, dict[str, str]] = {}

    def get(ranks: int, *flags: str) -> dict[str, str]:
        if (ranks, flags) not in known:
            root = tmp_path_factory.mktemp("baseline") / "work"
            runs = Runs(root, tiny_shapes, *flags)
            runs.run(ranks=ranks)
            known[ranks, flags] = runs.gate()
            clean_up(root)
        return known[ranks, flags]

    return get


def newest_step(runs: Runs) -> int:
    """The step of the newest checkpoint that verifies; 0 without one."""
    newest = checkpoint.newest(runs.folder)
    return 0 if newest is None else int(checkpoint.load(newest)["step"])


def preempted(runs: Runs) -> str:
    return (runs.folder / "preempted").read_text()


def assert_nothing_is_left(runs: Runs) -> None:
    """No process, no temporary file, and sidecars that fit."""
    assert seconds_until_gone(runs.folder) < 60
    assert not list(runs.folder.glob("**/*.tmp"))
    names = {path.name for path in runs.folder.glob("*.pth")}
    assert {path.stem for path in runs.folder.glob("*.sha256")} == names
    assert runs.verified() == sorted(names)


# --- 1, 2, 3, 4: planned stops --------------------------------------------------------------------


# An epoch has three steps. 0 is a stop while the first epoch is evaluated.
@pytest.mark.parametrize(
    "stops", [pytest.param((1, 0), marks=smoke), (1, 2, 3, 0, 4, 5)], ids=["two", "all"]
)
def test_1_stops_at_any_step_and_in_the_evaluation(
    stops: tuple[int, ...], make_runs: MakeRuns, baseline: Baseline
) -> None:
    # Without workers a start takes half as long; where they matter is in other tests.
    flags = ("--workers", "0") if len(stops) == 2 else ()
    runs = make_runs(*flags)
    for stop in stops:
        if stop:
            runs.run("--max-steps", str(stop), ranks=3)
            assert newest_step(runs) == stop
        else:
            runs.run(ranks=3, faults=[{"at": "eval:1", "rank": 2, "do": "SIGUSR1"}])
            assert newest_step(runs) == 3 and "signal to another" in preempted(runs)
            assert '"AP"' not in (runs.folder / "metrics.jsonl").read_text()
    runs.run(ranks=3)
    assert_same(runs.gate(), baseline(3, *flags))
    assert_nothing_is_left(runs)


def stop_at(stops: tuple[int, ...], runs: Runs, expected: dict[str, str]) -> None:
    for stop in stops:
        runs.run("--max-steps", str(stop), ranks=3)
    runs.run(ranks=3)
    assert_same(runs.gate(), expected)


def test_2_stops_at_steps_1_and_4(make_runs: MakeRuns, baseline: Baseline) -> None:
    runs = make_runs()
    stop_at((1, 4), runs, baseline(3))
    assert newest_step(runs) == 6


def test_2_fails_without_the_warm_up_of_ddp(make_runs: MakeRuns) -> None:
    # Compared with a run that lacks it as well, which has the first step's order of sums only once.
    without = make_runs("--epochs", "1", mutations=["no warm-up"])
    without.run(ranks=3)
    with pytest.raises(AssertionError, match="not as in the run without faults"):
        stop_at((1,), make_runs("--epochs", "1", mutations=["no warm-up"]), without.gate())


def test_3_two_and_three_resumes_in_one_epoch(make_runs: MakeRuns, baseline: Baseline) -> None:
    # With averaged weights, which have batch statistics as well, and validation losses.
    flags = ("--ema-decay", "0.9", "--val-loss", "--epochs", "1")
    runs = make_runs(*flags)
    for stop in ("1", "2", "3"):
        runs.run("--max-steps", stop, ranks=3)
    runs.run(ranks=3)
    assert_same(runs.gate(), baseline(3, *flags))


def test_4_another_number_of_workers_at_every_resume(
    make_runs: MakeRuns, baseline: Baseline
) -> None:
    runs = make_runs()
    for stop, workers in (("2", "0"), ("4", "2"), ("6", "1")):
        runs.run("--max-steps", stop, "--workers", workers, ranks=3)
    runs.run(ranks=3)
    assert_same(runs.gate(), baseline(3))


# --- 5, 6: signals --------------------------------------------------------------------------------


def stop_by_signal(runs: Runs, at: str, **fault: Any) -> Launched:
    """Send SIGTERM to torchrun at a moment: it has to end soon, with a checkpoint and a marker."""
    before = newest_step(runs)
    faults = [{"at": at, "do": "SIGTERM", "to": "launcher", **fault}]
    # The third signal ends torchrun; the ranks then have this long, on a machine however slow.
    patience = {"LAUNCHER_GRACE": 100.0}
    launched = runs.run(ranks=2, check=False, faults=faults, patience=patience)
    seconds_until_gone(runs.folder, limit=120.0)
    print(f"SIGTERM at {at}: all gone {runs.since_last_fault():.1f} s later")
    assert launched.process.returncode != 0
    assert f"{at} on rank" in (runs.record / "faults.txt").read_text()
    if at.startswith(("step", "save")):
        assert newest_step(runs) > before
        assert_nothing_is_left(runs)
    if at != "start":
        assert re.match(r"(SIG\w+|a signal to another process) at step \d", preempted(runs))
    return launched


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(("step:2",), marks=smoke),
        ("start", "joined", "step:1", "save:1", "eval:1", "step:6", "eval:1"),
    ],
    ids=["one", "all"],
)
def test_5_sigterm_at_any_moment(
    moments: tuple[str, ...], make_runs: MakeRuns, baseline: Baseline
) -> None:
    runs = make_runs()
    for at in moments:
        stop_by_signal(runs, at, dwell=0.5)
    runs.run(ranks=2)
    assert_same(runs.gate(), baseline(2))
    assert_nothing_is_left(runs)


def test_5_sigterm_at_random_times(make_runs: MakeRuns, baseline: Baseline) -> None:
    runs, draw = make_runs(), random.Random(5)
    for _ in range(3):
        wait = draw.uniform(0.0, 4.0)
        launched = runs.start(ranks=2)
        launched.wait_for("from step")
        time.sleep(wait)
        launched.kill(signal.SIGTERM)
        launched.wait()
        seconds_until_gone(runs.folder)
        if "ended after" not in launched.output():
            assert "at step" in preempted(runs)
    runs.run(ranks=2)
    assert_same(runs.gate(), baseline(2))
    assert_nothing_is_left(runs)


@pytest.mark.parametrize(
    "mutations",
    [pytest.param([], marks=smoke), ["mortal workers"]],
    ids=["immortal", "mortal"],
)
def test_5_what_signals_a_group_of_processes_does_not_end_loader_workers(
    mutations: list[str], make_runs: MakeRuns, baseline: Baseline
) -> None:
    runs = make_runs(*ALONE, mutations=mutations)
    fault = {"at": "step:1", "do": "SIGTERM", "to": "worker"}
    done = runs.run(check=False, faults=[fault])
    if mutations:
        assert done.process.returncode == 1 and "a loader worker was killed" in done.output()
    else:
        assert done.process.returncode == 0
        assert_same(runs.gate(), baseline(1, *ALONE))


def test_6_signals_thrice_other_signals_and_to_one_rank(
    make_runs: MakeRuns, baseline: Baseline
) -> None:
    runs = make_runs()
    # A signal that comes in a step is seen in the next, or in this one by a rank that is late; all
    # ranks save once, after that one.
    for at, fault in (("step:1", {"times": 3}), ("step:3", {"do": "SIGINT"})):
        launched = stop_by_signal(runs, at, dwell=0.5, **fault)
        step = int(at[-1])
        assert newest_step(runs) in (step, step + 1)
        assert launched.output().count(f"after step {newest_step(runs)}") == 1
    done = runs.run(ranks=2, faults=[{"at": "step:5", "rank": 1, "do": "SIGTERM"}])
    assert newest_step(runs) == 6 and "step 6" in preempted(runs)
    assert "stopped by a signal to another process after step 6" in done.output()
    runs.run(ranks=2)
    assert_same(runs.gate(), baseline(2))


def test_22_a_closed_terminal_stops_a_run_as_sigterm_does(
    make_runs: MakeRuns, baseline: Baseline
) -> None:
    runs = make_runs()
    launched = stop_by_signal(runs, "step:2", dwell=0.5, do="SIGHUP")
    assert preempted(runs).startswith("SIGHUP")
    assert ", saved; run the same command to resume" in launched.output()
    runs.run(ranks=2)
    assert_same(runs.gate(), baseline(2))
    assert_nothing_is_left(runs)


@pytest.mark.parametrize("ranks", [1, 2])
def test_23_a_second_ctrl_c_ends_all_at_once_and_the_run_can_resume(
    ranks: int, make_runs: MakeRuns, baseline: Baseline
) -> None:
    # The step takes 20 s more, during which nobody asks whether to stop.
    flags = ("--accumulate-steps", "2") if ranks == 1 else ()
    runs = make_runs(*flags)
    target = {"to": "launcher"} if ranks > 1 else {}
    fault = {"at": "step:2", "do": "SIGINT", "times": 2, "pause": 1.5, "dwell": 20.0, **target}
    launched = runs.run(ranks=ranks, check=False, faults=[fault])
    seconds_until_gone(runs.folder)
    seconds = runs.since_last_fault() - 1.5  # from the second
    print(f"second Ctrl-C, {ranks} ranks: all gone {seconds:.1f} s later")
    assert launched.process.returncode != 0 and seconds < 8
    assert "the run stops after this step" in launched.output()
    assert "ended at once; --resume auto resumes" in launched.output()
    runs.run(ranks=ranks)
    assert_same(runs.gate(), baseline(ranks, *flags))
    assert_nothing_is_left(runs)


# --- 7, 8: kills ----------------------------------------------------------------------------------


@pytest.mark.parametrize("launch", ["port", "standalone"])
def test_7_torchrun_restarts_killed_ranks_by_itself(
    launch: str, make_runs: MakeRuns, baseline: Baseline
) -> None:
    runs = make_runs("--checkpoint-every", "1")
    draw = random.Random(7)
    faults = [
        {"at": f"step:{step}", "rank": draw.randrange(3), "do": "SIGKILL", "attempt": attempt}
        for attempt, step in enumerate((2, 5))
    ]
    launched = runs.run(ranks=3, restarts=2, faults=faults, standalone=launch == "standalone")
    assert launched.output().count(" from step ") == 3
    assert_same(runs.gate(), baseline(3))
    assert_nothing_is_left(runs)


def kill_in_saves(runs: Runs, operations: Iterator[str | int], expected: dict[str, str]) -> int:
    """Kill at one operation of a save after the other, relaunching in between."""
    runs.run("--max-steps", "1")
    kills = 0
    for operation in operations:
        fault = {"at": f"save:1:{operation}", "do": "SIGKILL"}
        launched = runs.run("--checkpoint-every", "1", check=False, faults=[fault])
        if launched.process.returncode == 0:
            break
        assert launched.process.returncode == -signal.SIGKILL, launched.output()
        assert runs.verified()
        kills += 1
    runs.run()
    assert_same(runs.gate(), expected)
    assert_nothing_is_left(runs)
    return kills


@pytest.mark.parametrize(
    "operations",
    [pytest.param(("half", 5), marks=smoke), ("half", *range(1, 30))],
    ids=["two", "all"],
)
def test_8_kill_at_each_operation_of_a_save(
    operations: tuple[Any, ...], make_runs: MakeRuns, baseline: Baseline
) -> None:
    flags = ("--accumulate-steps", "2", "--epochs", "3") if len(operations) > 2 else ALONE
    kills = kill_in_saves(make_runs(*flags), iter(operations), baseline(1, *flags))
    assert kills == len(operations) if len(operations) == 2 else kills > 12


def test_8_fails_if_a_save_writes_in_place(make_runs: MakeRuns, baseline: Baseline) -> None:
    runs = make_runs(*ALONE, mutations=["save in place"])
    with pytest.raises(AssertionError):
        kill_in_saves(runs, iter((2,)), baseline(1, *ALONE))


# --- 9, 10: bad files, full disks -----------------------------------------------------------------


def zero_a_block(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(2**20))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit": flip_a_bit,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeroed": zero_a_block,
    "empty": lambda path: os.truncate(path, 0),
    "no sidecar": lambda path: sidecar(path).unlink(),
    "foreign sidecar": lambda path: sidecar(path).write_text(f"{'0' * 64}  {path.name}\n") and None,
}


def damage_and_resume(runs: Runs, damages: list[str], expected: dict[str, str]) -> None:
    runs.run("--max-steps", "2", "--checkpoint-every", "1")
    for damage in damages:
        # The one before was saved a step earlier, so that the fallback has something to do again.
        DAMAGES[damage](runs.folder / checkpoint.NEWEST)
        step = 1 + damages.index(damage)
        done = runs.run("--max-steps", str(step + 2), "--checkpoint-every", "1")
        assert "checkpoint.pth is damaged" in done.output()
        assert f"from step {step}\n" in done.output()
    runs.run()
    assert_same(runs.gate(), expected)


@pytest.mark.parametrize(
    "damages", [pytest.param(["bit"], marks=smoke), list(DAMAGES)], ids=["bit", "all"]
)
def test_9_damage_is_logged_and_the_checkpoint_before_is_used(
    damages: list[str], make_runs: MakeRuns, baseline: Baseline
) -> None:
    flags = ("--accumulate-steps", "2") if len(damages) > 1 else ALONE
    runs = make_runs(*flags)
    damage_and_resume(runs, damages, baseline(1, *flags))
    assert checkpoint.NEWEST in runs.verified()  # the damaged one was replaced


def test_9_fails_if_nothing_is_verified(make_runs: MakeRuns, baseline: Baseline) -> None:
    flags = ("--accumulate-steps", "2")
    runs = make_runs(*flags, mutations=["unverified"])
    runs.run("--max-steps", "2")
    flip_a_bit(runs.folder / checkpoint.NEWEST)
    runs.run()  # loads it in silence
    with pytest.raises(AssertionError, match="not as in the run without faults"):
        assert_same(runs.gate(), baseline(1, *flags))


def test_9_if_all_are_damaged_every_one_is_named(make_runs: MakeRuns) -> None:
    runs = make_runs(*ALONE)
    runs.run("--max-steps", "3", "--checkpoint-every", "1")
    names = runs.verified()
    assert len(names) >= 3
    for name, damage in zip(names, DAMAGES.values(), strict=False):
        damage(runs.folder / name)
    done = runs.run(ranks=2, check=False)
    assert done.process.returncode != 0
    (message,) = [line for line in done.output().splitlines() if line.startswith("error: ")]
    assert all(name in message for name in names) and "verifies" in message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A file system of its own: `small_disk(megabytes)`."""
    mounted: list[Path] = []

    def mount(megabytes: int) -> Path:
        disk = tmp_path / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", disk]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system is not allowed here")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", "--lazy", disk], check=True)


def without_launcher(output: str) -> str:
    """Return the output up to torchrun's error report, which has a traceback too."""
    return output.split("torch/distributed/elastic/multiprocessing/api.py")[0]


def assert_refused_on_all_ranks(launched: Launched, path: Path) -> None:
    assert launched.process.returncode != 0
    seconds_until_gone(path)
    output = launched.output()
    assert f"error: cannot write {path}" in output or f"'{path}" in output, output
    assert output.count("\nerror: ") + output.startswith("error: ") == 1
    assert "Traceback" not in without_launcher(output)


def test_10_disk_full(
    make_runs: MakeRuns, baseline: Baseline, small_disk: Callable[..., Path], tmp_path: Path
) -> None:
    runs = make_runs("--keep-checkpoints", "0")
    disk = small_disk(240)  # one of 154 MB fits, a second does not
    runs.folder.symlink_to(disk)
    runs.run("--max-steps", "1", ranks=2)
    before = runs.verified()
    assert before == [checkpoint.NEWEST]
    assert_refused_on_all_ranks(runs.run(ranks=2, check=False), runs.folder)
    assert runs.verified() == before and newest_step(runs) == 1
    subprocess.run(["mount", "-o", "remount,size=2g", disk], check=True)
    runs.run(ranks=2)
    assert_same(runs.gate(), baseline(2, "--keep-checkpoints", "0"))


def test_10_read_only(make_runs: MakeRuns, small_disk: Callable[..., Path]) -> None:
    runs = make_runs()
    disk = small_disk(2000)
    runs.folder.symlink_to(disk)
    runs.run("--max-steps", "1", ranks=2)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert_refused_on_all_ranks(runs.run(ranks=2, check=False), runs.folder)
    assert newest_step(runs) == 1


def test_10_files_larger_than_the_system_allows(make_runs: MakeRuns) -> None:
    # Needs no right to mount: what is too large here is the checkpoint.
    runs = make_runs()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, limit[1]))
    try:
        launched = runs.run("--max-steps", "1", ranks=2, check=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert os.strerror(errno.EFBIG) in launched.output()
    assert_refused_on_all_ranks(launched, runs.folder)
    assert runs.verified() == []


# --- 11, 12, 13: launcher killed, rank stopped, loss not finite -----------------------------------


def test_11_no_process_outlives_a_killed_launcher(make_runs: MakeRuns, baseline: Baseline) -> None:
    runs = make_runs()
    for at in ("start", "joined", "step:2", "eval:1"):
        runs.run(ranks=2, check=False, faults=[{"at": at, "do": "SIGKILL", "to": "launcher"}])
        seconds_until_gone(runs.folder)
        print(f"launcher killed at {at}: all gone {runs.since_last_fault():.1f} s later")
    runs.run(ranks=2)
    assert_same(runs.gate(), baseline(2))
    assert_nothing_is_left(runs)


@pytest.mark.parametrize(
    "at, rank", [("joined", 1), ("step:2", 1), ("step:2", 0), ("save:1", 2), ("eval:1", 1)]
)
def test_12_a_stopped_rank_is_named(at: str, rank: int, make_runs: MakeRuns) -> None:
    runs = make_runs()
    fault = {"at": at, "rank": rank, "do": "SIGSTOP"}
    patience = {"STEP_TIMEOUT": 10.0, "NAMING_TIMEOUT": 10.0}
    launched = runs.start(ranks=3, faults=[fault], patience=patience)
    others = [other for other in range(3) if other != rank]
    launched.wait_for(f"error: [rank {others[0]}] another process of the run died or hangs")
    ranks = re.findall(r"error: \[rank (\d)\] another process.*", launched.output())
    assert set(map(int, ranks)) <= set(others)
    print(f"rank {rank} stopped at {at}: named {runs.since_last_fault():.1f} s later")
    named = rf"Ranks? {rank} failed to pass" if rank else r"send/recv from rank 0"
    assert re.search(named, launched.output(), re.IGNORECASE), launched.output()
    launched.kill(signal.SIGKILL)  # torchrun would wait 30 s for the stopped one
    launched.end()


@smoke
def test_13_nan_on_one_rank_stops_all_before_the_step(make_runs: MakeRuns) -> None:
    runs = make_runs("--checkpoint-every", "1")
    done = runs.run(ranks=3, check=False, faults=[{"at": "step:3", "rank": 1, "do": "nan"}])
    assert done.process.returncode != 0
    lines = [json.loads(t) for t in (runs.record / "rank1.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]  # and no rank went on
    assert len((runs.record / "rank0.jsonl").read_text().splitlines()) == 3
    ids = [number for batch in lines[-1]["batches"] for number in batch["ids"]]
    (named,) = [t for t in done.output().splitlines() if "step 3 is not finite; its images" in t]
    assert re.findall(r"\.jpg \(id (\d+)\)", named) == [str(number) for number in ids]
    (message,) = [line for line in done.output().splitlines() if line.startswith("error: ")]
    assert "loss of step 3 is not finite" in message
    assert newest_step(runs) == 2
    assert "Traceback" not in without_launcher(done.output())


# --- 14: another number of processes --------------------------------------------------------------


def test_14_other_numbers_of_processes_train_on_the_same(make_runs: MakeRuns) -> None:
    flags = ("--batch-size", "1", "--epochs", "3", "--eval-every", "0")
    whole, changing = make_runs(*flags), make_runs(*flags)
    whole.run("--accumulate-steps", "12")
    changing.run("--accumulate-steps", "3", "--max-steps", "2", ranks=4)
    for ranks, stop in ((2, "3"), (1, "5"), (3, "6")):
        done = changing.run("--max-steps", stop, ranks=ranks)
        assert f"--accumulate-steps {12 // ranks} keeps the global batch" in done.output()
    seen = [samples_by_step(runs.record) for runs in (whole, changing)]
    assert len(seen[0]) == 6 and seen[0] == seen[1]
    losses = [
        [record["loss"] for record in read_json_lines(runs.folder / "metrics.jsonl")]
        for runs in (whole, changing)
    ]
    assert losses[1][:2] == pytest.approx(losses[0][:2], rel=1e-6)
    # Sums in another order round differently, and steps build on it: 2e-4 was seen at the last.
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    done = changing.run(ranks=5, check=False)
    (message,) = [line for line in done.output().splitlines() if line.startswith("error: ")]
    assert "12 batches per optimizer step" in message and "5 processes" in message
    assert "can: 1, 2, 3, 4, 6, 12 (--accumulate-steps" in message


def samples_by_step(record: Path) -> dict[int, list[Any]]:
    """What all ranks together trained on in each step."""
    steps: dict[int, list[Any]] = {}
    for path in record.glob("rank*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            batches = [(batch["ids"], batch["sample"]) for batch in line["batches"]]
            steps.setdefault(line["step"], []).extend(batches)
    return {step: sorted(batches) for step, batches in steps.items()}


# --- 15: loader workers ---------------------------------------------------------------------------


def test_15_a_bad_image_is_named_and_ends_all_ranks(
    make_runs: MakeRuns, tiny_shapes: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_shapes, data)
    document = json.loads((data / "annotations" / "instances_train2017.json").read_text())
    entry = document["images"][5]
    path = data / "train2017" / entry["file_name"]
    path.write_bytes(path.read_bytes()[:200])
    runs = make_runs("--keep-empty", data=data)
    done = runs.run(ranks=2, check=False)
    assert done.process.returncode != 0
    messages = [line for line in done.output().splitlines() if line.startswith("error: ")]
    (about_image,) = [line for line in messages if "another process" not in line]
    assert f"image id {entry['id']}, {path}" in about_image
    assert seconds_until_gone(runs.folder) < 60


def test_15_a_killed_worker_ends_all_ranks_and_the_run_continues(
    make_runs: MakeRuns, baseline: Baseline
) -> None:
    runs = make_runs("--checkpoint-every", "1")
    fault = {"at": "step:2", "rank": 1, "do": "SIGKILL", "to": "worker"}
    done = runs.run(ranks=2, check=False, faults=[fault])
    assert done.process.returncode != 0 and "worker" in done.output()
    assert seconds_until_gone(runs.folder) < 60
    runs.run(ranks=2)
    assert_same(runs.gate(), baseline(2))


# --- 16, 17: old checkpoints, records -------------------------------------------------------------


def test_16_a_kill_while_pruning_leaves_no_lone_files(
    make_runs: MakeRuns, baseline: Baseline
) -> None:
    flags = (*ALONE, "--epochs", "3")
    runs = make_runs(*flags)
    for at in ("remove:model_0.pth.sha256", "remove:model_1.pth"):
        runs.run(check=False, faults=[{"at": at, "do": "SIGKILL"}])
        assert {checkpoint.NEWEST, "best.pth"} <= set(runs.verified())
    assert (runs.record / "faults.txt").read_text().count("remove:") == 2
    runs.run()
    assert_same(runs.gate(), baseline(1, *flags))
    assert_nothing_is_left(runs)
    assert len(list(runs.folder.glob("model_*.pth"))) == 1


def test_17_lines_of_the_log_cover_steps_on_both_sides_of_a_stop(make_runs: MakeRuns) -> None:
    # The gate compares metrics.jsonl in every test; here a line is the mean of two steps.
    flags = ("--print-freq", "2", "--epochs", "1")
    whole, stopped = make_runs(*flags), make_runs(*flags)
    whole.run("--accumulate-steps", "2")
    for stop in ("1", "3", "5"):
        stopped.run("--accumulate-steps", "2", "--max-steps", stop)
    lines = []
    for runs in (whole, stopped):
        records = read_json_lines(runs.folder / "metrics.jsonl")
        assert [r["step"] for r in records if "loss" in r] == [2, 4]
        lines.append([{k: r.get(k) for k in ("step", "loss", "lr", "AP")} for r in records])
    assert lines[0] == lines[1]


# --- 24: repeated images --------------------------------------------------------------------------


def test_24_a_stop_in_an_epoch_that_repeats_images(make_runs: MakeRuns, baseline: Baseline) -> None:
    flags = ("--repeat-threshold", "1", "--eval-every", "0")
    runs = make_runs(*flags)
    stop_at((4,), runs, baseline(3, *flags))
    steps = samples_by_step(runs.record)
    for epoch in ((1, 2, 3), (4, 5, 6)):
        ids = [image_id for step in epoch for batch_ids, _ in steps[step] for image_id in batch_ids]
        assert len(ids) == 18 and len(set(ids)) == 15


# --- 18, 19, 20, 21: what is refused --------------------------------------------------------------


def test_18_a_resume_with_other_settings_is_refused(
    make_runs: MakeRuns, tiny_shapes: Path, tmp_path: Path
) -> None:
    runs = make_runs(*ALONE)
    runs.run("--max-steps", "1")
    before = newest_step(runs), runs.verified()
    changed = tmp_path / "changed.json"
    original = tiny_shapes / "annotations" / "instances_train2017.json"
    document = json.loads(original.read_text())
    document["annotations"][0]["bbox"][2] += 1
    changed.write_text(json.dumps(document))
    renamed = tmp_path / "renamed.json"
    renamed.write_text(original.read_text().replace('"circle"', '"ellipse"'))
    cases = {
        ("--train-annotations", str(changed)): (
            "training data: ",
            "first difference is at image id",
        ),
        ("--train-annotations", str(renamed)): ("ellipse", "circle"),
        ("--batch-size", "1"): ("batch_size: 2 → 1",),
        ("--seed", "1"): ("seed: 0 → 1",),
        ("--wd", "0.05", "--norm-weight-decay", "0"): (
            "norm_weight_decay: None → 0.0",
            " wd: 0.0001 → 0.05",
        ),
        ("--model", "retinanet_resnet34_fpn"): ("retinanet_resnet18_fpn → retinanet_resnet34_fpn",),
    }
    for flags, parts in cases.items():
        done = runs.run(*flags, check=False)
        assert done.process.returncode == 1
        message = done.output()
        assert message.startswith("error: ")
        assert all(part in message for part in parts), message
    assert (newest_step(runs), runs.verified()) == before
    done = runs.run("--lr", "1e-4", "--max-steps", "2")
    assert "resuming with another lr: 0.001 → 0.0001" in done.output()


@smoke
@pytest.mark.parametrize("way", ["auto", "path", "weights"])
def test_19_a_malicious_checkpoint_is_refused_and_runs_nothing(
    way: str, make_runs: MakeRuns
) -> None:
    runs = make_runs(*ALONE)
    canary, path = runs.work_dir / "canary", runs.work_dir / "evil.pth"
    if way == "auto":
        runs.folder.mkdir()
        path = runs.folder / checkpoint.NEWEST
    write_malice(path, canary, "zip")
    done = subprocess.run(["sha256sum", path.name], cwd=path.parent, capture_output=True)
    sidecar(path).write_bytes(done.stdout)
    if way == "weights":
        launched = runs.run("--weights", str(path), resume=None, check=False)
    else:
        launched = runs.run(resume="auto" if way == "auto" else str(path), check=False)
    assert launched.process.returncode == 1
    (message,) = [line for line in launched.output().splitlines() if line.startswith("error: ")]
    assert str(path) in message and not canary.exists()


def test_20_all_errors_in_the_data_are_listed_before_training(
    make_runs: MakeRuns, tiny_shapes: Path, tmp_path: Path
) -> None:
    # A fixture per rule: test_coco_json.py and test_check_data.py.
    data = tmp_path / "data"
    shutil.copytree(tiny_shapes, data)
    path = data / "annotations" / "instances_train2017.json"
    document = json.loads(path.read_text())
    document["annotations"][3]["bbox"][0] = float("nan")
    document["annotations"][4]["category_id"] = 99
    path.write_text(json.dumps(document))
    gone = document["images"][2]
    (data / "train2017" / gone["file_name"]).unlink()
    runs = make_runs(data=data)
    done = runs.run(ranks=2, check=False)
    assert done.process.returncode != 0 and "from step" not in done.output()
    for entry in (document["annotations"][3]["id"], document["annotations"][4]["id"]):
        assert re.search(rf"\b{entry}\b", done.output())
    assert "99" in done.output() and gone["file_name"] in done.output()
    assert sum(line.startswith("error: ") for line in done.output().splitlines()) == 1


def test_21_two_runs_do_not_share_a_folder(make_runs: MakeRuns, baseline: Baseline) -> None:
    runs = make_runs()
    first = runs.start(ranks=2, faults=[{"at": "step:2", "rank": 1, "do": "SIGSTOP"}])
    first.wait_for("step 1 ")
    before = sorted(path.name for path in runs.folder.iterdir())
    second = runs.run(ranks=2, check=False)
    assert second.process.returncode != 0
    (message,) = [line for line in second.output().splitlines() if line.startswith("error: ")]
    assert "another run is writing there" in message and str(runs.folder) in message
    assert sorted(path.name for path in runs.folder.iterdir()) == before
    first.end()  # by kill -9 to all
    runs.run(ranks=2)
    assert_same(runs.gate(), baseline(2))


def test_the_comparison_of_runs_detects_a_single_bit(make_runs: MakeRuns) -> None:
    runs = make_runs(*ALONE, "--epochs", "1", "--eval-every", "0")
    runs.run()
    expected = runs.gate()
    state = checkpoint.load(runs.folder / checkpoint.NEWEST)
    bias = next(v for k, v in state["model"].items() if k.endswith("cls_logits.bias"))
    bias.view(torch.int32)[0] ^= 1
    checkpoint.save(state, runs.folder / checkpoint.NEWEST)
    with pytest.raises(AssertionError, match="model"):
        assert_same(runs.gate(), expected)
    lines = (runs.record / "rank0.jsonl").read_text()
    (runs.record / "rank0.jsonl").write_text(lines.replace('"step": 2', '"step": 3', 1))
    with pytest.raises(AssertionError):
        runs.gate()
