"""How well RetinaNet's anchors cover the boxes of a data set, and which would do better.

    python -m tools.visualize anchor-fit --data-path mydata --min-size 320 --max-size 427

takes the flags of train.py. A box whose IoU with every anchor is below 0.5 trains only the few
anchors that overlap it most. The share of the other boxes is the best-possible recall. It is exact:
boxes and anchors lie where training puts them, and are not compared by shape only. The lower one
counts of the recall of all boxes and the mean over classes, because AP is a mean over classes, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.models.detection.anchor_utils import AnchorGenerator

import coco_utils
import presets
from data import checks, coco_arrays
from data.splits import data_paths, read_splits
from models.build import build_model
from models.retinanet import make_anchor_generator
from models.transform import BatchTransform
from runtime import options
from utils import UserError, printable

FOREGROUND = 0.5  # the IoU from which RetinaNet trains an anchor on a box
ENOUGH = 0.98  # recall; below, others are proposed
MOST_BOXES = 4_000  # that a fit looks at, taken evenly; the report looks at all
MOST_CLASSES = 15
STRIDE = 8  # of P3, the finest level


@dataclass(frozen=True)
class Boxes:
    """Boxes at training size: xyxy `[N, 4]`; class numbers `[N]`; padded (H, W) `[N, 2]`."""

    xyxy: np.ndarray
    classes: np.ndarray
    padded: np.ndarray

    def some(self, count: int) -> Boxes:
        """Return `count` boxes at most, taken evenly."""
        chosen = np.linspace(0, len(self.xyxy) - 1, min(count, len(self.xyxy))).astype(np.int64)
        return Boxes(self.xyxy[chosen], self.classes[chosen], self.padded[chosen])


@dataclass(frozen=True)
class Anchors:
    """A family of anchors: the smallest size, growth per level, and ratios m / s, m, m * s."""

    smallest: float = 32
    growth: float = 2.0
    middle: float = 1.0
    spread: float = 2.0

    @property
    def sizes(self) -> list[int]:
        """As --anchor-sizes takes them."""
        return [round(self.smallest * self.growth**level) for level in range(5)]

    @property
    def ratios(self) -> list[float]:
        """As --anchor-ratios takes them: height / width."""
        return [round(self.middle * factor, 2) for factor in (1 / self.spread, 1, self.spread)]


# What a fit tries.
CHOICES: dict[str, Sequence[float]] = {
    "smallest": (4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 64),
    "growth": (1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0),
    "middle": (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.7, 2.0, 2.5),
    "spread": (1.2, 1.4, 1.6, 1.8, 2.0, 2.4, 2.8, 3.5),
}


def paths_of(flags: argparse.Namespace) -> dict[str, Path]:
    """Return where the data lies that the flags name, by split and kind."""
    overrides = {name: getattr(flags, name) for name in options.PATHS}
    return data_paths(flags.dataset, flags.data_path, overrides)


def require_retinanet(model: str) -> None:
    """Raise UserError for a `--model` that is no RetinaNet."""
    if not model.startswith("retinanet"):
        raise UserError(f"--model {model}: this works for RetinaNet only; give retinanet_…")


def boxes_to_cover(annotations: coco_arrays.Annotations, transform: BatchTransform) -> Boxes:
    """Return the boxes that are trained on, where `transform` puts them."""
    corners = coco_arrays.to_xyxy(annotations.boxes_xywh)
    kept = ~annotations.iscrowd & coco_arrays.has_extent(corners)
    images = annotations.image_of_annotation()[kept]
    sizes = annotations.sizes[images].astype(np.float64)
    corners = np.clip(corners[kept], 0, sizes[:, [1, 0, 1, 0]])
    growth = transform.resized_sizes(sizes) / sizes
    return Boxes(
        corners * growth[:, [1, 0, 1, 0]],
        annotations.category_index[kept],
        transform.padded_sizes(sizes),
    )


def best_ious(boxes: Boxes, anchors: AnchorGenerator) -> np.ndarray:
    """Return each box's IoU with the anchor that overlaps it most, `[N]`.

    Of one shape that is the anchor with the nearest center in x and in y: the overlap is a product
    of one factor for each, and neither grows with the distance.
    """
    best = np.zeros(len(boxes.xyxy))
    low, high = boxes.xyxy[:, :2], boxes.xyxy[:, 2:]
    area, center = (high - low).prod(axis=1), (low + high) / 2
    cells = boxes.padded // STRIDE
    for sizes, ratios in zip(anchors.sizes, anchors.aspect_ratios, strict=True):
        stride = boxes.padded // cells  # (H, W); 61 instead of 64 where a level was rounded up
        nearest = (center / stride[:, ::-1]).round().clip(0, cells[:, ::-1] - 1) * stride[:, ::-1]
        for shape in anchors.generate_anchors(list(sizes), list(ratios)).numpy():
            overlap = np.minimum(high, nearest + shape[2:]) - np.maximum(low, nearest + shape[:2])
            shared = overlap.clip(min=0).prod(axis=1)
            union = area + (shape[2:] - shape[:2]).prod() - shared
            best = np.maximum(best, shared / union)
        cells = -(-cells // 2)
    return best


def coverage(boxes: Boxes, ious: np.ndarray) -> tuple[float, float, float]:
    """Return the recall of all boxes, the mean of classes, and the mean IoU of classes."""
    count = np.bincount(boxes.classes)
    known = count > 0
    covered, summed = (np.bincount(boxes.classes, v) for v in (ious >= FOREGROUND, ious))
    by_class, mean_iou = (float((v[known] / count[known]).mean()) for v in (covered, summed))
    return float((ious >= FOREGROUND).mean()), by_class, mean_iou


def fit(boxes: Boxes) -> Anchors:
    """Return the anchors of `CHOICES` with the best IoUs among those with enough recall.

    One property is changed at a time, until no change helps.
    """
    boxes = boxes.some(MOST_BOXES)

    def score(anchors: Anchors) -> tuple[float, float]:
        ious = best_ious(boxes, make_anchor_generator(anchors.sizes, anchors.ratios))
        *recalls, mean_iou = coverage(boxes, ious)
        return min(*recalls, ENOUGH), mean_iou

    best = Anchors()
    best_score, improved = score(best), True
    while improved:
        improved = False
        for name, values in CHOICES.items():
            for value in values:
                candidate = replace(best, **{name: value})
                if (reached := score(candidate)) > best_score:
                    best, best_score, improved = candidate, reached, True
    return best


def report_lines(
    boxes: Boxes, anchors: AnchorGenerator, title: str, names: Sequence[str]
) -> Iterator[str]:
    """Yield how well anchors cover all boxes and those of each class, the worst first."""
    ious = best_ious(boxes, anchors)
    recall, by_class, mean_iou = coverage(boxes, ious)
    yield f"{title}: {recall:.4f}, mean of classes {by_class:.4f} (IoU {mean_iou:.3f})"
    groups = [(printable(names[c]), ious[boxes.classes == c]) for c in np.unique(boxes.classes)]
    groups.sort(key=lambda group: (group[1] >= FOREGROUND).mean())
    width = max(len(name) for name, _ in groups)
    for name, values in groups[:MOST_CLASSES]:
        below = int((values < FOREGROUND).sum())
        recall = 1 - below / len(values)
        yield f"  {name:<{width}}  {recall:.4f}   {below:,} of {len(values):,} boxes not covered"
    if len(groups) > MOST_CLASSES:
        yield f"  … {len(groups) - MOST_CLASSES} more classes, which are covered better"


def flag_text(sizes: Sequence[int], ratios: Sequence[float]) -> str:
    """Return the flags of train.py for these anchors."""
    return (
        f"--anchor-sizes {' '.join(map(str, sizes))} "
        f"--anchor-ratios {' '.join(f'{ratio:g}' for ratio in ratios)}"
    )


def main(argv: list[str] | None = None) -> None:
    """Print the best-possible recall, and better anchors if it is low; flags are train.py's."""
    parser = options.build_parser("Print how well anchors cover the boxes; flags are train.py's.")
    flags = parser.parse_args(argv)
    options.check_flags(flags)
    require_retinanet(flags.model)
    (annotations,) = read_splits(paths_of(flags), ["train"])
    for finding in checks.boxes_findings(annotations, for_training=True):
        raise UserError(f"{annotations.title} has no boxes to fit anchors to: {finding.cases[0]}")
    label_map = coco_utils.label_categories(annotations.categories)
    values = parser.values(flags, "model")
    model: Any = build_model(flags.model, label_map, load=False, **values)
    boxes = boxes_to_cover(annotations, model.transform)
    if not len(boxes.xyxy):
        raise UserError(f"{annotations.title} has no boxes to fit anchors to")

    shorter, longest = model.transform.min_size[-1], model.transform.max_size
    print(
        f"{len(boxes.xyxy):,} boxes of {len(annotations):,} images, resized to {shorter} pixels, "
        f"the longer side to {longest} at most"
    )
    if flags.data_augmentation in presets.RESIZING:
        print(f"({flags.data_augmentation} chooses other sizes; this is the one of evaluation)")
    names = [name for _, name in annotations.categories]
    anchors = model.anchor_generator
    is_default = flags.anchor_sizes is None and flags.anchor_ratios is None
    title = f"best-possible recall of {'the default' if is_default else 'these'} anchors"
    print("\n".join(report_lines(boxes, anchors, title, names)))
    recall = min(coverage(boxes, best_ious(boxes, anchors))[:2])
    if recall >= ENOUGH:
        print(f"at least {ENOUGH}: keep them")
        return
    proposal = fit(boxes)
    proposed = make_anchor_generator(proposal.sizes, proposal.ratios)
    reached = min(coverage(boxes, best_ious(boxes, proposed))[:2])
    if reached > recall:
        print("\n".join(report_lines(boxes, proposed, "recall of the anchors proposed", names)))
        print(f"use them with {flag_text(proposal.sizes, proposal.ratios)}")
    if reached < ENOUGH:
        print(f"no anchors that were tried reach {ENOUGH}; train at a larger --min-size")
