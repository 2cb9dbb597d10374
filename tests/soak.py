"""Kill and resume one small run many times at random moments; in the end it must be exact.

    PYTHONPATH=. python tests/soak.py --cycles 200 --seed 0

Any signal to any rank or to torchrun, at a random time, at a step, in an evaluation, in any
operation on a file of a save, at start-up. After each cycle: nobody is alive, what was a verified
checkpoint still is one, the disk holds no more than it should. After the last: no file that a run
without faults would not have, and the gate of faults.py equal to that run's. The same seed makes
the same faults.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import Launched, Runs, assert_same, clean_up, living, seconds_until_gone

from data import shapes
from runtime import checkpoint

RANKS = 3
STEPS_PER_EPOCH = 3  # of 15 images, on three ranks
# A save holds the newest, the one before it and a third while it is written; then there are the
# best and the newest epoch's, each of which is copied before the old one goes.
MOST_CHECKPOINTS = 6
SIGNALS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1")


@dataclass
class Report:
    """What happened in a soak.

    Attributes:
        faults: how many of each kind happened; a run may end before its fault does.
        slowest_end: seconds from the launcher's end until the last process was gone.
        most_megabytes: that the run's folder held after a cycle.
        fallbacks: starts that passed over a checkpoint that did not verify.
    """

    cycles: int = 0
    steps: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    slowest_end: float = 0.0
    most_megabytes: float = 0.0
    fallbacks: int = 0
    seconds: float = 0.0


def random_fault(draw: random.Random, step: int) -> dict[str, Any] | float:
    """Return a fault for `faults.py`, or a number of seconds after which to signal from outside."""
    number = draw.choice(SIGNALS)
    kind = draw.choice(("step", "step", "file", "save", "eval", "start", "time"))
    if kind == "time":
        return draw.uniform(0.0, 4.0)
    fault: dict[str, Any] = {"do": number, "to": draw.choice(("self", "self", "launcher"))}
    if kind == "step":
        fault |= {"at": f"step:{step + draw.randint(1, 4)}", "rank": draw.randrange(RANKS)}
    elif kind == "file":  # only rank 0 writes
        fault |= {"at": f"file:{draw.randint(1, 60)}"}
    elif kind == "save":
        fault |= {"at": f"save:{draw.randint(1, 2)}:{draw.randint(1, 20)}"}
    elif kind == "eval":
        fault |= {"at": f"eval:{draw.randint(1, 3)}", "rank": draw.randrange(RANKS)}
    else:
        fault |= {"at": draw.choice(("start", "joined")), "rank": draw.randrange(RANKS)}
    return fault


def hurt(runs: Runs, draw: random.Random, fault: dict[str, Any] | float) -> Launched:
    """Run until `fault` ends the run, or it ends by itself."""
    if isinstance(fault, float):
        launched = runs.start(ranks=RANKS)
        launched.wait_for("from step")
        time.sleep(fault)
        send_from_outside(launched, runs.folder, draw)
    else:
        launched = runs.start(ranks=RANKS, faults=[fault])
    try:
        launched.process.wait(15.0)
    except subprocess.TimeoutExpired:
        # A loader worker ignores all signals but KILL; and the second save of a run may have fewer
        # operations than the number at which the fault was to be.
        launched.process.terminate()
    launched.wait()
    return launched


def send_from_outside(launched: Launched, folder: Path, draw: random.Random) -> None:
    """Send a random signal to the launcher or another process of the run."""
    number = getattr(signal, draw.choice(SIGNALS))
    if draw.random() < 0.5:
        targets = [launched.process.pid]
    else:
        targets = sorted(living(folder) - {launched.process.pid})
    if targets:
        try:
            os.kill(draw.choice(targets), number)
        except ProcessLookupError:
            pass


def soak(folder: Path, data: Path, cycles: int, seed: int) -> Report:
    """Run `cycles` cycles below `folder` and compare; raise AssertionError if anything differs."""
    flags = ("--epochs", "100000", "--eval-every", "2", "--checkpoint-every", "2")
    runs, whole = Runs(folder / "hurt", data, *flags), Runs(folder / "whole", data, *flags)
    draw, report, begin = random.Random(seed), Report(), time.monotonic()
    step, size = 0, 0.0
    while report.cycles < cycles:
        fault = random_fault(draw, step)
        launched = hurt(runs, draw, fault)
        report.cycles += 1
        report.slowest_end = max(report.slowest_end, seconds_until_gone(runs.folder))
        report.fallbacks += "is damaged" in launched.output()
        newest = checkpoint.newest(runs.folder) if runs.folder.exists() else None
        reached = 0 if newest is None else int(checkpoint.load(newest)["step"])
        assert reached >= step, f"cycle {report.cycles}: from step {step} back to {reached}"
        step = reached
        size = sum(path.stat().st_size for path in runs.folder.rglob("*") if path.is_file()) / 1e6
        report.most_megabytes = max(report.most_megabytes, size)
        if newest is not None:
            one = newest.stat().st_size / 1e6
            assert size < MOST_CHECKPOINTS * one + 10, f"{size:.0f} MB on the disk"
        kind = "time" if isinstance(fault, float) else fault["at"].split(":")[0]
        report.faults[f"{kind} {launched.process.returncode}"] += 1
        launched.console.unlink()
        print(f"cycle {report.cycles}: {fault} → step {step}, {size:.0f} MB", flush=True)
    epochs = -(-step // STEPS_PER_EPOCH) + 1  # the one that was reached, and one more
    for each in (runs, whole):
        last = each.start("--epochs", str(epochs), ranks=RANKS)
        assert last.wait(60.0 * cycles) == 0, last.output()
    assert_same(runs.gate(), whole.gate())
    left, expected = (names(each.folder) for each in (runs, whole))
    assert left - {"checkpoint.previous.pth", "checkpoint.previous.pth.sha256"} <= expected, left
    assert not living(runs.folder)
    report.steps, report.seconds = epochs * STEPS_PER_EPOCH, time.monotonic() - begin
    return report


def names(folder: Path) -> set[str]:
    """Return the names of all files of a run."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def main(args: argparse.Namespace) -> None:
    """Soak in a temporary folder and print the report as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = shapes.make_shapes(root / "data", 16, 7, size=64)
        try:
            print(json.dumps(vars(soak(root, data, args.cycles, args.seed)), indent=2))
        finally:
            clean_up(root / "hurt")
            clean_up(root / "whole")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cycles", type=int, default=200, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    main(parser.parse_args())
