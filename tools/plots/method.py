"""Draw RetinaNet at work on one image: anchors, assignment, box coding, losses, detections.

All that is drawn or counted comes from `models.retinanet` and from the model itself.
docs/retinanet.md is made with it, and `tools.visualize` draws the same on any image with boxes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from models import retinanet
from models.retinanet import make_anchor_generator
from models.transform import BatchTransform
from tools.plots import drawing
from utils import UserError

CLASSES = 91  # that torchvision's COCO models score: labels 0 to 90
PRIOR = 0.01  # of a class at an anchor, in an untrained head: section 4.1 of the paper
LEVELS = ("P3", "P4", "P5", "P6", "P7")
GRAY = "#555555"
# A page shows a picture in about 1,000 of its own pixels, so 11.5 points are its body's 16 pixels;
# a sharp screen has two pixels for each of them.
WIDTH, DPI = 10, 200
MOST_OUTLINED = 600  # anchors in a panel of assignment: more hide the image
MOST_DRAWN = 50  # boxes in a panel of detections
COLOURS = tuple(colour for colour in drawing.PALETTE if colour != "#FFFFFF")


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
    image: Tensor,
    boxes: Tensor,
    names: Sequence[str],
    min_size: int = 800,
    max_size: int = 1333,
    generator: AnchorGenerator | None = None,
) -> Scene:
    """Resize and pad uint8 `image` with its boxes as the model does, and make all anchors.

    Args:
        boxes, names: `[M, 4]` xyxy in pixels of `image`, and their classes.
        generator: of the anchors; RetinaNet's own by default.
    """
    transform = BatchTransform(GeneralizedRCNNTransform(min_size, max_size, [0.0] * 3, [1.0] * 3))
    order = sorted(set(names))
    labels = torch.tensor([order.index(name) + 1 for name in names], dtype=torch.int64)
    target = {"boxes": boxes.float().reshape(-1, 4), "labels": labels}
    batch, targets = transform.eval()([image / 255], [target])
    assert targets is not None
    pixels = (batch.tensors[0] * 255).round().byte()
    height, width = pixels.shape[1:]
    sizes = [(math.ceil(height / 8), math.ceil(width / 8))]
    while len(sizes) < len(LEVELS):  # every level halves the one before, rounded up
        sizes.append((math.ceil(sizes[-1][0] / 2), math.ceil(sizes[-1][1] / 2)))
    anchors = retinanet.make_anchors(
        generator or make_anchor_generator(),
        tuple(sizes),
        (height, width),
        torch.float32,
        torch.device("cpu"),
    )
    return Scene(pixels, targets[0]["boxes"], names, labels, tuple(sizes), anchors)


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


def coding_example(scene: Scene) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return a box, one of its anchors, the code between them `[4]` each, and their IoU.

    The box is the largest that has an anchor. Of its anchors it is the one that differs from the
    box in all four numbers.
    """
    assigned = scene.assign()
    sides = scene.boxes[:, 2:] - scene.boxes[:, :2]
    has_anchor = torch.bincount(assigned[assigned >= 0], minlength=len(sides)) > 0
    if not has_anchor.any():
        raise UserError("the image has no box, so there is none to encode")
    number = int((sides.prod(dim=1) * has_anchor).argmax())
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
    for y in (top - 16 * unit, bottom + 3 * unit):
        is_free = all(abs(left - a) > 50 * unit or abs(y - b) > 15 * unit for a, b in taken)
        if is_free and 0 <= y <= scene.image.shape[1] - 14 * unit:
            taken.append((left, y))
            style = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
            axes.text(left, y, text, fontsize=8, va="top", bbox=style)
            return


def _disputed(scene: Scene, ours: Tensor, other: Tensor) -> Tensor:
    """Return a window, xyxy, around a place where two assignments differ.

    It holds the smallest box whose anchors differ, and the boxes like it that overlap it.
    """
    differ = ours != other
    numbers = torch.cat([ours[differ], other[differ]]).unique()
    disputed = scene.boxes[numbers[numbers >= 0]]
    smallest = disputed[(disputed[:, 2:] - disputed[:, :2]).prod(dim=1).argmin()]
    group = disputed[box_iou(smallest[None], disputed)[0] > 0]
    low, high = group[:, :2].amin(dim=0), group[:, 2:].amax(dim=0)
    half = max(0.75 * float((high - low).max()), 36.0)
    centre = (low + high) / 2
    return torch.cat([centre - half, centre + half])


