"""Detectors are torchvision's, and weights go by class name: pytest tests/test_model.py.

Every model that has a name is compared with torchvision's own builder, on the meta device, where
building is free; weights with small random files, whose effect is read off the outputs of the heads
and not off the layout of their tensors.
"""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import flip_a_bit, sidecar
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from models.build import build_model, model_names
from models.loss_terms import total_loss
from models.parallel import wrap
from models.transform import BatchTransform, padded_sizes
from models.weights import ZERO_EPS, Weights, load_trained, load_weights, read_weights
from utils import UserError

RESNET18, RESNET50 = "retinanet_resnet18_fpn", "retinanet_resnet50_fpn"
FASTER_RCNN = "fasterrcnn_mobilenet_v3_large_320_fpn"
SSDLITE = "ssdlite320_mobilenet_v3_large"
DETECTORS = [RESNET18, "fcos_resnet50_fpn", SSDLITE, "ssd300_vgg16", FASTER_RCNN]
COCO_V1 = detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1
COCO_FILE = "retinanet_resnet50_fpn_coco-eeacb38b.pth"
LabelMap = list[dict[str, Any]]


def classes(*names: str) -> LabelMap:
    return [{"id": 7 * i, "name": name, "label": i} for i, name in enumerate(names, start=1)]


THREE = classes("cat", "dog", "bird")


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build without memory, values or time."""
    with torch.device("meta"):
        return build()


def quick(name: str, label_map: LabelMap, seed: int) -> Any:
    """Build with random values and no initialisation, which for SSD300 takes seconds."""
    model = on_meta(lambda: build_model(name, label_map)).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            value.copy_(0.05 * torch.randn(value.shape, generator=generator))
            if key.endswith("running_var"):
                value.add_(1)
    return model


def any_state(architecture: str) -> dict[str, Tensor]:
    return models.get_model(architecture).state_dict()


def torchvisions(
    name: str,
    num_classes: int,
    state: dict[str, Tensor] | None = None,
    trainable: int | None = None,
    **sizes: int,
) -> nn.Module:
    """Build `name` with torchvision's own builder, its backbone from `state` if that is given."""
    with mock.patch.object(models.WeightsEnum, "get_state_dict", lambda *_, **__: state):
        if name in models.list_models(module=detection):
            builder = models.get_model_builder(name)
            weights_class = {
                "ssd300": models.VGG16_Weights,
                "ssdlite320": models.MobileNet_V3_Large_Weights,
                "fasterrcnn_mobilenet": models.MobileNet_V3_Large_Weights,
            }
            matches = [w for prefix, w in weights_class.items() if name.startswith(prefix + "_")]
            backbone = (matches or [models.ResNet50_Weights])[0].IMAGENET1K_V1
            return builder(
                weights=None,
                weights_backbone=backbone if state is not None else None,
                num_classes=num_classes,
                trainable_backbone_layers=trainable,
                **sizes,
            )
        return retinanet_of(name[10:-4], num_classes, state, trainable, **sizes)


def retinanet_of(
    resnet: str,
    num_classes: int,
    state: dict[str, Tensor] | None,
    trainable: int | None,
    **sizes: int,
) -> nn.Module:
    """Do what torchvision's `retinanet_resnet50_fpn` does, line by line, for another ResNet."""
    layers = 5 if state is None else 3 if trainable is None else trainable
    body = models.get_model_builder(resnet)(
        weights=None, norm_layer=nn.BatchNorm2d if state is None else FrozenBatchNorm2d
    )
    if state is not None:
        body.load_state_dict(state)
    backbone = _resnet_fpn_extractor(
        body, layers, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
    )
    return detection.RetinaNet(backbone, num_classes, **sizes)


def shapes(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def frozen_norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, FrozenBatchNorm2d)]


def assert_same_architecture(model: nn.Module, expected: nn.Module) -> None:
    assert shapes(model) == shapes(expected)
    assert list(model.state_dict()) == list(expected.state_dict())
    assert trained(model) == trained(expected)
    assert frozen_norms(model) == frozen_norms(expected)
    settings_of = ("min_size", "max_size", "image_mean", "image_std", "size_divisible")
    for name in (*settings_of, "fixed_size"):
        assert getattr(model.transform, name) == getattr(expected.transform, name), name
    names = ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates")
    for name in names:
        assert getattr(model, name, None) == getattr(expected, name, None), name


def backbone_of(name: str) -> str:
    if "mobilenet" in name:
        return "mobilenet_v3_large"
    if "vgg16" in name:
        return "vgg16"
    parts = name.removesuffix("_v2").removesuffix("_fpn").split("_")
    return "_".join(parts[1:])


# --- architecture ---------------------------------------------------------------------------------


def test_the_names_are_all_box_detectors_and_a_retinanet_for_every_resnet() -> None:
    names = model_names()
    boxes = [n for n in models.list_models(module=detection) if "mask" not in n and "key" not in n]
    assert set(boxes) < set(names) and names == sorted(set(names))
    resnets = [n for n in models.list_models(module=models) if "resne" in n]
    assert {f"retinanet_{n}_fpn" for n in resnets} < set(names)
    assert len(names) == len(boxes) + len(resnets) - 1  # ResNet-50 is torchvision's own


@pytest.mark.parametrize("name", model_names())
def test_a_model_from_scratch_is_torchvisions(name: str) -> None:
    model = on_meta(lambda: build_model(name, THREE))
    assert_same_architecture(model, on_meta(lambda: torchvisions(name, 4)))
    assert len(trained(model)) == len(list(model.parameters()))


