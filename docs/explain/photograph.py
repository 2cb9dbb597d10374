"""RetinaNet's anchors, assignment and box coding on a real photograph with two boxes.

The photograph is matplotlib's sample `grace_hopper.jpg`, which is in the public domain.
"""

from __future__ import annotations

import matplotlib.cbook
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from models import retinanet
from tools.plots import method

# Measured by hand, xyxy in pixels of the file (512 × 600).
BOXES = {"person": (14, 22, 512, 600), "tie": (215, 406, 302, 477)}


def photograph_scene() -> method.Scene:
    """Return the photograph as the recipe sends it to the model, with its boxes and anchors."""
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    pixels = np.array(Image.open(str(path)).convert("RGB"))
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    return method.make_scene(image, torch.tensor(list(BOXES.values())), list(BOXES))


def draw_photograph(scene: method.Scene) -> Figure:
    """Draw the nine anchors of a cell, the assignment, and the code of the tie."""
    figure, axes = method._sheet(scene.image, 1, 3)
    pale = scene.image // 2 + 64
    colours = (method.COLOURS[0], method.COLOURS[4])
    assigned = scene.assign()
    tie = scene.boxes[1]
    best_iou, best = retinanet.pairwise_iou(tie[None, None], scene.anchors)[0, 0].max(dim=0)
    first = int(best) - int(best) % 9
    level = method.LEVELS[int(scene.level_of_anchor()[best])]
    method._panel(axes[0], scene.image, f"two boxes, and the nine anchors\nof a {level} cell")
    method._outline(axes[0], scene.anchors[first : first + 9], edgecolor="white", linewidth=1.2)
    shares = [int((assigned == number).sum()) for number in range(2)]
    title = f"assigned: {shares[0]} anchors to the person,\n{shares[1]} to the tie"
    method._panel(axes[1], pale, title)
    for number, colour in enumerate(colours):
        mine = scene.anchors[assigned == number]
        method._outline(axes[1], mine, edgecolor=colour, linewidth=0.8, alpha=0.6)
        for ax in axes[:2]:
            method._outline(ax, scene.boxes[number, None], edgecolor=colour, linewidth=2.5)
    anchor = scene.anchors[best]
    code = ", ".join(f"{v:+.2f}" for v in retinanet.encode_boxes(tie, anchor).tolist())
    code = code.replace("-", "−")
    method._panel(axes[2], scene.image, f"the tie and its best anchor, IoU {best_iou:.2f}\n{code}")
    low, high = torch.minimum(tie[:2], anchor[:2]) - 20, torch.maximum(tie[2:], anchor[2:]) + 20
    middle, half = (low + high) / 2, (high - low) / 2
    height, width = scene.image.shape[1:]
    half_width = max(float(half[0]), float(half[1]) * width / height)
    half_height = half_width * height / width
    axes[2].set_xlim(float(middle[0]) - half_width, float(middle[0]) + half_width)
    axes[2].set_ylim(float(middle[1]) + half_height, float(middle[1]) - half_height)
    method._outline(axes[2], tie[None], edgecolor=colours[1], linewidth=2.5)
    method._outline(axes[2], anchor[None], edgecolor="white", linewidth=2, linestyle="--")
    centres = [((box[:2] + box[2:]) / 2).tolist() for box in (anchor, tie)]
    arrow = {"arrowstyle": "-|>", "color": "white", "linewidth": 1.6}
    axes[2].annotate("", xy=centres[1], xytext=centres[0], arrowprops=arrow)
    return figure
