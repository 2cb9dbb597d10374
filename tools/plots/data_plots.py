"""One page of plots about a data set; `tools.check_data --plot` draws it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

import coco_utils
from data import image_files
from data.coco_arrays import Annotations
from tools.plots import drawing

# RetinaNet's anchors, as torchvision rounds them: sides of the square ones, and height / width.
ANCHOR_SIDES = [int(side * 2 ** (k / 3)) for side in (32, 64, 128, 256, 512) for k in range(3)]
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
COLOURS = ("#0072B2", "#E69F00")  # Okabe and Ito's blue and orange: training, validation
MOST_CLASSES = 30
MOST_BOXES = 200_000  # compared with anchors; more change no digit that is shown
COLUMNS, TILES = 5, 10
TILE = 300  # pixels, as wide as they are shown, so that their text keeps its size


def draw_page(
    splits: Sequence[tuple[Any, Annotations]], min_size: int, max_size: int, path: Path
) -> None:
    """Draw class counts, boxes against anchors, boxes per image and a mosaic, as PNG.

    Args:
        splits: (split, annotations) with the split's `name` and `images` folder; the first is the
            one whose boxes are compared with anchors and shown.
        min_size, max_size: shorter side of images in training, and longer side at most, pixels.
    """
    figure = Figure(figsize=(16, 12), dpi=100, layout="constrained")
    grid = GridSpec(2, 5, figure=figure, height_ratios=(1, 1.25))
    split, annotations = splits[0]
    _draw_classes(figure.add_subplot(grid[0, 0:2]), splits)
    _draw_boxes_per_image(figure.add_subplot(grid[0, 2]), splits)
    _draw_anchors(
        figure, figure.add_subplot(grid[0, 3:5]), split.name, annotations, min_size, max_size
    )
    _draw_mosaic(figure.add_subplot(grid[1, :]), split, annotations)
    figure.suptitle(
        f"{drawing.plain(split.path.parent.parent.name)}: "
        + ", ".join(f"{len(a):,} {s.name} images, {len(a.ids):,} boxes" for s, a in splits),
        fontsize=15,
    )
    figure.savefig(path)


def _draw_classes(axes: Any, splits: Sequence[tuple[Any, Annotations]]) -> None:
    """Draw boxes per class, commonest on top, one bar per split."""
    names = [name for _, name in splits[0][1].categories]
    counts = [np.bincount(a.category_index, minlength=len(a.categories)) for _, a in splits]
    order = np.argsort(-counts[0], kind="stable")[:MOST_CLASSES]
    height = 0.8 / len(splits)
    for number, ((split, a), count) in enumerate(zip(splits, counts, strict=True)):
        of = {name: n for (_, name), n in zip(a.categories, count.tolist(), strict=True)}
        values = [of.get(names[i], 0) for i in order]
        places = np.arange(len(order)) + (number - (len(splits) - 1) / 2) * height
        bars = axes.barh(places, values, height, color=COLOURS[number], label=split.name)
        if len(order) <= 15:
            axes.bar_label(bars, [f"{value:,}" for value in values], padding=3, fontsize=9)
    axes.set_yticks(np.arange(len(order)), [drawing.plain(names[i][:24]) for i in order])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    if counts[0].max(initial=1) > 100 * max(1, np.median(counts[0])):
        axes.set_xscale("log")
    more = len(names) - len(order)
    axes.set(
        xlabel="boxes",
        title="boxes per class" + (f" (the {len(order)} commonest; {more} more)" if more else ""),
    )
    axes.legend(loc="lower right")


def _draw_boxes_per_image(axes: Any, splits: Sequence[tuple[Any, Annotations]]) -> None:
    most = max(int(np.diff(a.offsets).max(initial=0)) for _, a in splits)
    edges = np.arange(0, most + 2, max(1, -(-(most + 1) // 40))) - 0.5
    for number, (split, a) in enumerate(splits):
        per_image = np.diff(a.offsets)
        weights = np.full(len(per_image), 100 / max(1, len(per_image)))
        axes.hist(
            per_image,
            edges,
            weights=weights,
            histtype="stepfilled",
            alpha=0.35,
            color=COLOURS[number],
        )
        axes.hist(
            per_image,
            edges,
            weights=weights,
            histtype="step",
            color=COLOURS[number],
            label=split.name,
            linewidth=1.5,
        )
    axes.set(xlabel="boxes in the image", ylabel="share of images (%)", title="boxes per image")
    axes.legend()


def _draw_anchors(
    figure: Figure, axes: Any, name: str, annotations: Annotations, min_size: int, max_size: int
) -> None:
    """Draw how large and how wide boxes are at training size, with the anchors among them."""
    sizes = annotations.sizes.clip(1).astype(np.float64)
    scale = np.minimum(min_size / sizes.min(axis=1), max_size / sizes.max(axis=1))
    sides = annotations.boxes_xywh[:, 2:] * scale[annotations.image_of_annotation()][:, None]
    sides = sides[(sides > 0).all(axis=1) & ~annotations.iscrowd]
    sides = sides[:: max(1, len(sides) // MOST_BOXES)]
    side, ratio = np.sqrt(sides.prod(axis=1)), sides[:, 0] / sides[:, 1]
    bins = np.geomspace(4, 1500, 70), np.geomspace(1 / 8, 8, 50)
    if len(sides) == 0:
        axes.set_axis_off()
        axes.set_title(f"{name}: no box to train on")
        return
    density = axes.hist2d(
        side.clip(4.01, 1499), ratio.clip(0.126, 7.99), bins, cmin=1, cmap="viridis_r", norm="log"
    )
    figure.colorbar(density[3], ax=axes, label="boxes")
    anchors = np.array([(s, 1 / r) for s in ANCHOR_SIDES for r in ANCHOR_RATIOS])
    axes.plot(
        anchors[:, 0],
        anchors[:, 1],
        "+",
        color="#D55E00",
        markersize=9,
        markeredgewidth=1.8,
        label="anchors",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    covered = np.mean(best_overlap(sides) >= 0.5)
    axes.set(
        xlabel=f"√(width × height), pixels at training size ({min_size} / {max_size})",
        ylabel="width / height",
        title=f"{name} boxes and anchors: {covered:.1%} fit one (IoU ≥ 0.5)",
    )
    axes.legend(loc="upper left")


def best_overlap(sides: np.ndarray) -> np.ndarray:
    """Return each box's IoU with the anchor most like it in shape, were they concentric, `[n]`.

    Args:
        sides: `[n, 2]` width and height at training size, pixels.
    """
    best = np.zeros(len(sides))
    area = sides.prod(axis=1)
    for side in ANCHOR_SIDES:
        for ratio in ANCHOR_RATIOS:
            anchor = np.array([side / ratio**0.5, side * ratio**0.5])
            shared = np.minimum(sides, anchor).prod(axis=1)
            best = np.maximum(best, shared / (area + anchor.prod() - shared))
    return best


def _draw_mosaic(axes: Any, split: Any, annotations: Annotations) -> None:
    """Draw images spread evenly over the split with their boxes; those that open."""
    label_map = coco_utils.label_categories(annotations.categories)
    data = coco_utils.CocoDetection(split.images, annotations, label_map)
    colours, names = drawing.class_colours(label_map), {c["label"]: c["name"] for c in label_map}
    with_boxes = np.flatnonzero(np.diff(annotations.offsets) > 0)
    tiles = []
    for place in (
        np.linspace(0, len(with_boxes) - 1, 4 * TILES).astype(int) if len(with_boxes) else []
    ):
        try:
            image, target = data[0, int(with_boxes[place])]
        except image_files.ImageError:
            continue
        labels = target["labels"].tolist()
        texts = [names[label] for label in labels]
        tiles.append(
            drawing.draw_boxes(image, target["boxes"].numpy(), labels, texts, colours, TILE)
        )
    axes.axis("off")
    axes.set_anchor("N")
    if tiles:
        chosen = [
            tiles[i] for i in np.linspace(0, len(tiles) - 1, min(TILES, len(tiles))).astype(int)
        ]
        axes.imshow(drawing.mosaic(chosen, columns=COLUMNS).permute(1, 2, 0).numpy())
        axes.set_title(f"{split.name} images with their boxes")
