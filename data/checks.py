"""Rules on what the lists of a COCO file say, on its boxes, and on two splits together.

`check` applies all rules that need no image and packs the lists; `locate` knows the image files.
"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.coco_arrays import MIN_SIDE, Annotations, clip, has_extent, pack_names, to_xyxy
from data.coco_rules import MAX_PIXELS, Finding, finding, is_unsafe_name, require_no_errors

MISSING = -(2**62)  # stands for a missing iscrowd, or a missing annotation id
FEW_BOXES = 4  # statistics of boxes are conclusive from so many on

Columns = dict[str, np.ndarray]  # a list of the file: an array per field


def check(
    path: Path, images: Columns, annotations: Columns, categories: Columns
) -> tuple[Annotations, list[Finding]]:
    """Apply the rules on the lists of a file, and pack them.

    Annotations whose image or category does not exist are left out of the arrays.
    """
    findings = _drop_doubles(annotations, categories) + _number_annotations(annotations)
    by_id = np.argsort(categories["id"], kind="stable")
    categories = {field: column[by_id] for field, column in categories.items()}
    annotations["image"] = _positions(images["id"], annotations["image_id"])
    annotations["category"] = _positions(categories["id"], annotations["category_id"])
    findings += _check_lists(images, annotations, categories)
    packed = _pack(path, images, annotations, categories)
    if (packed.sizes != 0).all():  # otherwise `locate.locate_images` finds the sizes first
        findings += check_boxes(packed)
    return packed, findings


def _drop_doubles(annotations: Columns, categories: Columns) -> list[Finding]:
    """Leave out categories without boxes that have the name of another, as Roboflow writes them.

    Where no category of a name has boxes, the one with the highest id stays.
    """
    ids, names = categories["id"], categories["name"]
    is_used = np.isin(ids, annotations["category_id"])
    order = np.lexsort((ids, is_used))
    best = list(dict(zip(names[order], order, strict=True)).values())  # the last of each name
    is_double = ~is_used & ~np.isin(ids, _repeated(ids))  # two of one id are an error that stays
    is_double[best] = False
    findings = finding(
        "unused categories with the name of another", is_double, _show(categories, "name")
    )
    categories.update({field: column[~is_double] for field, column in categories.items()})
    return findings


def _number_annotations(annotations: Columns) -> list[Finding]:
    """Number annotations by position where ids are missing or are unique within images only.

    No id is used elsewhere. An id twice in one image may be a box twice, and is an error.
    """
    ids, images = annotations["id"], annotations["image_id"]
    is_unclear = np.isin(ids, np.append(_repeated(ids), MISSING))
    if not is_unclear.any():
        return []
    order = np.lexsort((ids, images))
    is_same = (np.diff(ids[order]) == 0) & (np.diff(images[order]) == 0)
    twice = np.setdiff1d(ids[order][1:][is_same], MISSING)
    if len(twice):
        return finding("annotation ids that occur twice", twice)
    annotations["id"] = np.arange(1, len(ids) + 1)
    return finding(
        "annotations without an id of their own", annotations["id"][is_unclear], "number {}".format
    )


def _show(columns: Columns, *fields: str) -> Callable[[int], str]:
    """Return what prints a row: its id, and `fields` of it."""

    def show(row: int) -> str:
        values = [f"{field} {columns[field].item(row)!r}" for field in fields]
        return f"{columns['id'][row]} ({', '.join(values)})"

    return show


def _check_lists(images: Columns, annotations: Columns, categories: Columns) -> list[Finding]:
    names, classes = images["file_name"], categories["name"]
    width, height = images["width"], images["height"]
    is_large = width.astype(np.float64) * height > MAX_PIXELS
    is_unsafe = [number for number, name in enumerate(names) if is_unsafe_name(name)]
    is_nameless = np.array([not name.strip() for name in classes], bool)
    spellings: dict[str, set[str]] = {}
    for name in classes:
        spellings.setdefault(" ".join(name.lower().split()), set()).add(name)
    groups = [sorted(names) for names in spellings.values() if len(names) > 1]
    alike = [" and ".join(map(repr, names)) for names in groups]
    background = [name for name in classes if name.strip("_ ").lower() == "background"]
    is_unused = ~np.isin(categories["id"], annotations["category_id"])
    is_unused &= len(annotations["id"]) > 0  # otherwise that is what is wrong
    ids, crowd, is_lost = annotations["id"], annotations["iscrowd"], annotations["image"] < 0
    is_wrong = ~np.isin(crowd, (0, 1, MISSING))
    is_unknown = annotations["category"] < 0
    unknown = "annotations of an unknown image_id"
    if len(names) and is_lost.all():
        unknown = "annotations that all are of an unknown image_id"
    shifts = _find_shift("image_id", annotations["image_id"], "images", images["id"])
    if shifts:
        is_lost = np.zeros_like(is_lost)  # one finding for one cause
    of_categories = annotations["category_id"], "categories", categories["id"]
    if shift := _find_shift("category_id", *of_categories):
        is_unknown, is_unused = np.zeros_like(is_unknown), np.zeros_like(is_unused)
        shifts += shift
    named, sized = _show(images, "file_name"), _show(images, "file_name", "width", "height")
    of_image, of_class = _show(annotations, "image_id"), _show(annotations, "category_id")
    return [
        *finding("no images", [] if len(names) else ["$.images"]),
        *finding("image ids that occur twice", _repeated(images["id"])),
        *finding("images without width or height", (width == 0) | (height == 0), named),
        *finding("width or height not positive", (width < 0) | (height < 0), sized),
        *finding("images over 89 megapixels", is_large, sized),
        *finding("file_name not below the image folder", is_unsafe, named),
        *finding("images that share a file", _repeated(names), repr),
        *finding("no categories", [] if len(classes) else ["$.categories"]),
        *finding("category ids that occur twice", _repeated(categories["id"])),
        *finding("category names that occur twice", _repeated(classes)),
        *finding("category names that are empty", categories["id"][is_nameless]),
        *finding("categories that differ in case or blanks only", alike),
        *finding("categories named background", background, repr),
        *finding("categories without boxes", classes[is_unused]),
        *finding(unknown, is_lost, of_image),
        *finding("annotations of an unknown category_id", is_unknown, of_class),
        *finding("ids shifted by one", shifts),
        *finding("iscrowd that is not 0 or 1", is_wrong, _show(annotations, "iscrowd")),
        *finding("annotations without iscrowd", ids[crowd == MISSING]),
        *finding("annotations without area", ids[np.isnan(annotations["area"])]),
        *finding("annotations with the id 0", ids == 0, of_image),
    ]


def _find_shift(field: str, used: np.ndarray, name: str, ids: np.ndarray) -> list[str]:
    """Find out whether unknown ids all become known by adding or subtracting 1."""
    if len(ids) == 0 or len(used) == 0 or np.isin(used, ids).all():
        return []
    if not any(np.isin(used + shift, ids).all() for shift in (1, -1)):
        return []
    spans = f"{used.min()} to {used.max()}, but the ids of {name} are {ids.min()} to {ids.max()}"
    return [f"{field} is {spans}"]


def _pack(path: Path, images: Columns, annotations: Columns, categories: Columns) -> Annotations:
    """Group annotations by image, and leave out those whose image or category does not exist."""
    names, name_offsets = pack_names([name.encode() for name in images["file_name"]])
    order = np.argsort(annotations["image"], kind="stable")
    order = order[(annotations["image"][order] >= 0) & (annotations["category"][order] >= 0)]
    boxes, area = annotations["bbox"][order], annotations["area"][order]
    sizes = np.stack([images["height"], images["width"]], axis=1)
    with np.errstate(over="ignore"):  # boxes of 1e308, reported as outside
        area = np.where(np.isnan(area), boxes[:, 2] * boxes[:, 3], area)
    return Annotations(
        path=path,
        image_ids=images["id"],
        sizes=sizes.clip(-1, 2**31 - 1).astype(np.int32),
        names=names,
        name_offsets=name_offsets,
        offsets=np.searchsorted(annotations["image"][order], np.arange(len(sizes) + 1)),
        ids=annotations["id"][order],
        boxes_xywh=boxes,
        area=area,
        iscrowd=annotations["iscrowd"][order] == 1,
        category_index=annotations["category"][order].astype(np.int32),
        categories=tuple(zip(categories["id"].tolist(), categories["name"], strict=True)),
    )


def _positions(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the position in `ids` of each of `wanted` (-1: it is not there)."""
    if len(ids) == 0:
        return np.full(len(wanted), -1)
    order = np.argsort(ids, kind="stable")
    position = order[np.clip(np.searchsorted(ids, wanted, sorter=order), 0, len(ids) - 1)]
    return np.where(ids[position] == wanted, position, -1)


