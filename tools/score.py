"""Score a COCO results file by itself: `python -m tools.score ANNOTATIONS DETECTIONS`.

With `--compare OTHER`, say how much better OTHER is, and how sure that is: images are drawn with
replacement, the same for both files (a paired bootstrap), and scored anew as often as asked for.
"""

from __future__ import annotations

if not __package__:  # run as a file, it would not find the modules beside tools/
    raise SystemExit("run it as: python -m tools.score")

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import hotcoco
import msgspec
import numpy as np

import coco_eval
from coco_utils import label_categories
from data.coco_arrays import Annotations
from data.coco_json import read_annotations
from utils import UserError, file_errors, run_command

SHOWN = 10  # findings of a kind that a message lists
Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Detection(msgspec.Struct, gc=False):
    """An entry of a results file."""

    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]  # x, y, w, h
    score: float


def read_detections(
    path: Path, annotations: Annotations, label_map: Sequence[dict[str, Any]]
) -> np.ndarray:
    """Read a results file as what `CocoEvaluator.gather` returns: `[D, 7]` float64.

    Raises:
        UserError: lists everything that is wrong with it, by kind, with the first places.
    """
    with file_errors("read", path):
        data = path.read_bytes()
    try:
        found = msgspec.json.decode(data, type=list[Detection])
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(_diagnose(path, data, str(error))) from None
    image_ids = np.array([detection.image_id for detection in found], np.int64)
    category_ids = np.array([detection.category_id for detection in found], np.int64)
    boxes = np.array([detection.bbox for detection in found], np.float64).reshape(-1, 4)
    scores = np.array([detection.score for detection in found], np.float64)
    known = np.array([category["id"] for category in label_map])
    sorted_ids = np.sort(annotations.image_ids)
    images = np.searchsorted(sorted_ids, image_ids).clip(max=len(sorted_ids) - 1)
    classes = np.searchsorted(known, category_ids).clip(max=len(known) - 1)
    problems = {
        "of an image that is not annotated": (sorted_ids[images] != image_ids, image_ids),
        "of an unknown category": (known[classes] != category_ids, category_ids),
        "with a width or height below 0": ((boxes[:, 2:] < 0).any(axis=1), boxes),
    }
    found_wrong = [
        _finding(what, np.flatnonzero(wrong).tolist(), values.__getitem__)
        for what, (wrong, values) in problems.items()
        if wrong.any()
    ]
    if found_wrong:
        raise UserError("\n  ".join([f"{path} does not fit {annotations.path}:", *found_wrong]))
    labels = np.array([category["label"] for category in label_map])[classes]
    rows = np.column_stack([images, boxes, scores, labels]).astype(np.float64)
    return rows[np.argsort(images, kind="stable")]


def _finding(what: str, places: list[int], value: Callable[[int], Any]) -> str:
    shown = ", ".join(f"{value(place)} (entry {place})" for place in places[:SHOWN])
    return f"{len(places)} detections {what}: {shown}{' …' if len(places) > SHOWN else ''}"


