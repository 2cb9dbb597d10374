"""Compiled is the same, for any image size: pytest -m slow tests/test_compile.py (minutes)."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import LABEL_MAP
from torch import Tensor, nn
from torch._dynamo.utils import counters

from models.build import build_model
from models.parallel import wrap

# Padded to eight different sizes, the last ones square and with the two sides swapped.
SIZES = (
    *((160, 256), (160, 224), (192, 256), (224, 192), (240, 180), (160, 160), (256, 160)),
    (256, 256),
)


def batch(height: int, width: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    target = {"boxes": torch.tensor([[4.0, 4.0, 90.0, 120.0]]), "labels": torch.tensor([1])}
    return list(torch.rand(2, 3, height, width)), [target, target]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_losses_are_equal_and_new_sizes_compile_nothing(
    dtype: torch.dtype | None,
) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    eager = build_model("retinanet_resnet18_fpn", LABEL_MAP, min_size=160, max_size=256).train()
    compiled = wrap(copy.deepcopy(eager), torch.device("cpu"), 1, compiled=True)
    eager.transform.resize_in_training = compiled.transform.resize_in_training = False
    assert list(compiled.state_dict()) == list(eager.state_dict())
    graphs, padded = [], set()
    for size in SIZES:
        images, targets = batch(*size)
        padded.add(eager.transform(images, targets)[0].tensors.shape)
        losses = []
        for model in (eager, compiled):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                losses.append(model(images, targets))
        for name, loss in losses[0].items():
            # Compiled bf16 keeps more digits between the operations that it fuses.
            torch.testing.assert_close(losses[1][name], loss, rtol=0.02 if dtype else 1e-5, atol=0)
        torch.stack(list(losses[1].values())).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(padded) == len(SIZES)
    assert all(parameter.grad is not None for parameter in compiled.parameters())
    # The backbone and the head; the backbone once more for a square, whose sides are one number.
    assert graphs[:5] == [2] * 5 and graphs[5:] == [3] * 3


def test_distributed_and_mixed_precision_compile_backbone_and_head_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Graphs are traced as always and run eagerly, which takes seconds instead of minutes.
    compile_module = nn.Module.compile

    def compile_without_inductor(module: nn.Module, dynamic: bool, options: object) -> None:
        compile_module(module, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_without_inductor)
    torch._dynamo.reset()
    counters.clear()
    frozen = {"load": False, "weights_backbone": "random, but frozen as if trained"}
    size = {"min_size": 160, "max_size": 416}
    model = build_model("retinanet_resnet18_fpn", LABEL_MAP, **frozen, **size)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = wrap(model, torch.device("cpu"), 2, compiled=True, amp_dtype=torch.bfloat16)
        for size_of_images in ((160, 256), (256, 160), (170, 320)):
            with torch.autocast("cpu", torch.bfloat16):
                losses = wrapped(*batch(*size_of_images))
            torch.stack(list(losses.values())).sum().backward()
            assert counters["stats"]["unique_graphs"] == 2, size_of_images
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
