"""How pictures look: one colour per class in all of them, captions that name files, fonts.

The first eight colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which people with
any kind of colour vision can tell apart.
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.io import encode_jpeg

from coco_utils import CocoDetection
from data.coco_arrays import Annotations
from utils import UserError, file_errors, make_folder, printable

matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})

PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#FFFFFF")
MISSED = "#000000"
# White and yellow are for photographs; on paper they would not be seen.
_ON_WHITE = {"#FFFFFF": "#7F7F7F", "#F0E442": "#B8A800"}
COLUMN = 400  # width of an image on a sheet, pixels
GAP = 6
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Tile:
    """An image of a sheet: uint8 `[3, H, W]`, boxes `[n, 4]` xyxy with a label and a text each.

    A text that is None is not drawn. Each line of `caption` is drawn below the image.
    """

    image: Tensor
    boxes: np.ndarray
    labels: Sequence[int]
    texts: Sequence[str | None]
    caption: Sequence[str] = ()


def image_caption(annotations: Annotations, number: int) -> str:
    """Return the file name and the id of image number `number`."""
    return f"{annotations.file_name(number)}, id {annotations.image_ids[number]}"


def annotated_tile(data: CocoDetection, index: int) -> Tile:
    """Return an image of `data` with its boxes, the names of their classes, and its file.

    Raises:
        ImageError: if the image cannot be read.
    """
    image, target = data[0, index]
    names, labels = class_names(data.label_map), target["labels"].tolist()
    caption = image_caption(data.annotations, int(data.keep[index]))
    texts = [names[label] for label in labels]
    return Tile(image, target["boxes"].numpy(), labels, texts, [caption])


def class_colours(label_map: Sequence[Mapping[str, object]]) -> dict[int, str]:
    """Return the colour of every label, by its position in the label map."""
    return {int(str(c["label"])): _colour(i) for i, c in enumerate(label_map)}


def class_names(label_map: Sequence[Mapping[str, object]]) -> dict[int, str]:
    """Return the class name of every label."""
    return {int(str(c["label"])): str(c["name"]) for c in label_map}


def _colour(number: int) -> str:
    if number < len(PALETTE):
        return PALETTE[number]
    hue = number * 0.618034 % 1  # the golden ratio keeps neighbours apart
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.95, 0.55)[number % 2], (0.9, 0.7)[number % 2])
    return f"#{round(red * 255):02X}{round(green * 255):02X}{round(blue * 255):02X}"


def on_white(colour: str) -> str:
    """Return the colour in which a class is plotted that has `colour` in photographs."""
    return _ON_WHITE.get(colour, colour)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure; width and height in hundreds of pixels."""
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Save a figure, as the kind of picture that its name ends in; create its folder.

    Raises:
        UserError: if the name has another end, or the file cannot be written.
    """
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".svg", ".pdf"):
        raise UserError(f"cannot draw {path}: end its name in .png, .jpg, .svg or .pdf")
    make_folder(path.parent)
    with file_errors("write", path):
        figure.savefig(path)


def write_picture(picture: Tensor, path: Path) -> None:
    """Write uint8 `[3, H, W]` as JPEG.

    Raises:
        UserError: if the file cannot be written.
    """
    make_folder(path.parent)
    with file_errors("write", path):
        path.write_bytes(encode_jpeg(picture, quality=90).numpy().tobytes())


# --- text -----------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Return text from data for matplotlib, which reads what is between two $ as mathematics."""
    text, font = _drawable(text)
    families = matplotlib.rcParams["font.family"]
    if font != _default_font() and (name := FT2Font(font).family_name) not in families:
        matplotlib.rcParams["font.family"] = [*families, name]
    return text.replace("$", r"\$")


def shorten(text: str, length: int) -> str:
    """Return text of at most `length` characters; the middle is left out."""
    head = (length - 1) // 2
    return text if len(text) <= length else f"{text[:head]}…{text[len(text) - length + head + 1 :]}"


@functools.cache
def _drawable(text: str) -> tuple[str, str]:
    """Return what can be drawn of `text`, and the file of a font that has all its characters.

    Characters that no font on this machine has are escaped, and so are control characters.
    """
    text = printable(text)
    missing = set(map(ord, text)) - _characters(_default_font())
    if missing:
        for font in sorted({entry.fname for entry in fontManager.ttflist}):
            if set(map(ord, text)) <= _characters(font):
                return text, font
    escaped = (ascii(c)[1:-1] if ord(c) in missing else c for c in text)
    return "".join(escaped), _default_font()


