"""Detections to COCO metrics, across processes, and what lies behind the numbers.

Detections travel as arrays of seven columns. Rank 0 scores them with hotcoco, or with pycocotools,
whose numbers these are to the last bit. Categories are scored by label and images by the rank of
their id, so that ids up to 2**63 survive the float64 columns and the order in which equal scores
are taken is that of the official evaluation. hotcoco makes the analysis.

Source: https://cocodataset.org/#detection-eval; detections and ground truth as in pycocotools.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import hotcoco
import numpy as np
import torch
from torch import Tensor, nn

from models.loss_terms import LOG_PREFIX
from runtime.distributed import Processes
from runtime.tables import class_table, error_line
from utils import UserError, file_errors, logger, make_folder, replace_file

BACKENDS = ("hotcoco", "pycocotools")
METRICS = tuple("AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split())
# What an evaluation writes. results.json is the last, so it marks a finished one.
FILES = ("detections.json", "curves.npz", "analysis.json", "detections.npy", "results.json")


class Scores(NamedTuple):
    """The twelve COCO numbers, and the table in which they are usually printed."""

    metrics: dict[str, float]
    table: str


class Analysis(NamedTuple):
    """What lies behind the twelve numbers, at IoU 0.5 unless noted.

    Attributes:
        per_class: of each class "id", "name", "label", "AP", "AP50", "AP75", "AR" (at most 100
            detections), "boxes" without crowds, "detections", and the best "F1" with the
            "confidence" that gives it; by AP, best first. -1 in a class without boxes.
        errors: TIDE's "delta_ap", how much AP50 would gain without an error, and "counts".
        confidence: where the mean F1 of all classes is best; "confusion", "missed" and "wrong"
            count the detections from there on.
        curves: arrays by name, of K classes by label and I images by id: "labels" [K]; "recall"
            [101], "precision" [3, K, 101] at IoU 0.5, 0.75 and averaged over 0.5:0.95; "confidence"
            [101], "f1" [K, 101]; "confusion" [K+1, K+1], a row per true class, last the background;
            "image_ids" [I], "missed" [I] boxes and "wrong" [I] detections.
    """

    per_class: list[dict[str, Any]]
    errors: dict[str, dict[str, float]]
    confidence: float
    curves: dict[str, np.ndarray]


@dataclass(frozen=True)
class Results:
    """The results of an evaluation, on rank 0.

    Attributes:
        metrics: COCO's twelve numbers by name; with `--val-loss` also "val_loss", and "val_" with
            the name of each part.
        table: the twelve as COCO prints them.
        detections: `[D, 7]`, as `CocoEvaluator.gather` returns them.
        analysis: what lies behind the numbers. Images without annotations have none, and neither
            metrics nor a table.
        speed: images per second of the whole evaluation and of the model alone, of all processes,
            and the share of the time that scoring took.
    """

    metrics: dict[str, float]
    table: str
    detections: np.ndarray
    analysis: Analysis | None
    speed: dict[str, float]


class CocoEvaluator:
    """Collect this process's detections, gather all on rank 0, score them.

    Args:
        ground_truth: `coco_arrays.Annotations` of every image, also those of other processes.
        label_map: `{"id", "name", "label"}` per category: which label a class of this name has.
    """

    def __init__(self, ground_truth: Any, label_map: Sequence[Mapping[str, Any]]) -> None:
        label_of = {category["name"]: category["label"] for category in label_map}
        self.ground_truth = ground_truth
        self.labels = np.array([label_of[name] for _, name in ground_truth.categories])
        self.sorted_ids = np.sort(ground_truth.image_ids)
        self.image_rank = np.searchsorted(self.sorted_ids, ground_truth.image_ids)  # [I]
        self.rows: list[np.ndarray] = []

    def update(
        self, image_ids: Sequence[int], detections: Sequence[Mapping[str, torch.Tensor]]
    ) -> None:
        """Take the detections (boxes xyxy, labels, scores) of images, with one copy to the host."""
        counts = [len(detected["scores"]) for detected in detections]
        boxes = torch.cat([detected["boxes"] for detected in detections]).float()
        columns = [
            torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1),
            torch.cat([detected["scores"] for detected in detections]).float()[:, None],
            torch.cat([detected["labels"] for detected in detections])[:, None],
        ]
        rows = np.empty((sum(counts), 7))
        rows[:, 0] = np.repeat(np.searchsorted(self.sorted_ids, image_ids), counts)
        rows[:, 1:] = torch.cat(columns, dim=1).cpu().numpy()  # labels below 2**24 are exact
        self.rows.append(rows)

    def gather(self, processes: Processes) -> np.ndarray | None:
        """Return the detections of all processes on rank 0, None elsewhere.

        Returns:
            `[D, 7]` float64: rank of the image's id, x, y, w, h, score, label; by image, and within
            an image in the order of the model.

        Raises:
            UserError: on rank 0, if a number is not finite: NaN overlaps any box.
        """
        rows = gather_rows(np.concatenate(self.rows or [np.empty((0, 7))]), processes)
        if rows is not None:
            self.require_finite(rows, "boxes or scores")
        return rows

    def require_finite(self, rows: np.ndarray, what: str) -> None:
        """Raise UserError for `rows` that hold more than finite numbers; images come first."""
        broken = self.sorted_ids[np.unique(rows[~np.isfinite(rows).all(axis=1), 0]).astype(int)]
        if len(broken):
            raise UserError(
                f"{what} on {len(broken)} images are not finite (image ids {broken[:10].tolist()}),"
                " so there is nothing to compare; the weights are broken, use earlier ones"
            )

    def score(self, detections: np.ndarray, backend: str = "hotcoco") -> Scores:
        """Score gathered detections by the COCO protocol for boxes."""
        return scores_of(self.evaluation(detections, backend))

    def evaluation(self, detections: np.ndarray, backend: str = "hotcoco") -> Any:
        """Return a `COCOeval` of either library that has matched and accumulated."""
        truth = self.ground_truth
        images = [
            {"id": int(rank), "height": int(height), "width": int(width)}
            for rank, (height, width) in zip(self.image_rank, truth.sizes, strict=True)
        ]
        categories = [
            {"id": int(label), "name": name}
            for label, (_, name) in zip(self.labels, truth.categories, strict=True)
        ]
        arrays: dict[str, Any] = {
            "image_ids": self.image_rank[truth.image_of_annotation()],
            "category_ids": self.labels[truth.category_index],
            "boxes": truth.boxes_xywh,
            "area": truth.area,
            "iscrowd": truth.iscrowd.astype(np.int64),
        }
        arrays["ids"] = np.arange(1, len(arrays["area"]) + 1)  # pycocotools loses the id 0
        if backend == "hotcoco":
            ground_truth = hotcoco.COCO.from_arrays(images, categories, **arrays)
            results = ground_truth.load_res(detections)
            evaluation = hotcoco.COCOeval(ground_truth, results, "bbox")
        else:
            evaluation = _with_pycocotools(images, categories, arrays, detections)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation

    def analyze(self, evaluation: Any, detections: np.ndarray) -> Analysis:
        """Analyze hotcoco's `evaluation` of gathered `detections`."""
        truth, labels = self.ground_truth, np.sort(self.labels)  # hotcoco's order of the classes
        num_classes, num_images = len(labels), len(self.sorted_ids)
        crowd, of_class = truth.iscrowd, np.searchsorted(labels, self.labels[truth.category_index])
        boxes = np.bincount(of_class[~crowd], minlength=num_classes)  # [K]

        # Which detections are right and which are wrong; those of crowds are neither.
        status = evaluation.image_diagnostics(iou_thr=0.5)["dt_status"]
        counted = np.fromiter(status, np.int64, len(status)) - 1  # hotcoco counts from 1
        is_right = np.fromiter((s == "tp" for s in status.values()), bool, len(status))
        class_index = np.searchsorted(labels, detections[counted, 6].astype(int))
        grid = np.arange(101) / 100
        level = np.searchsorted(grid, detections[counted, 5], side="right").clip(1, 101) - 1

        def at_least(chosen: np.ndarray) -> np.ndarray:  # [K, 101]: how many from a confidence on
            cells = class_index[chosen] * 101 + level[chosen]
            counts = np.bincount(cells, minlength=num_classes * 101).reshape(num_classes, 101)
            return counts[:, ::-1].cumsum(axis=1)[:, ::-1]

        right, wrong = at_least(is_right), at_least(~is_right)
        f1 = 2 * right / (right + wrong + boxes[:, None]).clip(1)
        best = int(f1[boxes > 0].mean(axis=0).argmax()) if boxes.any() else 0

        def per_image(chosen: np.ndarray) -> np.ndarray:  # [I]: how many from the best one on
            images = detections[counted[chosen & (level >= best)], 0].astype(int)
            return np.bincount(images, minlength=num_images)

        in_image = self.image_rank[truth.image_of_annotation()[~crowd]]
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, K]
        confusion = evaluation.confusion_matrix(iou_thr=0.5, min_score=float(grid[best]))
        curves = {
            "labels": labels,
            "recall": grid,
            "precision": np.stack([precision[0], precision[5], precision.mean(axis=0)]).swapaxes(
                1, 2
            ),
            "confidence": grid,
            "f1": f1,
            "confusion": confusion["matrix"].astype(np.int64),
            "image_ids": self.sorted_ids,
            "missed": np.bincount(in_image, minlength=num_images) - per_image(is_right),
            "wrong": per_image(~is_right),
        }
        errors = evaluation.tide_errors()
        return Analysis(
            self._per_class(boxes, detections, evaluation.eval["recall"], curves),
            {"delta_ap": errors["delta_ap"], "counts": errors["counts"]},
            float(grid[best]),
            curves,
        )

    def _per_class(
        self,
        boxes: np.ndarray,
        detections: np.ndarray,
        recall: np.ndarray,
        curves: dict[str, np.ndarray],
    ) -> list[dict[str, Any]]:
        ids = dict(zip(self.labels.tolist(), self.ground_truth.categories, strict=True))
        num_detections = np.bincount(detections[:, 6].astype(int), minlength=max(ids) + 1)
        ap50, ap75, ap = curves["precision"].mean(axis=2).tolist()  # [K] each
        recalls, f1 = recall[:, :, 0, -1].mean(axis=0).tolist(), curves["f1"]
        rows = []
        for k, label in enumerate(curves["labels"].tolist()):
            row = {"id": ids[label][0], "name": ids[label][1], "label": label}
            row |= {"AP": ap[k], "AP50": ap50[k], "AP75": ap75[k], "AR": recalls[k]}
            row |= {"boxes": int(boxes[k]), "detections": int(num_detections[label])}
            best = f1[k].argmax()
            has_boxes = boxes[k] > 0
            row["F1"] = float(f1[k, best]) if has_boxes else -1.0
            row["confidence"] = float(curves["confidence"][best]) if has_boxes else -1.0
            rows.append(row)
        return sorted(rows, key=lambda row: -row["AP"])

    def write_results(self, detections: np.ndarray, path: Path) -> None:
        """Write gathered detections as COCO results JSON, with the data set's own ids."""
        categories = zip(self.labels, self.ground_truth.categories, strict=True)
        category_id = {label: number for label, (number, _) in categories}
        results = [
            {
                "image_id": int(self.sorted_ids[int(row[0])]),
                "category_id": int(category_id[int(row[6])]),
                "bbox": row[1:5].tolist(),
                "score": float(row[5]),
            }
            for row in detections
            if int(row[6]) in category_id  # the 91 labels have gaps, which a model may predict
        ]
        replace_file(path, json.dumps(results))


