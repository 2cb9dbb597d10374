"""Measure --repeat-threshold on drawn shapes, where triangles are in 1 of 20 training images.

    python -m recipes.rare_class runs/rare

Trains six small detectors, with and without, by three seeds, two at a time; a quarter of an hour on
two CPU cores. Measured in docs/results.md.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data import shapes

THRESHOLDS = (0.0, 0.5)
SEEDS = (0, 1, 2)
IMAGES, RARE = 400, 20  # of the training set, and those of them that have a triangle
FLAGS = (
    "--model retinanet_resnet18_fpn --min-size 64 --max-size 64 --device cpu --workers 0 "
    "--batch-size 4 --opt adamw --lr 5e-4 --wd 0.05 --clip-grad-norm 1 --amp bf16 --epochs 6 "
    "--lr-steps 5 --warmup-steps 60 --eval-every 6 --keep-checkpoints 0 --resume auto"
)


def make_data(folder: Path) -> tuple[Path, Path]:
    """Draw images, and list those that make triangles rare; return the data and the list.

    Images are left out as a whole, so that no triangle is without a box.
    """
    data = shapes.make_shapes(folder, 2600, 128, size=64)
    document = json.loads((data / "annotations" / "instances_train2017.json").read_text())
    rows = document["annotations"]
    with_boxes = {row["image_id"] for row in rows}
    rare = {row["image_id"] for row in rows if row["category_id"] == shapes.CATEGORIES["triangle"]}
    kept = {*sorted(rare)[:RARE], *sorted(with_boxes - rare)[: IMAGES - RARE]}
    assert len(kept) == IMAGES
    document["images"] = [image for image in document["images"] if image["id"] in kept]
    document["annotations"] = [row for row in rows if row["image_id"] in kept]
    path = folder / "rare.json"
    path.write_text(json.dumps(document))
    return data, path


def measure(folder: Path, data: Path, annotations: Path, threshold: float, seed: int) -> list[str]:
    """Train once; return a row of the table: AP, and AP of each class."""
    run = folder / f"threshold-{threshold:g}-seed-{seed}"
    command = [sys.executable, "train.py", *FLAGS.split(), "--data-path", data, "--output-dir", run]
    command += ["--train-annotations", annotations, "--seed", seed]
    command += ["--repeat-threshold", threshold]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / f"{run.name}.txt").open("w") as log:
        subprocess.run(list(map(str, command)), check=True, env=environment, stdout=log)
    results = run / "eval" / "epoch_5"
    ap = json.loads((results / "results.json").read_text())["AP"]
    per_class = json.loads((results / "analysis.json").read_text())["per_class"]
    of_class = {row["name"]: row["AP"] for row in per_class}
    aps = [ap, *(of_class[name] for name in shapes.CATEGORIES)]
    return [f"{threshold:g}", str(seed), *(f"{value:.3f}" for value in aps)]


def main() -> None:
    """Train all, and print the table."""
    folder = Path(sys.argv[1])
    data, annotations = make_data(folder)
    jobs = [(threshold, seed) for threshold in THRESHOLDS for seed in SEEDS]
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda job: measure(folder, data, annotations, *job), jobs))
    print("| threshold | seed | AP |", " | ".join(shapes.CATEGORIES), "|")
    for row in rows:
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main()
