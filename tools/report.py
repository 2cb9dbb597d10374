"""Draw what a run left: `python -m tools.report runs/NAME`.

Reads the run's folder and its validation images, writes pictures into the folder; the run may be
over or still going on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.io import write_jpeg

import coco_utils
from tools import drawing


def newest_evaluation(run: Path) -> Path:
    """Return the folder of the last finished evaluation of a run.

    Raises:
        ValueError: if there is none yet.
    """
    places = [path.parent for path in run.glob("eval/epoch_*/results.json")]
    if not places:
        raise ValueError(
            f"{run} has no evaluation yet; train.py makes one every --eval-every epochs"
        )
    return max(places, key=lambda place: int(place.name.removeprefix("epoch_")))


def draw_predictions(
    annotations: coco_utils.Annotations,
    images: Path,
    label_map: Sequence[dict[str, Any]],
    detections: np.ndarray,
    count: int = 16,
    score_thresh: float = 0.5,
) -> Any:
    """Draw images in pairs, ground truth on the left and what was found on the right.

    Args:
        detections: `[D, 7]` as `CocoEvaluator.gather` returns them.
        count: images, taken evenly over the data set.
        score_thresh: detections below are left out.

    Returns:
        uint8 `[3, H, W]`.
    """
    data = coco_utils.CocoDetection(images, annotations, label_map)
    colours = drawing.class_colours(label_map)
    names = {category["label"]: category["name"] for category in label_map}
    ranks = np.searchsorted(np.sort(annotations.image_ids), annotations.image_ids)
    chosen = np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int)
    tiles = []
    for number in chosen.tolist():
        image, target = data[0, number]
        labels = target["labels"].tolist()
        texts = [names[label] for label in labels]
        tiles.append(drawing.draw_boxes(image, target["boxes"].numpy(), labels, texts, colours))
        found = detections[(detections[:, 0] == ranks[number]) & (detections[:, 5] >= score_thresh)]
        boxes = np.concatenate([found[:, 1:3], found[:, 1:3] + found[:, 3:5]], axis=1)
        labels = found[:, 6].astype(int).tolist()
        texts = [
            f"{names[label]} {score:.2f}" for label, score in zip(labels, found[:, 5], strict=True)
        ]
        tiles.append(drawing.draw_boxes(image, boxes, labels, texts, colours))
    return drawing.mosaic(tiles, columns=4 if len(chosen) > 1 else 2)


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the --output-dir of a run")
    run = parser.parse_args().run
    try:
        if not (run / "args.json").is_file():
            raise ValueError(f"{run} is not the --output-dir of a run: it has no args.json")
        about = json.loads((run / "args.json").read_text())
        place = newest_evaluation(run)
        annotations, _ = coco_utils.read_annotations(Path(about["paths"]["val_annotations"]))
        picture = draw_predictions(
            annotations,
            Path(about["paths"]["val_images"]),
            about["categories"],
            np.load(place / "detections.npy"),
        )
        path = run / "predictions.jpg"
        write_jpeg(picture, str(path), quality=90)
        print(f"ground truth (left) and predictions (right) of {place.name}: {path}")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
