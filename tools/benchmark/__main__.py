"""Measure this project side by side with torchvision's own parts: `python -m tools.benchmark step`.

`data` is start-up and memory, `loader` images per second, `step` the training step, `memory` its
memory by batch size (ours only, calculated), `eval` COCO scoring. Both sides run in turn on one
machine; the table shows medians, their ratio (above 1 ours is the better) with the least and the
largest of a pair, and the budget.
"""

from __future__ import annotations

if not __package__:  # run as a file, it would not find the modules beside tools/
    raise SystemExit("run it as: python -m tools.benchmark")

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.benchmark import data as benchmark_data
from tools.benchmark import eval as benchmark_eval
from tools.benchmark import loader as benchmark_loader
from tools.benchmark import measuring
from tools.benchmark import memory as benchmark_memory
from tools.benchmark import step as benchmark_step
from tools.benchmark.measuring import Row
from tools.plots import drawing
from utils import run_command

SUBCOMMANDS = {
    "data": benchmark_data,
    "loader": benchmark_loader,
    "step": benchmark_step,
    "memory": benchmark_memory,
    "eval": benchmark_eval,
}
COLOURS = {True: "#009E73", False: "#D55E00", None: "#56B4E9"}  # Okabe and Ito's


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text, one line each."""
    head = ("", "ours", "torchvision", "ratio", "spread", "budget", "")
    cells = [head]
    for row in rows:
        numbers = row.as_json()
        spread = numbers["spread"]
        budget = "" if row.budget is None else f">= {row.budget:g} x"
        budget = budget if row.limit is None else f"<= {row.limit:g}"
        cells.append(
            (
                f"{row.name}, {row.unit}",
                _number(numbers["ours"]),
                _number(numbers["torchvision"]),
                "" if numbers["ratio"] is None else f"{numbers['ratio']:.3g} x",
                "" if spread is None else f"{spread[0]:.3g}-{spread[1]:.3g}",
                budget,
                {True: "met", False: "MISSED", None: ""}[numbers["met"]],
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = [
        line[0].ljust(widths[0])
        + "".join(f"  {c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))
        for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw a bar per row that has a ratio, with its spread and a mark where the budget lies."""
    shown = [row for row in rows if row.ratios()][::-1]
    figure = drawing.new_figure(11, 1.6 + 0.5 * len(shown))
    axes = figure.add_subplot()
    largest = 1.0
    for height, row in enumerate(shown):
        numbers = row.as_json()
        low, high = numbers["spread"]
        largest = max(largest, high, row.budget or 0)
        axes.barh(height, numbers["ratio"] - 1, left=1, height=0.6, color=COLOURS[numbers["met"]])
        axes.plot([low, high], [height, height], color="black", linewidth=1.2)
        if row.budget is not None:
            axes.plot([row.budget] * 2, [height - 0.42, height + 0.42], color="black", linewidth=3)
        text = f"{numbers['ratio']:.3g} x"
        axes.annotate(
            text,
            (max(high, row.budget or 0, 1), height),
            (6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.plot([], [], color="black", linewidth=3, label="budget")
    axes.plot([], [], color="black", linewidth=1.2, label="least to largest of a pair")
    for met, text in {True: "met", False: "missed", None: "no budget"}.items():
        axes.barh(0, 0, color=COLOURS[met], label=text)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    axes.set_yticks(range(len(shown)), [f"{row.name}, {row.unit}" for row in shown])
    axes.set_xscale("log")
    least = min([1.0, *(min(row.ratios()) for row in shown)])
    axes.set_xlim(least / 1.1, largest * (largest / least) ** 0.15 * 1.1)
    ticks = [
        t
        for t in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
        if least / 1.1 <= t <= largest * 1.2
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times better than torchvision's own parts (logarithmic)")
    axes.set_title(title, loc="left")
    drawing.save(figure, path)


def build_parser() -> argparse.ArgumentParser:
    """Declare the subcommands; each module declares its own flags."""
    parser = argparse.ArgumentParser(
        "python -m tools.benchmark", description=(__doc__ or "").split("\n\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in SUBCOMMANDS.items():
        command = commands.add_parser(
            name,
            help=(module.__doc__ or "").split("\n")[0],
            description=module.__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_flags(command.add_argument)
        command.add_argument("--json", action="store_true", help="print one JSON object, no table")
        command.add_argument("--plot", type=Path, metavar="PNG", help="draw the ratios")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure, print, draw."""
    flags = vars(build_parser().parse_args(argv))
    command, as_json, plot = flags.pop("command"), flags.pop("json"), flags.pop("plot")
    rows = SUBCOMMANDS[command].run(**flags)
    machine = measuring.machine()
    if as_json:
        print(json.dumps({"rows": [row.as_json() for row in rows], "machine": machine}))
    else:
        print("python -m tools.benchmark", *(sys.argv[1:] if argv is None else argv))
        print(", ".join(f"{name} {value}" for name, value in machine.items() if value))
        print(table(rows))
    if plot:
        where = machine["gpu"] if flags.get("device") == "cuda" else machine["cpu"]
        draw(rows, f"tools.benchmark {command}, {where}, torch {machine['torch']}", plot)
        print(f"drawn: {plot}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
