"""Every recipe has the published numbers, parses, and trains: pytest tests/test_recipes.py.

The scripts run as they are, with stand-ins for what they call. One writes down the flags, which are
compared with the published numbers; the other starts the real torchrun for two steps on small
images. recipes/slurm.sbatch has tests/test_slurm.py, recipes/two_nodes.sh test_two_nodes.py, too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from torch.distributed.run import get_args_parser
from torchvision import models

import train as train_script

SCRIPTS = sorted((ROOT / "recipes").glob("*.sh"))
COCO_RECIPES = [path for path in SCRIPTS if path.name.startswith("retinanet_")]
# What recipes call: it writes down its arguments, which are separated as no argument is.
RECORDER = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$RECORD"
"""
# The real launcher, on a free port.
LAUNCHER = """#!/usr/bin/env bash
exec "$PYTHON" -m torch.distributed.run --standalone "$@"
"""
SMALL = (
    "--device cpu --workers 0 --batch-size 1 --print-freq 1 --max-steps 2 --eval-every 0 "
    "--clip-grad-norm 1".split()
)
SMALL_MODEL = "--model retinanet_resnet18_fpn --min-size 64 --max-size 64".split()


def run(
    script: Path, folder: Path, stand_in: str, *flags: str | Path, check: bool = True, **env: Any
) -> subprocess.CompletedProcess[str]:
    """Run a recipe whose torchrun is `stand_in`, and in whose name no other variables are set."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "torchrun").write_text(stand_in)
    (tools / "torchrun").chmod(0o755)
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("DATA", "GPUS", "OUTPUT", "NODES")},
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RECORD": str(folder / "record"),
        **{name: str(value) for name, value in env.items()},
    }
    done = subprocess.run(
        ["bash", str(script), *map(str, flags)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check and done.returncode:
        raise AssertionError(f"{script.name} failed:\n{done.stdout}\n{done.stderr}")
    return done


def flags_of(script: Path, folder: Path, *extra: str, **env: Any) -> tuple[int, Namespace]:
    """Return how many processes a recipe starts on a machine, and with which flags of train.py."""
    python = folder / "python"
    python.write_text(RECORDER)
    python.chmod(0o755)
    host = ("node1",) if script.stem == "two_nodes" else ()
    run(script, folder, RECORDER, *host, *extra, PYTHON=python, DATA="/my data", **env)
    words = (folder / "record").read_text().split("\0")
    (folder / "record").unlink()
    if words[0] == "python":
        end = words.index("python", 1)  # where tools.report begins
        assert words[1] == "train.py" and words[end + 1 : end + 3] == ["-m", "tools.report"]
        return 1, train_script.build_parser().parse_args(words[2:end])
    launch = get_args_parser().parse_args(words[1:-1])
    assert words[0] == "torchrun" and launch.training_script == "train.py"
    flags = train_script.build_parser().parse_args(launch.training_script_args)
    return int(launch.nproc_per_node), flags


# By script: what its flags have to mean, with the published numbers.
SGD = {"opt": "sgd", "lr": 0.01, "momentum": 0.9, "wd": 1e-4, "norm_weight_decay": None}
ADAMW = {"opt": "adamw", "lr": 1e-4, "wd": 0.05}
SIXTEEN = {"gpus": 8, "batch_size": 2, "accumulate_steps": 1}
LONG = {
    "gpus": 8,
    "batch_size": 8,
    "accumulate_steps": 1,
    "epochs": 200,
    "amp": "bf16",
    "data_augmentation": "lsj",
    "norm_weight_decay": 0,
    "clip_grad_norm": 1,
    "ema_decay": 0.9998,
    "lr_scheduler": "cosineannealinglr",
    "min_size": None,  # evaluation at the model's own: 800 and 1333
    "max_size": None,
    "weights_backbone": "ResNet50_Weights.IMAGENET1K_V2",
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "retinanet_r50_fpn_26e": {
        **SGD | SIXTEEN,
        "model": "retinanet_resnet50_fpn",
        "epochs": 26,
        "lr_steps": [16, 22],
        "data_augmentation": "hflip",
        "aspect_ratio_group_factor": 3,
        "amp": None,
        "min_size": None,
        "max_size": None,  # the model's own: 800 and 1333
        "weights_backbone": "ResNet50_Weights.IMAGENET1K_V1",
    },
    "retinanet_r50_fpn_v2_26e": {
        **ADAMW | SIXTEEN,
        "model": "retinanet_resnet50_fpn_v2",
        "epochs": 26,
        "lr_steps": [16, 22],
        "data_augmentation": "multiscale",
        "norm_weight_decay": 0,
        "sync_bn": True,
        "weights_backbone": "ResNet50_Weights.IMAGENET1K_V2",
    },
    "retinanet_r50_fpn_rsb_adamw_12e": {
        **ADAMW | SIXTEEN,
        "model": "retinanet_resnet50_fpn",
        "epochs": 12,
        "lr_steps": [8, 11],
        "data_augmentation": "hflip",
        "warmup_steps": 500,
        "weights_backbone": "ResNet50_Weights.IMAGENET1K_V2",
    },
    "retinanet_r50_fpn_ms_36e": {
        **SGD | SIXTEEN,
        "model": "retinanet_resnet50_fpn",
        "epochs": 36,
        "lr_steps": [27, 33],
        "data_augmentation": "multiscale",
        "warmup_steps": 500,
        "weights_backbone": "ResNet50_Weights.IMAGENET1K_V1",
    },
    "retinanet_r50_fpn_lsj_100e_ema_bf16": {
        **SGD,
        "model": "retinanet_resnet50_fpn",
        "epochs": 100,
        "data_augmentation": "lsj",
        "amp": "bf16",
        "ema_decay": 0.9998,
        "lr_scheduler": "cosineannealinglr",
        "min_size": None,
        "max_size": None,  # evaluation at the model's own: 800 and 1333
    },
    "retinanet_r50_fpn_lsj_200e_adamw": {
        **ADAMW | LONG,
        "model": "retinanet_resnet50_fpn",
        "sync_bn": False,
    },
    "retinanet_r50_fpn_v2_lsj_200e_adamw": {
        **ADAMW | LONG,
        "model": "retinanet_resnet50_fpn_v2",
        "sync_bn": True,
    },
    "shapes": {"dataset": "shapes", "epochs": 6, "model": "retinanet_resnet50_fpn"},
    "bccd": {
        "model": "retinanet_resnet18_fpn",
        "min_size": 320,
        "max_size": 427,
        "batch_size": 4,
        "opt": "adamw",
        "lr": 5e-4,
        "wd": 0.05,
        "clip_grad_norm": 1,
        "amp": "bf16",
        "epochs": 15,
        "lr_steps": [12],
        "warmup_steps": 100,
    },
    "two_nodes": {"gpus": 8, "scale_lr": True},
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_recipe_means_the_published_numbers(script: Path, tmp_path: Path) -> None:
    gpus, flags = flags_of(script, tmp_path)
    actual = vars(flags) | {"gpus": gpus}
    expected = PUBLISHED[script.stem]
    assert {name: actual[name] for name in expected} == expected
    assert flags.resume == "auto" and flags.output_dir.parts[0] == "runs"


@pytest.mark.parametrize("script", COCO_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_anywhere_with_other_flags(script: Path, tmp_path: Path) -> None:
    gpus, flags = flags_of(script, tmp_path, "--lr", "0.5", "--seed", "3", GPUS=4, OUTPUT="/here")
    assert gpus == 4 and (flags.lr, flags.seed) == (0.5, 3)
    assert flags.output_dir == Path("/here") and flags.data_path == Path("/my data")
    # Any number of GPUs and images: the rate is for 16 of them and scales.
    assert flags.scale_lr
    without_data = run(script, tmp_path, RECORDER, check=False)
    assert without_data.returncode != 0 and "DATA: is not set: the folder" in without_data.stderr
    assert not (tmp_path / "record").exists()


# By script: the AP that its comment names, and who published it; the rest is measured.
SHOULD_REACH = {
    "retinanet_r50_fpn_26e": ("AP 36.4", "torchvision"),
    "retinanet_r50_fpn_v2_26e": ("AP 41.5", "torchvision"),
    "retinanet_r50_fpn_rsb_adamw_12e": ("AP 39.0", "MMDetection"),
    "retinanet_r50_fpn_ms_36e": ("AP 39.5", "MMDetection"),
    "retinanet_r50_fpn_lsj_100e_ema_bf16": ("AP 41.4", "SA-AutoAug"),
    "retinanet_r50_fpn_lsj_200e_adamw": ("AP 42 to 43", "SA-AutoAug", "This is reasoning"),
    "retinanet_r50_fpn_v2_lsj_200e_adamw": ("AP 44", "torchvision", "This is reasoning"),
}
MEASURED = {"shapes": "make demo", "bccd": "recipes/bccd.sh"}  # its command in docs/results.md


@pytest.mark.parametrize("name", [path.stem for path in SCRIPTS if path.stem != "two_nodes"])
def test_a_recipe_states_its_ap_and_who_measured_it(name: str) -> None:
    comment = (ROOT / "recipes" / f"{name}.sh").read_text().split("set -euo")[0]
    results = (ROOT / "docs" / "results.md").read_text()
    if name in MEASURED:
        assert "measured in docs/results.md" in comment and MEASURED[name] in results
        (reached,) = re.findall(r"AP (?:>= )?(0\.\d+)", comment)
        assert any(float(ap) >= float(reached) for ap in re.findall(r"\| (0\.\d{3}) \|", results))
    else:
        assert "not yet measured here" in comment and "measured in docs" not in comment
        assert all(text in comment for text in SHOULD_REACH[name])


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of random values in the place of ImageNet's weights."""
    folder = tmp_path_factory.mktemp("backbones")
    paths = {name: folder / f"{name}.pth" for name in ("resnet18", "resnet50")}
    for name, path in paths.items():
        torch.save(models.get_model(name).state_dict(), path)
    return paths


