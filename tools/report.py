"""Draw what a run left: `python -m tools.report runs/NAME`.

Reads the records of the run, its newest evaluation and the validation images. Writes pictures,
`report.html` with all of them, and `MODEL_CARD.md` into the folder that was named. The run may have
ended or still train. What `train.py --test-only` evaluated is drawn into eval/test, and has its own
part in the report. The folder may also be that of one evaluation. Of several runs the curves are
drawn over each other:

    python -m tools.report runs/a runs/b --output comparison
"""

from __future__ import annotations

if not __package__:  # run as a file, it would not find the modules beside tools/
    raise SystemExit("run it as: python -m tools.report")

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.io import write_jpeg

import coco_utils
import utils
from coco_eval import CocoEvaluator
from data import coco_arrays, coco_json, locate
from tools.plots import drawing, eval_plots, html_report, model_card, run_plots
from tools.plots.drawing import Tile
from utils import UserError, run_command

MISSED = -1  # label of a box that has no detection
CARD = "MODEL_CARD.md"
COLUMNS = 4  # of a sheet: two pairs of annotated and predicted


def newest_evaluation(run: Path) -> Path:
    """Return the folder of the last finished evaluation of a run, or `run` if it is one itself.

    Raises:
        UserError: if there is none.
    """
    if (run / "analysis.json").is_file() and not (run / "args.json").is_file():
        return run
    folders = [path.parent for path in run.glob("eval/epoch_*/results.json")]
    if not folders and (run / "eval" / "test" / "detections.json").is_file():
        raise UserError(f"{run}/eval/test has detections without scores, so there is no report")
    if not folders:
        raise UserError(
            f"{run} holds neither a run nor an evaluation; give the --output-dir of train.py"
        )
    return max(folders, key=lambda folder: int(folder.name.removeprefix("epoch_")))


class Pictures:
    """Draws images of a data set in pairs: annotations on the left, predictions on the right.

    Args:
        images: folder.
        detections: `[D, 7]` as `CocoEvaluator.gather` returns them.
        score_thresh: detections below are left out.
    """

    def __init__(
        self,
        annotations: coco_arrays.Annotations,
        images: Path,
        label_map: Sequence[dict[str, Any]],
        detections: np.ndarray,
        score_thresh: float,
    ) -> None:
        self.data = coco_utils.CocoDetection(images, annotations, label_map)
        self.evaluator = CocoEvaluator(annotations, label_map)
        # A model of 91 labels may predict some that have no class.
        known = np.isin(detections[:, 6], self.evaluator.labels)
        self.detections = detections[known & (detections[:, 5] >= score_thresh)]
        self.colours = {**drawing.class_colours(label_map), MISSED: drawing.MISSED}
        self.names = drawing.class_names(label_map)

    def draw_some(self, count: int = 16) -> Tensor:
        """Draw `count` images, taken evenly over the data set, each box with its class.

        Returns:
            uint8 `[3, H, W]`.
        """
        chosen = np.linspace(0, len(self.data) - 1, min(count, len(self.data))).round().astype(int)
        tiles: list[Tile] = []
        for number in chosen.tolist():
            truth = drawing.annotated_tile(self.data, number)
            rows = self._rows_of(number)
            left = [*truth.caption, f"annotated: {len(truth.labels)} boxes"]
            right = ["", f"predicted: {len(rows)} boxes"]
            tiles.append(Tile(truth.image, truth.boxes, truth.labels, truth.texts, left))
            tiles.append(self._predicted(truth.image, rows, self._texts(rows), right))
        return self._sheet(tiles)

    def draw_worst(self, missed: np.ndarray, wrong: np.ndarray, count: int = 16) -> Tensor | None:
        """Draw the `count` images with the most boxes missed and detections wrong; these have text.

        Args:
            missed, wrong: `[I]` how many, by image id, at IoU 0.5.

        Returns:
            uint8 `[3, H, W]`, or None if nothing is missed or wrong.
        """
        tiles = self.worst_tiles(missed, wrong, count)
        return self._sheet(tiles) if tiles else None

    def worst_tiles(self, missed: np.ndarray, wrong: np.ndarray, count: int) -> list[Tile]:
        """Return the tiles that `draw_worst` draws."""
        order = np.argsort(-(missed + wrong), kind="stable")[:count]
        number_of = np.argsort(self.evaluator.image_rank)
        diagnosis = self.evaluator.evaluation(self.detections).image_diagnostics(iou_thr=0.5)
        tiles: list[Tile] = []
        for rank in order[(missed + wrong)[order] > 0].tolist():
            number = int(number_of[rank])
            tiles += self._error_tiles(number, diagnosis["gt_status"], diagnosis["dt_status"])
        return tiles

    def _error_tiles(
        self, number: int, gt_status: Mapping[int, str], dt_status: Mapping[int, str]
    ) -> list[Tile]:
        truth, image = self.data.annotations, self.data[0, number][0]
        rows = np.arange(*truth.offsets[number : number + 2])
        labels = self.evaluator.labels[truth.category_index[rows]].tolist()
        texts: list[str | None] = [None] * len(rows)
        for i, row in enumerate(rows.tolist()):
            if truth.iscrowd[row]:
                texts[i] = "crowd"
            elif gt_status.get(row + 1) == "fn":
                texts[i] = f"missed {self.names[labels[i]]}"
                labels[i] = MISSED
        boxes = coco_arrays.to_xyxy(truth.boxes_xywh[rows])
        counts = f"{labels.count(MISSED)} of {len(rows) - texts.count('crowd')} boxes missed"
        caption = [drawing.image_caption(truth, number), f"annotated: {counts}"]
        left = Tile(image, boxes, labels, texts, caption)

        rows = self._rows_of(number)
        is_wrong = [dt_status.get(row + 1) == "fp" for row in rows.tolist()]
        pairs = zip(self._texts(rows), is_wrong, strict=True)
        counts = f"{sum(is_wrong)} of {len(rows)} detections wrong"
        shown = [text if bad else None for text, bad in pairs]
        return [left, self._predicted(image, rows, shown, ["", f"predicted: {counts}"])]

    def _rows_of(self, number: int) -> np.ndarray:
        return np.flatnonzero(self.detections[:, 0] == self.evaluator.image_rank[number])

    def _texts(self, rows: np.ndarray) -> list[str]:
        return [f"{self.names[int(r[6])]} {r[5]:.2f}" for r in self.detections[rows]]

    def _predicted(
        self, image: Tensor, rows: np.ndarray, texts: Sequence[str | None], caption: Sequence[str]
    ) -> Tile:
        boxes = coco_arrays.to_xyxy(self.detections[rows, 1:5])
        return Tile(image, boxes, self.detections[rows, 6].astype(int).tolist(), texts, caption)

    def _sheet(self, tiles: Sequence[Tile]) -> Tensor:
        return drawing.draw_sheet(tiles, self.colours, min(COLUMNS, len(tiles)))


