"""How pictures look: one colour per class everywhere, legible at their natural size.

The colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which people with any kind of
colour vision can tell apart.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import matplotlib.font_manager
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils import printable

PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#FFFFFF")
MISSED = "#000000"
# White and yellow are for photographs; on paper they would not be seen.
_ON_WHITE = {"#FFFFFF": "#7F7F7F", "#F0E442": "#B8A800"}


def class_colours(label_map: Sequence[Mapping[str, object]]) -> dict[int, str]:
    """Return the colour of every label, by its place in the label map, repeating after eight."""
    return {int(str(c["label"])): PALETTE[i % len(PALETTE)] for i, c in enumerate(label_map)}


def on_white(colour: str) -> str:
    """Return the colour in which a class is plotted that has `colour` in photographs."""
    return _ON_WHITE.get(colour, colour)


def plain(text: str) -> str:
    """Return text from data for matplotlib, which would read what is between two $ as math."""
    return printable(text).replace("$", r"\$")


def draw_boxes(
    image: Tensor,
    boxes: np.ndarray,
    labels: Sequence[int],
    texts: Sequence[str | None],
    colours: Mapping[int, str],
    side: int = 320,
) -> Tensor:
    """Draw boxes with their texts on an image scaled to a longer side of `side` pixels.

    A text stands at a corner of its box where it hides no other; where there is no room it is left
    out, and the colour alone says the class.

    Args:
        image: uint8 `[3, H, W]`.
        boxes: `[n, 4]` xyxy, pixels of `image`.
        labels, texts: one each per box; None is no text.

    Returns:
        uint8 `[3, h, w]`.
    """
    scale = side / max(image.shape[1:])
    size = [max(1, round(length * scale)) for length in image.shape[1:]]
    mode = "bilinear" if scale > 1 else "area"
    resized = F.interpolate(image[None].float(), size=size, mode=mode)[0].round().byte()
    picture = Image.fromarray(resized.permute(1, 2, 0).numpy())
    pen, font = ImageDraw.Draw(picture), _font(11)
    extents = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale
    # Large boxes first, so that small ones lie on top.
    order = np.argsort(-(extents[:, 2] - extents[:, 0]) * (extents[:, 3] - extents[:, 1]))
    for i in order.tolist():
        x1, y1, x2, y2 = extents[i].tolist()
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colours[labels[i]], width=2)
    taken: list[tuple[float, float, float, float]] = []
    for i in reversed(order.tolist()):  # a small box has the least choice
        text = printable(texts[i] or "")
        if not text:
            continue
        width, height = pen.textlength(text, font=font) + 4, 14
        place = _free_place(extents[i].tolist(), width, height, picture.size, taken)
        if place is not None:
            taken.append(place)
            pen.rectangle(place, fill=colours[labels[i]])
            ink = "white" if colours[labels[i]] == MISSED else "black"
            pen.text((place[0] + 2, place[1]), text, fill=ink, font=font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _free_place(
    box: Sequence[float],
    width: float,
    height: float,
    size: tuple[int, int],
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float] | None:
    """Find room (xyxy) for a text at a corner of `box`, within `size` (W, H), off all `taken`."""
    x1, y1, x2, y2 = box
    for y in (y1 - height, y1, y2, y2 - height):
        for x in (x1, x2 - width):
            x = min(max(x, 0), max(0, size[0] - width - 1))
            y = min(max(y, 0), max(0, size[1] - height - 1))
            right, below = x + width, y + height
            if all(right < a or c < x or below < b or d < y for a, b, c, d in taken):
                return x, y, right, below
    return None


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(matplotlib.font_manager.findfont("DejaVu Sans"), size)


def captioned(tile: Tensor, text: str, height: int = 20) -> Tensor:
    """Put a line of text on white above a tile, uint8 `[3, h, w]`."""
    strip = Image.new("RGB", (tile.shape[2], height), "white")
    ImageDraw.Draw(strip).text((2, 2), text, fill="black", font=_font(13))
    return torch.cat([torch.from_numpy(np.array(strip)).permute(2, 0, 1), tile], dim=1)


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
