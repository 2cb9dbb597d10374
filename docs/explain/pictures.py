"""Draw RetinaNet at work on one image: anchors, assignment, box coding, losses, detections.

Whatever is drawn or counted comes from `retinanet` and from the model itself; docs/retinanet.md is
made with it, and `tools.visualize` draws the same on any image with boxes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import FancyArrowPatch, Rectangle
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import batched_nms, clip_boxes_to_image

from data import shapes
from models import retinanet
from models.build import ANCHOR_RATIOS, BatchTransform, make_anchor_generator
from tools.plots import drawing
from utils import UserError

matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "retinanet", "font.size": 11})
SIZE = (800, 1216)  # (H, W) of the pages' image: the shorter side is the recipe's, padding is none
CLASSES = 91  # that torchvision's COCO models score: labels 0 to 90
PRIOR = 0.01  # of a class at an anchor, in an untrained head: section 4.1 of the paper
LEVELS = ("P3", "P4", "P5", "P6", "P7")
GRAY = "#555555"
# A page shows a picture in about 1,000 of its own pixels, so 11.5 points are its body's 16 pixels;
# a sharp screen has two pixels for each of them.
WIDTH, DPI = 10, 200
COLOURS = tuple(colour for colour in drawing.PALETTE if colour != "#FFFFFF")
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


@dataclass(frozen=True)
class Scene:
    """An image as the model sees it, with its boxes and all anchors.

    Attributes:
        image: uint8 `[3, H, W]`, resized and padded.
        boxes: `[M, 4]` xyxy; names: of their classes, M; labels: int64 `[M]`.
        feature_sizes: (H, W) of the levels P3 to P7.
        anchors: `[A, 4]` xyxy, level by level.
    """

    image: Tensor
    boxes: Tensor
    names: Sequence[str]
    labels: Tensor
    feature_sizes: tuple[tuple[int, int], ...]
    anchors: Tensor

    def spacing(self) -> list[tuple[int, int]]:
        """Return how far apart the cells of each level are, (down, across), in pixels.

        torchvision divides the image by the feature map and rounds down, so it is less than the
        stride where a feature map has been rounded up.
        """
        height, width = self.image.shape[1:]
        return [(height // rows, width // columns) for rows, columns in self.feature_sizes]

    def level_of_anchor(self) -> Tensor:
        """Return the level, 0 to 4, of each anchor, int64 `[A]`."""
        per_cell = len(self.anchors) // sum(h * w for h, w in self.feature_sizes)
        counts = torch.tensor([h * w * per_cell for h, w in self.feature_sizes])
        return torch.repeat_interleave(torch.arange(len(counts)), counts)

    def assign(self, **rules: Any) -> Tensor:
        """Return what `retinanet.assign` makes of the boxes by `rules`, int64 `[A]`."""
        boxes, labels = retinanet.pad_targets([{"boxes": self.boxes, "labels": self.labels}])
        return retinanet.assign(self.anchors, boxes, labels, **rules)[0]


def make_scene(
    image: Tensor, boxes: Tensor, names: Sequence[str], min_size: int = 800, max_size: int = 1333
) -> Scene:
    """Resize and pad uint8 `image` with its boxes as the model does, and lay out the anchors."""
    transform = BatchTransform(GeneralizedRCNNTransform(min_size, max_size, [0.0] * 3, [1.0] * 3))
    order = sorted(set(names))
    labels = torch.tensor([order.index(name) + 1 for name in names], dtype=torch.int64)
    target = {"boxes": boxes.float().reshape(-1, 4), "labels": labels}
    batch, targets = transform.eval()([image / 255], [target])
    assert targets is not None
    pixels = (batch.tensors[0] * 255).round().byte()
    height, width = pixels.shape[1:]
    sizes = feature_sizes(height, width)
    anchors = retinanet.make_anchors(
        make_anchor_generator(), sizes, (height, width), torch.float32, torch.device("cpu")
    )
    return Scene(pixels, targets[0]["boxes"], names, labels, sizes, anchors)


def feature_sizes(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """Return (H, W) of P3 to P7: each level halves the one before and rounds up."""
    strides = [8 * 2**level for level in range(len(LEVELS))]
    return tuple((math.ceil(height / s), math.ceil(width / s)) for s in strides)


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


def steps(scene: Scene) -> list[Tensor]:
    """Return the assignment after each of the four rules, int64 `[A]` each, by `assign` itself."""
    nothing = {"fg_iou_thresh": math.inf, "allow_low_quality": False}
    return [
        scene.assign(**nothing, bg_iou_thresh=0.0),
        scene.assign(**nothing),
        scene.assign(allow_low_quality=False),
        scene.assign(),
    ]


def count(assigned: Tensor) -> tuple[int, int, int]:
    """Return how many anchors are foreground, background and ignored."""
    return (
        int((assigned >= 0).sum()),
        int((assigned == retinanet.BACKGROUND).sum()),
        int((assigned == retinanet.IGNORED).sum()),
    )


def best_overlap(width: float, height: float, places: int = 23) -> np.ndarray:
    """Return the best IoU that a box has with any anchor, at `places` squared places: `[P]`.

    The places are spread evenly over 128 pixels, the largest stride, and 23 divides no spacing of
    cells at `SIZE`. At a level the nearest anchors are best.
    """
    grid = (np.arange(places) + 0.5) * 128 / places
    x, y = (axis.reshape(-1, 1) for axis in np.meshgrid(grid, grid))
    best = np.zeros(places**2)
    generator = make_anchor_generator()
    for (rows, columns), sizes in zip(feature_sizes(*SIZE), generator.sizes, strict=True):
        spacing = (SIZE[1] // columns, SIZE[0] // rows)
        base = generator.generate_anchors(list(sizes), list(ANCHOR_RATIOS)).numpy()  # [9, 4]
        sides = (base[:, 2:] - base[:, :2]).T  # [2, 9]
        shared = np.ones((1, 1))
        for side, length, place, step in zip(sides, (width, height), (x, y), spacing, strict=True):
            off = np.abs((place + step / 2) % step - step / 2)  # [P, 1]
            ends = np.minimum(side / 2, off + length / 2) - np.maximum(-side / 2, off - length / 2)
            shared = shared * ends.clip(min=0)
        union = width * height + sides.prod(axis=0) - shared
        best = np.maximum(best, (shared / union).max(axis=1))
    return best


def coding_example(scene: Scene) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return a box, one of its anchors, the code between them `[4]` each, and their IoU.

    The box is the largest that has an anchor, the anchor the one of its own from which it differs
    in all four numbers.
    """
    assigned = scene.assign()
    sides = scene.boxes[:, 2:] - scene.boxes[:, :2]
    own = torch.bincount(assigned[assigned >= 0], minlength=len(sides)) > 0
    if not own.any():
        raise UserError("the image has no box, so there is none to encode")
    number = int((sides.prod(dim=1) * own).argmax())
    candidates = (assigned == number).nonzero()[:, 0]
    box = scene.boxes[number]
    iou = retinanet.pairwise_iou(box[None, None], scene.anchors[candidates])[0, 0]
    codes = retinanet.encode_boxes(box.expand(len(candidates), 4), scene.anchors[candidates])
    best = int(codes.abs().amin(dim=1).argmax())
    return box, scene.anchors[candidates[best]], codes[best], float(iou[best])


