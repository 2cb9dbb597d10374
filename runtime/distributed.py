"""The processes of a run: join and leave their group, and exchange values."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from utils import LocalError, UserError

# Rank 0 scores and writes while the others wait, so the host group has a long timeout. Where all
# processes arrive together, as in a training step, a peer that hangs is detected much sooner.
HOST_TIMEOUT = datetime.timedelta(hours=2)
STEP_TIMEOUT = datetime.timedelta(minutes=10)
NAMING_TIMEOUT = datetime.timedelta(seconds=10)  # torchrun kills survivors of a failure after 30
MEETING_EVERY = 10.0  # seconds between the meetings of an evaluation

T = TypeVar("T")


class PeerError(LocalError):
    """Another process of the run died or hangs."""


@dataclass(frozen=True)
class Processes:
    """The processes of one run, as one of them sees it.

    `host_group` is a gloo group for values on the host: checkpoints, evaluation. `meeting_group` is
    another, with a short timeout, where all processes arrive together. Both are None for a single
    process; every collective below is then skipped.
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

    def gather(self, value: T) -> list[T] | None:
        """Return the `value` of every process, by rank, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [value]
        values: Any = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.host_group)
        return values

    def on_main(self, action: Callable[[], T]) -> T:
        """Return on every process what `action` returns on rank 0.

        All processes must call this at nearly the same time; the action may take long.

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
        """Return the sums of `values` over all processes, which call this at nearly the same time.

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
        """Wait for every process, at most `timeout`, or `STEP_TIMEOUT` if that is None.

        Raises:
            PeerError: names those that did not come, if rank 0 did.
        """
        if self.world_size == 1:
            return
        try:
            # Only rank 0 uses this timeout; the others use that of the group.
            dist.monitored_barrier(self.meeting_group, timeout or STEP_TIMEOUT, wait_all_ranks=True)
        except RuntimeError as error:
            raise PeerError(
                f"[rank {self.rank}] another process of the run died or hangs; look for its "
                f"message. {str(error).splitlines()[0]}"
            ) from None


@contextmanager
def join_process_group(device: str) -> Iterator[Processes]:
    """Join the process group that torchrun describes, if it does, and leave it at the end.

    Args:
        device: "cuda" (this process takes GPU number LOCAL_RANK) or "cpu".

    After an exception the group stays: end the process as `utils.run_command` does.

    Raises:
        PeerError: names the processes that did not come to a collective operation of gloo. NCCL
            ends a process that waits in vain by itself.
        LocalError: if the launcher's variables are wrong, or there is no GPU for this process.
    """
    rank, world_size, local_rank = _check_launch()
    torch_device = torch.device(device)
    if torch_device.type == "cuda":
        index = torch_device.index or 0 if local_rank is None else local_rank
        torch_device = torch.device("cuda", index)
        if index >= torch.cuda.device_count():
            raise LocalError(
                f"LOCAL_RANK {index}: this machine has {torch.cuda.device_count()} GPUs for this "
                "run; start one process for each with --nproc_per_node"
            )
        torch.cuda.set_device(torch_device)
    if world_size == 1:
        yield Processes(torch_device)
        return
    backend = "nccl" if torch_device.type == "cuda" else "gloo"
    device_id = torch_device if torch_device.type == "cuda" else None
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
        group = Processes(torch_device, rank, world_size, host_group, meeting_group)
        yield group
    except RuntimeError as error:
        if group is not None and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            group.barrier(NAMING_TIMEOUT)  # gloo's error names a port at best
        raise
    # Skipped after an exception: NCCL would wait here for operations that the others never join.
    # See `utils.run_command`.
    dist.destroy_process_group()


def _store_of_this_attempt() -> dist.Store:
    """Return the store of this attempt, which has no addresses from before a restart.

    torchrun keeps one store over all restarts on a machine. Without a prefix per attempt, a new
    process may read the address of one that is gone ("connectFullMesh … Connection refused").
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=STEP_TIMEOUT))
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":  # machines count restarts separately
        return store
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def _check_launch() -> tuple[int, int, int | None]:
    """Return rank, number of processes and LOCAL_RANK, as torchrun sets them for each process.

    Raises:
        LocalError: names the variable that is missing or wrong.
    """
    ranks, counts = range(2**31), range(1, 2**31)
    ranges = {"RANK": ranks, "WORLD_SIZE": counts, "LOCAL_RANK": ranks, "LOCAL_WORLD_SIZE": counts}
    needed = ["WORLD_SIZE"] if "RANK" in os.environ else []
    if os.environ.get("WORLD_SIZE", "1") != "1":
        ranges["MASTER_PORT"] = range(1, 2**16)
        needed += ["RANK", "MASTER_ADDR", "MASTER_PORT"]
    texts = {name: os.environ[name] for name in ranges if name in os.environ}
    numbers = {name: int(text) for name, text in texts.items() if text.isdecimal()}
    problems = [
        f"{name}={text} in the environment is no number from {ranges[name].start} to "
        f"{ranges[name][-1]}"
        for name, text in texts.items()
        if numbers.get(name, -1) not in ranges[name]
    ]
    present = " ".join(f"{name}={text}" for name, text in texts.items())
    problems += [
        f"{present} is in the environment and {name} is not"
        for name in needed
        if name not in os.environ
    ]
    rank, world_size = numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 1)
    if rank >= world_size:
        problems.append(f"RANK={rank} in the environment is not less than WORLD_SIZE={world_size}")
    if problems:
        raise LocalError(f"{problems[0]}; start with torchrun, or unset what it sets")
    return rank, world_size, numbers.get("LOCAL_RANK")
