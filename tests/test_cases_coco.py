"""COCO folders as tools and people write them: the right boxes, or a refusal with the fix.

Each case is drawn here: red boxes at (10 + i % 7, 10 + i % 5, 40, 30) and blue ones at
(70, 40, 30, 40) in images of 120 x 90 pixels. python -m pytest tests/test_cases_coco.py
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import coco_eval
import coco_utils
import train
from data import checks, coco_arrays, coco_json, locate
from data.checks import overlap_findings
from data.splits import data_paths, read_splits
from runtime import checkpoint
from runtime.options import parse_args
from tools import anchor_fit, check_data, visualize
from utils import UserError

Document = dict[str, Any]
SPLITS = ("train", "val")
BLUE = [70, 40, 30, 40]


def red(i: int) -> list[int]:
    return [10 + i % 7, 10 + i % 5, 40, 30]


def plain(split: str) -> Document:
    """Four images, each with a red and a blue box."""
    rows = [
        {"id": 2 * i + c, "image_id": i + 1, "category_id": c, "bbox": box}
        for i in range(4)
        for c, box in ((1, red(i)), (2, BLUE))
    ]
    return {
        "images": [
            {"id": i + 1, "file_name": f"im{i}.jpg", "width": 120, "height": 90} for i in range(4)
        ],
        "annotations": [{**row, "area": 1200, "iscrowd": 0, "segmentation": []} for row in rows],
        "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}],
    }


def folder(
    root: Path,
    change: Callable[[Document, str], Any] = lambda document, split: None,
    name: Callable[[int], str] = lambda i: f"im{i}.jpg",
    write: Callable[[Document], bytes] = lambda document: json.dumps(document).encode(),
) -> Path:
    """Draw a COCO folder: `change(document, split)`, file `name(i)`, bytes from `write`."""
    (root / "annotations").mkdir(parents=True)
    for split in SPLITS:
        document = plain(split)
        document = change(document, split) or document
        path = root / "annotations" / f"instances_{split}2017.json"
        path.write_bytes(write(document))
        for i in range(4):
            image = Image.new("RGB", (120, 90), (90, 90, 90))
            draw = ImageDraw.Draw(image)
            for (x, y, w, h), colour in ((red(i), (220, 30, 30)), (BLUE, (30, 30, 220))):
                draw.rectangle((x, y, x + w - 1, y + h - 1), fill=colour)
            path = root / f"{split}2017" / name(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=95)
    return root


def rows(name: str, change: Callable[[Document], Any]) -> Callable[[Document, str], None]:
    """Return what changes each entry of the list `name` in place."""

    def apply(document: Document, split: str) -> None:
        for row in document[name]:
            change(row)

    return apply


def put(name: str, **values: Any) -> Callable[[Document, str], None]:
    return rows(name, lambda row: row.update(values))


def both(*changes: Callable[[Document, str], Any]) -> Callable[[Document, str], None]:
    def apply(document: Document, split: str) -> None:
        for change in changes:
            change(document, split)

    return apply


def number(field: str, kind: Callable[[Any], Any]) -> Callable[[Document], None]:
    return lambda row: row.update({field: kind(row[field])})


def drop(*fields: str) -> Callable[[Document], None]:
    return lambda row: [row.pop(field) for field in fields] and None


def cut_images(document: Document, split: str) -> None:
    document["images"] = document["images"][:2]


def from_0(document: Document, split: str) -> None:
    for name, fields in (
        ("images", ["id"]),
        ("annotations", ["id", "image_id", "category_id"]),
        ("categories", ["id"]),
    ):
        for row in document[name]:
            row.update({field: row[field] - 1 for field in fields})


def negative(document: Document, split: str) -> None:
    rows("images", number("id", lambda v: -v))(document, split)
    rows("annotations", number("image_id", lambda v: -v))(document, split)
    rows("annotations", number("id", lambda v: v - 100))(document, split)


def val_names_red_only(document: Document, split: str) -> None:
    if split == "val":
        document["categories"] = [{"id": 9, "name": "red"}]
        document["annotations"] = [a for a in document["annotations"] if a["category_id"] == 1]
        put("annotations", category_id=9)(document, split)


def category(**values: Any) -> Callable[[Document, str], None]:
    return lambda document, split: document["categories"].insert(0, values)


def entry_per_box(document: Document, split: str) -> None:
    images = document["images"]
    for place, row in enumerate(document["annotations"]):
        row["image_id"] = place + 1
    document["images"] = [
        {**image, "id": 2 * i + k} for i, image in enumerate(images) for k in (1, 2)
    ]


def twice(document: Document, split: str) -> None:
    for row in document["images"]:
        row["file_name"] = f"{split}2017/{row['file_name']}"


# What is odd: how it is drawn, the classes, and how each warning about val begins.
RED_BLUE = ["red", "blue"]
USED: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "c00 nothing": ({}, RED_BLUE, []),
    "c01 backslash": (
        {
            "change": rows("images", number("file_name", lambda n: f"images\\{n}")),
            "name": lambda i: f"images/im{i}.jpg",
        },
        RED_BLUE,
        [r"file names in another spelling (4): 1 'images\\im0.jpg' is 'images/im0.jpg'"],
    ),
    "c02 ids from 0": (
        {"change": from_0},
        RED_BLUE,
        ["annotations with the id 0: 0 (image_id 0)"],
    ),
    "c03 root category": (
        {"change": category(id=0, name="cells", supercategory="none")},
        ["cells", *RED_BLUE],
        ["categories without boxes: cells (kept as classes)"],
    ),
    "c04 root category with the name of a class": (
        {"change": category(id=0, name="red", supercategory="none")},
        RED_BLUE,
        ["unused categories with the name of another: 0 (name 'red') (left out)"],
    ),
    "c05 float ids": (
        {
            "change": both(
                rows("images", lambda r: r.update({k: float(r[k]) for k in ("id", "width")})),
                rows("annotations", number("image_id", float)),
                put("annotations", iscrowd=0.0),
            )
        },
        RED_BLUE,
        ["numbers written as 1.0 or as text (24): $.images[0].id = 1.0"],
    ),
    "c06 image ids as text": (
        {
            "change": both(
                rows("images", number("id", "{:06d}".format)),
                rows("annotations", number("image_id", "{:06d}".format)),
            )
        },
        RED_BLUE,
        ['numbers written as 1.0 or as text (12): $.images[0].id = "000001"'],
    ),
    "category ids as text": (
        {
            "change": both(
                rows("categories", number("id", str)),
                rows("annotations", number("category_id", str)),
            )
        },
        RED_BLUE,
        ['numbers written as 1.0 or as text (10): $.annotations[0].category_id = "1" (id 1)'],
    ),
    "ids and widths as text of floats": (
        {
            "change": both(
                rows("images", number("id", "{}.0".format)),
                rows("images", number("width", "{}.0".format)),
                rows("annotations", number("image_id", "{}.0".format)),
            )
        },
        RED_BLUE,
        ['numbers written as 1.0 or as text (16): $.images[0].id = "1.0" (id 1.0)'],
    ),
    "c08 byte order mark": (
        {"write": lambda document: b"\xef\xbb\xbf" + json.dumps(document).encode()},
        RED_BLUE,
        ["annotation file with a byte order mark: instances_val2017.json"],
    ),
    "byte order mark and float ids": (
        {
            "write": lambda document: b"\xef\xbb\xbf" + json.dumps(document).encode(),
            "change": rows("categories", number("id", float)),
        },
        RED_BLUE,
        [
            "annotation file with a byte order mark: instances_val2017.json",
            "numbers written as 1.0 or as text (2): $.categories[0].id = 1.0",
        ],
    ),
    "c11 no width": (
        {"change": rows("images", drop("width", "height"))},
        RED_BLUE,
        ["images without width or height (4): 1 (file_name 'im0.jpg')"],
    ),
    "c12 width 0": (
        {"change": put("images", width=0, height=0)},
        RED_BLUE,
        ["images without width or height (4): 1 (file_name 'im0.jpg')"],
    ),
    "height null": (
        {"change": put("images", height=None)},
        RED_BLUE,
        ["images without width or height (4): 1 (file_name 'im0.jpg')"],
    ),
    "area and iscrowd null": (
        {"change": put("annotations", area=None, iscrowd=None)},
        RED_BLUE,
        ["annotations without iscrowd (8): 1, 2", "annotations without area (8): 1, 2"],
    ),
    "area NaN, iscrowd false": (
        {"change": put("annotations", area=float("nan"), iscrowd=False)},
        RED_BLUE,
        ["annotations without area (8): 1, 2"],
    ),
    "iscrowd as text": (
        {"change": put("annotations", iscrowd="0")},
        RED_BLUE,
        ['numbers written as 1.0 or as text (8): $.annotations[0].iscrowd = "0"'],
    ),
    "c14 annotations of images that were cut": (
        {"change": cut_images},
        RED_BLUE,
        ["annotations of an unknown image_id (4): 5 (image_id 3), 6 (image_id 3)"],
    ),
    "c15 val names fewer classes, by other ids": (
        {"change": val_names_red_only},
        RED_BLUE,
        [
            "classes of training that val lacks, or numbers otherwise (2): "
            "'red' is 9, in training 1, "
            "'blue' is missing, in training 2 (matched by name)",
        ],
    ),
    "c19 url-encoded": (
        {
            "change": rows("images", number("file_name", lambda n: f"my%20{n}")),
            "name": lambda i: f"my im{i}.jpg",
        },
        RED_BLUE,
        ["file names in another spelling (4): 1 'my%20im0.jpg' is 'my im0.jpg'"],
    ),
    "a name that really holds %20": (
        {
            "change": rows("images", number("file_name", lambda n: f"my%20{n}")),
            "name": lambda i: f"my%20im{i}.jpg",
        },
        RED_BLUE,
        [],
    ),
    "c21 folder twice": (
        {"change": twice},
        RED_BLUE,
        ["file names in another spelling (4): 1 'val2017/im0.jpg' is 'im0.jpg'"],
    ),
    "backslash, folder twice, %20 and suffix at once": (
        {
            "change": both(
                twice,
                rows(
                    "images",
                    number("file_name", lambda n: n.replace("/im", "\\my%20im").upper()),
                ),
                rows("images", number("file_name", lambda n: n.lower().replace(".jpg", ".JPG"))),
            ),
            "name": lambda i: f"my im{i}.jpg",
        },
        RED_BLUE,
        [
            r"file names in another spelling (4): 1 'val2017\\my%20im0.JPG' is 'my im0.jpg'",
        ],
    ),
    "ü as two characters, as macOS writes it": (
        {
            "change": rows("images", number("file_name", "ü{}".format)),
            "name": lambda i: f"u\u0308im{i}.jpg",
        },
        RED_BLUE,
        ["file names in another spelling (4): 1 'üim0.jpg' is 'u\u0308im0.jpg'"],
    ),
    "suffix in another case": (
        {"name": lambda i: f"im{i}.JPG"},
        RED_BLUE,
        ["file names in another spelling (4): 1 'im0.jpg' is 'im0.JPG'"],
    ),
    "c26 annotation ids of each image": (
        {"change": rows("annotations", number("id", lambda v: 1 + (v - 1) % 2))},
        RED_BLUE,
        ["annotations without an id of their own (8): number 1, number 2, "],
    ),
    "c31 no annotation ids": (
        {"change": rows("annotations", drop("id"))},
        RED_BLUE,
        ["annotations without an id of their own (8): number 1, number 2"],
    ),
    "c41 negative ids": ({"change": negative}, RED_BLUE, []),
    "c51 an image entry per box": (
        {"change": entry_per_box},
        RED_BLUE,
        ["images that share a file (4): 'im0.jpg', 'im1.jpg'"],
    ),
    "c52 background": (
        {"change": category(id=0, name="__background__")},
        ["__background__", *RED_BLUE],
        [
            "categories named background: '__background__'",
            "categories without boxes: __background__ (kept as classes)",
        ],
    ),
}


def read(root: Path) -> list[coco_arrays.Annotations]:
    """Do with a folder what train.py does before it builds the model; return train and val."""
    val, training = read_splits(data_paths("coco", root, {}), ["val", "train"])
    label_map = coco_utils.label_categories(training.categories)
    coco_utils.match_classes(label_map, val, str(training.path))
    checks.require_boxes(training)
    return [training, val]


def boxes_in(root: Path) -> dict[str, list[tuple[str, str, list[float]]]]:
    """Return what training sees of each split: (file, class, box xyxy), sorted."""
    boxes = {}
    label_map: list[dict[str, Any]] = []
    for split, packed in zip(SPLITS, read(root), strict=True):
        label_map = label_map or coco_utils.label_categories(packed.categories)
        names = {c["label"]: c["name"] for c in label_map}
        data = coco_utils.CocoDetection(root / f"{split}2017", packed, label_map)
        boxes[split] = []
        for i in range(len(data)):
            image, target = data[0, i]
            assert image.shape == (3, 90, 120)
            for label, box in zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True):
                x, y = int(box[0] + box[2]) // 2, int(box[1] + box[3]) // 2
                brightest = "red" if image[0, y, x] > image[2, y, x] else "blue"
                assert names[label] == brightest  # the box lies where it is drawn
                name = Path(packed.file_name(i)).name
                boxes[split].append((name.lower(), names[label], box))
    return boxes


def expected(images: range, name: Callable[[int], str]) -> list[tuple[str, str, list[float]]]:
    return [
        (Path(name(i)).name.lower(), colour, [x, y, x + w, y + h])
        for i in images
        for colour, (x, y, w, h) in (("red", red(i)), ("blue", BLUE))
    ]


@pytest.mark.parametrize("case", USED)
def test_unambiguous_input_is_used_with_a_warning_and_a_count(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options, classes, warnings = USED[case]
    root = folder(tmp_path / "data", **options)
    with caplog.at_level(logging.WARNING, "retinanet"):
        boxes = boxes_in(root)
    right = expected(range(2 if "cut" in case else 4), options.get("name", lambda i: f"im{i}.jpg"))
    assert sorted(boxes["train"]) == sorted(right)
    assert sorted(boxes["val"]) == sorted(r for r in right if "c15" not in case or r[1] == "red")
    start = "instances_val2017.json: warning: "
    messages = [text for text in caplog.messages if text.startswith(start)]
    assert [name for _, name in read(root)[0].categories] == classes
    assert len(messages) == len(warnings)
    for text, warning in zip(messages, warnings, strict=True):
        assert text.startswith(start + warning)
        assert len(text.removeprefix(start[:24])) <= 200


def test_links_to_files_elsewhere_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """c40: Hugging Face caches and DVC link images to blobs."""
    root = folder(tmp_path / "data")
    (tmp_path / "blobs").mkdir()
    for path in root.glob("*2017/*.jpg"):
        blob = path.rename(tmp_path / "blobs" / f"{path.parent.name}-{path.stem}")
        path.symlink_to(blob)
    boxes = boxes_in(root)
    assert sorted(boxes["train"]) == sorted(expected(range(4), lambda i: f"im{i}.jpg"))
    assert caplog.messages == []


def test_one_image_and_one_class_are_used(tmp_path: Path) -> None:
    """c27."""

    def change(document: Document, split: str) -> None:
        document["images"] = document["images"][:1]
        document["annotations"] = document["annotations"][:1]
        document["categories"] = document["categories"][:1]

    assert boxes_in(folder(tmp_path, change))["train"] == [("im0.jpg", "red", [10, 10, 50, 40])]


def swap_sides(row: Document) -> None:
    row["width"], row["height"] = row["height"], row["width"]


def no_annotations(document: Document, split: str) -> None:
    document["annotations"] = []


def of_shares(row: Document) -> None:
    x, y, w, h = row["bbox"]
    row["bbox"] = [x / 120, y / 90, w / 120, h / 90]


def some_boxes(*boxes: Any) -> Callable[[Document, str], None]:
    def apply(document: Document, split: str) -> None:
        for row, box in zip(document["annotations"], boxes, strict=False):
            row["bbox"] = box

    return apply


def some_thin(document: Document, split: str) -> None:
    put("annotations", iscrowd=1)(document, split)
    for row in document["annotations"][:3]:
        row.update(bbox=[70, 40, 0.5, 40], iscrowd=0)


# How it is drawn, and the message about train.
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "c07 numbers as text": (
        {"change": rows("annotations", number("bbox", lambda box: [str(v) for v in box]))},
        ['bbox with numbers written as text (8): $.annotations[0].bbox = ["10", "10"'],
    ),
    "c09 utf-16": (
        {"write": lambda document: json.dumps(document).encode("utf-16")},
        ["annotation file that is not UTF-8: it is UTF-16 (convert it: iconv -f UTF-16 -t"],
    ),
    "c13 no category_id": (
        {"change": put("annotations", category_id=None)},
        [
            "category_id that is not a 64-bit integer (8): $.annotations[0].category_id = null "
            "(id 1)"
        ],
    ),
    "c16 shares": (
        {"change": rows("annotations", of_shares)},
        ["boxes that look like shares of the image (8): 1 [0.0833333, 0.111111"],
    ),
    "c18 no annotations list": (
        {"change": lambda d, split: {k: v for k, v in d.items() if k != "annotations"}},
        ["no list of annotations: $.annotations"],
    ),
    "c20 absolute names": (
        {"change": rows("images", number("file_name", lambda n: f"/home/me/images/{n}"))},
        ["file_name not below the image folder (4): 1 (file_name '/home/me/images/im0.jpg')"],
    ),
    "a name that leaves the folder once it is decoded": (
        {"change": rows("images", number("file_name", lambda n: f"%2e%2e/val2017/{n}"))},
        ["image files missing (4): 1 "],
    ),
    "a name that leaves the folder with slashes": (
        {"change": rows("images", number("file_name", lambda n: f"a\\..\\..\\val2017\\{n}"))},
        ["file_name not below the image folder (4): 1 (file_name 'a"],
    ),
    "c23 shifted categories": (
        {"change": rows("annotations", number("category_id", lambda v: v - 1))},
        ["ids shifted by one: category_id is 0 to 1, but the ids of categories are 1 to 2"],
    ),
    "c24 json lines": (
        {"write": lambda d: b"\n".join(json.dumps(row).encode() for row in d["images"])},
        ["annotation file that is not JSON, or cut short: a second value, as in JSON Lines, at"],
    ),
    "c25 no boxes": (
        {"change": no_annotations},
        ["no box to train on: no annotations (correct the boxes; or, if images without"],
    ),
    "c28 empty boxes": (
        {"change": some_boxes([], [0, 0, 0, 0], None)},
        ["bbox that is not four finite numbers (2): $.annotations[0].bbox = [] (id 1), $.annot"],
    ),
    "c43 crowds only": (
        {"change": put("annotations", iscrowd=1)},
        ["no box to train on: 8 of 8 boxes are crowds (correct the boxes"],
    ),
    "crowds and thin boxes": (
        {"change": some_thin},
        ["no box to train on: 5 of 8 boxes are crowds, 3 are thinner than a pixel (are they"],
    ),
    "c44 images by id": (
        {"change": lambda d, split: d | {"images": {str(i["id"]): i for i in d["images"]}}},
        ["annotation file that is not COCO's: $.images is an object, not a list"],
    ),
    "c45 a missing image": (
        {
            "change": lambda d, split: d["images"].append(
                {"id": 99, "file_name": "gone.jpg", "width": 120, "height": 90}
            )
        },
        ["image files missing: 99 "],
    ),
    "c46 other boxes": (
        {"change": some_boxes([10, 10, 40, 30, 0.5], {"x": 1, "y": 2, "w": 3, "h": 4})},
        ["bbox that is not four finite numbers (2): $.annotations[0].bbox = [10, 10, 40, 30, 0.5]"],
    ),
    "c49 trailing comma": (
        {"write": lambda d: json.dumps(d).encode().replace(b"}]}", b"}],}")},
        ["annotation file that is not JSON, or cut short: "],
    ),
    "c50 width and height swapped": (
        {"change": rows("images", swap_sides)},
        ["width and height that are swapped: in all 4 images looked at (swap them"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ambiguous_input_is_refused_in_short_lines(case: str, tmp_path: Path) -> None:
    options, errors = REFUSED[case]
    root = folder(tmp_path / "data", **options)
    with pytest.raises(UserError) as caught:
        read(root)
    text = str(caught.value)
    path = root / "annotations" / "instances_train2017.json"
    lines = text[text.index(f"{path} cannot be used") :].splitlines()[1:]
    assert len(lines) == len(errors)  # one finding for one cause
    for error in errors:
        (line,) = [line for line in lines if line.startswith(f"  {error}")]
        assert len(line) <= 202 + len(str(path)) * ("iconv" in line) and line.endswith(")")
    if "no box" in text:
        assert "--keep-empty" in text


def test_boxes_of_two_corners_are_detected_by_statistics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """c17: large boxes leave the image as x y w h, none does as x1 y1 x2 y2."""

    def corners(row: Document) -> None:
        x, y, w, h = row["bbox"]
        row["bbox"] = [x, y, x + w, y + h]

    read(folder(tmp_path, rows("annotations", corners)))
    (message,) = [t for t in caplog.messages if "train2017" in t and "x1 y1 x2 y2" in t]
    assert "4 of 8 leave the image as x y w h, 0 as corners (are they?" in message


@pytest.mark.parametrize("as_corners", [True, False])
def test_small_boxes_of_two_corners_are_detected_by_correlation(
    as_corners: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They lie in the upper left quarter, so that none leaves the image either way."""
    random = np.random.default_rng(0)

    def change(document: Document, split: str) -> None:
        document["annotations"] = []
        for i in range(60):
            (x, y), (w, h) = random.integers(0, (50, 35), 2), random.integers(3, (10, 9), 2)
            box = [x, y, x + w, y + h] if as_corners else [x, y, w, h]
            row = {"id": i + 1, "image_id": 1 + i % 4, "category_id": 1 + i % 2, "iscrowd": 0}
            document["annotations"].append({**row, "bbox": [int(v) for v in box], "area": 9})

    read(folder(tmp_path, change))
    messages = [text for text in caplog.messages if "x1 y1 x2 y2" in text]
    assert len(messages) == (2 if as_corners else 0)
    assert all("w grows with x, and h with y, in 60 boxes" in text for text in messages)


