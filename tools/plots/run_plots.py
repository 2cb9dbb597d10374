"""Read the records of runs; draw losses, learning rate, AP and speed over steps."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from runtime.records import read_json_lines
from tools.plots import drawing
from utils import UserError

APS = {"AP": "-", "AP50": "--", "AP75": ":"}
SPEED = ("images_per_second", "data_time_share", "memory_mb")
# Settings that say where a run is and not what it is.
WHERE = ("output_dir", "resume", "max_steps", "test_only")


@dataclass(frozen=True)
class RunRecords:
    """What one run left.

    Attributes:
        setup: `args.json`: "args", "categories", "versions", "summary" and more.
        training, evaluations: the lines of `metrics.jsonl` of either kind, by step.
        resumed: the steps after which the run was started again.
        warnings: those in its log, each once.
    """

    name: str
    setup: Mapping[str, Any]
    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    resumed: list[int]
    warnings: list[str]

    @property
    def best(self) -> dict[str, Any] | None:
        """The first evaluation with the highest AP."""
        return max(self.evaluations, key=lambda r: r["AP"], default=None)


def read_run(folder: Path) -> RunRecords:
    """Read the records of a run that has ended or still trains.

    Raises:
        UserError: if `folder` holds no run.
    """
    if not (folder / "args.json").is_file():
        raise UserError(f"{folder} holds no run: train.py writes args.json into its --output-dir")
    records = read_json_lines(folder / "metrics.jsonl")
    log = folder / "log.txt"
    text = log.read_text(errors="replace") if log.is_file() else ""
    starts = [int(step) for step in re.findall(r"^\S+ .* from step (\d+)$", text, re.MULTILINE)]
    warnings = re.findall(r"^\S+ (?:warning: )(.*)$", text, re.MULTILINE)
    return RunRecords(
        folder.resolve().name,
        json.loads((folder / "args.json").read_text()),
        [record for record in records if "loss" in record],
        [record for record in records if "AP" in record],
        sorted({step for step in starts if step}),
        list(dict.fromkeys(warnings)),
    )


def draw_run_curves(runs: Sequence[RunRecords]) -> Figure:
    """Draw runs over each other: losses, learning rate, AP, and images per second, over steps.

    One run shows the parts of its loss and three APs; of several each has a colour. Where a run was
    resumed there is a dotted line.
    """
    figure = drawing.new_figure(13, 8)
    loss, rate, ap, speed = figure.subplots(2, 2).flat
    is_one = len(runs) == 1
    for number, run in enumerate(runs):
        colour = drawing.on_white(drawing.PALETTE[number % len(drawing.PALETTE)])
        _draw_losses(loss, run, colour, is_one)
        _draw_line(rate, run.training, "lr", drawing.on_white("#0072B2") if is_one else colour, run)
        _draw_line(speed, run.training, "images_per_second", colour, run)
        for name, style in APS.items():
            if is_one or name == "AP":
                label = name if is_one else _named(run)
                shade = "#000000" if is_one else colour
                steps, values = _series(run.evaluations, name)
                ap.plot(steps, values, style, marker="o", ms=3.5, color=shade, label=label)
        for axes in (loss, rate, ap, speed):
            for step in run.resumed:
                shade = "#7F7F7F" if is_one else colour
                axes.axvline(step, color=shade, linewidth=0.9, linestyle=(0, (1, 2)))
    loss.set(title="training loss, mean between two lines of the log", ylabel="loss", yscale="log")
    rate.set(title="learning rate", ylabel="learning rate")
    ap.set(title="validation AP", ylabel="AP", ylim=(0, 1))
    speed.set(title="training speed, all processes", ylabel="images per second")
    _finish((loss, rate, ap, speed), runs)
    return figure


def _draw_losses(axes: Axes, run: RunRecords, colour: str, with_parts: bool) -> None:
    steps, values = _series(run.training, "loss")
    if not with_parts:
        axes.plot(steps, values, color=colour, linewidth=1.2, label=_named(run))
        return
    axes.plot(steps, values, color="#000000", linewidth=1.2, label="loss")
    known = ("step", "epoch", "loss", "lr", "grad_norm", *SPEED)
    parts = dict.fromkeys(name for record in run.training for name in record if name not in known)
    for part, shade in zip(parts, ("#E69F00", "#0072B2", "#009E73", "#CC79A7"), strict=False):
        axes.plot(*_series(run.training, part), color=shade, linewidth=1, label=part)
    steps, values = _series(run.evaluations, "val_loss")
    if steps:
        axes.plot(steps, values, "o--", ms=3.5, color="#D55E00", label="validation loss")


def _draw_line(
    axes: Axes, records: Sequence[Mapping[str, Any]], name: str, colour: str, run: RunRecords
) -> None:
    steps, values = _series(records, name)
    axes.plot(steps, values, color=colour, linewidth=1.2, label=_named(run))


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    rows = [record for record in records if name in record]
    return [row["step"] for row in rows], [row[name] for row in rows]


def _named(run: RunRecords) -> str:
    return drawing.plain(drawing.shorten(run.name, 30))


def _finish(all_axes: Sequence[Axes], runs: Sequence[RunRecords]) -> None:
    is_resumed = any(run.resumed for run in runs)
    last = max([r["step"] for run in runs for r in (*run.training, *run.evaluations)], default=1)
    for number, axes in enumerate(all_axes):
        axes.set(xlabel="optimizer step", xlim=(0, last * 1.02))
        axes.grid(alpha=0.3)
        # Where a run was resumed there is a line without a name.
        named = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
        has_lines = any(np.size(line.get_xdata()) for line in named)
        if not has_lines:
            axes.set_yscale("linear")
            text = "nothing yet"
            axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color="#7F7F7F")
        elif len(runs) > 1 or number in (0, 2):
            note = "dotted: resumed" if is_resumed else None
            axes.legend(frameon=False, fontsize=9, title=note, title_fontsize=9)


def settings_that_differ(runs: Sequence[RunRecords]) -> dict[str, list[str]]:
    """Return, by name, the settings that are not the same in all `runs`, one value per run."""
    args: list[Mapping[str, Any]] = [run.setup["args"] for run in runs]
    names = list(dict.fromkeys(name for one in args for name in one if name not in WHERE))
    table = {
        name: ["–" if one.get(name) is None else str(one[name]) for one in args] for name in names
    }
    return {name: values for name, values in table.items() if len(set(values)) > 1}
