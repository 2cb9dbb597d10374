"""The shell logic of recipes/slurm.sbatch, with stand-ins: pytest tests/test_slurm.py."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT
from torch.distributed.run import get_args_parser

import train as train_script

SCRIPT = ROOT / "recipes" / "slurm.sbatch"
# It drops its own options, as srun does, and is the process that a signal to srun reaches.
SRUN = """#!/usr/bin/env bash
echo "$@" > "$LOG/srun"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$LOG/scontrol"
if [[ $1 == show ]]; then printf 'node7\\nnode8\\n'; fi
"""
# torchrun as it behaves: after TERM it waits for its workers, which save, and then exits with 1.
TORCHRUN = """#!/usr/bin/env bash
echo "$$" > "$LOG/torchrun"
stop() { sleep 0.3; echo "SIGTERM at step 5" > "$OUTPUT/preempted"; exit 1; }
case $CASE in
    ends) exit 0 ;;
    fails) exit 3 ;;
    fails-after-signal) trap 'exit 4' TERM ;;
    *) trap stop TERM ;;
esac
touch "$LOG/ready"
while true; do sleep 0.05; done
"""


class Job:
    """The script, started as Slurm does: a copy of it, in the folder where it was submitted."""

    def __init__(self, place: Path, case: str, *flags: str) -> None:
        self.log, self.output = place / "log", place / "out"
        for folder in (self.log, self.output, place / "bin", place / "spool"):
            folder.mkdir()
        stand_ins = (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN))
        for name, text in stand_ins:
            (place / "bin" / name).write_text(text)
            (place / "bin" / name).chmod(0o755)
        self.script = place / "spool" / "slurm_script"
        shutil.copy(SCRIPT, self.script)
        self.environment = {
            "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "LOG": str(self.log),
            "OUTPUT": str(self.output),
            "CASE": case,
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
        }
        self.flags = flags

    def start(self) -> None:
        command = ["bash", str(self.script), *self.flags]
        self.process = subprocess.Popen(command, env=self.environment, cwd=self.script.parent)

    def until_ready(self) -> None:
        while not (self.log / "ready").exists():
            assert self.process.poll() is None
            time.sleep(0.02)

    def end(self) -> int:
        return self.process.wait(60)

    def was_requeued(self) -> bool:
        return "requeue 42" in (self.log / "scontrol").read_text().splitlines()


MakeJob = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> MakeJob:
    def make(case: str, *flags: str) -> Job:
        job = Job(tmp_path, case, *flags)
        job.start()
        return job

    return make


def test_a_run_that_ends_is_not_requeued(start: MakeJob) -> None:
    job = start("ends")
    assert job.end() == 0 and not job.was_requeued()


def test_a_failure_keeps_its_status_and_is_not_requeued(tmp_path: Path) -> None:
    job = Job(tmp_path, "fails")
    (job.output / "preempted").write_text("SIGTERM at step 3\n")  # of the time before
    job.start()
    assert job.end() == 3 and not job.was_requeued()


@pytest.mark.parametrize("numbers", [[signal.SIGUSR1], [signal.SIGTERM], [signal.SIGUSR1] * 3])
def test_a_signal_reaches_torchrun_and_the_job_is_requeued(
    numbers: list[signal.Signals], start: MakeJob
) -> None:
    job = start("trains")
    job.until_ready()
    for number in numbers:
        job.process.send_signal(number)
        time.sleep(0.05)
    assert job.end() == 0 and job.was_requeued()
    with pytest.raises(ProcessLookupError):  # it waited until torchrun had ended
        os.kill(int((job.log / "torchrun").read_text()), 0)


def test_without_a_marker_a_signalled_job_is_not_requeued(start: MakeJob) -> None:
    job = start("fails-after-signal")
    job.until_ready()
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == 4 and not job.was_requeued()


def test_the_command_is_one_that_torchrun_and_train_accept(start: MakeJob) -> None:
    job = start("ends", "--data-path", "/my data", "--lr", "0.02")
    job.end()
    assert "/my data" in (job.log / "srun").read_text()
    text = (job.log / "srun").read_text().replace("/my data", "/my-data")
    words = shlex.split(text)
    launch = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert (launch.nnodes, launch.nproc_per_node) == ("2", "4")
    assert launch.rdzv_endpoint == "node7:29500" and launch.rdzv_id == "42"
    flags = train_script.build_parser().parse_args(launch.training_script_args)
    assert flags.resume == "auto" and flags.lr == 0.02 and flags.output_dir == job.output


def test_slurm_signals_only_the_script_and_lets_it_requeue() -> None:
    options = re.findall(r"^#SBATCH (\S+)", SCRIPT.read_text(), flags=re.MULTILINE)
    assert {"--signal=B:USR1@120", "--requeue", "--ntasks-per-node=1"} <= set(options)
    text = SCRIPT.read_text()
    assert text.rindex("#SBATCH") < text.index("\nset ")  # sbatch reads none after a command
