"""Two machines train like one, also after losing a process: pytest tests/test_two_nodes.py.

The machines are network namespaces of this one, each with an address and a name of its own, joined
by a virtual cable. What runs on each is recipes/two_nodes.sh, with a torchrun that starts the
recorder of faults.py instead of train.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Runs, assert_same, clean_up, seconds_until_gone
from helpers import ROOT

pytestmark = pytest.mark.faults
ADDRESSES = ("10.213.87.1", "10.213.87.2")
TORCHRUN = """#!/usr/bin/env bash
arguments=()
for word in "$@"; do
    if [[ $word == train.py ]]; then word=$RECORDER; fi
    arguments+=("$word")
done
exec "$PYTHON" -m torch.distributed.run "${arguments[@]}"
"""
# In namespaces of its own, the machine has a name that both find under its address.
ON_HOST = """
hostname "$1" && mount --bind "$2" /etc/hosts && ip link set lo up || exit 99
shift 2
exec "$@"
"""


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces with a cable between them."""
    names = [f"rn{os.getpid()}h{number}" for number in (1, 2)]
    cables = [f"rn{os.getpid() % 10**6}v{number}" for number in (1, 2)]
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add {cables[0]} type veth peer name {cables[1]}")
    for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
        commands.append(f"ip link set {cable} netns {name}")
        commands.append(f"ip -n {name} address add {address}/24 dev {cable}")
        commands.append(f"ip -n {name} link set {cable} name eth0")
        commands.append(f"ip -n {name} link set eth0 up")
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces are not allowed here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start_on(host: str, name: str, runs: Runs, names: Path, faults: str) -> subprocess.Popen[str]:
    """Run the recipe in a namespace, as one of two machines with one process each."""
    tools = runs.work_dir / "bin"
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "RECORDER": str(ROOT / "tests" / "faults.py"),
        "PYTHONPATH": str(ROOT),
        "RECORD": str(runs.record),
        "FAULTS": faults,
        "OUTPUT": str(runs.folder),
        "GPUS": "1",  # processes per machine
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    recipe = ("bash", str(ROOT / "recipes" / "two_nodes.sh"), ADDRESSES[0], *runs.flags)
    enter = ("ip", "netns", "exec", host, "unshare", "--mount", "--uts", "bash", "-c", ON_HOST)
    with (runs.work_dir / f"console-{name}.txt").open("w") as console:
        return subprocess.Popen(
            [*enter, "bash", name, str(names), *recipe],
            env=environment,
            stdout=console,
            stderr=console,
            text=True,
        )


def test_two_machines_equal_one_also_after_losing_a_process(
    hosts: list[str], tiny_shapes: Path, tmp_path: Path
) -> None:
    # --scale-lr is part of the recipe: the global batch is 4 images here.
    flags = ("--scale-lr", "--checkpoint-every", "1")
    single = Runs(tmp_path / "alone", tiny_shapes, *flags)
    together = Runs(tmp_path / "together", tiny_shapes, *flags)
    names = together.work_dir / "hosts"
    text = [f"{address} {name}" for address, name in zip(ADDRESSES, ("one", "two"), strict=True)]
    names.write_text("\n".join(["127.0.0.1 localhost", *text]) + "\n")
    (together.work_dir / "bin").mkdir()
    (together.work_dir / "bin" / "torchrun").write_text(TORCHRUN)
    (together.work_dir / "bin" / "torchrun").chmod(0o755)
    try:
        single.run(ranks=2)
        faults = json.dumps([{"at": "step:3", "rank": 1, "do": "SIGKILL", "attempt": 0}])
        launched = [
            start_on(host, name, together, names, faults)
            for host, name in zip(hosts, ("one", "two"), strict=True)
        ]
        statuses = [process.wait(400) for process in launched]
        printed = "".join(path.read_text() for path in together.work_dir.glob("console-*.txt"))
        assert statuses == [0, 0], printed
        assert "step:3 on rank 1" in (together.record / "faults.txt").read_text()
        assert printed.count(" from step ") == 2
        assert_same(together.gate(), single.gate())
        seconds_until_gone(together.folder)
    finally:
        for runs in (single, together):
            clean_up(runs.work_dir)
