"""tools.check_data finds every rule's fault by id, opens every image, describes and draws data.

python -m pytest tests/test_check_data.py
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, annotation, run_script, valid
from image_helpers import BAD, DAMAGED, JPEG, PICTURE, encoded, with_alpha
from PIL import Image

from data import coco_json, coco_rules
from tools import check_data
from utils import UserError


def make_folder(root: Path, files: dict[str, bytes], document: Any = None) -> Path:
    """Write a COCO folder whose two splits hold `files`, 64 x 40 pixels each."""
    if document is None:
        images = [
            {"id": i, "file_name": name, "width": 64, "height": 40}
            for i, name in enumerate(files, start=100)
        ]
        boxes = [annotation(1, 100, 1, [1, 2, 12, 9]), annotation(2, 100, 2, [20, 3, 9, 14])]
        document = valid() | {"images": images, "annotations": boxes}
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
        for name, content in files.items():
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def findings(root: Path) -> dict[str, coco_rules.Finding]:
    path = root / "annotations" / "instances_train2017.json"
    split = check_data.check_split("train", root / "train2017", path, 2, 800, 1333)
    return {finding.what: finding for finding in split.findings}


def corrupt(content: bytes) -> bytes:
    """Cut a JPEG in the middle and end it properly: decoders make up the rest, gray."""
    return content[: len(content) * 2 // 3] + b"\xff\xd9"


def test_every_image_rule_is_found_by_id(tmp_path: Path) -> None:
    files = {"good.jpg": JPEG, **{f"{case}.img": content for case, (content, *_) in BAD.items()}}
    files["patched.jpg"] = corrupt(encoded(PICTURE, format="JPEG", quality=95))
    files["stray.jpg"] = JPEG[:20] + b"\x01\x02\x03\x04" + JPEG[20:]  # between two segments
    restarts = encoded(PICTURE, format="JPEG", quality=95, restart_marker_rows=1)
    marker = restarts.index(b"\xff\xd1")  # the decoder has all its rows before it sees these bytes
    files["lost.jpg"] = restarts[:marker] + b"\x55" * 20 + restarts[marker:]
    files["alpha.png"] = encoded(with_alpha(PICTURE), format="PNG")
    files["alpha.webp"] = encoded(with_alpha(PICTURE), format="WEBP")
    files["slow.gif"] = encoded(PICTURE, format="GIF")
    moves = {"save_all": True, "append_images": [Image.new("RGB", PICTURE.size, "green")]}
    files["moves.webp"] = encoded(PICTURE, format="WEBP", **moves)
    exif = Image.Exif()
    exif[0x0112] = 3
    files["upside_down.jpg"] = encoded(PICTURE, format="JPEG", exif=exif)
    files["missing.jpg"] = files["link.jpg"] = JPEG
    root = make_folder(tmp_path / "data", files)
    (root / "train2017" / "missing.jpg").unlink()
    (root / "train2017" / "link.jpg").unlink()
    (root / "train2017" / "link.jpg").symlink_to(root / "val2017" / "link.jpg")
    by_rule = findings(root)

    expected: dict[str, list[str]] = {}
    names = list(files)
    for case, (_, rule, _) in BAD.items():
        expected.setdefault(rule, []).append(f"{case}.img")
    expected[DAMAGED] += ["patched.jpg", "lost.jpg"]
    expected["image files with stray bytes"] = ["stray.jpg"]
    expected["image files with an alpha channel"] = ["alpha.png", "alpha.webp"]
    expected["image files missing"] = ["missing.jpg"]
    expected["image files in a slow format"] = ["slow.gif", "moves.webp"]
    expected["image files that are animated"] = ["moves.webp"]
    expected["image files turned by EXIF, which their size cannot confirm"] = ["upside_down.jpg"]
    assert set(by_rule) == set(expected)
    for rule, cases in expected.items():
        assert by_rule[rule].count == len(cases), rule
        for case, text in zip(cases, by_rule[rule].cases, strict=False):
            assert text.startswith(f"{100 + names.index(case)} {case!r}"), rule
    warned = {rule for rule, finding in by_rule.items() if finding.severity == "warning"}
    assert warned == {
        "image files with stray bytes",
        "image files with an alpha channel",
        "image files in a slow format",
        "image files that are animated",
        "image files turned by EXIF, which their size cannot confirm",
    }
    rules = {rule for rule in coco_rules.RULES if "image files" in rule}
    # The first is in test_coco_utils, the second below.
    assert rules - set(by_rule) == {"image files that cannot be read", check_data.CRASHED}


def test_images_are_checked_although_the_json_has_errors(tmp_path: Path) -> None:
    document = valid()
    document["annotations"][0]["category_id"] = 11
    document["images"][1]["file_name"] = "../../etc/passwd"
    cut = encoded(PICTURE.resize((100, 80)), format="JPEG")[:-9]
    files = {"a.jpg": cut, "ü.png": b""}
    by_rule = findings(make_folder(tmp_path / "data", files, document))
    assert {
        "annotations of an unknown category_id",
        "file_name not below the image folder",
        DAMAGED,
    } <= set(by_rule)


def _crash_on_some(file_name: str, size: list[int]) -> list[tuple[str, str]]:
    """Stand in for a decoder that crashes."""
    if file_name.startswith("crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return [(DAMAGED, "is damaged")] if file_name.startswith("bad") else []


def test_an_image_that_crashes_its_decoder_is_named_and_the_others_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 6 images, 2 are opened at a time, and 2 one by one after the crash."""
    names = ["0.jpg", "crash1.jpg", "2.jpg", "bad3.jpg", "4.jpg", "bad5.jpg"]
    root = make_folder(tmp_path / "data", dict.fromkeys(names, JPEG))
    annotations, _ = coco_json.read_annotations(root / "annotations/instances_train2017.json")
    monkeypatch.setattr(check_data, "_check_image", _crash_on_some)
    monkeypatch.setattr(check_data, "CHUNK", 2)
    monkeypatch.setattr(check_data, "IN_FLIGHT", 2)
    crashed, damaged = check_data.check_images(annotations, root / "train2017", 2)
    assert crashed.cases == ("101 'crash1.jpg' ends the process that reads it",)
    assert damaged.cases == ("103 'bad3.jpg' is damaged", "105 'bad5.jpg' is damaged")
    monkeypatch.setattr(check_data, "MOST_CRASHES", 1)
    with pytest.raises(UserError, match=r"1 images ended the process .*crash1\.jpg; see whether"):
        check_data.check_images(annotations, root / "train2017", 1)


