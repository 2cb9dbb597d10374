"""Annotations: every rule on a COCO file has a message and ids; nothing valid is lost or changed.

python -m pytest tests/test_coco_json.py
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Document, annotation, changed, valid, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import coco_arrays, coco_json, coco_rules, locate
from utils import UserError

SETTINGS = settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def each(name: str, change: Callable[[Any], Any]) -> Callable[[], bytes]:
    """Return what writes the valid document with each entry of a list changed."""
    return lambda: json.dumps(valid() | {name: [change(row) for row in valid()[name]]}).encode()


def counted_from(images: int, image_ids: int) -> Document:
    """Return the valid document with the ids of images, and the image_ids, counted from there."""
    document, number = valid(), {10: 0, 20: 1, 30: 2}
    document["annotations"].append(annotation(11, 30, 1, [1, 2, 5, 9]))
    for image in document["images"]:
        image["id"] = number[image["id"]] + images
    for row in document["annotations"]:
        row["image_id"] = number[row["image_id"]] + image_ids
    return document


def text(change: Callable[[str], str], encoding: str = "utf-8") -> Callable[[], bytes]:
    return lambda: change(json.dumps(valid(), ensure_ascii=False)).encode(encoding)


BOX, IMAGE, CATEGORY = ("annotations", 1), ("images", 1), ("categories", 0)
NOT_COCO = "annotation file that is not COCO's"
NOT_BOX = "bbox that is not four finite numbers"
UNSAFE = "file_name not below the image folder"
LOST = "boxes without width or height in their image"
NUMBERED = "annotations without an id of their own"
UNSIZED = "images without width or height"
ALIKE = "categories that differ in case or blanks only"
CUT = "boxes partly outside of their image"
TWICE = "boxes that occur twice in an image"
ERRORS: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "empty file": (
        lambda: b"",
        "annotation file that is not JSON, or cut short",
        "Expecting value at byte 0 of 0",
    ),
    "latin-1": (text(str, "latin-1"), "annotation file that is not UTF-8", "byte 27"),
    "utf-16": (text(str, "utf-16"), "annotation file that is not UTF-8", "it is UTF-16 ("),
    "utf-16 without its mark": (
        text(str, "utf-16-le"),
        "annotation file that is not UTF-8",
        "it is UTF-16LE (convert it: iconv -f UTF-16LE -t UTF-8 /",
    ),
    "json lines": (
        lambda: b'{"images": []}\n{"annotations": []}\n',
        "annotation file that is not JSON",
        "a second value, as in JSON Lines, at byte 15 of 35 (line 2)",
    ),
    "latin-1 where nothing is read": (
        lambda: changed("info", to={"x": "?"})().replace(b"?", b"\xff"),
        "annotation file that is not UTF-8",
        "byte ",
    ),
    "cut short": (
        text(lambda t: t[:200]),
        "annotation file that is not JSON, or cut",
        "starting at byte 200 of 20",
    ),
    "a comma too many": (text(lambda t: t.replace("]}", "],}")), "is not JSON, or cut", "at byte"),
    "nested too deeply": (
        text(lambda t: t.replace('"tëst"', "[" * 10**5 + "]" * 10**5)),
        "annotation file that is not JSON, or cut short",
        "recursion",
    ),
    "a results file": (
        lambda: b'[{"image_id": 1, "score": 0.5}]',
        "annotation file that is not COCO's",
        "$ is a list, as in a file of detections",
    ),
    "a number": (lambda: b"5", "annotation file that is not COCO's", "$ is no object"),
    "test images only": (changed("annotations", to=...), "no list of annotations", "$.annotations"),
    "no categories list": (changed("categories", to=...), NOT_COCO, "$.categories"),
    "images by id": (changed("images", to={"1": {}}), NOT_COCO, "$.images"),
    "annotations a number": (changed("annotations", to=5), NOT_COCO, "$.annotations"),
    "categories null": (changed("categories", to=None), NOT_COCO, "$.categories"),
    "annotations twice": (
        text(lambda t: t[:-1] + ', "annotations": []}'),
        "lists that occur twice",
        "$.annotations",
    ),
    "image as number": (changed(*IMAGE, to=20), NOT_COCO, "$.images[1]"),
    "image id as text": (
        changed(*IMAGE, "id", to="20"),
        "id that is not a 64-bit integer",
        '$.images[1].id = "20"',
    ),
    "image id as a fraction": (
        changed(*IMAGE, "id", to=20.5),
        "id that is not a 64-bit integer",
        "$.images[1].id = 20.5",
    ),
    "image id as a float beyond 2**53": (
        changed(*IMAGE, "id", to=2.0**60),
        "id that is not a 64-bit integer",
        "$.images[1].id = 1.152921504606847e+18",
    ),
    "image id of 65 bits": (
        changed(*IMAGE, "id", to=2**63),
        "id that is not a 64-bit integer",
        "$.images[1].id = 9223372036854775808",
    ),
    "image_id as text": (
        changed(*BOX, "image_id", to="10"),
        "image_id that is not a 64-bit integer",
        '$.annotations[1].image_id = "10" (id 5)',
    ),
    "category_id null": (
        changed(*BOX, "category_id", to=None),
        "category_id that is not a 64-bit integer",
        "$.annotations[1].category_id = null (id 5)",
    ),
    "category_id missing": (
        changed(*BOX, "category_id", to=...),
        "category_id that is not a 64-bit integer",
        "$.annotations[1].category_id is missing (id 5)",
    ),
    "bbox missing": (
        changed(*BOX, "bbox", to=...),
        NOT_BOX,
        "$.annotations[1].bbox is missing (id 5)",
    ),
    "bbox of three": (changed(*BOX, "bbox", to=[1, 2, 3]), NOT_BOX, "bbox = [1, 2, 3] (id 5)"),
    "bbox NaN": (changed(*BOX, "bbox", to=[1, 2, float("nan"), 4]), NOT_BOX, "NaN, 4] (id 5)"),
    "bbox Infinity": (
        changed(*BOX, "bbox", to=[1, 2, 3, float("inf")]),
        NOT_BOX,
        "Infinity] (id 5)",
    ),
    "bbox 1e999": (
        lambda: changed(*BOX, "bbox", to=["#"] * 4)().replace(b'"#"', b"1e999"),
        NOT_BOX,
        "(id 5)",
    ),
    "bbox of text": (changed(*BOX, "bbox", to="1 2 3 4"), NOT_BOX, '= "1 2 3 4" (id 5)'),
    "bbox of huge integers": (changed(*BOX, "bbox", to=[1, 2, 3, 10**400]), NOT_BOX, "(id 5)"),
    "area as text": (changed(*BOX, "area", to="9"), "area that is not a finite number", "(id 5)"),
    "iscrowd as text": (changed(*BOX, "iscrowd", to="no"), "iscrowd that is not 0 or 1", "(id 5)"),
    "iscrowd 2": (
        changed(*BOX, "iscrowd", to=2),
        "iscrowd that is not 0 or 1",
        "5 (iscrowd 2)",
    ),
    "file_name a number": (
        changed(*IMAGE, "file_name", to=1),
        "file_name that is not text",
        "(id 20)",
    ),
    "half a character": (
        changed(*IMAGE, "file_name", to="\ud800.jpg"),
        "file_name that is not text",
        "(id 20)",
    ),
    "width as a fraction": (
        changed(*IMAGE, "width", to=60.5),
        "width that is not",
        "= 60.5 (id 20)",
    ),
    "bbox of texts": (
        changed(*BOX, "bbox", to=["1", "2", "3", "4"]),
        "bbox with numbers written as text",
        "(id 5) (write the numbers without quotes)",
    ),
    "name missing": (changed(*CATEGORY, "name", to=...), "name that is not text", "(id 2)"),
    "no images": (changed("images", to=[]), "no images", "$.images"),
    "no categories": (changed("categories", to=[]), "no categories", "$.categories"),
    "image id twice": (changed(*IMAGE, "id", to=10), "image ids that occur twice", "10"),
    "annotation id twice": (changed(*BOX, "id", to=6), "annotation ids that occur twice", "6"),
    "category id twice": (changed(*CATEGORY, "id", to=1), "category ids that occur twice", "1"),
    "name twice": (changed(*CATEGORY, "name", to="cat"), "category names that occur twice", "cat"),
    "no name": (changed(*CATEGORY, "name", to=" "), "category names that are empty", "2"),
    "height below 0": (
        changed(*IMAGE, "height", to=-9),
        "width or height not positive",
        "jpg', width 60, height -9)",
    ),
    "90 megapixels": (changed(*IMAGE, "width", to=10**6), "images over 89 megapixels", "20 "),
    "huge sides": (
        lambda: json.dumps(
            valid() | {"images": [{**valid()["images"][0], "width": 2**62, "height": 2**62}]}
        ).encode(),
        "images over 89 megapixels",
        "10 ",
    ),
    "absolute name": (
        changed(*IMAGE, "file_name", to="/etc/passwd"),
        UNSAFE,
        "20 (file_name '/etc/passwd')",
    ),
    "name with ..": (
        changed(*IMAGE, "file_name", to="x/../../y.jpg"),
        UNSAFE,
        "20 (file_name 'x/../../y.jpg')",
    ),
    "name with ..\\": (
        changed(*IMAGE, "file_name", to="..\\y.jpg"),
        UNSAFE,
        "20 (file_name '..\\\\y.jpg')",
    ),
    "name with a drive": (
        changed(*IMAGE, "file_name", to="C:\\y.jpg"),
        UNSAFE,
        "20 (file_name 'C:\\\\y.jpg')",
    ),
    "name with NUL": (
        changed(*IMAGE, "file_name", to="y\0.jpg"),
        UNSAFE,
        "20 (file_name 'y\\x00.jpg')",
    ),
    "empty name": (changed(*IMAGE, "file_name", to=""), UNSAFE, "(file_name '')"),
    "only unknown images": (
        each("annotations", lambda row: row | {"image_id": row["image_id"] + 5}),
        "annotations that all are of an unknown image_id",
        "7 (image_id 25), 5 (image_id 15)",
    ),
    "images counted from 0, image_id from 1": (
        lambda: json.dumps(counted_from(images=0, image_ids=1)).encode(),
        "ids shifted by one",
        "image_id is 1 to 3, but the ids of images are 0 to 2",
    ),
    "categories counted from 1, category_id from 0": (
        each("annotations", lambda row: row | {"category_id": row["category_id"] - 1}),
        "ids shifted by one",
        "category_id is 0 to 1, but the ids of categories are 1 to 2",
    ),
    "shares of the image": (
        each("annotations", lambda row: row | {"bbox": [0.25, 0.5, 0.5, 0.125]}),
        "boxes that look like shares of the image",
        " (4): 5 [0.25, 0.5, 0.5, 0.125], 6 [",
    ),
    "unknown category": (
        changed(*BOX, "category_id", to=3),
        "annotations of an unknown category_id",
        "5 (category_id 3)",
    ),
}
WARNINGS: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "byte order mark": (
        text(str, "utf-8-sig"),
        "annotation file with a byte order mark",
        "coco.json",
    ),
    "image id as float": (
        changed(*IMAGE, "id", to=20.0),
        "numbers written as 1.0 or as text",
        "$.images[1].id = 20.0",
    ),
    "iscrowd as numeral": (
        changed(*BOX, "iscrowd", to="0"),
        "numbers written as 1.0 or as text",
        '$.annotations[1].iscrowd = "0"',
    ),
    "iscrowd null": (changed(*BOX, "iscrowd", to=None), "annotations without iscrowd", "5"),
    "area null": (changed(*BOX, "area", to=None), "annotations without area", "5"),
    "area NaN": (changed(*BOX, "area", to=float("nan")), "annotations without area", "5"),
    "annotation id missing": (
        changed(*BOX, "id", to=...),
        NUMBERED,
        "number 2",
    ),
    "annotation id null": (
        changed(*BOX, "id", to=None),
        NUMBERED,
        "number 2",
    ),
    "background": (
        changed(*CATEGORY, "name", to="__background__"),
        "categories named background",
        "'__background__'",
    ),
    "no width": (changed(*IMAGE, "width", to=...), UNSIZED, "20 (file_name 'sub/b c.jpg')"),
    "width null": (changed(*IMAGE, "width", to=None), UNSIZED, "20 (file_name 'sub/b c.jpg')"),
    "height 0": (changed(*IMAGE, "height", to=0), UNSIZED, "20 (file_name 'sub/b c.jpg')"),
    "below it": (changed(*BOX, "bbox", to=[1, 78, 5, 7]), CUT, "5 [1.0, 78.0, 5.0, 7.0]"),
    "no iscrowd": (changed(*BOX, "iscrowd", to=...), "annotations without iscrowd", "5"),
    "no area": (changed(*BOX, "area", to=...), "annotations without area", "5"),
    "id 0": (changed(*BOX, "id", to=0), "annotations with the id 0", "0 (image_id 10)"),
    "width 0": (changed(*BOX, "bbox", to=[1, 1, 0, 5]), LOST, "5 [1.0, 1.0, 0.0, 5.0]"),
    "height below 0": (changed(*BOX, "bbox", to=[1, 9, 5, -5]), LOST, "5 [1.0, 9.0, 5.0, -5.0]"),
    "outside": (changed(*BOX, "bbox", to=[200, 1, 5, 5]), LOST, "5 [200.0, 1.0, 5.0, 5.0]"),
    "far outside": (changed(*BOX, "bbox", to=[-1e300, 1, 1e301, 5]), LOST, "5 [-1e+300"),
    "thin": (changed(*BOX, "bbox", to=[1, 1, 1e-4, 5]), LOST, "5 [1.0, 1.0, 0.0001, 5.0]"),
    "left of it": (changed(*BOX, "bbox", to=[-1, 1, 5, 5]), CUT, "5 [-1.0, 1.0, 5.0, 5.0]"),
    "right of it": (changed(*BOX, "bbox", to=[96, 1, 5, 5]), CUT, "5 [96.0, 1.0, 5.0, 5.0]"),
    "unused class": (changed(*BOX, "category_id", to=1), "categories without boxes", "dog"),
    "another case": (changed(*CATEGORY, "name", to="CAT "), ALIKE, "'CAT ' and 'cat'"),
    "box twice": (changed("annotations", 3, "bbox", to=[1, 2.5, 30, 40]), TWICE, "9 [1.0, 2.5, 3"),
    "shared file": (
        changed(*IMAGE, "file_name", to="a.jpg"),
        "images that share a file",
        "'a.jpg'",
    ),
}


BEYOND_A_FILE = {
    "width and height that are swapped",
    "no box to train on",
    "no box to evaluate with",
    "classes of training that val lacks, or numbers otherwise",
    "splits that name different classes",
    "images that are in train and val",
    "file names in another spelling",
    "annotations of an unknown image_id",
    "unused categories with the name of another",
    "boxes that look like x1 y1 x2 y2",
    "images that resizing makes 0 pixels wide or high",
}  # in test_cases_coco


@pytest.mark.parametrize("case", ERRORS)
def test_error_is_listed_with_ids(case: str, tmp_path: Path) -> None:
    content, what, ids = ERRORS[case]
    path = write(tmp_path, content())
    with pytest.raises(UserError) as caught:
        coco_json.read_annotations(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path} cannot be used"
    assert all(line.startswith("  ") and "error" not in line[:8] for line in lines[1:])
    assert [line for line in lines[1:] if what in line and ids in line]


@pytest.mark.parametrize("case", WARNINGS)
def test_warning_states_its_rule(case: str, tmp_path: Path) -> None:
    content, what, ids = WARNINGS[case]
    annotations, warnings = coco_json.read_annotations(write(tmp_path, content()))
    assert len(annotations.ids) == 4  # nothing is lost from the arrays
    (warning,) = [warning for warning in warnings if warning.what == what]
    assert (warning.severity, warning.count) == ("warning", 1)
    assert warning.cases[0].startswith(ids)


@pytest.mark.parametrize("other", [{"image": 10}, {"category": 2}, {"iscrowd": 1}])
def test_same_numbers_in_another_image_or_of_another_class_are_no_box_twice(
    other: dict[str, int], tmp_path: Path
) -> None:
    document = valid()
    copy_of_first = {"number": 11, "image": 20, "category": 1, "box": [1, 2.5, 30, 40], **other}
    document["annotations"].append(annotation(**copy_of_first))  # type: ignore[arg-type]
    _, warnings = coco_json.read_annotations(write(tmp_path, json.dumps(document).encode()))
    assert TWICE not in [warning.what for warning in warnings]


def test_every_rule_on_a_file_has_a_fixture() -> None:
    tested = {what for _, what, _ in (*ERRORS.values(), *WARNINGS.values())}
    rules = {rule for rule in coco_rules.RULES if "image files" not in rule}
    rules -= coco_rules.FOLDER_RULES.keys() | BEYOND_A_FILE | {"annotations that cannot be cached"}
    assert {rule for rule in rules if not any(what in rule for what in tested)} == set()
    assert len(ERRORS) + len(WARNINGS) >= 35


def test_all_errors_are_listed_in_lines_of_200_characters_with_count_and_fix(
    tmp_path: Path,
) -> None:
    document = valid()
    document["annotations"] += [annotation(i, 10, 3, [1, 2, 9, 7]) for i in range(100, 1225)]
    document["images"][0]["id"] = 20
    document["images"][2]["file_name"] = "../" + "long/" * 100 + "x\n.png"
    with pytest.raises(UserError) as caught:
        coco_json.read_annotations(write(tmp_path, json.dumps(document).encode()))
    lines = str(caught.value).splitlines()
    assert all(len(line) <= 2 + 200 for line in lines[1:])
    assert "  image ids that occur twice: 20 (make them unique)" in lines
    (unknown,) = [line for line in lines if "unknown category_id" in line]
    assert unknown.startswith("  annotations of an unknown category_id (1,125): 100 (")
    assert unknown.endswith(", … (remove them, or add the category)")
    (unsafe,) = [line for line in lines if "file_name" in line]
    assert "30 (file_name '../long/" in unsafe and "…" in unsafe
    assert r"x\n.png') (make it relative" in unsafe


@pytest.mark.parametrize(
    "box", [[81, 1, 19, 9], [1, 71, 7, 9], [0, 0, 100, 80]], ids=["right", "bottom", "whole"]
)
def test_width_and_height_of_the_image_are_not_confused(box: list[int], tmp_path: Path) -> None:
    """Each box lies within 100 x 80 pixels, and within 80 x 100 or 80 x 80 it would not."""
    _, findings = coco_json.read_annotations(write(tmp_path, changed(*BOX, "bbox", to=box)()))
    assert findings == []
    box[3] += 2
    box[1] = 71
    _, findings = coco_json.read_annotations(write(tmp_path, changed(*BOX, "bbox", to=box)()))
    assert [finding.what for finding in findings] == ([] if box[1] + box[3] <= 80 else [CUT])


@pytest.mark.parametrize("split", ["train", "val"])
def test_clean_sets_have_no_findings(split: str, tiny_shapes: Path, bccd: Path) -> None:
    for folder in (tiny_shapes, bccd):
        path = folder / "annotations" / f"instances_{split}2017.json"
        annotations, findings = coco_json.read_annotations(path)
        assert findings == []
        assert locate.locate_images(annotations, folder / f"{split}2017")[1] == []
        assert_equals_json(annotations, path.read_bytes())


def test_allowed_oddities_are_kept(tmp_path: Path) -> None:
    document = valid()
    document["images"][0]["id"] = document["annotations"][1]["image_id"] = 2**63 - 1
    document["annotations"][2]["image_id"] = 2**63 - 1
    document["annotations"][2]["iscrowd"] = True
    document["images"][1]["id"] = -4
    document["annotations"][0]["image_id"] = document["annotations"][3]["image_id"] = -4
    annotations, findings = coco_json.read_annotations(
        write(tmp_path, json.dumps(document).encode())
    )
    assert findings == []
    assert annotations.image_ids.tolist() == [2**63 - 1, -4, 30]
    assert [annotations.file_name(i) for i in range(3)] == ["a.jpg", "sub/b c.jpg", "ü.png"]
    assert annotations.ids.tolist() == [5, 6, 7, 9]  # by image, then as in the file
    assert annotations.iscrowd.tolist() == [False, True, False, False]
    assert annotations.categories == ((1, "cat"), (2, "dog"))
    assert annotations.offsets.tolist() == [0, 2, 4, 4]
    assert annotations.sizes.tolist() == [[80, 100], [120, 60], [70, 50]]


def as_number(value: Any) -> Any:
    """Return what a lenient reader makes of a whole number."""
    return int(value) if isinstance(value, str | float) and value == value else value


def assert_equals_json(annotations: coco_arrays.Annotations, content: bytes) -> None:
    """Check against what Python's own reader makes of the file, and of what has one meaning."""
    document = json.loads(content.decode("utf-8-sig"))
    images, rows = document["images"], document["annotations"]
    image_ids = [as_number(image["id"]) for image in images]
    assert annotations.image_ids.tolist() == image_ids
    names = [annotations.file_name(i) for i in range(len(annotations))]
    assert names == [image["file_name"] for image in images]
    sizes = [[as_number(image.get(k)) for k in ("height", "width")] for image in images]
    sizes = [[0 if v is None or v != v else v for v in size] for size in sizes]
    assert annotations.sizes.tolist() == sizes
    categories = {as_number(c["id"]): c["name"] for c in document["categories"]}
    assert categories.items() >= dict(annotations.categories).items()
    assert set(categories.values()) == {name for _, name in annotations.categories}
    ids = [as_number(row.get("id")) for row in rows]
    if len({*ids} - {None}) < len(ids) or any(i != i for i in ids):
        ids = list(range(1, len(rows) + 1))  # missing, or the same in several images
    kept = [i for i, row in enumerate(rows) if as_number(row["image_id"]) in image_ids]
    theirs = [
        (ids[i], as_number(rows[i]["image_id"]), [float(v) for v in rows[i]["bbox"]]) for i in kept
    ]
    of = annotations.image_ids[annotations.image_of_annotation()].tolist()
    ours = sorted(zip(annotations.ids.tolist(), of, annotations.boxes_xywh.tolist(), strict=True))
    assert ours == sorted(theirs)
    crowd = dict(zip(annotations.ids.tolist(), annotations.iscrowd.tolist(), strict=True))
    flags = [(ids[i], as_number(rows[i].get("iscrowd"))) for i in kept]
    assert all(crowd[i] == (flag in (1, True)) for i, flag in flags)
    names_of = [annotations.categories[k][1] for k in annotations.category_index]
    named = dict(zip(annotations.ids.tolist(), names_of, strict=True))
    assert all(named[ids[i]] == categories[as_number(rows[i]["category_id"])] for i in kept)


