"""RetinaNet's detections are torchvision's to the bit: pytest tests/test_detection.py.

The oracle is torchvision's own `RetinaNet.postprocess_detections`, on the same logits and codes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import batched_nms

from models import retinanet

TorchvisionRetinaNet = torchvision.models.detection.RetinaNet
ANCHORS_PER_CELL = 3


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class NoBackbone(nn.Module):
    out_channels = 8


def both(num_classes: int, **limits: Any) -> tuple[Any, Any]:
    return (
        retinanet.RetinaNet(NoBackbone(), num_classes, **limits),
        TorchvisionRetinaNet(NoBackbone(), num_classes, **limits),
    )


def make_outputs(
    seed: int,
    feature_sizes: list[tuple[int, int]],
    num_images: int,
    num_classes: int,
    grid: float,
    spread: float,
) -> tuple[dict[str, Tensor], Tensor]:
    """Draw logits and codes on a grid (0 is none), and anchors that overlap each other."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(height * width for height, width in feature_sizes) * ANCHORS_PER_CELL
    logits = torch.randn(num_images, count, num_classes, generator=generator) * 2 - 1
    codes = torch.randn(num_images, count, 4, generator=generator) * spread
    low = torch.rand(count, 2, generator=generator) * 96 - 16
    size = 2 + torch.rand(count, 2, generator=generator) * 40
    if grid:
        logits, codes = (logits / grid).round() * grid, (codes / grid).round() * grid
        low, size = (low / 8).round() * 8, (size / 8).ceil() * 8
    return {"cls_logits": logits, "bbox_regression": codes}, torch.cat([low, low + size], dim=1)


def theirs_of(
    model: Any,
    outputs: dict[str, Tensor],
    anchors: Tensor,
    feature_sizes: list[tuple[int, int]],
    image_sizes: list[tuple[int, int]],
) -> list[dict[str, Tensor]]:
    level_sizes = [height * width * ANCHORS_PER_CELL for height, width in feature_sizes]
    return model.postprocess_detections(
        {name: list(output.split(level_sizes, dim=1)) for name, output in outputs.items()},
        [list(anchors.split(level_sizes)) for _ in image_sizes],
        image_sizes,
    )


def assert_equal(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert list(mine) == list(other) == ["boxes", "scores", "labels"]
        for name in mine:
            assert mine[name].dtype == other[name].dtype
            assert torch.equal(mine[name], other[name]), name


@st.composite
def cases(draw: Callable[..., Any]) -> dict[str, Any]:
    feature_sizes = draw(
        st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5)
    )
    image_size = st.tuples(st.integers(1, 100), st.integers(1, 100))
    return {
        "seed": draw(st.integers(0, 2**31)),
        "feature_sizes": feature_sizes,
        "image_sizes": draw(st.lists(image_size, min_size=1, max_size=4)),
        "num_classes": draw(st.sampled_from([1, 2, 7, 33])),
        "grid": draw(st.sampled_from([0, 0.25, 1, 4])),  # at 4 nearly all scores are ties
        "spread": draw(st.sampled_from([0, 0.1, 3])),  # 0: many equal boxes of different classes
        "score_thresh": draw(st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.95, 1.0])),
        "nms_thresh": draw(st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 0.8, 1.0])),
        "topk_candidates": draw(st.sampled_from([1, 7, 50, 1000])),
        "detections_per_img": draw(st.sampled_from([1, 10, 300, 5000])),
    }


# More than 1,000 boxes in an image: torchvision's other strategy for NMS.
MANY: dict[str, Any] = {
    "seed": 0,
    "feature_sizes": [(20, 20), (10, 10), (5, 5)],
    "image_sizes": [(90, 70), (64, 100)],
    "num_classes": 33,
    "grid": 0,
    "spread": 0.1,
    "score_thresh": 0.05,
    "nms_thresh": 0.5,
    "topk_candidates": 1000,
    "detections_per_img": 300,
}


@given(case=cases())
@example(case=MANY)
@example(case=MANY | {"grid": 0.25, "nms_thresh": 1 / 3})
@example(case=MANY | {"score_thresh": 1.0})
@settings(max_examples=150, deadline=None)
def test_boxes_scores_labels_and_their_order_are_torchvisions(case: dict[str, Any]) -> None:
    case = dict(case)
    seed, grid, spread, num_classes, feature_sizes, image_sizes = (
        case.pop(name)
        for name in ("seed", "grid", "spread", "num_classes", "feature_sizes", "image_sizes")
    )
    outputs, anchors = make_outputs(
        seed, feature_sizes, len(image_sizes), num_classes, grid, spread
    )
    ours, theirs = both(num_classes, **case)
    expected = theirs_of(theirs, outputs, anchors, feature_sizes, image_sizes)
    assert_equal(ours.detect(outputs, anchors, feature_sizes, image_sizes), expected)


def test_one_nms_for_the_batch_in_float64_would_decide_differently() -> None:
    # Why NMS stays as it is: an IoU of 1/3 is over the threshold 1/3 when it is rounded to fp32.
    boxes = torch.tensor([[0.0, 0, 2, 1], [1.0, 0, 3, 1]])
    scores, labels = torch.tensor([0.9, 0.8]), torch.tensor([0, 0])
    assert batched_nms(boxes, scores, labels, 1 / 3).tolist() == [0]
    assert batched_nms(boxes.double(), scores.double(), labels, 1 / 3).tolist() == [0, 1]


def test_detections_carry_gradients() -> None:
    outputs, anchors = make_outputs(0, [(4, 4)], 1, 3, 0, 0.1)
    for output in outputs.values():
        output.requires_grad_()
    model, _ = both(3)
    (detections,) = model.detect(outputs, anchors, [(4, 4)], [(64, 64)])
    (detections["boxes"].sum() + detections["scores"].sum()).backward()
    assert all(output.grad.abs().sum() > 0 for output in outputs.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_detects_the_same_and_waits_once_for_a_batch_and_in_nms() -> None:
    feature_sizes, image_sizes = MANY["feature_sizes"], MANY["image_sizes"]
    outputs, anchors = make_outputs(0, feature_sizes, len(image_sizes), 33, 0, 0.1)
    outputs, anchors = {k: v.cuda() for k, v in outputs.items()}, anchors.cuda()
    ours, theirs = both(33)
    expected = theirs_of(theirs, outputs, anchors, feature_sizes, image_sizes)
    assert_equal(ours.detect(outputs, anchors, feature_sizes, image_sizes), expected)
    nothing, _ = both(33, score_thresh=1.0)
    nothing.detect(outputs, anchors, feature_sizes, image_sizes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            ours.detect(outputs, anchors, feature_sizes, image_sizes)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing" in str(warning.message) for warning in caught)
    assert waits <= 1 + 3 * len(image_sizes)  # NMS: a number that it copies, and its own
