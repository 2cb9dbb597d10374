"""Scalars and sample images for TensorBoard, in the folder of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes

from utils import file_errors

SAMPLES = 4  # images per data set
SHOWN_SCORE = 0.5  # lowest score of a detection that is shown
SIDE, FONT_SIZE = 800, 22  # pixels; smaller images are enlarged, or nobody could read the labels
SPEED = ("images_per_second", "data_time_share", "memory_mb")


def scalar_tags(names: Iterable[str]) -> dict[str, str]:
    """Return the tag of each number of one record: `train/`, `val/` and `speed/` are the groups."""
    names = list(names)
    group = "val" if "AP" in names else "train"
    return {n: f"speed/{n}" if n in SPEED else f"{group}/{n.removeprefix('val_')}" for n in names}


class Board:
    """Writes to `folder`; data sets are `coco_utils.CocoDetection`. `close` it at the end.

    Raises:
        UserError: by all methods, if the folder cannot be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from matplotlib import font_manager
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.font = folder, font_manager.findfont("DejaVu Sans")
        with file_errors("write", folder):
            # The run writes again what it wrote after the checkpoint that it resumes from.
            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write the numbers of one record by name."""
        with file_errors("write", self.folder):
            for name, tag in scalar_tags(values).items():
                self.writer.add_scalar(tag, values[name], step)

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
        scale = max(1.0, SIDE / max(image.shape[1:]))
        picture = F.resize(
            image.as_subclass(torch.Tensor), [round(s * scale) for s in image.shape[1:]]
        )
        if len(boxes):
            picture = draw_bounding_boxes(
                picture,
                boxes.as_subclass(torch.Tensor) * scale,
                texts,
                colors="red",
                width=3,
                font=self.font,
                font_size=FONT_SIZE,
                label_colors="white",
                fill_labels=True,
            )
        with file_errors("write", self.folder):
            self.writer.add_image(tag, picture, step)