@pytest.mark.parametrize("name", model_names())
def test_a_model_with_a_trained_backbone_is_torchvisions(name: str) -> None:
    expected = on_meta(lambda: torchvisions(name, 4, any_state(backbone_of(name))))
    model = on_meta(lambda: build_model(name, THREE, load=False, weights_backbone="given"))
    assert_same_architecture(model, expected)
    if name not in (SSDLITE, "ssd300_vgg16"):
        assert len(trained(model)) < len(list(model.parameters()))


@pytest.mark.parametrize("layers", range(6))
@pytest.mark.parametrize("name", [RESNET18, RESNET50, FASTER_RCNN])
def test_as_many_layers_are_trained_as_torchvision_trains(name: str, layers: int) -> None:
    state = {"weights_backbone": "given", "trainable_backbone_layers": layers}
    model = on_meta(lambda: build_model(name, THREE, load=False, **state))
    expected = on_meta(lambda: torchvisions(name, 4, any_state(backbone_of(name)), layers))
    assert_same_architecture(model, expected)
    body = sum(key.startswith("backbone.body") for key in trained(model))
    assert (body == 0) == (layers == 0)


@pytest.mark.parametrize("name", [*DETECTORS, RESNET50, "fasterrcnn_resnet50_fpn_v2"])
def test_weights_of_the_whole_detector_freeze_what_torchvision_freezes(name: str) -> None:
    model = on_meta(lambda: build_model(name, THREE, load=False, weights="given"))
    # torchvision ignores the backbone's weights where there are the detector's; for ssdlite that
    # means the reduced backbone.
    has_state = name != SSDLITE
    expected = on_meta(
        lambda: torchvisions(name, 4, any_state(backbone_of(name)) if has_state else None)
    )
    assert_same_architecture(model, expected)


@pytest.mark.parametrize("name", [RESNET18, RESNET50, "fcos_resnet50_fpn", FASTER_RCNN])
def test_sizes_reach_the_transform(name: str) -> None:
    model = on_meta(lambda: build_model(name, THREE, min_size=64, max_size=96))
    expected = on_meta(lambda: torchvisions(name, 4, min_size=64, max_size=96))
    assert_same_architecture(model, expected)
    assert model.transform.min_size == (64,) and model.transform.max_size == 96


def test_num_classes_is_the_largest_label_and_background() -> None:
    gaps = [{"name": "a", "label": 1}, {"name": "b", "label": 90}]
    model = on_meta(lambda: build_model(RESNET18, gaps))
    assert model.head.classification_head.num_classes == 91


def test_synchronised_batch_norm_keeps_the_names() -> None:
    model = on_meta(lambda: build_model(RESNET18, THREE, sync_bn=True))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    assert shapes(model) == shapes(on_meta(lambda: torchvisions(RESNET18, 4)))


@pytest.mark.parametrize(
    "name, flags, words",
    [
        ("retinanet_resnet19_fpn", {}, ["--model retinanet_resnet19_fpn", "unknown", RESNET18]),
        ("maskrcnn_resnet50_fpn", {}, ["--model maskrcnn_resnet50_fpn", "masks", "fasterrcnn"]),
        ("maskrcnn_resnet50_fpn_v2", {}, ["--model maskrcnn_resnet50_fpn_v2", "masks"]),
        ("keypointrcnn_resnet50_fpn", {}, ["--model keypointrcnn_resnet50_fpn", "keypoints"]),
        (SSDLITE, {"min_size": 64}, ["--min-size", SSDLITE, "leave"]),
        ("ssd300_vgg16", {"max_size": 64}, ["--max-size", "ssd300_vgg16", "leave"]),
        (FASTER_RCNN, {"assigner": "max-iou"}, ["--assigner max-iou", FASTER_RCNN]),
        (FASTER_RCNN, {"box_subnet": "dense"}, ["--box-subnet dense", FASTER_RCNN]),
        (RESNET18, {"trainable_backbone_layers": 2}, ["--trainable-backbone-layers", "--weights"]),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_its_flag_and_the_fix(
    name: str, flags: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        build_model(name, THREE, **flags)
    assert all(word in str(error.value) for word in words)


# --- the transform --------------------------------------------------------------------------------


SIDE = st.integers(8, 120)


def transforms(resize_in_training: bool = True, **kwargs: Any) -> tuple[Any, BatchTransform]:
    base = GeneralizedRCNNTransform(
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], **kwargs
    )
    return base, BatchTransform(base, resize_in_training)


def assert_same_batch(one: Any, two: Any) -> None:
    (images, targets), (expected, expected_targets) = one, two
    assert images.image_sizes == expected.image_sizes
    assert torch.equal(images.tensors, expected.tensors)
    assert (targets is None) == (expected_targets is None)
    for target, other in zip(targets or [], expected_targets or [], strict=True):
        assert target.keys() == other.keys()
        assert all(torch.equal(target[key], other[key]) for key in target)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=3),
    min_size=st.lists(st.integers(32, 128), min_size=1, max_size=3),
    max_size=st.integers(64, 192),
    divisible=st.sampled_from([1, 32]),
    fixed=st.none() | st.tuples(st.integers(32, 96), st.integers(32, 96)),
    training=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_transform_gives_torchvisions_bits(
    sizes: list[tuple[int, int]],
    min_size: list[int],
    max_size: int,
    divisible: int,
    fixed: tuple[int, int] | None,
    training: bool,
    seed: int,
) -> None:
    base, ours = transforms(
        min_size=min_size, max_size=max_size, size_divisible=divisible, fixed_size=fixed
    )
    base.train(training), ours.train(training)
    torch.manual_seed(seed)
    images = [torch.rand(3, height, width) for height, width in sizes]
    boxes = [torch.rand(i % 3, 4) * 100 for i in range(len(sizes))]
    targets = [{"boxes": b, "labels": torch.arange(len(b))} for b in boxes]
    before = [image.clone() for image in images], [b.clone() for b in boxes]
    for given_targets in (targets, None):
        torch.manual_seed(seed)
        expected = base(images, given_targets)
        torch.manual_seed(seed)
        assert_same_batch(ours(images, given_targets), expected)
        ours.to(memory_format=torch.channels_last)
    assert all(map(torch.equal, images, before[0])) and all(map(torch.equal, boxes, before[1]))


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.tuples(SIDE, SIDE, SIDE, SIDE), max_size=3), seed=st.integers(0, 1000))
def test_detections_get_torchvisions_bits_in_the_original_image(
    sizes: list[tuple[int, int, int, int]], seed: int
) -> None:
    base, ours = transforms(min_size=32, max_size=64)
    generator = torch.Generator().manual_seed(seed)
    boxes = [torch.rand(i, 4, generator=generator) * 100 for i in range(len(sizes))]
    resized, original = [size[:2] for size in sizes], [size[2:] for size in sizes]
    expected, found = (
        transform.eval().postprocess([{"boxes": b} for b in boxes], resized, original)
        for transform in (base, ours)
    )
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine["boxes"], other["boxes"])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_all_convolutions_get_the_memory_format_of_the_model(
    memory_format: torch.memory_format, dtype: torch.dtype | None
) -> None:
    model = build_model(RESNET18, THREE, min_size=64, max_size=96, box_subnet="dense")
    model.to(memory_format=memory_format)
    layouts: dict[bool, int] = {True: 0, False: 0}

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        for tensor in (*inputs, module.weight, output):
            assert isinstance(tensor, Tensor)
            layouts[tensor.is_contiguous(memory_format=memory_format)] += 1

    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions:
        module.register_forward_hook(count)
    images = [torch.rand(3, 64, 96), torch.rand(3, 60, 80)]
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        model.train()(images, [target, target])
        model.eval()(images)
    # The ten of the head run on five levels. A tensor, its weight and its result are three.
    assert layouts == {True: 2 * 3 * (len(convolutions) + 4 * 10), False: 0}


