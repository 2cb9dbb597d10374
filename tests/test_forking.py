"""The diffs of docs/forking.md apply and do what they say: pytest tests/test_forking.py."""

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
from conftest import ROOT, TINY
from PIL import Image

import train as train_script

PAGE = (ROOT / "docs" / "forking.md").read_text()
DIFFS = dict(re.findall(r"^## An own (.+?)\n.*?^```diff\n(.*?)^```$", PAGE, re.S | re.M))


def patched(name: str, place: Path) -> Path:
    """Copy the project to `place` and apply one of the diffs there."""
    fork = place / "fork"
    fork.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, fork)
    (place / "example.diff").write_text(DIFFS[name])
    command = ["git", "apply", "--verbose", str(place / "example.diff")]
    # Without a repository around it, so that paths are those below `fork`.
    alone = {"GIT_CEILING_DIRECTORIES": str(place), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=fork, env=alone, capture_output=True, text=True)
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


def test_there_is_an_example_for_each_kind_of_change() -> None:
    assert set(DIFFS) == {"head", "backbone", "augmentation", "data set class", "metric"}


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_is_short_and_applies(name: str, tmp_path: Path) -> None:
    assert len(DIFFS[name].splitlines()) < 30
    fork = patched(name, tmp_path)
    changed = [p.name for p in fork.glob("*.py") if p.read_text() != (ROOT / p.name).read_text()]
    assert changed == re.findall(r"^\+\+\+ b/(.*)$", DIFFS[name], re.M)
    select = ["--config", str(ROOT / "pyproject.toml"), "--ignore", "I001"]  # sorts by folder
    ruff = [sys.executable, "-m", "ruff", "check", *select, *changed]
    done = subprocess.run(ruff, cwd=fork, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_commands_parse() -> None:
    commands = re.findall(r"^    python train\.py (.*)$", PAGE, re.M)
    assert len(commands) == len(DIFFS)
    for command in commands:
        words = [word for word in shlex.split(command) if word != "microscope"]
        if len(words) < len(shlex.split(command)):
            words.remove("--data-augmentation")
        train_script.build_parser().parse_args(words)


@pytest.mark.slow
def test_the_head_trains(tiny_shapes: Path, tmp_path: Path) -> None:
    saved = train_in(patched("head", tmp_path), tiny_shapes, *TWO_STEPS)
    towers = {key.split(".")[1] for key in saved["model"] if key.startswith("head.")}
    assert towers == {"classification_head", "regression_head", "tower"}
    assert not any("regression_head.conv" in key for key in saved["model"])


@pytest.mark.slow
def test_the_backbone_trains(tiny_shapes: Path, tmp_path: Path) -> None:
    model = ("--model", "retinanet_convnext_tiny_fpn")
    saved = train_in(patched("backbone", tmp_path), tiny_shapes, *model, *TWO_STEPS)
    assert saved["model"]["backbone.body.7.0.block.0.weight"].shape == (768, 1, 7, 7)
    assert saved["args"]["model"] == "retinanet_convnext_tiny_fpn"


@pytest.mark.slow
def test_the_augmentation_trains(tiny_shapes: Path, tmp_path: Path) -> None:
    flags = ("--data-augmentation", "microscope")
    saved = train_in(patched("augmentation", tmp_path), tiny_shapes, *flags, *TWO_STEPS)
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
    saved = train_in(patched("data set class", tmp_path), scans, *TWO_STEPS)
    assert saved["step"] == 2


@pytest.mark.slow
def test_the_metric_is_recorded(tiny_shapes: Path, tmp_path: Path) -> None:
    fork = patched("metric", tmp_path)
    train_in(fork, tiny_shapes, "--epochs", "1")
    results = json.loads((fork / "out" / "eval" / "epoch_0" / "results.json").read_text())
    # An untrained model finds nothing with a score of 0.5, so the error is what is annotated.
    content = json.loads((tiny_shapes / "annotations" / "instances_val2017.json").read_text())
    boxes = sum(not annotation["iscrowd"] for annotation in content["annotations"])
    assert results["count_error"] == pytest.approx(boxes / len(content["images"]))
    recorded = [json.loads(line) for line in (fork / "out" / "metrics.jsonl").open()]
    assert recorded[-1]["count_error"] == results["count_error"]