@functools.cache
def _characters(font: str) -> frozenset[int]:
    try:
        ImageFont.truetype(font, 12)  # fails for fonts of bitmaps
        return frozenset(FT2Font(font).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@functools.cache
def _default_font() -> str:
    return findfont("DejaVu Sans")


@functools.cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _write(
    pen: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, size: int, ink: str
) -> None:
    text, font = _drawable(text)
    pen.text(corner, text, fill=ink, font=_font(font, size))


def _width(text: str, size: int) -> float:
    text, font = _drawable(text)
    return _font(font, size).getlength(text)


def _ink(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 90 else "white"


# --- images ---------------------------------------------------------------------------------------


def draw_boxes(tile: Tile, colours: Mapping[int, str], side: float = COLUMN) -> Tensor:
    """Draw the boxes and texts of a tile on its image, scaled to a longer side of `side` pixels.

    A text stands at a corner of its box where it hides no other text. Where there is no room it is
    left out, and only the colour shows the class.

    Returns:
        uint8 `[3, h, w]`.
    """
    scale = side / max(tile.image.shape[1:])
    size = [max(1, round(length * scale)) for length in tile.image.shape[1:]]
    mode = "bilinear" if scale > 1 else "area"
    resized = F.interpolate(tile.image[None].float(), size=size, mode=mode)[0].round().byte()
    picture = Image.fromarray(resized.permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(picture)
    letters = max(12, round(side / 64))  # height, pixels
    extents = np.asarray(tile.boxes, dtype=np.float64).reshape(-1, 4) * scale
    # Large boxes first, so that small ones lie on top.
    order = np.argsort(-(extents[:, 2] - extents[:, 0]) * (extents[:, 3] - extents[:, 1]))
    for i in order.tolist():
        x1, y1, x2, y2 = extents[i].tolist()
        corners = (x1, y1, max(x1, x2), max(y1, y2))
        pen.rectangle(corners, outline=colours[tile.labels[i]], width=max(2, letters // 6))
    taken: list[Box] = []
    for i in reversed(order.tolist()):  # a small box has the least choice
        text = tile.texts[i]
        if not text:
            continue
        room = _free_room(
            extents[i].tolist(), _width(text, letters) + 4, letters + 3, picture.size, taken
        )
        if room is not None:
            taken.append(room)
            pen.rectangle(room, fill=colours[tile.labels[i]])
            _write(pen, (room[0] + 2, room[1]), text, letters, _ink(colours[tile.labels[i]]))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _free_room(
    box: Sequence[float], width: float, height: float, size: tuple[int, int], taken: Sequence[Box]
) -> Box | None:
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


def draw_sheet(
    tiles: Sequence[Tile], colours: Mapping[int, str], columns: int, column: int = COLUMN
) -> Tensor:
    """Draw tiles in rows of `columns` on white; the images of a row share one height.

    Args:
        column: width of a tile if all images of a row have the same shape, pixels.

    Returns:
        uint8 `[3, H, W]`.
    """
    rows = [
        _draw_row(tiles[i : i + columns], colours, columns, column)
        for i in range(0, len(tiles), columns)
    ]
    height = sum(row.shape[1] + GAP for row in rows) + GAP
    sheet = torch.full((3, height, columns * (column + GAP) + GAP), 255, dtype=torch.uint8)
    top = GAP
    for row in rows:
        sheet[:, top : top + row.shape[1], GAP : GAP + row.shape[2]] = row
        top += row.shape[1] + GAP
    return sheet


def _draw_row(
    tiles: Sequence[Tile], colours: Mapping[int, str], columns: int, column: int
) -> Tensor:
    shapes = [tile.image.shape[2] / tile.image.shape[1] for tile in tiles]  # width / height
    whole = sum(shapes) * columns / len(tiles)  # as if a last row had all its columns
    height = min(columns * column / whole, 2 * column)
    drawn = []
    for tile, shape in zip(tiles, shapes, strict=True):
        picture = draw_boxes(tile, colours, height * max(shape, 1))
        caption = _draw_caption(tile.caption, picture.shape[2])
        drawn.append(torch.cat([picture, caption], dim=1))
    tall = max(picture.shape[1] for picture in drawn)
    wide = sum(picture.shape[2] + GAP for picture in drawn) - GAP
    row = torch.full((3, tall, min(wide, columns * (column + GAP) - GAP)), 255, dtype=torch.uint8)
    left = 0
    for picture in drawn:
        part = picture[:, :, : row.shape[2] - left]  # rounding may add a pixel
        row[:, : part.shape[1], left : left + part.shape[2]] = part
        left += picture.shape[2] + GAP
    return row


def _draw_caption(lines: Sequence[str], width: int, letters: int = 13) -> Tensor:
    strip = Image.new("RGB", (width, len(lines) * (letters + 4)), "white")
    pen = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        length = len(line)
        while length > 3 and _width(shorten(line, length), letters) > width - 4:
            length -= 1
        _write(pen, (2, number * (letters + 4)), shorten(line, length), letters, "black")
    pixels = np.array(strip).reshape(strip.height, width, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)
