"""Pictures show what was evaluated, and can be read: pytest tests/test_report.py."""

import copy
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from coco_eval import Analysis, CocoEvaluator, Results, write_results
from coco_utils import label_categories
from data.coco_arrays import Annotations
from data.coco_json import read_annotations
from tools import report
from tools.plots import drawing, eval_plots
from utils import UserError, run_command

NAMES = ["cell", "a class with a name that is far too long to be shown", "Blutplättchen"]
PICTURES = {
    "pr_curves.png",
    "per_class_ap.png",
    "confusion_matrix.png",
    "errors.png",
    "predictions.jpg",
    "worst_images.jpg",
}


def detect(annotations: Annotations, noise: float, seed: int = 0) -> np.ndarray:
    """Find most boxes, some of another class, some beside the object, and some where none is."""
    draw, image = np.random.default_rng(seed), annotations.image_of_annotation()
    rank = np.searchsorted(np.sort(annotations.image_ids), annotations.image_ids)[image]
    num_classes = len(annotations.categories)
    rows = np.zeros((len(rank), 7))
    rows[:, 0], rows[:, 1:5] = rank, annotations.boxes_xywh
    rows[:, 1:5] += draw.normal(0, noise, (len(rank), 4)) if noise else 0
    rows[:, 3:5] = np.abs(rows[:, 3:5]) + 1
    rows[:, 5] = draw.uniform(0.3, 1, len(rank))
    is_other = draw.random(len(rank)) < (0.2 if noise else 0)
    other = draw.integers(1, num_classes + 1, len(rank))
    rows[:, 6] = np.where(is_other, other, annotations.category_index + 1)
    if noise:
        rows = rows[draw.random(len(rows)) < 0.8]
        stray = rows[draw.random(len(rows)) < 0.3]
        stray[:, 1:5], stray[:, 5] = [1, 1, 9, 9], 0.2
        rows = np.concatenate([rows, stray])
    return rows[np.argsort(rows[:, 0], kind="stable")]


def analyze(
    annotations: Annotations, rows: np.ndarray
) -> tuple[Analysis, list[dict[str, Any]], CocoEvaluator]:
    label_map = label_categories(annotations.categories)
    evaluator = CocoEvaluator(annotations, label_map)
    return evaluator.analyze(evaluator.evaluation(rows), rows), label_map, evaluator


@pytest.fixture(scope="module")
def truth(tiny_shapes: Path) -> Annotations:
    return read_annotations(tiny_shapes / "annotations" / "instances_train2017.json")[0]


def generated(tmp_path: Path, num_classes: int) -> Annotations:
    """Generate annotations of `num_classes` classes; a third of a larger number has no boxes."""
    draw = np.random.default_rng(num_classes)
    used = num_classes if num_classes < 9 else num_classes * 2 // 3
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(40)
        ],
        "annotations": [
            {"id": i, "image_id": i % 40, "category_id": i % used + 1, "area": 900, "iscrowd": 0}
            | {"bbox": [*draw.integers(0, 400, 2).tolist(), 30, 30]}
            for i in range(400)
        ],
        "categories": [
            {"id": i + 1, "name": f"{NAMES[i % 3]}{i // 3 or ''}"} for i in range(num_classes)
        ],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    return read_annotations(path)[0]


def write(
    folder: Path,
    annotations: Annotations,
    images: Path | None,
    rows: np.ndarray,
    tested: dict[str, Any] | None = None,
) -> tuple[Analysis, CocoEvaluator]:
    analysis, label_map, evaluator = analyze(annotations, rows)
    data: dict[str, Any] = {"annotations": str(annotations.path), "categories": label_map}
    if images is not None:
        data["images"] = str(images)
    results = Results(*evaluator.score(rows), rows, analysis, {})
    write_results(results, evaluator, folder, False, {"data": data, "tested": tested})
    return analysis, evaluator


# --- the command ----------------------------------------------------------------------------------


