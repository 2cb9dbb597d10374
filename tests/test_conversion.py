"""VOC and YOLO folders become COCO JSON with every image, box and name, or a clear error.

python -m pytest tests/test_conversion.py
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import hotcoco
import numpy as np
import pytest
from helpers import TINY, run_script
from PIL import Image

from data import cache as data_cache
from data import coco_arrays, coco_json, conversion, image_files, labelled
from data import yolo as yolo_reader
from utils import UserError

OBJECT = "<object><name>{}</name><difficult>{}</difficult><bndbox>{}</bndbox></object>"
CORNERS = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def voc_xml(name: str, *objects: tuple[str, int, tuple[float, float, float, float]]) -> str:
    boxes = "".join(OBJECT.format(n, d, CORNERS.format(*corners)) for n, d, corners in objects)
    size = "<size><width>64</width><height>40</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}</filename>{size}{boxes}</annotation>"


def write_image(path: Path, exif: Image.Exif | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 40), "gray").save(path, exif=exif or Image.Exif())


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def voc(root: Path) -> Path:
    """Two images per split as VOC2012 lays them out, one of them without objects."""
    for split, start in (("train", 0), ("val", 2)):
        stems = [f"{split} ü {start}", f"{split}_{start + 1}"]
        write(root / "ImageSets" / "Main" / f"{split}.txt", "")
        for stem in stems:
            write_image(root / "JPEGImages" / f"{stem}.jpg")
        objects = [("cat", 0, (1, 2, 31, 22)), ("R&amp;D", 1, (5, 5, 9, 9))]
        write(root / "Annotations" / f"{stems[0]}.xml", voc_xml(f"{stems[0]}.jpg", *objects))
        write(root / "Annotations" / f"{stems[1]}.xml", voc_xml(f"{stems[1]}.jpg"))
        # A stem with a blank cannot stand in a list, whose second column is -1, 0 or 1.
        shutil.move(root / "Annotations" / f"{stems[0]}.xml", root / "Annotations" / f"{split}.xml")
        write(root / "ImageSets" / "Main" / f"{split}.txt", f"{split}  1\n{stems[1]} -1\n")
    return root


def yolo(root: Path) -> Path:
    """Two images per split as Roboflow lays them out, one of them without a label file."""
    for folder in ("train", "valid"):
        for name in ("a b ü", "empty"):
            write_image(root / folder / "images" / f"{name}.jpg")
        write(root / folder / "labels" / "a b ü.txt", "1 0.5 0.5 0.25 0.5\n0 0.125 0.25 0.25 0.5\n")
    text = "train: ../train/images\nval: ../valid/images\n\nnc: 2\nnames: ['dog', 'R&D: x']\n"
    write(root / "data.yaml", text)
    return root


def read(layout: str, root: Path, split: str = "train") -> coco_arrays.Annotations:
    annotations, findings = coco_json.read_annotations(
        conversion.coco_paths(layout, root)[f"{split}_annotations"]
    )
    assert all(finding.severity == "warning" for finding in findings)
    return annotations


def boxes_by_name(annotations: coco_arrays.Annotations) -> dict[str, list[tuple[str, list[float]]]]:
    names = [annotations.categories[i][1] for i in annotations.category_index]
    rows = list(zip(names, annotations.boxes_xywh.tolist(), strict=True))
    return {
        annotations.file_name(i): rows[annotations.offsets[i] : annotations.offsets[i + 1]]
        for i in range(len(annotations))
    }


def test_voc_keeps_every_image_name_and_box(tmp_path: Path) -> None:
    root = voc(tmp_path / "data")
    annotations = read("voc", root)
    assert annotations.categories == ((1, "R&D"), (2, "cat"))
    boxes = boxes_by_name(annotations)
    assert list(boxes) == ["train ü 0.jpg", "train_1.jpg"] and boxes["train_1.jpg"] == []
    (_, cat), (_, difficult) = boxes["train ü 0.jpg"]
    assert [name for name, _ in boxes["train ü 0.jpg"]] == ["cat", "R&D"]
    assert cat == [0, 1, 31, 21] and difficult == [4, 4, 5, 5]  # VOC counts pixels from 1
    assert annotations.iscrowd.tolist() == [False, True]  # difficult: neither trained nor scored
    assert annotations.sizes.tolist() == [[40, 64]] * 2
    paths = conversion.coco_paths("voc", root)
    assert (paths["train_images"] / "train ü 0.jpg").is_file()
    assert boxes_by_name(read("voc", root, "val")).keys() == {"val ü 2.jpg", "val_3.jpg"}


def test_voc_folders_with_xml_beside_the_images_need_no_lists(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_image(tmp_path / "data" / split / "x.png")
        # Tools rename images and leave <filename> as it was; the stem identifies the image.
        text = voc_xml("old_name.jpg", ("cat", 0, (1, 2, 31, 22)))
        write(tmp_path / "data" / split / "x.xml", text)
    assert boxes_by_name(read("voc", tmp_path / "data", "val")) == {
        "x.png": [("cat", [0, 1, 31, 21])]
    }


def test_yolo_keeps_every_image_name_and_box(tmp_path: Path) -> None:
    annotations = read("yolo", yolo(tmp_path / "data"))
    assert annotations.categories == ((1, "dog"), (2, "R&D: x"))  # in the order of data.yaml
    boxes = boxes_by_name(annotations)
    assert boxes["empty.jpg"] == []
    assert boxes["a b ü.jpg"] == [("R&D: x", [24, 10, 16, 20]), ("dog", [0, 0, 16, 20])]


@pytest.mark.parametrize(
    "names", ["[dog, cat]", "['dog', \"cat\"]", "\n  - dog\n  - cat", "\n  0: dog\n  1: cat # c"]
)
def test_yolo_names_may_be_written_in_each_usual_way(names: str, tmp_path: Path) -> None:
    root = yolo(tmp_path / "data")
    write(root / "data.yaml", f"path: .\ntrain: train/images\nval: valid/images\nnames: {names}\n")
    assert [name for _, name in read("yolo", root).categories] == ["dog", "cat"]


def test_yolo_boxes_of_a_turned_image_are_those_that_viewers_show(tmp_path: Path) -> None:
    root, exif = yolo(tmp_path / "data"), Image.Exif()
    exif[0x0112] = 6
    write_image(root / "train" / "images" / "a b ü.jpg", exif)
    annotations = read("yolo", root)
    assert annotations.sizes.tolist()[0] == [64, 40]
    assert boxes_by_name(annotations)["a b ü.jpg"][0] == ("R&D: x", [15, 16, 10, 32])
    folder = conversion.coco_paths("yolo", root)["train_images"]
    image = image_files.read_image(folder / "a b ü.jpg", folder, (64, 40))
    assert image.shape == (3, 64, 40)


def test_all_missing_files_are_counted_and_ten_are_kept(tmp_path: Path) -> None:
    root = voc(tmp_path / "data")
    lost = [f"lost_{i}" for i in range(13)]
    write(root / "ImageSets" / "Main" / "train.txt", "\n".join(lost))
    split = conversion.find("voc", root).splits["train"]
    (finding,) = split.findings.as_list()
    assert finding.count == 13 and finding.cases[9] == "Annotations/lost_9.xml"
    with pytest.raises(UserError, match="a list names and that are missing"):
        conversion.coco_paths("voc", root)


def test_conversion_happens_once_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, calls = yolo(tmp_path / "data"), []
    convert = yolo_reader.read_split
    monkeypatch.setattr(
        yolo_reader, "read_split", lambda *args: (calls.append(args), convert(*args))[1]
    )
    first = boxes_by_name(read("yolo", root))
    assert boxes_by_name(read("yolo", root)) == first and len(calls) == 2  # the two splits
    label = root / "train" / "labels" / "a b ü.txt"
    stat = label.stat()
    label.write_text("0 0.5 0.5 0.25 0.5\n")
    os.utime(label, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the size tells, too
    assert len(boxes_by_name(read("yolo", root))["a b ü.jpg"]) == 1 and len(calls) == 4
    stat = label.stat()
    label.write_text("0 0.5 0.5 0.25 0.4\n")
    os.utime(label, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # only the ctime tells
    read("yolo", root)
    assert len(calls) == 6
    assert data_cache.folder() in conversion.coco_paths("yolo", root)["val_annotations"].parents


@pytest.mark.parametrize("split", labelled.SPLITS)
@pytest.mark.parametrize("damage", ["cut", "edited", "removed", "empty"])
def test_a_damaged_json_in_the_cache_is_built_again(
    split: str, damage: str, tmp_path: Path
) -> None:
    root = yolo(tmp_path / "data")
    path = conversion.coco_paths("yolo", root)[f"{split}_annotations"]
    whole = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        edited = whole.replace(b'"width": ', b'"width": 1', 1)
        path.write_bytes({"cut": whole[:-20], "edited": edited, "empty": b""}[damage])
    assert conversion.coco_paths("yolo", root)[f"{split}_annotations"] == path
    assert path.read_bytes() == whole


def as_voc(bccd: Path, root: Path) -> None:
    for split in ("train", "val"):
        path = bccd / "annotations" / f"instances_{split}2017.json"
        shutil.copytree(bccd / f"{split}2017", root / "JPEGImages", dirs_exist_ok=True)
        hotcoco.COCO(str(path)).to_voc(str(root))
        stems = [Path(image["file_name"]).stem for image in json.loads(path.read_text())["images"]]
        write(root / "ImageSets" / "Main" / f"{split}.txt", "\n".join(stems))


def as_yolo(bccd: Path, root: Path) -> None:
    for split in ("train", "val"):
        path = bccd / "annotations" / f"instances_{split}2017.json"
        shutil.copytree(bccd / f"{split}2017", root / "images" / split)
        hotcoco.COCO(str(path)).to_yolo(str(root / "labels" / split))
        names = (root / "labels" / split / "data.yaml").read_text()
    (root / "labels" / "train" / "data.yaml").unlink()
    (root / "labels" / "val" / "data.yaml").unlink()
    names = names[names.index("names") :]
    write(root / "data.yaml", f"train: images/train\nval: images/val\n{names}")


@pytest.mark.parametrize("layout, tolerance", [("voc", 0.51), ("yolo", 1e-3)])
def test_bccd_is_unchanged_after_a_way_through_voc_or_yolo(
    layout: str, tolerance: float, bccd: Path, tmp_path: Path
) -> None:
    {"voc": as_voc, "yolo": as_yolo}[layout](bccd, tmp_path / "data")
    for split in ("train", "val"):
        original, _ = coco_json.read_annotations(
            bccd / "annotations" / f"instances_{split}2017.json"
        )
        converted = read(layout, tmp_path / "data", split)
        names = [sorted(name for _, name in a.categories) for a in (original, converted)]
        assert names[0] == names[1]
        expected, actual = boxes_by_name(original), boxes_by_name(converted)
        assert expected.keys() == actual.keys()
        for file_name, rows in expected.items():
            assert [n for n, _ in rows] == [n for n, _ in actual[file_name]]
            if rows:  # VOC has whole pixels, YOLO six decimals
                boxes = [np.array([box for _, box in r]) for r in (rows, actual[file_name])]
                corners = [np.hstack([b[:, :2], b[:, :2] + b[:, 2:]]) for b in boxes]
                np.testing.assert_allclose(*corners, rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", conversion.LAYOUTS)
def test_train_py_reads_the_layout_and_keeps_its_label_map(layout: str, tmp_path: Path) -> None:
    root = {"voc": voc, "yolo": yolo}[layout](tmp_path / "data")
    run = tmp_path / "run"
    data = ("--dataset", layout, "--data-path", root)
    run_script("train.py", *TINY, *data, "--epochs", "1", "--keep-empty", "--output-dir", run)
    record = json.loads((run / "args.json").read_text())
    names = {"voc": ["R&D", "cat"], "yolo": ["dog", "R&D: x"]}[layout]
    assert [c["name"] for c in record["categories"]] == names
    assert [c["label"] for c in record["categories"]] == [1, 2]
    done = run_script("train.py", "--test-only", "--resume", run / "checkpoint.pth", "--workers", 0)
    assert "Average Precision" in done.stdout + done.stderr