def assert_refused_or_equal(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        annotations, _ = coco_json.read_annotations(path)
    except UserError as error:
        assert str(error).startswith(f"{path} cannot be used\n  ")
        return
    assert_equals_json(annotations, content)


@pytest.fixture(params=[32, 2**24], ids=["pieces of 32 bytes", "one piece"])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(coco_json, "PIECE", request.param)
    return request.param


@SETTINGS
@given(data=st.data())
def test_damaged_bytes_are_refused_or_read_as_python_does(
    data: st.DataObject, piece: int, tmp_path: Path
) -> None:
    content = bytearray(json.dumps(valid(), ensure_ascii=False).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "set", "delete", "insert", "cut", "repeat"]))
        if kind == "flip":
            content[position] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set":
            content[position] = data.draw(
                st.sampled_from(b'0123456789.-+eE"{}[],:\\ nNtfI\xff\x00')
            )
        elif kind == "insert":
            content[position:position] = data.draw(st.binary(min_size=1, max_size=4))
        elif kind == "repeat":
            content[position:position] = content[
                position : position + data.draw(st.integers(1, 200))
            ]
        else:
            del content[position : position + (1 if kind == "delete" else 10**6)]
        if not content:
            break
    assert_refused_or_equal(tmp_path / "coco.json", bytes(content))


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@SETTINGS
@given(data=st.data())
def test_damaged_values_are_refused_or_read_as_python_does(
    data: st.DataObject, piece: int, tmp_path: Path
) -> None:
    document = valid()
    for _ in range(data.draw(st.integers(1, 3))):
        node: Any = document
        while isinstance(node, dict | list) and node:
            keys = sorted(node) if isinstance(node, dict) else range(len(node))
            key = data.draw(st.sampled_from(list(keys)))
            if data.draw(st.booleans()) or not isinstance(node[key], dict | list):
                node[key] = data.draw(
                    ANY_JSON
                    | st.sampled_from([0, 1, 10, 20, 2**63, 1.0, 10.0, 1e308, "0", "10", None])
                )
                break
            node = node[key]
    assert_refused_or_equal(tmp_path / "coco.json", json.dumps(document).encode())


NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70)


@SETTINGS
@given(
    boxes=st.lists(st.lists(NUMBERS, min_size=4, max_size=4), max_size=30),
    extra=st.lists(st.text('},{[]"\\a ', max_size=8), min_size=1, max_size=4),
    layout=st.sampled_from([(",", ":"), (", ", ": "), (",\n ", " : "), " "]),
)
def test_valid_files_are_read_to_the_bit(
    boxes: list[Any], extra: list[str], layout: Any, piece: int, tmp_path: Path
) -> None:
    document = valid()
    document["annotations"] = [
        {
            "x": [{"t": text} for text in extra],
            **annotation(i, 10 * (1 + i % 3), 1 + i % 2, [1, 1, 1, 1]),
        }
        | {"bbox": box}
        for i, box in enumerate(boxes)
    ]
    if layout == " ":
        content = json.dumps(document, indent=1).encode()
    else:
        content = json.dumps(document, separators=layout).encode()
    annotations, _ = coco_json.examine(write(tmp_path, content))  # boxes may look like shares
    assert annotations is not None
    assert_equals_json(annotations, content)


def test_only_a_private_copy_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_json, "PIECE", 64)
    content = json.dumps(valid()).encode()
    coco_json.read_annotations(write(tmp_path, content))
    assert (tmp_path / "coco.json").read_bytes() == content


