"""Mixed precision without rounded boxes: box arithmetic and losses are fp32 for every detector.

Autocast rounds only what convolutions and linear layers compute. So boxes are exact if the anchors
and the outputs of the last layers are fp32. torchvision makes anchors in the type of the feature
maps, up to 8 px off in bf16, and keeps the rounded ones in its generator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from models import retinanet

HALF = (torch.bfloat16, torch.float16)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return the context in which a model trains or detects; None is fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class FullPrecisionP6P7(LastLevelP6P7):
    """The two coarsest levels in fp32 on a CPU, also under autocast.

    A bf16 3 x 3 convolution of stride 2 over a map one column wide gets a weight gradient from
    uninitialised memory there (torch 2.14.1 with oneDNN), sometimes NaN. P6 of a 64 px wide image
    is such a map. The two levels cost next to nothing.
    """

    def forward(
        self, p: list[Tensor], c: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """Append P6 and P7 to the feature maps `p`."""
        if p[-1].device.type != "cpu":
            return super().forward(p, c, names)
        with torch.autocast("cpu", enabled=False):
            return super().forward([*p[:-1], p[-1].float()], [*c[:-1], c[-1].float()], names)


def keep_boxes_in_fp32(model: nn.Module) -> None:
    """Keep the box arithmetic and the losses of a detector in fp32 under autocast, in place."""
    heads = ["head", "rpn.head", "roi_heads.box_predictor"]
    if isinstance(model, retinanet.RetinaNet):  # it casts by itself: one compiled graph less
        heads.remove("head")
    for name, module in model.named_modules():
        if type(module) is LastLevelP6P7:
            module.__class__ = FullPrecisionP6P7
        elif isinstance(module, (AnchorGenerator, DefaultBoxGenerator)):
            module.register_forward_pre_hook(_with_fp32_features)
        elif name in heads:
            module.register_forward_hook(_with_fp32_outputs)


def _with_fp32_features(module: nn.Module, inputs: tuple[Any, list[Tensor]]) -> tuple[Any, ...]:
    # A generator reads only shape, dtype and device of the feature maps.
    images, features = inputs
    return images, [
        f.new_empty((), dtype=torch.float32).expand(f.shape) if f.dtype in HALF else f
        for f in features
    ]


def _with_fp32_outputs(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.float() if x.dtype in HALF else x, outputs)