def _repeated(values: np.ndarray) -> np.ndarray:
    values = np.sort(values)
    return np.unique(values[1:][values[1:] == values[:-1]])


def check_boxes(annotations: Annotations) -> list[Finding]:
    """Check all boxes against the sizes of their images, which must be known."""
    ids, boxes = annotations.ids, annotations.boxes_xywh
    with np.errstate(over="ignore", invalid="ignore"):  # boxes of 1e308, reported as outside
        limit = annotations.sizes[annotations.image_of_annotation(), ::-1]  # [N, 2]
        has_pixels = has_extent(clip(to_xyxy(boxes), limit.astype(np.float32)))
        is_out = (boxes[:, :2] < -MIN_SIDE) | (boxes[:, :2] + boxes[:, 2:] > limit + MIN_SIDE)
        is_cut = np.any(is_out, axis=1) & has_pixels
        is_share = np.all((boxes >= 0) & (boxes <= 1), axis=1) & has_pixels
        is_most = is_share.sum() >= FEW_BOXES and is_share.sum() * 2 > has_pixels.sum()
        is_share &= is_most and not (boxes[is_share] % 1 == 0).all()
        leaves = (boxes[:, :2] + boxes[:, 2:] > limit + 1).any(axis=1)
        corners = corner_statistics(boxes[has_pixels], limit[has_pixels], leaves[has_pixels])

    def box(row: int) -> str:
        return f"{ids[row]} {[float(f'{number:.6g}') for number in boxes[row]]}"

    return [
        *finding("boxes without width or height in their image", ~has_pixels, box),
        *finding("boxes partly outside of their image", is_cut, box),
        *finding("boxes that look like shares of the image", is_share, box),
        *finding("boxes that look like x1 y1 x2 y2", corners),
        *finding("boxes that occur twice in an image", _repeated_boxes(annotations), box),
    ]


