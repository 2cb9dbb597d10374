"""docs/from_torchvision.md is true: pytest tests/test_from_torchvision.py.

Checkpoints in torchvision's form are made by a plain torchvision model and optimizer.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LABEL_MAP, ROOT, plain_retinanet, run_script
from torchvision.models import detection

import train as train_script
from models.build import build_model
from models.weights import read_weights
from runtime import checkpoint, resuming
from runtime.flags import LOG, REFUSE
from runtime.records import read_json_lines
from utils import UserError

PAGE = (ROOT / "docs" / "from_torchvision.md").read_text()
# Every flag of references/detection/train.py (pytorch/vision, 0.16 and later).
THEIRS = """
    --data-path --dataset --model --device -b --batch-size --epochs -j --workers --opt --lr
    --momentum --wd --weight-decay --norm-weight-decay --lr-scheduler --lr-step-size --lr-steps
    --lr-gamma --print-freq --output-dir --resume --start_epoch --aspect-ratio-group-factor
    --rpn-score-thresh --trainable-backbone-layers --data-augmentation --sync-bn --test-only
    --use-deterministic-algorithms --world-size --dist-url --weights --weights-backbone --amp
    --use-copypaste --backend --use-v2
""".split()
Train = Callable[..., Any]


def table() -> dict[str, str]:
    """Return, for each of their flags that the page has a row for, what it became."""
    rows: dict[str, str] = {}
    for line in PAGE.splitlines():
        if line.startswith("| `-"):
            theirs, here, _ = (cell.strip() for cell in line.strip("|").split(" | ", 2))
            rows |= dict.fromkeys(re.findall(r"`(-\S+)`", theirs), here)
    return rows


def test_the_table_has_every_flag_of_torchvision_once() -> None:
    assert sorted(table()) == sorted(THEIRS)


def test_flags_of_the_same_name_are_in_the_parser_and_no_others() -> None:
    ours = {
        flag for action in train_script.build_parser()._actions for flag in action.option_strings
    }
    for flag, here in table().items():
        assert (here == "the same") <= (flag in ours), flag
        assert (here == "none") <= (flag not in ours), flag
        assert here in ("the same", "none") or set(re.findall(r"`(--\S+)`", here)) <= ours, flag
    assert Counter(table().values())["the same"] > 20


def test_torchvisions_command_lines_mean_the_same_here() -> None:
    lines = re.findall(r"^    (?:torchrun \S+|python) train\.py ((?:.*\\\n)*.*)", PAGE, re.M)
    parse = train_script.build_parser().parse_args
    flags, *others = (parse(shlex.split(line.replace("\\\n", " "))) for line in lines)
    assert (flags.opt, flags.lr, flags.wd, flags.norm_weight_decay) == ("adamw", 1e-4, 0.05, 0)
    assert flags.sync_bn and flags.data_augmentation == "multiscale"
    assert [other.resume for other in others] == ["model_25.pth", "model_12.pth"]


def of_theirs(
    path: Path, *, opt: str = "sgd", norm_wd: float | None = None, epoch: int = 0, **flags: Any
) -> detection.RetinaNet:
    """Train a plain model for a step and save it as torchvision's scripts do, after `epoch`."""
    torch.manual_seed(5)
    plain = plain_retinanet()
    parameters: Any = list(plain.parameters())
    if norm_wd is not None:  # normalisation comes first, and all else after it
        norms = {
            p
            for module in plain.modules()
            if isinstance(module, torch.nn.BatchNorm2d)
            for p in module.parameters()
        }
        groups = ([p for p in parameters if p in norms], [p for p in parameters if p not in norms])
        parameters = [
            {"params": group, "weight_decay": decay}
            for group, decay in zip(groups, (norm_wd, 0.05), strict=True)
        ]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
    if opt == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[16, 22], gamma=0.1)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([2])}
    sum(plain([torch.rand(3, 64, 64)], [target]).values()).backward()
    optimizer.step()
    scheduler.step()
    known = {"opt": opt, "model": "retinanet_resnet18_fpn", "batch_size": 2, "amp": False}
    known |= {"dataset": "coco", "weights": None, "weights_backbone": None, "lr": 1e-4, "gpu": 0}
    content = {
        "model": plain.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": epoch,
        "args": argparse.Namespace(**known | flags),
    }
    torch.save(content, path)
    return plain


def test_a_torchvision_checkpoint_is_evaluated(tiny_shapes: Path, tmp_path: Path) -> None:
    of_theirs(tmp_path / "model_0.pth", data_path=str(tiny_shapes))
    # --min-size is not theirs to remember; data and model are.
    small = ("--min-size", "64", "--max-size", "64", "--device", "cpu", "--workers", "0")
    flags = ("--test-only", "--resume", tmp_path / "model_0.pth", "--output-dir", tmp_path / "out")
    run_script("train.py", *flags, *small)
    results = tmp_path / "out" / "eval" / "test" / "results.json"
    assert "AP" in json.loads(results.read_text())


