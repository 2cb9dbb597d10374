"""Draw what a run left: `python -m tools.report runs/NAME`.

Reads the records of the run, its newest evaluation and the validation images; writes pictures and
`report.html`, which has them all, into the folder that was named. The run may be over or still
going on. What `train.py --test-only` evaluated in it is drawn into eval/test, and stands in the
report as what it is. The folder may also be that of one evaluation; and of several runs it lays the
curves over each other:

    python -m tools.report runs/a runs/b --output comparison
"""

from __future__ import annotations

from data import coco_arrays, locate

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
from coco_eval import CocoEvaluator
from data import coco_json
from tools.plots import drawing, eval_plots, html_report, run_plots
from utils import UserError, run_command

MISSED = -1  # stands for the label of a box that was not found


def newest_evaluation(run: Path) -> Path:
    """Return the folder of the last finished evaluation of a run, or `run` if it is one itself.

    Raises:
        UserError: if there is none.
    """
    if (run / "analysis.json").is_file() and not (run / "args.json").is_file():
        return run
    places = [path.parent for path in run.glob("eval/epoch_*/results.json")]
    if not places and (run / "eval" / "test" / "detections.json").is_file():
        raise UserError(f"{run}/eval/test has detections without scores, so there is no report")
    if not places:
        raise UserError(
            f"{run} holds neither a run nor an evaluation; give the --output-dir of train.py"
        )
    return max(places, key=lambda place: int(place.name.removeprefix("epoch_")))


