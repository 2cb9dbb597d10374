"""Options of recipes that no other file proves: pytest tests/test_options.py.

Elsewhere: averaged weights and accumulation in test_engine.py, milestones and warm-up in
test_train.py, which layers are frozen in test_model.py, multiscale and lsj in test_presets.py.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, LABEL_MAP, make_batches, make_state, weights_of
from torch import nn
from torchvision.ops._utils import split_normalization_params

import engine
import train as train_script
from models.build import build_model
from runtime.optimization import build_optimizer, lr_factor
from utils import UserError

Train = Callable[..., Any]


@pytest.mark.parametrize("epochs, steps_per_epoch", [(3, 7), (26, 1), (1, 50)])
def test_the_cosine_is_torchs_with_every_step(epochs: int, steps_per_epoch: int) -> None:
    total = epochs * steps_per_epoch
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    factor = functools.partial(
        lr_factor,
        steps_per_epoch,
        epochs=epochs,
        lr_scheduler="cosineannealinglr",
        warmup_steps=0,
    )
    for step in range(total + 1):
        assert 0.01 * factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        torchs.step()
    assert factor(total) == pytest.approx(0, abs=1e-12) == factor(total + 5)


def test_the_cosine_starts_under_the_same_warmup() -> None:
    factor = functools.partial(
        lr_factor, 100, epochs=10, lr_scheduler="cosineannealinglr", warmup_steps=50
    )
    assert factor(0) == pytest.approx(1e-3)
    assert factor(25) == pytest.approx(0.5005 * 0.5 * (1 + math.cos(math.pi * 25 / 1000)))
    assert factor(50) == pytest.approx(0.5 * (1 + math.cos(math.pi * 50 / 1000)))


@pytest.mark.parametrize("largest", [0.01, 1e6])
def test_clipping_bounds_the_norm_of_all_gradients_together(tmp_path: Path, largest: float) -> None:
    state = make_state(tmp_path, lr=1.0)
    for group in state.optimizer.param_groups:
        group["momentum"] = group["weight_decay"] = 0.0  # then a step is the gradient
    before = weights_of(state.model)
    engine.train_one_epoch(
        state.model,
        state,
        make_batches(1, size=1),
        CPU,
        seed=0,
        batches_per_step=1,
        batch_weight=lambda position: 1.0,
        after_step=lambda line, stop: stop,
        clip_grad_norm=largest,
    )
    after = weights_of(state.model)
    norm = math.sqrt(sum(float((before[k] - after[k]).square().sum()) for k in before))
    if largest < 1:
        assert norm == pytest.approx(largest, rel=1e-3)
    else:
        assert 0.05 < norm < largest  # the gradient as it was


def test_frozen_weights_stay_to_the_bit_and_others_change(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    before = {key: value.clone() for key, value in state.model.state_dict().items()}
    engine.train_one_epoch(
        state.model,
        state,
        make_batches(2, size=1),
        CPU,
        seed=0,
        batches_per_step=1,
        batch_weight=lambda position: 1.0,
        after_step=lambda line, stop: stop,
    )
    moved = {k for k, v in state.model.state_dict().items() if not torch.equal(v, before[k])}
    body = "backbone.body."
    assert {key.removeprefix(body).split(".")[0] for key in moved if key.startswith(body)} == {
        "layer2",
        "layer3",
        "layer4",
    }
    assert not any(".bn" in key for key in moved)
    trained = {k for k, p in state.model.named_parameters() if p.requires_grad}
    assert moved <= trained and len(moved) > 0.9 * len(trained)


@pytest.mark.parametrize("name", ["retinanet_resnet18_fpn", "retinanet_resnet50_fpn_v2"])
def test_normalisation_layers_have_a_decay_of_their_own(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, LABEL_MAP)
    optimizer = build_optimizer(
        model, 1e-4, opt="adamw", momentum=0.9, wd=0.05, norm_weight_decay=0.0
    )
    norms, others = split_normalization_params(model)
    found = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    for decay, expected in ((0.0, norms), (0.05, others)):
        assert [id(p) for p in found[decay]] == [id(p) for p in expected]
    groups = 4 * 2 * 2 if name.endswith("v2") else 0  # weight and bias in the heads
    assert len(norms) == groups + 2 * sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_frozen_normalisation_leaves_one_group(tmp_path: Path) -> None:
    model = make_state(tmp_path).model
    optimizer = build_optimizer(
        model, 1e-4, opt="adamw", momentum=0.9, wd=0.05, norm_weight_decay=0.0
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05]


@pytest.mark.slow
@pytest.mark.parametrize("processes, batch, accumulated", [(1, 4, 4), (3, 1, 2), (2, 5, 1)])
def test_scale_lr_is_linear_in_the_images_of_a_step(
    train: Train, tmp_path: Path, processes: int, batch: int, accumulated: int
) -> None:
    train(
        "--output-dir",
        tmp_path / "run",
        *f"--scale-lr --lr 1e-3 --batch-size {batch} --accumulate-steps {accumulated}".split(),
        *"--max-steps 1 --eval-every 0 --warmup-steps 0".split(),
        processes=processes,
    )
    images = processes * batch * accumulated
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert record["global_batch"] == images
    assert record["effective_lr"] == pytest.approx(1e-3 * images / 16)
    saved = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert saved["lr_scheduler"]["base_lrs"] == [pytest.approx(1e-3 * images / 16)]


def test_sync_bn_is_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in (
        ["--sync-bn"],
        ["--sync-bn", "--device", "cuda"],
        ["--sync-bn", "--device", "cpu"],
    ):
        args = train_script.parse_args([*flags, "--dataset", "shapes"])
        for has_cuda in (False, True):
            monkeypatch.setattr(torch.cuda, "is_available", lambda has=has_cuda: has)
            if has_cuda and args.device != "cpu":
                train_script.check_flags(args)
                continue
            with pytest.raises(UserError, match="--sync-bn works on CUDA only|no CUDA device here"):
                train_script.check_flags(args)
    model = build_model("retinanet_resnet18_fpn", LABEL_MAP, sync_bn=True)
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(layers) == 20 and all(isinstance(m, nn.SyncBatchNorm) for m in layers)
