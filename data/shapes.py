"""The embedded data set behind ``--dataset shapes``: a small COCO data set drawn from a seed.

Textured backgrounds with overlapping circles, squares and triangles, images without objects and
crowds, in several aspect ratios. Each image is first drawn as a map that says which object every
sub-pixel shows; its pixels, boxes, areas and outlines all come from that map, so they agree.
"""

import colorsys
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data import cache as data_cache

FORMAT = 3  # part of the folder's name: raise it with any change to what is drawn
CATEGORIES = {"circle": 1, "square": 3, "triangle": 7}  # gaps, so that label mapping is exercised

_SCALE = 4  # sub-pixels per pixel side: edges blend in 17 levels, boxes are exact to 0.25 px
_ASPECTS = ((1, 1), (1, 0.75), (0.75, 1), (1, 0.5), (0.5, 1))  # width, height
_SHARES = (0.3, 0.3, 0.3, 0.05, 0.05)  # few narrow images: their objects are small
_CORNERS = {"circle": 64, "square": 4, "triangle": 3}  # 64 corners stay within 0.1 px of a circle
_MIN_SIDE = 20  # px: RetinaNet's smallest anchors are 32 px wide, and training is to be short
_MIN_VISIBLE = 0.6  # of an object's area: what hides more of one, or shows less, is not placed


def make_shapes(
    root: str | Path, num_train: int = 512, num_val: int = 64, size: int = 128, seed: int = 0
) -> Path:
    """Draw the data set below `root` unless a complete one exists; return its folder.

    The folder holds ``train2017/``, ``val2017/`` and ``annotations/instances_{split}2017.json``.
    Its longest image side is `size` pixels. Boxes (xywh, absolute pixels, in steps of 0.25) and
    areas are those of an object's visible part. The same arguments draw the same files, and
    image i of a split looks the same whatever the number of images. Any number of processes may
    call this at once: one draws, the others wait for it. A damaged set is drawn again.

    Raises:
        ValueError: an argument is out of range.
    """
    for name, value, least in (
        ("num_train", num_train, 1),
        ("num_val", num_val, 1),
        ("size", size, 64),  # px: below, objects in a 2:1 image would be a few pixels wide
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"make_shapes: {name} must be at least {least}, got {value}")
    folder = Path(root) / f"shapes-v{FORMAT}-{num_train}-{num_val}-{size}-{seed}"

    def build(target: Path) -> None:
        (target / "annotations").mkdir()
        _write_split(target, "train", num_train, size, seed)
        _write_split(target, "val", num_val, size, seed)

    data_cache.built_once(folder, folder.name, build)
    return folder


def _write_split(folder: Path, split: str, num_images: int, size: int, seed: int) -> None:
    """Draw one split's JPEG files and write its COCO JSON."""
    (folder / f"{split}2017").mkdir()
    images, annotations = [], []
    for i in range(num_images):
        rng = np.random.default_rng(np.random.SeedSequence([seed, split == "val", i]))
        width, height = (round(size * side) for side in rng.choice(_ASPECTS, p=_SHARES))
        # Fixed places give 3 % crowds and 5 % empty images to every data set, however small.
        crowd, empty = i % 32 == 3, i % 20 == 5
        owners, names = _place_objects(rng, width, height, crowd, empty)
        shown = np.asarray(owners)
        image_id = i + (1 if split == "train" else 1_000_001)  # unique over both splits, as in COCO
        file_name = f"{image_id:012d}.jpg"
        picture = _paint(rng, owners, len(names))
        # Full colour resolution: halved, it would smear the edges that boxes are measured by.
        picture.save(folder / f"{split}2017" / file_name, quality=90, subsampling=0)
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for k, name in enumerate(names):
            annotation = _annotate(shown == k + 1, iscrowd=crowd and k == 0)
            ids = {"id": image_id * 10 + k, "image_id": image_id, "category_id": CATEGORIES[name]}
            annotations.append(ids | annotation)

    categories = [{"id": i, "name": n, "supercategory": "shape"} for n, i in CATEGORIES.items()]
    info = {"description": f"Drawn by shapes.py from seed {seed}", "version": str(FORMAT)}
    data = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    path = folder / "annotations" / f"instances_{split}2017.json"
    path.write_text(json.dumps(data), encoding="utf-8")


