"""Folded normalisation computes the same: pytest tests/test_folding.py."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.profiler import ProfilerActivity, profile
from torchvision import models
from torchvision.models.detection.backbone_utils import (
    mobilenet_backbone,
    resnet_fpn_backbone,
)
from torchvision.ops import FrozenBatchNorm2d

from models.folding import FoldedConv2d, FoldedFrozenBatchNorm2d, fold_frozen_batch_norm

BACKBONES: dict[str, Callable[[], nn.Module]] = {
    **{
        name: lambda name=name: resnet_fpn_backbone(  # type: ignore[misc]
            backbone_name=name, weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
        )
        for name in ("resnet18", "resnet50", "resnext50_32x4d")
    },
    "mobilenet_v3_large": lambda: mobilenet_backbone(
        backbone_name="mobilenet_v3_large",
        weights=None,
        fpn=True,
        norm_layer=FrozenBatchNorm2d,
        trainable_layers=3,
    ),
}


def both(name: str) -> tuple[nn.Module, nn.Module]:
    """The plain backbone, with statistics as after some training, and the folded one."""
    torch.manual_seed(0)
    plain = BACKBONES[name]()
    for key, buffer in plain.named_buffers():
        if key.endswith(("weight", "running_var")):
            buffer.uniform_(0.5, 1.5)
        else:
            buffer.normal_(0, 0.1)
    folded = copy.deepcopy(plain)
    fold_frozen_batch_norm(folded)
    return plain, folded


def grads(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = torch.stack([y.square().mean() for y in model(x).values()]).sum()
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_frozen_normalisation_is_folded_and_training_is_the_same(name: str) -> None:
    plain, folded = both(name)
    kinds = [type(module) for module in folded.modules()]
    assert FrozenBatchNorm2d not in kinds
    assert kinds.count(FoldedConv2d) == kinds.count(FoldedFrozenBatchNorm2d) > 10
    # In double precision: in single, rounding turns a ReLU over here and there.
    x = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    loss, expected = grads(plain.double().train(), x)
    found_loss, actual = grads(folded.double().train(), x)
    torch.testing.assert_close(found_loss, loss, rtol=1e-12, atol=0)
    assert list(actual) == list(expected)
    for key, value in expected.items():
        # Relative to the largest of the tensor: single gradients are sums that nearly cancel.
        assert (actual[key] - value).abs().max() <= 1e-9 * value.abs().max(), key


@pytest.mark.parametrize("name", BACKBONES)
def test_inference_and_state_dict_are_the_same_to_the_bit(name: str) -> None:
    plain, folded = both(name)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, actual = plain.eval()(x), folded.eval()(x)
    assert all(actual[level].equal(expected[level]) for level in expected)
    assert list(folded.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(folded.state_dict())
    folded.load_state_dict(plain.state_dict())


def test_a_copy_has_its_own_statistics() -> None:
    _, folded = both("resnet18")
    for copied in (copy.deepcopy(folded), AveragedModel(folded).module):
        convs = [module for module in copied.modules() if isinstance(module, FoldedConv2d)]
        norms = {id(m) for m in copied.modules() if isinstance(m, FoldedFrozenBatchNorm2d)}
        assert {id(conv.norm[0]) for conv in convs} == norms


def test_under_autocast_activations_stay_half_as_wide() -> None:
    plain, folded = both("resnet18")
    seen: dict[str, set[torch.dtype]] = {"plain": set(), "folded": set()}

    @contextmanager
    def watched(model: nn.Module, into: set[torch.dtype]) -> Iterator[None]:
        hooks = [
            module.register_forward_hook(lambda _, __, out: into.add(out.dtype))
            for module in model.modules()
            if isinstance(module, nn.ReLU)
        ]
        yield
        for hook in hooks:
            hook.remove()

    for name, model in (("plain", plain), ("folded", folded)):
        with watched(model, seen[name]), torch.autocast("cpu", torch.bfloat16):
            model.train()(torch.randn(1, 3, 64, 64))
    assert seen == {"plain": {torch.float32}, "folded": {torch.bfloat16}}


def test_other_layer_orders_are_not_folded() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1, bias=False)
            self.norm = FrozenBatchNorm2d(4)

    others = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), FrozenBatchNorm2d(4)
    )
    for model in (Parallel(), others, models.resnet18(weights=None)):
        before = [type(module) for module in model.modules()]
        fold_frozen_batch_norm(model)
        assert [type(module) for module in model.modules()] == before


def test_folded_weights_are_computed_once_and_after_each_change() -> None:
    plain, folded = both("resnet18")
    x = torch.randn(1, 3, 64, 96)

    def assert_equal(change: str) -> None:
        loss, expected = grads(plain.train(), x)
        found_loss, actual = grads(folded.train(), x)
        torch.testing.assert_close(found_loss, loss, rtol=1e-4, atol=0, msg=change)
        assert list(actual) == list(expected), change

    # Losses of the validation set are computed in training mode before the first training step.
    with torch.inference_mode():
        folded.train()(x)
    assert_equal("none")
    for change in ("buffer in place", "state dict", "another dtype", "frozen weight", "unfrozen"):
        for model in (plain, folded):
            conv, norm = model.body.conv1, model.body.bn1  # type: ignore[union-attr]
            with torch.no_grad():
                if change == "buffer in place":
                    norm.running_var *= 2
                elif change == "state dict":
                    state = {k: v * 1.1 for k, v in model.state_dict().items()}
                    model.load_state_dict(state)
                elif change == "another dtype":
                    model.double().float()
                elif change == "frozen weight":
                    conv.weight *= 3
            if change == "unfrozen":
                conv.weight.requires_grad_(True)
        assert_equal(change)


def test_a_step_folds_only_the_weights_that_train() -> None:
    _, folded = both("resnet50")
    folded.train()
    x = torch.randn(1, 3, 64, 64)

    def count(model: nn.Module) -> tuple[int, int]:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            model(x)
        counts = {event.key: event.count for event in profiler.key_averages()}
        return counts.get("aten::rsqrt", 0), counts.get("aten::mul", 0)

    convs = [m for m in folded.modules() if isinstance(m, FoldedConv2d)]
    trained = sum(conv.weight.requires_grad for conv in convs)
    assert count(folded)[0] == len(convs)  # the first step
    assert count(folded) == (0, trained)
