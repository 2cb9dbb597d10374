"""VOC and YOLO folders and images as tools write them: used, or refused with the fix.

python -m pytest tests/test_cases_formats.py

Red boxes at (10 + i % 7, 10 + i % 5, 40, 30), blue ones at (70, 40, 30, 40), images of 120 x 90 px.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY, run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data import checks, coco_json, coco_rules, conversion, image_files, labelled
from data.coco_arrays import Annotations
from data.splits import read_splits
from tools import convert
from utils import UserError

SIZE = (120, 90)  # W, H
BLUE = [70.0, 40.0, 30.0, 40.0]
SPLITS = {"train": range(3), "val": range(3, 5)}
Edit = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def red(i: int) -> list[float]:
    return [10.0 + i % 7, 10.0 + i % 5, 40.0, 30.0]


def picture(i: int, size: tuple[int, int] = SIZE, with_blue: bool = True) -> Image.Image:
    image = Image.new("RGB", size, "gray")
    for colour, box in [("red", red(i)), ("blue", BLUE)][: 1 + with_blue]:
        x, y, w, h = map(int, box)
        image.paste(colour, (x, y, x + w, y + h))
    return image


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def save(path: Path, i: int, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(i).save(path, **options)


def xml_object(name: str, box: list[float], difficult: str = "0") -> str:
    x, y, w, h = box
    corners = (("xmin", x + 1), ("ymin", y + 1), ("xmax", x + w), ("ymax", y + h))
    inner = "".join(f"<{tag}>{value:g}</{tag}>" for tag, value in corners)
    name = f"<name>{name}</name><difficult>{difficult}</difficult>"
    return f"<object>{name}<bndbox>{inner}</bndbox></object>"


def xml(i: int, name: str) -> str:
    size = "<size><width>120</width><height>90</height><depth>3</depth></size>"
    objects = "\n".join([xml_object("red", red(i)), xml_object("blue", BLUE)])
    return f"<annotation><filename>{name}</filename>{size}\n{objects}\n</annotation>"


def voc(root: Path) -> Path:
    """A folder as VOC2012: images t0 … t2 and v3, v4."""
    for split, numbers in SPLITS.items():
        stems = [f"{split[0]}{i}" for i in numbers]
        for i, stem in zip(numbers, stems, strict=True):
            save(root / "JPEGImages" / f"{stem}.png", i)
            write(root / "Annotations" / f"{stem}.xml", xml(i, f"{stem}.png"))
        write(root / "ImageSets" / "Main" / f"{split}.txt", "\n".join(stems))
    return root


def label(i: int) -> str:
    rows = []
    for number, (x, y, w, h) in enumerate([red(i), BLUE]):
        shares = ((x + w / 2) / 120, (y + h / 2) / 90, w / 120, h / 90)
        rows.append(f"{number} " + " ".join(f"{share:.6f}" for share in shares))
    return "\n".join(rows) + "\n"


def yolo(root: Path) -> Path:
    """A folder as Ultralytics documents it: images t0 … t2 and v3, v4."""
    for split, numbers in SPLITS.items():
        for i in numbers:
            save(root / "images" / split / f"{split[0]}{i}.png", i)
            write(root / "labels" / split / f"{split[0]}{i}.txt", label(i))
    write(root / "data.yaml", yaml_text("[red, blue]"))
    return root


def yaml_text(names: str, head: str = "train: images/train\nval: images/val\n") -> str:
    return f"{head}names: {names}\n"


def read(
    layout: str, root: Path
) -> tuple[dict[str, dict[str, list[Any]]], list[coco_rules.Finding]]:
    """Return boxes as (name, box) by image of each split, and all findings of the conversion."""
    paths = conversion.coco_paths(layout, root)
    boxes: dict[str, dict[str, list[Any]]] = {}
    findings = []
    for split in labelled.SPLITS:
        file = paths[f"{split}_annotations"]
        findings += conversion.read_origin(file)[1]
        annotations, errors = coco_json.read_annotations(file)
        assert all(finding.severity == "warning" for finding in errors)
        names = [annotations.categories[i][1] for i in annotations.category_index]
        rows = list(zip(names, annotations.boxes_xywh.round(3).tolist(), strict=True))
        boxes[split] = {}
        for i in range(len(annotations)):
            size, folder = tuple(annotations.sizes[i].tolist()), paths[f"{split}_images"]
            image_files.read_image(folder / annotations.file_name(i), folder, size)
            of_image = rows[annotations.offsets[i] : annotations.offsets[i + 1]]
            boxes[split][annotations.file_name(i)] = [(name, list(box)) for name, box in of_image]
    return boxes, findings


def require_right_boxes(
    boxes: dict[str, dict[str, list[Any]]], names: tuple[str, ...] = ("red", "blue")
) -> None:
    """Hold boxes to the drawing, within a thousandth of a pixel (labels have six decimals)."""
    assert {split: len(rows) for split, rows in boxes.items()} == {"train": 3, "val": 2}
    for rows in boxes.values():
        for file_name, of_image in rows.items():
            i = int(re.findall(r"[tv](\d)", file_name)[-1])
            assert [name for name, _ in of_image] == list(names)
            for (_, box), right in zip(of_image, [red(i), BLUE], strict=False):
                np.testing.assert_allclose(box, right, rtol=0, atol=1e-3)


def warned(findings: list[coco_rules.Finding]) -> dict[str, int]:
    """Return the count of each rule over both splits."""
    counts: dict[str, int] = {}
    for finding in findings:
        assert finding.severity == "warning"
        counts[finding.what] = counts.get(finding.what, 0) + finding.count
    return counts


# --- edits ----------------------------------------------------------------------------------------


def in_files(pattern: str, change: Callable[[str], str], encoding: str = "utf-8") -> Edit:
    """Change the text of all files that match."""

    def edit(root: Path) -> None:
        paths = sorted(root.glob(pattern))
        assert paths
        for path in paths:
            old = path.read_text()
            new = change(old)
            path.write_bytes(new.encode(encoding))

    return edit


def replace(pattern: str, old: str, new: str) -> Edit:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return in_files(pattern, change)


def put(path: str, content: str | bytes) -> Edit:
    return lambda root: write(root / path, content)


def rename(pattern: str, old: str, new: str) -> Edit:
    def edit(root: Path) -> None:
        paths = sorted(root.glob(pattern))
        assert paths
        for path in paths:
            target = root / path.relative_to(root).as_posix().replace(old, new)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)

    return edit


def both(*edits: Edit) -> Edit:
    return lambda root: [edit(root) for edit in edits]


def resave(pattern: str, suffix: str, **options: Any) -> Edit:
    """Write images in another format."""

    def edit(root: Path) -> None:
        for path in sorted(root.glob(pattern)):
            image = Image.open(path).convert("RGB")
            path.unlink()
            image.save(path.with_suffix(suffix), **options)

    return edit


def names_rotated(root: Path) -> None:
    """Let each <filename> name the next image of its split."""
    for stems in (["t0", "t1", "t2"], ["v3", "v4"]):
        for this, other in zip(stems, stems[1:] + stems[:1], strict=True):
            replace(f"Annotations/{this}.xml", f"{this}.png", f"{other}.png")(root)


def in_split_folders(root: Path) -> None:
    """Move a VOC folder to train/ and val/, each with images/ and annotations/."""
    for split, numbers in SPLITS.items():
        for i in numbers:
            for old, new, suffix in (
                ("JPEGImages", "images", "png"),
                ("Annotations", "annotations", "xml"),
            ):
                name = f"{split[0]}{i}.{suffix}"
                (root / split / new).mkdir(parents=True, exist_ok=True)
                (root / old / name).rename(root / split / new / name)
    for name in ("JPEGImages", "Annotations", "ImageSets"):
        shutil.rmtree(root / name)


def side_by_side(root: Path) -> None:
    in_split_folders(root)
    for split in SPLITS:
        for path in [*(root / split).glob("images/*"), *(root / split).glob("annotations/*")]:
            path.rename(root / split / path.name)


def split_first(root: Path) -> None:
    for split in SPLITS:
        for kind in ("images", "labels"):
            (root / split).mkdir(exist_ok=True)
            (root / kind / split).rename(root / split / kind)


def roboflow(root: Path) -> None:
    split_first(root)
    (root / "val").rename(root / "valid")
    head = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\n"
    write(root / "data.yaml", yaml_text("['red', 'blue']", head) + "\nroboflow:\n  version: 1\n")


def images_linked(root: Path) -> None:
    (root / "images").rename(root / "store")
    (root / "images").symlink_to("store")


def lists_of_files(root: Path) -> None:
    for split in SPLITS:
        lines = [f"./images/{split}/{p.name}" for p in sorted((root / "images" / split).iterdir())]
        write(root / f"{split}.txt", "\n".join(lines))
    write(root / "data.yaml", yaml_text("[red, blue]", "train: train.txt\nval: [val.txt]\n"))


def list_of_folders(root: Path) -> None:
    for kind, suffix in (("images", "png"), ("labels", "txt")):
        (root / kind / "more").mkdir()
        (root / kind / "train" / f"t2.{suffix}").rename(root / kind / "more" / f"t2.{suffix}")
    head = "path: .\ntrain:\n  - images/train\n  - images/more\nval: images/val\n"
    write(root / "data.yaml", yaml_text("[red, blue]", head))


def classes_txt(root: Path) -> None:
    (root / "data.yaml").unlink()
    write(root / "classes.txt", "red\nblue\n")


XML, LABELS = "Annotations/*.xml", "labels/*/*.txt"
COMMA, TEXT = "red, dark", "<name>red</name>"
IN_HEAD = "<annotation>"


def yaml_of(names: str, head: str = "train: images/train\nval: images/val\n") -> Edit:
    return put("data.yaml", yaml_text(names, head))


def per_line(change: Callable[[str], str]) -> Edit:
    return in_files(LABELS, lambda text: "".join(change(line) + "\n" for line in text.splitlines()))


# case: the edit, the classes, and the warnings with their counts.
USED: dict[str, tuple[Edit, tuple[str, ...], dict[str, int]]] = {
    "v01_no_size": (
        in_files("Annotations/t1.xml", lambda t: re.sub("<size>.*</size>", "", t)),
        ("red", "blue"),
        {"XML files without a size": 1},
    ),
    "v04_parts": (
        replace(
            XML, "<difficult>", f"<part>{xml_object('x', [1, 2, 3, 5])[8:-9]}</part><difficult>"
        ),
        ("red", "blue"),
        {},
    ),
    "v06_filename_no_ext": (replace(XML, ".png", ""), ("red", "blue"), {}),
    "v07_gbk": (
        in_files(
            XML,
            lambda t: (
                '<?xml version="1.0" encoding="GB2312"?>\n' + t.replace(TEXT, "<name>红</name>")
            ),
            "gb2312",
        ),
        ("红", "blue"),
        {},
    ),
    "v10_kaggle_split": (in_split_folders, ("red", "blue"), {}),
    "v11_trainval_only": (
        both(
            rename("ImageSets/Main/train.txt", "train", "trainval"),
            rename("ImageSets/Main/val.txt", "val", "test"),
        ),
        ("red", "blue"),
        {"no lists train and val": 1},
    ),
    "v12_name_1_-1": (
        put("ImageSets/Main/train.txt", "t0  1\nt1 -1\nt2  0\n"),
        ("red", "blue"),
        {"list lines with 1, 0 or -1 of one class": 3},
    ),
    "v13_png": (replace(XML, ".png", ".jpg"), ("red", "blue"), {}),
    "v15_bom": (in_files(XML, str, "utf-8-sig"), ("red", "blue"), {}),
    "v16_imagesets_crlf_ext": (
        put("ImageSets/Main/train.txt", "t0.jpg\r\nt1.jpg\r\nt2.jpg\r\n"),
        ("red", "blue"),
        {},
    ),
    "v18_polygon_roboflow": (
        both(
            side_by_side, replace("*/*.xml", "</object>", "<polygon><x1>1</x1></polygon></object>")
        ),
        ("red", "blue"),
        {},
    ),
    "v21_filename_of_other": (
        names_rotated,
        ("red", "blue"),
        {"XML files whose <filename> names another image": 5},
    ),
    "v23_difficult_word": (
        replace("Annotations/t*.xml", "<difficult>0", "<difficult>Unspecified"),
        ("red", "blue"),
        {"<difficult> that is neither 0 nor 1": 6},
    ),
    "voc, difficult as a truth value": (
        replace("Annotations/t*.xml", "<difficult>0", "<difficult>False"),
        ("red", "blue"),
        {},
    ),
    "a class list of another order beside the YAML file": (
        put("labels/classes.txt", "blue\nred"),
        ("red", "blue"),
        {"class lists that differ from the one used": 1},
    ),
    "classes that begin with a number": (
        both(
            lambda root: (root / "data.yaml").unlink(),
            put("classes.txt", "2 wheels\n4 wheels\n"),
        ),
        ("2 wheels", "4 wheels"),
        {},
    ),
    "voc, an object twice": (
        replace(XML, "</annotation>", xml_object("blue", BLUE) + "</annotation>"),
        ("red", "blue"),
        {"objects that occur twice in a file": 5},
    ),
    "v27_root_tag": (
        both(replace(XML, "annotation>", "Annotation>")),
        ("red", "blue"),
        {},
    ),
    "v28_upper_ext_dirs": (rename("JPEGImages/*.png", ".png", ".PNG"), ("red", "blue"), {}),
    "only <filename> leads to the image": (
        both(
            rename("Annotations/t0.xml", "t0", "other"),
            put("ImageSets/Main/train.txt", "other\nt1\nt2"),
        ),
        ("red", "blue"),
        {"XML files paired by <filename>": 1},
    ),
    "one folder inside VOCdevkit": (
        both(
            rename("JPEGImages", "JPEG", "VOC2007/JPEG"),
            rename("Annotations", "Anno", "VOC2007/Anno"),
            rename("ImageSets", "Image", "VOC2007/Image"),
        ),
        ("red", "blue"),
        {"a single VOC folder below": 1},
    ),
    "y01_list_of_folders": (list_of_folders, ("red", "blue"), {}),
    "y01 lists of files": (lists_of_files, ("red", "blue"), {}),
    "y05_extra_column_conf": (
        per_line(lambda line: line + " 0.87"),
        ("red", "blue"),
        {"label lines with a confidence": 10},
    ),
    "y07_float_class": (per_line(lambda line: line.replace(" ", ".0 ", 1)), ("red", "blue"), {}),
    "y10_abs_path": (
        yaml_of("[red, blue]", "path: /home/me/cells\ntrain: images/train\nval: images/val\n"),
        ("red", "blue"),
        {"paths in the YAML file that are not here": 1},
    ),
    "y11_windows_path": (
        yaml_of("[red, blue]", "path: C:\\me\\cells\ntrain: images\\train\nval: images\\val\n"),
        ("red", "blue"),
        {"paths in the YAML file that are not here": 1, "paths with a backslash": 3},
    ),
    "y13_bmp": (
        resave("images/*/*.png", ".bmp"),
        ("red", "blue"),
        {"image files in a slow format": 5},
    ),
    "y14_roboflow": (roboflow, ("red", "blue"), {}),
    "y15_two_yaml": (put("hyp.yaml", "lr0: 0.01\n"), ("red", "blue"), {}),
    "y16_comma_name": (yaml_of("['red, dark', \"blue's\"]"), (COMMA, "blue's"), {}),
    "y18_duplicate_lines": (
        in_files(LABELS, lambda text: text + text.splitlines()[0] + "\n"),
        ("red", "blue"),
        {"label lines that occur twice in a file": 5},
    ),
    "y19_tabs_commas": (
        in_files(LABELS, lambda text: text.replace(" ", "\t").replace("\n", "  \r\n")),
        ("red", "blue"),
        {},
    ),
    "y21_names_txt_only": (classes_txt, ("red", "blue"), {}),
    "y23_upper_ext": (rename("images/*/*.png", ".png", ".PNG"), ("red", "blue"), {}),
    "y24_numeric_names": (yaml_of("[0, 1]"), ("0", "1"), {}),
    "y25_readme_txt": (
        both(put("labels/train/notes.txt", "hello\n"), put("labels/train.cache", b"\0\1")),
        ("red", "blue"),
        {"label files without an image": 1},
    ),
    "y26_images_symlink": (images_linked, ("red", "blue"), {}),
    "a folder of images is a link": (
        both(
            rename("images/train", "images/train", "store"),
            lambda root: (root / "images" / "train").symlink_to(root / "store"),
            lambda root: (root / "store" / "loop").symlink_to(root / "store"),
            rename("images/val", "images/val", "valid/images/val"),
            rename("labels/val", "labels/val", "valid/labels/val"),
            yaml_of("[red, blue]", "train: images\nval: valid/images/val\n"),
        ),
        ("red", "blue"),
        {},
    ),
    "y29_split_first": (
        both(split_first, yaml_of("[red, blue]", "train: train\nval: val\n")),
        ("red", "blue"),
        {},
    ),
    "y30_test_split": (
        yaml_of("[red, blue]", "train: images/train\nval: images/val\ntest: images/test\n"),
        ("red", "blue"),
        {},
    ),
    "test is evaluated on where val is missing": (
        yaml_of("[red, blue]", "train: images/train\ntest: images/val\n"),
        ("red", "blue"),
        {"no val in the YAML file": 1},
    ),
    "y36_name_comma_block": (yaml_of("\n  - red, dark\n  - blue"), (COMMA, "blue"), {}),
    "y38_name_hash": (yaml_of("['item #1', 'part #2']"), ("item #1", "part #2"), {}),
    "y39_names_multiline": (yaml_of("['red',\n        'blue']\nnc: 2"), ("red", "blue"), {}),
    "y41_names_flow_dict": (yaml_of("{1: blue, 0: red}"), ("red", "blue"), {}),
    "y42_unindented_comment": (
        yaml_of("\n# classes\n- red\n- blue\n\n# end\nextra: 1"),
        ("red", "blue"),
        {},
    ),
    "y45_names_yes_no": (
        yaml_of("\n  0: no_helmet\n  1: helmet\nnames_fr: [a]"),
        ("no_helmet", "helmet"),
        {},
    ),
    "names with brackets, quotes and a colon": (
        yaml_of('[\'bolt [M8]\', "3\\" pipe: long"]'),
        ("bolt [M8]", '3" pipe: long'),
        {},
    ),
    "y46_commas": (in_files(LABELS, lambda text: text.replace(" ", ", ")), ("red", "blue"), {}),
    "y47_quoted_path": (
        yaml_of("[red, blue]", "path: '.'\ntrain: \"images/train\"  # 3\nval: 'images/val/'\n"),
        ("red", "blue"),
        {},
    ),
    "y48_jpeg_dot_in_name": (
        both(
            rename("images/*/*.png", ".png", ".rf.0abc.png"),
            rename(LABELS, ".txt", ".rf.0abc.txt"),
        ),
        ("red", "blue"),
        {},
    ),
    "VOC, BOM and CRLF": (
        both(
            in_files(XML, lambda t: t.replace("\n", "\r\n"), "utf-8-sig"),
            in_files("ImageSets/Main/*.txt", lambda t: t.replace("\n", "\r\n"), "utf-8-sig"),
        ),
        ("red", "blue"),
        {},
    ),
    "VOC, .XML": (rename(XML, ".xml", ".XML"), ("red", "blue"), {}),
    "VOC, .XML in folders": (
        both(side_by_side, rename("*/*.xml", ".xml", ".XML")),
        ("red", "blue"),
        {},
    ),
    "VOC, a list with suffix .xml and folders": (
        put("ImageSets/Main/train.txt", "Annotations/t0.xml\nJPEGImages\\t1.png\n./t2\n"),
        ("red", "blue"),
        {},
    ),
    "VOC, a folder of each split below images/ and annotations/": (
        both(
            rename("JPEGImages/t*", "JPEGImages", "images/train"),
            rename("JPEGImages/v*", "JPEGImages", "images/val"),
            rename("Annotations/t*", "Annotations", "annotations/train"),
            rename("Annotations/v*", "Annotations", "annotations/val"),
            lambda root: shutil.rmtree(root / "ImageSets"),
        ),
        ("red", "blue"),
        {},
    ),
    "VOC, lists of single classes beside folders": (
        both(in_split_folders, put("ImageSets/Main/red_train.txt", "t0 1\n")),
        ("red", "blue"),
        {},
    ),
    "VOC, <filename> is a path of Windows": (
        replace(XML, "<filename>", "<filename>C:\\me\\"),
        ("red", "blue"),
        {},
    ),
    "VOC, hidden files of macOS and Jupyter": (
        both(
            in_split_folders,
            put("train/images/._t1.png", "x"),
            put("train/annotations/._t1.xml", "x"),
            put("train/images/.ipynb_checkpoints/t1.png", "x"),
        ),
        ("red", "blue"),
        {},
    ),
    "BOM and CRLF": (
        both(
            in_files(LABELS, lambda t: t.replace("\n", "\r\n"), "utf-8-sig"),
            in_files("data.yaml", lambda t: t.replace("\n", "\r\n"), "utf-8-sig"),
        ),
        ("red", "blue"),
        {},
    ),
    "BOM and CRLF in classes.txt": (
        both(classes_txt, in_files("classes.txt", lambda t: t.replace("\n", "\r\n"), "utf-8-sig")),
        ("red", "blue"),
        {},
    ),
    ".TXT": (rename(LABELS, ".txt", ".TXT"), ("red", "blue"), {}),
    "folders below images/train": (
        both(
            rename("images/train/t2.png", "train", "train/a/b"),
            rename("labels/train/t2.txt", "train", "train/a/b"),
        ),
        ("red", "blue"),
        {},
    ),
    "data.yaml in a folder of its own": (
        both(
            rename("data.yaml", "data", "config/data"),
            yaml_of("[red, blue]", "train: ../images/train\nval: ../images/val\n"),
            rename("data.yaml", "data", "config/data"),
            lambda root: (root / "data.yaml").symlink_to("config/data.yaml"),
        ),
        ("red", "blue"),
        {},
    ),
    "labels are links": (
        both(
            rename(LABELS, "labels", "blobs"),
            lambda root: [
                write_link(root / "labels" / p.parent.name / p.name, p)
                for p in root.glob("blobs/*/*")
            ],
        ),
        ("red", "blue"),
        {},
    ),
    "the key validation": (
        yaml_of("[red, blue]", "train: images/train\nvalidation: images/val\ntest: images/test\n"),
        ("red", "blue"),
        {"no val in the YAML file": 1},
    ),
    "hidden files of macOS": (
        both(put("images/train/._t1.png", "x"), put("labels/train/._t1.txt", "x")),
        ("red", "blue"),
        {},
    ),
    "keypoints behind the box": (
        both(
            per_line(lambda line: line + " 0.1 0.2 2 0.3 0.4 1"),
            yaml_of("[red, blue]\nkpt_shape: [2, 3]"),
        ),
        ("red", "blue"),
        {"label lines with keypoints": 10},
    ),
}


def write_link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def layout_of(case: str, edit: Edit, tmp_path: Path) -> tuple[str, Path]:
    layout = "voc" if case.startswith(("v", "one", "only", "VOC")) else "yolo"
    root = {"voc": voc, "yolo": yolo}[layout](tmp_path / "data")
    edit(root)
    return layout, root


@pytest.mark.parametrize("case", USED)
def test_unambiguous_folders_are_used_with_a_count(case: str, tmp_path: Path) -> None:
    edit, names, counts = USED[case]
    boxes, findings = read(*layout_of(case, edit, tmp_path))
    require_right_boxes(boxes, names)
    assert warned(findings) == counts


def test_a_list_default_is_that_of_train(tmp_path: Path) -> None:
    """As CVAT calls the list of a task that has no subsets."""
    root = voc(tmp_path / "data")
    shutil.rmtree(root / "ImageSets")
    write(root / "ImageSets/Main/default.txt", "t0\nv3")
    layout = conversion.find("voc", root)
    assert layout.splits.keys() == {"train"}
    assert [sample.image.stem for sample in layout.read(layout.splits["train"])] == ["t0", "v3"]
    (finding,) = layout.splits["train"].findings.as_list()
    assert str(finding) == (
        "warning: no lists train and val: ImageSets/Main/default.txt (others are used)"
    )


def test_yolo_labels_beside_their_images_are_used_as_labelimg_writes_them(tmp_path: Path) -> None:
    root = tmp_path / "flat"
    for i in range(3):
        save(root / f"t{i}.png", i)
        write(root / f"t{i}.txt", label(i))
    write(root / "classes.txt", "red\nblue\n")
    assert convert.main(["yolo", str(root), str(tmp_path / "made"), "--val-share", "0.4"]) == 0
    boxes = coco_boxes(tmp_path / "made" / "annotations")
    assert boxes == {f"t{i}.png": [("red", red(i)), ("blue", BLUE)] for i in range(3)}


def coco_boxes(folder: Path) -> dict[str, list[Any]]:
    """Return boxes as (name, box) by image of both files of a converted folder."""
    boxes: dict[str, list[Any]] = {}
    for split in labelled.SPLITS:
        annotations, _ = coco_json.read_annotations(folder / f"instances_{split}2017.json")
        names = [annotations.categories[i][1] for i in annotations.category_index]
        rows = list(zip(names, annotations.boxes_xywh.round(3).tolist(), strict=True))
        for i in range(len(annotations)):
            of_image = rows[annotations.offsets[i] : annotations.offsets[i + 1]]
            boxes[annotations.file_name(i)] = of_image
    return boxes


def test_a_label_file_in_the_other_form_of_unicode_belongs_to_its_image(tmp_path: Path) -> None:
    root = yolo(tmp_path / "data")
    (root / "images/train/t1.png").rename(root / "images/train/caf\u00e9.png")
    (root / LINE).rename(root / "labels/train/cafe\u0301.txt")
    boxes, findings = read("yolo", root)
    assert boxes["train"]["caf\u00e9.png"] == [("red", red(1)), ("blue", BLUE)]
    assert findings == []


@pytest.mark.parametrize(
    "file, images",
    [("labels.json", "data"), ("annotations/instances_default.json", "images/default")],
    ids=["FiftyOne", "CVAT"],
)
def test_coco_images_are_found_where_tools_put_them(file: str, images: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for i in range(3):
        save(root / images / f"{i}.png", i)
    rows = [{"id": i, "file_name": f"{i}.png", "width": 120, "height": 90} for i in range(3)]
    boxes = [
        {"id": i + 1, "image_id": i, "category_id": 1, "bbox": red(i), "iscrowd": 0, "area": 9}
        for i in range(3)
    ]
    categories = [{"id": 1, "name": "red"}]
    document = {"images": rows, "annotations": boxes, "categories": categories}
    write(root / file, json.dumps(document))
    assert convert.main(["coco", str(root), str(tmp_path / "made")]) == 0
    made = coco_boxes(tmp_path / "made" / "annotations")
    assert made == {f"{i}.png": [("red", red(i))] for i in range(3)}


def test_true_means_difficult(tmp_path: Path) -> None:
    root = voc(tmp_path / "data")
    replace("Annotations/t1.xml", "<difficult>0", "<difficult>True")(root)
    document = json.loads(conversion.coco_paths("voc", root)["train_annotations"].read_text())
    assert [row["iscrowd"] for row in document["annotations"]] == [0, 0, 1, 1, 0, 0]


def test_coco_test_is_used_where_there_is_no_val(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Roboflow exports a set without a validation split; macOS adds a hidden file."""
    root = tmp_path / "data"
    for split, numbers in (("train", range(3)), ("test", range(3, 5))):
        for i in numbers:
            save(root / split / f"{i}.png", i)
        images = [{"id": i, "file_name": f"{i}.png", "width": 120, "height": 90} for i in numbers]
        boxes = [
            {"id": i + 1, "image_id": i, "category_id": 1, "bbox": red(i), "iscrowd": 0, "area": 9}
            for i in numbers
        ]
        document = {
            "images": images,
            "annotations": boxes,
            "categories": [{"id": 1, "name": "red"}],
        }
        write(root / split / "_annotations.coco.json", json.dumps(document))
        write(root / split / "._annotations.coco.json", b"\0")
    assert convert.main(["coco", str(root), str(tmp_path / "made")]) == 0
    assert sorted(p.name for p in (tmp_path / "made/val2017").iterdir()) == ["3.png", "4.png"]
    assert "data: warning: no val (test is used)" in caplog.messages