def test_images_keep_their_size_only_in_training_if_resizing_is_off() -> None:
    base, ours = transforms(resize_in_training=False, min_size=32, max_size=64)
    image, target = torch.rand(3, 100, 70), {"boxes": torch.tensor([[1.0, 2.0, 30.0, 40.0]])}
    images, targets = ours.train()([image], [target])
    assert images.image_sizes == [(100, 70)] and images.tensors.shape == (1, 3, 128, 96)
    assert torch.equal(images.tensors[0, :, :100, :70], ours.normalize(image))
    assert torch.equal(targets[0]["boxes"], target["boxes"])
    assert_same_batch(ours.eval()([image], [target]), base.eval()([image], [target]))
    model = on_meta(lambda: build_model(RESNET18, THREE, resize_in_training=False))
    assert not model.transform.resize_in_training
    assert on_meta(lambda: build_model(RESNET18, THREE)).transform.resize_in_training


LONG_SIDE = st.integers(1, 5000)


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.tuples(LONG_SIDE, LONG_SIDE), min_size=1, max_size=6),
    min_size=st.integers(32, 1000),
    longer=st.integers(0, 1000),
    divisible=st.sampled_from([1, 32, 128]),
    fixed=st.none() | st.just((300, 300)) | st.tuples(st.integers(32, 400), st.integers(32, 400)),
)
@example([(480, 640), (640, 480), (427, 640), (333, 500)], 800, 533, 32, None)
@example([(375, 500), (100, 5000), (5000, 300)], 800, 533, 32, None)
@example([(480, 640)], 300, 0, 1, (300, 300))
def test_padded_sizes_are_those_to_which_images_are_really_padded(
    sizes: list[tuple[int, int]],
    min_size: int,
    longer: int,
    divisible: int,
    fixed: tuple[int, int] | None,
) -> None:
    # On the meta device, images of any size cost nothing, and shapes are the real ones.
    base, ours = transforms(
        min_size=min_size, max_size=min_size + longer, size_divisible=divisible, fixed_size=fixed
    )
    model = nn.Module()
    model.transform = ours
    expected = []
    for height, width in sizes:
        long, short = max(height, width), min(height, width)
        assume(short * min(min_size / short, (min_size + longer) / long) >= 1)
        images, _ = base.eval()([torch.empty(3, height, width, device="meta")])
        expected.append(tuple(images.tensors.shape[-2:]))
    for dtype in (np.int32, np.int64):
        padded = padded_sizes(model, np.array(sizes, dtype=dtype))
        assert padded.tolist() == [list(size) for size in expected]


def test_padded_sizes_of_real_models_are_real() -> None:
    sizes = np.array([[480, 640], [640, 427], [333, 500]])
    for name in (RESNET18, SSDLITE, "ssd300_vgg16", FASTER_RCNN):
        model = on_meta(lambda name=name: build_model(name, THREE))  # type: ignore[misc]
        for size, padded in zip(sizes, padded_sizes(model, sizes), strict=True):
            images, _ = model.transform.eval()([torch.empty(3, *size.tolist(), device="meta")])
            assert images.tensors.shape[-2:] == tuple(padded.tolist())


# --- weights of the backbone ----------------------------------------------------------------------


def random_state(architecture: str, prefix: str = "") -> dict[str, Tensor]:
    """Return a state whose every tensor is unlike any initialisation."""
    generator = torch.Generator().manual_seed(3)
    with torch.device("meta"):
        template = any_state(architecture)
    return {
        key: torch.rand(value.shape, generator=generator).to(value.dtype) * 0.1 + 0.01
        for key, value in template.items()
        if key.startswith(prefix)
    }