def first_losses(scene: Scene, probability: float) -> dict[str, tuple[float, float]]:
    """Return (foreground, background) sums of the loss of a head that says `probability` to all.

    Of cross entropy and of the focal loss, over all anchors but the ignored and over all classes,
    divided by the foreground anchors as in training.
    """
    foreground, background, _ = count(scene.assign())
    logit = torch.full((1, 2, 1), math.log(probability / (1 - probability)), dtype=torch.float64)
    there = torch.tensor([[True, False]])
    present, absent = retinanet.focal_loss(logit, torch.zeros(1, 2, dtype=torch.int64), there)[0]
    others = foreground * (CLASSES - 1) + background * CLASSES  # classes that are not there
    divisor = max(foreground, 1)
    entropy = -math.log(probability), -math.log(1 - probability)
    return {
        "cross entropy": (foreground * entropy[0] / divisor, others * entropy[1] / divisor),
        "focal loss": (foreground * float(present) / divisor, others * float(absent) / divisor),
    }


def _panel(axes: Any, image: Tensor, title: str) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set_title(title, fontsize=11.5, loc="left")
    axes.set_axis_off()


def _outline(axes: Any, boxes: Tensor, **style: Any) -> None:
    """Outline boxes `[n, 4]`, xyxy."""
    patches = [Rectangle((x, y), r - x, b - y) for x, y, r, b in boxes.tolist()]
    axes.add_collection(PatchCollection(patches, facecolor="none", **style), autolim=False)