def draw(folder: Path) -> list[str]:
    """Draw everything that a run, or one evaluation, holds; return lines that name the files.

    A test evaluation is drawn into its own folder.

    Raises:
        UserError: if there is neither, or the annotations of the evaluation changed.
    """
    is_run, test_folder = (folder / "args.json").is_file(), folder / "eval" / "test"
    is_tested = (test_folder / "results.json").is_file()
    if not is_run and not is_tested:
        return draw_evaluation(newest_evaluation(folder), folder)[0]
    lines, pictures = [f"{folder}:"], {}
    runs, analysis = [], None
    if is_run:
        run = run_plots.read_run(folder)
        curves = folder / "curves.png"
        run_plots.draw_run_curves([run]).savefig(curves)
        pictures[curves] = "losses, learning rate, AP and speed over steps"
        lines.append(_line(curves.name, pictures[curves]))
        runs.append(run)
        if run.evaluations:
            newest = newest_evaluation(folder)
            more, drawn = draw_evaluation(newest, folder)
            lines += more
            pictures |= drawn
            analysis = json.loads((newest / "analysis.json").read_text())
            lines += write_card(run, folder)
        else:
            lines.append("  no evaluation yet; train.py makes one every --eval-every epochs")
    test = None
    if is_tested:
        more, test = draw_test(test_folder)
        lines += more
    page = folder / "report.html"
    html_report.write_report(page, runs, pictures, analysis, test)
    return [*lines, f"all of it in one file: {page}"]


def write_card(run: run_plots.RunRecords, folder: Path) -> list[str]:
    """Write the model card of a run's best checkpoint; return a line to print."""
    assert run.best is not None
    analysis = folder / "eval" / f"epoch_{run.best['epoch']}" / "analysis.json"
    if not analysis.is_file():
        return [f"  no {CARD}: {analysis} is missing"]
    text = model_card.model_card(run, json.loads(analysis.read_text()))
    utils.replace_file(folder / CARD, text + "\n")
    return [_line(CARD, "to publish best.pth with; fill in its licence")]