def test_what_a_repeat_threshold_would_do_is_said_where_it_would_do_something(
    tmp_path: Path,
) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 40} for i in range(1, 101)]
    boxes = [annotation(i, i, 1, [1, 2, 12, 9]) for i in range(1, 101)]
    rare = [annotation(200 + i, i, 2, [1, 2, 12, 9]) for i in range(1, 5)]
    document = valid() | {"images": images, "annotations": [*boxes, *rare]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    annotations, _ = coco_json.read_annotations(tmp_path / "a.json")
    often, seldom = (name for _, name in annotations.categories[:2])
    text = f"{seldom} in 4 images comes {{}} times, {often} in 100 images comes {{}} times"
    assert list(check_data.repeat_lines(annotations)) == [
        "--repeat-threshold 0.1: 102 an epoch of 100 images; " + text.format(6, 102),
        "--repeat-threshold 0.3: 107 an epoch of 100 images; " + text.format(11, 107),
    ]


@pytest.mark.parametrize("name", ["shapes", "bccd"])
def test_clean_sets_have_no_findings_and_exit_0(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue("tiny_shapes" if name == "shapes" else name)
    page = tmp_path / "page.png"
    done = run_script("-m", "tools.check_data", "--data-path", folder, "--plot", page)
    assert done.stdout.rstrip().endswith("findings: none")
    assert "it/s" not in done.stderr and "images:" not in done.stderr  # no bar: no terminal
    if name == "bccd":
        assert re.search(r"^images +292 +72$", done.stdout, re.MULTILINE)
        assert re.search(r"^boxes +3,980 +906$", done.stdout, re.MULTILINE)
        assert re.search(r"^  RBC +3,392 \(85.2%\) +761 \(84.0%\)$", done.stdout, re.MULTILINE)
    with Image.open(page) as image:
        assert image.width == 1600 and 1000 < image.height < 1600
        assert np.asarray(image.convert("L")).std() > 20  # something is drawn


def test_json_report_has_all_findings_and_errors_exit_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "data", {"a.jpg": JPEG[:-9], "b.jpg": JPEG})
    assert check_data.main(["--data-path", str(root), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["errors"] == 2  # one kind in each split
    train = report["splits"]["train"]
    assert train["findings"][0] | {"cases": []} == {
        "severity": "error",
        "what": DAMAGED,
        "count": 1,
        "fix": "copy them again, or take them out",
        "cases": [],
    }
    assert train["findings"][0]["cases"][0].startswith("100 'a.jpg' is damaged")
    assert train["data"]["boxes_per_class"] == {"cat": 1, "dog": 1}
    assert (train["data"]["images"], train["data"]["images_without_boxes"]) == (2, 1)
    assert train["data"]["small_boxes"] == 2


def test_table_lists_findings_with_count_and_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "data", {f"{i}.jpg": b"" for i in range(12)})
    assert check_data.main(["--data-path", str(root)]) == 1
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    start = lines.index(f"ERROR{12:>11}  train: image files that are damaged")
    assert lines[start + 1] == "100 '0.jpg' is empty"
    assert lines[start + 11 : start + 13] == ["and 2 more", "→ copy them again, or take them out"]


def test_splits_with_different_classes_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "data", {"a.jpg": JPEG})
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace('"dog"', '"cow"'))
    assert check_data.main(["--data-path", str(root)]) == 1
    printed = capsys.readouterr().out
    assert "splits that name different classes" in printed and "'cow'" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data-path is missing"),
        (
            ["--data-path", "/nowhere"],
            "cannot find the image folders /nowhere/train2017 and /nowhere/val2017; check ",
        ),
        (["--dataset", "voc", "--data-path", "/nowhere"], "--data-path /nowhere is no folder"),
    ],
)
def test_wrong_flags_are_refused_with_the_flag_or_the_folder(
    flags: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        check_data.main(flags)


def test_a_file_that_is_not_coco_is_one_finding_per_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "data", {"a.jpg": JPEG})
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").write_text("[]")
    assert check_data.main(["--data-path", str(root)]) == 1
    assert capsys.readouterr().out.count("annotation file that is not COCO's") == 2