def log_results(results: Results, num_images: int) -> None:
    """Log the numbers and the tables; images without annotations have none."""
    losses = {name: value for name, value in results.metrics.items() if name not in METRICS}
    numbers = "  ".join(f"{k} {v:.3g}" for k, v in (results.speed | losses).items())
    if results.analysis is None:
        text = "%d detections on %d images, which have no annotations to score them by: %s"
        logger.info(text, len(results.detections), num_images, numbers)
        return
    logger.info("evaluated %d images: %s\n%s", num_images, numbers, results.table)
    classes = class_table(results.analysis.per_class)
    logger.info("by class, best first:\n%s\n%s", classes, error_line(results.analysis))
    if results.metrics["AP"] < 0:
        logger.warning("no box is annotated on the validation images, so AP is -1")


def write_results(
    results: Results,
    evaluator: CocoEvaluator,
    folder: Path | None,
    save_detections: bool,
    description: Mapping[str, Any],
) -> None:
    """Write the files of an evaluation, `FILES`, to `folder`, in place of those of an earlier one.

    Args:
        folder: None writes only the detections, to the working folder, if `save_detections`.
        description: more entries for `analysis.json`.
    """
    if folder is not None:
        make_folder(folder)
        with file_errors("delete files in", folder):
            for name in reversed(FILES):
                (folder / name).unlink(missing_ok=True)
    if save_detections:
        path = (folder or Path()) / "detections.json"
        evaluator.write_results(results.detections, path)
        logger.info("detections written to %s", path)
    if folder is None or results.analysis is None:
        return
    content = {**results.analysis._asdict(), "speed": results.speed, **description}
    curves, detections = io.BytesIO(), io.BytesIO()
    np.savez_compressed(curves, allow_pickle=False, **content.pop("curves"))
    np.save(detections, results.detections, allow_pickle=False)
    replace_file(folder / "curves.npz", curves.getvalue())
    replace_file(folder / "analysis.json", json.dumps(content, indent=1) + "\n")
    replace_file(folder / "detections.npy", detections.getvalue())
    replace_file(folder / "results.json", json.dumps(results.metrics, indent=2) + "\n")