def train_two_steps(script: Path, place: Path, *flags: str | Path, **env: Any) -> dict[str, Any]:
    """Train by a recipe, on one process, and return its args.json with its losses."""
    folder = place / "out"
    variables = {"PYTHON": sys.executable, "OUTPUT": folder, "GPUS": 1, **env}
    run(script, place, LAUNCHER, *SMALL, *flags, **variables)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert (folder / "checkpoint.pth").exists()
    return json.loads((folder / "args.json").read_text())


def test_the_published_recipe_trains(
    tiny_shapes: Path, backbones: dict[str, Path], tmp_path: Path
) -> None:
    script = ROOT / "recipes" / "retinanet_r50_fpn_26e.sh"
    backbone = ("--weights-backbone", backbones["resnet18"])
    record = train_two_steps(script, tmp_path, *SMALL_MODEL, *backbone, DATA=tiny_shapes)
    # One process of one image: a sixteenth of the recipe's batch, and of its rate.
    assert record["effective_lr"] == pytest.approx(0.01 / 16) and record["global_batch"] == 1
    assert record["args"]["epochs"] == 26 and record["args"]["opt"] == "sgd"


@pytest.mark.slow
@pytest.mark.parametrize("script", COCO_RECIPES[1:], ids=lambda path: path.stem)
def test_the_other_coco_recipes_train(
    script: Path, tiny_shapes: Path, backbones: dict[str, Path], tmp_path: Path
) -> None:
    # The second RetinaNet is what its recipe is about; the others run at their own image sizes.
    small: tuple[str, ...] = ()
    resnet = "resnet50"
    if "v2" in script.stem:
        small = ("--no-sync-bn",)  # this is a CPU
    else:
        small, resnet = SMALL_MODEL[:2], "resnet18"
    flags = (*small, "--weights-backbone", str(backbones[resnet]))
    record = train_two_steps(script, tmp_path, *flags, DATA=tiny_shapes)
    expected = PUBLISHED[script.stem]
    for name in ("opt", "epochs", "data_augmentation"):
        assert record["args"][name] == expected[name]
    saved = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    assert (saved["ema"] is not None) == ("ema_decay" in expected)
    if "v2" in script.stem:  # two groups: all that is no norm, and the norms, without decay
        assert [group["weight_decay"] for group in saved["optimizer"]["param_groups"]] == [0.05, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes", "bccd"])
def test_the_recipes_for_two_cores_train_and_report(
    name: str, tiny_shapes: Path, tmp_path: Path
) -> None:
    script = ROOT / "recipes" / f"{name}.sh"
    # Two steps are an epoch of batches of 8, after which there is something to report.
    epoch = ("--epochs", "1", "--batch-size", "8", "--eval-every", "1", "--max-steps", "3")
    flags = (*SMALL_MODEL, *epoch, "--dataset", "coco", "--data-path", tiny_shapes)
    record = train_two_steps(script, tmp_path, *flags, DATA=tiny_shapes)
    assert record["args"]["amp"] == "bf16"
    assert list((tmp_path / "out").rglob("errors.png"))
