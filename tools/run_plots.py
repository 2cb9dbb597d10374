"""Read what runs left, and draw how they went: losses, learning rate, AP and speed over steps."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import utils
from tools import drawing

APS = {"AP": ("#000000", "-o"), "AP50": ("#0072B2", "--s"), "AP75": ("#D55E00", "-.^")}
METRICS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)
SPEED = ("images_per_second", "data_time_share", "memory_mb")
# Settings that say where a run is and not what it is.
PLACES = ("output_dir", "resume", "max_steps", "test_only")
RESUMED: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (1, 2))}
GREY = "#7F7F7F"
RESUMED_LINE = Line2D([], [], color=GREY, label="resumed", **RESUMED)


@dataclasses.dataclass(frozen=True)
class RunRecords:
    """What one run left.

    Attributes:
        about: `args.json`: "args", "categories", "versions", "summary" and more.
        training, evaluations: the lines of `metrics.jsonl` of either kind, by step.
        resumed: the steps after which the run was started again.
        warnings: those in its log, each once.
    """

    name: str
    about: Mapping[str, Any]
    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    resumed: list[int]
    warnings: list[str]

    @property
    def steps(self) -> int:
        """How many optimizer steps it has recorded."""
        return max((r["step"] for r in (*self.training, *self.evaluations)), default=0)

    @property
    def best(self) -> dict[str, Any] | None:
        """The first evaluation with the highest AP."""
        return max(self.evaluations, key=lambda r: r["AP"], default=None)


def read_run(folder: Path) -> RunRecords:
    """Read the records of a run, over or still going on.

    Raises:
        ValueError: if `folder` holds no run.
    """
    if not (folder / "args.json").is_file():
        raise ValueError(f"{folder} holds no run: train.py writes args.json into its --output-dir")
    records = utils.read_json_lines(folder / "metrics.jsonl")
    log = folder / "log.txt"
    text = log.read_text(errors="replace") if log.is_file() else ""
    starts = [int(step) for step in re.findall(r"^\S+ .* from step (\d+)$", text, re.MULTILINE)]
    found = re.findall(r"^\S+ (?:warning: )(.*)$", text, re.MULTILINE)
    return RunRecords(
        folder.resolve().name,
        json.loads((folder / "args.json").read_text()),
        [record for record in records if "loss" in record],
        [record for record in records if "AP" in record],
        sorted({step for step in starts if step}),
        list(dict.fromkeys(found)),
    )


def read_runs(folders: Sequence[Path]) -> list[RunRecords]:
    """Read several runs, each named by as much of its path as tells it from the others.

    Raises:
        ValueError: if one of `folders` holds no run, or is named twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            break
    else:
        raise ValueError("the same run is named twice")
    runs = map(read_run, folders)
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def draw_run_curves(runs: Sequence[RunRecords]) -> Figure:
    """Draw runs over each other: losses, learning rate, AP, and images per second, over steps.

    One run shows the parts of its loss and three APs; of several each has a colour. Where a run was
    resumed there is a dotted line. Runs of unlike global batches go over the images seen.
    """
    if len(runs) == 1:
        figure = _draw_one(runs[0])
    else:
        figure = _draw_several(runs)
    loss, rate, *aps, speed = figure.axes
    loss.set(title="training loss, mean between two lines of the log", ylabel="loss", yscale="log")
    rate.set(title="learning rate", ylabel="learning rate")
    for axes, name in zip(aps, APS, strict=False):
        axes.set(title=f"validation {name}", ylabel=name, ylim=(0, 1))
    if len(runs) == 1:
        aps[0].set(title="validation AP", ylabel="AP at IoU 0.50:0.95, 0.50, 0.75")
    speed.set(title="training speed, all processes", ylabel="images per second")
    _finish(figure.axes, runs)
    return figure


