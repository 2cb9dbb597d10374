"""Score a COCO results file by itself: `python -m tools.score ANNOTATIONS DETECTIONS`.

With `--compare OTHER`, print how much better OTHER is, with an interval: images are drawn with
replacement, the same for both files (a paired bootstrap), and scored again in each resample.
"""

from __future__ import annotations

if not __package__:  # run as a file, it would not find the modules beside tools/
    raise SystemExit("run it as: python -m tools.score")

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

import coco_eval
from coco_utils import label_categories
from data.coco_arrays import Annotations
from data.coco_json import read_annotations
from runtime.flags import ArgumentParser, non_negative
from runtime.tables import class_table, error_line
from utils import UserError, file_errors, run_command

SHOWN = 10  # findings of a kind that a message lists
Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Detection(msgspec.Struct, gc=False):
    """An entry of a results file."""

    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]  # x, y, w, h
    score: float
    file_name: Any = None  # tools.predict writes it, and numbers the images itself


def read_detections(
    path: Path, annotations: Annotations, label_map: Sequence[dict[str, Any]]
) -> np.ndarray:
    """Read a results file as what `CocoEvaluator.gather` returns: `[D, 7]` float64.

    Raises:
        UserError: lists everything that is wrong with it, by kind, with the first entries.
    """
    with file_errors("read", path):
        data = path.read_bytes()
    try:
        content = msgspec.json.decode(data, type=list[Detection])
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(_diagnose(path, data, str(error))) from None
    image_ids = np.array([detection.image_id for detection in content], np.int64)
    category_ids = np.array([detection.category_id for detection in content], np.int64)
    boxes = np.array([detection.bbox for detection in content], np.float64).reshape(-1, 4)
    scores = np.array([detection.score for detection in content], np.float64)
    known = np.array([category["id"] for category in label_map])
    order = np.argsort(annotations.image_ids)
    sorted_ids = annotations.image_ids[order]
    images = np.searchsorted(sorted_ids, image_ids).clip(max=len(sorted_ids) - 1)
    classes = np.searchsorted(known, category_ids).clip(max=len(known) - 1)
    names = [detection.file_name for detection in content]
    is_other = np.zeros(len(content), bool)
    for entry, name in enumerate(names):
        if isinstance(name, str):
            annotated = annotations.file_name(int(order[images[entry]]))
            is_other[entry] = Path(name).name != Path(annotated).name
    is_unknown = sorted_ids[images] != image_ids
    problems: dict[str, tuple[Any, Any]] = {
        "of an image that is not annotated": (is_unknown, image_ids),
        "of another file than the image of their id": (is_other & ~is_unknown, names),
        "of an unknown category": (known[classes] != category_ids, category_ids),
        "with a width or height below 0": ((boxes[:, 2:] < 0).any(axis=1), boxes),
    }
    findings = [
        _finding(what, np.flatnonzero(wrong).tolist(), values.__getitem__)
        for what, (wrong, values) in problems.items()
        if wrong.any()
    ]
    if findings:
        raise UserError("\n  ".join([f"{path} does not fit {annotations.path}:", *findings]))
    labels = np.array([category["label"] for category in label_map])[classes]
    rows = np.column_stack([images, boxes, scores, labels]).astype(np.float64)
    return rows[np.argsort(images, kind="stable")]


def _finding(what: str, entries: list[int], value: Callable[[int], Any]) -> str:
    shown = ", ".join(f"{value(entry)} (entry {entry})" for entry in entries[:SHOWN])
    return f"{len(entries)} detections {what}: {shown}{' …' if len(entries) > SHOWN else ''}"


def _diagnose(path: Path, data: bytes, error: str) -> str:
    """Return what is wrong with a file that could not be decoded, entry by entry."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as reason:
        return f"{path} is not JSON, or cut short: {reason}; write it again"
    if not isinstance(content, list):
        return f"{path} holds a {type(content).__name__}, not a list of detections"
    wrong: dict[str, list[int]] = {}
    for number, entry in enumerate(content):
        for what in _faults(entry):
            wrong.setdefault(what, []).append(number)
    lines = [
        _finding(what, entries, lambda i: _short(content[i])) for what, entries in wrong.items()
    ]
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
    result = coco_eval.paired_bootstrap(first, second, resamples, seed)
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


def build_parser() -> ArgumentParser:
    """Declare the flags."""
    parser = ArgumentParser((__doc__ or "").split(":")[0] + ".")
    add = parser.add_argument
    add("annotations", type=Path, help="COCO JSON")
    add("detections", type=Path, help="COCO results JSON")
    add("--compare", type=Path, metavar="OTHER", help="another results file")
    add("--backend", choices=coco_eval.BACKENDS, default="hotcoco", help="what scores")
    resamples = non_negative(int, at_most=1_000_000)
    add("--resamples", type=resamples, default=1000, help="of --compare; 0 leaves intervals out")
    add("--seed", type=non_negative(int, at_most=2**63 - 1), default=0, help="of --compare")
    add("--output", type=Path, help="folder for what `tools.report` draws")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Print what a results file scores, and how another one compares."""
    flags = build_parser().parse_args(argv)
    annotations, warnings = read_annotations(flags.annotations)
    for warning in warnings:
        print(f"{flags.annotations.name}: {warning}", file=sys.stderr)
    label_map = label_categories(annotations.categories)
    evaluator = coco_eval.CocoEvaluator(annotations, label_map)
    rows = read_detections(flags.detections, annotations, label_map)
    others = read_detections(flags.compare, annotations, label_map) if flags.compare else None
    evaluation = evaluator.evaluation(rows)
    analysis = evaluator.analyze(evaluation, rows)
    if flags.backend == "hotcoco":
        scores = coco_eval.scores_of(evaluation)
    else:
        scores = evaluator.score(rows, flags.backend)
    images = len(np.unique(rows[:, 0]))
    print(
        f"{len(rows)} detections on {images} of {len(annotations)} images, "
        f"scored by {flags.backend}"
    )
    if 2 * images < len(annotations):
        print(
            f"warning: {len(annotations) - images} of {len(annotations)} images have no detection; "
            "are these the annotations of the images that were predicted?",
            file=sys.stderr,
        )
    print(scores.table)
    print(class_table(analysis.per_class))
    print(error_line(analysis))
    if others is not None:
        print(f"\nfirst: {flags.detections}, other: {flags.compare}")
        print(compare(evaluator, rows, others, flags.resamples, flags.seed))
    if flags.output is not None:
        data = {"annotations": str(annotations.path.resolve()), "categories": label_map}
        results = coco_eval.Results(*scores, rows, analysis, {})
        coco_eval.write_results(results, evaluator, flags.output, False, {"data": data})


if __name__ == "__main__":
    run_command(main)