def test_a_run_is_drawn_from_its_newest_evaluation(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    flags = ("--epochs", "1", "--score-thresh", "0", "--val-loss")
    printed = train(*flags, "--output-dir", folder).stdout
    results = json.loads((folder / "eval" / "epoch_0" / "results.json").read_text())
    assert results["val_loss"] > 0 and "val_classification" in results
    analysis = json.loads((folder / "eval" / "epoch_0" / "analysis.json").read_text())
    assert analysis["speed"]["model_images_per_second"] > analysis["speed"]["images_per_second"] > 0
    assert {row["name"] for row in analysis["per_class"]} == {"circle", "square", "triangle"}
    assert "by class, best first:" in printed and "AP50 lost to errors (TIDE):" in printed
    done = run_script("-m", "tools.report", folder)
    assert "epoch_0, drawn into" in done.stdout
    assert {path.name for path in folder.iterdir()} >= {*PICTURES, "curves.png", "report.html"}
    page = (folder / "report.html").read_text()
    for name in (*PICTURES, "curves.png"):
        assert name in done.stdout and f"<figcaption>{name}" in page
    assert f"{results['AP']:.3f}" in page and "circle" in page
    versions = json.loads((folder / "args.json").read_text())["versions"]
    assert versions["torch"] in page and "clip_grad_norm" in page


def test_the_newest_evaluation_is_the_highest_epoch(tmp_path: Path) -> None:
    for epoch in (2, 9, 10):
        (tmp_path / "eval" / f"epoch_{epoch}").mkdir(parents=True)
    for epoch in (2, 9):
        (tmp_path / "eval" / f"epoch_{epoch}" / "results.json").write_text("{}")
    assert report.newest_evaluation(tmp_path).name == "epoch_9"  # the tenth is being written
    (tmp_path / "eval" / "epoch_10" / "results.json").write_text("{}")
    assert report.newest_evaluation(tmp_path).name == "epoch_10"


def test_a_folder_without_a_run_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        run_command(report.main)
    message = "holds neither a run nor an evaluation; give the --output-dir of train.py"
    assert caught.value.code == 1
    assert capsys.readouterr().err == f"error: {tmp_path} {message}\n"


def test_pictures_are_of_the_data_that_was_evaluated(
    truth: Annotations, tiny_shapes: Path, tmp_path: Path
) -> None:
    write(tmp_path / "one", truth, tiny_shapes / "train2017", detect(truth, 4))
    report.draw(tmp_path / "one")
    assert {path.name for path in (tmp_path / "one").iterdir()} >= PICTURES
    for name in PICTURES:
        with Image.open(tmp_path / "one" / name) as picture:
            picture.load()
            assert min(picture.size) > 200
    about = tmp_path / "one" / "analysis.json"
    content = json.loads(about.read_text())
    other = tiny_shapes / "annotations" / "instances_val2017.json"
    content["data"]["annotations"] = str(other)
    about.write_text(json.dumps(content))
    with pytest.raises(UserError, match="has other images than"):
        report.draw(tmp_path / "one")


def test_the_output_of_tools_score_is_drawn_without_images(
    truth: Annotations, tmp_path: Path
) -> None:
    write(tmp_path / "scored", truth, None, detect(truth, 4))
    lines = report.draw(tmp_path / "scored")
    assert lines[-1].strip().startswith("no images")
    drawn = {path.name for path in (tmp_path / "scored").iterdir()}
    assert drawn >= {name for name in PICTURES if name.endswith(".png")}
    assert not any(name.endswith(".jpg") for name in drawn)


# --- test evaluations -----------------------------------------------------------------------------

TESTED = {"weights": "runs/a/best.pth", "step": 12}
TITLE = "test evaluation of runs/a/best.pth of step 12"


def write_run(folder: Path, truth: Annotations, images: Path) -> dict[str, float]:
    """Write a run with an evaluation of epoch 0; return its metrics."""
    write(folder / "eval" / "epoch_0", truth, images, detect(truth, 6))
    metrics = json.loads((folder / "eval" / "epoch_0" / "results.json").read_text())
    record = {"step": 4, "epoch": 0, **metrics}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    args = {"lr": 0.01, "model": "retinanet_resnet18_fpn"}
    about: dict[str, Any] = {"args": args, "summary": {"data": "16 images"}}
    (folder / "args.json").write_text(json.dumps(about | {"versions": {"torch": "2"}}))
    return metrics


def test_a_test_evaluation_stands_beside_the_runs_own(
    truth: Annotations, tiny_shapes: Path, tmp_path: Path
) -> None:
    folder, images = tmp_path / "run", tiny_shapes / "train2017"
    of_run = write_run(folder, truth, images)
    report.draw(folder)
    test_folder, page = folder / "eval" / "test", folder / "report.html"
    assert "test evaluation" not in page.read_text()
    pictures = {name: (folder / name).read_bytes() for name in PICTURES}
    write(test_folder, truth, images, detect(truth, 1), TESTED)
    tested = json.loads((test_folder / "results.json").read_text())
    assert f"{tested['AP']:.3f}" != f"{of_run['AP']:.3f}"
    lines = report.draw(folder)
    assert f"{folder / 'eval' / 'epoch_0'}, drawn into {folder}:" in lines
    assert f"{TITLE}, drawn into {test_folder}:" in lines
    before, after = page.read_text().split(f"<h2>{TITLE}</h2>")
    assert f"<td>{of_run['AP']:.3f}</td>" in before and f"<td>{tested['AP']:.3f}</td>" in after
    assert f"<td>{tested['AP']:.3f}</td>" not in before
    for name, content in pictures.items():
        assert (folder / name).read_bytes() == content and (test_folder / name).is_file()
        assert name in before and name in after


def test_a_folder_with_only_a_test_evaluation_is_drawn_as_one(
    truth: Annotations, tiny_shapes: Path, tmp_path: Path
) -> None:
    folder, test_folder = tmp_path / "tested", tmp_path / "tested" / "eval" / "test"
    write(test_folder, truth, tiny_shapes / "train2017", detect(truth, 4), TESTED)
    assert f"{TITLE}, drawn into {test_folder}:" in report.draw(folder)
    page = (folder / "report.html").read_text()
    assert "<h1>tested</h1>" in page and f"<h2>{TITLE}</h2>" in page and "Evaluations" not in page
    assert {path.name for path in folder.iterdir()} == {"eval", "report.html"}
    assert f"{TITLE}, drawn into {test_folder}:" in report.draw(
        test_folder
    )  # it may also be named itself


def test_files_in_the_root_of_a_run_are_not_its_evaluation(
    truth: Annotations, tiny_shapes: Path, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", truth, tiny_shapes / "train2017")
    write(tmp_path / "other", truth, None, detect(truth, 1))
    for path in (tmp_path / "other").iterdir():
        path.rename(tmp_path / "run" / path.name)
    assert report.newest_evaluation(tmp_path / "run").name == "epoch_0"


def test_a_test_whose_data_is_gone_keeps_its_numbers_in_the_report(
    truth: Annotations, tiny_shapes: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    write_run(folder, truth, tiny_shapes / "train2017")
    test_folder = folder / "eval" / "test"
    write(test_folder, truth, tiny_shapes / "train2017", detect(truth, 1), TESTED)
    content = json.loads((test_folder / "analysis.json").read_text())
    content["data"]["annotations"] = str(tmp_path / "gone.json")
    (test_folder / "analysis.json").write_text(json.dumps(content))
    lines = [line for line in report.draw(folder) if line.startswith(f"{TITLE}, not drawn: ")]
    assert len(lines) == 1 and "gone.json does not exist" in lines[0]
    ap = json.loads((test_folder / "results.json").read_text())["AP"]
    assert f"<td>{ap:.3f}</td>" in (folder / "report.html").read_text().split(TITLE)[1]


def test_detections_without_scores_are_no_report(tmp_path: Path) -> None:
    (tmp_path / "eval" / "test").mkdir(parents=True)
    (tmp_path / "eval" / "test" / "detections.json").write_text("[]")
    with pytest.raises(UserError, match="eval/test has detections without scores"):
        report.draw(tmp_path)


# --- worst images ---------------------------------------------------------------------------------


def test_perfect_detections_leave_no_worst_image(
    truth: Annotations, tiny_shapes: Path, tmp_path: Path
) -> None:
    rows = detect(truth, 0)
    analysis, _ = write(tmp_path / "run", truth, tiny_shapes / "train2017", rows)
    assert analysis.curves["missed"].sum() + analysis.curves["wrong"].sum() == 0
    (tmp_path / "run" / "worst_images.jpg").write_bytes(b"of an earlier epoch")
    lines = report.draw(tmp_path / "run")
    assert any("not drawn: nothing is missed or wrong" in line for line in lines)
    assert not (tmp_path / "run" / "worst_images.jpg").exists()


def test_the_worst_images_name_files_and_the_numbers_of_the_analysis(
    truth: Annotations, tiny_shapes: Path
) -> None:
    rows = detect(truth, 6)
    analysis, label_map, _ = analyze(truth, rows)
    missed, wrong = analysis.curves["missed"], analysis.curves["wrong"]
    pictures = report.Pictures(
        truth, tiny_shapes / "train2017", label_map, rows, analysis.confidence
    )
    tiles = pictures.worst_tiles(missed, wrong, count=5)
    order = np.argsort(-(missed + wrong), kind="stable")[:5]
    assert (missed + wrong)[order[0]] > 1 and missed.sum() > 0 and wrong.sum() > 0
    assert len(tiles) == 10
    for rank, left, right in zip(order.tolist(), tiles[::2], tiles[1::2], strict=True):
        image_id = analysis.curves["image_ids"][rank]
        (number,) = np.flatnonzero(truth.image_ids == image_id)
        assert left.caption[0] == f"{truth.file_name(int(number))}, id {image_id}"
        assert left.caption[1].startswith(f"annotated: {missed[rank]} of ")
        assert right.caption[1].startswith(f"predicted: {wrong[rank]} of ")
        shown = [text for text in left.texts if text and text.startswith("missed ")]
        assert len(shown) == left.labels.count(report.MISSED) == missed[rank]
        assert len([text for text in right.texts if text]) == wrong[rank]


# --- legible --------------------------------------------------------------------------------------


def figures(annotations: Annotations) -> dict[str, Figure]:
    analysis, label_map, _ = analyze(annotations, detect(annotations, 4))
    names = [category["name"] for category in label_map]
    return {
        "curves": eval_plots.draw_curves(
            analysis.per_class, analysis.curves, analysis.confidence, label_map
        ),
        "classes": eval_plots.draw_class_ap(analysis.per_class, label_map),
        "confusion": eval_plots.draw_confusion(
            names, analysis.curves["confusion"], analysis.confidence
        ),
        "errors": eval_plots.draw_errors(analysis.errors),
    }


def texts_of(figure: Figure) -> list[tuple[str, Any]]:
    """Return every text in the figure with its place, pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    visible = []
    for axes in figure.axes:
        legend = axes.get_legend()
        texts = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]  # type: ignore[attr-defined]
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            low, high = sorted((low, high))
            texts += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
            texts += [t.label2 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
        texts += legend.get_texts() if legend else []
        visible += [text for text in texts if text.get_visible() and text.get_text()]
    return [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in visible]


@pytest.mark.parametrize("num_classes", [1, 3, 8, 30, 91])
def test_no_text_of_a_figure_overlaps_another_or_leaves_the_page(
    num_classes: int, tmp_path: Path
) -> None:
    for name, figure in figures(generated(tmp_path, num_classes)).items():
        texts = texts_of(figure)
        assert len(texts) > 8, name
        page = figure.bbox
        for text, box in texts:
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1
            assert inside and box.y1 <= page.y1 + 1, f"{name}: {text}"
        for (one, a), (two, b) in itertools.combinations(texts, 2):
            # Rotated labels have the box of their diagonal, so they are skipped.
            if "confusion" in name and (a.height > 20 or b.height > 20):
                continue
            lies = min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
            assert not lies, f"{name}: {one!r} and {two!r}"


@pytest.mark.parametrize("num_classes", [1, 3, 91])
def test_many_classes_are_cut_and_the_title_states_it(num_classes: int, tmp_path: Path) -> None:
    drawn = figures(generated(tmp_path, num_classes))
    overall, of_class, f1_axes = drawn["curves"].axes
    assert len(overall.lines) == 3
    assert len(of_class.lines) == min(num_classes, 8)
    colours = [line.get_color() for line in of_class.lines]
    assert len(set(colours)) == len(colours)  # or two classes would look the same
    assert len(drawn["classes"].axes[0].patches) == min(num_classes, 40)
    cells = drawn["confusion"].axes[0].images[0].get_array()
    assert cells is not None and cells.shape == (min(num_classes, 20) + 1,) * 2
    if num_classes == 91:
        assert "4 best and 4 worst of 60 classes" in of_class.get_title()
        title = drawn["classes"].axes[0].get_title("left")
        assert "20 best and 20 worst of 60 classes; 31 without boxes left out" in title
        assert "the 20 most confused of 91 classes" in drawn["confusion"].axes[0].get_title()


def test_figures_show_the_numbers_of_the_analysis(truth: Annotations) -> None:
    analysis, label_map, _ = analyze(truth, detect(truth, 4))
    drawn = figures(truth)
    bars = [bar.get_width() for bar in drawn["classes"].axes[0].patches]  # type: ignore[attr-defined]
    assert bars == [row["AP"] for row in analysis.per_class]
    shown = {text.get_text() for text in drawn["confusion"].axes[0].texts}
    counts = analysis.curves["confusion"]
    assert shown == {str(count) for count in counts.ravel().tolist() if count}
    lengths = [bar.get_width() for bar in drawn["errors"].axes[0].patches]  # type: ignore[attr-defined]
    assert lengths == [analysis.errors["delta_ap"][kind] for kind in eval_plots.ERRORS]


Box = tuple[float, float, float, float]
BOXES = st.lists(st.tuples(*[st.floats(-20, 340)] * 4), max_size=30)


@settings(deadline=None, max_examples=60)
@given(boxes=BOXES, width=st.floats(10, 200))
def test_texts_on_a_picture_never_overlap_or_leave_it(boxes: Sequence[Box], width: float) -> None:
    taken: list[Box] = []
    for box in boxes:
        room = drawing._free_room(box, width, 14, (320, 240), taken)
        if room is None:
            assert taken  # the first finds room
            continue
        x1, y1, x2, y2 = room
        assert 0 <= x1 and x2 < 320 and 0 <= y1 and y2 < 240
        assert (x2 - x1, y2 - y1) == pytest.approx((width, 14))
        for a, b, c, d in taken:
            assert x2 < a or c < x1 or y2 < b or d < y1
        taken.append(room)


def plain_tile(height: int, width: int, *caption: str) -> drawing.Tile:
    image = torch.full((3, height, width), 40, dtype=torch.uint8)
    return drawing.Tile(image, np.zeros((0, 4)), [], [], caption)


def test_boxes_have_the_colour_of_their_class_and_empty_images_stay(tmp_path: Path) -> None:
    label_map = [{"label": 4, "name": "a"}, {"label": 9, "name": "b"}]
    colours = drawing.class_colours(label_map)
    boxes = np.array([[10.0, 20, 50, 40], [60, 70, 90, 95]])
    empty = plain_tile(100, 100)
    tile = drawing.Tile(empty.image, boxes, [4, 9], [None, None])
    before = copy.deepcopy(tile.image)
    drawn = drawing.draw_boxes(tile, colours, side=200)
    assert drawn.shape == (3, 200, 200) and torch.equal(tile.image, before)
    for box, label in zip(boxes, (4, 9), strict=True):
        x, y = (2 * box[:2]).astype(int).tolist()
        expected = [int(colours[label][i : i + 2], 16) for i in (1, 3, 5)]
        assert drawn[:, y, x].tolist() == expected
    assert drawing.draw_boxes(empty, colours, side=200).unique().tolist() == [40]


def test_each_of_91_classes_has_its_own_colour_in_every_picture() -> None:
    label_map = [{"label": label, "name": str(label)} for label in range(1, 92)]
    colours = drawing.class_colours(label_map)
    assert len(set(colours.values())) == len({drawing.on_white(c) for c in colours.values()}) == 91
    assert drawing.MISSED not in colours.values()
    assert list(colours.values())[:8] == list(drawing.PALETTE)


@pytest.mark.parametrize("shape", [(60, 100), (100, 60), (30, 100)])
def test_a_row_has_no_gaps_and_captions_stand_below_their_image(shape: tuple[int, int]) -> None:
    tiles = [plain_tile(*shape, "a.jpg, id 1"), plain_tile(60, 100), plain_tile(60, 100)]
    sheet = drawing.draw_sheet(tiles, {}, columns=2, column=200).float().mean(dim=0)
    assert sheet.shape[1] == 2 * (200 + drawing.GAP) + drawing.GAP
    first = sheet[drawing.GAP + 2]  # a line of pixels through both images of the first row
    dark = (first == 40).sum().item()
    assert dark == pytest.approx(400, abs=1)  # the width of both columns, however they share it
    left = int(round(400 * (shape[1] / shape[0]) / (shape[1] / shape[0] + 100 / 60)))
    height = round(left * shape[0] / shape[1])
    caption = sheet[drawing.GAP + height + 2 : drawing.GAP + height + 17, drawing.GAP :][:, :left]
    assert (caption == 255).float().mean() > 0.5 and (caption < 128).sum() > 20


def test_a_long_caption_is_cut_in_the_middle() -> None:
    text = "photographs/2024/IMG_0001_a_long_name.jpg, id 123456"
    assert drawing.shorten(text, len(text)) == text
    short = drawing.shorten(text, 20)
    assert len(short) == 20 and short.startswith("photograp…") and short.endswith("id 123456")
    assert drawing._draw_caption([text], 100).shape == (3, 17, 100)


def test_characters_without_a_glyph_are_escaped_and_other_fonts_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawing._drawable.cache_clear()
    known = drawing._characters(drawing._default_font())
    others = {e.fname for e in font_manager.fontManager.ttflist} - {drawing._default_font()}
    extra = next(
        chr(c)
        for f in sorted(others)
        for c in drawing._characters(f) - known
        if chr(c).isprintable()
    )
    text, font = drawing._drawable(extra)
    assert text == extra and font != drawing._default_font()
    assert ord(extra) in drawing._characters(font)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    drawing._drawable.cache_clear()
    assert drawing._drawable(extra) == (ascii(extra)[1:-1], drawing._default_font())
    drawing._drawable.cache_clear()
