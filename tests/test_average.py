"""An average is the mean to the last bit, of what fits together, and is used as a checkpoint.

pytest tests/test_average.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CAT_AND_DOG, flip_a_bit, make_label_map, sidecar
from torch import Tensor

import utils
from models.build import load_detector
from runtime import checkpoint
from tools import average, predict
from utils import UserError

FIRST = {
    "head.weight": torch.tensor([2.0**24, 1.0]),
    "bn.running_mean": torch.tensor([10.0]),
    "bn.running_var": torch.tensor([20.0]),
    "bn.num_batches_tracked": torch.tensor(5),
}
SECOND = {
    "head.weight": torch.tensor([1.0, 2.0]),
    "bn.running_mean": torch.tensor([11.0]),
    "bn.running_var": torch.tensor([21.0]),
    "bn.num_batches_tracked": torch.tensor(9),
}


def write(path: Path, model: dict[str, Tensor], **parts: Any) -> Path:
    """Write a checkpoint with these weights and parts."""
    args = {"model": "retinanet_resnet18_fpn", "anchor_sizes": None, "anchor_ratios": None}
    content = {"model": model, "ema": None, "args": args, "categories": CAT_AND_DOG}
    checkpoint.save(content | parts, path)
    return path


def test_weights_are_the_mean_in_float64_and_batch_statistics_those_of_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write(tmp_path / f"model_{n}.pth", s) for n, s in enumerate([FIRST, SECOND, SECOND])]
    output = tmp_path / "new" / "averaged.pth"
    average.main([*map(str, paths), "--output", str(output)])
    assert utils.is_verified(output)
    content = checkpoint.load(output)
    # In float32 the sum of 2**24, 1 and 1 is 2**24.
    assert content["model"]["head.weight"].tolist() == [(2**24 + 2) / 3, torch.tensor(5 / 3).item()]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(content["model"][f"bn.{name}"], SECOND[f"bn.{name}"])
    assert {k: v.dtype for k, v in content["model"].items()} == {
        k: v.dtype for k, v in FIRST.items()
    }
    assert content["categories"] == CAT_AND_DOG
    assert content["args"]["model"] == "retinanet_resnet18_fpn"
    assert content["averaged"] == [str(path) for path in paths]
    assert capsys.readouterr().out == f"{output}: the mean of 3 checkpoints\n"


def test_the_mean_is_of_the_ema_where_there_is_one(tmp_path: Path) -> None:
    ema = {name: value * 3 for name, value in SECOND.items()}
    paths = [write(tmp_path / "a.pth", FIRST), write(tmp_path / "b.pth", SECOND, ema=ema)]
    model = average.average(paths)["model"]
    assert model["head.weight"].tolist() == [2**23 + 2, 3.5]  # 2**23 + 1.5, rounded
    assert model["bn.running_mean"].tolist() == [33.0]


OTHER_ARGS = {"model": "retinanet_resnet34_fpn", "anchor_sizes": None, "anchor_ratios": None}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "b.pth is not there, or is no file"),
        (lambda p: sidecar(p).unlink(), "b.pth has no b.pth.sha256 beside it"),
        (flip_a_bit, "b.pth: damaged, it does not match b.pth.sha256"),
        (lambda p: write(p, SECOND, args=None), "b.pth is no checkpoint of train.py"),
        (lambda p: write(p, SECOND, categories=None), "b.pth is no checkpoint of train.py"),
        (
            lambda p: write(p, SECOND, categories=make_label_map("dog", "cat")),
            "b.pth and .*a.pth have no mean: the label map differ",
        ),
        (lambda p: write(p, SECOND, args=OTHER_ARGS), "a.pth have no mean: --model differ"),
        (
            lambda p: write(p, SECOND | {"head.weight": torch.ones(3)}),
            "a.pth have no mean: head.weight differ",
        ),
        (lambda p: write(p, SECOND | {"new": torch.ones(1)}), "a.pth have no mean: new differ"),
        (lambda p: write(p, SECOND | {"head.weight": torch.ones(2) / 0}), "b.pth: .* not finite"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_written(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    paths = [write(tmp_path / "a.pth", FIRST), write(tmp_path / "b.pth", SECOND)]
    damage(paths[1])
    output = tmp_path / "averaged.pth"
    with pytest.raises(UserError, match=message) as raised:
        average.main([*map(str, paths), "--output", str(output)])
    assert "\n" not in str(raised.value)
    assert not output.exists()


@pytest.mark.parametrize("name", ["a.pth", "model_26.pth", "checkpoint.pth", "best.pth"])
def test_neither_a_file_nor_a_run_is_overwritten(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.pth", FIRST)
    before = sorted(tmp_path.iterdir()), path.read_bytes()
    with pytest.raises(UserError, match=rf"--output .*{name}: .* choose another"):
        average.main([str(path), "--output", str(tmp_path / name)])
    assert (sorted(tmp_path.iterdir()), path.read_bytes()) == before


def test_an_average_of_a_run_is_evaluated_predicts_and_is_not_resumed(
    start: Callable[..., None],
    error_of: Callable[..., str],
    tiny_shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start("--epochs", "2", "--eval-every", "0", "--batch-size", "5")
    run, output = tmp_path / "run", tmp_path / "averaged.pth"
    average.main([*(str(run / f"model_{n}.pth") for n in (0, 1)), "--output", str(output)])
    weights = [torch.load(run / f"model_{n}.pth", weights_only=True)["model"] for n in (0, 1)]
    model, _ = load_detector(str(output))
    name = "head.classification_head.cls_logits.weight"
    assert not torch.equal(weights[0][name], weights[1][name])
    mean = (weights[0][name].double() + weights[1][name].double()) / 2
    assert torch.equal(model.state_dict()[name], mean.float())
    capsys.readouterr()
    start("--test-only", "--resume", str(output), "--output-dir", str(tmp_path / "tested"))
    printed = capsys.readouterr().out
    assert f"evaluating {output}\n" in printed and "Average Precision" in printed
    assert (tmp_path / "tested" / "eval" / "test" / "results.json").is_file()
    images = str(tiny_shapes / "val2017")
    to = str(tmp_path / "predictions")
    flags = ["--workers", "0", "--device", "cpu", "--output-dir", to]
    assert predict.main(["--checkpoint", str(output), images, *flags]) == 0
    message = error_of("--resume", str(output), "--output-dir", str(tmp_path / "other"))
    assert "no checkpoint of a run, it lacks optimizer" in message and "--weights" in message


@pytest.mark.parametrize("names", [["a.pth"], ["a.pth", "b.pth", "a.pth"], ["a.pth", "./a.pth"]])
def test_fewer_than_two_checkpoints_have_no_mean(tmp_path: Path, names: list[str]) -> None:
    for name in ("a.pth", "b.pth"):
        write(tmp_path / name, FIRST)
    with pytest.raises(UserError, match="give two checkpoints or more, each once"):
        average.average([tmp_path / name for name in names])