def _draw_one(run: RunRecords) -> Figure:
    figure = Figure(figsize=(13, 8), dpi=100, layout="constrained")
    loss, rate, ap, speed = figure.subplots(2, 2).flat
    loss.plot(*_series(run.training, "loss"), color="#000000", linewidth=1.2, label="loss")
    known = ("step", "epoch", "loss", "lr", *SPEED)
    parts = dict.fromkeys(name for record in run.training for name in record if name not in known)
    for part, shade in zip(parts, ("#E69F00", "#0072B2", "#009E73", "#CC79A7"), strict=False):
        loss.plot(*_series(run.training, part), color=shade, linewidth=1, label=part)
    steps, values = _series(run.evaluations, "val_loss")
    if steps:
        loss.plot(steps, values, "o--", ms=3.5, color="#D55E00", label="validation loss")
    rate.plot(*_series(run.training, "lr"), color="#0072B2", linewidth=1.2, label=run.name)
    for name, (shade, style) in APS.items():
        ap.plot(*_series(run.evaluations, name), style, ms=5, color=shade, label=name)
    points = _series(run.training, "images_per_second")
    speed.plot(*points, color="#0072B2", linewidth=1.2, label=run.name)
    for axes in (loss, rate, ap, speed):
        for step in run.resumed:
            axes.axvline(step, color=GREY, **RESUMED)
    return figure


def _draw_several(runs: Sequence[RunRecords]) -> Figure:
    figure = Figure(figsize=(13, 12), dpi=100, layout="constrained")
    all_axes = dict(
        zip(("loss", "lr", *APS, "images_per_second"), figure.subplots(3, 2).flat, strict=True)
    )
    for number, run in enumerate(runs):
        colour = drawing.on_white(drawing.PALETTE[number % len(drawing.PALETTE)])
        # Wider below, so that a curve shows where another is equal to it.
        width = 1.2 + min(1.2, 3 / (len(runs) - 1)) * (len(runs) - 1 - number)
        scale = _images_per_step(run, runs)
        for name, axes in all_axes.items():
            is_ap = name in APS
            steps, values = _series(run.evaluations if is_ap else run.training, name, scale)
            style = "-o" if is_ap else "-"
            axes.plot(
                *(steps, values, style), ms=width + 3, color=colour, lw=width, label=_named(run)
            )
            for step in run.resumed:
                axes.axvline(step * scale, color=colour, **RESUMED)
    handles = [*all_axes["loss"].get_lines()]
    named = [line for line in handles if not str(line.get_label()).startswith("_")]
    named += [RESUMED_LINE] if any(run.resumed for run in runs) else []
    figure.legend(handles=named, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _images_per_step(run: RunRecords, runs: Sequence[RunRecords]) -> int:
    """Return by what a step is multiplied on the axis: 1 if all of `runs` have one batch size."""
    is_same = len({one.about["global_batch"] for one in runs}) == 1
    return 1 if is_same else int(run.about["global_batch"])


def _series(
    records: Sequence[Mapping[str, Any]], name: str, scale: int = 1
) -> tuple[list[int], list[float]]:
    rows = [record for record in records if name in record]
    return [row["step"] * scale for row in rows], [row[name] for row in rows]


def _named(run: RunRecords) -> str:
    return run.name if len(run.name) <= 30 else f"{run.name[:14]}…{run.name[-15:]}"


def _finish(all_axes: Sequence[Axes], runs: Sequence[RunRecords]) -> None:
    last = max(run.steps * _images_per_step(run, runs) for run in runs) or 1
    is_same = len({run.about["global_batch"] for run in runs}) == 1
    for axes in all_axes:
        axes.set(xlim=(0, last * 1.02))
        axes.set_xlabel("optimizer step" if is_same else "images seen (steps x global batch)")
        axes.grid(alpha=0.3)
        handles: list[Any] = axes.get_legend_handles_labels()[0]
        if not any(np.size(line.get_xdata()) for line in handles):
            axes.set_yscale("linear")
            text = "nothing yet"
            axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GREY)
            continue
        if len(runs) == 1 and len(handles) > 1:
            handles += [RESUMED_LINE] if runs[0].resumed else []
            axes.legend(handles=handles, frameon=False, fontsize=9)


def settings_that_differ(runs: Sequence[RunRecords]) -> dict[str, list[str]]:
    """Return, by name, the settings that are not the same in all `runs`, one value per run."""
    args: list[Mapping[str, Any]] = [run.about["args"] for run in runs]
    names = list(dict.fromkeys(name for one in args for name in one if name not in PLACES))
    shown: Callable[[Any], str] = lambda value: "–" if value is None else str(value)  # noqa: E731
    table = {name: [shown(one.get(name)) for one in args] for name in names}
    return {name: values for name, values in table.items() if len(set(values)) > 1}