def _repeated_boxes(annotations: Annotations) -> np.ndarray:
    """Return the rows that repeat another one of their image, class and kind, to the bit."""
    columns = [annotations.image_of_annotation(), annotations.category_index, annotations.iscrowd]
    columns += list(annotations.boxes_xywh.T)
    # Equal rows have equal sums, so that one number is sorted, and not seven.
    with np.errstate(over="ignore", invalid="ignore"):  # boxes of 1e308, reported as outside
        roots = np.sqrt([2, 3, 5, 7, 11, 13, 17])
        sums = sum(column * root for column, root in zip(columns, roots, strict=True))
        order = np.argsort(sums, kind="stable")
        pairs = np.flatnonzero(np.diff(sums[order]) == 0)
    first, second = order[pairs], order[pairs + 1]
    is_same = np.all([column[first] == column[second] for column in columns], axis=0)
    return np.sort(second[is_same])


def corner_statistics(boxes: np.ndarray, limit: np.ndarray, leaves: np.ndarray) -> list[str]:
    """Explain how boxes (x, y, w, h) show that they hold two corners, if they do.

    All but 2 % must be right as corners, within the image. And a tenth must leave it as x y w h, or
    the third and fourth number grow with the first and second, against which w and h fall.

    Args:
        boxes: `[N, 4]` in pixels; (x, y) is a corner in COCO, the centre in YOLO.
        limit: `[N, 2]` width and height of the image of each.
        leaves: `[N]` bool, which of them leave their image by more than a pixel.
    """
    first, last = boxes[:, :2], boxes[:, 2:]
    # Most sets end here, and quickly.
    if len(boxes) < FEW_BOXES or (last[:, 0] > first[:, 0]).mean() < 0.98:
        return []
    fits = ((first >= 0) & (last > first) & (last <= limit + 1)).all(axis=1)
    if fits.mean() < 0.98:
        return []
    if leaves.mean() >= 0.1:
        as_corners = f"{(~fits).sum()} as corners"
        return [f"{leaves.sum():,} of {len(boxes):,} leave the image as x y w h, {as_corners}"]
    if len(boxes) < 10 * FEW_BOXES:
        return []
    first, last = first / limit, last / limit
    x, y = (float(np.corrcoef(first[:, axis], last[:, axis])[0, 1]) for axis in (0, 1))
    if not (x >= 0.5 and y >= 0.5):  # NaN where all are the same
        return []
    return [f"w grows with x, and h with y, in {len(boxes):,} boxes (correlation {x:.2f}, {y:.2f})"]