def _shift(document: Any) -> None:
    for row in document["annotations"]:
        row["category_id"] -= 1


def _swap(document: Any) -> None:
    for row in document["images"]:
        row["width"], row["height"] = row["height"], row["width"]


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda d: d["images"][0].update(file_name="/me/a.jpg"), "file_name not below the image"),
        (lambda d: d["annotations"][0].update(bbox=["1", "2", "3", "4"]), "bbox with numbers"),
        (_shift, "ids shifted by one"),
        (_swap, "width and height that are swapped"),
    ],
    ids=["c20", "c07", "c23", "c50"],
)
def test_one_cause_is_one_finding(
    change: Callable[[Any], None], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "data", {"a.jpg": JPEG})
    path = root / "annotations" / "instances_train2017.json"
    document = json.loads(path.read_text())
    document["annotations"] = document["annotations"][:2]
    change(document)
    path.write_text(json.dumps(document))
    check_data.main(["--data-path", str(root), "--splits", "train", "--json", "-j", "1"])
    (split,) = json.loads(capsys.readouterr().out)["splits"].values()
    (finding,) = split["findings"]
    assert finding["severity"] == "error" and finding["what"].startswith(what)


def test_the_documentation_lists_every_rule_with_its_severity_and_fix() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    rules = {row[0]: (row[1], row[2]) for row in rows if row[1] in ("error", "warning")}
    assert rules == coco_rules.RULES
