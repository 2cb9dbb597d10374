"""The code on docs/see_it.md does what the page says: pytest tests/test_see_it.py.

Weights & Biases and MLflow are not installed with the project; with them, their lines run, too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from torch import Tensor
from torchvision.io import write_png

from models import build
from runtime.tensorboard import scalar_tags

PAGE = (ROOT / "docs" / "see_it.md").read_text()


def code_with(text: str) -> str:
    """Return the page's block of Python that has `text` in it."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (block,) = [block for block in blocks if text in block]
    return block


class FindsColours:
    """A detector that finds each object exactly: label k is the pixels of grey value k."""

    def __call__(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        (image,) = images
        assert image.shape[1] <= 800 and image.shape[2] <= 800
        values = (image[0] * 255).round().long()
        boxes, labels = [], []
        for label in values.unique().tolist():
            if label:
                y, x = torch.where(values == label)
                boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
                labels.append(label)
        rows = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        scores = torch.linspace(0.5, 0.9, len(labels))
        return [{"boxes": rows, "scores": scores, "labels": torch.tensor(labels).long()}]


@pytest.mark.parametrize("height, width", [(1700, 2100), (800, 900), (500, 600)])
def test_tiles_find_every_object_once_and_whole(
    height: int, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = code_with("batched_nms")
    assert len([line for line in code.splitlines() if line]) < 25
    draw = torch.Generator().manual_seed(0)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    expected = []
    for x in range(0, width - 180, 190):  # objects of up to 180 pixels, apart from each other
        for y in range(0, height - 180, 190):
            w, h = torch.randint(40, 181, (2,), generator=draw).tolist()
            image[:, y : y + h, x : x + w] = len(expected) + 1
            expected.append([x, y, x + w, y + h])
    image[:, -30:, -90:] = len(expected) + 1  # at the image's own edge, where nothing is cut
    expected.append([width - 90, height - 30, width, height])
    assert 2 < len(expected) < 256
    write_png(image, str(tmp_path / "slide.png"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "load_detector", lambda source: (FindsColours(), []))
    values: dict[str, Any] = {}
    exec(compile(code, "see_it.md", "exec"), values)
    kept, boxes = values["kept"], values["boxes"]
    found = {int(values["labels"][i]): boxes[i].tolist() for i in kept.tolist()}
    assert len(found) == len(kept)  # none twice
    assert found == {label: box for label, box in enumerate(expected, start=1)}


def test_scalars_are_in_groups() -> None:
    training = scalar_tags(["loss", "bbox_regression", "lr", "grad_norm", "images_per_second"])
    assert training["loss"] == "train/loss" and training["lr"] == "train/lr"
    assert training["images_per_second"] == "speed/images_per_second"
    evaluation = scalar_tags(["AP", "AP50", "val_loss"])
    assert evaluation == {"AP": "val/AP", "AP50": "val/AP50", "val_loss": "val/loss"}


def test_the_lines_for_mlflow_log_every_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "coco").mkdir(parents=True)
    records = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}, {"step": 2, "AP": 0.1}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "runs" / "coco" / "metrics.jsonl").write_text(lines)
    exec(compile(code_with("mlflow"), "see_it.md", "exec"), {})
    run = mlflow.active_run().info.run_id
    mlflow.end_run()
    history = mlflow.MlflowClient().get_metric_history(run, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.5), (2, 1.5)]
    assert mlflow.get_run(run).data.metrics["AP"] == 0.1


def test_the_lines_for_wandb_are_python() -> None:
    code = code_with("sync_tensorboard")
    compile(code, "with_wandb.py", "exec")
    import train

    assert callable(train.run_from_command_line) and "train.run_from_command_line()" in code