def paired_bootstrap(first: Any, second: Any, resamples: int, seed: int) -> dict[str, Any]:
    """Compare two of hotcoco's evaluations of the same images; see `hotcoco.compare`."""
    return hotcoco.compare(first, second, n_bootstrap=resamples, seed=seed, confidence=0.95)


def scores_of(evaluation: Any) -> Scores:
    """Summarize an evaluation of either library; what it prints becomes the table."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        evaluation.summarize()
    metrics = dict(zip(METRICS, map(float, evaluation.stats), strict=True))
    return Scores(metrics, printed.getvalue().rstrip("\n"))


def _with_pycocotools(
    images: list[dict[str, Any]],
    categories: list[dict[str, Any]],
    truth: dict[str, Any],
    detections: np.ndarray,
) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = ("image_id", "category_id", "bbox", "area", "iscrowd", "id")  # in the order of `truth`
    columns = [column.tolist() for column in truth.values()]
    annotations = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    lists = {"images": images, "categories": categories, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = {**lists, "info": {}}
        ground_truth.createIndex()
        results = COCO()
        if len(detections):
            results = ground_truth.loadRes(detections)
        else:  # loadRes fails on an empty list
            results.dataset = {**ground_truth.dataset, "annotations": []}
            results.createIndex()
    return COCOeval(ground_truth, results, "bbox")


def gather_rows(rows: np.ndarray, processes: Processes) -> np.ndarray | None:
    """Return every process's rows, `[n, C]` float64, on rank 0, None elsewhere.

    They are sorted by their first column, and where that is equal stay as they were.
    """
    parts = processes.gather(rows)
    if parts is None:
        return None
    rows = np.concatenate(parts)
    return rows[np.argsort(rows[:, 0], kind="stable")]


class ImageLosses:
    """The losses of each image by itself, as some detectors divide by the boxes of a whole batch.

    Layers stay in evaluation mode, so that neither weights nor batch statistics change. Faster
    R-CNN, which samples boxes, samples from the same random numbers for each image.
    """

    def __init__(self, model: nn.Module, evaluator: CocoEvaluator) -> None:
        self.model, self.evaluator = model, evaluator
        self.names: list[str] = []
        self.rows: list[np.ndarray] = []  # [n, 1 + L]: rank of the image's id, losses
        # Only these ask `training` what to return; what lies below them does not see it.
        stages = [part for name, part in model.named_children() if name in ("rpn", "roi_heads")]
        self.stages = [model, *stages]

    # Out of inference mode: what the model keeps from here, as anchors, must be fit to train with.
    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self, image_ids: list[int], images: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> None:
        """Take the losses of images on the device, with one copy to the host."""
        device = images[0].device
        values = []
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for stage in self.stages:
                stage.training = True
            for image, target in zip(images, targets, strict=True):
                torch.manual_seed(0)
                losses = self.model([image], [target])
                self.names = list(losses)
                values.append(torch.stack([loss.float() for loss in losses.values()]))
            for stage in self.stages:
                stage.training = False
        ranks = np.searchsorted(self.evaluator.sorted_ids, image_ids)
        self.rows.append(np.column_stack([ranks, torch.stack(values).cpu().numpy()]))

    def gather(self, processes: Processes) -> dict[str, float]:
        """Return the means over the images of all processes on rank 0, by name."""
        rows = gather_rows(np.concatenate(self.rows or [np.empty((0, 1))]), processes)
        if rows is None:
            return {}
        self.evaluator.require_finite(rows, "losses")
        # fsum rounds once, so that the order of the images cannot matter.
        means = [math.fsum(column) / len(rows) for column in rows[:, 1:].T.tolist()]
        by_name = dict(zip(self.names, means, strict=True))
        loss = math.fsum(mean for name, mean in by_name.items() if not name.startswith(LOG_PREFIX))
        return {"val_loss": loss} | {f"val_{name}": mean for name, mean in by_name.items()}
