"""What docs/from_mmdetection.md says of this side is so: pytest tests/test_from_mmdetection.py.

MMDetection's side was read in its sources; it is not installed here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from helpers import ROOT
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import _default_anchorgen

from runtime.options import build_parser

PAGE = (ROOT / "docs" / "from_mmdetection.md").read_text()
COMMANDS = [
    command.replace("\\\n", " ")
    for command in re.findall(r"^    ((?:torchrun|python) (?:.*\\\n)*.*)$", PAGE, re.M)
]


def flags_of(command: str) -> argparse.Namespace:
    return build_parser().parse_args(shlex.split(command.split("train.py ")[1]))


def config() -> dict[str, Any]:
    """Return the example's variables; a config of MMDetection is Python."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    values: dict[str, Any] = {}
    exec(compile(code, "config.py", "exec"), values)
    return values


def test_every_flag_of_the_page_exists_and_its_defaults_are_ours() -> None:
    parser = build_parser()
    known = {flag for action in parser._actions for flag in action.option_strings}
    cells = [line.strip("|").split(" | ")[-1] for line in PAGE.splitlines() if line.startswith("|")]
    named = set(re.findall(r"(--[a-z][a-z-]+)", "\n".join(cells)))
    assert named <= known and len(named) > 35, named - known
    flags = parser.parse_args([])
    assert (flags.data_augmentation, flags.keep_empty, flags.seed) == ("hflip", False, 0)
    assert (flags.eval_every, flags.momentum, flags.lr_gamma) == (1, 0.9, 0.1)
    model = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    assert model.topk_candidates == 1000 and model.detections_per_img == 300
    assert (model.score_thresh, model.nms_thresh) == (0.05, 0.5)
    transform = model.transform
    assert (transform.min_size, transform.max_size, transform.size_divisible) == ((800,), 1333, 32)


def test_the_published_config_is_twelve_epochs_of_their_schedule() -> None:
    flags = flags_of(COMMANDS[0])
    assert (flags.epochs, flags.lr_steps, flags.warmup_steps) == (12, [8, 11], 500)
    assert (flags.opt, flags.lr, flags.momentum, flags.wd) == ("sgd", 0.01, 0.9, 1e-4)
    assert (flags.batch_size, flags.assigner, flags.detections_per_image) == (2, "max-iou", 100)
    assert flags.weights_backbone == "ResNet50_Weights.IMAGENET1K_V1" and flags.scale_lr


def test_what_the_page_says_of_torchvision_is_so() -> None:
    first = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    second = detection.retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None)
    extra = [model.backbone.fpn.extra_blocks for model in (first, second)]
    assert [block.use_P5 for block in extra] == [True, False]  # else from C5
    assert [block.p6.in_channels for block in extra] == [256, 2048]
    assert first.head.classification_head.num_classes == 91
    # 800 pixels: P6 has 13 rows, 61 apart.
    images = torch.zeros(1, 3, 800, 800)
    maps = [torch.zeros(1, 1, side, side) for side in (100, 50, 25, 13, 7)]
    (anchors,) = _default_anchorgen()(ImageList(images, [(800, 800)]), maps)
    assert torch.equal(anchors, anchors.round())  # whole pixels
    of_p6 = anchors[9 * (100**2 + 50**2 + 25**2) :][: 9 * 13**2].view(13, 13, 9, 4)
    assert (of_p6[1, 0, 0] - of_p6[0, 0, 0]).tolist() == [0, 61, 0, 61]
    # P7 is made of P6 after a ReLU.
    negative = torch.full((1, 256, 8, 8), -1.0)
    block = extra[0]
    torch.nn.init.constant_(block.p6.weight, 1e-3)
    features, _ = block([negative], [negative], ["P5"])
    p6, p7 = features[-2:]
    assert p6.max() < 0 and torch.equal(p7, block.p7(torch.zeros_like(p6)))


def test_the_example_means_its_config() -> None:
    theirs, flags = config(), flags_of(COMMANDS[1])
    head, test = theirs["model"]["bbox_head"], theirs["model"]["test_cfg"]
    scale = head["anchor_generator"]["octave_base_scale"]
    assert flags.anchor_sizes == [scale * stride for stride in (8, 16, 32, 64, 128)]
    assert (flags.score_thresh, flags.detections_per_image) == tuple(test.values())
    (longer, shorter) = theirs["pipeline"][2]["scale"]
    assert (flags.max_size, flags.min_size) == (longer, shorter)
    batches = theirs["train_dataloader"]
    assert (flags.batch_size, flags.workers) == (batches["batch_size"], batches["num_workers"])
    assert (flags.epochs, flags.eval_every) == tuple(theirs["train_cfg"].values())
    warmup, decay = theirs["param_scheduler"]
    assert (flags.warmup_steps, flags.lr_steps) == (warmup["end"], decay["milestones"])
    optimizer = theirs["optim_wrapper"]["optimizer"]
    assert flags.opt == optimizer["type"].lower() and flags.wd == optimizer["weight_decay"]
    assert flags.lr == optimizer["lr"]
    assert flags.clip_grad_norm == theirs["optim_wrapper"]["clip_grad"]["max_norm"]
    assert str(flags.data_path) + "/" == theirs["data_root"]
    assert flags.weights_backbone is theirs["model"]["backbone"]["init_cfg"] is None
    assert flags.data_augmentation == "hflip" and flags.assigner == "max-iou"


def test_the_example_trains_as_it_is_typed(tiny_shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    (tmp_path / "shapes").symlink_to(tiny_shapes)
    words = shlex.split(COMMANDS[1])
    assert words[0] == "python"
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "from_mmdetection"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    (evaluation,) = [record for record in records if "AP" in record]
    assert evaluation["epoch"] == 1 and evaluation["step"] == records[-1]["step"]
    about = json.loads((folder / "args.json").read_text())
    names = tuple(category["name"] for category in about["categories"])
    assert names == config()["metainfo"]["classes"]
    assert len(names) == config()["model"]["bbox_head"]["num_classes"]
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)
    outputs = saved["model"]["head.classification_head.cls_logits.bias"]
    assert len(outputs) == 9 * (len(names) + 1)  # output 0 is unused


def test_the_page_is_reached_from_the_readme() -> None:
    assert "docs/from_mmdetection.md" in (ROOT / "README.md").read_text()