def test_large_boxes_within_the_image_are_no_corners(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One object fills each image, so w > x and h > y everywhere, as for two corners."""

    def change(row: Document) -> None:
        i = row["id"]
        row["bbox"] = [5 + i, 3 + i, 110 - 3 * i, 80 - 3 * i]

    read(folder(tmp_path, rows("annotations", change)))
    assert caplog.messages == []


def test_a_file_or_image_in_both_splits_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder(tmp_path)
    paths = data_paths("coco", root, {})
    same_file = {f"val_{kind}": paths[f"train_{kind}"] for kind in ("images", "annotations")}
    same_images = {"val_images": paths["train_images"]}
    same_annotations = {"val_annotations": paths["train_annotations"]}
    for same in (same_file, same_images, same_annotations):
        caplog.clear()
        read_splits(paths | same, ["val", "train"])
        (message,) = caplog.messages
        assert "images that are in train and val (4): 'im0.jpg', 'im1.jpg'" in message


def test_copies_of_images_in_the_other_split_are_reported_by_check_data(tmp_path: Path) -> None:
    paths = data_paths("coco", folder(tmp_path), {})
    copies = shutil.copytree(paths["train_images"], tmp_path / "copies")
    annotations = shutil.copy(paths["train_annotations"], tmp_path / "copied.json")
    same = {"val_images": copies, "val_annotations": Path(annotations)}
    splits = read_splits(paths | same, ["train", "val"])
    pairs = [(s, p) for s, p in zip(splits, (paths["train_images"], copies), strict=True)]
    with (copies / "im1.jpg").open("ab") as file:
        file.write(b"another image")
    (copies / "im3.jpg").unlink()
    (finding,) = overlap_findings(pairs[0], pairs[1], with_copies=True)
    assert "images that are in train and val (2): 'im0.jpg', 'im2.jpg'" in str(finding)
    assert overlap_findings(pairs[0], pairs[1]) == []


@pytest.mark.parametrize("case", ["c25 no boxes", "c43 crowds only"])
def test_every_command_refuses_a_set_without_boxes_or_reports_it(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "data", **REFUSED[case][0])
    tiny = ["--data-path", str(root), *TINY, "--output-dir", str(tmp_path / "run")]
    error = REFUSED[case][1][0]
    for command in (
        lambda: train.main(parse_args(tiny)),
        lambda: visualize.draw_batch([*tiny, "--picture", str(tmp_path / "batch.jpg")]),
    ):
        with pytest.raises(UserError, match=re.escape(error)):
            command()
    reason = error.removeprefix("no box to train on: ").split(" (")[0]
    with pytest.raises(UserError, match=f"has no boxes to fit anchors to: {reason}"):
        anchor_fit.main(tiny)
    page = tmp_path / "page.png"
    assert check_data.main(["--data-path", str(root), "-j", "1", "--plot", str(page)]) == 1
    assert page.is_file()
    table = capsys.readouterr().out
    assert re.search(r"ERROR +1  train: no box to train on\n", table)
    assert re.search(r"WARNING +1  val: no box to evaluate with\n", table)


@pytest.mark.parametrize("odd", SPLITS)
def test_an_image_that_resizing_leaves_without_a_pixel_is_refused(
    odd: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """i03: 1 x 5000 pixels at 64 px, by id and before any image is decoded; 4000 x 63 are used."""

    def change(document: Document, split: str) -> None:
        document["images"][1].update(width=4000, height=63)
        if split == odd:
            document["images"][2].update(width=1, height=5000)

    root = folder(tmp_path / "data", change)
    tiny = ["--data-path", str(root), *TINY, "--output-dir", str(tmp_path / "run")]
    what = "images that resizing makes 0 pixels wide or high"
    with pytest.raises(UserError) as caught:
        train.main(train.parse_args(tiny))
    start, *lines = str(caught.value).splitlines()
    assert f"instances_{odd}2017.json cannot be used" in start
    assert lines == [f"  {what}: 3 'im2.jpg' of 1 x 5000 (crop them, or take them out)"]
    flags = ["--data-path", str(root), "-j", "1", "--min-size", "64"]
    assert check_data.main([*flags, "--max-size", "64"]) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"ERROR +1  {odd}: {what}\n +3 'im2.jpg' of 1 x 5000\n", printed)
    assert printed.count(what) == 1
    check_data.main([*flags, "--max-size", "5000"])
    assert what not in capsys.readouterr().out


def test_keep_empty_trains_without_boxes(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", no_annotations)
    run = tmp_path / "run"
    tiny = ["--data-path", str(root), *TINY, "--output-dir", str(run), "--epochs", "1"]
    train.main(parse_args([*tiny, "--keep-empty", "--eval-every", "0"]))
    assert checkpoint.load(run / "checkpoint.pth")["epoch"] == 1


def test_val_with_fewer_classes_is_scored_by_name(tmp_path: Path) -> None:
    """Detections of a class that val does not name change no number, and are not written."""
    training, val = read(folder(tmp_path, val_names_red_only))
    label_map = coco_utils.label_categories(training.categories)
    evaluator = coco_eval.CocoEvaluator(val, label_map)
    for i, number in enumerate(val.image_ids.tolist()):
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (red(i), BLUE)])
        found = {"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.9, 0.8])}
        evaluator.update([number], [found])
    detections = np.concatenate(evaluator.rows)
    evaluation = evaluator.evaluation(detections)
    assert coco_eval.scores_of(evaluation).metrics["AP"] == pytest.approx(1)
    (row,) = evaluator.analyze(evaluation, detections).per_class
    assert (row["name"], row["boxes"], row["F1"]) == ("red", 4, 1)
    evaluator.write_results(detections, tmp_path / "results.json")
    assert {d["category_id"] for d in json.loads((tmp_path / "results.json").read_text())} == {9}


def test_val_with_another_class_is_refused(tmp_path: Path) -> None:
    def change(document: Document, split: str) -> None:
        if split == "val":
            document["categories"][1]["name"] = "green"

    root = folder(tmp_path, change)
    with pytest.raises(UserError, match=r"only here \['green'\], only in .* \['blue'\]"):
        read(root)
    assert check_data.main(["--data-path", str(root), "-j", "1"]) == 1


def test_two_names_of_one_file_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(document: Document, split: str) -> None:
        document["images"][0]["file_name"] = "im1.JPG"

    read_splits(data_paths("coco", folder(tmp_path, change), {}), ["train"])
    assert any("images that share a file: 'im1.jpg' (join them" in text for text in caplog.messages)


def test_each_folder_is_listed_once_to_find_other_spellings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of 100,000 images in which every suffix is in capitals is no hours of work."""
    calls: list[str] = []
    lower = locate._lower_suffix
    monkeypatch.setattr(locate, "_lower_suffix", lambda name: [calls.append(name), lower(name)][1])
    document = plain("train")
    document["images"] = [
        {"id": i, "file_name": f"{i}.jpg", "width": 120, "height": 90} for i in range(1, 301)
    ]
    for i in range(1, 301):
        (tmp_path / f"{i}.JPG").touch()
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(document))
    _, findings = locate.locate_images(coco_json.read_annotations(path)[0], tmp_path)
    assert [(f.what, f.count) for f in findings] == [("file names in another spelling", 300)]
    assert len(calls) < 1000  # 300 files, and each name once


