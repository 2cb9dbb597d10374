"""RetinaNet's training path equals torchvision's and never waits: pytest tests/test_retinanet.py.

The oracles are torchvision's own RetinaNet, Matcher, BoxCoder, AnchorGenerator and box_iou, and two
slow loops for the assigners, written here.
"""

import copy
import functools
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.detection._utils import BoxCoder, Matcher, SSDMatcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead, _default_anchorgen
from torchvision.ops import box_iou, generalized_box_iou_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from models import retinanet
from models.retinanet import TrainingOptions

Targets = list[dict[str, Tensor]]
TorchvisionRetinaNet = torchvision.models.detection.RetinaNet
NUM_CLASSES = 5
STRIDES = (8, 16, 32, 64, 128)
FORBIDDEN = {"nonzero", "_local_scalar_dense", "masked_select", "is_nonzero", "equal", "unique"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- what goes in ---------------------------------------------------------------------------------


def feature_sizes(image_size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    height, width = image_size
    return tuple((-(-height // stride), -(-width // stride)) for stride in STRIDES)


def anchors_for(image_size: tuple[int, int], generator: AnchorGenerator | None = None) -> Tensor:
    generator = generator or default_generator()
    sizes = feature_sizes(image_size)
    return retinanet.make_anchors(generator, sizes, image_size, torch.float32, torch.device("cpu"))


@functools.cache
def default_generator() -> AnchorGenerator:
    return _default_anchorgen()


def torchvision_anchors(
    generator: AnchorGenerator, image_size: tuple[int, int], num_images: int
) -> list[Tensor]:
    images = ImageList(torch.zeros(num_images, 3, *image_size), [image_size] * num_images)
    return generator(images, [torch.zeros(1, 1, *size) for size in feature_sizes(image_size)])


def make_boxes(
    generator: torch.Generator, count: int, image_size: tuple[int, int], grid: int
) -> Tensor:
    # On a grid of 8 px many boxes overlap several anchors equally; about a third are duplicates.
    size = torch.tensor([image_size[1], image_size[0]], dtype=torch.float32)
    first, second = torch.rand(2, count, 2, generator=generator) * size
    if grid:
        first, second = (first / grid).floor() * grid, (second / grid).floor() * grid
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    high = torch.maximum(high, low + (grid or 1))
    boxes = torch.cat([low, high], dim=1)
    if count > 2:
        boxes[count - count // 3 :] = boxes[
            torch.randperm(count, generator=generator)[: count // 3]
        ]
    return boxes


def make_targets(
    seed: int, counts: list[int], image_size: tuple[int, int], grid: int = 0
) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "boxes": make_boxes(generator, count, image_size, grid),
            "labels": torch.randint(1, NUM_CLASSES, (count,), generator=generator),
        }
        for count in counts
    ]


@st.composite
def batches(draw: Callable[..., Any], max_boxes: int = 12) -> tuple[Targets, tuple[int, int], int]:
    image_size = draw(st.integers(1, 5)) * 32, draw(st.integers(1, 5)) * 32
    counts = draw(st.lists(st.integers(0, max_boxes), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**31))
    return (
        make_targets(seed, counts, image_size, draw(st.sampled_from([0, 8, 32]))),
        image_size,
        seed,
    )


def make_outputs(
    seed: int, num_images: int, num_anchors: int, spread: float = 2.0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_images, num_anchors, NUM_CLASSES, generator=generator) * spread - 3
    codes = torch.randn(num_images, num_anchors, 4, generator=generator) * 0.3
    return {"cls_logits": logits.requires_grad_(), "bbox_regression": codes.requires_grad_()}


# --- the models -----------------------------------------------------------------------------------


class NoBackbone(nn.Module):
    out_channels = 8


class NoTransform(nn.Module):
    def forward(self, images: list[Tensor], targets: Targets) -> tuple[ImageList, Targets]:
        return ImageList(torch.stack(images), [(i.shape[-2], i.shape[-1]) for i in images]), targets


def both_without_backbone(box_loss: str, **kwargs: Any) -> tuple[Any, Any]:
    models = (
        retinanet.RetinaNet(NoBackbone(), NUM_CLASSES, **kwargs),
        TorchvisionRetinaNet(NoBackbone(), NUM_CLASSES, **kwargs),
    )
    for model in models:
        model.head.regression_head._loss_type = box_loss
    return models


def losses_of(
    model: Any, targets: Targets, outputs: dict[str, Tensor], anchors: Tensor
) -> dict[str, Tensor]:
    return model.compute_loss(model.assign_targets(targets, anchors), outputs, anchors)


def build(model_class: type[nn.Module], v2: bool = False, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=nn.BatchNorm2d,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    if v2:
        norm_layer = functools.partial(nn.GroupNorm, 32)
        kwargs["head"] = RetinaNetHead(256, 9, NUM_CLASSES, norm_layer=norm_layer)
        kwargs["head"].regression_head._loss_type = "giou"
    return model_class(backbone, NUM_CLASSES, min_size=64, max_size=96, **kwargs)


def make_images(sizes: list[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def assert_losses_agree(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], inputs: list[Tensor]
) -> None:
    assert ours.keys() == theirs.keys() == {"classification", "bbox_regression"}
    for name in ours:
        assert ours[name].item() == pytest.approx(theirs[name].item(), rel=1e-6, abs=1e-9), name
        our_grads, their_grads = (
            torch.autograd.grad(losses[name], inputs, retain_graph=True, allow_unused=True)
            for losses in (ours, theirs)
        )
        for our_grad, their_grad in zip(our_grads, their_grads, strict=True):
            if their_grad is None:  # the weights of one head do not enter the loss of the other
                assert our_grad is None
                continue
            assert our_grad is not None
            assert (our_grad - their_grad).abs().max() <= 1e-5 * their_grad.abs().max(), name


# --- losses ---------------------------------------------------------------------------------------


def check_losses(batch: tuple[Targets, tuple[int, int], int], box_loss: str, **kwargs: Any) -> None:
    targets, image_size, seed = batch
    ours, theirs = both_without_backbone(box_loss, **kwargs)
    anchors = anchors_for(image_size, ours.anchor_generator)
    outputs = make_outputs(seed, len(targets), len(anchors))
    their_anchors = torchvision_anchors(theirs.anchor_generator, image_size, len(targets))
    assert_losses_agree(
        losses_of(ours, targets, outputs, anchors),
        theirs.compute_loss(targets, outputs, their_anchors),
        list(outputs.values()),
    )


@given(batches(), st.sampled_from(["l1", "giou"]))
@example((make_targets(0, [0, 0], (64, 64)), (64, 64), 0), "l1")
@example((make_targets(0, [0], (64, 64)), (64, 64), 0), "giou")
@settings(max_examples=60, deadline=None)
def test_losses_and_gradients_equal_torchvision(
    batch: tuple[Targets, tuple[int, int], int], box_loss: str
) -> None:
    check_losses(batch, box_loss)


@given(batches(max_boxes=500), st.sampled_from(["l1", "giou"]))
@example((make_targets(3, [500, 0, 499], (160, 160), 8), (160, 160), 3), "l1")
@settings(max_examples=6, deadline=None)
def test_losses_equal_torchvision_with_hundreds_of_boxes(
    batch: tuple[Targets, tuple[int, int], int], box_loss: str
) -> None:
    check_losses(batch, box_loss)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"fg_iou_thresh": 0.7, "bg_iou_thresh": 0.2},
        {"fg_iou_thresh": 0.5, "bg_iou_thresh": 0.0},
        {"proposal_matcher": Matcher(0.6, 0.3, allow_low_quality_matches=False)},
    ],
)
def test_thresholds_are_those_of_the_matcher(kwargs: dict[str, Any]) -> None:
    check_losses((make_targets(5, [4, 0, 9], (96, 128)), (96, 128), 5), "l1", **kwargs)


def test_other_anchors_give_torchvisions_losses() -> None:
    generator = AnchorGenerator(
        ((16, 24), (32,) * 2, (64, 80), (90, 99), (111, 222)), ((1.0,),) * 5
    )
    batch = make_targets(6, [4, 7], (96, 128)), (96, 128), 6
    check_losses(batch, "l1", anchor_generator=generator)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("box_subnet", retinanet.BOX_SUBNETS)
def test_training_step_equals_torchvision_down_to_the_weights(v2: bool, box_subnet: str) -> None:
    ours = build(retinanet.RetinaNet, v2)
    ours.options = TrainingOptions(box_subnet=box_subnet)
    theirs = build(TorchvisionRetinaNet, v2)
    images = make_images([(60, 96), (64, 64), (50, 80)])
    targets = make_targets(7, [5, 0, 12], (50, 64))
    losses = [model.train()(images, copy.deepcopy(targets)) for model in (ours, theirs)]
    for name in losses[0]:
        assert losses[0][name].item() == pytest.approx(losses[1][name].item(), rel=1e-6)
    for one in losses:
        total(one).backward()
    for (name, our_weight), their_weight in zip(
        ours.named_parameters(), theirs.parameters(), strict=True
    ):
        if their_weight.grad is None:
            assert our_weight.grad is None, name
        else:
            difference = (our_weight.grad - their_weight.grad).norm()
            assert difference <= 1e-5 * their_weight.grad.norm() + 1e-9, name


def test_focal_loss_has_the_derivative_of_its_value() -> None:
    torch.manual_seed(0)
    logits = (torch.randn(2, 6, 3, dtype=torch.float64) * 5).requires_grad_()
    classes, foreground = torch.randint(0, 3, (2, 6)), torch.rand(2, 6) > 0.5
    assert torch.autograd.gradcheck(
        lambda x: retinanet.focal_loss(x, classes, foreground), (logits,)
    )


def test_focal_loss_stays_exact_and_finite_at_extreme_logits() -> None:
    logits = torch.tensor([-100.0, -30.0, -10.0, 10.0, 30.0, 100.0]).view(1, 6, 1).requires_grad_()
    classes = torch.zeros(1, 6, dtype=torch.int64)
    for foreground in (torch.zeros(1, 6, dtype=torch.bool), torch.ones(1, 6, dtype=torch.bool)):
        loss = retinanet.focal_loss(logits, classes, foreground)
        exact = torchvision.ops.sigmoid_focal_loss(
            logits.double(), foreground.double().unsqueeze(2)
        )
        assert torch.allclose(loss.double(), exact.sum(dim=2), rtol=1e-5, atol=1e-20)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert grad.isfinite().all()


def test_images_without_boxes_give_finite_gradients() -> None:
    for box_loss in ("l1", "giou"):
        ours, _ = both_without_backbone(box_loss)
        anchors = anchors_for((64, 64))
        outputs = make_outputs(0, 2, len(anchors))
        losses = losses_of(ours, make_targets(0, [0, 0], (64, 64)), outputs, anchors)
        assert losses["bbox_regression"] == 0
        assert losses["classification"] > 0
        for grad in torch.autograd.grad(total(losses), list(outputs.values())):
            assert grad.isfinite().all()


@pytest.mark.parametrize("box_loss", ["l1", "giou"])
def test_losses_under_autocast_are_those_of_fp32(box_loss: str) -> None:
    ours, _ = both_without_backbone(box_loss)
    anchors = anchors_for((64, 96))
    targets = make_targets(0, [3, 5], (64, 96))
    halves = {k: v.detach().bfloat16() for k, v in make_outputs(0, 2, len(anchors)).items()}
    expected = losses_of(ours, targets, {k: v.float() for k, v in halves.items()}, anchors)
    for half in halves.values():
        half.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(ours, targets, halves, anchors)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss == expected[name]
    total(losses).backward()
    assert all(
        half.grad is not None and half.grad.dtype == torch.bfloat16 for half in halves.values()
    )


def test_training_under_autocast_keeps_anchors_in_fp32() -> None:
    model = build(retinanet.RetinaNet).train()
    with (
        torch.autocast("cpu", torch.bfloat16),
        mock.patch.object(retinanet, "make_anchors", wraps=retinanet.make_anchors) as made,
    ):
        losses = model(make_images([(64, 64)]), make_targets(0, [2], (64, 64)))
    assert made.call_args.args[3] == torch.float32
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


# --- assignment -----------------------------------------------------------------------------------


def slow_assign(
    anchors: Tensor, boxes: Tensor, assigner: str, high: float = 0.5, low: float = 0.4
) -> list[int]:
    """Both rules in plain loops, one anchor and one box at a time."""
    if len(boxes) == 0:
        return [-1] * len(anchors)
    iou = box_iou(boxes, anchors).tolist()
    high, low = torch.tensor([high, low]).tolist()  # tensors compare in fp32
    best, matched = [], []
    for anchor in range(len(anchors)):
        of_anchor = [of_box[anchor] for of_box in iou]
        best.append(of_anchor.index(max(of_anchor)))
        if max(of_anchor) >= high:
            matched.append(best[anchor])
        elif max(of_anchor) < low:
            matched.append(-1)
        else:
            matched.append(-2)
    for box, of_box in enumerate(iou):
        peak = max(of_box)
        for anchor, value in enumerate(of_box):
            if value == peak:
                matched[anchor] = best[anchor] if assigner == "torchvision" else box
    return matched


@given(batches(), st.sampled_from(retinanet.ASSIGNERS), st.sampled_from([1, 20_000, 2**23]))
@settings(max_examples=40, deadline=None)
def test_assigners_equal_slow_loops(
    batch: tuple[Targets, tuple[int, int], int], assigner: str, chunk: int
) -> None:
    targets, image_size, _ = batch
    anchors = anchors_for(image_size)
    with mock.patch.object(retinanet, "CHUNK", chunk):
        matched = retinanet.assign(anchors, *retinanet.pad_targets(targets), assigner)
    assert matched.dtype == torch.int64
    for of_image, target in zip(matched, targets, strict=True):
        assert of_image.tolist() == slow_assign(anchors, target["boxes"], assigner)


@given(batches(max_boxes=60), st.sampled_from([1, 2**23]))
@settings(max_examples=40, deadline=None)
def test_torchvision_assigner_equals_matcher_to_the_bit(
    batch: tuple[Targets, tuple[int, int], int], chunk: int
) -> None:
    targets, image_size, _ = batch
    anchors = anchors_for(image_size)
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    with mock.patch.object(retinanet, "CHUNK", chunk):
        matched = retinanet.assign(anchors, *retinanet.pad_targets(targets))
    for of_image, target in zip(matched, targets, strict=True):
        if len(target["boxes"]):
            assert of_image.equal(matcher(box_iou(target["boxes"], anchors)))
        else:
            assert (of_image == retinanet.BACKGROUND).all()


def test_assigners_differ_where_a_box_claims_an_anchor_that_another_overlaps_more() -> None:
    # Anchor 0 overlaps box 0 by 0.9 and box 1 by 0.8, and is the best that box 1 has.
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])
    target = {
        "boxes": torch.tensor([[0.0, 0, 10, 9], [0, 0, 8, 10]]),
        "labels": torch.tensor([1, 2]),
    }
    targets = retinanet.pad_targets([target])
    assert retinanet.assign(anchors, *targets, "torchvision").tolist() == [[0, 0, -1]]
    assert retinanet.assign(anchors, *targets, "max-iou").tolist() == [[1, 0, -1]]


@given(batches())
@settings(max_examples=40, deadline=None)
def test_assigners_differ_nowhere_else(batch: tuple[Targets, tuple[int, int], int]) -> None:
    targets, image_size, _ = batch
    anchors = anchors_for(image_size)
    padded = retinanet.pad_targets(targets)
    matched = [retinanet.assign(anchors, *padded, assigner) for assigner in retinanet.ASSIGNERS]
    for target, theirs, ours in zip(targets, *matched, strict=True):
        for anchor in (theirs != ours).nonzero().flatten().tolist():
            iou = box_iou(target["boxes"], anchors)
            best, claimant = theirs[anchor], ours[anchor]
            assert claimant >= 0
            assert iou[claimant, anchor] == iou[claimant].max()
            assert best == iou[:, anchor].argmax() != claimant


@pytest.mark.parametrize("assigner", retinanet.ASSIGNERS)
def test_a_box_that_overlaps_no_anchor_claims_them_all(assigner: str) -> None:
    anchors = anchors_for((64, 64))
    boxes = torch.tensor([[5000.0, 5000, 5010, 5010]])
    padded = retinanet.pad_targets([{"boxes": boxes, "labels": torch.tensor([1])}])
    matched = retinanet.assign(anchors, *padded, assigner)[0]
    assert (matched == 0).all()
    assert matched.equal(Matcher(0.5, 0.4, True)(box_iou(boxes, anchors)))


@given(batches(max_boxes=40))
@settings(max_examples=20, deadline=None)
def test_iou_and_box_coding_equal_torchvision_to_the_bit(
    batch: tuple[Targets, tuple[int, int], int],
) -> None:
    targets, image_size, seed = batch
    anchors = anchors_for(image_size)
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    padded, _ = retinanet.pad_targets(targets)
    iou = retinanet.pairwise_iou(padded, anchors)
    for of_image, target in zip(iou, targets, strict=True):
        count = len(target["boxes"])
        assert of_image[:count].equal(box_iou(target["boxes"], anchors))
        assert (of_image[count:] == 0).all()
        if count:
            boxes = target["boxes"][torch.arange(len(anchors)) % count]
            codes = retinanet.encode_boxes(boxes, anchors)
            assert codes.equal(coder.encode_single(boxes, anchors))
    codes = torch.randn(len(anchors), 4, generator=torch.Generator().manual_seed(seed)) * 3
    assert retinanet.decode_boxes(codes, anchors).equal(coder.decode_single(codes, anchors))


def test_giou_loss_equals_torchvision_also_where_boxes_touch_or_lie_apart() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]]).expand(5, 4)
    predicted = torch.tensor(
        [[2.0, 1, 9, 12], [10, 0, 20, 10], [10, 10, 20, 20], [30, 40, 50, 60], [0, 0, 10, 10]],
        requires_grad=True,
    )
    ours, theirs = (f(predicted, boxes) for f in (retinanet.giou_loss, generalized_box_iou_loss))
    assert ours.equal(theirs)
    grads = [torch.autograd.grad(loss.sum(), predicted)[0] for loss in (ours, theirs)]
    assert grads[0].allclose(grads[1], rtol=1e-6, atol=1e-9)


