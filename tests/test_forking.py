"""The diffs of docs/forking.md apply and have their stated effect: pytest tests/test_forking.py."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY
from PIL import Image

from runtime import options

PAGE = (ROOT / "docs" / "forking.md").read_text()
DIFFS = dict(re.findall(r"^## (.+?)\n.*?^```diff\n(.*?)^```$", PAGE, re.S | re.M))
ROOMS = ("models", "data", "runtime")


def patched(title: str, folder: Path) -> Path:
    """Copy the project into `folder` and apply one of the diffs there."""
    fork = folder / "fork"
    fork.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, fork)
    for room in ROOMS:
        shutil.copytree(ROOT / room, fork / room, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "example.diff").write_text(DIFFS[title])
    command = ["git", "apply", "--verbose", str(folder / "example.diff")]
    # Without a repository around it, so that paths are those below `fork`.
    environment = {"GIT_CEILING_DIRECTORIES": str(folder), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=fork, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return fork


def train_in(fork: Path, data: Path, *flags: str) -> dict[str, Any]:
    """Train by the fork, and return its newest checkpoint."""
    out = fork / "out"
    command = ("train.py", "--data-path", data, *TINY, "--output-dir", out, *flags)
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=fork,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) >= 2
    return torch.load(out / "checkpoint.pth", weights_only=True)


TWO_STEPS = ("--max-steps", "2", "--eval-every", "0")


def metrics_of(fork: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (fork / "out" / "metrics.jsonl").open()]


def test_there_is_an_example_for_each_kind_of_change() -> None:
    assert list(DIFFS) == [
        "Your own head",
        "Your own backbone",
        "A box loss behind a flag",
        "Your own augmentation",
        "Your own data set class",
        "Your own metric",
        "A gradient norm in the log",
        "A one-cycle schedule",
    ]


@pytest.mark.parametrize("title", DIFFS)
def test_a_diff_is_short_and_applies(title: str, tmp_path: Path) -> None:
    assert len(DIFFS[title].splitlines()) < 40
    fork = patched(title, tmp_path)
    copied = sorted(path.relative_to(fork).as_posix() for path in fork.rglob("*.py"))
    changed = [name for name in copied if (fork / name).read_text() != (ROOT / name).read_text()]
    assert changed == sorted(re.findall(r"^\+\+\+ b/(.*)$", DIFFS[title], re.M))
    select = ["--config", str(ROOT / "pyproject.toml"), "--ignore", "I001"]  # sorts by folder
    ruff = [sys.executable, "-m", "ruff", "check", *select, *changed]
    done = subprocess.run(ruff, cwd=fork, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_commands_parse() -> None:
    commands = re.findall(r"^    python train\.py (.*)$", PAGE, re.M)
    assert len(commands) == len(DIFFS)
    for command in commands:
        # What a diff adds is known only to its fork, which trains with it below.
        known = re.sub(r"--\S+ (microscope|smooth-l1|onecycle)", "", command)
        options.build_parser().parse_args(shlex.split(known))


@pytest.mark.slow
def test_the_head_trains(tiny_shapes: Path, tmp_path: Path) -> None:
    saved = train_in(patched("Your own head", tmp_path), tiny_shapes, *TWO_STEPS)
    towers = {key.split(".")[1] for key in saved["model"] if key.startswith("head.")}
    assert towers == {"classification_head", "regression_head", "tower"}
    assert not any("regression_head.conv" in key for key in saved["model"])


@pytest.mark.slow
def test_the_backbone_trains(tiny_shapes: Path, tmp_path: Path) -> None:
    model = ("--model", "retinanet_convnext_tiny_fpn")
    saved = train_in(patched("Your own backbone", tmp_path), tiny_shapes, *model, *TWO_STEPS)
    assert saved["model"]["backbone.body.7.0.block.0.weight"].shape == (768, 1, 7, 7)
    assert saved["args"]["model"] == "retinanet_convnext_tiny_fpn"


@pytest.mark.slow
def test_the_augmentation_trains(tiny_shapes: Path, tmp_path: Path) -> None:
    flags = ("--data-augmentation", "microscope")
    saved = train_in(patched("Your own augmentation", tmp_path), tiny_shapes, *flags, *TWO_STEPS)
    assert saved["args"]["data_augmentation"] == "microscope"


@pytest.mark.slow
def test_the_data_set_class_trains(tiny_shapes: Path, tmp_path: Path) -> None:
    scans = shutil.copytree(tiny_shapes, tmp_path / "scans")
    for split in ("train2017", "val2017"):
        path = scans / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        for entry in content["images"]:
            image = scans / split / entry["file_name"]
            gray = np.asarray(Image.open(image).convert("L")).astype(np.uint16) * 256
            entry["file_name"] = Path(entry["file_name"]).with_suffix(".npy").name
            np.save(image.with_name(entry["file_name"]), gray)
            image.unlink()
        path.write_text(json.dumps(content))
    saved = train_in(patched("Your own data set class", tmp_path), scans, *TWO_STEPS)
    assert saved["step"] == 2


@pytest.mark.slow
def test_the_metric_is_recorded(tiny_shapes: Path, tmp_path: Path) -> None:
    fork = patched("Your own metric", tmp_path)
    train_in(fork, tiny_shapes, "--epochs", "1")
    results = json.loads((fork / "out" / "eval" / "epoch_0" / "results.json").read_text())
    # An untrained model finds nothing with a score of 0.5, so the error is what is annotated.
    content = json.loads((tiny_shapes / "annotations" / "instances_val2017.json").read_text())
    boxes = sum(not annotation["iscrowd"] for annotation in content["annotations"])
    assert results["count_error"] == pytest.approx(boxes / len(content["images"]))
    assert metrics_of(fork)[-1]["count_error"] == results["count_error"]


@pytest.mark.slow
def test_the_box_loss_trains(tiny_shapes: Path, tmp_path: Path) -> None:
    fork = patched("A box loss behind a flag", tmp_path)
    losses = []
    for name in ("smooth-l1", "l1"):
        saved = train_in(fork, tiny_shapes, *TWO_STEPS, "--box-loss", name)
        assert saved["args"]["box_loss"] == name
        losses.append(metrics_of(fork)[0]["bbox_regression"])
        shutil.rmtree(fork / "out")
    # Smooth L1 is smaller everywhere, by at most half of beta for each of the four numbers.
    assert losses[1] - 4 * 0.05 <= losses[0] < losses[1]


@pytest.mark.slow
def test_the_gradient_norm_of_the_head_is_logged(tiny_shapes: Path, tmp_path: Path) -> None:
    fork = patched("A gradient norm in the log", tmp_path)
    train_in(fork, tiny_shapes, *TWO_STEPS)
    lines = [line for line in metrics_of(fork) if "loss" in line]
    assert len(lines) == 2
    assert all(0 < line["head_grad_norm"] < line["grad_norm"] for line in lines)


@pytest.mark.slow
def test_the_one_cycle_schedule_sets_rate_and_momentum(tiny_shapes: Path, tmp_path: Path) -> None:
    fork = patched("A one-cycle schedule", tmp_path)
    flags = ("--lr-scheduler", "onecycle", "--epochs", "1", "--opt", "sgd", "--eval-every", "0")
    saved = train_in(fork, tiny_shapes, *flags)
    rates = [line["lr"] / 1e-4 for line in metrics_of(fork) if "lr" in line]
    assert len(rates) == 8 and rates[0] == pytest.approx(0.04)
    peak = rates.index(max(rates))
    assert peak == 3 and rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    (group,) = saved["optimizer"]["param_groups"]
    assert group["momentum"] == pytest.approx(0.95 - 0.1 * rates[-1])
