"""Draw what `coco_eval.Analysis` holds: curves, classes, confusions and errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tools.plots import drawing

CURVES = 8  # classes whose curves are drawn
BARS = 40
CELLS = 20
MEAN = "#000000"
IOUS = ("IoU 0.50", "IoU 0.75", "IoU 0.50:0.95")
ERRORS = {
    "Cls": "Cls: right place,\nwrong class",
    "Loc": "Loc: right class,\nIoU 0.1 to 0.5",
    "Both": "Both: wrong class,\nIoU 0.1 to 0.5",
    "Dupe": "Dupe: the box has\na better detection",
    "Bkg": "Bkg: nothing there,\nIoU below 0.1",
    "Miss": "Miss: no detection\non the box",
    "FP": "all wrong detections\ntogether",
    "FN": "all missed boxes\ntogether",
}
Rows = Sequence[Mapping[str, Any]]


def _ends(rows: Rows, limit: int) -> tuple[list[Mapping[str, Any]], str]:
    """Return at most `limit` of rows in order, from both ends, and words that say which."""
    if len(rows) <= limit:
        return list(rows), "all classes" if len(rows) > 1 else "the one class"
    half = limit // 2
    return [*rows[:half], *rows[-half:]], f"{half} best and {half} worst of {len(rows)} classes"


def _short(name: str) -> str:
    return drawing.plain(drawing.shorten(name, 20))


def _peak(f1: float, confidence: float) -> str:
    return f"{f1:.2f} at {confidence:.2f}" if f1 else "0"


def draw_curves(
    per_class: Rows,
    curves: Mapping[str, np.ndarray],
    confidence: float,
    label_map: Sequence[Mapping[str, Any]],
) -> Figure:
    """Draw precision over recall, of all classes and of each, and F1 over confidence."""
    figure = drawing.new_figure(15, 5)
    overall, of_class, f1_axes = figure.subplots(1, 3)
    rows = [row for row in per_class if row["boxes"]]
    indices = {label: index for index, label in enumerate(curves["labels"].tolist())}
    chosen = [indices[row["label"]] for row in rows]
    colours = drawing.class_colours(label_map)

    for level, style in enumerate(("-", "--", ":")):
        line = curves["precision"][level][chosen].mean(axis=0)
        text = f"{IOUS[level]}: AP {line.mean():.3f}"
        overall.plot(curves["recall"], line, style, color=MEAN, label=text)
    overall.set_title("Precision over recall\nmean of all classes")

    shown, which = _ends(rows, CURVES)
    for row in shown:
        index, colour = indices[row["label"]], drawing.on_white(colours[row["label"]])
        text = f"{_short(row['name'])}: AP50 {row['AP50']:.3f}"
        of_class.plot(curves["recall"], curves["precision"][0, index], color=colour, label=text)
        text = f"{_short(row['name'])}: {_peak(row['F1'], row['confidence'])}"
        f1_axes.plot(curves["confidence"], curves["f1"][index], color=colour, label=text)
    of_class.set_title(f"Precision over recall at IoU 0.50\n{which}")
    for axes in (overall, of_class):
        axes.set(xlabel="recall", ylabel="precision")

    if len(rows) > 1:
        mean = curves["f1"][chosen].mean(axis=0)
        text = f"mean of all: {_peak(mean.max(), confidence)}"
        f1_axes.plot(curves["confidence"], mean, color=MEAN, linewidth=2.5, label=text)
    f1_axes.axvline(confidence, color=MEAN, linewidth=0.8, linestyle=":")
    f1_axes.set(xlabel="confidence from which detections count", ylabel="F1 at IoU 0.50")
    f1_axes.set_title(f"F1 over confidence\n{which}")
    look: dict[str, Any] = {"frameon": False, "fontsize": 8.5, "columnspacing": 1}
    for axes in (overall, of_class, f1_axes):
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, **look)
    return figure


def draw_class_ap(per_class: Rows, label_map: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw AP as a bar and AP50 as a dot for each class, best first."""
    with_boxes = [row for row in per_class if row["boxes"]]
    rows, which = _ends(with_boxes, BARS)
    colours = drawing.class_colours(label_map)
    figure = drawing.new_figure(9, 1.7 + 0.27 * len(rows))
    axes = figure.subplots()
    heights = np.arange(len(rows))
    aps = [row["AP"] for row in rows]
    bars = [drawing.on_white(colours[row["label"]]) for row in rows]
    axes.barh(heights, aps, color=bars, label="AP (IoU 0.50:0.95)")
    axes.plot([row["AP50"] for row in rows], heights, "|", color=MEAN, ms=11, mew=2, label="AP50")
    for height, row in enumerate(rows):
        axes.text(1.02, height, f"{row['AP']:.3f}", va="center", ha="left")
        axes.text(1.2, height, f"{row['boxes']:,}", va="center", ha="right")
    axes.text(1.02, -1, "AP", va="center", ha="left", weight="bold")
    axes.text(1.2, -1, "boxes", va="center", ha="right", weight="bold")
    axes.set_yticks(heights, [_short(row["name"]) for row in rows])
    axes.set(
        xlim=(0, 1), ylim=(len(rows) - 0.4, -1.6), xlabel="bar: AP at IoU 0.50:0.95, line: AP50"
    )
    without = len(per_class) - len(with_boxes)
    note = f"; {without} without boxes left out" if without else ""
    axes.set_title(f"AP by class, {which}{note}", loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def draw_confusion(names: Sequence[str], confusion: np.ndarray, confidence: float) -> Figure:
    """Draw which class is taken for which, as shares of each row, with counts.

    Args:
        names: of the K classes, in the order of the rows of `confusion` `[K+1, K+1]`.
    """
    total = len(names)
    chosen = np.arange(total)
    which = ""
    if total > CELLS:
        mixed = confusion[:total, :total] - np.diag(np.diag(confusion[:total, :total]))
        worst = np.argsort(-(mixed.sum(axis=0) + mixed.sum(axis=1)), kind="stable")[:CELLS]
        chosen = np.sort(worst)
        which = f"\nthe {CELLS} most confused of {total} classes; shares count all"
    kept = np.append(chosen, total)
    shares = confusion / confusion.sum(axis=1, keepdims=True).clip(1)
    shares, counts = shares[np.ix_(kept, kept)], confusion[np.ix_(kept, kept)]
    side = 3.2 + 0.52 * len(kept)
    figure = drawing.new_figure(side + 1.2, side)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts > 0):
        colour = "white" if shares[row, column] > 0.55 else "black"
        text = f"{counts[row, column]:,}" if counts[row, column] < 1e5 else ">99k"
        axes.text(column, row, text, ha="center", va="center", color=colour, size=9)
    texts = [_short(names[i]) for i in chosen.tolist()]
    ticks = np.arange(len(kept))
    axes.set_yticks(ticks, [*texts, "(nothing)"])
    axes.set_xticks(ticks, [*texts, "(missed)"], rotation=45, ha="right", rotation_mode="anchor")
    axes.set(xlabel="detected as", ylabel="annotated as")
    axes.axhline(len(kept) - 1.5, color="grey", linewidth=0.8)
    axes.axvline(len(kept) - 1.5, color="grey", linewidth=0.8)
    axes.set_title(f"Detections from confidence {confidence:.2f}, IoU 0.50 or more{which}", size=10)
    figure.colorbar(picture, ax=axes, label="share of the row", shrink=0.8)
    return figure


def draw_errors(errors: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw what AP50 would gain without each of TIDE's errors, and how often it occurs."""
    figure = drawing.new_figure(9.5, 5)
    axes = figure.subplots()
    gains = [errors["delta_ap"][kind] for kind in ERRORS]
    heights = np.array([0, 1, 2, 3, 4, 5, 6.5, 7.5])
    axes.barh(heights, gains, color=[*["#0072B2"] * 6, *["#999999"] * 2])
    longest = max([*gains, 0.01])
    for height, kind, gain in zip(heights, ERRORS, gains, strict=True):
        text = f"{gain:.3f}"
        if kind in errors["counts"]:
            count = int(errors["counts"][kind])
            text += f"   {count:,} {'boxes' if kind == 'Miss' else 'detections'}"
        axes.text(gain + longest / 60, height, text, va="center")
    axes.set_yticks(heights, list(ERRORS.values()))
    axes.invert_yaxis()
    axes.set(
        xlim=(min(0, *gains), longest * 1.35),
        xlabel="AP50 gained if the error were corrected (TIDE)",
    )
    axes.set_title("Errors, detections of any confidence", loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure
