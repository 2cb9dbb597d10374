"""The twelve numbers are pycocotools' to the last bit: pytest tests/test_coco_eval.py.

The reference is pycocotools itself, run the usual way: dicts with the data set's own ids. Random
data sets hold crowds, empty images, equal scores, areas unlike w * h, category ids with gaps and
image ids up to 2**63 - 1 in any order; one, two and three processes share the images.
"""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coco_eval import BACKENDS, METRICS, CocoEvaluator, Scores
from runtime.distributed import Processes
from runtime.tables import class_table, error_line
from utils import UserError

CPU = torch.device("cpu")
IDS = (0, 1, 2, 9, 500, 2**31, 2**53, 2**53 + 1, 2**63 - 2, 2**63 - 1)
Detections = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Truth:
    """Ground truth in the arrays that `CocoEvaluator` reads."""

    image_ids: np.ndarray
    sizes: np.ndarray
    image: np.ndarray
    boxes_xywh: np.ndarray
    area: np.ndarray
    iscrowd: np.ndarray
    category_index: np.ndarray
    categories: tuple[tuple[int, str], ...]

    def image_of_annotation(self) -> np.ndarray:
        return self.image


@dataclass(frozen=True)
class Case:
    """A random data set and what a model  in it, by image; labels follow `label_map`."""

    truth: Truth
    detections: Detections
    label_map: list[dict[str, Any]]


def make_case(
    seed: int,
    num_images: int = 5,
    num_categories: int = 3,
    objects: int = 4,
    detected: int = 6,
    crowds: float = 0.2,
) -> Case:
    """Draw a case: up to `objects` and `detected` boxes per image, some images without."""
    draw = np.random.default_rng(seed)
    image_ids = draw.permutation(np.array(IDS, dtype=np.int64))[:num_images]
    category_ids = np.sort(draw.permutation(90)[:num_categories] + 1)
    categories = tuple((int(number), f"class {number}") for number in category_ids)
    counts = draw.integers(0, objects + 1, num_images) * (draw.random(num_images) < 0.8)
    image = np.repeat(np.arange(num_images), counts)
    # A coarse grid: overlaps of exactly 0.5 and equal overlaps occur.
    boxes = draw.integers(0, 9, (len(image), 4)) * 8.0 + [0, 0, 8, 8]
    boxes[:, 2:] *= draw.choice([0.25, 1, 1, 6], (len(image), 1))  # small, medium and large ones
    truth = Truth(
        image_ids=image_ids,
        sizes=np.tile(np.array([[480, 640]], dtype=np.int32), (num_images, 1)),
        image=image,
        boxes_xywh=boxes,
        area=draw.choice([20.0, 1000.0, 1024.0, 5000.5, 9216.0, 20000.0], len(image)),
        iscrowd=draw.random(len(image)) < crowds,
        category_index=draw.integers(0, num_categories, len(image)).astype(np.int32),
        categories=categories,
    )
    detections = []
    for number in range(num_images):
        mine = np.flatnonzero(image == number)
        count = int(draw.integers(0, detected + 1)) * int(draw.random() < 0.85)
        xywh = draw.integers(0, 9, (count, 4)) * 8.0 + [0, 0, 8, 8]
        labels = draw.integers(1, num_categories + 1, count)
        if len(mine):  # most lie on an object, or near it
            model = mine[draw.integers(0, len(mine), count)]
            near = boxes[model] + draw.choice([0, 0, 0, 0.3, 4], (count, 4))
            is_near = draw.random(count) < 0.7
            xywh = np.where(is_near[:, None], near, xywh)
            labels = np.where(is_near, truth.category_index[model] + 1, labels)
        scores = draw.choice([0.1, 0.5, 0.5, 0.9, 0.123456789, 1.0], count)
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        detections.append(
            {
                "boxes": torch.tensor(xyxy, dtype=torch.float32).reshape(-1, 4),
                "scores": torch.tensor(scores, dtype=torch.float32),
                "labels": torch.tensor(labels, dtype=torch.int64),
            }
        )
    label_map = [
        {"id": number, "name": name, "label": label}
        for label, (number, name) in enumerate(categories, start=1)
    ]
    return Case(truth, detections, label_map)


CASES = st.builds(
    make_case,
    st.integers(0, 2**32),
    num_images=st.integers(1, 7),
    num_categories=st.integers(1, 4),
    objects=st.integers(0, 6),
    detected=st.sampled_from([0, 1, 6, 15]),
    crowds=st.sampled_from([0.0, 0.2, 1.0]),
)


# --- the reference --------------------------------------------------------------------------------


def truth_of(case: Case) -> COCO:
    """Ground truth as pycocotools reads it from a file, with the data set's own ids."""
    truth, coco = case.truth, COCO()
    coco.dataset = {
        "images": [{"id": int(i), "height": 480, "width": 640} for i in truth.image_ids],
        "categories": [{"id": number, "name": name} for number, name in truth.categories],
        "annotations": [
            {
                "id": number + 1,
                "image_id": int(truth.image_ids[truth.image[number]]),
                "category_id": truth.categories[truth.category_index[number]][0],
                "bbox": truth.boxes_xywh[number].tolist(),
                "area": float(truth.area[number]),
                "iscrowd": int(truth.iscrowd[number]),
            }
            for number in range(len(truth.area))
        ],
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def results_of(case: Case) -> list[dict[str, Any]]:
    """Detections in COCO's results format, with the data set's own ids."""
    category_of = {
        entry["label"]: number
        for entry in case.label_map
        for number, name in case.truth.categories
        if name == entry["name"]
    }
    results = []
    for image_id, detected in zip(case.truth.image_ids, case.detections, strict=True):
        boxes = detected["boxes"].numpy()
        for box, score, label in zip(boxes, detected["scores"], detected["labels"], strict=True):
            results.append(
                {
                    "image_id": int(image_id),
                    "category_id": category_of[int(label)],
                    "bbox": [float(v) for v in (*box[:2], box[2] - box[0], box[3] - box[1])],
                    "score": float(score),
                }
            )
    return results


def reference(case: Case, results: list[dict[str, Any]] | Path | None = None) -> Scores:
    """Score with pycocotools only."""
    results = results_of(case) if results is None else results
    coco, printed = truth_of(case), io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        if results:
            results_of_coco = coco.loadRes(str(results) if isinstance(results, Path) else results)
        else:  # loadRes fails on an empty list
            results_of_coco = COCO()
            results_of_coco.dataset = {**coco.dataset, "annotations": []}
            results_of_coco.createIndex()
        evaluation = COCOeval(coco, results_of_coco, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        with contextlib.redirect_stdout(printed):
            evaluation.summarize()
    metrics = dict(zip(METRICS, evaluation.stats.tolist(), strict=True))
    return Scores(metrics, printed.getvalue().rstrip("\n"))


# --- ours -----------------------------------------------------------------------------------------


def feed(evaluator: CocoEvaluator, case: Case, images: Iterable[int], batch_size: int) -> None:
    images = list(images)
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        ids = [int(case.truth.image_ids[image]) for image in batch]
        evaluator.update(ids, [case.detections[image] for image in batch])


def gathered(
    case: Case, world_size: int = 1, batch_size: int = 2, order: list[int] | None = None
) -> tuple[CocoEvaluator, np.ndarray]:
    """Gather what `world_size` processes found, each in its own evaluator."""
    images = order or list(range(len(case.detections)))
    evaluators = [CocoEvaluator(case.truth, case.label_map) for _ in range(world_size)]
    for rank, evaluator in enumerate(evaluators):
        feed(evaluator, case, images[rank::world_size], batch_size)
    main = evaluators[0]
    main.rows = [rows for evaluator in evaluators for rows in evaluator.rows]
    rows = main.gather(Processes(CPU))
    assert rows is not None
    return main, rows


def assert_same(scores: Scores, expected: Scores) -> None:
    assert list(scores.metrics) == list(METRICS)
    assert scores.metrics == expected.metrics


@settings(deadline=None, max_examples=200)
@given(case=CASES, world_size=st.integers(1, 3), batch_size=st.integers(1, 3), data=st.data())
def test_numbers_equal_pycocotools_for_any_processes_and_order(
    case: Case, world_size: int, batch_size: int, data: st.DataObject
) -> None:
    expected = reference(case)
    order = data.draw(st.permutations(range(len(case.detections))))
    evaluator, rows = gathered(case, world_size, batch_size, order)
    for backend in BACKENDS:
        assert_same(evaluator.score(rows, backend), expected)
    assert np.array_equal(rows, gathered(case)[1])


def test_the_random_cases_cover_crowds_empty_images_and_every_number() -> None:
    cases = [make_case(seed) for seed in range(40)]
    scored = [reference(case).metrics for case in cases]
    assert any(case.truth.iscrowd.any() for case in cases)
    assert any(np.diff(np.bincount(c.truth.image, minlength=5)).any() for c in cases)
    assert any(0 in np.bincount(case.truth.image, minlength=5) for case in cases)
    assert any(len(detected["scores"]) == 0 for case in cases for detected in case.detections)
    assert any((np.diff(case.truth.image_ids) < 0).any() for case in cases)
    assert any(2**63 - 1 in case.truth.image_ids for case in cases)
    for name in METRICS:  # each number takes many values
        assert len({metrics[name] for metrics in scored}) > 5, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(4))
def test_more_than_a_hundred_detections_of_a_class_are_cut_as_pycocotools_cuts(
    backend: str, seed: int
) -> None:
    case = make_case(seed, num_images=2, num_categories=2, objects=30, detected=600)
    assert (
        max(int(detected["labels"].bincount(minlength=3).max()) for detected in case.detections)
        > 100
    )
    evaluator, rows = gathered(case)
    assert_same(evaluator.score(rows, backend), reference(case))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "objects, detected", [(0, 0), (0, 6), (6, 0)], ids=["nothing", "no objects", "no detections"]
)
def test_without_objects_or_detections_the_numbers_are_those_of_pycocotools(
    objects: int, detected: int, backend: str
) -> None:
    case = make_case(0, objects=objects, detected=detected)
    evaluator, rows = gathered(case)
    assert rows.shape == (sum(len(d["scores"]) for d in case.detections), 7)
    scores = evaluator.score(rows, backend)
    assert_same(scores, reference(case))
    assert scores.metrics["AP"] == (0 if objects else -1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_boxes_without_area_count_as_pycocotools_counts_them(backend: str) -> None:
    case = make_case(5, detected=10)
    for detected in case.detections:
        detected["boxes"][::2, 2:] = detected["boxes"][::2, :2]
    evaluator, rows = gathered(case)
    assert_same(evaluator.score(rows, backend), reference(case))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_area_is_the_annotations_own(backend: str) -> None:
    case = make_case(2, objects=8, detected=8, crowds=0)
    evaluator, rows = gathered(case)
    by_annotation = evaluator.score(rows, backend).metrics
    sides = case.truth.boxes_xywh[:, 2:]
    by_side = CocoEvaluator(replace(case.truth, area=sides.prod(axis=1)), case.label_map)
    assert by_side.score(rows, backend).metrics["APs"] != by_annotation["APs"]


@settings(deadline=None, max_examples=25)
@given(case=CASES, shift=st.integers(0, 3))
def test_a_label_map_of_another_order_names_the_classes(case: Case, shift: int) -> None:
    # A checkpoint's map may give the classes other labels than their ids' order; the model then
    # says those.
    count = len(case.label_map)
    moved = [{**c, "label": (c["label"] + shift - 1) % count + 1} for c in case.label_map]
    detections = [
        {**detected, "labels": (detected["labels"] + shift - 1) % count + 1}
        for detected in case.detections
    ]
    other = Case(case.truth, detections, moved)
    evaluator, rows = gathered(other)
    for backend in BACKENDS:
        # Another order of classes is another order of summation, which may round the mean.
        expected = pytest.approx(reference(case).metrics, rel=1e-12)
        assert evaluator.score(rows, backend).metrics == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_that_no_class_has_count_for_nothing(backend: str, tmp_path: Path) -> None:
    # A 91-label model may predict one of the labels that COCO has no category for.
    case = make_case(6)
    expected = reference(case)
    strange = [
        {
            "boxes": torch.cat([detected["boxes"], torch.tensor([[0.0, 0, 50, 50]])]),
            "scores": torch.cat([detected["scores"], torch.tensor([0.99])]),
            "labels": torch.cat([detected["labels"], torch.tensor([12])]),
        }
        for detected in case.detections
    ]
    evaluator, rows = gathered(Case(case.truth, strange, case.label_map))
    assert_same(evaluator.score(rows, backend), expected)
    evaluator.write_results(rows, tmp_path / "results.json")
    assert_same(reference(case, tmp_path / "results.json"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_table_is_the_one_pycocotools_prints(backend: str) -> None:
    case = make_case(1)
    evaluator, rows = gathered(case)
    # But for hotcoco's spaces.
    ours, expected = evaluator.score(rows, backend).table, reference(case).table
    assert [line.split() for line in ours.splitlines()] == [
        line.split() for line in expected.splitlines()
    ]
    assert len(ours.splitlines()) == 12


def test_scoring_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    evaluator, rows = gathered(make_case(1))
    for backend in BACKENDS:
        evaluator.score(rows, backend)
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


def test_scoring_twice_gives_the_same() -> None:
    evaluator, rows = gathered(make_case(8, detected=15))
    for backend in BACKENDS:
        assert evaluator.score(rows, backend) == evaluator.score(rows, backend)


def test_half_precision_detections_are_scored_as_float32() -> None:
    case = make_case(9)
    halves = [
        {key: v.bfloat16() if v.is_floating_point() else v for key, v in detected.items()}
        for detected in case.detections
    ]
    singles = [
        {key: v.float() if v.is_floating_point() else v for key, v in detected.items()}
        for detected in halves
    ]
    rows = [
        gathered(Case(case.truth, detected, case.label_map))[1] for detected in (halves, singles)
    ]
    assert np.array_equal(*rows)


# --- results file ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(case=CASES)
def test_the_results_file_gives_pycocotools_the_same_numbers(
    tmp_path_factory: pytest.TempPathFactory, case: Case
) -> None:
    path = tmp_path_factory.getbasetemp() / "detections.json"
    evaluator, rows = gathered(case, world_size=2)
    evaluator.write_results(rows, path)
    written = json.loads(path.read_text())
    key = json.dumps
    assert sorted(written, key=key) == sorted(results_of(case), key=key)
    if written:
        assert_same(reference(case, path), reference(case))


# --- real processes -------------------------------------------------------------------------------


def _evaluate_a_share(rank: int, world_size: int, seeds: list[int], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    processes = Processes(CPU, rank, world_size, dist.new_group(backend="gloo"))
    for seed in seeds:
        case = make_case(seed, num_images=2 if seed == 0 else 7, detected=20)
        evaluator = CocoEvaluator(case.truth, case.label_map)
        feed(evaluator, case, range(rank, len(case.detections), world_size), 2)
        rows = evaluator.gather(processes)
        assert (rows is None) == (rank > 0)
        if rows is not None:
            np.save(folder / f"{seed}.npy", rows)
            scores = {backend: evaluator.score(rows, backend).metrics for backend in BACKENDS}
            (folder / f"{seed}.json").write_text(json.dumps(scores))
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_real_processes_give_the_bits_of_one(tmp_path: Path, world_size: int) -> None:
    seeds = [0, 1, 2]  # of seed 0, the third process sees no image
    # Not a fork of this process: hotcoco's threads do not survive that.
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(
        _evaluate_a_share,
        args=(world_size, seeds, tmp_path),
        nprocs=world_size,
        start_method="forkserver",
    )
    for seed in seeds:
        case = make_case(seed, num_images=2 if seed == 0 else 7, detected=20)
        evaluator, rows = gathered(case)
        assert np.load(tmp_path / f"{seed}.npy").tobytes() == rows.tobytes()
        expected = reference(case).metrics
        assert any(value > 0 for value in expected.values())
        for backend, metrics in json.loads((tmp_path / f"{seed}.json").read_text()).items():
            assert metrics == expected == evaluator.score(rows, backend).metrics


def test_rows_are_by_image_and_in_the_models_order_within() -> None:
    case = make_case(11, num_images=7, detected=20)
    _, rows = gathered(case, world_size=3, order=[6, 0, 5, 1, 4, 2, 3])
    assert (np.diff(rows[:, 0]) >= 0).all()
    ranked = np.argsort(case.truth.image_ids)
    scores = list(itertools.chain(*(case.detections[i]["scores"].tolist() for i in ranked)))
    assert rows[:, 5].tolist() == scores
    assert not any(math.isnan(value) for value in rows.ravel())


# --- what lies behind the numbers -----------------------------------------------------------------


def iou(a: np.ndarray, b: np.ndarray) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[:2] + a[2:], b[:2] + b[2:])
    overlap = float((high - low).clip(0).prod())
    return overlap / (float(a[2:].prod() + b[2:].prod()) - overlap)


def match_slowly(case: Case, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Match at IoU 0.5 class by class; right and wrong `[I, K]`, boxes `[I, K]`, by image id."""
    truth, rows = case.truth, gathered(case)[1]
    shape = (len(truth.image_ids), len(truth.categories))
    right, wrong, boxes = (np.zeros(shape, dtype=int) for _ in range(3))
    for rank, image in enumerate(np.argsort(truth.image_ids)):
        for index in range(shape[1]):
            mine = np.flatnonzero((truth.image == image) & (truth.category_index == index))
            of_class = rows[(rows[:, 0] == rank) & (rows[:, 6] == index + 1)]
            boxes[rank, index] = len(mine)
            taken: set[int] = set()
            for row in of_class[np.argsort(-of_class[:, 5], kind="stable")]:
                overlaps = {
                    i: iou(row[1:5], truth.boxes_xywh[i]) for i in mine.tolist() if i not in taken
                }
                best = max(
                    reversed(overlaps), key=overlaps.__getitem__, default=-1
                )  # of equal last
                is_right = best >= 0 and overlaps[best] >= 0.5
                taken |= {best} if is_right else set()
                if row[5] >= confidence:
                    (right if is_right else wrong)[rank, index] += 1
    return right, wrong, boxes


@pytest.mark.parametrize("seed", range(12))
def test_the_analysis_counts_as_a_slow_matcher_does(seed: int) -> None:
    case = make_case(seed, num_images=7, objects=6, detected=15, crowds=0)
    evaluator, rows = gathered(case)
    analysis = evaluator.analyze(evaluator.evaluation(rows), rows)
    curves, levels = analysis.curves, [0.0, 0.1, 0.12, 0.5, 0.51, 0.9, 1.0]
    for level in levels:
        right, wrong, boxes = (a.sum(axis=0) for a in match_slowly(case, level))
        expected = 2 * right / np.maximum(right + wrong + boxes, 1)
        assert curves["f1"][:, round(level * 100)] == pytest.approx(expected), level
    means = curves["f1"][boxes > 0].mean(axis=0)
    assert means[round(analysis.confidence * 100)] == means.max() > 0
    right, wrong, boxes = match_slowly(case, analysis.confidence)
    assert curves["wrong"].tolist() == wrong.sum(axis=1).tolist()
    assert curves["missed"].tolist() == (boxes - right).sum(axis=1).tolist()
    confusion = curves["confusion"]
    assert confusion.shape == (len(case.label_map) + 1,) * 2
    assert confusion[:-1].sum(axis=1).tolist() == boxes.sum(axis=0).tolist()
    detections = rows[rows[:, 5] >= analysis.confidence, 6].astype(int)
    expected_columns = np.bincount(detections, minlength=len(confusion))[1:]
    assert confusion[:, :-1].sum(axis=0).tolist() == expected_columns.tolist()


@settings(deadline=None, max_examples=60)
@given(case=CASES, shift=st.integers(0, 3))
def test_the_classes_average_to_the_numbers(case: Case, shift: int) -> None:
    count = len(case.label_map)
    moved = [{**c, "label": (c["label"] + shift - 1) % count + 1} for c in case.label_map]
    detections = [
        {**detected, "labels": (detected["labels"] + shift - 1) % count + 1}
        for detected in case.detections
    ]
    evaluator, rows = gathered(Case(case.truth, detections, moved))
    evaluation = evaluator.evaluation(rows)
    metrics, analysis = evaluator.score(rows).metrics, evaluator.analyze(evaluation, rows)
    counted = [row for row in analysis.per_class if row["boxes"]]
    for name, ours in (("AP", "AP"), ("AP50", "AP50"), ("AP75", "AP75"), ("AR100", "AR")):
        mean = np.mean([row[ours] for row in counted]) if counted else -1
        assert mean == pytest.approx(metrics[name], abs=1e-12), name
    assert [row["AP"] for row in counted] == sorted((r["AP"] for r in counted), reverse=True)
    assert sum(row["detections"] for row in analysis.per_class) == len(rows)
    names = {row["name"]: row for row in analysis.per_class}
    for k, (number, name) in enumerate(case.truth.categories):
        of_class = case.truth.category_index == k
        assert names[name]["id"] == number
        assert names[name]["boxes"] == int((of_class & ~case.truth.iscrowd).sum())
        own = np.flatnonzero(analysis.curves["labels"] == names[name]["label"])
        curve = analysis.curves["precision"][:, int(own[0])]
        expected = [names[name][key] for key in ("AP50", "AP75", "AP")]
        assert curve.mean(axis=1) == pytest.approx(expected)
    assert set(analysis.errors["delta_ap"]) == {*"Cls Loc Both Dupe Bkg Miss FP FN".split()}


def test_detections_on_crowds_are_neither_right_nor_wrong() -> None:
    case = make_case(3, objects=8, detected=12, crowds=1.0)
    assert case.truth.iscrowd.all() and len(gathered(case)[1])
    evaluator, rows = gathered(case)
    analysis = evaluator.analyze(evaluator.evaluation(rows), rows)
    assert analysis.curves["missed"].sum() == 0
    assert analysis.curves["wrong"].sum() < len(rows)
    assert all(row["AP"] == row["F1"] == -1 for row in analysis.per_class)


def test_the_class_table_has_twenty_rows_at_most() -> None:
    rows: list[dict[str, Any]] = [
        {"name": f"class {i}", "boxes": 90 - i, "detections": i, "AP": 1 - i / 100}
        | {"AP50": 0.5, "AP75": 0.25, "AR": 0.125}
        for i in range(80)
    ]
    lines = class_table(rows).splitlines()
    assert len(lines) == 1 + 20
    assert lines[1].split()[:3] == ["class", "0", "1.000"]
    assert lines[11] == "… 61 more classes …"
    assert [line.split()[1] for line in lines[12:]] == [str(i) for i in range(71, 80)]
    without = {**rows[0], "name": "unseen", "boxes": 0, "AP": -1.0}
    lines = class_table([*rows[:3], without]).splitlines()
    assert len(lines) == 5 and lines[4].split() == ["unseen", *"----", "0", "0"]
    assert len({len(line) for line in lines}) == 1  # columns stand below each other
    lines = class_table([*rows[:3], *[without] * 30]).splitlines()
    assert len(lines) == 1 + 3 + 1 and lines[4] == "… 30 more classes, 30 without boxes …"
    lines = class_table([*rows[:25], *[without] * 2]).splitlines()
    assert len(lines) == 1 + 20 and lines[11] == "… 8 more classes, 2 without boxes …"


def test_a_class_name_cannot_write_lines_or_move_the_cursor() -> None:
    name = "cat\n12:00 AP 1\x1b[2J"
    row = {"name": name, "boxes": 1, "detections": 1}
    lines = class_table([row | dict.fromkeys(("AP", "AP50", "AP75", "AR"), 0.5)]).split("\n")
    assert len(lines) == 2 and lines[1].startswith(r"cat\n12:00 AP 1\x1b[2J ")
    assert lines[1].isprintable() and len(lines[0]) == len(lines[1])


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([], "no detections; 3 boxes missed"),
        (
            [[0, 60, 60, 30, 30, 0.9, 1]],
            "AP50 gains nothing by correcting one kind of error (TIDE); 3 boxes missed, "
            "1 detections wrong",
        ),
        (
            [[image, 10, 10, 30, 30, 0.9, 2] for image in (0, 1)],
            "AP50 lost to errors (TIDE): Cls 0.500",
        ),
    ],
)
def test_the_error_line_reports_missed_boxes_when_no_correction_gains(
    rows: list[list[float]], line: str
) -> None:
    truth = Truth(
        image_ids=np.arange(3),
        sizes=np.full((3, 2), 100, np.int32),
        image=np.arange(3),
        boxes_xywh=np.tile([10.0, 10, 30, 30], (3, 1)),
        area=np.full(3, 900.0),
        iscrowd=np.zeros(3, bool),
        category_index=np.array([0, 0, 1], np.int32),
        categories=((1, "a"), (2, "b")),
    )
    label_map = [{"id": i, "name": name, "label": i} for i, name in truth.categories]
    evaluator, detections = CocoEvaluator(truth, label_map), np.array(rows).reshape(-1, 7)
    analysis = evaluator.analyze(evaluator.evaluation(detections), detections)
    assert error_line(analysis).startswith(line)


def test_detections_that_are_not_finite_are_refused_with_the_images() -> None:
    case = make_case(4, detected=10)
    number = next(i for i, detected in enumerate(case.detections) if len(detected["scores"]))
    case.detections[number]["boxes"][0, 2] = float("nan")
    name = re.escape(f"image ids [{case.truth.image_ids[number]}]")
    with pytest.raises(UserError, match=f"scores on 1 images are not finite .{name}"):
        gathered(case)
