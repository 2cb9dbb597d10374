"""Evaluation: detection, and COCO scoring of many detections.

Scoring: time, memory, and whether all twelve numbers are equal. torchvision's side is pycocotools
used plainly: `loadRes` of an array, `COCOeval`. Either side runs in a fresh process and scores the
same generated boxes, some near to the truth and some anywhere.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import utils
from coco_eval import METRICS, CocoEvaluator
from coco_utils import label_categories
from data.coco_arrays import Annotations
from runtime.distributed import Processes
from runtime.flags import positive
from tools.benchmark import measuring, step
from tools.benchmark.detection import detection_rows
from tools.benchmark.measuring import Row

GROWTH = ((50_000, 80), (5_000, 1_203), (50_000, 1_203))  # images; classes of COCO and of LVIS


def add_flags(add: Callable[..., Any]) -> None:
    """Declare the flags of `run`."""
    add("--device", choices=("cpu", "cuda"), default=utils.default_device(), help="of detection")
    add("--model", default="retinanet_resnet50_fpn", help="or retinanet_RESNET_fpn")
    add("--dtype", choices=step.DTYPES, default="fp32", help="of our detection; theirs is fp32")
    add("--min-size", type=positive(int), default=800, help="shorter side of images, pixels")
    add("--max-size", type=positive(int), default=1333, help="longer side at most, pixels")
    add("--batch-size", type=positive(int), default=1, help="images to detect at a time")
    add("--candidates", type=positive(int), default=7_000, help="over the threshold, per image")
    add("--images", type=positive(int), default=5_000, help="of val2017, with 7.3 boxes each")
    add("--classes", type=positive(int), default=80, help="of COCO")
    add("--detections", type=positive(int), default=100, help="per image")
    add("--repeats", type=positive(int), default=3, help="of each; pycocotools runs once")
    add("--growth", action="store_true", help="ours with 50,000 images and 1,203 classes as well")


def run(
    device: str,
    model: str,
    dtype: str,
    min_size: int,
    max_size: int,
    batch_size: int,
    candidates: int,
    images: int,
    classes: int,
    detections: int,
    repeats: int,
    growth: bool,
) -> list[Row]:
    """Measure; the flags are those of `add_flags`."""
    settings = step.Settings(model, torch.device(device), dtype, min_size, max_size)
    rows = detection_rows(settings, batch_size, candidates, repeats)
    return rows + scoring_rows(images, classes, detections, repeats, growth)


def scoring_rows(
    images: int, classes: int, detections: int, repeats: int, growth: bool
) -> list[Row]:
    """Measure scoring of generated detections."""
    size = (images, classes, detections)
    scored = [measuring.in_fresh_process(score_ours, *size) for _ in range(repeats)]
    expected = measuring.in_fresh_process(score_pycocotools, *size)
    equal = [sum(a == b for a, b in zip(s.numbers, expected.numbers, strict=True)) for s in scored]
    name = f"scoring {images:,} images, {classes:,} classes"
    rows = [
        Row(name, "s", [s.seconds for s in scored], [expected.seconds], budget=100),
        Row("peak memory while scoring", "MB", [s.memory for s in scored], [expected.memory]),
        Row(
            "numbers equal to the last bit",
            "of 12",
            [min(equal)],
            [len(METRICS)],
            more_is_better=True,
            budget=1,
        ),
    ]
    for more_images, more_classes in GROWTH if growth else ():
        large = measuring.in_fresh_process(score_ours, more_images, more_classes, detections)
        name = f"{more_images:,} images, {more_classes:,} classes"
        rows.append(Row(f"scoring {name}", "s", [large.seconds]))
        rows.append(Row(f"peak memory, {name}", "MB", [large.memory]))
    return rows


class Scored(NamedTuple):
    """What scoring gave: COCO's twelve numbers, and what it took, seconds and MB."""

    numbers: list[float]
    seconds: float
    memory: float


def make_ground_truth(num_images: int, num_classes: int, rng: np.random.Generator) -> Annotations:
    """Draw 7.3 boxes per image, as val2017 has, of which 1 % are crowds."""
    num_boxes = round(num_images * 36_630 / 5_000)
    number = np.sort(rng.integers(0, num_images, num_boxes))
    sizes = np.full((num_images, 2), (480, 640), dtype=np.int32)
    extent = np.exp(rng.uniform(np.log(8), np.log(320), (num_boxes, 2)))
    corner = rng.uniform(0, 1, (num_boxes, 2)) * (np.array([640, 480]) - extent)
    boxes = np.concatenate([corner, extent], axis=1).round(2)
    return Annotations(
        path=Path("generated"),
        image_ids=np.arange(1, num_images + 1),
        sizes=sizes,
        names=np.zeros(0, dtype=np.uint8),
        name_offsets=np.zeros(num_images + 1, dtype=np.int64),
        offsets=np.searchsorted(number, np.arange(num_images + 1)),
        ids=np.arange(1, num_boxes + 1),
        boxes_xywh=boxes,
        area=boxes[:, 2] * boxes[:, 3] * 0.6,
        iscrowd=rng.random(num_boxes) < 0.01,
        category_index=rng.integers(0, num_classes, num_boxes, dtype=np.int32),
        categories=tuple((i, f"class {i}") for i in range(1, num_classes + 1)),
    )


