"""Frozen batch normalisation as part of the convolution before it, while a model trains.

A frozen normalisation is a scale and a shift per channel. torchvision's `FrozenBatchNorm2d` applies
them to the activations, which under autocast also makes these fp32 again; here the scale goes into
the convolution's weights and the shift into its bias, so that the largest tensors of a step are
written once. Parameters, buffers and state dict stay the same, and so does inference, to the bit;
in training the results are equal up to rounding.

What does not change while a layer is frozen is computed once: scale and shift of every layer, and
the folded weights of layers whose own weights are frozen too. Else a fifth of the backbone's kernel
launches would compute the same numbers again in every step.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

# What calls a normalisation right after the convolution that stands before it in its children.
_IN_ORDER = (nn.Sequential, IntermediateLayerGetter, BasicBlock, Bottleneck)
# Scale [C', 1, 1, 1] and shift [C'] of a normalisation; the folded weights of a frozen convolution.
Constants = tuple[Tensor, Tensor, Tensor | None]


class FoldedConv2d(nn.Conv2d):
    """A convolution that applies its frozen normalisation as well while it trains."""

    norm: tuple[FrozenBatchNorm2d]  # in a tuple, as its buffers already have a place in the model
    # Class attributes until the first training step, for an nn.Conv2d becomes this class.
    constants: Constants
    sources: tuple[Tensor, ...] = ()
    versions: list[int] | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name for it
        """Map `[N, C, H, W]` to `[N, C', H', W']`, normalised in training."""
        if not self.training:
            return super().forward(input)
        constants = _constants(self) if torch.compiler.is_compiling() else self._cached_constants()
        scale, shift, weight = constants
        return self._conv_forward(input, self.weight * scale if weight is None else weight, shift)

    def _cached_constants(self) -> Constants:
        """Return `_constants`, computed again only after one of its sources changed."""
        (norm,) = self.norm
        sources = (norm.weight, norm.bias, norm.running_mean, norm.running_var, self.weight)
        # A trained weight changes in every step, and only the frozen ones are in the result.
        versions = [source._version for source in sources[: 5 - self.weight.requires_grad]]
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
    shift = torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)
    scale = scale.view(-1, 1, 1, 1)
    return scale, shift, None if conv.weight.requires_grad else conv.weight * scale


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