def test_fingerprint_changes_with_what_training_sees(tmp_path: Path) -> None:
    def fingerprint(document: Document) -> str:
        return coco_json.read_annotations(write(tmp_path, json.dumps(document).encode()))[
            0
        ].fingerprint()

    reference = fingerprint(valid())
    assert fingerprint(copy.deepcopy(valid())) == reference
    for path, value in (
        (("annotations", 0, "bbox"), [1, 2.5, 30, 41]),
        (("annotations", 0, "category_id"), 2),
        (("annotations", 0, "iscrowd"), 1),
        (("annotations", 0, "image_id"), 30),
        (("images", 0, "file_name"), "c.jpg"),
        (("images", 0, "width"), 101),
        (("categories", 0, "name"), "cow"),
    ):
        assert fingerprint(json.loads(changed(*path, to=value)())) != reference, path


def test_a_summary_names_what_changed_in_the_data(tmp_path: Path) -> None:
    def read(document: Document) -> coco_arrays.Annotations:
        return coco_json.read_annotations(write(tmp_path, json.dumps(document).encode()))[0]

    before = read(valid())
    old = json.loads(json.dumps(before.summary()))  # as a checkpoint keeps it
    document = valid()
    gone = document["images"].pop()["id"]
    left = [a for a in document["annotations"] if a["image_id"] != gone]
    document["annotations"] = left
    message = coco_arrays.differences("training data", old, read(document))
    assert f"images {len(before)} → {len(before) - 1}" in message and f"image id {gone}" in message
    document = valid()
    document["annotations"][0]["bbox"][2] += 1
    message = coco_arrays.differences("training data", old, read(document))
    first = document["annotations"][0]["image_id"]
    assert message == f"training data: the first difference is at image id {first}"
    document = valid()
    name = document["categories"][0]["name"]
    document["categories"][0]["name"] = "yak"
    message = coco_arrays.differences("training data", old, read(document))
    assert f"classes removed: {name}" in message and "classes added: yak" in message
    document = valid()
    number = document["annotations"].pop(0)["category_id"]
    (name,) = [c["name"] for c in document["categories"] if c["id"] == number]
    message = coco_arrays.differences("training data", old, read(document))
    count = old["classes"][name]
    assert (
        f"boxes {old['boxes']} → {old['boxes'] - 1}" in message
        and f"{name} {count} → {count - 1}" in message
    )
    message = coco_arrays.differences("training data", None, before)
    assert "does not remember" in message


