"""How pictures look: one colour per class everywhere, legible at their natural size.

The colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which people with any kind of
colour vision can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.font_manager
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#FFFFFF")
MISSED = "#000000"


def class_colours(label_map: Sequence[Mapping[str, object]]) -> dict[int, str]:
    """Return the colour of every label, by its place in the label map, repeating after eight."""
    return {int(str(c["label"])): PALETTE[i % len(PALETTE)] for i, c in enumerate(label_map)}


def draw_boxes(
    image: Tensor,
    boxes: np.ndarray,
    labels: Sequence[int],
    texts: Sequence[str],
    colours: Mapping[int, str],
    side: int = 320,
) -> Tensor:
    """Draw boxes with their texts on an image scaled to a longer side of `side` pixels.

    Args:
        image: uint8 `[3, H, W]`.
        boxes: `[n, 4]` xyxy, pixels of `image`.
        labels, texts: one each per box.

    Returns:
        uint8 `[3, h, w]`.
    """
    scale = side / max(image.shape[1:])
    size = [max(1, round(length * scale)) for length in image.shape[1:]]
    mode = "bilinear" if scale > 1 else "area"
    resized = F.interpolate(image[None].float(), size=size, mode=mode)[0].round().byte()
    if len(boxes) == 0:
        return resized
    # Large boxes first, so that small ones and their texts lie on top.
    extents = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale
    order = np.argsort(-(extents[:, 2] - extents[:, 0]) * (extents[:, 3] - extents[:, 1]))
    return draw_bounding_boxes(
        resized,
        torch.from_numpy(extents[order]),
        labels=[texts[i] for i in order],
        colors=[colours[labels[i]] for i in order],
        label_colors=["black"] * len(order),
        fill_labels=True,
        width=2,
        font=matplotlib.font_manager.findfont("DejaVu Sans"),
        font_size=11,
    )


def mosaic(tiles: Sequence[Tensor], columns: int, gap: int = 6) -> Tensor:
    """Lay uint8 tiles `[3, h, w]` of any size out on a white sheet, row by row."""
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (1, 2))
    rows = -(-len(tiles) // columns)
    sheet = torch.full(
        (3, rows * (height + gap) + gap, columns * (width + gap) + gap), 255, dtype=torch.uint8
    )
    for number, tile in enumerate(tiles):
        top = gap + number // columns * (height + gap)
        left = gap + number % columns * (width + gap)
        sheet[:, top : top + tile.shape[1], left : left + tile.shape[2]] = tile
    return sheet