@pytest.mark.parametrize(
    "name, architecture, prefix",
    [
        (RESNET18, "resnet18", ""),
        (RESNET50, "resnet50", ""),
        ("fasterrcnn_resnet50_fpn_v2", "resnet50", ""),
        (FASTER_RCNN, "mobilenet_v3_large", ""),
        (SSDLITE, "mobilenet_v3_large", ""),
        ("ssd300_vgg16", "vgg16", "features"),
    ],
)
def test_the_backbone_gets_the_weights_that_torchvision_gives_it(
    tmp_path: Path, name: str, architecture: str, prefix: str
) -> None:
    state = random_state(architecture, prefix)
    path = tmp_path / "backbone.pth"
    torch.save(state, path)
    model = build_model(name, THREE, weights_backbone=str(path))
    if prefix:  # torchvision's builder needs the classifier, which it cuts off
        with torch.device("meta"):
            classifier = any_state(architecture)
        state = {key: state.get(key, torch.zeros(v.shape)) for key, v in classifier.items()}
    expected = torchvisions(name, 4, state).backbone.state_dict()
    actual = model.backbone.state_dict()
    assert actual.keys() == expected.keys()
    from_file = [key for key in actual if "fpn" not in key and "extra" not in key]
    assert len(from_file) > 20
    assert all(torch.equal(actual[key], expected[key]) for key in from_file)


def test_weights_of_another_backbone_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(random_state("resnet18"), path)
    with pytest.raises(UserError, match=r"--weights-backbone .*resnet18\.pth is not a resnet34"):
        build_model("retinanet_resnet34_fpn", THREE, weights_backbone=str(path))


def test_a_detectors_file_gives_its_backbone(tmp_path: Path) -> None:
    source = build_model(RESNET18, classes("thing"))
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": source.state_dict(), "categories": classes("thing")}, path)
    model = build_model(RESNET18, THREE, weights_backbone=str(path))
    actual, expected = model.backbone.body.state_dict(), source.backbone.body.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in actual.items())
    assert frozen_norms(model)


def logged(caplog: pytest.LogCaptureFixture) -> str:
    text = "\n".join(record.getMessage() for record in caplog.records)
    caplog.clear()
    return text


def test_the_log_lists_what_a_backbone_loads_from_a_file_and_what_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "retinanet")
    path, body = tmp_path / "weights.pth", "backbone.body."
    torch.save(random_state("resnet18"), path)
    build_model(RESNET18, THREE, weights_backbone=str(path))
    text = logged(caplog)
    assert text == (
        f"weights-backbone {path}: 120 tensors loaded, 2 skipped that belong to no backbone: "
        "fc.bias, fc.weight"
    )
    # A run of this project: its averaged weights, without what is no backbone.
    run, average = (build_model(RESNET18, classes(name)).state_dict() for name in ("a", "b"))
    torch.save({"model": run, "ema": average, "args": {}, "categories": classes("a")}, path)
    model = build_model(RESNET18, THREE, weights_backbone=str(path))
    text = logged(caplog)
    assert "the averaged weights (EMA) are taken" in text and "120 tensors loaded" in text
    assert text.endswith("backbone.fpn, head.classification_head, head.regression_head")
    for key, value in model.state_dict().items():
        if key.startswith(body):
            assert torch.equal(value, average[key]), key


# --- weights of the detector, by class name -------------------------------------------------------


def class_scores(model: Any) -> Tensor:
    """Run the classification head on fixed random features: scores [..., class]."""
    generator = torch.Generator().manual_seed(1)

    def features(channels: list[int]) -> list[Tensor]:
        return [torch.randn(1, c, 2, 2, generator=generator) for c in channels]

    model.eval()
    with torch.no_grad():
        if isinstance(model, detection.FasterRCNN):
            pooled = torch.randn(5, 1024, generator=generator)
            return model.roi_heads.box_predictor(pooled)[0]
        if isinstance(model, detection.ssd.SSD):
            channels = [
                next(part for part in level.modules() if isinstance(part, nn.Conv2d)).in_channels
                for level in model.head.classification_head.module_list
            ]
            return model.head.classification_head(features(channels))
        return model.head.classification_head(features([256] * 5))


OLD = classes("cat", "dog", "bird", "fish")
NEW = classes("horse", "fish", "cat", "cow", "dog")
KNOWN = {2: 4, 3: 1, 5: 2, 0: 0}  # label in NEW: that in OLD; background stays


@pytest.mark.parametrize("name", DETECTORS)
def test_class_scores_go_to_the_classes_of_the_same_name(name: str) -> None:
    old, model = quick(name, OLD, seed=1), quick(name, NEW, seed=2)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    new = load_weights(model, Weights("file", old.state_dict(), OLD), NEW)
    assert new == ["horse", "cow"]
    before, after = class_scores(old), class_scores(model)
    assert before.shape[-1] == 5 and after.shape[-1] == 6
    for label, source in KNOWN.items():
        assert torch.allclose(after[..., label], before[..., source], rtol=1e-4, atol=1e-5)
    # All that does not depend on the classes is the same to the bit, also the proposals' head.
    loaded, saved = model.state_dict(), old.state_dict()
    changed = [key for key in saved if saved[key].shape != loaded[key].shape]
    assert all(torch.equal(saved[key], loaded[key]) for key in saved if key not in changed)
    assert all("cls" in key or "classification" in key or "bbox_pred" in key for key in changed)
    assert not any(key.startswith("rpn") for key in changed)
    # The two new classes of six keep what they had, wherever their rows lie.
    for key in changed:
        rows = (loaded[key] == fresh[key]).reshape(len(loaded[key]), -1).all(dim=1)
        assert int(rows.sum()) == len(rows) * 2 // 6