def test_a_suffix_that_fits_two_files_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, name=lambda i: f"im{i}.JPG")
    (root / "train2017" / "im0.Jpg").write_bytes((root / "train2017" / "im0.JPG").read_bytes())
    with pytest.raises(UserError, match="image files missing: 1 .*im0.jpg "):
        read(root)


@pytest.mark.parametrize("orientation", [3, 6])
def test_unknown_sizes_are_those_that_viewers_show(orientation: int, tmp_path: Path) -> None:
    root = folder(tmp_path, put("images", width=0, height=0))
    for path in root.glob("*2017/*.jpg"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        with Image.open(path) as image:
            image.save(path, exif=exif, quality=95)
    assert set(map(tuple, read(root)[0].sizes.tolist())) == {
        (120, 90) if orientation == 6 else (90, 120)
    }


def test_annotated_size_of_turned_images_is_not_called_swapped(tmp_path: Path) -> None:
    root = folder(tmp_path, rows("images", swap_sides))
    for path in root.glob("*2017/*.jpg"):
        exif = Image.Exif()
        exif[0x0112] = 6
        with Image.open(path) as image:
            image.save(path, exif=exif, quality=95)
    assert set(map(tuple, read(root)[0].sizes.tolist())) == {(120, 90)}  # as annotated: no error


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_damaged_json_is_refused_or_has_the_right_boxes(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each entry's fields are written otherwise, or wrongly: boxes are right or there are none."""
    document = plain("train")
    damage: dict[str, list[Callable[[Any], Any]]] = {
        "id": [float, str, lambda v: None, lambda v: v + 100, lambda v: -v],
        "image_id": [float, str, lambda v: None, lambda v: v + 100],
        "category_id": [float, str, lambda v: None, lambda v: v + 100],
        "width": [float, str, lambda v: None, lambda v: 0],
        "area": [lambda v: None, lambda v: float("nan"), str],
        "iscrowd": [float, str, bool, lambda v: None, lambda v: 7],
        "file_name": [lambda v: v.upper(), lambda v: f"train2017\\{v}", lambda v: f"../{v}"],
    }
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(["images", "annotations"]))
        field = data.draw(st.sampled_from(sorted(set(document[name][0]) & set(damage))))
        change = data.draw(st.sampled_from(damage[field]))
        for row in document[name]:
            if data.draw(st.booleans()) and row[field] is not None:
                try:
                    row[field] = change(row[field])
                except (TypeError, ValueError):
                    continue
    root = tmp_path_factory.mktemp("damaged") / "data"
    folder(root, lambda d, split: document)
    try:
        boxes = boxes_in(root)["train"]
    except UserError:
        return
    right = expected(range(4), lambda i: f"im{i}.jpg")
    assert all(row in right for row in boxes)
