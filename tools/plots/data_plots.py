"""One page of plots about a data set; `tools.check_data --plot` draws it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import coco_utils
from data import image_files
from data.coco_arrays import Annotations
from models.retinanet import make_anchor_generator
from models.transform import BatchTransform
from tools import anchor_fit
from tools.plots import drawing

COLOURS = ("#0072B2", "#E69F00")  # Okabe and Ito's blue and orange: training, validation
MOST_CLASSES = 30
MOST_BOXES = 200_000  # compared with anchors; more change no digit that is shown
COLUMNS, TILES = 5, 10


def draw_page(
    splits: Sequence[tuple[Any, Annotations]], min_size: int, max_size: int, path: Path
) -> None:
    """Draw class counts, boxes against anchors, boxes per image and a mosaic, as PNG.

    Args:
        splits: (split, annotations) with the split's `name` and `images` folder; the first is the
            one whose boxes are compared with anchors and shown.
        min_size, max_size: shorter side of images in training, and longer side at most, pixels.
    """
    split, annotations = splits[0]
    tiles = sample_tiles(split.images, annotations)
    colours = drawing.class_colours(coco_utils.label_categories(annotations.categories))
    figure = drawing.new_figure(16, 6)
    if tiles:
        sheet = drawing.draw_sheet(tiles, colours, COLUMNS, column=306)
        plots, height = 600, 630 + sheet.shape[1]
        figure.set_size_inches(16, height / 100)
        # Pixel by pixel: scaled, the texts could not be read.
        figure.figimage(sheet.permute(1, 2, 0).numpy(), xo=(1600 - sheet.shape[2]) // 2, yo=0)
        figure.text(0.5, 1 - (plots + 12) / height, f"{split.name} images", ha="center", va="top")
        layout = figure.get_layout_engine()
        assert isinstance(layout, ConstrainedLayoutEngine)
        layout.set(rect=(0, 1 - plots / height, 1, plots / height))
    grid = GridSpec(1, 5, figure=figure)
    _draw_classes(figure.add_subplot(grid[0, 0:2]), splits)
    _draw_boxes_per_image(figure.add_subplot(grid[0, 2]), splits)
    _draw_anchors(
        figure, figure.add_subplot(grid[0, 3:5]), split.name, annotations, min_size, max_size
    )
    figure.suptitle(
        f"{drawing.plain(split.path.parent.parent.name)}: "
        + ", ".join(f"{len(a):,} {s.name} images, {len(a.ids):,} boxes" for s, a in splits),
        fontsize=15,
    )
    drawing.save(figure, path)


def _draw_classes(axes: Any, splits: Sequence[tuple[Any, Annotations]]) -> None:
    """Draw boxes per class, commonest on top, one bar per split."""
    names = [name for _, name in splits[0][1].categories]
    counts = [np.bincount(a.category_index, minlength=len(a.categories)) for _, a in splits]
    order = np.argsort(-counts[0], kind="stable")[:MOST_CLASSES]
    height = 0.8 / len(splits)
    for number, ((split, a), count) in enumerate(zip(splits, counts, strict=True)):
        of = {name: n for (_, name), n in zip(a.categories, count.tolist(), strict=True)}
        values = [of.get(names[i], 0) for i in order]
        rows = np.arange(len(order)) + (number - (len(splits) - 1) / 2) * height
        bars = axes.barh(rows, values, height, color=COLOURS[number], label=split.name)
        if len(order) <= 15:
            axes.bar_label(bars, [f"{value:,}" for value in values], padding=3, fontsize=9)
    shown = [drawing.plain(drawing.shorten(names[i], 24)) for i in order]
    axes.set_yticks(np.arange(len(order)), shown)
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
    transform = BatchTransform(GeneralizedRCNNTransform(min_size, max_size, [0.0] * 3, [1.0] * 3))
    boxes = anchor_fit.boxes_to_cover(annotations, transform).some(MOST_BOXES)
    if len(boxes.xyxy) == 0:
        axes.set_axis_off()
        axes.set_title(f"{name}: no box to train on")
        return
    side, ratio = _side_and_ratio(boxes.xyxy)
    bins = np.geomspace(4, 1500, 70), np.geomspace(1 / 8, 8, 50)
    density = axes.hist2d(
        side.clip(4.01, 1499), ratio.clip(0.126, 7.99), bins, cmin=1, cmap="viridis_r", norm="log"
    )
    figure.colorbar(density[3], ax=axes, label="boxes")
    generator = make_anchor_generator()
    levels = zip(generator.sizes, generator.aspect_ratios, strict=True)
    anchors = np.concatenate([generator.generate_anchors(list(s), list(r)) for s, r in levels])
    style = {"color": "#D55E00", "markersize": 9, "markeredgewidth": 1.8}
    axes.plot(*_side_and_ratio(anchors), "+", label="anchors", **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    covered = (anchor_fit.best_ious(boxes, generator) >= anchor_fit.FOREGROUND).mean()
    axes.set(
        xlabel=f"√(width × height), pixels at training size ({min_size} / {max_size})",
        ylabel="width / height",
        title=f"{name} boxes and anchors: {covered:.1%} have an anchor of IoU ≥ 0.5",
    )
    axes.legend(loc="upper left")


def _side_and_ratio(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return √(width · height) and width / height of boxes `[n, 4]` xyxy."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    return np.sqrt(width * height), width / height


def sample_tiles(images: Path, annotations: Annotations) -> list[drawing.Tile]:
    """Return images spread evenly over a split, with boxes and captions; those that open."""
    data = coco_utils.CocoDetection(
        images, annotations, coco_utils.label_categories(annotations.categories)
    )
    with_boxes = np.flatnonzero(np.diff(annotations.offsets) > 0)
    tiles: list[drawing.Tile] = []
    for start in np.linspace(0, len(with_boxes), min(TILES, len(with_boxes)), endpoint=False):
        for number in with_boxes[int(start) : int(start) + 4].tolist():
            try:
                tiles.append(drawing.annotated_tile(data, number))
            except image_files.ImageError:
                continue  # the next one then
            break
    return tiles
