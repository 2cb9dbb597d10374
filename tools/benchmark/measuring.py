"""What every benchmark needs: rows of a table, times in turn, fresh processes, memory (Linux)."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import utils

MB = 1e6  # bytes
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table.

    Attributes:
        ours, torchvision: samples. As many of both were taken in turn and are compared in pairs;
            none of torchvision's: there is nothing there to compare with.
        more_is_better: which way the ratio goes; above 1 ours is the better.
        budget: the least ratio to reach; limit: the most that `ours` may be.
    """

    name: str
    unit: str
    ours: Sequence[float]
    torchvision: Sequence[float] = ()
    more_is_better: bool = False
    budget: float | None = None
    limit: float | None = None

    def ratios(self) -> list[float]:
        """Return how many times better ours is, per pair; empty where that has no meaning."""
        ours, theirs = list(self.ours), list(self.torchvision)
        if not theirs:
            return []
        if len(ours) != len(theirs):
            ours, theirs = [statistics.median(ours)], [statistics.median(theirs)]
        better, worse = (ours, theirs) if self.more_is_better else (theirs, ours)
        return [a / b for a, b in zip(better, worse, strict=True)] if all(worse) else []

    def met(self) -> bool | None:
        """Return whether budget and limit hold; None where there are none."""
        if self.limit is not None and statistics.median(self.ours) > self.limit:
            return False
        if self.budget is None:
            return None if self.limit is None else True
        return bool(self.ratios()) and statistics.median(self.ratios()) >= self.budget

    def as_json(self) -> dict[str, Any]:
        """Return medians, their ratio, and the least and the largest ratio of a pair."""
        ratios = self.ratios()
        return {
            "name": self.name,
            "ours": statistics.median(self.ours),
            "torchvision": statistics.median(self.torchvision) if self.torchvision else None,
            "ratio": statistics.median(ratios) if ratios else None,
            "unit": self.unit,
            "spread": [min(ratios), max(ratios)] if ratios else None,
            "budget": self.budget,
            "limit": self.limit,
            "met": self.met(),
        }


def in_turn(
    functions: Sequence[Callable[[], Any]],
    repeats: int,
    rate: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Time functions in turn, in changing order, so that all see the same machine.

    Args:
        rate: what one call does, for results per second; None is seconds.
        clock: `time.process_time` counts only what this process computes.
    """
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats):
        order = list(range(len(functions)))
        for number in order if repeat % 2 == 0 else reversed(order):
            begin = clock()
            functions[number]()
            seconds = clock() - begin
            times[number].append(seconds if rate is None else rate / seconds)
    return times


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function of a module in a Python of its own, and return what it returns."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def memory(pid: int | str = "self") -> dict[str, float]:
    """Return a process's memory, MB: all of "rss", its share "pss", what it alone has "private"."""
    mb = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        mb[name] = int(value) * 1024 / MB
    private = mb["Private_Clean:"] + mb["Private_Dirty:"]
    return {"rss": mb["Rss:"], "pss": mb["Pss:"], "private": private}


def start_peak() -> float:
    """Forget the peak so far; return what is resident now, MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory()["rss"]


def peak_memory() -> float:
    """Return the most that was resident of this process since `start_peak`, MB."""
    return _status("/proc/self/status", "VmHWM")


def available_memory() -> float:
    """Return what this machine can still give to processes, MB."""
    return _status("/proc/meminfo", "MemAvailable")


def _status(path: str, name: str) -> float:
    line = next(x for x in Path(path).read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024 / MB


def machine() -> dict[str, Any]:
    """Describe where and with what was measured."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    return {
        "cpu": cpu,
        "cores": utils.usable_cores(),
        "memory_gb": round(_status("/proc/meminfo", "MemTotal") / 1e3),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        **utils.versions(),
    }
