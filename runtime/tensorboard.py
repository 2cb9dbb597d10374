"""Scalars and sample images for TensorBoard, in the folder of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils import file_errors

SAMPLES = 4  # images per data set
SHOWN_SCORE = 0.5  # lowest score of a detection that is shown


class Board:
    """Writes to `folder`; data sets are `coco_utils.CocoDetection`. `close` it at the end.

    Raises:
        UserError: by all methods, if the folder cannot be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        with file_errors("write", folder):
            # The run writes again what it wrote after the checkpoint that it resumes from.
            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by name."""
        with file_errors("write", self.folder):
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def training_images(self, data: Any, epoch: int, step: int) -> None:
        """Write the first images of the training data with their boxes, as augmented in `epoch`."""
        names = {category["label"]: category["name"] for category in data.label_map}
        for number in range(min(SAMPLES, len(data))):
            image, target = data[epoch, number]
            texts = [names[label] for label in target["labels"].tolist()]
            self._image(f"training/{number}", image, target["boxes"], step, texts)

    def detections(self, data: Any, rows: np.ndarray, step: int) -> None:
        """Write the first validation images with their detections, `[D, 7]` of `coco_eval`."""
        names = {category["label"]: category["name"] for category in data.label_map}
        ranks = np.argsort(np.argsort(data.annotations.image_ids))
        for number in range(min(SAMPLES, len(data))):
            image, _ = data[0, number]
            shown = rows[(rows[:, 0] == ranks[number]) & (rows[:, 5] >= SHOWN_SCORE)]
            texts = [f"{names.get(int(row[6]), '?')} {row[5]:.2f}" for row in shown]
            boxes = np.concatenate([shown[:, 1:3], shown[:, 1:3] + shown[:, 3:5]], axis=1)
            self._image(f"validation/{number}", image, torch.from_numpy(boxes), step, texts)

    def _image(
        self, tag: str, image: torch.Tensor, boxes: torch.Tensor, step: int, texts: list[str]
    ) -> None:
        with file_errors("write", self.folder):
            self.writer.add_image_with_boxes(tag, image, boxes, step, labels=texts)
