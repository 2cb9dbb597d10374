"""The sparse box subnet equals torchvision's head where it counts: pytest tests/test_box_subnet.py.

The oracle is torchvision's RetinaNetRegressionHead itself, run on all cells.
"""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.retinanet import RetinaNetRegressionHead
from torchvision.ops.misc import Conv2dNormActivation

from models import box_subnet, retinanet
from models.build import build_model
from models.parallel import wrap

CLASSES = [{"id": 1, "name": "cell", "label": 1}]
ANCHORS = 3
REACH = 5


def make_head(channels: int = 6, dtype: torch.dtype = torch.float64) -> RetinaNetRegressionHead:
    torch.manual_seed(0)
    head = RetinaNetRegressionHead(channels, ANCHORS)
    for parameter in head.parameters():  # torchvision's are too small for signs of ReLU to matter
        nn.init.normal_(parameter, std=0.3)
    return head.to(dtype)


def make_features(
    sizes: list[tuple[int, int]], num_images: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(num_images, 6, *size, generator=generator, dtype=dtype).requires_grad_()
        for size in sizes
    ]


def random_foreground(
    sizes: list[tuple[int, int]], num_images: int, count: int, seed: int = 0
) -> Tensor:
    num_anchors = ANCHORS * sum(height * width for height, width in sizes)
    foreground = torch.zeros(num_images, num_anchors, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(num_images * num_anchors, (count,), generator=generator)
    foreground.view(-1)[places] = True
    return foreground


def gradients(head: nn.Module, features: list[Tensor], codes: Tensor, mask: Tensor) -> list[Tensor]:
    weight = torch.randn(codes.shape, generator=torch.Generator().manual_seed(2), dtype=codes.dtype)
    loss = (codes * weight).masked_fill(~mask.unsqueeze(2), 0).sum()
    return list(torch.autograd.grad(loss, [*head.parameters(), *features]))


@st.composite
def pyramids(draw: Callable[..., Any]) -> tuple[list[tuple[int, int]], int, int, int]:
    side = st.integers(1, 16)
    sizes = draw(st.lists(st.tuples(side, side), min_size=1, max_size=4))
    return sizes, draw(st.integers(1, 3)), draw(st.integers(0, 8)), draw(st.integers(0, 999))


@given(pyramids())
@settings(max_examples=60, deadline=None)
def test_codes_and_gradients_are_those_of_the_whole_head(
    pyramid: tuple[list[tuple[int, int]], int, int, int],
) -> None:
    sizes, num_images, count, seed = pyramid
    head, features = make_head(), make_features(sizes, num_images)
    foreground = random_foreground(sizes, num_images, count, seed)
    with mock.patch.object(box_subnet, "MAX_SHARE", 1.0):
        sparse = box_subnet.sparse_codes(head, features, foreground)
    assert sparse is not None
    dense = head(features)
    assert sparse.shape == dense.shape
    torch.testing.assert_close(sparse[foreground], dense[foreground], rtol=1e-10, atol=1e-10)
    in_cells = foreground.view(num_images, -1, ANCHORS).any(2).repeat_interleave(ANCHORS, 1)
    assert sparse[~in_cells].isnan().all()  # not computed
    for ours, theirs in zip(
        gradients(head, features, sparse, foreground),
        gradients(head, features, dense, foreground),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_only_cells_within_five_of_foreground_are_read() -> None:
    sizes, center = [(24, 24), (12, 12)], 12
    foreground = torch.zeros(1, ANCHORS * (24 * 24 + 12 * 12), dtype=torch.bool)
    foreground[0, ANCHORS * (center * 24 + center)] = True
    head, features = make_head(), make_features(sizes, 1)
    near = torch.zeros(24, 24, dtype=torch.bool)
    near[center - REACH : center + REACH + 1, center - REACH : center + REACH + 1] = True
    with torch.no_grad():
        features[0][:, :, ~near] = torch.nan
        features[1].fill_(torch.nan)
    codes = box_subnet.sparse_codes(head, features, foreground)
    assert codes is not None and codes[foreground].isfinite().all()
    *of_weights, of_first, of_second = gradients(head, features, codes, foreground)
    assert all(grad.isfinite().all() for grad in of_weights)
    reached = of_first.abs().sum((0, 1)) > 0
    assert reached.equal(near)  # no less either: the subnet does look five cells far
    assert not of_second.any()


def test_without_foreground_every_parameter_still_has_a_gradient() -> None:
    # DDP waits for one from each.
    sizes = [(8, 8), (4, 4)]
    head, features = make_head(), make_features(sizes, 2)
    foreground = random_foreground(sizes, 2, 0)
    codes = box_subnet.sparse_codes(head, features, foreground)
    assert codes is not None and codes.isnan().all()
    assert all(not grad.any() for grad in gradients(head, features, codes, foreground))


def test_derivatives_agree_with_differences() -> None:
    head, features = make_head(), make_features([(9, 9)], 1)
    foreground = random_foreground([(9, 9)], 1, 1)
    with mock.patch.object(box_subnet, "MAX_SHARE", 1.0):
        assert torch.autograd.gradcheck(
            lambda x: box_subnet.sparse_codes(head, [x], foreground)[foreground], features
        )


def test_crowded_pyramids_and_other_heads_use_the_dense_head() -> None:
    sizes = [(16, 16)]
    features = make_features(sizes, 1)
    one, many = (random_foreground(sizes, 1, count) for count in (1, 200))
    assert box_subnet.sparse_codes(make_head(), features, one) is not None
    assert box_subnet.sparse_codes(make_head(), features, many) is None

    class Other(RetinaNetRegressionHead):
        pass

    norm_layer = functools.partial(nn.GroupNorm, 2)
    strided, activated, hooked = make_head(), make_head(), make_head()
    hooked.conv[0].register_forward_hook(lambda *_: None)
    strided.bbox_reg.stride = (2, 2)
    activated.conv[1] = Conv2dNormActivation(6, 6, norm_layer=None, activation_layer=nn.SiLU)
    for head in (
        *(Other(6, ANCHORS), RetinaNetRegressionHead(6, ANCHORS, norm_layer=norm_layer)),
        *(strided, activated, hooked, nn.Identity()),
    ):
        assert box_subnet.sparse_codes(head, features, one) is None


def test_under_autocast_it_computes_in_bf16_as_the_head_does() -> None:
    sizes = [(16, 16), (8, 8)]
    head, features = make_head(dtype=torch.float32), make_features(sizes, 2, torch.float32)
    foreground = random_foreground(sizes, 2, 3)
    with mock.patch.object(box_subnet, "MAX_SHARE", 1.0):
        exact = box_subnet.sparse_codes(head, features, foreground)
        with torch.autocast("cpu", torch.bfloat16):
            sparse, dense = box_subnet.sparse_codes(head, features, foreground), head(features)
    assert exact is not None and sparse is not None
    assert sparse.dtype == dense.dtype == torch.bfloat16
    error, theirs = ((x - exact)[foreground].norm() for x in (sparse, dense))
    assert 0 < error < 1.5 * theirs
    of_exact, of_sparse, of_dense = (
        torch.cat([grad.flatten() for grad in gradients(head, features, x.float(), foreground)])
        for x in (exact, sparse, dense)
    )
    assert of_sparse.dtype == torch.float32
    assert 0 < (of_sparse - of_exact).norm() < 1.5 * (of_dense - of_exact).norm()


# --- as part of RetinaNet -------------------------------------------------------------------------


def make_model(**kwargs: Any) -> retinanet.RetinaNet:
    torch.manual_seed(0)
    model = build_model("retinanet_resnet18_fpn", CLASSES, min_size=160, max_size=160, **kwargs)
    assert isinstance(model, retinanet.RetinaNet)
    return model.train()


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    image = torch.rand(3, 160, 160, generator=torch.Generator().manual_seed(0))
    target = {"boxes": torch.tensor([[8.0, 8.0, 42.0, 42.0]]), "labels": torch.tensor([1])}
    return [image], [target]


def count_flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        torch.stack(list(model(*batch()).values())).sum().backward()
    return counter.get_total_flops()


def test_on_a_cpu_it_is_the_default_and_saves_work() -> None:
    default, dense = make_model(), make_model(box_subnet="dense")
    assert count_flops(default) == count_flops(make_model(box_subnet="sparse"))
    assert count_flops(default) < 0.85 * count_flops(dense)


def test_a_compiled_head_is_dense() -> None:
    model = make_model()
    with mock.patch.object(nn.Module, "compile"):
        wrap(model, torch.device("cpu"), 1, compiled=True)
    assert model.options.box_subnet == "dense"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_gives_the_losses_of_the_dense_default() -> None:
    losses = []
    for kwargs in ({}, {"box_subnet": "sparse"}):
        model = make_model(**kwargs).cuda()
        images, targets = batch()
        moved = [{key: value.cuda() for key, value in target.items()} for target in targets]
        losses.append(model([image.cuda() for image in images], moved))
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-4, atol=0)