def _place_objects(
    rng: np.random.Generator, width: int, height: int, crowd: bool, empty: bool
) -> tuple[Image.Image, list[str]]:
    """Choose an image's objects; later ones lie over earlier ones.

    Returns the number of the object that each sub-pixel shows (8 bits, 4 * width x 4 * height, 0
    is background) and the class names of objects 1, 2, ... A crowd is one object, the first.
    """
    owners = Image.new("L", (width * _SCALE, height * _SCALE))
    names: list[str] = []
    areas: list[float] = []  # whole objects, also what is hidden or outside, in sub-pixels
    short = min(width, height)
    smallest, largest = max(min(_MIN_SIDE, 0.4 * short), 0.12 * short), 0.6 * short

    num_objects = 0 if empty else 1 + int(rng.binomial(4, 0.65))  # 1 ... 5
    for attempt in range(8 * num_objects):  # a full image refuses most; then fewer have to do
        if len(names) == num_objects:
            break
        name = str(rng.choice(list(CATEGORIES)))
        if crowd and attempt == 0:
            outlines = _crowd_outlines(rng, name, width, height)
        else:
            side = rng.triangular(smallest, 0.45 * short, largest)
            inset = 0.4 * side  # near the edge a little may be cut off
            centre = rng.uniform(inset, [width - inset, height - inset])
            outlines = [_outline(rng, name, centre, side)]
        trial, trial_areas = owners.copy(), [*areas, sum(map(_polygon_area, outlines))]
        draw = ImageDraw.Draw(trial)
        for outline in outlines:
            draw.polygon([tuple(corner) for corner in outline], fill=len(names) + 1)
        visible = trial.histogram()[1 : len(trial_areas) + 1]
        if all(v >= _MIN_VISIBLE * a for v, a in zip(visible, trial_areas, strict=True)):
            owners, areas = trial, trial_areas
            names.append(name)
    return owners, names


def _outline(rng: np.random.Generator, name: str, centre: np.ndarray, side: float) -> np.ndarray:
    """Corners (x, y) [N, 2] in sub-pixels; `centre` and `side` (a circle's diameter) in pixels."""
    corners = _CORNERS[name]
    radius = side / 2 if name == "circle" else side / 2 / math.sin(math.pi / corners)
    upright = math.pi / 2 - math.pi / corners  # puts one edge at the bottom
    turn = upright + rng.uniform(-0.2, 0.2)  # up to 11 degrees
    angles = turn + 2 * math.pi * np.arange(corners) / corners
    offsets = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return (centre + offsets) * _SCALE - 0.5  # PIL counts from pixel centres, COCO from corners