def test_the_log_lists_the_classes_that_are_copied_initialised_and_skipped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "retinanet")
    model, state = quick(RESNET18, NEW, seed=0), quick(RESNET18, OLD, seed=1).state_dict()
    known = [{"name": "__background__", "label": 0}, *OLD]  # as torchvision lists them
    load_weights(model, Weights("file", state, known), NEW)
    assert logged(caplog).splitlines() == [
        f"weights file: {len(state)} tensors loaded",
        "  class scores copied by name: 3 (fish, cat, dog)",
        "  class scores initialised, not in the weights: 2 (horse, cow)",
        "  class scores skipped, not in the data: 1 (bird)",
    ]
    load_weights(model, Weights("file", model.state_dict()), NEW)
    assert "they name no classes: scores are copied in the order" in logged(caplog)


def test_other_anchor_sizes_than_the_weights_are_warned_of_and_other_numbers_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, sizes = tmp_path / "best.pth", [16, 32, 64, 128, 256]
    trained = build_model(RESNET18, THREE, anchor_sizes=sizes)
    flags = {"anchor_sizes": sizes, "anchor_ratios": None}
    torch.save({"model": trained.state_dict(), "categories": THREE, "args": flags}, path)
    build_model(RESNET18, THREE, weights=str(path), anchor_sizes=tuple(sizes))
    assert "trained with" not in logged(caplog)
    build_model(RESNET18, THREE, weights=str(path))
    assert "trained with --anchor-sizes 16 32 64 128 256, not default" in logged(caplog)
    with pytest.raises(UserError, match="have 9 anchors per cell, and --anchor-ratios make 3"):
        build_model(RESNET18, THREE, weights=str(path), anchor_ratios=[1])
    with pytest.raises(UserError, match="--anchor-ratios 1 is for RetinaNet, not for fcos"):
        build_model("fcos_resnet50_fpn", THREE, anchor_ratios=[1])


@pytest.mark.parametrize("name", [RESNET18, "fcos_resnet50_fpn"])
def test_new_classes_begin_with_the_score_that_the_focal_loss_wants(name: str) -> None:
    model = build_model(name, NEW)
    load_weights(model, Weights("file", quick(name, OLD, 1).state_dict(), OLD), NEW)
    bias = model.head.classification_head.cls_logits.bias.reshape(-1, 6).sigmoid()
    expected = torch.full_like(bias, 0.01)
    for label in KNOWN:
        expected[:, label] = bias[:, label]
        assert (bias[:, label] > 0.3).all()
    assert torch.allclose(bias, expected)


def test_box_regression_per_class_goes_to_the_class_of_the_same_name() -> None:
    old, model = quick(FASTER_RCNN, OLD, 1), quick(FASTER_RCNN, NEW, 2)
    load_weights(model, Weights("file", old.state_dict(), OLD), NEW)
    features = torch.randn(5, 1024)
    with torch.no_grad():
        before = old.roi_heads.box_predictor(features)[1].reshape(5, 5, 4)
        after = model.roi_heads.box_predictor(features)[1].reshape(5, 6, 4)
    for label, source in KNOWN.items():
        assert torch.allclose(after[:, label], before[:, source], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 4, 11])
def test_the_proposals_of_faster_rcnn_do_not_depend_on_the_classes(num_classes: int) -> None:
    # Its proposal head has layers of the same names as those of classes.
    names = [f"class {i}" for i in range(num_classes)]
    old = quick(FASTER_RCNN, classes(*names), 1)
    for target in (classes(*names), classes(*reversed(names)), classes("other", *names)):
        model = quick(FASTER_RCNN, target, 2)
        load_weights(model, Weights("file", old.state_dict(), classes(*names)), target)
        saved, loaded = old.rpn.state_dict(), model.rpn.state_dict()
        assert all(torch.equal(saved[key], loaded[key]) for key in saved)


@pytest.mark.parametrize("name", [RESNET18, SSDLITE, FASTER_RCNN])
def test_with_the_same_labels_the_weights_are_taken_to_the_bit(name: str) -> None:
    # Also in the rows of labels that no class has, as of the 91 labels of COCO: a softmax over all
    # labels sees those, too.
    gaps = [{"name": "cat", "label": 1}, {"name": "dog", "label": 3}, {"name": "cow", "label": 6}]
    old, model = quick(name, gaps, 1), quick(name, gaps, 2)
    assert load_weights(model, Weights("file", old.state_dict(), gaps), gaps) == []
    saved, loaded = old.state_dict(), model.state_dict()
    assert [key for key in saved if not torch.equal(saved[key], loaded[key])] == []


def test_weights_without_class_names_need_the_same_number_of_classes() -> None:
    old, same = quick(RESNET18, OLD, 1), quick(RESNET18, classes("a", "b", "c", "d"), 2)
    load_weights(same, Weights("file", old.state_dict()), classes("a", "b", "c", "d"))
    assert torch.equal(class_scores(same), class_scores(old))
    with pytest.raises(
        UserError, match="--weights some.pth does not fit --model and the classes: 2 tensors"
    ):
        load_weights(quick(RESNET18, NEW, 2), Weights("some.pth", old.state_dict()), NEW)