def test_padding_has_few_sizes_and_is_marked_in_the_labels() -> None:
    for count, size in ((0, 8), (1, 8), (8, 8), (9, 16), (33, 64), (500, 512)):
        targets = make_targets(0, [count, min(count, 2)], (64, 64))
        boxes, labels = retinanet.pad_targets(targets)
        assert boxes.shape == (2, size, 4)
        assert labels.shape == (2, size)
        for i, target in enumerate(targets):
            present = len(target["labels"])
            assert boxes[i, :present].equal(target["boxes"])
            assert labels[i, :present].equal(target["labels"])
            assert (boxes[i, present:] == 0).all()
            assert (labels[i, present:] == -1).all()


# --- anchors --------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 300), st.booleans())
@settings(max_examples=25, deadline=None)
def test_anchors_equal_torchvisions_to_the_bit(height: int, width: int, default: bool) -> None:
    sizes = ((16, 24), (32,), (64, 80, 100), (90,), (111,))
    generator = _default_anchorgen() if default else AnchorGenerator(sizes, ((0.4, 3.0),) * 5)
    image_size = (max(height, 128), max(width, 128))
    theirs = torchvision_anchors(generator, image_size, 2)
    assert anchors_for(image_size, generator).equal(theirs[0])
    assert theirs[0].equal(theirs[1])