def check_sizes(annotations: Annotations, resized: np.ndarray) -> list[Finding]:
    """Find images that resizing to `resized`, `[I, 2]` (H, W), leaves without a pixel."""
    sizes = annotations.sizes
    return finding(
        "images that resizing makes 0 pixels wide or high",
        np.any(resized < 1, axis=1),
        lambda i: f"{annotations.describe(i)} of {sizes[i, 1]} x {sizes[i, 0]}",
    )


def require_pixels(annotations: Annotations, resized: np.ndarray) -> None:
    """Raise UserError for images that resizing to `resized` leaves without a pixel."""
    require_no_errors(annotations.title, check_sizes(annotations, resized))


def boxes_findings(annotations: Annotations, for_training: bool) -> list[Finding]:
    """Explain why there is no box to train on (or to evaluate with), if there is none."""
    is_box = ~annotations.iscrowd
    if not for_training and is_box.any():
        return []
    is_thin = is_box & ~(annotations.boxes_xywh[:, 2:] > 1).all(axis=1)
    limit = annotations.sizes[annotations.image_of_annotation(), ::-1].astype(np.float32)
    is_outside = is_box & ~is_thin & ~has_extent(clip(to_xyxy(annotations.boxes_xywh), limit))
    if for_training and (is_box & ~is_thin & ~is_outside).any():
        return []
    counts = {
        "crowds": annotations.iscrowd,
        "outside of their image": is_outside,
        "thinner than a pixel (are they shares of the image?)": is_thin,
    }
    reasons = [f"{cases.sum():,} are {what}" for what, cases in counts.items() if cases.any()]
    of_all = f" of {len(is_box):,} boxes are "
    reason = ", ".join(reasons).replace(" are ", of_all, 1) if reasons else "no annotations"
    return finding("no box to train on" if for_training else "no box to evaluate with", [reason])


def require_boxes(annotations: Annotations) -> None:
    """Raise UserError, with the reason, if there is no box to train on."""
    require_no_errors(annotations.title, boxes_findings(annotations, for_training=True))


def overlap_findings(
    train: tuple[Annotations, Path], val: tuple[Annotations, Path], with_copies: bool = False
) -> list[Finding]:
    """Find images that are in both splits; a split is (annotations, image folder).

    Args:
        with_copies: whether files of one name and content count too; slow for large sets.
    """
    splits = [(split, os.path.realpath(folder)) for split, folder in (train, val)]
    folders = [folder for _, folder in splits]
    if os.path.samefile(train[0].path, val[0].path):  # one file for both: only the names count
        splits = [(split, folders[0]) for split, _ in splits]
    elif os.path.commonpath(folders) not in folders and not with_copies:
        return []  # quick: COCO has 123,000 names
    paths = [
        {os.path.join(folder, split.file_name(i)) for i in range(len(split))}
        for split, folder in splits
    ]
    shared = paths[0] & paths[1]
    if with_copies:
        of_name = {os.path.basename(path): path for path in paths[1]}
        shared |= {p for p in paths[0] if _is_copy(p, of_name.get(os.path.basename(p)))}
    names = sorted(os.path.relpath(path, folders[0]) for path in shared)
    return finding("images that are in train and val", names, repr)


def _is_copy(path: str, other: str | None) -> bool:
    """Return whether both are files with the same content; sizes are compared first."""
    if other is None or not (os.path.isfile(path) and os.path.isfile(other)):
        return False
    return filecmp.cmp(path, other, shallow=False)
