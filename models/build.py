"""Builds torchvision's box detectors, and RetinaNet on any ResNet.

Every architecture, its freezing and its initialisation are those of torchvision's own builders.
What differs: RetinaNet gets the training path of `retinanet.py`, every detector a transform that
makes no GPU wait, and weights are only ever read as tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import (
    _validate_trainable_layers,
    resnet_fpn_backbone,
)
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from models import retinanet
from models.folding import fold_frozen_batch_norm
from models.precision import keep_boxes_in_fp32
from models.transform import BatchTransform
from models.weights import (
    LabelMap,
    Weights,
    compare_anchors,
    load_weights,
    published_weights,
    read_weights,
)
from utils import UserError, logger


def model_names() -> list[str]:
    """Return every name that `build_model` takes."""
    resnets = models.list_models(module=models, include=["resnet*", "resnext*", "wide_resnet*"])
    boxes_only = models.list_models(module=detection, exclude=["maskrcnn*", "keypointrcnn*"])
    return sorted({*boxes_only, *(f"retinanet_{name}_fpn" for name in resnets)})


def check_model_name(name: str) -> None:
    """Raise UserError, with the reason, for a model that `build_model` does not take."""
    if name.startswith(("maskrcnn", "keypointrcnn")):
        raise UserError(
            f"--model {name} predicts more than boxes, and masks and keypoints are not read here; "
            "choose a box detector, such as fasterrcnn_resnet50_fpn"
        )
    if name not in model_names():
        raise UserError(f"--model {name} is unknown; choose one of {', '.join(model_names())}")


def build_model(
    name: str,
    label_map: LabelMap,
    resize_in_training: bool = True,
    load: bool = True,
    allow_new_classes: bool = True,
    *,
    weights: str | None = None,
    weights_backbone: str | None = None,
    trainable_backbone_layers: int | None = None,
    min_size: int | None = None,
    max_size: int | None = None,
    anchor_sizes: Sequence[int] | None = None,
    anchor_ratios: Sequence[float] | None = None,
    score_thresh: float | None = None,
    nms_thresh: float | None = None,
    detections_per_image: int | None = None,
    topk_candidates: int | None = None,
    sync_bn: bool = False,
    **training_options: Any,
) -> nn.Module:
    """Build a detector as torchvision builds it, with weights if asked for.

    Args:
        name: one of `model_names`.
        label_map: the classes, `{"name", "label"}` each; labels count from 1, 0 is background.
        resize_in_training: False if the data's augmentation chooses the size.
        load: False builds the same architecture, frozen alike, without reading the weights.
        allow_new_classes: False refuses `weights` that do not know every class.
        weights: of the whole detector, a torchvision name or a file; classes match by name.
        weights_backbone: of the backbone, a torchvision name or a file; not read if there are
            `weights`. With either, torchvision freezes the first layers and, but for v2 and SSD,
            batch normalisation; without, all is trained.
        trainable_backbone_layers: counted from the last; None is torchvision's choice.
        min_size, max_size: of the resized image, pixels; None is torchvision's, as in the next two
            lines.
        anchor_sizes, anchor_ratios: RetinaNet only; see `make_anchor_generator`.
        score_thresh, nms_thresh, detections_per_image, topk_candidates: least score, largest IoU,
            limit per image, and limit per level (SSD: per class) before NMS.
        sync_bn: batch statistics over all processes.
        training_options: RetinaNet only; fields of `retinanet.TrainingOptions`.

    Raises:
        UserError: names the flag and the fix, for an unknown name or setting and for weights that
            are missing or do not fit.
    """
    check_model_name(name)
    num_classes = max(category["label"] for category in label_map) + 1
    flags = {"min_size": min_size, "max_size": max_size}
    sizes = {key: value for key, value in flags.items() if value is not None}
    if sizes and name.startswith("ssd"):
        raise UserError(f"--min-size and --max-size: {name} has one fixed size; leave them out")
    options = retinanet.TrainingOptions(**training_options)
    anchors = retinanet.make_anchor_generator(anchor_sizes, anchor_ratios)
    if not name.startswith("retinanet"):
        _refuse_options(name, options, anchor_sizes=anchor_sizes, anchor_ratios=anchor_ratios)
    backbone = None
    if load and weights_backbone and weights:
        logger.warning("--weights-backbone %s is not read: --weights replaces it", weights_backbone)
    elif load and weights_backbone:
        backbone = read_weights(weights_backbone, "--weights-backbone")
    # Only ssdlite has a smaller backbone if that was not trained before it became a detector.
    is_trained = bool(weights_backbone or (weights and not name.startswith("ssdlite")))
    if trainable_backbone_layers is not None and not is_trained:
        raise UserError(
            "--trainable-backbone-layers freezes layers that nobody trained; leave it "
            "out, or give --weights-backbone or --weights"
        )
    model = _build(
        name,
        backbone,
        anchors,
        is_trained,
        num_classes=num_classes,
        trainable_backbone_layers=trainable_backbone_layers,
        **sizes,
    )
    if isinstance(model, detection.RetinaNet):
        model.__class__ = retinanet.RetinaNet  # the same modules, with our training path
        model.options = options
    model.transform = BatchTransform(model.transform, resize_in_training)
    stage = getattr(model, "roi_heads", model)
    for attribute, value in (
        ("score_thresh", score_thresh),
        ("nms_thresh", nms_thresh),
        ("detections_per_img", detections_per_image),
        ("topk_candidates", topk_candidates),
    ):
        if value is not None and not hasattr(stage, attribute):  # Faster R-CNN has two stages
            flag = attribute.replace("_", "-")
            raise UserError(f"--{flag} {value}: {name} has no such limit; leave it out")
        if value is not None:
            setattr(stage, attribute, value)
    keep_boxes_in_fp32(model)
    fold_frozen_batch_norm(model)
    if load and weights:
        source = read_weights(weights, "--weights")
        compare_anchors(model, source, anchor_sizes, anchor_ratios)
        new = load_weights(model, source, label_map)
        if new and not allow_new_classes:
            raise UserError(
                f"--weights {weights} do not know the classes {', '.join(new[:10])}, so there is "
                "nothing to test; train on them first, or give data with the weights' classes"
            )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if sync_bn else model


def _refuse_options(name: str, options: retinanet.TrainingOptions, **anchors: Any) -> None:
    """Raise UserError for options that a model which is no RetinaNet cannot use."""
    defaults = dataclasses.asdict(retinanet.TrainingOptions())
    values = {**dataclasses.asdict(options), **anchors}
    for key, value in values.items():
        if value != defaults.get(key):
            text = value if isinstance(value, str) else " ".join(map(str, value))
            flag = key.replace("_", "-")
            raise UserError(f"--{flag} {text} is for RetinaNet, not for {name}; leave it out")


def load_detector(
    source: str, device: torch.device | str = "cpu", **post_processing: Any
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Load a detector to predict with: a checkpoint of train.py, or torchvision's weights by name.

        model, label_map = load_detector("runs/coco/best.pth")
        (detections,) = model([decode_image("street.jpg", "RGB") / 255])

    Args:
        source: a checkpoint, whose averaged weights (EMA) are preferred, or a name such as
            RetinaNet_ResNet50_FPN_Weights.COCO_V1.
        post_processing: `score_thresh` and so on, as in `build_model`; the default is what the run
            was evaluated with.

    Returns:
        The detector in evaluation mode, and its classes: `{"id", "name", "label"}` each.

    Raises:
        UserError: says what is wrong with `source`.
    """
    weights = read_weights(source, "detector")
    if weights.published is not None:
        name, settings = published_weights().get(weights.published), {"weights": source}
        if not name or weights.label_map is None:
            raise UserError(f"{source}: not weights of a box detector")
    else:
        if not weights.settings or weights.label_map is None:
            raise UserError(f"{source} is no checkpoint of train.py: it does not name its classes")
        # What the run was built with; inference does not depend on options of training.
        flags = inspect.signature(build_model).parameters.keys() - {"sync_bn"}
        settings = {key: value for key, value in weights.settings.items() if key in flags}
        name = weights.settings["model"]
    label_map = [{"id": c["label"], **c} for c in weights.label_map]
    model = build_model(name, label_map, load=False, **settings | post_processing)
    load_weights(model, weights, label_map)
    return model.eval().to(device).to(memory_format=torch.channels_last), label_map


