"""The best-possible recall is that of the real anchors: pytest tests/test_anchor_fit.py."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LABEL_MAP
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops import box_iou

from data import coco_arrays, coco_json
from models import retinanet
from models.build import build_model, load_detector
from models.retinanet import make_anchor_generator
from runtime import checkpoint, options
from tools import anchor_fit, visualize
from utils import UserError

Train = Callable[..., Any]


def all_anchors(generator: AnchorGenerator, height: int, width: int) -> torch.Tensor:
    """Return every anchor of a padded image, as training makes them."""
    features = [(height // 8, width // 8)]
    for _ in range(4):
        features.append((-(-features[-1][0] // 2), -(-features[-1][1] // 2)))
    size, device = (height, width), torch.device("cpu")
    return retinanet.make_anchors(generator, tuple(features), size, torch.float32, device)


@pytest.mark.parametrize("padded", [(64, 96), (800, 1216), (160, 32)])
@pytest.mark.parametrize("sizes", [None, (10, 17, 40, 70, 130)])
def test_the_best_iou_is_that_of_all_anchors_together(
    padded: tuple[int, int], sizes: tuple[int, ...] | None
) -> None:
    height, width = padded
    generator = make_anchor_generator(sizes, None if sizes is None else (0.4, 1.3))
    random = np.random.default_rng(0)
    low = random.uniform(0, 1, (60, 2)) * (width - 4, height - 4)
    extent = 3 + random.uniform(0, 1, (60, 2)) ** 3 * (np.array([width, height]) - 3)
    corners = np.concatenate([low, np.minimum(low + extent, [width, height])], axis=1)
    boxes = anchor_fit.Boxes(corners, np.zeros(60, np.int64), np.tile([padded], (60, 1)))
    expected = box_iou(
        torch.from_numpy(corners), all_anchors(generator, height, width).double()
    ).amax(dim=1)
    ious = anchor_fit.best_ious(boxes, generator)
    assert ious == pytest.approx(expected.numpy(), abs=1e-9)
    assert ious.min() < 0.5 < ious.max()  # both kinds of boxes are among them


def test_boxes_are_where_the_model_puts_them(bccd: Path) -> None:
    path = bccd / "annotations" / "instances_train2017.json"
    annotations = coco_json.read_annotations(path)[0]
    model: Any = build_model("retinanet_resnet18_fpn", LABEL_MAP, min_size=200, max_size=260)
    boxes = anchor_fit.boxes_to_cover(annotations, model.transform)
    start, end = annotations.offsets[5:7]
    raw = torch.from_numpy(coco_arrays.to_xyxy(annotations.boxes_xywh[start:end]))
    image = torch.zeros(3, *annotations.sizes[5].tolist())
    batch, (target,) = model.transform([image], [{"boxes": raw, "labels": torch.ones(len(raw))}])
    rows = slice(int(start), int(end))
    assert not annotations.iscrowd[: int(end)].any() and len(raw) > 3
    assert boxes.xyxy[rows] == pytest.approx(target["boxes"].numpy(), abs=1e-3)
    assert boxes.padded[int(start)].tolist() == list(batch.tensors.shape[-2:])


def write(folder: Path, sides: list[int], crowd: bool = False) -> Path:
    """Write a data set of one 128 px image with square boxes of `sides` along its diagonal."""
    from PIL import Image

    (folder / "annotations").mkdir(parents=True)
    boxes = [[n * 100 // len(sides), n * 100 // len(sides), s, s] for n, s in enumerate(sides)]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 128, "height": 128}],
        "categories": [{"id": 1, "name": "speck"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1, "bbox": box, "area": 1, "iscrowd": crowd}
            for n, box in enumerate(boxes, start=1)
        ],
    }
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        Image.new("RGB", (128, 128)).save(folder / split / "a.png")
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def report(folder: Path, *flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    size = ("--min-size", "128", "--max-size", "128", "--model", "retinanet_resnet18_fpn")
    visualize.main(["anchor-fit", "--data-path", str(folder), *size, *flags])
    return capsys.readouterr().out


def test_better_anchors_are_proposed_and_reach_the_printed_recall(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "specks", [20, 21, 22])
    said = report(folder, capsys=capsys)
    assert "best-possible recall of the default anchors: 0.0000" in said
    flags = shlex.split(re.findall(r"^use them with (.*)$", said, re.M)[0])
    (proposed,) = re.findall(r"recall of the anchors proposed: ([\d.]+)", said)
    again = report(folder, *flags, capsys=capsys)
    assert f"best-possible recall of these anchors: {proposed}" in again
    assert float(proposed) >= 0.98 and "at least 0.98: keep them" in again


def test_good_anchors_are_kept_and_boxes_too_small_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = report(write(tmp_path / "large", [40, 60, 80]), capsys=capsys)
    assert "at least 0.98: keep them" in said and "use them with" not in said
    said = report(write(tmp_path / "dots", [2, 3, 2, 3, 2]), capsys=capsys)
    assert "no anchors that were tried reach 0.98; train at a larger --min-size" in said


def test_data_without_boxes_and_other_models_are_refused(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "crowds", [40], crowd=True))
    with pytest.raises(UserError, match="has no boxes"):
        visualize.main(["anchor-fit", "--data-path", folder])
    with pytest.raises(UserError, match="--model fcos_resnet50_fpn: .* RetinaNet only"):
        visualize.main(["anchor-fit", "--data-path", folder, "--model", "fcos_resnet50_fpn"])


# --- the flags ------------------------------------------------------------------------------------


def test_the_default_anchors_are_torchvisions() -> None:
    expected = _default_anchorgen()
    named = make_anchor_generator((32, 64, 128, 256, 512), (0.5, 1, 2))
    for ours in (make_anchor_generator(), named):
        assert (ours.sizes, ours.aspect_ratios) == (expected.sizes, expected.aspect_ratios)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--anchor-sizes", "8", "16"], "--anchor-sizes 8 16: give five numbers"),
        (
            ["--anchor-sizes", "0", "1", "2", "3", "4"],
            "0 is out of range; give a whole",
        ),
        (["--anchor-ratios", "-1"], "-1 is out of range; give a number greater than 0"),
        (["--anchor-ratios", "nan"], "nan is out of range; give a number greater than 0"),
    ],
)
def test_impossible_anchors_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        args = options.parse_args([*flags, "--dataset", "shapes"])
        make_anchor_generator(args.anchor_sizes, args.anchor_ratios)


@pytest.mark.parametrize("name", ["retinanet_resnet18_fpn", "retinanet_resnet50_fpn_v2"])
def test_other_ratios_change_the_head_but_not_its_initialization(name: str) -> None:
    torch.manual_seed(0)
    model: Any = build_model(name, LABEL_MAP, min_size=64, max_size=64, anchor_ratios=[0.3, 1])
    scores, boxes = model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg
    assert scores.weight.shape[0] == 2 * 3 * 4 and boxes.weight.shape[0] == 2 * 3 * 4
    assert scores.bias.tolist() == pytest.approx([-np.log(99)] * len(scores.bias))
    assert not boxes.bias.any() and 0.009 < float(boxes.weight.detach().std()) < 0.011
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    losses = model.train()([torch.rand(3, 64, 64)] * 2, [target] * 2)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert set(model.eval()([torch.rand(3, 64, 64)])[0]) == {"boxes", "labels", "scores"}


def test_a_checkpoint_remembers_its_anchors(train: Train, tmp_path: Path) -> None:
    sizes, ratios = ("12", "24", "48", "96", "192"), ("0.5", "1.5")
    anchors = ("--anchor-sizes", *sizes, "--anchor-ratios", *ratios)
    out = ("--output-dir", tmp_path / "run")
    train(*anchors, *out, "--max-steps", "1", "--eval-every", "0")
    path = tmp_path / "run" / "checkpoint.pth"
    remembered = options.parse_args(["--test-only", "--resume", str(path)])
    assert remembered.anchor_sizes == [12, 24, 48, 96, 192]
    assert remembered.anchor_ratios == [0.5, 1.5]
    model: Any = load_detector(str(path))[0]
    assert model.anchor_generator.sizes[0] == (12, 15, 19)
    assert model.anchor_generator.aspect_ratios == ((0.5, 1.5),) * 5
    saved = checkpoint.load(path)
    on_resume = options.build_parser().on_resume
    assert on_resume["anchor_sizes"] == on_resume["anchor_ratios"] == "refuse"
    with pytest.raises(UserError, match="have 6 anchors per cell, and --anchor-ratios make 9"):
        build_model("retinanet_resnet18_fpn", saved["categories"], weights=str(path))