def _diagnose(path: Path, data: bytes, error: str) -> str:
    """Say what is wrong with a file that could not be decoded, by going through it slowly."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as reason:
        return f"{path} is not JSON, or cut short: {reason}; write it again"
    if not isinstance(content, list):
        return f"{path} holds a {type(content).__name__}, not a list of detections"
    wrong: dict[str, list[int]] = {}
    for place, entry in enumerate(content):
        for what in _faults(entry):
            wrong.setdefault(what, []).append(place)
    lines = [_finding(what, places, lambda p: _short(content[p])) for what, places in wrong.items()]
    return "\n  ".join([f"{path} is not a COCO results file:", *(lines or [error])])


def _faults(entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield "that are not an object"
        return
    for key in ("image_id", "category_id", "bbox", "score"):
        if key not in entry:
            yield f"without {key}"
        elif key.endswith("_id") and type(entry[key]) is not int:
            yield f"whose {key} is not an integer"
        elif key == "score" and not _is_finite(entry[key]):
            yield "whose score is not a finite number"
        elif key == "bbox" and not (
            isinstance(entry[key], list)
            and len(entry[key]) == 4
            and all(map(_is_finite, entry[key]))
        ):
            yield "whose bbox is not four finite numbers"


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:79] + "…"


def compare(
    evaluator: coco_eval.CocoEvaluator,
    detections: np.ndarray,
    other: np.ndarray,
    resamples: int,
    seed: int,
) -> str:
    """Return a table: each number of both, the difference, and its 95 % bootstrap interval."""
    first, second = evaluator.evaluation(detections), evaluator.evaluation(other)
    result = hotcoco.compare(first, second, n_bootstrap=resamples, seed=seed, confidence=0.95)
    heading = f"{'':6}{'first':>8}{'other':>8}{'difference':>12}"
    lines = [heading + ("   95 % interval" if resamples else "")]
    for name in coco_eval.METRICS:
        values = result["metrics_a"][name], result["metrics_b"][name]
        if values[0] < 0:
            lines.append(f"{name:6}{'-':>8}{'-':>8}{'-':>12}   no boxes")
            continue
        line = f"{name:6}{values[0]:8.3f}{values[1]:8.3f}{result['deltas'][name]:+12.4f}"
        if resamples:
            interval = result["ci"][name]
            line += f"   {interval['lower']:+.4f} to {interval['upper']:+.4f}"
        lines.append(line)
    if resamples:
        lines.append(
            f"paired bootstrap over {result['num_images']} images, {resamples} resamples, seed "
            f"{seed}; where the interval holds 0, the difference may be chance"
        )
    return "\n".join(lines)


def score(
    annotations: Annotations,
    detections: Path,
    backend: str = "hotcoco",
    other: Path | None = None,
    resamples: int = 1000,
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Print what a results file scores, and how `other` compares; the flags are those of `main`."""
    label_map = label_categories(annotations.categories)
    evaluator = coco_eval.CocoEvaluator(annotations, label_map)
    rows = read_detections(detections, annotations, label_map)
    others = read_detections(other, annotations, label_map) if other else None
    evaluation = evaluator.evaluation(rows)
    analysis = evaluator.analyze(evaluation, rows)
    scores = (
        evaluator.score(rows, backend) if backend != "hotcoco" else coco_eval.scores_of(evaluation)
    )
    images = len(np.unique(rows[:, 0]))
    print(f"{len(rows)} detections on {images} of {len(annotations)} images, scored by {backend}")
    print(scores.table)
    print(coco_eval.class_table(analysis.per_class))
    print(coco_eval.error_line(analysis))
    if others is not None:
        print(f"\nfirst: {detections}, other: {other}")
        print(compare(evaluator, rows, others, resamples, seed))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        about = {"annotations": str(annotations.path.resolve()), "categories": label_map}
        coco_eval.write_analysis(analysis, output, {"data": about})
        np.save(output / "detections.npy", rows)
        (output / "results.json").write_text(json.dumps(scores.metrics, indent=2) + "\n")


def main() -> None:
    """Parse the command line, score, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", type=Path, help="COCO JSON")
    parser.add_argument("detections", type=Path, help="COCO results JSON")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="another results file")
    parser.add_argument("--backend", choices=coco_eval.BACKENDS, default="hotcoco")
    parser.add_argument("--resamples", type=int, default=1000, help="of --compare (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of --compare (0)")
    parser.add_argument("--output", type=Path, help="folder for what `tools.report` draws")
    flags = parser.parse_args()
    if flags.resamples < 0 or flags.seed < 0:
        raise UserError("--resamples and --seed must not be negative")
    annotations, warnings = read_annotations(flags.annotations)
    for warning in warnings:
        print(f"{flags.annotations.name}: {warning}", file=sys.stderr)
    score(
        annotations,
        flags.detections,
        flags.backend,
        flags.compare,
        flags.resamples,
        flags.seed,
        flags.output,
    )


if __name__ == "__main__":
    run_command(main)
