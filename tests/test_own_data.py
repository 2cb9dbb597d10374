"""docs/own_data.md, followed word for word on real images: pytest tests/test_own_data.py.

Only training has flags appended, for small images and one epoch; and COCO's weights, which are not
here, are a file of random values under their name.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from torchvision import models

import train as train_script
from models.build import build_model
from tools import check_data, convert, predict, visualize

PAGE = (ROOT / "docs" / "own_data.md").read_text()
WEIGHTS = models.detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1
SHORT = (
    "--min-size 96 --max-size 128 --batch-size 16 --epochs 1 --lr-steps 1 --workers 0 "
    "--device cpu --print-freq 1".split()
)


def commands() -> Iterator[str]:
    """Yield the page's commands in order, each as it is typed."""
    for command in re.findall(r"^    (python (?:.*\\\n)*.*)$", PAGE, re.M):
        yield command.replace("\\\n", " ")


def block(start: str) -> list[str]:
    """Return the lines of the indented block that begins with `start`."""
    (lines,) = re.findall(rf"^    {re.escape(start)}.*\n(?:    .*\n)*", PAGE, re.M)
    return [line[4:] for line in lines.splitlines()]


@pytest.fixture
def place(bccd: Path, tmp_path: Path) -> Path:
    """A folder that looks like the project's, with `bccd` in it and COCO's weights at hand."""
    for path in [*ROOT.glob("*.py"), ROOT / "tools"]:
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "bccd").symlink_to(bccd)
    names = WEIGHTS.meta["categories"]
    label_map = [{"name": name, "label": i} for i, name in enumerate(names) if i]
    torch.manual_seed(0)
    model = build_model("retinanet_resnet50_fpn", label_map, load=False, weights="COCO_V1")
    for name, value in model.named_buffers():
        if name.endswith("bn3.weight"):
            value.fill_(0.1)  # random layers whose features do not grow from block to block
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(model.state_dict(), cache / Path(WEIGHTS.url).name)
    return tmp_path


def run(command: str, folder: Path) -> str:
    """Run one command in `folder` as a user does, and return its output."""
    environment: dict[str, Any] = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TORCH_HOME": str(folder / "torch"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        shlex.split(command),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_the_commands_parse_and_are_in_the_readme() -> None:
    parsers = {
        "tools.convert": convert.build_parser(),
        "tools.check_data": check_data.build_parser(),
        "tools.visualize batch": visualize.build_parser(),
        "tools.visualize anchor-fit": train_script.build_parser(),
        "tools.predict": predict.build_parser(),
        "train.py": train_script.build_parser(),
    }
    seen = []
    for command in commands():
        name = re.sub(r"^python (-m )?", "", command)
        for start, parser in parsers.items():
            if name.startswith(start):
                parser.parse_args(shlex.split(name.removeprefix(start)))
                seen.append(start)
    assert seen == [*list(parsers)[:4], "train.py", "tools.predict"]
    assert len(list(commands())) == len(seen) + 1  # tools.report, whose only word is a folder


@pytest.mark.slow
def test_the_page_leads_from_a_folder_to_predictions(place: Path) -> None:
    printed = {}
    for command in commands():
        name = next(w for w in command.split()[1:] if not w.startswith("-"))
        if name == "train.py":
            command += " " + " ".join(SHORT)
        printed[name if name != "tools.visualize" else command.split()[3]] = run(command, place)
    assert (place / "mydata.png").stat().st_size > 10_000
    assert (place / "batch.jpg").stat().st_size > 10_000
    assert "at least 0.98: keep them" in printed["anchor-fit"]
    for line in block("weights RetinaNet_ResNet50_FPN_Weights.COCO_V1: "):
        assert line in printed["train.py"]
    assert "Average Precision" in printed["train.py"]
    assert (place / "runs" / "mydata" / "best.pth").is_file()
    assert list((place / "runs" / "mydata").rglob("errors.png")), printed["tools.report"]
    assert (place / "predictions" / "detections.json").is_file()
    assert len(list((place / "predictions" / "pictures").iterdir())) == 72


def test_the_anchors_on_the_page_are_those_that_are_found(
    bccd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ("--min-size", "240", "--max-size", "320", "--model", "retinanet_resnet18_fpn")
    visualize.main(["anchor-fit", "--data-path", str(bccd), *size])
    assert capsys.readouterr().out.splitlines() == block("3,980 boxes of")
    for shorter, longest, share in ((320, 427, "0.8089"), (480, 640, "1 of 293 boxes")):
        size = ("--min-size", str(shorter), "--max-size", str(longest), *size[4:])
        visualize.main(["anchor-fit", "--data-path", str(bccd), *size])
        platelets = re.findall(r"^  Platelets .*$", capsys.readouterr().out, re.M)[0]
        assert share in platelets
