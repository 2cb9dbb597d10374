"""Frozen batch normalisation as part of the convolution before it.

A frozen normalisation is a scale and a shift per channel. torchvision's `FrozenBatchNorm2d` applies
them to the activations, which under autocast also makes these fp32 again. While a model trains, the
scale goes into the convolution's weights and the shift into its bias, so that the largest tensors
of a step are written once; results are equal up to rounding. In inference the convolution's output
is scaled and shifted where it lies, without a new tensor: equal to torchvision to the bit.
Parameters, buffers and state dict stay the same.

What does not change while a layer is frozen is computed once: scale and shift of every layer, and
the folded weights of layers whose own weights are frozen too. Else a fifth of the backbone's kernel
launches would compute the same numbers again in every step, and in inference four fifths of those
of normalisation.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

# What calls a normalisation right after the convolution that stands before it in its children.
_IN_ORDER = (nn.Sequential, IntermediateLayerGetter, BasicBlock, Bottleneck)


class Constants(NamedTuple):
    """What a frozen normalisation makes of a convolution with C output channels.

    Attributes:
        scale: [C, 1, 1, 1], of the weights in training and of the output in inference.
        shift: [C, 1, 1], of the output in inference, to the bit as torchvision computes it.
        bias: [C], the shift in training.
        weight: the folded weights, if the convolution is frozen too.
    """

    scale: Tensor
    shift: Tensor
    bias: Tensor
    weight: Tensor | None


class FoldedConv2d(nn.Conv2d):
    """A convolution that applies its frozen normalisation as well."""

    norm: tuple[FrozenBatchNorm2d]  # in a tuple, as its buffers already have a place in the model
    # Class attributes until the first pass, for an nn.Conv2d becomes this class.
    constants: Constants
    sources: tuple[Tensor, ...] = ()
    versions: list[float] | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name for it
        """Map `[N, C, H, W]` to `[N, C', H', W']`, normalised."""
        # Tensors made in inference mode do not count their versions.
        is_cached = not (torch.compiler.is_compiling() or self.norm[0].weight.is_inference())
        constants = self._cached_constants() if is_cached else _constants(self)
        scale, shift, bias, weight = constants
        if self.training:
            weight = self.weight * scale if weight is None else weight
            return self._conv_forward(input, weight, bias)
        output, scale = super().forward(input), scale.squeeze(1)
        # Under autocast the scale makes it fp32, as in torchvision.
        scaled = output.mul_(scale) if output.dtype == scale.dtype else output * scale
        return scaled.add_(shift)

    def _cached_constants(self) -> Constants:
        """Return `_constants`, computed again only after one of its sources changed."""
        (norm,) = self.norm
        sources = (norm.weight, norm.bias, norm.running_mean, norm.running_var, self.weight)
        # A trained weight changes in every step, and only the frozen ones are in the result.
        counted = sources[: 5 - self.weight.requires_grad]
        versions = [norm.eps, *(source._version for source in counted)]
        is_same = versions == self.versions and all(map(operator.is_, sources, self.sources))
        if not is_same:
            # Tensors made in inference mode could not be used to train.
            with torch.inference_mode(False), torch.no_grad():
                self.constants = _constants(self)
            self.versions, self.sources = versions, sources
        return self.constants


def _constants(conv: FoldedConv2d) -> Constants:
    (norm,) = conv.norm
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)
    shift = norm.bias - norm.running_mean * scale  # not rounded as the bias is
    scale = scale.view(-1, 1, 1, 1)
    weight = None if conv.weight.requires_grad else conv.weight * scale
    return Constants(scale, shift.view(-1, 1, 1), bias, weight)


class FoldedFrozenBatchNorm2d(FrozenBatchNorm2d):
    """A frozen normalisation that a `FoldedConv2d` does."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `[N, C, H, W]` as it comes, normalised."""
        return x


def fold_frozen_batch_norm(model: nn.Module) -> None:
    """Let the convolutions of `model` do its frozen normalisations, in place."""
    for parent in list(model.modules()):
        if not isinstance(parent, _IN_ORDER):
            continue
        children = list(parent.children())
        for conv, norm in zip(children, children[1:], strict=False):
            # By exact class: others may do more than convolve and normalise.
            if type(conv) is nn.Conv2d and type(norm) is FrozenBatchNorm2d and conv.bias is None:
                conv.__class__, norm.__class__ = FoldedConv2d, FoldedFrozenBatchNorm2d
                vars(conv)["norm"] = (norm,)