@pytest.mark.parametrize(
    "opt, norm_wd", [pytest.param("sgd", None, marks=pytest.mark.slow), ("adamw", 0.0)]
)
def test_a_torchvision_checkpoint_is_resumed_with_weights_and_optimizer(
    train: Train, tmp_path: Path, opt: str, norm_wd: float | None
) -> None:
    plain = of_theirs(tmp_path / "model_3.pth", opt=opt, norm_wd=norm_wd, epoch=3)
    theirs = checkpoint.load(tmp_path / "model_3.pth")
    norms = () if norm_wd is None else ("--norm-weight-decay", str(norm_wd), "--wd", "0.05")
    flags = ("--epochs", "6", "--eval-every", "0", "--max-steps", "33", "--opt", opt, *norms)
    train("--resume", tmp_path / "model_3.pth", "--output-dir", tmp_path / "run", *flags)
    steps = [r["step"] for r in read_json_lines(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [33]  # after four epochs of eight
    ours = checkpoint.load(tmp_path / "run" / "checkpoint.pth")
    assert (ours["epoch"], ours["step"], ours["position"]) == (4, 33, 1)
    names = dict(plain.named_parameters())
    moved = [float((ours["model"][k] - p.detach()).abs().max()) for k, p in names.items()]
    assert 0 < max(moved) < 1e-2  # one step on from theirs, not a fresh model
    # Their averages went on, each in its own parameter: what a step adds to them is small.
    key = "momentum_buffer" if opt == "sgd" else "exp_avg_sq"
    order = [i for g in reversed(theirs["optimizer"]["param_groups"]) for i in g["params"]]
    for new, old in enumerate(order):
        before = theirs["optimizer"]["state"][old][key]
        after = ours["optimizer"]["state"][new][key]
        assert before.shape == after.shape
    if opt == "adamw":
        assert {float(s["step"]) for s in ours["optimizer"]["state"].values()} == {2.0}
        decays = [group["weight_decay"] for group in ours["optimizer"]["param_groups"]]
        assert decays == [0.05, 0.0]


def test_a_torchvision_checkpoint_of_other_settings_or_no_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model_3.pth"
    of_theirs(path, batch_size=4, amp=True)
    now = {"batch_size": 2, "seed": 0, "amp": "bf16", "lr": 0.5}
    ours = resuming.from_torchvision(checkpoint.load(path), now, 8, path)
    with pytest.raises(UserError, match="batch_size: 4 → 2; amp: fp16 → bf16; give"):
        on_resume = dict.fromkeys(now, REFUSE) | {"lr": LOG}
        resuming.check_same_run(ours["args"], now, on_resume, path, {})
    weights = checkpoint.load(path)["model"]
    with pytest.raises(UserError, match="lacks model, optimizer, epoch, args; .*--weights"):
        resuming.from_torchvision(weights, now, 8, path)
    assert resuming.from_torchvision(ours, now, 8, path) is ours


def test_a_torchvision_checkpoint_gives_weights_and_a_backbone(tmp_path: Path) -> None:
    plain = of_theirs(tmp_path / "model_0.pth")
    weights = read_weights(str(tmp_path / "model_0.pth"), "--weights")
    assert weights.settings is not None and weights.settings["opt"] == "sgd"
    built = build_model("retinanet_resnet18_fpn", LABEL_MAP, weights_backbone=weights.source)
    actual = built.backbone.body.state_dict()
    expected = plain.backbone.body.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in actual.items())


class Canary(argparse.Namespace):
    """What looks like a Namespace and runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import pathlib; pathlib.Path('CANARY').touch()",)


@pytest.mark.parametrize("where", ["args", "inside"])
def test_only_a_plain_namespace_is_loaded(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = Canary() if where == "args" else argparse.Namespace(lr=Canary())
    torch.save({"model": {}, "args": flags, "epoch": 0}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="not a file of tensors and plain types"):
        checkpoint.load(tmp_path / "evil.pth")
    with pytest.raises(UserError, match="not a file of tensors and plain types"):
        read_weights(str(tmp_path / "evil.pth"), "--weights")
    assert not (tmp_path / "CANARY").exists()
    pickle.loads(pickle.dumps(Canary()))
    assert (tmp_path / "CANARY").exists()  # it would have worked


@pytest.mark.slow
def test_our_checkpoint_loads_in_torchvision(train: Train, tmp_path: Path) -> None:
    train("--epochs", "2", "--eval-every", "0", "--output-dir", tmp_path / "run", "--opt", "sgd")
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    script = script.replace("runs/coco/checkpoint.pth", str(tmp_path / "run" / "checkpoint.pth"))
    script = script.replace("for_torchvision.pth", str(tmp_path / "theirs.pth"))
    exec(compile(script, "from_torchvision.md", "exec"), {})
    # What their script does with --resume.
    content = torch.load(tmp_path / "theirs.pth", map_location="cpu", weights_only=True)
    plain = of_theirs(tmp_path / "unused.pth")
    plain.load_state_dict(content["model"])
    trained = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)
    optimizer.load_state_dict(content["optimizer"])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[16, 22], gamma=0.1)
    scheduler.load_state_dict(content["lr_scheduler"])
    assert content["epoch"] + 1 == 2  # two epochs are done: theirs counts the last one
    buffers = [optimizer.state[p]["momentum_buffer"] for p in trained]
    assert all(b.shape == p.shape for b, p in zip(buffers, trained, strict=True))
    rates = []
    for _ in range(2, 26):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-4] * 14 + [1e-5] * 6 + [1e-6] * 4)