def _crowd_outlines(
    rng: np.random.Generator, name: str, width: int, height: int
) -> list[np.ndarray]:
    """Outline a dense cluster of tiny shapes of one class, 8 px apart."""
    most = np.minimum([width // 8, height // 8], 5)
    columns, rows = (int(n) for n in rng.integers(3, most, endpoint=True))
    corner = rng.uniform(0, [width - 8 * columns, height - 8 * rows])
    cells = [corner + 8 * np.array([x + 0.5, y + 0.5]) for y in range(rows) for x in range(columns)]
    return [_outline(rng, name, c + rng.uniform(-1, 1, 2), rng.uniform(5, 7)) for c in cells]


def _polygon_area(corners: np.ndarray) -> float:
    x, y = corners.T
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


def _annotate(mask: np.ndarray, iscrowd: bool) -> dict[str, object]:
    """Describe what a sub-pixel mask (bool [4 * H, 4 * W]) shows, in COCO's fields."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return {
        "bbox": [int(v) / _SCALE for v in (left, top, right - left, bottom - top)],
        "area": int(mask.sum()) / _SCALE**2,
        "iscrowd": int(iscrowd),
        "segmentation": _run_lengths(mask) if iscrowd else _polygons(mask),
    }


def _run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """Encode a sub-pixel mask at pixel resolution in COCO's uncompressed RLE (column by column)."""
    pixels = mask[_SCALE // 2 :: _SCALE, _SCALE // 2 :: _SCALE]
    changes = np.flatnonzero(np.diff(pixels.T.reshape(-1), prepend=False))
    counts = np.diff(changes, prepend=0, append=pixels.size)
    return {"counts": counts.tolist(), "size": list(pixels.shape)}


def _polygons(mask: np.ndarray) -> list[list[float]]:
    """Outline a sub-pixel mask with polygons [x0, y0, x1, y1, ...] in pixels.

    One row of sub-pixels per pixel is looked at. Its runs prolong the polygons above them; where
    an occluder splits, joins or ends runs, new polygons start, so that no polygon has a hole.
    """
    rows = np.flatnonzero(mask.any(axis=1))
    end = int(rows[-1]) + 1
    polygons: list[list[tuple[float, float, float]]] = []  # of rows (y, left, right)
    growing: list[list[tuple[float, float, float]]] = []
    looked_at = [*range(int(rows[0]), end - 1, _SCALE), end - 1, end]
    below = np.pad(mask, ((0, 1), (0, 0)))  # a last row without runs ends all polygons
    edges = np.diff(below[looked_at], axis=1, prepend=False, append=False)
    for y, row in zip(looked_at, edges, strict=True):
        runs = np.flatnonzero(row).reshape(-1, 2).tolist()
        if len(runs) != len(growing) or any(
            a >= polygon[-1][2] or b <= polygon[-1][1]
            for polygon, (a, b) in zip(growing, runs, strict=True)
        ):
            for polygon in growing:
                polygon.append((y, *polygon[-1][1:]))
            growing = [[] for _ in runs]
            polygons += growing
        for polygon, (a, b) in zip(growing, runs, strict=True):
            polygon.append((y, a, b))
    return [  # down the left side, up the right side
        [v / _SCALE for y, a, _ in polygon for v in (a, y)]
        + [v / _SCALE for y, _, b in reversed(polygon) for v in (b, y)]
        for polygon in polygons
    ]


def _paint(rng: np.random.Generator, owners: Image.Image, num_objects: int) -> Image.Image:
    """Colour a map of sub-pixels, with anti-aliased edges: saturated objects, muted background."""
    width, height = owners.width // _SCALE, owners.height // _SCALE
    palette = [0, 0, 0]  # background: black, as it is added below
    first_hue = rng.uniform()
    for k in range(num_objects):
        # Steps of the golden ratio keep the hues of any few neighbours far apart.
        hue = (first_hue + k * 0.618034) % 1
        rgb = colorsys.hsv_to_rgb(hue, rng.uniform(0.65, 0.85), rng.uniform(0.8, 1))
        palette += [round(255 * v) for v in rgb]
    covered = owners.point([0] + [255] * 255)
    opacity = np.asarray(covered.reduce(_SCALE), np.float32)[..., None] / 255
    coloured = owners.copy()
    coloured.putpalette(palette)
    objects = np.asarray(coloured.convert("RGB").reduce(_SCALE), np.float32)
    shading = 0.8 + 0.2 * _smooth_noise(rng, width, height, cells=3)[..., None]
    pixels = objects * shading + (1 - opacity) * _background(rng, width, height)
    pixels += rng.normal(0, 3, (height, width, 1))  # grain, alike in all channels
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Mix two muted colours by a pattern: float [height, width, 3] in 0 ... 255."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, period = rng.uniform(0, math.pi), rng.uniform(8, 32)
    along, across = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
    u, v = (2 * math.pi / period * (x * dx + y * dy) for dx, dy in (along, across))
    pattern = {
        "noise": lambda: _smooth_noise(rng, width, height, cells=10),
        "gradient": lambda: (u - u.min()) / np.ptp(u),
        "stripes": lambda: 0.5 + 0.5 * np.sin(u),
        "checks": lambda: 0.5 + 0.5 * np.sin(u) * np.sin(v),
    }[str(rng.choice(["noise", "gradient", "stripes", "checks"]))]()
    pattern = 0.7 * pattern + 0.3 * _smooth_noise(rng, width, height, cells=5)
    levels = rng.uniform([70, 100], [110, 170])[:, None]  # dark and light
    colours = levels * (1 + rng.uniform(-0.22, 0.22, (2, 3)))
    return colours[0] + pattern[..., None] * (colours[1] - colours[0])


def _smooth_noise(rng: np.random.Generator, width: int, height: int, cells: int) -> np.ndarray:
    """Interpolate `cells` x `cells` random values: float32 [height, width], about 0 ... 1."""
    coarse = Image.fromarray(rng.uniform(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
