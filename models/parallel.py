"""The model as the training loop calls it: compiled, and distributed over processes."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models import retinanet
from models.loss_terms import total_loss
from models.precision import autocast


def wrap(
    model: nn.Module,
    device: torch.device,
    num_processes: int,
    compiled: bool,
    amp_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return what the training loop calls: `model`, compiled and distributed as asked for.

    Backbone and head are compiled in place, for any image size, so that the state dict stays as it
    is. `amp_dtype` is that of the training loop's autocast; None is fp32.
    """
    if compiled:
        if isinstance(model, retinanet.RetinaNet):  # the sparse path cannot be compiled
            model.options = dataclasses.replace(model.options, box_subnet="dense")
        for name, part in model.named_children():
            if name in ("backbone", "head"):
                # Without this option Inductor depends on the strides of each convolution's
                # gradients: it compiles again for each image size, and after eight gives up.
                part.compile(dynamic=True, options={"force_layout_optimization": True})
    if num_processes == 1:
        return model
    if compiled:
        # TorchDynamo would split graphs at DDP's buckets, which fails with sizes that vary.
        torch._dynamo.config.optimize_ddp = False
    keeps_statistics = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    # Whether buffers are synchronized in each step. Newer versions of torch warn of the old name.
    names = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {name: keeps_statistics, "gradient_as_bucket_view": True}
    wrapped = DistributedDataParallel(model, **options)
    _warm_up(wrapped, device, amp_dtype)
    return wrapped


def _warm_up(
    model: DistributedDataParallel, device: torch.device, amp_dtype: torch.dtype | None
) -> None:
    """Run two forward and backward passes that change nothing.

    DDP changes the order of its gradient buckets after its first backward pass. Sums in another
    order round differently, so a resumed process would differ from one that ran on, from three
    processes up.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.module.buffers()]
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]], device=device),
        "labels": torch.ones(1, dtype=torch.int64, device=device),
    }
    # torch.compile takes a size of 1 for a constant and equal sizes for one number, and compiles
    # again for other batches. So there are two images, of sides that differ at every level.
    image = torch.full((3, 160, 416), 0.5, device=device)
    model.train()
    for _ in range(2):  # the buckets are rebuilt when the second forward pass begins
        # In the precision of training; otherwise a compiled model is compiled twice.
        with autocast(device, amp_dtype):
            loss = total_loss(model([image, image], [target, target]))
        loss.backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