def draw_test(source: Path) -> tuple[list[str], html_report.TestEvaluation]:
    """Draw the test evaluation in the folder `source`; return lines to print, and its report.

    If its data is not at hand any more, only the numbers are shown.
    """
    analysis = json.loads((source / "analysis.json").read_text())
    results = json.loads((source / "results.json").read_text())
    title = title_of(analysis, source)
    try:
        lines, pictures = draw_evaluation(source, source)
    except UserError as error:
        lines, pictures = [f"{title}, not drawn: {error}"], {}
    return lines, html_report.TestEvaluation(title, results, analysis, pictures)


def title_of(analysis: Mapping[str, Any], source: Path) -> str:
    """Return what was evaluated in the folder `source`: an epoch of a run, or a checkpoint."""
    tested = analysis.get("tested")
    if tested is None:
        return str(source)
    step = "" if tested["step"] is None else f" of step {tested['step']}"
    return f"test evaluation of {tested['weights']}{step}"


def compare(folders: Sequence[Path], output: Path) -> list[str]:
    """Draw the curves of several runs over each other, in `output`; return lines to print.

    Raises:
        UserError: if one of them holds no run.
    """
    runs = [run_plots.read_run(folder) for folder in folders]
    output.mkdir(parents=True, exist_ok=True)
    curves, page = output / "curves.png", output / "report.html"
    run_plots.draw_run_curves(runs).savefig(curves)
    text = f"{len(runs)} runs: losses, learning rate, AP and speed over steps"
    html_report.write_report(page, runs, {curves: text})
    return [f"{output}:", _line(curves.name, text), f"all of it in one file: {page}"]


def _line(name: str, text: str) -> str:
    return f"  {name:22}{text}"


def draw_evaluation(source: Path, folder: Path) -> tuple[list[str], dict[Path, str]]:
    """Draw the evaluation in `source` into `folder`; return lines to print, and captions by file.

    Raises:
        UserError: if its annotations changed.
    """
    analysis = json.loads((source / "analysis.json").read_text())
    curves = np.load(source / "curves.npz")
    data, confidence, per_class = (analysis[k] for k in ("data", "confidence", "per_class"))
    label_map = data["categories"]
    figures: dict[str, tuple[Any, str]] = {
        "errors.png": (eval_plots.draw_errors(analysis["errors"]), "what AP50 is lost to"),
    }
    if any(row["boxes"] for row in per_class):
        names = [c["name"] for c in sorted(label_map, key=lambda c: c["label"])]
        figures |= {
            "pr_curves.png": (
                eval_plots.draw_curves(per_class, curves, confidence, label_map),
                "precision over recall, F1 over confidence",
            ),
            "per_class_ap.png": (
                eval_plots.draw_class_ap(per_class, label_map),
                "AP and AP50 by class",
            ),
            "confusion_matrix.png": (
                eval_plots.draw_confusion(names, curves["confusion"], confidence),
                "which class is taken for which",
            ),
        }
    captions = {folder / name: text for name, (_, text) in figures.items()}
    for name, (figure, _) in figures.items():
        figure.savefig(folder / name)
    lines = [f"{title_of(analysis, source)}, drawn into {folder}:"]
    lines += [_line(path.name, text) for path, text in captions.items()]
    if "images" not in data:
        return [*lines, "  no images: the evaluation does not know where they are"], captions

    annotations, _ = coco_json.read_annotations(Path(data["annotations"]))
    annotations, _ = locate.locate_images(annotations, Path(data["images"]))
    if not np.array_equal(np.sort(annotations.image_ids), curves["image_ids"]):
        raise UserError(f"{data['annotations']} has other images than {source} evaluated")
    detections = np.load(source / "detections.npy")
    pictures = Pictures(annotations, Path(data["images"]), label_map, detections, confidence)
    drawn = {
        "predictions.jpg": (pictures.draw_some(), "annotated on the left, predicted on the right"),
        "worst_images.jpg": (
            pictures.draw_worst(curves["missed"], curves["wrong"]),
            "the most errors: boxes missed on the left, detections wrong on the right",
        ),
    }
    for name, (picture, text) in drawn.items():
        (folder / name).unlink(missing_ok=True)
        if picture is None:
            lines.append(_line(name, "not drawn: nothing is missed or wrong"))
            continue
        write_jpeg(picture, str(folder / name), quality=90)
        captions[folder / name] = f"{text}; scores from {confidence:.2f}"
        lines.append(_line(name, captions[folder / name]))
    return lines, captions


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="the --output-dir of each run, or eval/NAME in it")
    add("--output", type=Path, default=Path("report"), help="folder for several runs' comparison")
    flags = parser.parse_args()
    several = len(flags.runs) > 1
    print("\n".join(compare(flags.runs, flags.output) if several else draw(flags.runs[0])))


if __name__ == "__main__":
    run_command(main)