def test_a_summary_of_many_images_stays_small_and_finds_the_part(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in range(5, 3005)]
    document = valid() | {"images": images, "annotations": []}

    def read() -> coco_arrays.Annotations:
        return coco_json.read_annotations(write(tmp_path, json.dumps(document).encode()))[0]

    old = json.loads(json.dumps(read().summary()))
    assert old["per_part"] == 3 and len(old["parts"]) == 1000
    images[7]["width"] = 8
    message = coco_arrays.differences("training data", old, read())
    assert message.endswith("within the 3 images that begin with image id 11")


def test_a_file_that_is_cut_meanwhile_does_not_end_the_process(
    tiny_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "instances.json"
    whole = (tiny_shapes / "annotations" / "instances_val2017.json").read_bytes()
    path.write_bytes(whole)
    expected, _ = coco_json.read_annotations(path)
    check = coco_json._require_utf8

    def cut_before(data: Any) -> None:  # a file that is mapped ends the process with SIGBUS here
        path.write_bytes(b"")
        check(data)

    with monkeypatch.context() as patch:
        patch.setattr(coco_json, "_require_utf8", cut_before)
        annotations, _ = coco_json.read_annotations(path)
    assert annotations.fingerprint() == expected.fingerprint()

    path.write_bytes(whole)
    before = os.stat_result(
        [0] * 6 + [len(whole) + 9] + [0] * 3
    )  # nine bytes more than the file has
    monkeypatch.setattr(os, "fstat", lambda file: before)
    with pytest.raises(UserError, match="instances.json became shorter while it was read"):
        coco_json.examine(path)
