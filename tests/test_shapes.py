"""Proves that the embedded data set is valid COCO with exact boxes: pytest tests/test_shapes.py.

Pixels are judged only from the JPEG files: objects are saturated, backgrounds are not, and the
objects of one image differ in hue.
"""

import contextlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image, ImageFilter
from pycocotools.coco import COCO

from data import shapes
from data.shapes import make_shapes

# From pycocotools' mask decoder with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SMALL = {"num_train": 8, "num_val": 6, "size": 64}
SPLITS = ("train", "val")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes"))


def _json(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"instances_{split}2017.json"


def _load(folder: Path, split: str) -> dict[str, Any]:
    return json.loads(_json(folder, split).read_text())


def _coco(folder: Path, split: str) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(_json(folder, split))


def _images(folder: Path, split: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    coco = _coco(folder, split)
    return [(image, coco.imgToAnns[image["id"]]) for image in coco.imgs.values()]


def _mask(annotation: dict[str, Any], image: dict[str, Any]) -> np.ndarray:
    """Decode a segmentation with pycocotools: bool [H, W]."""
    coco: Any = COCO()
    coco.imgs = {image["id"]: image}
    return coco.annToMask(annotation).astype(bool)


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _extent(mask: np.ndarray) -> np.ndarray:
    """Tight box xyxy of a mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def _xyxy(annotation: dict[str, Any]) -> np.ndarray:
    x, y, width, height = annotation["bbox"]
    return np.array([x, y, x + width, y + height])


def _rounding(annotation: dict[str, Any]) -> float:
    """Pixels by which a mask of whole pixels may miss the area: 0.7 px all along the box."""
    return 0.7 * 2 * sum(annotation["bbox"][2:])


def _colourful_and_hue(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels are colourful (bool [H, W]), and the hue of all (0 ... 255)."""
    with Image.open(path) as picture:
        hue, saturation, value = np.moveaxis(np.asarray(picture.convert("HSV"), float), -1, 0)
    # The second term: on a dark background, JPEG's ringing is saturated too.
    return (saturation > 0.47 * 255) & (saturation * value > 60 * 255), hue


def test_layout_is_valid_coco(folder: Path) -> None:
    assert folder.name == f"shapes-v{shapes.FORMAT}-512-64-128-0"
    image_ids, annotation_ids = [], []
    for split, num_images in zip(SPLITS, (512, 64), strict=True):
        data = _load(folder, split)
        assert [(c["id"], c["name"]) for c in data["categories"]] == [
            (1, "circle"),
            (3, "square"),
            (7, "triangle"),
        ]
        sizes = {}
        for image in data["images"]:
            sizes[image["id"]] = image["width"], image["height"]
            with Image.open(folder / f"{split}2017" / image["file_name"]) as picture:
                assert (picture.format, picture.mode) == ("JPEG", "RGB")
                assert picture.size == sizes[image["id"]]
                assert max(picture.size) == 128
        assert len(data["images"]) == len(sizes) == num_images
        assert len(list((folder / f"{split}2017").iterdir())) == num_images
        for annotation in data["annotations"]:
            width, height = sizes[annotation["image_id"]]
            left, top, right, bottom = _xyxy(annotation)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert 0 < annotation["area"] <= (right - left) * (bottom - top)
            assert annotation["category_id"] in (1, 3, 7)
            assert annotation["iscrowd"] in (0, 1)
        image_ids += sizes
        annotation_ids += [annotation["id"] for annotation in data["annotations"]]
    assert len(set(image_ids)) == len(image_ids)
    assert len(set(annotation_ids)) == len(annotation_ids)


@pytest.mark.parametrize("split", SPLITS)
def test_every_kind_of_image_occurs(folder: Path, split: str) -> None:
    coco = _coco(folder, split)
    counts = [len(coco.imgToAnns[i]) for i in coco.imgs]
    assert 0.03 <= counts.count(0) / len(counts) <= 0.08
    assert (min(counts), max(counts)) == (0, 5)
    ratios = {(image["width"], image["height"]) for image in coco.imgs.values()}
    assert ratios == {(128, 128), (128, 96), (96, 128), (128, 64), (64, 128)}

    crowds = [a for a in coco.anns.values() if a["iscrowd"]]
    assert 0.02 <= len(crowds) / len(counts) <= 0.05
    objects = [a for a in coco.anns.values() if not a["iscrowd"]]
    assert all(np.mean([a["category_id"] == c for a in objects]) > 0.2 for c in (1, 3, 7))
    num_overlapping = 0
    for i in coco.imgs:
        boxes = [_xyxy(a) for a in coco.imgToAnns[i]]
        pairs = itertools.combinations(boxes, 2)
        num_overlapping += any(
            (np.minimum(a, b)[2:] > np.maximum(a, b)[:2] + 2).all() for a, b in pairs
        )
    assert num_overlapping > 0.25 * len(counts)


def test_boxes_are_tight_on_what_the_jpeg_shows(folder: Path) -> None:
    differences = []
    for image, annotations in _images(folder, "val"):
        colourful, hue = _colourful_and_hue(folder / "val2017" / image["file_name"])
        if not annotations:
            assert not colourful.any()
            continue
        boxes = np.array([_xyxy(a) for a in annotations])
        union = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
        assert np.abs(_extent(colourful) - union).max() <= 1.5, image
        if len(annotations) == 1:
            area = pytest.approx(annotations[0]["area"], abs=_rounding(annotations[0]))
            assert colourful.sum() == area, image

        # Each pixel belongs to the object of the nearest hue. Opening drops the blends at edges,
        # which may have the hue of a third object, and with them slivers that look out behind
        # another object: so most boxes are found again, not all.
        masks = [_mask(a, image) for a in annotations]
        hues = np.array([np.median(hue[mask & colourful]) for mask in masks])
        distance = np.abs(hue[..., None] - hues)
        nearest = np.minimum(distance, 256 - distance).argmin(axis=-1)
        for k, box in enumerate(boxes):
            mine = Image.fromarray(colourful & (nearest == k)).convert("L")
            mine = mine.filter(ImageFilter.MinFilter(3)).filter(ImageFilter.MaxFilter(3))
            differences.extend(np.abs(_extent(np.asarray(mine) > 0) - box))
    assert len(differences) > 600  # sides
    assert np.quantile(differences, 0.5) <= 0.5
    assert np.quantile(differences, 0.8) <= 1.5
    assert np.quantile(differences, 0.9) <= 2.7  # opening takes 2.6 px off a triangle's corner


@pytest.mark.parametrize("split", SPLITS)
def test_segmentation_box_and_area_describe_the_same_visible_pixels(
    folder: Path, split: str
) -> None:
    num_hidden = 0
    differences = []
    for image, annotations in _images(folder, split):
        num_owners = np.zeros((image["height"], image["width"]), int)
        for annotation in annotations:
            assert isinstance(annotation["segmentation"], dict if annotation["iscrowd"] else list)
            mask = _mask(annotation, image)
            num_owners += mask
            differences.append(np.abs(_extent(mask) - _xyxy(annotation)).max())
            area = pytest.approx(annotation["area"], abs=_rounding(annotation))
            assert mask.sum() == area, annotation
            if annotation["category_id"] == 3 and not annotation["iscrowd"]:
                # A whole square turned by up to 11 degrees fills at least 72 % of its box.
                _, _, width, height = annotation["bbox"]
                num_hidden += annotation["area"] < 0.68 * width * height
        # Edges are rounded to pixels on both sides; apart from those, no pixel has two owners.
        assert (num_owners > 1).sum() <= 0.04 * num_owners.size, image
    assert num_hidden > 0
    # A few boxes reach to the end of a sliver that a mask of whole pixels hardly has.
    assert np.quantile(differences, 0.5) <= 0.75
    assert np.quantile(differences, 0.97) <= 2


def test_same_arguments_draw_the_same_bytes_and_other_seeds_do_not(tmp_path: Path) -> None:
    first = _contents(make_shapes(tmp_path / "a", **SMALL, seed=1))
    assert _contents(make_shapes(tmp_path / "b", **SMALL, seed=1)) == first
    other = _contents(make_shapes(tmp_path / "a", **SMALL, seed=2))
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first)


def test_an_image_depends_on_seed_split_and_index_only(tmp_path: Path) -> None:
    small = _contents(make_shapes(tmp_path, **SMALL))
    large = _contents(make_shapes(tmp_path, **{**SMALL, "num_train": 12, "num_val": 9}))
    jpegs = {name for name in small if name.endswith(".jpg")}
    assert len(jpegs) == 14
    assert all(large[name] == small[name] for name in jpegs)
    assert len({small[name] for name in jpegs}) == 14, "train and val differ"


def test_a_complete_set_is_reused(tmp_path: Path) -> None:
    folder = make_shapes(tmp_path, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    assert make_shapes(str(tmp_path), **SMALL) == folder
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


@pytest.mark.parametrize(
    "damage", ["no JPEG", "short JPEG", "changed JPEG", "short JSON", "no hashes", "added", "empty"]
)
def test_a_damaged_set_is_rebuilt(tmp_path: Path, damage: str) -> None:
    folder = make_shapes(tmp_path, **SMALL)
    whole = _contents(folder)
    jpeg = folder / "train2017" / "000000000005.jpg"
    if damage == "no JPEG":
        jpeg.unlink()
    elif damage == "short JPEG":
        os.truncate(jpeg, 500)
    elif damage == "changed JPEG":
        content = bytearray(jpeg.read_bytes())
        content[-10] ^= 1
        jpeg.write_bytes(content)
    elif damage == "short JSON":
        os.truncate(_json(folder, "val"), 100)
    elif damage == "no hashes":
        (folder / "written.json").unlink()
    elif damage == "added":
        (folder / "val2017" / "more.jpg").write_bytes(jpeg.read_bytes())
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    assert make_shapes(tmp_path, **SMALL) == folder
    assert _contents(folder) == whole


def test_a_killed_build_leaves_nothing_at_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_split = shapes._write_split

    def stop_after_train(folder: Path, split: str, *rest: int) -> None:
        if split == "val":
            raise KeyboardInterrupt
        write_split(folder, split, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "_write_split", stop_after_train)
        with pytest.raises(KeyboardInterrupt):
            make_shapes(tmp_path, **SMALL)
    assert not list(tmp_path.glob("shapes-*"))
    folder = make_shapes(tmp_path, **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [folder.name]


def test_processes_at_once_end_with_one_valid_folder(tmp_path: Path) -> None:
    """Three find a damaged set at the same moment; one repairs it, none disturbs the others."""
    folder = make_shapes(tmp_path / "race", num_train=60, num_val=6)
    whole = _contents(folder)
    (folder / "written.json").unlink()
    code = (
        "import sys, time\n"
        "from data import cache, shapes\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "folder = shapes.make_shapes(sys.argv[1], num_train=60, num_val=6)\n"
        "deadline = time.time() + 0.5\n"
        "while time.time() < deadline:\n"
        "    assert cache._holds(folder, folder.name)\n"
        "print((folder / 'written.json').stat().st_ino)\n"
    )
    start = str(time.time() + 4)
    command = [sys.executable, "-c", code, str(folder.parent), start]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
    inodes = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(inodes) == 1, "drawn more than once"
    assert _contents(folder) == whole
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


@pytest.mark.parametrize(
    ("name", "value"), [("num_train", 0), ("num_val", -1), ("size", 63), ("seed", -1)]
)
def test_an_argument_out_of_range_is_named(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be at least \d+, got {value}"):
        make_shapes(tmp_path, **{**SMALL, name: value})
    assert not list(tmp_path.iterdir())


def test_size_is_the_longest_side(tmp_path: Path) -> None:
    folder = make_shapes(tmp_path, num_train=8, num_val=1, size=200)
    for image, annotations in _images(folder, "train"):
        assert max(image["width"], image["height"]) == 200
        for annotation in annotations:
            # A square of 60 % of the short side, turned by 11 degrees, is 1.18 times as wide.
            limit = 0.6 * 1.19 * min(image["width"], image["height"])
            assert max(annotation["bbox"][2:]) <= limit
