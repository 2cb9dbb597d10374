"""Frozen batch normalisation as part of the convolution before it, while a model trains.

A frozen normalisation is a scale and a shift per channel. torchvision's `FrozenBatchNorm2d` applies
them to the activations, which under autocast also makes these fp32 again; here the scale goes into
the convolution's weights and the shift into its bias, so that the largest tensors of a step are
written once. Parameters, buffers and state dict stay the same, and so does inference, to the bit;
in training the results are equal up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

# What calls a normalisation right after the convolution that stands before it in its children.
_IN_ORDER = (nn.Sequential, IntermediateLayerGetter, BasicBlock, Bottleneck)


class FoldedConv2d(nn.Conv2d):
    """A convolution that applies its frozen normalisation as well while it trains."""

    norm: tuple[FrozenBatchNorm2d]  # in a tuple, as its buffers already have a place in the model

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name for it
        """Map `[N, C, H, W]` to `[N, C', H', W']`, normalised in training."""
        if not self.training:
            return super().forward(input)
        (norm,) = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)
        return self._conv_forward(input, self.weight * scale.view(-1, 1, 1, 1), shift)


class FoldedFrozenBatchNorm2d(FrozenBatchNorm2d):
    """A frozen normalisation that a `FoldedConv2d` does in training."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[N, C, H, W]` for inference; in training it comes normalised."""
        return x if self.training else super().forward(x)


def fold_frozen_batch_norm(model: nn.Module) -> None:
    """Let the convolutions of `model` do its frozen normalisations in training, in place."""
    for parent in list(model.modules()):
        if not isinstance(parent, _IN_ORDER):
            continue
        children = list(parent.children())
        for conv, norm in zip(children, children[1:], strict=False):
            # By exact class: others may do more than convolve and normalise.
            if type(conv) is nn.Conv2d and type(norm) is FrozenBatchNorm2d and conv.bias is None:
                conv.__class__, norm.__class__ = FoldedConv2d, FoldedFrozenBatchNorm2d
                vars(conv)["norm"] = (norm,)
