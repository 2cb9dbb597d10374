"""A results file is scored by itself, or refused in one message: pytest tests/test_score.py.

pycocotools gives the expected numbers; a bootstrap with it, image by image, the interval.
"""

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coco_eval import BACKENDS, METRICS, CocoEvaluator
from coco_utils import label_categories
from data.coco_arrays import Annotations
from data.coco_json import read_annotations
from tools.score import compare, main, read_detections
from utils import UserError

NAMES = {3: "cat", 7: "dog", 90: "eel"}
Change = Callable[[list[dict[str, Any]]], Any]


def make_truth(num_images: int = 12) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    for image in range(num_images - 1):  # the last is empty
        for _ in range(int(draw.integers(1, 5))):
            x, y, w, h = (draw.random(4) * [300, 200, 250, 250] + [0, 0, 20, 20]).tolist()
            annotations.append(
                {
                    "id": len(annotations),  # counts from 0, which pycocotools takes for "no match"
                    "image_id": 1000 - image,
                    "category_id": int(draw.choice([3, 7])),  # eels are in no image
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(draw.random() < 0.05),
                }
            )
    images = [
        {"id": 1000 - i, "file_name": f"{i}.jpg", "width": 640, "height": 480}
        for i in range(num_images)
    ]
    categories = [{"id": number, "name": name} for number, name in NAMES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def make_detections(truth: dict[str, Any], seed: int, noise: float) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    detections: list[dict[str, Any]] = []
    for box in truth["annotations"] * 2:
        is_right = draw.random() < 0.7
        moved = np.array(box["bbox"]) + draw.normal(0, noise, 4)
        detections.append(
            {
                "image_id": box["image_id"],
                "category_id": box["category_id"] if is_right else int(draw.choice([3, 7, 90])),
                "bbox": np.abs(moved).tolist(),
                "score": float(draw.beta(4, 2) if is_right else draw.beta(2, 4)),
            }
        )
    return detections


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Annotations, a results file, and a worse one."""
    truth = make_truth()
    contents = (truth, make_detections(truth, 1, 4), make_detections(truth, 2, 15))
    paths = tuple(tmp_path / name for name in ("truth.json", "first.json", "other.json"))
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content))
    return paths[0], paths[1], paths[2]


def read(path: Path) -> tuple[Annotations, list[dict[str, Any]]]:
    annotations, _ = read_annotations(path)
    return annotations, label_categories(annotations.categories)


def pycocotools_metrics(
    truth: dict[str, Any], detections: list[dict[str, Any]]
) -> dict[str, float]:
    annotations = [{**a, "id": i} for i, a in enumerate(truth["annotations"], start=1)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {**truth, "annotations": annotations, "info": {}}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes([dict(entry) for entry in detections]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, evaluation.stats.tolist(), strict=True))


def run_main(*flags: str | Path) -> None:
    main([*map(str, flags)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_scores_as_pycocotools_scores_it(
    backend: str,
    files: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    run_main(*files[:2], "--backend", backend, "--output", out)
    done = capsys.readouterr()
    truth, detections = (json.loads(path.read_text()) for path in files[:2])
    expected = pycocotools_metrics(truth, detections)
    assert 0.1 < expected["AP"] < 0.9
    assert json.loads((out / "results.json").read_text()) == expected
    lines = done.out.splitlines()
    assert lines[0] == f"{len(detections)} detections on 11 of 12 images, scored by {backend}"
    assert [float(line.rsplit("=", 1)[1]) for line in lines[1:13]] == [
        pytest.approx(value, abs=6e-4) for value in expected.values()
    ]
    table = [line.split() for line in lines[13:17]]
    assert [row[0] for row in table] == ["class", *sorted(("cat", "dog"), key=_ap(out)), "eel"]
    assert table[3][1:6] == [*"----", "0"]
    analysis = json.loads((out / "analysis.json").read_text())
    assert {row["name"]: row["detections"] for row in analysis["per_class"]} == {
        name: sum(entry["category_id"] == number for entry in detections)
        for number, name in NAMES.items()
    }
    assert "annotations with the id 0" in done.err


def _ap(folder: Path) -> Callable[[str], float]:
    rows = json.loads((folder / "analysis.json").read_text())["per_class"]
    return lambda name: -next(row["AP"] for row in rows if row["name"] == name)


def test_detections_on_few_of_the_images_are_warned_of(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    detections = json.loads(files[1].read_text())
    for most, is_warned in ((6, False), (5, True)):
        kept = sorted({detection["image_id"] for detection in detections})[:most]
        files[1].write_text(json.dumps([d for d in detections if d["image_id"] in kept]))
        run_main(*files[:2])
        warning = "warning: 7 of 12 images have no detection; are these the annotations of"
        assert (warning in capsys.readouterr().err) == is_warned


def test_no_detections_score_nothing(
    files: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    files[1].write_text("[]")
    run_main(*files[:2])
    printed = capsys.readouterr().out
    assert "0 detections on 0 of 12 images" in printed
    assert "area=   all | maxDets=100 ] = 0.000" in printed


# --- refused --------------------------------------------------------------------------------------


def _set(index: int, **values: Any) -> Change:
    return lambda entries: [*entries[:index], {**entries[index], **values}, *entries[index + 1 :]]


def _without(key: str, *places: int) -> Change:
    return lambda entries: [
        {k: v for k, v in entry.items() if k != key or i not in places}
        for i, entry in enumerate(entries)
    ]


WRONG: dict[str, tuple[Change, str]] = {
    "no score": (_without("score", 2, 5), r"2 detections without score: .*\(entry 2\).*entry 5"),
    "no box": (_without("bbox", 0), "1 detections without bbox"),
    "unknown image": (_set(3, image_id=5), r"1 detections of an image .*not annotated: 5 \(entry"),
    "huge id": (_set(3, image_id=2**70), r"`int` <= 9223372036854775807 - at `\$\[3\].image_id`"),
    "no integer": (_set(3, image_id="1000"), "1 detections whose image_id is not an integer"),
    "a fraction": (_set(3, category_id=3.5), "1 detections whose category_id is not an integer"),
    "unknown class": (_set(1, category_id=4), r"1 detections of an unknown category: 4 \(entry 1"),
    "NaN score": (_set(1, score=float("nan")), "1 detections whose score is not a finite number"),
    "infinite box": (_set(1, bbox=[0, 0, 1, float("inf")]), "whose bbox is not four finite num"),
    "three numbers": (_set(1, bbox=[0, 0, 1]), "1 detections whose bbox is not four finite"),
    "another file": (
        _set(1, file_name="photos/b.jpg"),
        r"1 detections of another file than the image of their id: photos/b.jpg \(entry 1\)",
    ),
    "xyxy": (_set(1, bbox=[9.0, 9.0, -4.0, 5.0]), "1 detections with a width or height below 0"),
    "no entry": (lambda found: [*found, 7], "1 detections that are not an object: 7"),
    "no list": (lambda found: {"annotations": found}, "holds a dict, not a list of detections"),
    "many": (_without("bbox", *range(30)), r"30 detections without bbox: .*\(entry 9\) …"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_with_what_is_wrong(
    name: str, files: tuple[Path, Path, Path]
) -> None:
    change, message = WRONG[name]
    files[1].write_text(json.dumps(change(json.loads(files[1].read_text()))))
    with pytest.raises(UserError, match=message) as caught:
        read_detections(files[1], *read(files[0]))
    assert str(files[1]) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[{", b"\xff\xfe", b"[" * 100_000], ids=repr)
def test_a_broken_file_is_refused_as_no_json(
    content: bytes, files: tuple[Path, Path, Path]
) -> None:
    files[1].write_bytes(content)
    with pytest.raises(UserError, match="is not JSON, or cut short"):
        read_detections(files[1], *read(files[0]))


def test_a_refusal_is_one_message_without_a_trace(
    files: tuple[Path, Path, Path],
) -> None:
    for change in (lambda: files[1].write_text("[{}, {}]"), files[1].unlink):
        change()
        with pytest.raises(UserError, match=r"first\.json"):
            run_main(*files[:2])


@pytest.mark.parametrize(
    "flags", [("--resamples", "-1"), ("--resamples", "1000001"), ("--seed", str(2**63))]
)
def test_a_number_out_of_its_range_is_refused(
    flags: tuple[str, str], files: tuple[Path, Path, Path]
) -> None:
    with pytest.raises(UserError, match=f"{flags[0]}: {flags[1]} is out of range"):
        run_main(*files[:2], *flags)
    run_main(*files[:2], "--compare", files[2], "--resamples", "2", "--seed", str(2**63 - 1))


# --- compared -------------------------------------------------------------------------------------


def hotcoco_ap(truth: dict[str, Any], detections: list[dict[str, Any]]) -> float:
    """AP of a data set of its own, faster than `pycocotools_metrics`."""
    annotations = [{**a, "id": i} for i, a in enumerate(truth["annotations"], start=1)]
    coco = hotcoco.COCO({**truth, "annotations": annotations})
    evaluation = hotcoco.COCOeval(coco, coco.load_res(detections), "bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.run()
    return float(evaluation.stats[0])


def test_the_difference_is_in_its_paired_bootstrap_interval(
    files: tuple[Path, Path, Path],
) -> None:
    truth, first, other = (json.loads(path.read_text()) for path in files)
    annotations, label_map = read(files[0])
    rows = [read_detections(path, annotations, label_map) for path in files[1:]]
    evaluator = CocoEvaluator(annotations, label_map)
    text = compare(evaluator, rows[0], rows[1], resamples=2000, seed=0)
    assert compare(evaluator, rows[0], rows[1], resamples=2000, seed=0) == text
    assert compare(evaluator, rows[0], rows[1], resamples=2000, seed=1) != text
    number = r"([+-]?\d\.\d+)"
    match = re.search(rf"^AP +{number} +{number} +{number} +{number} to {number}$", text, re.M)
    assert match is not None, text
    values = [float(group) for group in match.groups()]
    metrics = [pycocotools_metrics(truth, detections)["AP"] for detections in (first, other)]
    assert values[0] == pytest.approx(metrics[0], abs=6e-4)
    assert values[2] == pytest.approx(metrics[1] - metrics[0], abs=6e-5)

    draw, differences = np.random.default_rng(3), []
    for _ in range(400):
        chosen = draw.integers(0, len(truth["images"]), len(truth["images"])).tolist()
        drawn = _resampled(truth, (first, other), chosen)
        differences.append(np.subtract(*(hotcoco_ap(*pair) for pair in drawn[::-1])))
    expected = np.quantile(differences, [0.025, 0.975])
    spread = expected[1] - expected[0]
    assert values[3:] == pytest.approx(expected, abs=spread / 5)
    assert "2000 resamples, seed 0" in text


def _resampled(
    truth: dict[str, Any], results: tuple[list[dict[str, Any]], ...], chosen: list[int]
) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Make a data set of the images drawn, each under an id of its own."""
    ids = {new: truth["images"][old]["id"] for new, old in enumerate(chosen, start=1)}

    def renamed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {**entry, "image_id": new}
            for new, old in ids.items()
            for entry in entries
            if entry["image_id"] == old
        ]

    images = [{**truth["images"][0], "id": new} for new in ids]
    drawn = {**truth, "images": images, "annotations": renamed(truth["annotations"])}
    return [(drawn, renamed(entries)) for entries in results]


def test_a_file_compared_with_itself_differs_by_nothing(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--compare", files[1], "--resamples", "50", "--seed", "7")
    main([*map(str, (*files[:2], *flags))])
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines() if line.startswith("AP ")]
    assert lines[0][3:] == ["+0.0000", "+0.0000", "to", "+0.0000"]
    assert "50 resamples, seed 7" in printed
