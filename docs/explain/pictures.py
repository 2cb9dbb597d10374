"""The image of docs/retinanet.md, and what anchors of any size can reach."""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from data import shapes
from models.retinanet import make_anchor_generator
from tools import anchor_fit
from tools.plots import drawing
from tools.plots.method import COLOURS, WIDTH, Scene, make_scene

SIZE = (800, 1216)  # (H, W) of the pages' image: the shorter side is the recipe's, padding is none
# What the pages' image shows: class, centre and side in pixels. The three small circles overlap,
# and no anchor is as small as they are.
OBJECTS = (
    ("circle", (704, 130), 13),
    ("circle", (715, 132), 16),
    ("circle", (709, 140), 14),
    ("square", (330, 420), 380),
    ("circle", (520, 520), 330),
    ("triangle", (930, 240), 260),
    ("circle", (905, 590), 96),
    ("square", (1090, 560), 44),
)


def example_scene(paint: bool = True) -> Scene:
    """Draw the pages' image by `shapes`, `OBJECTS` on it; gray and faster without `paint`."""
    height, width = SIZE
    rng = np.random.default_rng(8)
    scale = shapes._SCALE
    owners = Image.new("L", (width * scale, height * scale))
    pen = ImageDraw.Draw(owners)
    for number, (name, centre, side) in enumerate(OBJECTS):
        corners = shapes._outline(rng, name, np.array(centre), side)
        pen.polygon([tuple(corner) for corner in corners], fill=number + 1)
    shown = np.asarray(owners)
    boxes = []
    for number in range(len(OBJECTS)):
        rows, columns = (np.flatnonzero((shown == number + 1).any(axis=axis)) for axis in (1, 0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    if paint:
        picture = shapes._paint(rng, owners, len(OBJECTS))
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    else:
        image = torch.full((3, height, width), 128, dtype=torch.uint8)
    return make_scene(image, torch.tensor(boxes) / scale, [name for name, *_ in OBJECTS])


def best_overlap(width: float, height: float, count: int = 23) -> np.ndarray:
    """Return the best IoU of a box with any anchor, at `count` squared positions: `[P]`.

    The positions are spread evenly over the largest stride, 128 px, far from the border. 23 divides
    no stride.
    """
    grid = 1024 + (np.arange(count) + 0.5) * 128 / count
    centre = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    half = np.array([width, height]) / 2
    padded = np.tile([2048, 2048], (len(centre), 1))
    xyxy = np.concatenate([centre - half, centre + half], axis=1)
    boxes = anchor_fit.Boxes(xyxy, np.zeros(len(centre), np.int64), padded)
    return anchor_fit.best_ious(boxes, make_anchor_generator())


def draw_coverage() -> Figure:
    """Plot the best IoU of an anchor with a box over the box's size, for three shapes of box."""
    figure = drawing.new_figure(WIDTH, 4.4)
    axes = figure.subplots()
    sides = np.geomspace(6, 1200, 160)
    for ratio, colour in ((1, COLOURS[4]), (2, COLOURS[2]), (4, COLOURS[5])):
        stretch = math.sqrt(ratio)
        values = np.stack([best_overlap(side * stretch, side / stretch) for side in sides])
        axes.plot(sides, values.mean(axis=1), color=colour, label=f"{ratio} : 1")
        axes.fill_between(
            sides, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.15, linewidth=0
        )
    for threshold, text in ((0.5, "foreground from 0.5"), (0.4, "background below 0.4")):
        axes.axhline(threshold, color="black", linewidth=0.8, linestyle=":")
        axes.text(6, threshold + 0.012, text)
    axes.set_xscale("log")
    ticks = [8, 16, 32, 64, 128, 256, 512, 1024]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.set_xlabel("√(width · height) of the box in the resized image, px")
    axes.set_ylabel("IoU with the best anchor")
    axes.legend(title="width : height", loc="lower center", ncols=3)
    return figure
