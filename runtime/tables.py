"""Tables of an evaluation for the terminal and the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils import printable


def class_table(per_class: Sequence[Mapping[str, Any]], limit: int = 20) -> str:
    """Format `Analysis.per_class` as a table; of more than `limit` classes, the best and worst.

    A class without boxes has no numbers: "-".
    """
    with_boxes = [row for row in per_class if row["boxes"]]
    shown = [*with_boxes, *(row for row in per_class if not row["boxes"])]
    middle = ""
    if len(shown) > limit:
        best, rest = with_boxes[: limit // 2], with_boxes[limit // 2 :]
        shown = [*best, {}, *rest[-(limit - limit // 2 - 1) :]]
        left_out = len(per_class) - len(shown) + 1
        without = len(per_class) - len(with_boxes)
        of_these = f", {without} without boxes" if without else ""
        middle = f"… {left_out} more classes{of_these} …"
    names = [printable(row.get("name", ""))[:24] for row in shown]
    width = max(map(len, ["class", *names]))
    numbers = ("AP", "AP50", "AP75", "AR")
    lines = [f"{'class':{width}}" + "".join(f"{name:>7}" for name in numbers)]
    lines[0] += f"{'boxes':>9}{'detections':>12}"
    for name, row in zip(names, shown, strict=True):
        if not row:
            lines.append(middle)
            continue
        values = (f"{row[n]:7.3f}" if row["boxes"] else f"{'-':>7}" for n in numbers)
        lines.append(f"{name:{width}}" + "".join(values))
        lines[-1] += f"{row['boxes']:9}{row['detections']:12}"
    return "\n".join(lines)


def error_line(analysis: Any) -> str:
    """Return what AP50 would gain without each of TIDE's errors, the largest first.

    If correcting one kind of error gains nothing although AP50 is low, return the error counts.
    """
    counts = analysis.errors["counts"]
    if not any(row["detections"] for row in analysis.per_class):
        return f"no detections; {int(counts['Miss']):,} boxes missed"
    gains = sorted(analysis.errors["delta_ap"].items(), key=lambda item: -item[1])
    gains = [(name, gain) for name, gain in gains if name not in ("FP", "FN")]
    if all(gain < 0.0005 for _, gain in gains):
        wrong = int(sum(counts.values()) - counts["Miss"])
        return (
            f"AP50 gains nothing by correcting one kind of error (TIDE); {int(counts['Miss']):,} "
            f"boxes missed, {wrong:,} detections wrong"
        )
    parts = [f"{name} {gain:.3f}" for name, gain in gains]
    return "AP50 lost to errors (TIDE): " + "  ".join(parts)