def draw_assignment(scene: Scene) -> Figure:
    """Draw which anchors belong to which box after each rule, and where the assigners differ."""
    if not len(scene.boxes):
        raise UserError("the image has no box, so all its anchors are background")
    ours, other = (scene.assign(assigner=name) for name in retinanet.ASSIGNERS)
    changed = int((ours != other).sum())
    figure, axes = _sheet(scene.image, 3 if changed else 2, 2)
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
    if _is_dense(ours):
        text = "dots: centres of anchors, black where they are ignored"
        figure.supxlabel(text, fontsize=9, x=0.01, ha="left")
    if not changed:
        return figure
    window = _disputed(scene, ours, other)
    inside = (scene.boxes[:, :2] >= window[:2]).all(1) & (scene.boxes[:, 2:] <= window[2:]).all(1)
    for ax, name, assigned in zip(axes[4:], retinanet.ASSIGNERS, (ours, other), strict=True):
        shares = [int((assigned == number).sum()) for number in inside.nonzero()[:, 0]]
        text = f"--assigner {name}, close up" + f": {changed} anchors differ" * (ax is axes[5])
        text += f"\nanchors of the boxes here: {', '.join(map(str, shares))}"
        _panel(ax, scene.image // 2 + 64, text)
        _draw_window(ax, scene, assigned, window)
    return figure


def _draw_assigned(axes: Any, scene: Scene, assigned: Tensor, before: Tensor) -> None:
    """Outline ignored anchors in black, a box's in its colour, thick where they are new to it.

    Where these are many, dots at their centres stand for all but the new ones.
    """
    is_dense = _is_dense(assigned)
    ignored = scene.anchors[assigned == retinanet.IGNORED]
    if is_dense:
        _draw_centres(axes, ignored, color="black", s=3, alpha=0.5)
    else:
        _outline(axes, ignored, edgecolor="black", linewidth=0.4, alpha=0.3)
    for number in range(len(scene.boxes)):
        colour = COLOURS[number % len(COLOURS)]
        mine = assigned == number
        if is_dense:
            _draw_centres(axes, scene.anchors[mine], color=colour, s=14, ec="black", lw=0.4)
        else:
            _outline(axes, scene.anchors[mine], edgecolor=colour, linewidth=0.6, alpha=0.5)
        new = scene.anchors[mine & (before != number)]
        _outline(axes, new, edgecolor=colour, linewidth=1.8)


def _is_dense(assigned: Tensor) -> bool:
    return int((assigned != retinanet.BACKGROUND).sum()) > MOST_OUTLINED


def _draw_centres(axes: Any, boxes: Tensor, **style: Any) -> None:
    """Draw a dot at the centre of each box `[n, 4]` xyxy."""
    x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).T.numpy()
    axes.scatter(x, y, **style)


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
        # Several boxes' anchors may have one centre: those of later boxes are drawn smaller.
        size = max(70 - 8 * number, 14)
        _draw_centres(axes, mine, s=size, color=colour, ec="black", zorder=3)
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
    heights = np.arange(len(rows))
    for side, (name, shade) in enumerate((("foreground", COLOURS[0]), ("background", COLOURS[4]))):
        offset = 0.2 - 0.4 * side
        # Of a foreground anchor only one class is foreground; its other classes are background.
        values = np.array([pair[side] for _, pair in rows])
        bars.barh(heights - offset, values, 0.38, color=shade, label=f"{name} terms")
        for height, value in zip(heights - offset, values, strict=True):
            number = f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"
            bars.text(value * 1.2, height, number, va="center")
    bars.set_xscale("log")
    bars.set_xlim(0.005, 30 * max(max(pair) for _, pair in rows))
    bars.set_yticks(heights, [label for label, _ in rows])
    bars.invert_yaxis()
    bars.set_xlabel("first loss of this image, per foreground anchor")
    bars.legend(loc="lower right")
    return figure


