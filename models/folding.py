"""Frozen batch normalisation as part of the convolution before it, while a model trains.

A frozen normalisation is a scale and a shift per channel. torchvision's `FrozenBatchNorm2d` applies
them to the activations, which under autocast also makes these fp32 again; here the scale goes into
the convolution's weights and the shift into its bias, so that the largest tensors of a step are
written once. Parameters, buffers and state dict stay the same, and so does inference, to the bit;
in training the results are equal up to rounding. In inference the convolution's output is scaled
and shifted where it lies, without a new tensor, by numbers that are computed once.

With few images per GPU the host decides how long a step takes, so its work is kept small. What does
not change while a layer is frozen is computed once, in the precision of the convolution: scale and
shift of every layer, and the folded weights of layers whose own weights are frozen too. The trained
weights of a stage, such as `layer3`, are folded and cast together: one node of autograd's graph and
one kernel per weight, instead of two nodes and two kernels.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

# What calls a normalisation right after the convolution that stands before it in its children.
_IN_ORDER = (nn.Sequential, IntermediateLayerGetter, BasicBlock, Bottleneck)
# Scale [C', 1, 1, 1] and shift [C'] of a normalisation; the folded weights of a frozen convolution.
Constants = tuple[Tensor, Tensor, Tensor | None]


class _Fold(torch.autograd.Function):
    """Many weights times their scales, in another type: products in fp32, rounded once."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, scales: list[Tensor], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.scales = scales
        return tuple(
            torch.mul(weight, scale, out=torch.empty_like(weight, dtype=dtype))
            for weight, scale in zip(weights, scales, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        return None, None, *(g * scale for g, scale in zip(grads, ctx.scales, strict=True))


class FoldedConv2d(nn.Conv2d):
    """A convolution that applies its frozen normalisation as well while it trains."""

    norm: tuple[FrozenBatchNorm2d]  # in a tuple, as its buffers already have a place in the model
    # Class attributes until the first training step, for an nn.Conv2d becomes this class.
    constants: Constants
    sources: tuple[Tensor, ...] = ()
    versions: tuple[Any, ...] | None = None
    folded: tuple[Tensor, Tensor] | None = None  # weights and bias of the next forward pass

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name for it
        """Map `[N, C, H, W]` to `[N, C', H', W']`, normalised in training."""
        if not self.training:
            return super().forward(input)
        if self.folded is None:  # compiled, or not part of a stage
            weight, shift = self._fold()
        else:
            (weight, shift), self.folded = self.folded, None
        return self._conv_forward(input, weight, shift)

    def _fold(self) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            scale, shift, weight = _constants(self, self.weight.dtype)
        else:
            scale, shift, weight = self.cached_constants(_precision(self.weight))
        return self.weight * scale if weight is None else weight, shift

    def cached_constants(self, dtype: torch.dtype) -> Constants:
        """Return `_constants`, computed again only after one of its sources changed."""
        sources = (*self.norm[0]._buffers.values(), self.weight)
        # A trained weight changes in every step, and only the frozen ones are in the result.
        versions = (dtype, *[s._version for s in sources[: 5 - self.weight.requires_grad]])
        is_same = versions == self.versions and all(map(operator.is_, sources, self.sources))
        if not is_same:
            # Tensors made in inference mode could not be used to train.
            with torch.inference_mode(False), torch.no_grad():
                self.constants = _constants(self, dtype)
            self.versions, self.sources = versions, sources
        return self.constants


def _precision(x: Tensor) -> torch.dtype:
    """Return the type in which a convolution with the weights `x` computes."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _constants(conv: FoldedConv2d, dtype: torch.dtype) -> Constants:
    (norm,) = conv.norm
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = torch.addcmul(norm.bias, norm.running_mean, scale, value=-1).to(dtype)
    scale = scale.view(-1, 1, 1, 1)
    return scale, shift, None if conv.weight.requires_grad else (conv.weight * scale).to(dtype)


def _fold_stage(stage: Any, inputs: Any) -> None:
    """Fold the weights of a stage before its forward pass."""
    if not stage.training or torch.compiler.is_compiling():
        return
    convs: list[FoldedConv2d] = stage.folded_convs
    dtype = _precision(convs[0].weight)
    constants = {conv: conv.cached_constants(dtype) for conv in convs}
    trained = [conv for conv, (_, _, weight) in constants.items() if weight is None]
    scales = [constants[conv][0] for conv in trained]
    folded = _Fold.apply(dtype, scales, *[conv.weight for conv in trained])
    weights = dict(zip(trained, folded, strict=True))
    for conv, (_, shift, weight) in constants.items():
        conv.folded = (weights[conv] if weight is None else weight), shift


class FoldedFrozenBatchNorm2d(FrozenBatchNorm2d):
    """A frozen normalisation that a `FoldedConv2d` does in training."""

    # Class attributes until the first pass in inference.
    constants: tuple[Tensor, Tensor]
    sources: tuple[Tensor, ...] = ()
    versions: tuple[float, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[N, C, H, W]` for inference, in place; in training it comes normalised."""
        if self.training:
            return x
        # Tensors made in inference mode do not count their versions.
        if torch.compiler.is_compiling() or self.weight.is_inference():
            return super().forward(x)
        scale, shift = self._scale_and_shift()
        # Under autocast the scale makes it fp32, as in torchvision.
        scaled = x.mul_(scale) if x.dtype == scale.dtype else x * scale
        return scaled.add_(shift)

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return both as `[C, 1, 1]`, to the bit as torchvision computes them in every pass."""
        sources = (self.weight, self.bias, self.running_mean, self.running_var)
        versions = (self.eps, *(source._version for source in sources))
        is_same = versions == self.versions and all(map(operator.is_, sources, self.sources))
        if not is_same:
            with torch.inference_mode(False), torch.no_grad():
                scale = self.weight * (self.running_var + self.eps).rsqrt()
                shift = self.bias - self.running_mean * scale
                self.constants = scale.view(-1, 1, 1), shift.view(-1, 1, 1)
            self.versions, self.sources = versions, sources
        return self.constants


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
    for body in model.modules():
        for stage in body.children() if isinstance(body, IntermediateLayerGetter) else ():
            convs = [module for module in stage.modules() if isinstance(module, FoldedConv2d)]
            if convs:
                vars(stage)["folded_convs"] = convs
                stage.register_forward_pre_hook(_fold_stage)