def _build(
    name: str,
    backbone: Weights | None,
    anchors: AnchorGenerator,
    is_trained: bool,
    **settings: int | None,
) -> nn.Module:
    """Call torchvision's own builder, or for other ResNets one that does the same."""
    if name in models.list_models(module=detection):
        builder = models.get_model_builder(name)
        annotation = inspect.signature(builder).parameters["weights_backbone"].annotation
        published = get_args(annotation)[0]  # the class of weights that this backbone has
        architecture = published.__name__.removesuffix("_Weights").lower()
    else:
        architecture = name.removeprefix("retinanet_").removesuffix("_fpn")
        published = models.get_model_weights(architecture)
        builder = functools.partial(_retinanet, architecture)
    state = _backbone_state(backbone, architecture)
    with (
        # Builders take this state where they would download and unpickle weights.
        _replaced(models.WeightsEnum, "get_state_dict", lambda *_, **__: state),
        _replaced(detection.retinanet, "_default_anchorgen", lambda: anchors),
    ):
        weights_backbone = next(iter(published)) if is_trained else None
        return builder(weights=None, weights_backbone=weights_backbone, **settings)


def _retinanet(
    resnet: str,
    weights: None,
    weights_backbone: models.WeightsEnum | None,
    num_classes: int,
    trainable_backbone_layers: int | None,
    **sizes: int,
) -> detection.RetinaNet:
    """Do for any ResNet what torchvision's `retinanet_resnet50_fpn` does for ResNet-50."""
    is_trained = weights_backbone is not None
    body = resnet_fpn_backbone(
        backbone_name=resnet,
        weights=weights_backbone,
        norm_layer=FrozenBatchNorm2d if is_trained else nn.BatchNorm2d,
        trainable_layers=_validate_trainable_layers(is_trained, trainable_backbone_layers, 5, 3),
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return detection.RetinaNet(body, num_classes, **sizes)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _backbone_state(weights: Weights | None, architecture: str) -> dict[str, Tensor]:
    """Return a state that fits the whole classifier `architecture`, random where `weights` lack it.

    A detector's backbone lacks the classifier's last layers, which the builder cuts off anyway.
    """
    template = models.get_model(architecture).state_dict()
    if weights is None:
        return template
    state = {key.removeprefix("backbone.body."): value for key, value in weights.state.items()}
    fitting = {k: v for k, v in state.items() if k in template and v.shape == template[k].shape}
    optional = re.compile(r"^(fc|classifier)\.|num_batches_tracked$")
    wrong = [key for key in template if key not in fitting and not optional.search(key)]
    if wrong:
        raise UserError(
            f"--weights-backbone {weights.source} is not a {architecture}: {len(wrong)} of its "
            f"tensors are missing or of another shape, such as {wrong[0]}"
        )
    skipped = [key for key in state if key not in template or optional.match(key)]
    parts = ", ".join(sorted({".".join(key.split(".")[:2]) for key in skipped}))
    logger.info(
        "weights-backbone %s: %d tensors loaded, %d skipped that belong to no backbone%s",
        *(weights.source, len(state) - len(skipped), len(skipped), f": {parts}" if parts else ""),
    )
    return template | fitting