def _draw_gradients(axes: Any) -> None:
    """Plot the gradient of both losses by the logit, for an absent class and for a present one.

    The focal loss has its α here, as in training.
    """
    logits = torch.linspace(-8, 8, 200, dtype=torch.float64, requires_grad=True)
    both = torch.stack([logits, logits])[:, :, None]  # [2, 200, 1]: absent, present
    is_there = torch.tensor([[False], [True]]).expand(2, 200)
    losses = retinanet.focal_loss(both, torch.zeros(2, 200, dtype=torch.int64), is_there)
    p = logits.detach().sigmoid()
    for name, loss, entropy, colour in (
        ("absent class", losses[0], p, COLOURS[4]),
        ("present class", losses[1], 1 - p, COLOURS[0]),
    ):
        (slope,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
        style = {"color": colour, "linewidth": 1.3}
        axes.plot(logits.detach(), entropy, linestyle="--", label=f"{name}, cross entropy", **style)
        axes.plot(logits.detach(), slope.abs(), label=f"{name}, focal loss", **style)
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
    decoded: list[tuple[Tensor, Tensor, Tensor]] = []
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
        decoded.append((boxes, values, kept[order] % scores.shape[1]))
    boxes, values, labels = (torch.cat(parts) for parts in zip(*decoded, strict=True))
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


def draw_detections(
    model: nn.Module, image: Tensor, label_map: Sequence[Mapping[str, Any]]
) -> Figure:
    """Draw what is left of the scores of uint8 `image` after each step of detection."""
    stages = detect_in_stages(model, image)
    colours, names = drawing.class_colours(label_map), drawing.class_names(label_map)
    figure, axes = _sheet(stages.image, 2, 3)
    scores, boxes = stages.candidates["scores"], stages.candidates["boxes"]
    heat = np.zeros(tuple(stages.image.shape[1:]))
    for (x, y, right, bottom), score in zip(boxes.int().tolist(), scores.tolist(), strict=True):
        area = heat[y:bottom, x:right]
        np.maximum(area, score, out=area)
    is_shown = stages.detections["scores"] >= 0.5
    shown = {key: value[is_shown] for key, value in stages.detections.items()}
    _panel(
        axes[0], stages.image, f"the image, {tuple(stages.image.shape)}\n{stages.pairs:,} scores"
    )
    title = f"score over {model.score_thresh}: {stages.above:,}\nbest score of a box there"
    _panel(axes[1], stages.image, title)
    axes[1].imshow(heat, cmap="viridis", vmin=0, vmax=1)
    panels = (
        (f"best {model.topk_candidates:,} per level, decoded", stages.candidates),
        (f"NMS per class, IoU {model.nms_thresh}", stages.after_nms),
        (f"best {model.detections_per_img}", stages.detections),
    )
    for ax, (title, left) in zip(axes[2:], panels, strict=False):
        total = len(left["scores"])
        drawn = f", the best {MOST_DRAWN} drawn" if total > MOST_DRAWN else ""
        _panel(ax, stages.image // 2 + 64, f"{title}:\n{total:,}{drawn}")
        best = left["scores"].argsort(descending=True)[:MOST_DRAWN]
        _outline_classes(ax, {key: value[best] for key, value in left.items()}, colours, 1.2)
    _panel(axes[5], stages.image, f"of these with a score from 0.5:\n{len(shown['scores'])}")
    _outline_classes(axes[5], shown, colours, 2)
    for box, score, label in zip(*(shown[k] for k in ("boxes", "scores", "labels")), strict=True):
        text = f"{drawing.plain(names.get(int(label), '?'))} {score:.2f}"
        x, y, *_ = box.tolist()
        side = "bottom" if y > 0.06 * stages.image.shape[1] else "top"
        style = {"fc": "white", "ec": "none", "pad": 1}
        axes[5].text(x, y, text, fontsize=8, va=side, bbox=style)
    return figure


def _outline_classes(
    axes: Any, detections: Mapping[str, Tensor], colours: Mapping[int, str], width: float
) -> None:
    for label in detections["labels"].unique().tolist():
        mine = detections["boxes"][detections["labels"] == label]
        # The 91 labels of COCO have gaps, which a model may predict.
        _outline(axes, mine, edgecolor=colours.get(label, GRAY), linewidth=width)


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