def make_detections(truth: Annotations, per_image: int, rng: np.random.Generator) -> np.ndarray:
    """Draw detections: a third near to boxes, of their class as a rule, the others anywhere.

    Returns:
        `[D, 7]` float64: image id, x, y, w, h, score, label; by image, best first.
    """
    count = len(truth) * per_image
    number = np.repeat(np.arange(len(truth)), per_image)
    boxes = np.exp(rng.uniform(np.log(4), np.log(200), (count, 4)))
    label = rng.integers(1, len(truth.categories) + 1, count)
    counts = np.diff(truth.offsets)[number]
    near = (rng.random(count) < 0.3) & (counts > 0)
    chosen = (truth.offsets[number] + rng.integers(0, 2**31, count) % counts.clip(1))[near]
    boxes[near] = truth.boxes_xywh[chosen] * rng.normal(1, 0.05, (near.sum(), 4))
    right = rng.random(near.sum()) < 0.8
    label[near] = np.where(right, truth.category_index[chosen] + 1, label[near])
    score = np.where(near, rng.beta(3, 2, count), rng.beta(1, 8, count))
    rows = np.column_stack([number + 1, boxes, score, label]).astype(np.float32).astype(np.float64)
    return rows[np.lexsort((-rows[:, 5], rows[:, 0]))]


def fill_evaluator(num_images: int, num_classes: int, per_image: int) -> CocoEvaluator:
    """Give an evaluator what a model returns, image by image."""
    rng = np.random.default_rng(0)
    truth = make_ground_truth(num_images, num_classes, rng)
    rows = torch.from_numpy(make_detections(truth, per_image, rng)).float()
    boxes = torch.cat([rows[:, 1:3], rows[:, 1:3] + rows[:, 3:5]], dim=1)
    evaluator = CocoEvaluator(truth, label_categories(truth.categories))
    parts = (boxes, rows[:, 5], rows[:, 6].long())
    split = (part.split(per_image) for part in parts)
    for image_id, b, s, c in zip(truth.image_ids.tolist(), *split, strict=True):
        evaluator.update([image_id], [{"boxes": b, "scores": s, "labels": c}])
    return evaluator


def score_ours(num_images: int, num_classes: int, per_image: int) -> Scored:
    """Gather and score as `engine.evaluate` does."""
    evaluator = fill_evaluator(num_images, num_classes, per_image)
    before, begin = measuring.start_peak(), time.perf_counter()
    rows = evaluator.gather(Processes(torch.device("cpu")))
    assert rows is not None
    metrics, _ = evaluator.score(rows)
    seconds = time.perf_counter() - begin
    return Scored([metrics[name] for name in METRICS], seconds, measuring.peak_memory() - before)


def score_pycocotools(num_images: int, num_classes: int, per_image: int) -> Scored:
    """Score the same detections with pycocotools, whose index of the truth is there already."""
    evaluator = fill_evaluator(num_images, num_classes, per_image)
    rows = evaluator.gather(Processes(torch.device("cpu")))
    assert rows is not None
    rows[:, 0] = evaluator.sorted_ids[rows[:, 0].astype(int)]
    truth = evaluator.ground_truth
    columns = {
        "id": truth.ids,
        "image_id": truth.image_ids[truth.image_of_annotation()],
        "category_id": truth.category_index + 1,
        "bbox": truth.boxes_xywh,
        "area": truth.area,
        "iscrowd": truth.iscrowd.astype(int),
    }
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    with contextlib.redirect_stdout(None):
        ground_truth = COCO()
        ground_truth.dataset = {
            "images": [{"id": i} for i in truth.image_ids.tolist()],
            "categories": [{"id": i, "name": name} for i, name in truth.categories],
            "annotations": [dict(zip(columns, row, strict=True)) for row in values],
            "info": {},
        }
        ground_truth.createIndex()
        before, begin = measuring.start_peak(), time.perf_counter()
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    seconds = time.perf_counter() - begin
    return Scored(evaluation.stats.tolist(), seconds, measuring.peak_memory() - before)