def test_anchors_stay_exact_after_a_pass_of_the_generator_in_bf16() -> None:
    generator = _default_anchorgen()
    images = ImageList(torch.zeros(1, 3, 128, 128), [(128, 128)])
    features = [torch.zeros(1, 1, *size) for size in feature_sizes((128, 128))]
    (exact,) = generator(images, features)
    generator(images, [feature.bfloat16() for feature in features])
    assert not generator(images, features)[0].equal(exact)  # for good
    assert anchors_for((128, 128), generator).equal(exact)


@pytest.mark.parametrize("gigabytes, chunks", [(80, 1), (16, 4)])
def test_the_memory_of_a_gpu_decides_how_many_boxes_are_matched_at_a_time(
    gigabytes: int, chunks: int
) -> None:
    card = mock.Mock(total_memory=gigabytes * 2**30)
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=card):
        chunk = retinanet._chunk(torch.device("cuda", 0))
    batch, anchors, boxes = 16, 182_403, 64  # of the recipe's size
    assert math.ceil(boxes / (chunk // (batch * anchors))) == chunks
    assert retinanet._chunk(torch.device("cpu")) == retinanet.CHUNK


def test_anchor_cache_is_bounded_and_outside_of_the_model() -> None:
    model = build(retinanet.RetinaNet).train()
    retinanet.make_anchors.cache_clear()
    images, targets = make_images([(64, 64)]), make_targets(0, [2], (64, 64))
    losses = [model(images, targets) for _ in range(3)]
    info = retinanet.make_anchors.cache_info()
    assert (info.hits, info.misses, info.maxsize) == (2, 1, retinanet.CACHED_SHAPES)
    for width in range(1, retinanet.CACHED_SHAPES + 10):
        anchors_for((32, 32 * width))
    assert retinanet.make_anchors.cache_info().currsize == retinanet.CACHED_SHAPES

    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.state_dict().keys() == model.state_dict().keys()
        assert twin(images, targets).keys() == losses[0].keys()


@pytest.mark.parametrize("v2", [False, True])
def test_losses_in_inference_mode_do_not_spoil_a_later_training_step(v2: bool) -> None:
    model = build(retinanet.RetinaNet, v2).train()
    retinanet.make_anchors.cache_clear()
    images, targets = make_images([(64, 64)]), make_targets(0, [2], (64, 64))
    with torch.inference_mode():
        model(images, targets)
    total(model(images, targets)).backward()
    assert retinanet.make_anchors.cache_info().misses == 1


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("v2", [False, True])
def test_state_dict_and_inference_are_torchvisions(v2: bool) -> None:
    ours = build(retinanet.RetinaNet, v2, score_thresh=0.0).eval()
    theirs = build(TorchvisionRetinaNet, v2, score_thresh=0.0).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    theirs.load_state_dict(state)
    images = make_images([(60, 90), (64, 64)])
    with torch.no_grad():
        detections = zip(ours(images), theirs(images), strict=True)
    for our_image, their_image in detections:
        assert len(our_image["boxes"]) > 0
        assert our_image.keys() == their_image.keys()
        assert all(our_image[key].equal(their_image[key]) for key in our_image)


def test_unknown_options_and_other_matchers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="assigner 'closest'.*torchvision', 'max-iou"):
        TrainingOptions(assigner="closest")
    with pytest.raises(ValueError, match="box_subnet 'auto'.*'dense', 'sparse"):
        TrainingOptions(box_subnet="auto")
    with pytest.raises(ValueError, match="box_loss 'ciou'.*'l1', 'giou"):
        TrainingOptions(box_loss="ciou")
    with pytest.raises(ValueError, match="needs targets"):
        retinanet.RetinaNet(NoBackbone(), 2)([])
    model = retinanet.RetinaNet(NoBackbone(), 2, proposal_matcher=SSDMatcher(0.5))
    with pytest.raises(ValueError, match="proposal_matcher must be a Matcher"):
        model.assign_targets(make_targets(0, [1], (64, 64)), anchors_for((64, 64)))


@pytest.mark.parametrize("field, option", [("assigner", "max-iou"), ("box_loss", "giou")])
def test_an_option_reaches_the_loss(field: str, option: str) -> None:
    targets, anchors = make_targets(0, [12, 12], (64, 64), grid=8), anchors_for((64, 64))
    outputs = make_outputs(0, 2, len(anchors))
    model, losses = retinanet.RetinaNet(NoBackbone(), NUM_CLASSES), []
    for options in (TrainingOptions(), TrainingOptions(**{field: option})):
        model.options = options
        losses.append(losses_of(model, targets, outputs, anchors))
    assert losses[0]["bbox_regression"] != losses[1]["bbox_regression"]


def test_the_box_loss_is_torchvisions_unless_an_option_says_otherwise() -> None:
    targets, anchors = make_targets(0, [12, 12], (64, 64)), anchors_for((64, 64))
    outputs = make_outputs(0, 2, len(anchors))
    for torchvisions, chosen in (("l1", "giou"), ("giou", "l1")):
        default, _ = both_without_backbone(torchvisions)
        model, _ = both_without_backbone(chosen)
        model.options = TrainingOptions(box_loss=torchvisions)
        expected = losses_of(default, targets, outputs, anchors)
        assert losses_of(model, targets, outputs, anchors) == expected


def _l1_everywhere(codes: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
    """A user's loss, which also pulls the codes of the background towards 0."""
    return (codes - retinanet.encode_boxes(boxes, anchors)).abs().sum(dim=2) + codes.abs().mean()


def test_a_loss_that_reads_codes_of_the_background_is_nan_where_these_were_not_computed() -> None:
    model = build(retinanet.RetinaNet).train()
    images, targets = make_images([(64, 64)]), make_targets(0, [1], (64, 64))
    losses = {}
    with mock.patch.dict(retinanet.BOX_LOSSES, everywhere=_l1_everywhere):
        for box_subnet in retinanet.BOX_SUBNETS:
            model.options = TrainingOptions(box_subnet=box_subnet, box_loss="everywhere")
            losses[box_subnet] = model(images, copy.deepcopy(targets))["bbox_regression"]
    assert losses["dense"].isfinite() and losses["sparse"].isnan()


def test_a_head_of_another_class_is_called_as_a_whole() -> None:
    class Louder(RetinaNetHead):
        def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
            return {name: 2 * value for name, value in super().forward(features).items()}

    model = build(retinanet.RetinaNet, head=Louder(256, 9, NUM_CLASSES)).train()
    images, targets = make_images([(64, 64)]), make_targets(0, [1], (64, 64))
    losses = []
    for box_subnet in retinanet.BOX_SUBNETS:
        model.options = TrainingOptions(box_subnet=box_subnet)
        losses.append(model(images, copy.deepcopy(targets)))
    assert losses[0] == losses[1]


# --- waits, operator calls, memory ----------------------------------------------------------------


class OpRecorder(TorchDispatchMode):
    """Record the names of operators, which index by a mask, and the peak of the bytes made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.one_hot_like: list[tuple[str, torch.dtype]] = []
        self.wide_shape: torch.Size | None = None
        self.peak = 0
        self._alive: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("index"):
            indices = [i for i in tree_leaves(args[1:]) if isinstance(i, Tensor)]
            name += "_by_mask" if any(i.dtype == torch.bool for i in indices) else ""
        self.names.add(name)
        before = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        self._alive = [(ref, size) for ref, size in self._alive if not ref.expired()]
        known = {ref.cdata for ref, _ in self._alive} | before
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in known:
                    self._alive.append((StorageWeakRef(storage), storage.nbytes()))
                if x.shape == self.wide_shape and not x.is_floating_point():
                    self.one_hot_like.append((name, x.dtype))
        self.peak = max(self.peak, sum(size for _, size in self._alive))
        return out


def waits(recorder: OpRecorder) -> set[str]:
    return {name for name in recorder.names if name in FORBIDDEN or name.endswith("_by_mask")}


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("assigner", retinanet.ASSIGNERS)
def test_training_never_asks_the_device_for_a_value(v2: bool, assigner: str) -> None:
    model = build(retinanet.RetinaNet, v2).train()
    model.options = TrainingOptions(assigner=assigner, box_subnet="dense")
    model.transform = NoTransform()
    images, targets = make_images([(64, 96)] * 3), make_targets(0, [4, 0, 9], (64, 96))
    retinanet.make_anchors.cache_clear()
    with OpRecorder() as recorder:
        total(model(images, targets)).backward()
    assert waits(recorder) == set()

    theirs = build(TorchvisionRetinaNet, v2).train()
    theirs.transform = NoTransform()
    with OpRecorder() as recorder:
        theirs(images, targets)
    assert {"nonzero", "_local_scalar_dense", "index_by_mask"} <= waits(recorder)  # it can tell


def count_operator_calls(function: Callable[[], object]) -> tuple[int, int]:
    """All operator calls, and those that no other operator made."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    events = [event for event in profiler.events() or [] if event.name.startswith("aten::")]
    return len(events), sum(event.cpu_parent is None for event in events)


@pytest.mark.parametrize("box_loss", ["l1", "giou"])
def test_anchors_and_losses_take_a_quarter_of_the_operator_calls(box_loss: str) -> None:
    ours, theirs = both_without_backbone(box_loss)
    image_size = (128, 160)
    targets = make_targets(0, [7, 7], image_size)
    outputs = make_outputs(0, 2, len(anchors_for(image_size, ours.anchor_generator)))
    our_calls = count_operator_calls(
        lambda: losses_of(ours, targets, outputs, anchors_for(image_size, ours.anchor_generator))
    )
    images = ImageList(torch.zeros(2, 3, *image_size), [image_size] * 2)
    features = [torch.zeros(2, 1, *size) for size in feature_sizes(image_size)]
    their_calls = count_operator_calls(
        lambda: theirs.compute_loss(targets, outputs, theirs.anchor_generator(images, features))
    )
    if box_loss == "l1":
        assert 4 * our_calls[0] <= their_calls[0]
        assert 4 * our_calls[1] <= their_calls[1]
    else:
        assert 4 * our_calls[0] <= their_calls[0]


@pytest.mark.parametrize("assigner", retinanet.ASSIGNERS)
def test_assignment_of_a_thousand_boxes_stays_below_250_mb(assigner: str) -> None:
    anchors = anchors_for((800, 1216))
    assert len(anchors) == 182_403
    padded = retinanet.pad_targets(make_targets(0, [1000], (800, 1216)))
    with OpRecorder() as recorder:
        retinanet.assign(anchors, *padded, assigner)
    assert 30e6 < recorder.peak < 250e6


def test_loss_keeps_one_tensor_of_the_size_of_the_logits() -> None:
    num_classes = 91
    model = retinanet.RetinaNet(NoBackbone(), num_classes)
    anchors = anchors_for((64, 64))
    logits = torch.randn(2, len(anchors), num_classes, requires_grad=True)
    outputs = {"cls_logits": logits, "bbox_regression": torch.zeros(2, len(anchors), 4)}
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with OpRecorder() as recorder, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        recorder.wide_shape = logits.shape
        losses_of(model, make_targets(0, [3, 5], (64, 64)), outputs, anchors)
    assert recorder.one_hot_like == []
    assert [x.dtype for x in kept if x.shape == logits.shape] == [torch.float32]
    assert sum(x.nbytes for x in kept) < 1.3 * logits.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("amp", [False, True])
def test_a_gpu_never_waits_in_training(v2: bool, amp: bool) -> None:
    device = torch.device("cuda")
    model = build(retinanet.RetinaNet, v2).to(device).train()
    model.transform = NoTransform()
    batches_on_device = [
        (
            [image.to(device) for image in make_images([size] * 2)],
            [{k: v.to(device) for k, v in t.items()} for t in make_targets(0, counts, size)],
        )
        for size, counts in (((64, 96), [4, 0]), ((96, 64), [0, 20]))
    ]
    retinanet.make_anchors.cache_clear()

    def step(images: list[Tensor], targets: Targets) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            losses = model(images, targets)
        total(losses).backward()

    step(*batches_on_device[0])  # libraries start with waits of their own
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches_on_device:  # the second makes new anchors
            step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    anchors = anchors_for((96, 64), model.anchor_generator)
    sizes = feature_sizes((96, 64))
    on_device = retinanet.make_anchors(
        model.anchor_generator, sizes, (96, 64), torch.float32, device
    )
    assert on_device.cpu().equal(anchors)
