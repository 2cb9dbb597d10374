"""RetinaNet's box subnet, computed only where its output decides the loss.

The box loss reads the box subnet at foreground anchors, which lie in one cell of a hundred or so; a
3 x 3 convolution reaches one cell further, so the five of the subnet reach five. All other cells
enter neither the loss nor a gradient: leaving them out is exact. At 800 x 1216 px with 7 boxes per
image that is 97 % of the subnet's work and a fifth of the whole training step's.

The cells that count, of all levels and images, are one list in order of their distance from
foreground. Each convolution reads a beginning of the list and writes a shorter one, as a matrix
product over gathered neighbours (what im2col does). How many there are is known on the device: on
CUDA the host waits for that.

Source of the subnet: Focal Loss for Dense Object Detection (arXiv 1708.02002), section 4, and
torchvision's RetinaNetRegressionHead, whose modules and parameters these are.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.models.detection.retinanet import RetinaNetRegressionHead
from torchvision.ops.misc import Conv2dNormActivation

# The largest share of cells to gather: beyond about 0.9 the head itself is faster (on a CPU).
MAX_SHARE = 0.8


def convolutions(head: nn.Module) -> list[nn.Conv2d] | None:
    """Return the convolutions of a box subnet of 3 x 3 convolutions with ReLU between them.

    None for any other, such as v2's, whose group normalisation takes its statistics from all cells,
    and for one with hooks, which would not be called.
    """
    modules = list(head.modules())
    layers = [module for module in modules if type(module) is nn.Conv2d]
    block = [Conv2dNormActivation, nn.Conv2d, nn.ReLU]
    kinds = [RetinaNetRegressionHead, nn.Sequential, *block * (len(layers) - 1), nn.Conv2d]
    is_plain = (
        [type(module) for module in modules] == kinds
        and not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        and all(
            (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
            == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
            for conv in layers
        )
    )
    return layers if is_plain else None


@functools.lru_cache(maxsize=32)
def neighbours(feature_sizes: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Return the numbers of the 3 x 3 cells around each cell of a pyramid: [C, 9], row by row.

    Cells count from 1, level by level and row by row; 0 stands for what is outside of a level.
    """
    tables, start = [], 1
    for height, width in feature_sizes:
        cells = F.pad(torch.arange(start, start + height * width).view(height, width), (1, 1, 1, 1))
        tables.append(cells.unfold(0, 3, 1).unfold(1, 3, 1).reshape(-1, 9))
        start += height * width
    return torch.cat(tables).to(device)


class _Convolution(torch.autograd.Function):
    """A 3 x 3 convolution of the first `length` cells of a list; x is [M, C], the result [L, K]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, table: Tensor, length: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight, table)
        ctx.length = length
        return torch.addmm(
            bias, _gather(x, table[:length]), weight.permute(2, 3, 1, 0).flatten(0, 2)
        )

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Return the gradients of x, weight and bias."""
        x, weight, table = ctx.saved_tensors
        # Gathered again: keeping it would take nine times the memory of x.
        of_weight = _gather(x, table[: ctx.length]).t() @ grad  # [9 * C, K]
        of_weight = of_weight.view(3, 3, *weight.shape[1::-1]).permute(3, 2, 0, 1)
        # A cell is read by its neighbours, each from the opposite side.
        readers = table[: len(x)].flip(1)
        readers = readers.masked_fill(readers > ctx.length, 0)
        of_x = _gather(grad, readers) @ weight.permute(2, 3, 0, 1).flatten(0, 2)
        return of_x, of_weight, grad.sum(0), None, None


def _gather(x: Tensor, table: Tensor) -> Tensor:
    # Row i of x has the number i + 1; the number 0 gives zeros.
    return F.pad(x, (0, 0, 1, 0))[table].flatten(1)


def sparse_codes(head: nn.Module, features: list[Tensor], foreground: Tensor) -> Tensor | None:
    """Return the box codes of `head`, [N, A, 4], for cells with foreground; NaN in all others.

    So a loss that reads codes which were not computed is NaN, and not silently wrong.

    None if the sparse path does not apply: the head is not made of plain convolutions, or nearly
    all cells would be computed. Then call the head itself.

    Args:
        head: torchvision's RetinaNetRegressionHead.
        features: of each level [N, C, H, W].
        foreground: bool [N, A], anchors level by level, row by row, cell by cell.
    """
    layers = convolutions(head)
    if layers is None:
        return None
    sizes = tuple(tuple(feature.shape[-2:]) for feature in features)
    around = neighbours(sizes, foreground.device)  # [C, 9]
    reach, shape = len(layers), (len(foreground), len(around))

    # Chebyshev distance to the nearest foreground cell; column 0 is the outside of the levels.
    distance = around.new_full((shape[0], shape[1] + 1), reach + 1, dtype=torch.int8)
    distance[:, 1:].masked_fill_(foreground.view(*shape, -1).any(2), 0)
    for _ in range(reach):
        nearest = distance[:, around].amin(2)  # [N, C]
        distance[:, 1:] = torch.minimum(distance[:, 1:], nearest + 1)
    image, cell = (distance[:, 1:] <= reach).nonzero(as_tuple=True)
    if len(image) > MAX_SHARE * shape[0] * shape[1]:
        return None
    distances, order = distance[image, cell + 1].sort(stable=True)
    image, cell = image[order], cell[order]
    within = torch.arange(reach, dtype=distances.dtype, device=distances.device)
    lengths = torch.searchsorted(distances, within, right=True).tolist()  # at most 0, 1, … away

    number = around.new_zeros(shape[0], shape[1] + 1)
    number[image, cell + 1] = torch.arange(1, len(cell) + 1, device=cell.device)
    table = number[image.unsqueeze(1), around[cell]]  # [M, 9]
    pyramid = torch.cat([feature.permute(0, 2, 3, 1).flatten(1, 2) for feature in features], 1)
    x = pyramid[image, cell]  # [M, C]
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    for layer, length in zip(layers, reversed(lengths), strict=True):
        assert layer.bias is not None
        x = _Convolution.apply(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype), table, length)
        x = x if layer is layers[-1] else x.relu()
    cells = (image[: len(x)], cell[: len(x)])
    codes = x.new_full((*shape, x.shape[1]), math.nan).index_put(cells, x)
    return codes.view(shape[0], -1, 4)