def _outline_objects(axes: Any, scene: Scene, width: float = 2) -> None:
    for number, box in enumerate(scene.boxes):
        _outline(axes, box[None], edgecolor="black", linewidth=width + 1.5)
        _outline(axes, box[None], edgecolor=COLOURS[number % len(COLOURS)], linewidth=width)


def _sheet(image: Tensor, rows: int, columns: int) -> Any:
    """Return a figure of `WIDTH` inches and its axes, with the shape of the image."""
    height, width = image.shape[1:]
    tall = rows * (WIDTH / columns * height / width + 0.5)
    layout = ConstrainedLayoutEngine(h_pad=0.1)  # inches: less cuts the first titles
    figure = Figure(figsize=(WIDTH, min(tall, 14)), dpi=DPI, layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def draw_anchors(scene: Scene) -> Figure:
    """Draw the nine anchors of a cell amid the image for each level, and what fits each box."""
    figure, axes = _sheet(scene.image, 2, 3)
    levels = scene.level_of_anchor()
    height, width = scene.image.shape[1:]
    for level, (rows, columns) in enumerate(scene.feature_sizes):
        anchors = scene.anchors[levels == level].reshape(rows, columns, -1, 4)
        nine = anchors[rows // 2, columns // 2]
        down, across = scene.spacing()[level]
        size = nine[:, 2:] - nine[:, :2]
        squares = size[size[:, 0] == size[:, 1], 0]
        _panel(
            axes[level],
            scene.image // 2 + 64,
            f"{LEVELS[level]}: {rows} × {columns} cells of {down} × {across} px,\n"
            f"square anchors of {squares.min():.0f} to {squares.max():.0f} px",
        )
        axes[level].set_xlim(0, width)
        axes[level].set_ylim(height, 0)
        for kind in range(len(nine)):
            colour = COLOURS[(0, 4, 5)[kind * 3 // len(nine)]]
            _outline(axes[level], nine[kind : kind + 1], edgecolor=colour, linewidth=1.3)
    _panel(
        axes[5], scene.image, "the level whose anchors fit a box best,\nand the IoU with the best"
    )
    _outline_objects(axes[5], scene)
    if len(scene.boxes):
        iou, best = retinanet.pairwise_iou(scene.boxes[None], scene.anchors)[0].max(dim=1)
        taken: list[tuple[float, float]] = []
        for box, value, level in zip(scene.boxes, iou, levels[best], strict=True):
            _label(axes[5], box, f"{LEVELS[level]} {value:.2f}", scene, taken)
    return figure


def _label(
    axes: Any, box: Tensor, text: str, scene: Scene, taken: list[tuple[float, float]]
) -> None:
    """Write above or below a box where that hides no other text, else nothing."""
    unit = scene.image.shape[2] / 330  # image pixels per pixel of a panel that is a third of 1,000
    left, top, _, bottom = box.tolist()
    left = min(left, scene.image.shape[2] - 50 * unit)
    for place in (top - 16 * unit, bottom + 3 * unit):
        is_free = all(abs(left - x) > 50 * unit or abs(place - y) > 15 * unit for x, y in taken)
        if is_free and 0 <= place <= scene.image.shape[1] - 14 * unit:
            taken.append((left, place))
            style = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
            axes.text(left, place, text, fontsize=8, va="top", bbox=style)
            return


def draw_coverage() -> Figure:
    """Plot the best IoU of an anchor with a box over the box's size, for three shapes of box."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
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


def _disputed(scene: Scene) -> tuple[Tensor, Tensor]:
    """Return the "max-iou" assignment, and a box, xyxy, around what the assigners differ in.

    Where they agree, around the smallest box.
    """
    other, own = scene.assign(assigner="max-iou"), scene.assign()
    numbers = other[other != own]
    if len(numbers):
        numbers = torch.cat([numbers, own[other != own]]).unique()
    else:
        numbers = (scene.boxes[:, 2:] - scene.boxes[:, :2]).prod(dim=1).argmin()[None]
    low, high = scene.boxes[numbers, :2].amin(dim=0), scene.boxes[numbers, 2:].amax(dim=0)
    half = max(0.75 * float((high - low).max()), 36.0)
    centre = (low + high) / 2
    return other, torch.cat([centre - half, centre + half])


def draw_assignment(scene: Scene) -> Figure:
    """Draw which anchors belong to which box after each rule, and in what the assigners differ."""
    figure, axes = _sheet(scene.image, 3, 2)
    if not len(scene.boxes):
        raise UserError("the image has no box, so all its anchors are background")
    titles = (
        "1 all ignored",
        "2 background below 0.4",
        "3 foreground from 0.5",
        "4 each box claims its best",
    )
    before = None
    for ax, title, assigned in zip(axes, titles, steps(scene), strict=False):
        foreground, background, ignored = count(assigned)
        counts = f"{foreground:,} foreground, {background:,} background, {ignored:,} ignored"
        _panel(ax, scene.image // 2 + 64, f"{title}\n{counts}")
        _outline_objects(ax, scene, width=1.5)
        if before is None:
            ax.add_patch(Rectangle((0, 0), *reversed(scene.image.shape[1:]), fc=GRAY, alpha=0.6))
        else:
            is_last = ax is axes[len(titles) - 1]
            _draw_assigned(ax, scene, assigned, before if is_last else assigned)
        before = assigned
    other, window = _disputed(scene)
    own = scene.assign()
    changed = int((other != own).sum())
    inside = (scene.boxes[:, :2] >= window[:2]).all(1) & (scene.boxes[:, 2:] <= window[2:]).all(1)
    for ax, name, assigned in zip(axes[4:], retinanet.ASSIGNERS, (own, other), strict=True):
        shares = [int((assigned == number).sum()) for number in inside.nonzero()[:, 0]]
        text = f"--assigner {name}, close up" + f": {changed} anchors differ" * (ax is axes[5])
        text += f"\nanchors of the boxes here: {', '.join(map(str, shares))}"
        _panel(ax, scene.image // 2 + 64, text)
        _draw_window(ax, scene, assigned, window)
    return figure


def _draw_assigned(axes: Any, scene: Scene, assigned: Tensor, before: Tensor) -> None:
    """Outline ignored anchors in black, a box's in its colour, thick where they are new to it."""
    ignored = scene.anchors[assigned == retinanet.IGNORED]
    _outline(axes, ignored, edgecolor="black", linewidth=0.4, alpha=0.3)
    for number in range(len(scene.boxes)):
        colour = COLOURS[number % len(COLOURS)]
        mine = assigned == number
        _outline(axes, scene.anchors[mine], edgecolor=colour, linewidth=0.6, alpha=0.5)
        new = scene.anchors[mine & (before != number)]
        _outline(axes, new, edgecolor=colour, linewidth=1.8)


def _draw_window(axes: Any, scene: Scene, assigned: Tensor, window: Tensor) -> None:
    """Show a part of the image: boxes, and the anchors of each with their centres as dots."""
    middle = (window[:2] + window[2:]) / 2
    half = float(window[2] - middle[0])
    wide = half * scene.image.shape[2] / scene.image.shape[1]
    axes.set_xlim(float(middle[0]) - wide, float(middle[0]) + wide)
    axes.set_ylim(float(middle[1]) + half, float(middle[1]) - half)
    for number in range(len(scene.boxes)):
        mine = scene.anchors[assigned == number]
        colour = COLOURS[number % len(COLOURS)]
        _outline(axes, mine, edgecolor=colour, linewidth=0.8, alpha=0.7)
        if len(mine):
            # Several boxes' anchors may have one centre: those of later boxes are drawn smaller.
            x, y = ((mine[:, :2] + mine[:, 2:]) / 2).T.numpy()
            axes.scatter(x, y, s=max(70 - 8 * number, 14), color=colour, ec="black", zorder=3)
    _outline_objects(axes, scene, width=3)


def draw_coding(scene: Scene) -> Figure:
    """Draw a box, one of its anchors, and the four numbers that lead from one to the other."""
    box, anchor, code, iou = coding_example(scene)
    figure = Figure(figsize=(WIDTH, 4), dpi=DPI, layout="constrained")
    axes, text = figure.subplots(1, 2, width_ratios=(1, 1.2))
    _panel(axes, scene.image // 2 + 64, f"an anchor and the box it belongs to, IoU {iou:.2f}")
    low, high = torch.minimum(box[:2], anchor[:2]), torch.maximum(box[2:], anchor[2:])
    margin = 0.12 * float((high - low).max())
    axes.set_xlim(float(low[0]) - margin, float(high[0]) + margin)
    axes.set_ylim(float(high[1]) + margin, float(low[1]) - margin)
    _outline(axes, anchor[None], edgecolor="black", linewidth=2, linestyle="--")
    _outline(axes, box[None], edgecolor=COLOURS[5], linewidth=2.5)
    (xa, ya), (x, y) = (((b[:2] + b[2:]) / 2).tolist() for b in (anchor, box))
    axes.add_patch(
        FancyArrowPatch(
            (xa, ya), (x, y), arrowstyle="-|>", mutation_scale=16, lw=1.8, color=COLOURS[5]
        )
    )
    axes.scatter(xa, ya, s=40, color="black", zorder=3)
    (wa, ha), (w, h) = ((b[2:] - b[:2]).tolist() for b in (anchor, box))
    dx, dy, dw, dh = code.tolist()
    back = retinanet.decode_boxes(code, anchor).tolist()
    lines = (
        f"anchor: centre ({xa:.1f}, {ya:.1f}), {wa:.1f} × {ha:.1f} px   (dashed)",
        f"box:    centre ({x:.1f}, {y:.1f}), {w:.1f} × {h:.1f} px   (solid)",
        "",
        f"dx = ({x:.1f} − {xa:.1f}) / {wa:.1f} = {dx:+.4f}",
        f"dy = ({y:.1f} − {ya:.1f}) / {ha:.1f} = {dy:+.4f}",
        f"dw = log({w:.1f} / {wa:.1f}) = {dw:+.4f}",
        f"dh = log({h:.1f} / {ha:.1f}) = {dh:+.4f}",
        "",
        "decoded: " + ", ".join(f"{value:.1f}" for value in back),
    )
    text.set_axis_off()
    text.text(0, 0.5, "\n".join(lines), family="DejaVu Sans Mono", fontsize=10, va="center")
    return figure


def draw_focal(scene: Scene) -> Figure:
    """Plot the focal loss against cross entropy, its gradient, and the first loss of the image."""
    figure = Figure(figsize=(WIDTH, 7.6), dpi=DPI, layout="constrained")
    panels = figure.subplot_mosaic([["loss", "gradient"], ["first", "first"]])
    curve, bars = panels["loss"], panels["first"]
    _draw_gradients(panels["gradient"])
    p = np.linspace(0.001, 1, 1000)
    for gamma, colour in zip((0, 0.5, 1, 2, 5), COLOURS[:3] + COLOURS[4:], strict=False):
        name = "γ = 0, cross entropy" if gamma == 0 else f"γ = {gamma:g}"
        width = 2.5 if gamma == 2 else 1.3
        shade = drawing.on_white(colour)
        curve.plot(p, -((1 - p) ** gamma) * np.log(p), color=shade, linewidth=width, label=name)
    curve.set_xlabel("probability of the right answer")
    curve.set_ylabel("loss, without α")
    curve.set_ylim(0, 5)
    curve.legend()
    rows = [
        (f"{loss},\np = {p:g}", values)
        for p in (0.5, PRIOR)
        for loss, values in first_losses(scene, p).items()
    ]
    places = np.arange(len(rows))
    for side, (name, shade) in enumerate((("foreground", COLOURS[0]), ("background", COLOURS[4]))):
        offset = 0.2 - 0.4 * side
        # A foreground anchor's other classes are background: what is there is one class in it.
        values = np.array([pair[side] for _, pair in rows])
        bars.barh(places - offset, values, 0.38, color=shade, label=f"{name} terms")
        for place, value in zip(places - offset, values, strict=True):
            number = f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"
            bars.text(value * 1.2, place, number, va="center")
    bars.set_xscale("log")
    bars.set_xlim(0.005, 30 * max(max(pair) for _, pair in rows))
    bars.set_yticks(places, [label for label, _ in rows])
    bars.invert_yaxis()
    bars.set_xlabel("first loss of this image, per foreground anchor")
    bars.legend(loc="lower right")
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_gradients(axes: Any) -> None:
    """Plot the gradient of both losses by the logit, for an absent class and for a present one.

    The focal loss has its α here, as in training.
    """
    logits = torch.linspace(-8, 8, 200, dtype=torch.float64, requires_grad=True)
    both = torch.stack([logits, logits])[:, :, None]  # [2, 200, 1]: absent, present
    is_there = torch.tensor([[False], [True]]).expand(2, 200)
    classes = torch.zeros(2, 200, dtype=torch.int64)
    p = logits.detach().sigmoid()
    for kind, sign, entropy, colour in (
        (0, 1, p, COLOURS[4]),
        (1, -1, 1 - p, COLOURS[0]),
    ):
        loss = retinanet.focal_loss(both, classes, is_there)[kind].sum()
        (slope,) = torch.autograd.grad(loss, logits, retain_graph=True)
        name = ("absent class", "present class")[kind]
        style = {"color": colour, "linewidth": 1.3}
        axes.plot(logits.detach(), entropy, linestyle="--", label=f"{name}, cross entropy", **style)
        axes.plot(logits.detach(), sign * slope, label=f"{name}, focal loss", **style)
    axes.axvline(math.log(PRIOR / (1 - PRIOR)), color=GRAY, linewidth=0.8, linestyle=":")
    axes.text(-4.8, 1e-5, f"p = {PRIOR:g}", color=GRAY, ha="right")
    axes.set_yscale("log")
    axes.set_ylim(3e-8, 2)
    axes.set_xlabel("logit")
    axes.set_ylabel("size of the gradient")
    axes.legend(fontsize=9, loc="lower center")


@dataclass(frozen=True)
class Stages:
    """What is left of an image's scores after each step: boxes `[n, 4]`, scores, labels `[n]`.

    `pairs` is the number of scores of all anchors and classes, `above` that of those over the
    threshold; `image` is uint8, as the model sees it, without padding.
    """

    image: Tensor
    pairs: int
    above: int
    candidates: dict[str, Tensor]
    after_nms: dict[str, Tensor]
    detections: dict[str, Tensor]


@torch.no_grad()
def detect_in_stages(model: Any, image: Tensor) -> Stages:
    """Detect in uint8 `image` as the model in evaluation mode does, and keep what is in between.

    Boxes are of the resized image.
    """
    batch, _ = model.transform([image / 255])
    features = list(model.backbone(batch.tensors).values())
    outputs = model.head(features)
    sizes = tuple(tuple(feature.shape[-2:]) for feature in features)
    padded = tuple(batch.tensors.shape[-2:])
    device = torch.device("cpu")
    anchors = retinanet.make_anchors(model.anchor_generator, sizes, padded, torch.float32, device)
    scores = outputs["cls_logits"][0].sigmoid()  # [A, K]
    per_cell = len(anchors) // sum(h * w for h, w in sizes)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    above = start = 0
    for height, width in sizes:
        level = slice(start, start + height * width * per_cell)
        start = level.stop
        flat = scores[level].flatten()
        kept = (flat > model.score_thresh).nonzero()[:, 0]
        above += len(kept)
        values, order = flat[kept].topk(min(model.topk_candidates, len(kept)))
        anchor = kept[order] // scores.shape[1]
        boxes = retinanet.decode_boxes(
            outputs["bbox_regression"][0][level][anchor], anchors[level][anchor]
        )
        boxes = clip_boxes_to_image(boxes, batch.image_sizes[0])
        found.append((boxes, values, kept[order] % scores.shape[1]))
    boxes, values, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    keep = batched_nms(boxes, values, labels, model.nms_thresh)

    def pick(index: Any) -> dict[str, Tensor]:
        return {"boxes": boxes[index], "scores": values[index], "labels": labels[index]}

    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (model.transform.image_mean, model.transform.image_std)
    )
    height, width = batch.image_sizes[0]
    pixels = ((batch.tensors[0] * std + mean) * 255).round().clamp(0, 255).byte()
    return Stages(
        pixels[:, :height, :width],
        scores.numel(),
        above,
        pick(slice(None)),
        pick(keep),
        pick(keep[: model.detections_per_img]),
    )


def draw_detections(model: nn.Module, image: Tensor, names: dict[int, str]) -> Figure:
    """Draw what is left of the scores of uint8 `image` after each step of detection."""
    stages = detect_in_stages(model, image)
    figure, axes = _sheet(stages.image, 2, 3)
    scores, boxes = stages.candidates["scores"], stages.candidates["boxes"]
    heat = np.zeros(tuple(stages.image.shape[1:]))
    for (x, y, right, bottom), score in zip(boxes.int().tolist(), scores.tolist(), strict=True):
        area = heat[y:bottom, x:right]
        np.maximum(area, score, out=area)
    is_shown = stages.detections["scores"] >= 0.5
    panels = (
        (f"the image, {tuple(stages.image.shape)}\n{stages.pairs:,} scores", None, None),
        (
            f"score over {model.score_thresh}: {stages.above:,}\nbest score of a box there",
            "heat",
            None,
        ),
        (
            f"best {model.topk_candidates:,} per level,\ndecoded: {len(scores):,}",
            "",
            stages.candidates,
        ),
        (
            f"NMS per class, IoU {model.nms_thresh}:\n{len(stages.after_nms['scores']):,}",
            "",
            stages.after_nms,
        ),
        (
            f"best {model.detections_per_img}: {len(stages.detections['scores']):,}",
            "",
            stages.detections,
        ),
        (
            f"of these with a score from 0.5: {int(is_shown.sum())}",
            "text",
            {key: value[is_shown] for key, value in stages.detections.items()},
        ),
    )
    for ax, (title, kind, found) in zip(axes, panels, strict=True):
        _panel(ax, stages.image if kind in (None, "text") else stages.image // 2 + 64, title)
        if kind == "heat":
            ax.imshow(heat, cmap="viridis", vmin=0, vmax=1)
        if found is None:
            continue
        for label in found["labels"].unique().tolist():
            colour = COLOURS[label % len(COLOURS)]
            mine = found["labels"] == label
            width = 2.0 if kind == "text" else 0.8
            _outline(ax, found["boxes"][mine], edgecolor=colour, linewidth=width)
        if kind == "text":
            for box, score, label in zip(
                *(found[k] for k in ("boxes", "scores", "labels")), strict=True
            ):
                text = f"{drawing.plain(names.get(int(label), '?'))} {score:.2f}"
                x, y, *_ = box.tolist()
                side = "bottom" if y > 0.06 * stages.image.shape[1] else "top"
                ax.text(
                    x,
                    y,
                    text,
                    fontsize=8,
                    va=side,
                    bbox={"fc": "white", "ec": "none", "pad": 1},
                )
    return figure


def draw_pipeline(image: Tensor, boxes: Tensor, scene: Scene) -> Figure:
    """Draw what becomes of an image on its way to the loss, with shapes of tensors."""
    figure, axes = _sheet(scene.image, 1, 3)
    _panel(axes[0], image, f"file: uint8 {tuple(image.shape)},\n{len(boxes)} boxes")
    for number, box in enumerate(boxes):
        _outline(axes[0], box[None], edgecolor=COLOURS[number % len(COLOURS)], linewidth=2)
    _panel(axes[1], scene.image, f"resized, padded: float32\n{tuple(scene.image.shape)}")
    _outline_objects(axes[1], scene)
    assigned = scene.assign()
    foreground, _, ignored = count(assigned)
    title = f"targets: {len(assigned):,} anchors,\n{foreground:,} foreground, {ignored:,} ignored"
    _panel(axes[2], scene.image // 2 + 64, title)
    _draw_assigned(axes[2], scene, assigned, assigned)
    _outline_objects(axes[2], scene)
    return figure