class Pictures:
    """Draws images of a data set in pairs: what is annotated on the left, what was found right.

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
        # A model of 91 labels may say some that have no class.
        known = np.isin(detections[:, 6], self.evaluator.labels)
        self.found = detections[known & (detections[:, 5] >= score_thresh)]
        self.colours = {**drawing.class_colours(label_map), MISSED: drawing.MISSED}
        self.names = {category["label"]: category["name"] for category in label_map}

    def draw_some(self, count: int = 16) -> Tensor:
        """Draw `count` images, taken evenly over the data set, each box with its class.

        Returns:
            uint8 `[3, H, W]`.
        """
        chosen = np.linspace(0, len(self.data) - 1, min(count, len(self.data))).round().astype(int)
        tiles = []
        for number in chosen.tolist():
            image, target = self.data[0, number]
            labels = target["labels"].tolist()
            texts = [self.names[label] for label in labels]
            tiles.append(
                drawing.draw_boxes(image, target["boxes"].numpy(), labels, texts, self.colours)
            )
            rows = self._found_on(number)
            boxes, labels, texts = self._boxes(rows), self._labels(rows), self._texts(rows)
            tiles.append(drawing.draw_boxes(image, boxes, labels, texts, self.colours))
        return drawing.mosaic(tiles, columns=4 if len(chosen) > 1 else 2)

    def draw_worst(self, missed: np.ndarray, wrong: np.ndarray, count: int = 16) -> Tensor | None:
        """Draw the `count` images with the most boxes missed and detections wrong; these have text.

        Args:
            missed, wrong: `[I]` how many, by image id, at IoU 0.5.

        Returns:
            uint8 `[3, H, W]`, or None if nothing is wrong anywhere.
        """
        order = np.argsort(-(missed + wrong), kind="stable")[:count]
        ranks = order[(missed + wrong)[order] > 0].tolist()
        number_of = np.argsort(self.evaluator.image_rank)
        diagnosis = self.evaluator.evaluation(self.found).image_diagnostics(iou_thr=0.5)
        tiles: list[Tensor] = []
        for rank in ranks:
            number = int(number_of[rank])
            tiles += self._draw_errors(number, diagnosis["gt_status"], diagnosis["dt_status"])
        return drawing.mosaic(tiles, columns=4 if len(ranks) > 1 else 2) if tiles else None

    def _draw_errors(
        self, number: int, gt_status: Mapping[int, str], dt_status: Mapping[int, str]
    ) -> list[Tensor]:
        truth, image = self.data.annotations, self.data[0, number][0]
        rows = np.arange(*truth.offsets[number : number + 2])
        status = ["crowd" if truth.iscrowd[row] else gt_status.get(row + 1) for row in rows]
        labels = self.evaluator.labels[truth.category_index[rows]].tolist()
        texts = [
            {"fn": f"missed {self.names[label]}", "crowd": "crowd"}.get(str(what))
            for label, what in zip(labels, status, strict=True)
        ]
        labels = [
            MISSED if what == "fn" else label for label, what in zip(labels, status, strict=True)
        ]
        boxes = coco_arrays.to_xyxy(truth.boxes_xywh[rows])
        left = drawing.draw_boxes(image, boxes, labels, texts, self.colours, side=400)
        what = f"{status.count('fn')} of {len(rows) - status.count('crowd')} boxes missed"
        left = drawing.captioned(left, f"image {truth.image_ids[number]}: {what}")

        found = self._found_on(number)
        is_wrong = [dt_status.get(row + 1) == "fp" for row in found.tolist()]
        named = [
            text if bad else None for text, bad in zip(self._texts(found), is_wrong, strict=True)
        ]
        boxes = self._boxes(found)
        right = drawing.draw_boxes(image, boxes, self._labels(found), named, self.colours, side=400)
        right = drawing.captioned(right, f"{sum(is_wrong)} of {len(found)} detections wrong")
        return [left, right]

    def _found_on(self, number: int) -> np.ndarray:
        return np.flatnonzero(self.found[:, 0] == self.evaluator.image_rank[number])

    def _boxes(self, rows: np.ndarray) -> np.ndarray:
        return coco_arrays.to_xyxy(self.found[rows, 1:5])

    def _labels(self, rows: np.ndarray) -> list[int]:
        return self.found[rows, 6].astype(int).tolist()

    def _texts(self, rows: np.ndarray) -> list[str]:
        scores = self.found[rows, 5].tolist()
        pairs = zip(self._labels(rows), scores, strict=True)
        return [f"{self.names[label]} {score:.2f}" for label, score in pairs]


def draw(folder: Path) -> list[str]:
    """Draw everything that a run, or one evaluation, gives; say what was drawn.

    A test evaluation is drawn into its own folder, and stands beside the run's own evaluations.

    Raises:
        UserError: if there is neither, or the annotations of the evaluation changed.
    """
    is_run, place = (folder / "args.json").is_file(), folder / "eval" / "test"
    is_tested = (place / "results.json").is_file()
    if not is_run and not is_tested:
        return draw_evaluation(newest_evaluation(folder), folder)[0]
    lines, pictures = [f"{folder}:"], {}
    runs, analysis = [], None
    if is_run:
        run = run_plots.read_run(folder)
        curves = folder / "curves.png"
        run_plots.draw_run_curves([run]).savefig(curves)
        pictures[curves] = "losses, learning rate, AP and speed over steps"
        lines.append(f"  {curves.name:22}{pictures[curves]}")
        runs.append(run)
        if run.evaluations:
            newest = newest_evaluation(folder)
            more, drawn = draw_evaluation(newest, folder)
            lines += more
            pictures |= drawn
            analysis = json.loads((newest / "analysis.json").read_text())
        else:
            lines.append("  no evaluation yet; train.py makes one every --eval-every epochs")
    test = None
    if is_tested:
        more, test = draw_test(place)
        lines += more
    page = folder / "report.html"
    html_report.write_report(page, runs, pictures, analysis, test)
    return [*lines, f"all of it in one file: {page}"]


def draw_test(place: Path) -> tuple[list[str], html_report.TestEvaluation]:
    """Draw the test evaluation in `place` into that folder; return what to say, and the report's.

    Its data need not be at hand any more: then the numbers are all that is shown.
    """
    analysis = json.loads((place / "analysis.json").read_text())
    results = json.loads((place / "results.json").read_text())
    try:
        lines, pictures = draw_evaluation(place, place)
    except UserError as error:
        lines, pictures = [f"{title_of(analysis, place)}, not drawn: {error}"], {}
    return lines, html_report.TestEvaluation(title_of(analysis, place), results, analysis, pictures)


def title_of(analysis: Mapping[str, Any], place: Path) -> str:
    """Return what the evaluation in `place` is one of: an epoch of a run, or a checkpoint."""
    tested = analysis.get("tested")
    if tested is None:
        return str(place)
    step = "" if tested["step"] is None else f" of step {tested['step']}"
    return f"test evaluation of {tested['weights']}{step}"


def compare(folders: Sequence[Path], output: Path) -> list[str]:
    """Lay the curves of several runs over each other in the folder `output`; say what was drawn.

    Raises:
        UserError: if one of them holds no run.
    """
    runs = [run_plots.read_run(folder) for folder in folders]
    output.mkdir(parents=True, exist_ok=True)
    curves, page = output / "curves.png", output / "report.html"
    run_plots.draw_run_curves(runs).savefig(curves)
    text = f"{len(runs)} runs: losses, learning rate, AP and speed over steps"
    html_report.write_report(page, runs, {curves: text})
    return [f"{output}:", f"  {curves.name:22}{text}", f"all of it in one file: {page}"]


def draw_evaluation(place: Path, folder: Path) -> tuple[list[str], dict[Path, str]]:
    """Draw the evaluation in `place` into `folder`; return what to say, and each file's caption.

    Raises:
        UserError: if its annotations changed.
    """
    analysis = json.loads((place / "analysis.json").read_text())
    curves = np.load(place / "curves.npz")
    about, confidence = analysis["data"], analysis["confidence"]
    label_map = about["categories"]
    lines, captions = [f"{title_of(analysis, place)}, drawn into {folder}:"], {}
    figures: dict[str, tuple[Any, str]] = {
        "errors.png": (eval_plots.draw_errors(analysis["errors"]), "what AP50 is lost to"),
    }
    if any(row["boxes"] for row in analysis["per_class"]):
        names = [c["name"] for c in sorted(label_map, key=lambda c: c["label"])]
        figures |= {
            "pr_curves.png": (
                eval_plots.draw_curves(analysis["per_class"], curves, confidence, label_map),
                "precision over recall, F1 over confidence",
            ),
            "per_class_ap.png": (
                eval_plots.draw_class_ap(analysis["per_class"], label_map),
                "AP and AP50 by class",
            ),
            "confusion_matrix.png": (
                eval_plots.draw_confusion(names, curves["confusion"], confidence),
                "which class is taken for which",
            ),
        }
    for name, (figure, what) in figures.items():
        figure.savefig(folder / name)
        captions[folder / name] = what
        lines.append(f"  {name:22}{what}")
    if "images" not in about:
        return [*lines, "  no images: the evaluation does not know where they are"], captions

    annotations, _ = coco_json.read_annotations(Path(about["annotations"]))
    annotations, _ = locate.locate_images(annotations, Path(about["images"]))
    if not np.array_equal(np.sort(annotations.image_ids), curves["image_ids"]):
        raise UserError(f"{about['annotations']} has other images than {place} evaluated")
    found = np.load(place / "detections.npy")
    pictures = Pictures(annotations, Path(about["images"]), label_map, found, confidence)
    drawn = {
        "predictions.jpg": (pictures.draw_some(), "ground truth (left) and predictions (right)"),
        "worst_images.jpg": (
            pictures.draw_worst(curves["missed"], curves["wrong"]),
            "where most is missed (left) or wrong (right)",
        ),
    }
    for name, (picture, what) in drawn.items():
        (folder / name).unlink(missing_ok=True)
        if picture is None:
            lines.append(f"  {name:22}not drawn: nothing is missed or wrong")
            continue
        write_jpeg(picture, str(folder / name), quality=90)
        captions[folder / name] = f"{what}, from confidence {confidence:.2f}"
        lines.append(f"  {name:22}{captions[folder / name]}")
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