@pytest.mark.parametrize("label_map", [None, OLD])
@pytest.mark.parametrize("other", ["retinanet_resnet34_fpn", "fcos_resnet50_fpn", FASTER_RCNN])
def test_weights_of_another_architecture_are_refused(
    other: str, label_map: LabelMap | None
) -> None:
    weights = Weights("some.pth", quick(other, OLD, 1).state_dict(), label_map)
    for target in (OLD, NEW):
        with pytest.raises(UserError, match=r"--weights some\.pth does not fit --model"):
            load_weights(quick(RESNET18, target, 2), weights, target)


def test_frozen_and_trained_batch_norm_take_each_others_weights() -> None:
    plain = quick(RESNET18, OLD, 1)
    frozen = build_model(RESNET18, OLD, load=False, weights="given")
    load_weights(frozen, Weights("file", plain.state_dict()), OLD)
    again = quick(RESNET18, OLD, 2)
    load_weights(again, Weights("file", frozen.state_dict()), OLD)
    state = plain.state_dict()
    for key, value in again.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(value, state[key])


def test_a_file_may_be_a_checkpoint_whose_average_is_preferred(tmp_path: Path) -> None:
    one, two = torch.zeros(2), torch.ones(2)
    contents = {
        "plain": {"w": one},
        "model": {"model": {"w": one}, "ema": None, "categories": OLD},
        "ema": {"model": {"w": two}, "ema": {"w": one}, "categories": OLD},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
        weights = read_weights(str(tmp_path / name), "--weights")
        assert weights.state.keys() == {"w"} and torch.equal(weights.state["w"], one)
        assert weights.label_map == (None if name == "plain" else OLD)
        assert weights.published is None


# --- torchvision's published weights --------------------------------------------------------------


@pytest.fixture(scope="module")
def coco_v1(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A file like the published one: 91 classes, statistics that make the missing eps matter."""
    torch.manual_seed(0)
    model = torchvisions(RESNET50, 91, any_state("resnet50"))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                # Small variances, and weights that keep the activations in range.
                module.running_var.copy_(10 ** (-3.5 + 2 * torch.rand_like(module.running_var)))
                module.weight.copy_(module.running_var.sqrt() * 0.8)
                module.bias.normal_(std=0.1)
        # Scores far enough apart that rounding does not change their order.
        model.head.classification_head.cls_logits.weight.mul_(500)
    path = tmp_path_factory.mktemp("published") / COCO_FILE
    torch.save(model.state_dict(), path)
    return SimpleNamespace(path=path, state=model.state_dict(), model=model.eval())


def detect(model: nn.Module, eps: float | None = None) -> dict[str, Tensor]:
    if eps is not None:
        overwrite_eps(model, eps)
    images = [torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(5))]
    model.eval()
    model.transform.min_size, model.transform.max_size = (64,), 96
    model.score_thresh = 0.05
    with torch.inference_mode():
        return model(images)[0]


def as_close(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return (
        torch.equal(one["labels"], two["labels"])
        and torch.allclose(one["scores"], two["scores"], rtol=1e-4)
        and torch.allclose(one["boxes"], two["boxes"], rtol=1e-4, atol=1e-3)
    )


def coco_label_map() -> LabelMap:
    names = COCO_V1.meta["categories"]
    return [{"name": n, "label": i} for i, n in enumerate(names) if i > 0 and n != "N/A"]


def test_a_file_of_a_published_name_is_known_and_its_missing_eps_folded_in(
    coco_v1: SimpleNamespace,
) -> None:
    weights = read_weights(str(coco_v1.path), "--weights")
    assert weights.published is COCO_V1
    assert weights.label_map is not None and len(weights.label_map) == 81  # with the background
    assert {c["name"]: c["label"] for c in weights.label_map}["toothbrush"] == 90
    model = build_model(RESNET50, coco_label_map(), load=False, weights="given")
    load_weights(model, Weights("file", weights.state, None, COCO_V1), coco_label_map())

    expected = detect(coco_v1.model, eps=0.0)
    assert len(expected["scores"]) > 20
    assert as_close(detect(model), expected)
    # What was folded in is in the state dict, so a plain torchvision model computes the same.
    plain = torchvisions(RESNET50, 91, any_state("resnet50"))
    plain.load_state_dict(model.state_dict())
    assert as_close(detect(plain), expected)
    # And it does matter.
    assert not as_close(detect(coco_v1.model, eps=1e-5), expected)


def test_published_weights_are_loaded_for_coco_as_torchvision_loads_them(
    coco_v1: SimpleNamespace,
) -> None:
    model = build_model(RESNET50, coco_label_map(), weights=str(coco_v1.path))
    loaded = model.state_dict()
    assert loaded.keys() == coco_v1.state.keys()
    for key, value in coco_v1.state.items():
        expected = value - 1e-5 if key.endswith("running_var") else value
        assert torch.equal(loaded[key], expected), key


def test_a_file_of_another_name_keeps_its_eps(coco_v1: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "mine.pth"
    path.symlink_to(coco_v1.path)
    weights = read_weights(str(path), "--weights")
    assert weights.published is None and weights.label_map is None
    model = build_model(RESNET50, coco_label_map(), weights=str(path))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in coco_v1.state.items())


def test_the_weights_without_eps_are_those_that_torchvision_treats_so() -> None:
    # Found by running its builders, with nothing to load: which of them set another eps?
    without = []
    for name in models.list_models(module=detection):
        if name.startswith(("mask", "keypoint")):
            continue
        for weights in models.get_model_weights(name):
            with (
                mock.patch.object(models.WeightsEnum, "get_state_dict"),
                mock.patch.object(nn.Module, "load_state_dict"),
                torch.device("meta"),
            ):
                model = models.get_model(name, weights=weights)
            norms = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
            if any(norm.eps == 0 for norm in norms):
                without.append(weights)
    assert set(without) == set(ZERO_EPS) and len(without) == 2


# --- names, the cache and the network -------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch, and no network."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize(
    "flag, source, file",
    [
        ("--weights", "RetinaNet_ResNet50_FPN_Weights.COCO_V1", COCO_FILE),
        ("--weights-backbone", "ResNet50_Weights.IMAGENET1K_V1", "resnet50-0676ba61.pth"),
    ],
)
def test_weights_that_cannot_be_downloaded_are_named_with_their_path(
    cache: Path, flag: str, source: str, file: str
) -> None:
    key = flag.removeprefix("--").replace("-", "_")
    with pytest.raises(UserError) as error:
        build_model(RESNET50, coco_label_map(), **{key: source})
    message = str(error.value)
    assert all(word in message for word in (flag, source, file, str(cache), "put the file there"))
    assert "Name or service not known" in message
    # There, it is found.
    cache.mkdir(parents=True, exist_ok=True)
    torch.save({"w": torch.ones(2)}, cache / file)
    weights = read_weights(source, flag)
    assert torch.equal(weights.state["w"], torch.ones(2))
    assert weights.published is models.get_weight(source)


def test_a_server_that_refuses_is_reported_in_the_same_way(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise HTTPError("https://x", 403, "Forbidden", None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    with pytest.raises(UserError, match=r"resnet50-0676ba61\.pth is not in .*403"):
        read_weights("ResNet50_Weights.IMAGENET1K_V1", "--weights-backbone")


@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\3\4 cut short"])
def test_a_damaged_file_is_named_wherever_it_lies(
    cache: Path, tmp_path: Path, content: bytes
) -> None:
    cache.mkdir(parents=True)
    file = "resnet50-0676ba61.pth"
    for path in (cache / file, tmp_path / "given.pth"):
        path.write_bytes(content)
    for source, name in (
        (str(tmp_path / "given.pth"), "given.pth"),
        ("ResNet50_Weights.IMAGENET1K_V1", file),
    ):
        with pytest.raises(UserError, match="--weights-backbone") as error:
            read_weights(source, "--weights-backbone")
        assert name in str(error.value)


@pytest.mark.parametrize(
    "source",
    ["nowhere.pth", "runs/x/best.pth", "ResNet50_Weights.NOPE", "ResNet50_Weights", "x.y.z", " "],
)
def test_an_unknown_name_is_refused_with_an_example(cache: Path, source: str) -> None:
    with pytest.raises(UserError, match="neither a file nor the name of") as error:
        read_weights(source, "--weights")
    assert f"--weights {source}" in str(error.value)
    assert "ResNet50_Weights.IMAGENET1K_V1" in str(error.value)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("RetinaNet_ResNet50_FPN_Weights.COCO_V9", "RetinaNet_ResNet50_FPN_Weights.COCO_V1"),
        ("retinanet_resnet50_fpn_v2_weights.coco_v1", "RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1"),
        ("ResNet50_Weights.IMAGENET_V2", "ResNet50_Weights.IMAGENET1K_V2"),
    ],
)
def test_the_known_names_most_like_an_unknown_one_are_listed(source: str, name: str) -> None:
    with pytest.raises(UserError) as error:
        read_weights(source, "--weights")
    assert name in str(error.value) and len(str(error.value)) < 300


def test_the_backbone_is_not_read_where_the_whole_detector_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "detector.pth"
    torch.save({"model": build_model(RESNET18, THREE).state_dict(), "categories": THREE}, path)
    missing = "ResNet18_Weights.NOT_EVEN_A_NAME"
    both = build_model(RESNET18, THREE, weights=str(path), weights_backbone=missing)
    assert f"--weights-backbone {missing} is not read" in logged(caplog)
    alone = build_model(RESNET18, THREE, weights=str(path))
    for name, parameter in alone.named_parameters():
        other = both.get_parameter(name)
        assert torch.equal(parameter, other) and parameter.requires_grad == other.requires_grad


def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path) -> None:
    for content in ([1, 2], torch.ones(2), 5, "text"):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UserError, match=r"--weights .*other\.pth"):
            read_weights(str(tmp_path / "other.pth"), "--weights")


class Malice:
    """Unpickling it creates a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (str(self.canary),)


def test_weights_that_do_not_match_their_hash_are_refused(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.pth"
    shutil.copy(trained, path)
    shutil.copy(sidecar(trained), sidecar(path))
    assert read_weights(str(path), "--weights").state
    flip_a_bit(path)
    with pytest.raises(UserError, match=r"copy.pth: damaged, it does not match copy.pth.sha256"):
        read_weights(str(path), "--weights")


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_malicious_weights_are_refused_and_do_nothing(
    cache: Path, tmp_path: Path, form: str
) -> None:
    canary = tmp_path / "canary"
    content = {"model": {"w": torch.zeros(2)}, "args": Malice(canary)}
    cache.mkdir(parents=True)
    in_cache = cache / "resnet50-0676ba61.pth"
    for path in (tmp_path / "given.pth", in_cache):
        if form == "pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    for source in (str(tmp_path / "given.pth"), "ResNet50_Weights.IMAGENET1K_V1"):
        with pytest.raises(UserError, match="--weights"):
            read_weights(source, "--weights")
        assert not canary.exists()
    # It would work on who unpickles it.
    if form != "pickle":
        torch.load(in_cache, weights_only=False)
        assert canary.exists()


# --- to evaluate ----------------------------------------------------------------------------------


def test_load_trained_takes_checkpoints_and_plain_state_dicts() -> None:
    source = quick(RESNET18, OLD, 1)
    state = source.state_dict()
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    for content in (
        state,
        {"model": state, "ema": None, "step": 3},
        {"model": other, "ema": state, "step": 3},
    ):
        model = quick(RESNET18, OLD, 2)
        load_trained(model, content, "some.pth")
        assert torch.equal(class_scores(model), class_scores(source))
    frozen = build_model(RESNET18, OLD, load=False, weights="given")
    load_trained(frozen, state, "some.pth")  # without its counts of batches
    load_trained(quick(RESNET18, OLD, 2), frozen.state_dict(), "some.pth")


@pytest.mark.parametrize(
    "content, words",
    [
        (
            lambda: quick(RESNET18, NEW, 1).state_dict(),
            " does not fit --model and the classes: 2 tensors",
        ),
        (lambda: quick("retinanet_resnet34_fpn", OLD, 1).state_dict(), " does not fit --model"),
        (lambda: {"model": quick(SSDLITE, OLD, 1).state_dict()}, " does not fit --model"),
        (lambda: {}, ": not weights, .*: it is empty"),
        (lambda: {"model": [1, 2]}, ": its weights are a list, not tensors by name"),
        (lambda: {"step": 3, "args": {"lr": 0.1}}, ": not weights, .*: step, args is no tensor"),
    ],
    ids=["classes", "architecture", "detector", "empty", "list", "no model"],
)
def test_load_trained_refuses_what_does_not_fit_and_names_it(
    content: Callable[[], dict[str, Any]], words: str
) -> None:
    with pytest.raises(UserError, match=rf"--resume some\.pth{words}"):
        load_trained(quick(RESNET18, OLD, 2), content(), "some.pth")


def training_targets() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Return two images of other sizes than the model's, with boxes and labels."""
    torch.manual_seed(0)
    boxes = torch.tensor([[10.0, 20.0, 83.0, 141.0], [50.0, 33.0, 121.0, 90.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    return [torch.rand(3, 150, 170) for _ in range(2)], [target, target]


def recorded(module: Any, name: str, calls: list[Any]) -> None:
    """Let `module` note what its method `name` takes and returns."""
    original = getattr(module, name)

    def method(*inputs: Any, **options: Any) -> Any:
        result = original(*inputs, **options)
        calls.append((inputs, result))
        return result

    setattr(module, name, method)


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("fasterrcnn_resnet50_fpn", {"min_size": 224, "max_size": 256}),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", {"min_size": 224, "max_size": 256}),
        ("fcos_resnet50_fpn", {"min_size": 224, "max_size": 256}),
        ("ssdlite320_mobilenet_v3_large", {}),
    ],
)
def test_boxes_and_losses_are_fp32_in_training_under_autocast(
    name: str, sizes: dict[str, int]
) -> None:
    torch.manual_seed(0)
    model = build_model(name, THREE, **sizes).train()
    images, targets = training_targets()
    stage = model.rpn if hasattr(model, "rpn") else model
    head = stage.head.forward
    outputs: Any = []

    def same_outputs(features: Any) -> Any:
        """Return what the head did in bf16: in bf16 again, or the same numbers in fp32."""
        if not outputs:
            outputs.append(head(features))
        to = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        return tree_map_only(torch.Tensor, lambda x: x.detach().to(to), outputs[0])

    stage.head.forward = same_outputs
    anchors: list[Any] = []
    stage.anchor_generator.register_forward_hook(lambda m, i, out: anchors.append(out))
    decoded: list[Any] = []
    losses: list[Any] = []
    recorded(stage.box_coder, "decode", decoded)
    recorded(stage, "compute_loss", losses)
    for dtype in (torch.bfloat16, None):  # autocast first: what it rounded would stay
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            model(images, targets)
    for mixed, full in zip(anchors[0], anchors[1], strict=True):
        assert mixed.dtype == torch.float32 and torch.equal(mixed, full)
    inputs, results = ([tree_leaves(call[i]) for call in losses] for i in (0, 1))
    assert len(results) == 2 and results[0]
    for which in (*zip(*inputs, strict=True), *zip(*results, strict=True)):
        if isinstance(which[0], torch.Tensor):  # head outputs, anchors, targets, matches; losses
            assert which[0].dtype == which[1].dtype and torch.equal(*which)
            assert which[0].dtype in (torch.float32, torch.int64)
    if hasattr(model, "rpn"):
        (_, mixed), (_, full) = decoded
        assert mixed.dtype == torch.float32 and torch.equal(mixed, full)


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"])
def test_faster_rcnn_trains_its_second_stage_on_fp32_boxes(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, THREE, min_size=128, max_size=160).train()
    proposals: list[Any] = []
    predicted: list[Any] = []
    recorded(model.roi_heads, "select_training_samples", proposals)
    model.roi_heads.box_predictor.register_forward_hook(lambda m, i, out: predicted.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*training_targets())
    for tensor in tree_leaves((proposals, predicted, losses)):
        if isinstance(tensor, torch.Tensor):
            assert tensor.dtype in (torch.float32, torch.int64)


def test_a_scalar_to_log_is_no_part_of_the_loss() -> None:
    loss = torch.tensor(2.0, requires_grad=True)
    outputs = {"classification": loss, "log_boxes": torch.tensor(torch.nan), "bbox": 3 * loss}
    total = total_loss(outputs)
    total.backward()
    assert total == 8 and loss.grad == 4


def test_the_warm_up_of_ddp_is_in_the_precision_of_training(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        for dtype in (torch.bfloat16, None):
            model = build_model(RESNET18, THREE, min_size=64, max_size=64)
            model.backbone.body.register_forward_hook(lambda m, i, out: seen.append(out["0"].dtype))
            wrap(model, torch.device("cpu"), 2, False, dtype)
    finally:
        dist.destroy_process_group()
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2
