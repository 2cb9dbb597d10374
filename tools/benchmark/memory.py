"""Memory of a training step of RetinaNet by batch size and precision, calculated, not measured.

The step of the recipe (frozen batch normalisation, SGD with momentum, the box head computed
everywhere, as on a GPU) runs on fake tensors, which have sizes and no content. The figure is the
most that its tensors take together at any moment: weights, momentum, gradients, what the backward
pass needs, and what operators return on the way. Not in it: the CUDA context, workspaces of cuDNN,
what the allocator rounds up and leaves unused, and the gradient buckets of several processes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from models.build import build_model
from models.loss_terms import total_loss
from models.precision import autocast
from runtime.flags import positive
from runtime.optimization import build_optimizer
from tools.benchmark.measuring import MB, Row

NUM_LABELS = 91  # COCO's, background included
BOXES = 7  # of an image, as COCO has on average
# Padded (H, W), pixels: a usual image of COCO, and a wide and a tall one in one batch.
SIZES = ((800, 1216), (1344, 1344))
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def add_flags(add: Callable[..., Any]) -> None:
    """Declare the flags of `run`."""
    add("--model", default="retinanet_resnet50_fpn", help="or retinanet_RESNET_fpn")
    sizes, batches = positive(int), [1, 2, 4, 8, 16]
    add("--batch-sizes", type=sizes, nargs="+", default=batches, help="images per step")


def run(model: str, batch_sizes: Sequence[int]) -> list[Row]:
    """Calculate; the flags are those of `add_flags`."""
    return [
        Row(
            f"batch {batch}, {dtype}, {size[0]} x {size[1]} px",
            "MB",
            [step_memory(model, batch, size, DTYPES[dtype]) / MB],
        )
        for size in SIZES
        for dtype in DTYPES
        for batch in batch_sizes
    ]


def step_memory(
    name: str, batch: int, size: tuple[int, int], dtype: torch.dtype | None, is_fake: bool = True
) -> int:
    """Return the peak of the tensors of a training step, bytes; `is_fake` computes nothing.

    Args:
        size: (H, W) of all images, pixels.
        dtype: of autocast; None is fp32.
    """
    label_map = [{"name": str(label), "label": label} for label in range(1, NUM_LABELS)]
    with FakeTensorMode() if is_fake else contextlib.nullcontext():
        model = build_model(
            name,
            label_map,
            resize_in_training=False,
            load=False,
            weights_backbone="random, but frozen as if trained",
            box_subnet="dense",
        ).train()
        optimizer = build_optimizer(
            model, 0.01, opt="sgd", momentum=0.9, wd=1e-4, norm_weight_decay=None
        )
        with LiveTensors() as live:
            momenta = [value for state in optimizer.state.values() for value in state.values()]
            for tensor in (*model.parameters(), *model.buffers(), *momenta):
                live.add(tensor)
            images = [torch.zeros(3, *size) for _ in range(batch)]
            target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]] * BOXES)}
            target["labels"] = torch.ones(BOXES, dtype=torch.int64)
            with autocast(torch.device("cpu"), dtype):
                loss = total_loss(model(images, [target] * batch))
            loss.backward()
        return live.peak


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that operators return, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor once, until nothing uses it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.add, result)
        return result
