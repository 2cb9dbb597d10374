"""Detections to COCO metrics, across processes.

Detections travel as arrays of seven columns. Rank 0 scores them with hotcoco, or with pycocotools,
whose numbers these are to the last bit. Categories are scored by label and images by the rank of
their id, so that ids up to 2**63 survive the float64 columns and the order in which equal scores
are taken is that of the official evaluation.

Source: https://cocodataset.org/#detection-eval; detections and ground truth as in pycocotools.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hotcoco
import numpy as np
import torch
import torch.distributed as dist

from utils import Processes

BACKENDS = ("hotcoco", "pycocotools")
METRICS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)


class Scores(NamedTuple):
    """The twelve COCO numbers, and the table in which they are usually printed."""

    metrics: dict[str, float]
    table: str


class CocoEvaluator:
    """Collect this process's detections, gather all on rank 0, score them.

    Args:
        ground_truth: `coco_utils.Annotations` of every image, also those of other processes.
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
        """
        rows = np.concatenate(self.rows) if self.rows else np.empty((0, 7))
        if processes.world_size > 1:
            rows = _gather_rows(rows, processes)
        if not processes.is_main:
            return None
        return rows[np.argsort(rows[:, 0], kind="stable")]

    def score(self, detections: np.ndarray, backend: str = "hotcoco") -> Scores:
        """Score gathered detections by the COCO protocol for boxes."""
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
        score = _score_hotcoco if backend == "hotcoco" else _score_pycocotools
        return score(images, categories, arrays, detections)

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
        path.write_text(json.dumps(results))


def _score_hotcoco(
    images: list[dict[str, Any]],
    categories: list[dict[str, Any]],
    truth: dict[str, Any],
    detections: np.ndarray,
) -> Scores:
    ground_truth = hotcoco.COCO.from_arrays(images, categories, **truth)
    evaluation = hotcoco.COCOeval(ground_truth, ground_truth.load_res(detections), "bbox")
    return _summarize(evaluation)


def _summarize(evaluation: Any) -> Scores:
    """Run an evaluation of either library; what they print becomes the table."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        evaluation.summarize()
    metrics = dict(zip(METRICS, map(float, evaluation.stats), strict=True))
    return Scores(metrics, printed.getvalue().rstrip("\n"))


def _score_pycocotools(
    images: list[dict[str, Any]],
    categories: list[dict[str, Any]],
    truth: dict[str, Any],
    detections: np.ndarray,
) -> Scores:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    keys = {
        "id": truth["ids"],
        "image_id": truth["image_ids"],
        "category_id": truth["category_ids"],
        "bbox": truth["boxes"],
        "area": truth["area"],
        "iscrowd": truth["iscrowd"],
    }
    columns = [column.tolist() for column in keys.values()]
    annotations = [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = {
            "images": images,
            "categories": categories,
            "annotations": annotations,
            "info": {},
        }
        ground_truth.createIndex()
        found = COCO()
        if len(detections):
            found = ground_truth.loadRes(detections)
        else:  # loadRes fails on an empty list
            found.dataset = {**ground_truth.dataset, "annotations": []}
            found.createIndex()
    return _summarize(COCOeval(ground_truth, found, "bbox"))


def _gather_rows(rows: np.ndarray, processes: Processes) -> np.ndarray:
    """Concatenate every process's rows on rank 0; the others keep theirs."""
    group, is_main = processes.host_group, processes.is_main
    counts = torch.zeros(processes.world_size, dtype=torch.int64)
    counts[processes.rank] = len(rows)
    dist.all_reduce(counts, group=group)
    if not is_main:
        dist.send(torch.from_numpy(rows), dst=0, group=group)
        return rows
    parts = [rows]
    for rank in range(1, processes.world_size):
        part = torch.empty((int(counts[rank]), rows.shape[1]), dtype=torch.float64)
        dist.recv(part, src=rank, group=group)
        parts.append(part.numpy())
    return np.concatenate(parts)