LINE = "labels/train/t1.txt"
# case: the edit, the boxes of t1, and the warnings with their counts.
CHANGED: dict[str, tuple[Edit, list[Any], dict[str, int]]] = {
    "v03_float": (
        replace("Annotations/t1.xml", "<xmin>12<", "<xmin>11.7<"),
        [("red", [10.7, 11, 40.3, 30]), ("blue", BLUE)],
        {},
    ),
    "v17_zero_based": (
        in_files("Annotations/t1.xml", lambda t: t.replace("<xmin>12<", "<xmin>0<")),
        [("red", [0, 11, 51, 30]), ("blue", BLUE)],
        {"boxes over the border of their image": 1},
    ),
    "y03_polygons": (
        put(LINE, "0 0.1 0.2 0.4 0.1 0.4 0.5 0.15 0.6\n" + label(1).splitlines()[1]),
        [("red", [12, 9, 36, 45]), ("blue", BLUE)],
        {"polygons": 1},
    ),
    "y08_slightly_out": (
        put(LINE, "0 0.98 0.5 0.1 0.2\n1 1.002 0.5 0.004 0.1\n"),
        [("red", [111.6, 36, 8.4, 18])],
        {"boxes over the border of their image": 1, "boxes outside of their image": 1},
    ),
    "y32_box_touch": (
        put(LINE, "0 0.5 0.5 1.0004 1.0004\n"),
        [("red", [0, 0, 120, 90])],
        {"boxes over the border of their image": 1},
    ),
    "y33_w_1.002": (
        put(LINE, "0 0.5 0.5 1.002 0.5\n"),
        [("red", [0, 22.5, 120, 45])],
        {"boxes over the border of their image": 1},
    ),
    "y34_neg": (
        put(LINE, "0 -0.002 0.5 0.1 0.1\n"),
        [("red", [0, 40.5, 5.76, 9])],
        {"boxes over the border of their image": 1},
    ),
    "y35_zero_w": (
        put(LINE, "0 0.5 0.5 0 0.1\n" + label(1).splitlines()[1]),
        [("blue", BLUE)],
        {"label lines without width or height": 1},
    ),
    "an image without a label file": (
        lambda root: (root / LINE).unlink(),
        [],
        {"images without a label file": 1},
    ),
    "an empty label file is an image without objects": (put(LINE, ""), [], {}),
    "six decimals at the border are no finding": (
        put(LINE, "0 0.625001 0.611112 0.750001 0.777778\n"),
        [("red", [30.0, 20.0, 90.0, 70.0])],
        {},
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_boxes_that_are_changed_are_counted(case: str, tmp_path: Path) -> None:
    edit, expected, counts = CHANGED[case]
    boxes, findings = read(*layout_of(case, edit, tmp_path))
    actual = boxes["train"]["t1.png"]
    assert [name for name, _ in actual] == [name for name, _ in expected]
    for (_, box), (_, right) in zip(actual, expected, strict=True):
        np.testing.assert_allclose(box, right, rtol=0, atol=2e-3)
    assert warned(findings) == counts


def two_voc_folders(root: Path) -> None:
    for name in ("VOC2007", "VOC2012"):
        voc(root / name)
    for name in ("JPEGImages", "Annotations", "ImageSets"):
        shutil.rmtree(root / name)


# case: the edit, and the parts of the message.
REFUSED: dict[str, tuple[Edit, list[str]]] = {
    "v08_utf8_declared_wrong": (
        in_files(
            "Annotations/t1.xml",
            lambda t: (
                '<?xml version="1.0" encoding="utf-8"?>\n' + t.replace(TEXT, "<name>é</name>")
            ),
            "latin-1",
        ),
        [r"Annotations/t1\.xml byte \d+ is not utf-8", "encoding they declare"],
    ),
    "v09_kaggle_flat": (
        both(
            lambda root: shutil.rmtree(root / "ImageSets"),
            rename("JPEGImages", "JPEGImages", "images"),
            rename("Annotations", "Annotations", "annotations"),
        ),
        [r"python -m tools\.convert voc \S+/data NEW_FOLDER --val-share 0\.2"],
    ),
    "v14_swapped": (
        in_files("Annotations/t1.xml", lambda t: t.replace("<xmin>71", "<xmin>171")),
        [r"Annotations/t1\.xml:3 'blue' xmin 171 is above xmax 100"],
    ),
    "v19_no_bndbox": (
        replace("Annotations/t1.xml", "bndbox", "robndbox"),
        [r"objects that cannot be read.*Annotations/t1\.xml:2 'red' has no <bndbox>"],
    ),
    "v24_no_name": (
        replace("Annotations/t1.xml", TEXT, ""),
        [r"Annotations/t1\.xml:2 has no <name>"],
    ),
    "v26_devkit": (two_voc_folders, [r"\S+/data/VOC2007, \S+/data/VOC2012"]),
    "voc, cut short": (
        in_files("Annotations/t1.xml", lambda t: t[:-40]),
        [r"Annotations/t1\.xml no element"],
    ),
    "voc, a corner is text": (
        replace("Annotations/t1.xml", "<xmin>71<", "<xmin>wide<"),
        [r"t1\.xml:3 'blue' <xmin> is 'wide'"],
    ),
    "voc, a corner is nan": (
        replace("Annotations/t1.xml", "<xmin>71<", "<xmin>nan<"),
        [r"t1\.xml:3 'blue' <xmin> is 'nan'"],
    ),
    "voc, two boxes in an object": (
        replace("Annotations/t1.xml", "</object>\n", "<bndbox></bndbox></object>\n"),
        [r"objects that cannot be read.*t1\.xml:2 'red' has 2 <bndbox>"],
    ),
    "voc, two names in an object": (
        replace("Annotations/t1.xml", TEXT, TEXT + "<name>dog</name>"),
        [r"t1\.xml:2 'red' has 2 <name>"],
    ),
    "voc, a rotated box": (
        replace("Annotations/t1.xml", "bndbox>", "robndbox>"),
        [r"t1\.xml:2 'red' has no <bndbox>, but <robndbox>"],
    ),
    "voc, two names in a line of a list": (
        put("ImageSets/Main/train.txt", "t0\nt1 t2"),
        [r"list lines that name several images: ImageSets/Main/train\.txt:2 t1 t2"],
    ),
    "voc, an empty list": (
        put("ImageSets/Main/val.txt", ""),
        [r"ImageSets/Main/val\.txt names no image"],
    ),
    "a broken link": (
        lambda root: (root / "images/train/x.png").symlink_to("/nowhere/x.png"),
        [r"image files missing: images/train/x\.png is missing"],
    ),
    "an empty image": (
        put("images/train/t1.png", b""),
        [r"image files that are damaged: images/train/t1\.png is empty"],
    ),
    "two class lists": (
        both(
            lambda root: (root / "data.yaml").unlink(),
            put("classes.txt", "red\nblue"),
            put("labels/classes.txt", "blue\nred"),
        ),
        [r"data/classes\.txt and \S+/labels/classes\.txt name different classes; keep the right"],
    ),
    **{
        f"classes.txt, {name}": (
            both(lambda root: (root / "data.yaml").unlink(), put("classes.txt", text)),
            [message],
        )
        for name, text, message in [
            (
                "a comment",
                "# classes\nred\nblue",
                r"classes\.txt:1 '# classes' is no name",
            ),
            ("a blank line", "red\n\nblue", r"classes\.txt:2 is blank; write one name a line"),
            ("one line", "red,blue", r"classes\.txt:1 'red,blue' is no name of a class"),
            ("numbers", "0 red\n1 blue", r"classes\.txt:1 '0 red' is no name of a class"),
        ]
    },
    "names with a gap": (
        yaml_of("{0: red, 2: blue}"),
        ["numbered with gaps; number them 0, 1"],
    ),
    "voc, another size": (
        replace("Annotations/t1.xml", "<width>120", "<width>240"),
        ["another size than in their XML.*t1.png is 120 x 90, not 240 x 90"],
    ),
    "voc, swapped size": (
        in_files(
            XML,
            lambda t: t.replace(">120<", ">91<").replace(">90<", ">120<").replace(">91<", ">90<"),
        ),
        [r"another size than in their XML.*is 120 x 90, not 90 x 120 \(swapped\)"],
    ),
    "voc, XML without an image": (
        lambda root: (root / "JPEGImages/t1.png").unlink(),
        [r"XML files without an image: Annotations/t1\.xml \('t1\.png'\)"],
    ),
    "voc, no image folder": (
        lambda root: shutil.rmtree(root / "JPEGImages"),
        [r"no images in \S+/data; put them there, or, beside Annotations/, in JPEGImages/"],
    ),
    "voc, a corner is missing": (
        replace("Annotations/t1.xml", "<xmin>71</xmin>", ""),
        [r"t1\.xml:3 'blue' <xmin> is empty or missing"],
    ),
    "voc, two images of one name": (
        both(
            lambda root: save(root / "JPEGImages/t1.jpg", 1),
            replace("Annotations/t1.xml", "t1.png", "t1"),
        ),
        ["several images of their name.*Annotations/t1.xml"],
    ),
    "voc, a file of another tool": (
        put("Annotations/t1.xml", "<annotations><image id='1'/></annotations>"),
        ["its root is <annotations>, not <annotation>"],
    ),
    "voc, listed and not there": (
        put("ImageSets/Main/train.txt", "t0\nlost"),
        [r"a list names and that are missing.*Annotations/lost\.xml"],
    ),
    "voc, nothing": (lambda root: shutil.rmtree(root / "Annotations"), [r"missing.*t0\.xml"]),
    "y04_class_out_of_range": (
        put(LINE, label(1) + "2 0.5 0.5 0.1 0.1\n"),
        [r"labels/train/t1\.txt:3 class 2 of 2", "count from 0"],
    ),
    "y09_no_val": (
        yaml_of("[red, blue]", "train: images/train\n"),
        [r"python -m tools\.convert yolo \S+/data NEW_FOLDER --val-share 0\.2"],
    ),
    "y12_names_from_1": (
        yaml_of("\n  1: red\n  2: blue"),
        ["numbered from 1; label files count from 0"],
    ),
    "y20_pixels": (
        put(LINE, "0 30 25 40 30\n"),
        [r"not shares of their image.*labels/train/t1\.txt:1 \[30.*pixels\? divide"],
    ),
    "y22_anchor_names": (
        yaml_of("\n- red: dark\n- blue"),
        [r"data\.yaml:4: name 0 is read as \{'red': 'dark'\}"],
    ),
    "y27_labels_elsewhere": (
        rename("labels", "labels", "annotations"),
        [r"no label file for any of 3 images; looked in \S+/data/labels/train"],
    ),
    "Images with a capital": (
        both(
            rename("images", "images", "Images"),
            yaml_of("[red, blue]", "train: Images/train\nval: Images/val\n"),
        ),
        [r"looked in \S+/data/Images/train"],
    ),
    "a name that YAML reads as a truth value": (
        yaml_of("[yes, no]"),
        ["name 0 is read as True, no text; quote it"],
    ),
    "names twice": (yaml_of("[red, red]"), ["the name 'red' occurs twice"]),
    "a key twice": (yaml_of("[red, blue]\nnames: [blue, red]"), ["gives 'names' twice"]),
    "a number twice": (yaml_of("{0: red, 0: blue}"), ["gives '0' twice"]),
    "nc disagrees": (yaml_of("[red, blue]\nnc: 3"), ["nc is 3, but there are 2 names"]),
    "no YAML": (yaml_of("[red, blue"), [r"data\.yaml:\d+ is no YAML"]),
    "YAML in UTF-16": (in_files("data.yaml", str, "utf-16"), ["is not UTF-8 at byte 0"]),
    "two YAML files without data.yaml": (
        both(rename("data.yaml", "data", "a"), put("b.yaml", "x: 1")),
        [r"2 YAML files and no data\.yaml.*--data-path \S+/a\.yaml"],
    ),
    "a folder that is not there": (
        yaml_of("[red, blue]", "train: images/nowhere\nval: images/val\n"),
        ["train: 'images/nowhere' is not in .*/data; correct it: .*/data has images, labels"],
    ),
    "decimal commas": (
        in_files(LINE, lambda text: text.replace(".", ",")),
        [r"label lines that cannot be read.*t1\.txt:1 '0 0,2"],
    ),
    "four numbers": (put(LINE, "0 0.5 0.5 0.5"), [r"t1\.txt:1 4 numbers"]),
    "a number is text": (put(LINE, "0 0.5 wide 0.5 0.5"), [r"t1\.txt:1 '0 0.5 wide 0.5 0.5'"]),
    "nan": (put(LINE, "0 0.5 nan 0.5 0.5"), [r"t1\.txt:1 '0 0.5 nan"]),
    "a class is text": (put(LINE, "red 0.5 0.5 0.5 0.4"), [r"t1\.txt:1 'red 0.5"]),
    "half a class": (put(LINE, "0.5 0.5 0.5 0.5 0.4"), [r"t1\.txt:1 class 0\.5 of 2"]),
    "labels in UTF-16": (
        in_files(LINE, str, "utf-16"),
        [r"label files.*train/t1\.txt is not UTF-8 at byte 0 \(write them again"],
    ),
    "an image that is none": (
        put("images/train/t1.png", "text"),
        ["images/train/t1.png is no JPEG, PNG, WebP, BMP, TIFF or GIF"],
    ),
    "an image of another format": (
        put("images/train/x.heic", "text"),
        [r"of another format.*images/train/x\.heic.*magick"],
    ),
    "a label file is a link to nothing": (
        both(lambda root: (root / LINE).unlink(), lambda root: (root / LINE).symlink_to("lost")),
        [r"label files that cannot be read: labels/train/t1\.txt is missing, or no regular file"],
    ),
    "a label line with a track id": (
        put(LINE, "0 0.5 0.5 0.5 0.4 7\n"),
        [r"label lines that cannot be read: labels/train/t1\.txt:1 6 numbers"],
    ),
    "names that YAML reads as decimals": (yaml_of("[1.0, 2.0]"), ["name 0 is read as 1.0"]),
    "no YAML file and no classes.txt": (
        lambda root: (root / "data.yaml").unlink(),
        ["has no YAML file; give the folder with data.yaml"],
    ),
    "images share a label file": (
        lambda root: save(root / "images/train/t1.jpg", 1),
        [r"share a label file.*t1\.jpg"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ambiguous_folders_are_refused_with_file_and_fix(case: str, tmp_path: Path) -> None:
    edit, patterns = REFUSED[case]
    layout, root = layout_of(case, edit, tmp_path)
    with pytest.raises(UserError) as caught:
        read(layout, root)
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.json"))  # nothing half-made is left to be used


PIPES = {
    "voc": ["Annotations/t1.xml", "ImageSets/Main/train.txt", "JPEGImages/t1.png"],
    "yolo": [LINE, "data.yaml", "train.txt", "images/train/t1.png"],
    "classes": [LINE, "classes.txt"],
}


@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
@pytest.mark.parametrize(
    "layout, file", [(k, file) for k, files in PIPES.items() for file in files]
)
def test_pipes_and_devices_are_not_opened(
    layout: str, file: str, target: str, tmp_path: Path
) -> None:
    root = (voc if layout == "voc" else yolo)(tmp_path / "data")
    if layout == "classes":
        classes_txt(root)
    if file == "train.txt":
        lists_of_files(root)
    (root / file).unlink()
    if target == "pipe":
        os.mkfifo(root / file)
    else:
        (root / file).symlink_to(target)
    if file.startswith("images"):
        boxes, findings = read("yolo", root)
        assert "t1.png" not in boxes["train"] and warned(findings) == {
            "label files without an image": 1
        }
        return
    with pytest.raises(UserError) as caught:
        read("voc" if layout == "voc" else "yolo", root)
    assert Path(file).stem in str(caught.value) or "has no YAML file" in str(caught.value)


def test_all_errors_of_both_splits_are_listed_at_once(tmp_path: Path) -> None:
    root = yolo(tmp_path / "data")
    write(root / LINE, "7 0.5 0.5 0.5 0.4\n0 30 25 40 30\n")
    write(root / "labels/val/v3.txt", "0 0.5\n")
    with pytest.raises(UserError) as caught:
        conversion.coco_paths("yolo", root)
    text = str(caught.value)
    assert "t1.txt:1 class 7" in text and "t1.txt:2 [30" in text and "v3.txt:1 2 numbers" in text


LOOK_LIKE = {
    "centre": [],
    "corners": [
        "boxes that look like x1 y1 x2 y2: 9 of 20 leave the image as x y w h, 0 as corners "
        "(are they? look: check_data --plot)"
    ],
    "corner": [
        "boxes whose x and y look like a corner: 3 of 20 leave the image around a centre, 0 from a "
        "corner (read as the centre; look: check_data --plot)"
    ],
}


@pytest.mark.parametrize("kind", LOOK_LIKE)
def test_yolo_boxes_that_are_no_centre_and_size_are_detected_by_statistics(
    kind: str, tmp_path: Path
) -> None:
    lines = []
    for i in range(20):
        x, y, w, h = 0.02 + 0.03 * i, 0.05 + 0.02 * i, 0.1 + 0.01 * (i % 5), 0.24
        values = {
            "centre": (x + w / 2, y + h / 2, w, h),
            "corners": (x, y, x + w, y + h),
            "corner": (x, y, w, h),
        }
        lines.append(f"{i % 2} " + " ".join(f"{value:.6f}" for value in values[kind]))
    root = yolo(tmp_path / "data")
    in_files("labels/*/*.txt", lambda text: "")(root)
    write(root / LINE, "\n".join(lines) + "\n")
    findings = [str(f) for f in read("yolo", root)[1] if "look like" in f.what]
    assert findings == [f"warning: {text}" for text in LOOK_LIKE[kind]]


def test_the_yaml_file_itself_is_a_data_path(tmp_path: Path) -> None:
    root = yolo(tmp_path / "data")
    write(root / "other.yaml", yaml_text("[dark, light]"))
    require_right_boxes(read("yolo", root)[0])
    require_right_boxes(read("yolo", root / "other.yaml")[0], ("dark", "light"))


# --- EXIF -----------------------------------------------------------------------------------------


def turned_back(image: Image.Image, orientation: int) -> tuple[Image.Image, Image.Exif]:
    """Return the pixels that a viewer shows as `image` with the EXIF orientation."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transpositions, inverted
    exif = Image.Exif()
    exif[0x0112] = orientation
    if orientation == 1:
        return image, exif
    stored = image.transpose(Image.Transpose(back[orientation]))
    shown = stored.copy()
    shown.getexif()[0x0112] = orientation
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(shown)), np.asarray(image))
    return stored, exif


def is_red(pixels: np.ndarray) -> np.ndarray:
    return (pixels[..., 0] > 200) & (pixels[..., 1:] < 60).all(axis=-1)


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
@pytest.mark.parametrize("size", [SIZE, (100, 100)])
def test_e01_yolo_boxes_lie_where_viewers_show_them(
    size: tuple[int, int], kind: str, tmp_path: Path
) -> None:
    root = yolo(tmp_path / "data")
    for path in [*root.glob("images/*/*"), *root.glob("labels/*/*")]:
        path.unlink()
    x, y, w, h = red(1)
    shares = [(x + w / 2) / size[0], (y + h / 2) / size[1], w / size[0], h / size[1]]
    for orientation in range(1, 9):
        image, exif = turned_back(picture(1, size, with_blue=False), orientation)
        for split in SPLITS:
            options = {"lossless": True} if kind == "webp" else {}
            image.save(root / "images" / split / f"o{orientation}.{kind}", exif=exif, **options)
            write(
                root / "labels" / split / f"o{orientation}.txt", f"0 {' '.join(map(str, shares))}"
            )
    paths = conversion.coco_paths("yolo", root)
    annotations, _ = coco_json.read_annotations(paths["train_annotations"])
    assert len(annotations) == 8
    (rule,) = (rule for rule in coco_rules.RULES if "turned by EXIF" in rule)
    counts = {f.what: f.count for f in conversion.read_origin(paths["train_annotations"])[1]}
    assert counts.get(rule, 0) == (0 if kind == "tiff" else 7)  # PIL turns TIFF by itself
    np.testing.assert_allclose(annotations.boxes_xywh, [red(1)] * 8)
    for i in range(8):
        file, folder = annotations.file_name(i), paths["train_images"]
        pixels = image_files.read_image(folder / file, folder, tuple(annotations.sizes[i].tolist()))
        rows, columns = np.nonzero(is_red(pixels.permute(1, 2, 0).numpy()))
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert extent == [x, y, x + w, y + h], file


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("size", [SIZE, (100, 100)])
def test_voc_follows_the_size_and_warns_where_it_cannot_tell(
    size: tuple[int, int], orientation: int, tmp_path: Path
) -> None:
    root = voc(tmp_path / "data")
    image, exif = turned_back(picture(1, size), orientation)
    image.save(root / "JPEGImages" / "t1.png", exif=exif)
    is_clear = orientation >= 5 and size == SIZE
    for width, height, is_shown in ((*size, True), (*image.size, not is_clear)):
        path = root / "Annotations" / "t1.xml"
        text = re.sub(
            "<width>.*</height>",
            f"<width>{width}</width><height>{height}</height>",
            xml(1, "t1.png"),
        )
        write(path, text.replace(f"{SIZE}", ""))
        boxes, findings = read("voc", root)
        rule = "image files turned by EXIF, which their size cannot confirm"
        assert warned(findings).get(rule, 0) == (0 if is_clear else 1)
        folder = root / "JPEGImages"
        pixels = image_files.read_image(folder / "t1.png", folder, (height, width))
        right = picture(1, size) if is_shown else image
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(right))


# --- images ---------------------------------------------------------------------------------------


def encoded(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def of_16_bits() -> bytes:
    values = np.asarray(picture(1)).astype(np.uint16)[..., 0] * 257
    return encoded(Image.fromarray(values), format="TIFF")


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", SIZE, "green")]}
SLOW: dict[str, Callable[[], bytes]] = {
    "bmp": lambda: encoded(picture(1), format="BMP"),
    "gif": lambda: encoded(picture(1), format="GIF", **FRAMES),
    "tiff": lambda: encoded(picture(1), format="TIFF", compression="tiff_lzw"),
    "tiff, gray": lambda: encoded(picture(1).convert("L"), format="TIFF"),
    "tiff of two pages": lambda: encoded(picture(1), format="TIFF", **FRAMES),
    "i05_animated_webp": lambda: encoded(picture(1), format="WEBP", lossless=True, **FRAMES),
}


@pytest.mark.parametrize("kind", SLOW)
def test_slow_formats_are_read_by_pil_and_are_named(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "a", SLOW[kind]())
    expected = np.asarray(picture(1).convert("L" if "gray" in kind else "RGB").convert("RGB"))
    pixels = image_files.read_image(tmp_path / "a", tmp_path, (90, 120)).permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, expected)  # the first frame
    header = image_files.read_header(tmp_path / "a")
    assert header.is_slow and header.is_animated == (kind in ("gif", "i05_animated_webp"))


@pytest.mark.parametrize(
    "kind, is_animated", [("PNG", True), ("MPO", False)], ids=["an animated PNG", "two photographs"]
)
def test_first_frames_of_fast_formats_are_read(
    kind: str, is_animated: bool, tmp_path: Path
) -> None:
    """i01: torchvision decodes an MPO, a JPEG with a second photograph behind the first."""
    write(tmp_path / "a", encoded(picture(1), format=kind, **FRAMES))
    image = image_files.read_image(tmp_path / "a", tmp_path, (90, 120))
    difference = image.permute(1, 2, 0).numpy().astype(int) - np.asarray(picture(1))
    assert abs(difference).mean() < 4
    header = image_files.read_header(tmp_path / "a")
    assert (header.is_slow, header.is_animated) == (False, is_animated)


@pytest.mark.parametrize(
    "content, message",
    [
        (of_16_bits(), "has 16 bits per channel"),
        (encoded(picture(1), format="TIFF")[:-9999], "is damaged"),
        (encoded(picture(1), format="GIF")[:200], "is damaged"),
        (encoded(picture(1), format="JPEG2000"), "is no JPEG, PNG, WebP, BMP, TIFF or GIF"),
        (b"<!DOCTYPE html><html></html>", "is no JPEG, PNG, WebP, BMP, TIFF or GIF"),
    ],
)
def test_images_that_decoders_would_misread_are_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "a", content)
    with pytest.raises(image_files.ImageError, match=message) as caught:
        image_files.read_image(tmp_path / "a", tmp_path, (90, 120))
    assert caught.value.rule in coco_rules.RULES


def test_a_jpeg_of_hundreds_of_scans_is_refused_before_decoding(tmp_path: Path) -> None:
    content = encoded(picture(1), format="JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    write(tmp_path / "usual.jpg", content)
    write(tmp_path / "bomb.jpg", content[:start] + content[start:-2] * 300 + content[-2:])
    assert image_files.read_image(tmp_path / "usual.jpg", tmp_path, (90, 120)).shape == (3, 90, 120)
    with pytest.raises(image_files.ImageError, match="has 3\\d\\d scans"):
        image_files.read_image(tmp_path / "bomb.jpg", tmp_path, (90, 120))


# --- damage ---------------------------------------------------------------------------------------

DAMAGE = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def damaged(text: str) -> st.SearchStrategy[bytes]:
    """Cut, doubled or overwritten pieces of a text."""
    data = text.encode()
    position = st.integers(0, len(data) - 1)
    piece = st.one_of(
        st.binary(max_size=3),
        st.sampled_from([b"\n", b"'", b'"', b"<", b"&", b": ", b"- ", b"nan", b"0"]),
    )
    return st.builds(
        lambda a, n, p: data[:a] + p + data[a + n :], position, st.integers(0, 30), piece
    )


def values_in(content: bytes) -> set[float]:
    return {float(n) for n in re.findall(rb"-?\d+(?:\.\d*)?(?:e-?\d+)?", content)}


@DAMAGE
@given(content=damaged(label(1)))
def test_damaged_label_text_is_refused_or_read_literally(content: bytes, tmp_path: Path) -> None:
    root = tmp_path / "data"
    if not root.exists():
        yolo(root)
    write(root / LINE, content)
    try:
        boxes, _ = read("yolo", root)
    except UserError as error:
        assert "t1.txt" in str(error)
        return
    lines = [line for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    rows = [[float(v) for v in re.split(r"[\s,]+", line.strip().rstrip(","))] for line in lines]
    for name, (x, y, w, h) in boxes["train"]["t1.png"]:
        box = [x / 120, y / 90, (x + w) / 120, (y + h) / 90]
        same = [row for row in rows if int(row[0]) == ["red", "blue"].index(name)]
        assert any(box == pytest.approx(extent(row), abs=2e-5) for row in same), content


def extent(row: list[float]) -> list[float]:
    """Return the corners, as shares within 0 … 1, of a line's box or polygon."""
    x, y, w, h = row[1:5]
    corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
    if len(row) > 6:
        xs, ys = row[1::2], row[2::2]
        corners = [min(xs), min(ys), max(xs), max(ys)]
    return [min(max(share, 0), 1) for share in corners]


@DAMAGE
@given(content=damaged(xml(1, "t1.png")))
def test_damaged_xml_is_refused_or_read_literally(content: bytes, tmp_path: Path) -> None:
    root = tmp_path / "data"
    if not root.exists():
        voc(root)
    write(root / "Annotations/t1.xml", content)
    try:
        boxes, _ = read("voc", root)
    except UserError as error:
        assert "t1" in str(error)
        return
    values = values_in(content)
    for _, (x, y, w, h) in boxes["train"]["t1.png"]:
        for corner, limits in ((x + 1, (1,)), (y + 1, (1,)), (x + w, (120,)), (y + h, (90,))):
            assert corner in limits or any(abs(corner - v) < 2e-3 for v in values), content


@DAMAGE
@given(content=damaged(yaml_text("\n  0: 'red, dark'\n  1: blue #2")))
def test_damaged_yaml_is_refused_or_read_by_the_rules_of_yaml(
    content: bytes, tmp_path: Path
) -> None:
    import yaml

    root = tmp_path / "data"
    if not root.exists():
        yolo(root)
    write(root / "data.yaml", content)
    try:
        boxes, _ = read("yolo", root)
    except UserError:
        return
    names = yaml.safe_load(content.decode("utf-8-sig"))["names"]
    names = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names
    assert [name for name, _ in boxes["train"]["t1.png"]] == [str(name) for name in names[:2]]
    assert boxes["train"]["t1.png"][0][1] == pytest.approx(red(1), abs=2e-3)


# --- tools.convert --------------------------------------------------------------------------------


def converted(folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Return (name, box) by image of a folder that tools.convert wrote, having read the images."""
    boxes: dict[str, dict[str, list[Any]]] = {}
    for split in labelled.SPLITS:
        annotations, _ = coco_json.read_annotations(
            folder / f"annotations/instances_{split}2017.json"
        )
        boxes[split] = {}
        for i in range(len(annotations)):
            root, file = folder / f"{split}2017", annotations.file_name(i)
            image_files.read_image(root / file, root, tuple(annotations.sizes[i].tolist()))
            start, end = annotations.offsets[i : i + 2]
            names = [annotations.categories[k][1] for k in annotations.category_index[start:end]]
            rows = annotations.boxes_xywh[start:end].round(3).tolist()
            boxes[split][file] = list(zip(names, rows, strict=True))
    return boxes


def test_convert_keeps_the_split_of_each_layout(tmp_path: Path) -> None:
    convert.main(["voc", str(voc(tmp_path / "voc")), str(tmp_path / "a")])
    convert.main(["yolo", str(yolo(tmp_path / "yolo")), str(tmp_path / "b"), "--copy"])
    convert.main(["coco", str(tmp_path / "b"), str(tmp_path / "c")])
    for name in "abc":
        require_right_boxes(converted(tmp_path / name), ("red", "blue"))
    assert (tmp_path / "a/train2017/t0.png").is_symlink()
    assert not (tmp_path / "b/train2017/t0.png").is_symlink()
    with pytest.raises(UserError, match="exists already"):
        convert.main(["coco", str(tmp_path / "b"), str(tmp_path / "c")])


@pytest.mark.parametrize("layout", ["voc", "yolo"])
def test_convert_splits_by_the_lists_of_the_user(layout: str, tmp_path: Path) -> None:
    root = {"voc": voc, "yolo": yolo}[layout](tmp_path / "data")
    names = ["t0", "v3", "v4"], ["t1"]
    if layout == "yolo":
        folder = {"t": "images/train", "v": "images/val"}
        names = tuple([f"{folder[n[0]]}/{n}.png" for n in split] for split in names)
    write(root / "ImageSets/Main/mine.txt", "\n".join(names[0]))
    write(tmp_path / "held_out.txt", "\n".join(names[1]))
    lists = ["--train-list", "mine" if layout == "voc" else "ImageSets/Main/mine.txt"]
    command = [layout, str(root), str(tmp_path / "a"), *lists]
    convert.main([*command, "--val-list", str(tmp_path / "held_out.txt")])
    boxes = converted(tmp_path / "a")
    assert {split: sorted(rows) for split, rows in boxes.items()} == {
        "train": ["t0.png", "v3.png", "v4.png"]
        if layout == "voc"
        else ["train/t0.png", "val/v3.png", "val/v4.png"],
        "val": ["t1.png"],
    }
    assert boxes["val"]["t1.png"][1] == ("blue", BLUE)
    if layout == "voc":  # also where the VOC folder lies below
        (tmp_path / "devkit").mkdir()
        root.rename(tmp_path / "devkit" / "VOC2007")
        command[1:3] = str(tmp_path / "devkit"), str(tmp_path / "d")
        convert.main(command)
        root = tmp_path / "devkit"
    command[2] = str(tmp_path / "b")
    convert.main(command)  # draws val from the list
    assert [len(rows) for rows in converted(tmp_path / "b").values()] == [2, 1]
    with pytest.raises(UserError, match="--train-list is needed beside --val-list"):
        convert.main([layout, str(root), str(tmp_path / "c"), "--val-list", "mine"])
    with pytest.raises(UserError, match="nowhere"):
        convert.main([layout, str(root), str(tmp_path / "c"), "--train-list", "nowhere"])


@pytest.mark.parametrize("layout", ["voc", "yolo", "coco"])
def test_convert_draws_a_split_where_there_is_none(layout: str, tmp_path: Path) -> None:
    if layout == "voc":
        root = voc(tmp_path / "data")
        REFUSED["v09_kaggle_flat"][0](root)
    else:
        root = yolo(tmp_path / "data")
        classes_txt(root)
        for path in [*root.glob("images/*/*"), *root.glob("labels/*/*")]:
            path.rename(path.parent.parent / path.name)
        for path in [*root.glob("images/*/"), *root.glob("labels/*/")]:
            if path.is_dir():
                path.rmdir()
    if layout == "coco":
        rows = conversion.read(conversion.find("yolo", root), root)[0]["train"]
        document = conversion.as_coco(rows, root / "images", [(3, "red"), (7, "blue")])
        shutil.rmtree(root / "labels")
        write(root / "result.json", json.dumps(document))
    drawn = {}
    for seed in ("0", "0", "1", "2"):
        output = tmp_path / f"out{len(drawn)}"
        convert.main([layout, str(root), str(output), "--val-share", "0.4", "--seed", seed])
        boxes = converted(output)
        assert [len(boxes[split]) for split in ("train", "val")] == [3, 2]
        require_right_boxes(boxes, ("red", "blue"))
        drawn[output.name] = sorted(boxes["val"])
    assert drawn["out0"] == drawn["out1"] and len(set(map(tuple, drawn.values()))) > 1
    if layout == "coco":
        annotations, _ = coco_json.read_annotations(
            tmp_path / "out0/annotations/instances_val2017.json"
        )
        assert annotations.categories == ((3, "red"), (7, "blue"))  # ids stay


def test_convert_takes_coco_images_that_share_a_file(tmp_path: Path) -> None:
    """c51: one entry of `images` for each box."""
    convert.main(["yolo", str(yolo(tmp_path / "data")), str(tmp_path / "a")])
    for path in (tmp_path / "a" / "annotations").iterdir():
        document = json.loads(path.read_text())
        images = {image["id"]: image for image in document["images"]}
        boxes = document["annotations"]
        document["images"] = [images[box["image_id"]] | {"id": box["id"]} for box in boxes]
        document["annotations"] = [box | {"image_id": box["id"]} for box in boxes]
        path.write_text(json.dumps(document))
    for options in ([], ["--copy"]):
        output = tmp_path / f"out{len(options)}"
        convert.main(["coco", str(tmp_path / "a"), str(output), *options])
        document = json.loads((output / "annotations/instances_val2017.json").read_text())
        names = [image["file_name"] for image in document["images"]]
        assert names == ["v3.png", "v3.png", "v4.png", "v4.png"]
        boxes = [box["bbox"] for box in document["annotations"]]
        np.testing.assert_allclose(boxes, [red(3), BLUE, red(4), BLUE], rtol=0, atol=1e-3)


def test_frames_of_one_video_stay_together(tmp_path: Path) -> None:
    samples = [
        labelled.Sample(Path(f"/x/video{v}_{f}.jpg"), (90, 120)) for v in range(5) for f in range(4)
    ]
    for seed in range(5):
        drawn = convert.split_samples(samples, 0.3, seed, r"^(video\d)_")
        videos = {s: {r.image.name[:6] for r in rows} for s, rows in drawn.items()}
        assert not videos["train"] & videos["val"] and len(drawn["val"]) == 8
    with pytest.raises(
        UserError, match="does not match 20 of 20 file names, such as 'video0_0.jpg'"
    ):
        convert.split_samples(samples, 0.3, 0, "frame")
    with pytest.raises(UserError, match="20 images in 1 group cannot be split"):
        convert.split_samples(samples, 0.3, 0, "video")


@pytest.mark.parametrize("layout", ["voc", "yolo", "coco"])
def test_two_commands_lead_from_each_layout_to_training(layout: str, tmp_path: Path) -> None:
    if layout == "voc":
        root = voc(tmp_path / "data")
        REFUSED["v09_kaggle_flat"][0](root)
    else:
        root = yolo(tmp_path / "data")
    if layout == "coco":
        run_script("-m", "tools.convert", "yolo", root, tmp_path / "made")
        root = tmp_path / "made"
    run_script("-m", "tools.convert", layout, root, tmp_path / "mydata")
    data = ("--data-path", tmp_path / "mydata", "--output-dir", tmp_path / "run")
    done = run_script("train.py", *TINY, *data, "--epochs", "1")
    assert "Average Precision" in done.stdout + done.stderr
    shutil.rmtree(tmp_path / "run")


def test_training_logs_what_the_conversion_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import train

    root = yolo(tmp_path / "data")
    write(root / LINE, label(1) + "\n" + label(1))
    for _ in range(2):  # also from the cache
        paths = train.data_paths("yolo", root, {})
        with caplog.at_level("WARNING", logger="retinanet"):
            train.logger.propagate = True
            train.read_splits(paths, ["train"])
        assert "label lines that occur twice in a file" in caplog.text
        assert "labels/train/t1.txt:4" in caplog.text
        caplog.clear()


VOC_SHARED = both(
    rename("JPEGImages/t2.png", "t2", "v2"),
    rename("Annotations/t2.xml", "t2", "v2"),
    put("ImageSets/Main/train.txt", "t0\nt1\nv2"),
    put("ImageSets/Main/val.txt", "v2\nv3"),
)


def yolo_shared(root: Path) -> None:
    """Name one image in a folder, and in a list: two image folders, one below the other."""
    lists_of_files(root)
    write(root / "val.txt", "images/val/v3.png\nimages/train/t2.png\n")


@pytest.mark.parametrize("layout, edit", [("voc", VOC_SHARED), ("yolo", yolo_shared)])
def test_an_image_in_both_splits_is_reported_once(
    layout: str, edit: Edit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = {"voc": voc, "yolo": yolo}[layout](tmp_path / "data")
    edit(root)
    read_splits(conversion.coco_paths(layout, root), ["train", "val"])
    convert.main([layout, str(root), str(tmp_path / "made")])
    messages = [text for text in caplog.messages if "in train and val" in text]
    assert len(messages) == 2  # of read_splits and convert
    assert all(re.search(r"in train and val: '.*[tv]2\.png' \(", text) for text in messages)


@pytest.mark.parametrize("layout", ["voc", "yolo"])
def test_errors_and_warnings_name_the_folder_of_the_user_and_no_cached_file(
    layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """y17: a class that no box has; then nothing to train on, which is one finding, not two."""
    root = {"voc": voc, "yolo": yolo}[layout](tmp_path / "data")

    def keep_lines(pattern: str) -> Annotations:
        files = "Annotations/t*.xml" if layout == "voc" else "labels/train/*.txt"
        in_files(files, lambda text: "\n".join(re.findall(pattern, text, re.M)))(root)
        caplog.clear()
        return read_splits(conversion.coco_paths(layout, root), ["train"])[0]

    keep_lines("^.*red.*$|^</?annotation.*$" if layout == "voc" else "^0.*$")
    assert caplog.messages == [
        "data: train: warning: categories without boxes: blue (kept as classes)"
    ]
    annotations = keep_lines("^</?annotation.*$" if layout == "voc" else "nothing")
    assert caplog.messages == []
    with pytest.raises(UserError) as caught:
        checks.require_boxes(annotations)
    assert str(caught.value).startswith(f"{root}: train cannot be used\n  no box to train on: no ")
    assert "cache" not in str(caught.value)


def test_convert_refuses_a_set_without_a_box_to_train_on(tmp_path: Path) -> None:
    root = yolo(tmp_path / "data")
    in_files("labels/train/*.txt", lambda text: "")(root)
    command = ["yolo", str(root), str(tmp_path / "made")]
    with pytest.raises(UserError, match=r"data: train cannot be used\n  no box to train on: no "):
        convert.main(command)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    assert convert.main([*command, "--keep-empty"]) == 0
    assert len(list((tmp_path / "made/train2017").iterdir())) == 3


def test_a_class_list_beside_the_yaml_file_is_compared_again(tmp_path: Path) -> None:
    root = yolo(tmp_path / "data")
    for text, count in (("red\nblue", 0), ("blue\nred", 1), ("red\nblue", 0)):
        write(root / "classes.txt", text)
        findings = read("yolo", root)[1]
        assert sum("class lists that differ" in finding.what for finding in findings) == count


def test_a_file_that_changes_is_converted_again(tmp_path: Path) -> None:
    root = yolo(tmp_path / "data")
    require_right_boxes(read("yolo", root)[0])
    stat = (root / LINE).stat()
    write(root / LINE, label(1).splitlines()[1])
    os.utime(root / LINE, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [name for name, _ in read("yolo", root)[0]["train"]["t1.png"]] == ["blue"]
