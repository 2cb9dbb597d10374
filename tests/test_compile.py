"""Compiled is the same, for any image size: pytest -m slow tests/test_compile.py (minutes)."""

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from model import build_model, wrap

CLASSES = [{"id": i, "name": str(i), "label": i} for i in (1, 2, 3)]


def batch(height: int, width: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    return list(torch.rand(2, 3, height, width)), [target, target]


@pytest.mark.slow
def test_compiled_losses_are_equal_and_new_sizes_soon_compile_nothing() -> None:
    torch.manual_seed(0)
    eager = build_model("retinanet_resnet18_fpn", CLASSES, min_size=64, max_size=96).train()
    compiled = wrap(copy.deepcopy(eager), torch.device("cpu"), 1, compiled=True)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    graphs = []
    for size in ((64, 64), (64, 96), (96, 64), (70, 90), (64, 80), (90, 64)):
        images, targets = batch(*size)
        losses = []
        for model in (eager, compiled):
            torch.manual_seed(0)
            losses.append(model(images, targets))
        for name, loss in losses[0].items():
            torch.testing.assert_close(losses[1][name], loss, rtol=1e-5, atol=0)
        torch.stack(list(losses[1].values())).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert all(parameter.grad is not None for parameter in compiled.parameters())
    # A square, a wide and a high image are told apart, for backbone and head each.
    assert graphs[2:] == [graphs[2]] * 4 and graphs[2] <= 6
