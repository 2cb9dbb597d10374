"""Builds torchvision's box detectors and loads weights into them, by class name.

Every architecture, its freezing and its initialisation are those of torchvision's own builders.
What differs: RetinaNet gets the training path of `retinanet.py`, every detector a transform that
makes no GPU wait, and weights are only ever read as tensors (`weights_only=True`), which the
builders' own loading does not ensure.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_map_only
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from models import retinanet
from models.folding import fold_frozen_batch_norm
from utils import UserError, printable

logger = logging.getLogger("retinanet")

# torchvision trained these with a FrozenBatchNorm2d that had no eps (pytorch/vision#2933).
ZERO_EPS = (
    detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1,
    detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
)
# One per level of the pyramid, and height / width: section 4 of the paper, as torchvision has it.
ANCHOR_SIZES, ANCHOR_RATIOS = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)
# The parameters whose rows belong to classes: of RetinaNet, FCOS and SSD, then of Faster R-CNN.
CLASS_ROWS = re.compile(
    r"^head\.classification_head\.(cls_logits|module_list\.\d+(\.1)?)\.(weight|bias)$"
    r"|^roi_heads\.box_predictor\.(cls_score|bbox_pred)\.(weight|bias)$"
)
HALF = (torch.bfloat16, torch.float16)
# What a checkpoint says of a run that its model needs for inference: arguments of `build_model`.
INFERENCE = (
    *("weights", "weights_backbone", "min_size", "max_size"),
    *("score_thresh", "nms_thresh", "detections_per_image", "topk_candidates"),
    *("anchor_sizes", "anchor_ratios"),
)


class BatchTransform(GeneralizedRCNNTransform):
    """torchvision's normalisation, resizing and batching without a wait between host and device.

    torchvision copies means and ratios to the device for every image, and each copy waits. The
    values are the same. Batches are channels-last, which convolutions prefer;
    `resize_in_training=False` leaves the size to the data's augmentation.
    """

    def __init__(self, base: GeneralizedRCNNTransform, resize_in_training: bool = True) -> None:
        super().__init__(
            base.min_size,
            base.max_size,
            base.image_mean,
            base.image_std,
            base.size_divisible,
            base.fixed_size,
        )
        self.resize_in_training = resize_in_training
        for name, values in (("mean", base.image_mean), ("std", base.image_std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def normalize(self, image: Tensor) -> Tensor:
        """Subtract the mean and divide by the standard deviation; image `[3, H, W]` in 0..1."""
        return (image - self.mean) / self.std

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resize an image `[3, H, W]`, and its boxes, to the size of training or inference."""
        if self.training and not self.resize_in_training:
            return image, target
        height, width = image.shape[-2:]
        if self.fixed_size is not None:
            size = list(self.fixed_size[::-1])  # torchvision keeps it as (W, H)
            image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
        else:
            scale = _scale(height, width, self._shorter_side(), self.max_size)
            image = F.interpolate(
                image[None],
                scale_factor=scale,
                mode="bilinear",
                recompute_scale_factor=True,
                align_corners=False,
            )[0]
        if target is None:
            return image, target
        # In float32, as torchvision divides.
        ratio_y = float(np.float32(image.shape[-2]) / np.float32(height))
        ratio_x = float(np.float32(image.shape[-1]) / np.float32(width))
        x1, y1, x2, y2 = target["boxes"].unbind(1)
        boxes = torch.stack([x1 * ratio_x, y1 * ratio_y, x2 * ratio_x, y2 * ratio_y], dim=1)
        return image, {**target, "boxes": boxes}

    def _shorter_side(self) -> int:
        if self.training and len(self.min_size) > 1:
            return self.torch_choice(self.min_size)
        return self.min_size[-1]

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Pad images right and below to one size, divisible as told: `[N, 3, H, W]`."""
        height, width = (
            math.ceil(max(image.shape[axis] for image in images) / size_divisible) * size_divisible
            for axis in (1, 2)
        )
        batch = torch.empty(
            (len(images), images[0].shape[0], height, width),
            dtype=images[0].dtype,
            device=images[0].device,
            memory_format=torch.channels_last,
        ).zero_()
        for padded, image in zip(batch, images, strict=True):
            padded[:, : image.shape[1], : image.shape[2]].copy_(image)
        return batch

    def resized_sizes(self, sizes: np.ndarray) -> np.ndarray:
        """Return the size (H, W) of each image after inference resized it, `[I, 2]`."""
        if self.fixed_size is not None:
            return np.broadcast_to(np.array(self.fixed_size[::-1]), sizes.shape)
        scale = _scale(sizes[:, 0], sizes[:, 1], self.min_size[-1], self.max_size)
        return np.floor(sizes * np.asarray(scale)[:, None])

    def padded_sizes(self, sizes: np.ndarray) -> np.ndarray:
        """Return the size (H, W) of each image after inference resized and padded it, `[I, 2]`."""
        resized = self.resized_sizes(sizes)
        return (np.ceil(resized / self.size_divisible) * self.size_divisible).astype(np.int64)


def _scale(height: Any, width: Any, shorter: int, longest: int) -> Any:
    """Return the factor to the shorter side `shorter`, or less if the other exceeds `longest`."""
    if isinstance(height, np.ndarray):
        return np.minimum(shorter / np.minimum(height, width), longest / np.maximum(height, width))
    return min(shorter / min(height, width), longest / max(height, width))


class FullPrecisionP6P7(LastLevelP6P7):
    """The two coarsest levels in fp32 on a CPU, also under autocast.

    A bf16 3 x 3 convolution of stride 2 over a map one column wide gets a weight gradient from
    uninitialised memory there (torch 2.14.1 with oneDNN), NaN at times. P6 of a 64 px wide image is
    such a map. The two levels cost next to nothing.
    """

    def __init__(self, base: LastLevelP6P7) -> None:
        super().__init__(base.p6.in_channels, base.p6.out_channels)
        self.p6, self.p7 = base.p6, base.p7

    def forward(
        self, p: list[Tensor], c: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """Append P6 and P7 to the feature maps `p`."""
        if p[-1].device.type != "cpu":
            return super().forward(p, c, names)
        with torch.autocast("cpu", enabled=False):
            return super().forward([*p[:-1], p[-1].float()], [*c[:-1], c[-1].float()], names)


def model_names() -> list[str]:
    """Return every name that `build_model` takes."""
    resnets = models.list_models(module=models, include=["resnet*", "resnext*", "wide_resnet*"])
    boxes_only = [
        name
        for name in models.list_models(module=detection)
        if not name.startswith(("maskrcnn", "keypointrcnn"))
    ]
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


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and what is known of where they come from."""

    source: str
    state: dict[str, Tensor]
    label_map: Sequence[Mapping[str, Any]] | None = None
    published: models.WeightsEnum | None = None
    settings: Mapping[str, Any] | None = None  # the flags of the run that a checkpoint is of


def build_model(
    name: str,
    label_map: Sequence[Mapping[str, Any]],
    resize_in_training: bool = True,
    load: bool = True,
    allow_new_classes: bool = True,
    *,
    weights: str | None = None,
    weights_backbone: str | None = None,
    trainable_backbone_layers: int | None = None,
    min_size: int | None = None,
    max_size: int | None = None,
    assigner: str = "torchvision",
    box_subnet: str | None = None,
    anchor_sizes: Sequence[int] | None = None,
    anchor_ratios: Sequence[float] | None = None,
    score_thresh: float | None = None,
    nms_thresh: float | None = None,
    detections_per_image: int | None = None,
    topk_candidates: int | None = None,
    sync_bn: bool = False,
) -> nn.Module:
    """Build a detector as torchvision builds it, with weights if asked for.

    Args:
        name: one of `model_names`.
        label_map: the classes, `{"name", "label"}` each; labels count from 1, 0 is background.
        resize_in_training: False if the data's augmentation chooses the size.
        load: False builds the same architecture, frozen alike, without reading the weights.
        allow_new_classes: False refuses `weights` that do not know every class.
        weights: of the whole detector, a torchvision name or a file; classes go by their names.
        weights_backbone: of the backbone, likewise. With either, torchvision freezes the first
            layers and, but for v2 and SSD, batch normalisation; without, all is trained.
        trainable_backbone_layers: counted from the last; None is torchvision's choice.
        min_size, max_size: of the resized image, pixels; None is torchvision's, as below.
        assigner, box_subnet: as `retinanet.RetinaNet` takes them, which alone does, as the next.
        anchor_sizes, anchor_ratios: as `make_anchor_generator` takes them.
        score_thresh, nms_thresh, detections_per_image, topk_candidates: above which score, up to
            which IoU, how many in all, from how many per level (SSD: per class) before NMS.
        sync_bn: batch statistics over all processes.

    Raises:
        UserError: names the flag and the fix, for an unknown name or setting and for weights that
            are not there or do not fit.
    """
    check_model_name(name)
    num_classes = max(category["label"] for category in label_map) + 1
    given = {"min_size": min_size, "max_size": max_size}
    sizes = {key: value for key, value in given.items() if value is not None}
    if sizes and name.startswith("ssd"):
        raise UserError(f"--min-size and --max-size: {name} has one fixed size; leave them out")
    if not name.startswith("retinanet"):
        _refuse_for_others(name, assigner, box_subnet, anchor_sizes, anchor_ratios)
    backbone = None
    if load and weights_backbone:
        backbone = read_weights(weights_backbone, "--weights-backbone")
    # ssdlite alone shrinks its backbone when that was not trained before it became a detector.
    is_trained = bool(weights_backbone or (weights and not name.startswith("ssdlite")))
    if trainable_backbone_layers is not None and not is_trained:
        raise UserError(
            "--trainable-backbone-layers freezes layers that nobody trained; leave it "
            "out, or give --weights-backbone or --weights"
        )
    if name in models.list_models(module=detection):
        model = _build(name, num_classes, is_trained, backbone, trainable_backbone_layers, sizes)
    else:
        resnet = name.removeprefix("retinanet_").removesuffix("_fpn")
        model = _build_retinanet(
            resnet, num_classes, is_trained, backbone, trainable_backbone_layers, sizes
        )
    if isinstance(model, detection.RetinaNet):
        anchors = make_anchor_generator(anchor_sizes, anchor_ratios)
        model = _with_own_training_path(model, num_classes, assigner, box_subnet, anchors)
    model.transform = BatchTransform(model.transform, resize_in_training)
    _set_post_processing(
        getattr(model, "roi_heads", model),
        name,
        score_thresh=score_thresh,
        nms_thresh=nms_thresh,
        detections_per_img=detections_per_image,
        topk_candidates=topk_candidates,
    )
    _mend_and_speed_up(model)
    if load and weights:
        found = read_weights(weights, "--weights")
        _warn_of_other_anchors(found, anchor_sizes, anchor_ratios)
        new = load_weights(model, found, label_map)
        if new and not allow_new_classes:
            _refuse_new_classes(weights, new)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if sync_bn else model


def _mend_and_speed_up(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "extra_blocks", None), LastLevelP6P7):
            module.extra_blocks = FullPrecisionP6P7(module.extra_blocks)
    fold_frozen_batch_norm(model)
    if not isinstance(model, retinanet.RetinaNet):  # which sees to it itself
        _keep_boxes_in_fp32(model)


def _keep_boxes_in_fp32(model: nn.Module) -> None:
    """Keep what torchvision's detectors compute of boxes, and their losses, in fp32 under autocast.

    Autocast rounds only what convolutions and linear layers take. So box arithmetic is fp32 if the
    anchors are, and what the last layers return. Torchvision makes anchors in the type of the
    feature maps, up to 8 px off in bf16, and keeps them rounded for good.
    """
    for name, module in model.named_modules():
        if isinstance(module, (AnchorGenerator, DefaultBoxGenerator)):
            module.register_forward_pre_hook(_with_fp32_features)
        elif name in ("head", "rpn.head", "roi_heads.box_predictor"):
            module.register_forward_hook(_with_fp32_outputs)


def _with_fp32_features(module: nn.Module, inputs: tuple[Any, list[Tensor]]) -> tuple[Any, ...]:
    # A generator reads only shape, dtype and device of the feature maps.
    images, features = inputs
    return images, [
        f.new_empty((), dtype=torch.float32).expand(f.shape) if f.dtype in HALF else f
        for f in features
    ]


def _with_fp32_outputs(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.float() if x.dtype in HALF else x, outputs)


def _refuse_for_others(
    name: str,
    assigner: str,
    box_subnet: str | None,
    anchor_sizes: Sequence[int] | None,
    anchor_ratios: Sequence[float] | None,
) -> None:
    if assigner != "torchvision":
        raise UserError(f"--assigner {assigner} is for RetinaNet, not for {name}")
    if box_subnet is not None:
        raise UserError(f"--box-subnet {box_subnet} is for RetinaNet, not for {name}")
    for flag, values in (("sizes", anchor_sizes), ("ratios", anchor_ratios)):
        if values is not None:
            given = " ".join(map(str, values))
            raise UserError(f"--anchor-{flag} {given}: only RetinaNet takes it, {name} does not")


def _refuse_new_classes(weights: str, new: list[str]) -> None:
    raise UserError(
        f"--weights {weights} do not know the classes {', '.join(new[:10])}, so there is "
        "nothing to test; train on them first, or give data with the weights' classes"
    )


def _warn_of_other_anchors(weights: Weights, *now: Sequence[float] | None) -> None:
    """Say so if a run of this project trained `weights` with other anchors than sizes, ratios."""
    for flag, values in zip(("anchor_sizes", "anchor_ratios"), now, strict=True):
        before = (weights.settings or {}).get(flag)
        if weights.settings and before != (None if values is None else list(values)):
            logger.warning(
                "warning: %s was trained with --%s %s, not %s; boxes begin at another size",
                *(weights.source, flag.replace("_", "-")),
                *(("default" if v is None else " ".join(map(str, v))) for v in (before, values)),
            )


def make_anchor_generator(
    sizes: Sequence[int] | None = None, ratios: Sequence[float] | None = None
) -> AnchorGenerator:
    """Return RetinaNet's anchors: of three sizes within an octave per level, each in all ratios.

    Args:
        sizes: the smallest of each level P3 to P7, the side of a square in pixels.
        ratios: height / width. None is, for both, torchvision's choice, which is the paper's.

    Raises:
        UserError: if the numbers or their number cannot be.
    """
    sizes = ANCHOR_SIZES if sizes is None else sizes
    ratios = ANCHOR_RATIOS if ratios is None else ratios
    if len(sizes) != len(ANCHOR_SIZES) or min(sizes) <= 0:
        raise UserError(
            f"--anchor-sizes {' '.join(map(str, sizes))}: give five positive numbers, one for each "
            "of the levels P3 to P7, such as 32 64 128 256 512"
        )
    if not ratios or min(ratios) <= 0:
        raise UserError(
            f"--anchor-ratios {' '.join(map(str, ratios))}: give positive numbers, height / width, "
            "such as 0.5 1 2"
        )
    octaves = tuple((s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in sizes)
    return AnchorGenerator(octaves, (tuple(ratios),) * len(octaves))


def _set_post_processing(stage: nn.Module, name: str, **values: float | None) -> None:
    for attribute, value in values.items():
        if value is None:
            continue
        if not hasattr(stage, attribute):  # Faster R-CNN chooses its candidates in two stages
            raise UserError(
                f"--{attribute.replace('_', '-')} {value}: {name} has none; leave it out"
            )
        setattr(stage, attribute, value)


def padded_sizes(model: nn.Module, sizes: np.ndarray) -> np.ndarray:
    """Return the size (H, W) to which `model` pads images of `sizes`, both `[I, 2]`, to infer."""
    assert isinstance(model.transform, BatchTransform)
    return model.transform.padded_sizes(sizes)


@contextmanager
def mixed_precision(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Run backbone and head in `dtype` for inference, and all that computes boxes in fp32.

    Autocast around a whole detector rounds torchvision's anchors to `dtype`, by up to 8 px and for
    good: its generator keeps them.
    """
    parts = [part for name, part in model.named_children() if name in ("backbone", "head")]
    original = [part.forward for part in parts]
    if dtype is not None:
        for part in parts:
            part.forward = functools.partial(_in_precision, part.forward, dtype)
    try:
        yield
    finally:
        if dtype is not None:
            for part, forward in zip(parts, original, strict=True):
                part.forward = forward


def _in_precision(forward: Callable[..., Any], dtype: torch.dtype, features: Any) -> Any:
    first = features if isinstance(features, Tensor) else features[0]
    with torch.autocast(first.device.type, dtype=dtype):
        outputs = forward(features)
    return {key: value.float() for key, value in outputs.items()}


def load_trained(model: nn.Module, content: Mapping[str, Any], source: str) -> None:
    """Load a checkpoint, its averaged weights if it has some, or a plain state dict, to evaluate.

    Raises:
        UserError: if it is of another architecture or number of classes, or not finite.
    """
    state = content.get("ema") or content.get("model") or content
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split("\n")[:2])[:300]
        raise UserError(
            f"--resume {source} does not fit --model and the classes: {reason}"
        ) from None
    # Frozen batch normalisation counts no batches, and counts as the other for inference.
    wrong = [k for k in [*missing, *unexpected] if not k.endswith("num_batches_tracked")]
    if wrong:
        raise UserError(
            f"--resume {source} does not fit --model: {len(wrong)} tensors differ, as {wrong[0]}"
        )
    _require_finite(state, f"--resume {source}")


def _require_tensors(state: Any, source: str) -> None:
    """Raise UserError, with the first that is none, if `state` is not tensors by name."""
    if not isinstance(state, dict):
        raise UserError(f"{source}: its weights are a {type(state).__name__}, not tensors by name")
    wrong = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong or not state:
        found = f"{', '.join(wrong[:3])} is no tensor" if wrong else "it is empty"
        raise UserError(f"{source}: not weights, which are tensors by name: {found}")


def _require_finite(state: Mapping[str, Any], source: str) -> None:
    """Raise UserError, with the first names, if `state` has tensors with NaN or infinity.

    A detector with such weights finds nothing, or anything, and says nothing about it.
    """
    broken = [
        name
        for name, value in state.items()
        if isinstance(value, Tensor) and not bool(value.isfinite().all())
    ]
    if broken:
        more = ", …" if len(broken) > 3 else ""
        raise UserError(
            f"{source}: {len(broken)} of {len(state)} tensors are not finite "
            f"({', '.join(broken[:3])}{more}); take an earlier checkpoint"
        )


def load_detector(
    source: str, device: torch.device | str = "cpu", **post_processing: Any
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Load a detector to predict with: a checkpoint of train.py, or torchvision's weights by name.

        model, label_map = load_detector("runs/coco/best.pth")
        (detections,) = model([decode_image("street.jpg", "RGB") / 255])

    Args:
        source: a checkpoint, of which averaged weights (EMA) are preferred, or a name such as
            RetinaNet_ResNet50_FPN_Weights.COCO_V1.
        post_processing: `score_thresh` and so on, as `build_model` takes them; else what the run
            was evaluated with.

    Returns:
        The detector in evaluation mode, and its classes: `{"id", "name", "label"}` each.

    Raises:
        UserError: says what is wrong with `source`.
    """
    weights = read_weights(source, "detector")
    if weights.published is None:
        if not weights.settings or weights.label_map is None:
            raise UserError(f"{source} is no checkpoint of train.py: it does not name its classes")
        label_map = [dict(category) for category in weights.label_map]
        settings = {k: weights.settings[k] for k in INFERENCE if k in weights.settings}
        name = weights.settings["model"]
        model = build_model(name, label_map, load=False, **settings | post_processing)
        load_trained(model, weights.state, source)
    else:
        names = set(model_names()) & set(models.list_models(module=detection))
        name = next(
            (n for n in names if weights.published in list(models.get_model_weights(n))), ""
        )
        if not name or weights.label_map is None:
            raise UserError(f"{source}: not weights of a box detector")
        label_map = [{"id": c["label"], **c} for c in weights.label_map]
        model = build_model(name, label_map, load=False, weights=source, **post_processing)
        load_weights(model, weights, label_map)
    return model.eval().to(device), label_map


def _build(
    name: str,
    num_classes: int,
    is_trained: bool,
    backbone: Weights | None,
    trainable_layers: int | None,
    sizes: dict[str, int],
) -> nn.Module:
    """Call torchvision's own builder."""
    builder = models.get_model_builder(name)
    annotation = inspect.signature(builder).parameters["weights_backbone"].annotation
    published = get_args(annotation)[0]  # the class of weights that this backbone has
    architecture = published.__name__.removesuffix("_Weights").lower()
    with _published_weights_are(_backbone_state(backbone, architecture)):
        return builder(
            weights=None,
            weights_backbone=next(iter(published)) if is_trained else None,
            num_classes=num_classes,
            trainable_backbone_layers=trainable_layers,
            **sizes,
        )


def _build_retinanet(
    resnet: str,
    num_classes: int,
    is_trained: bool,
    backbone: Weights | None,
    trainable_layers: int | None,
    sizes: dict[str, int],
) -> nn.Module:
    """Do for any ResNet what torchvision's `retinanet_resnet50_fpn` does for ResNet-50."""
    with _published_weights_are(_backbone_state(backbone, resnet)):
        body = resnet_fpn_backbone(
            backbone_name=resnet,
            weights=next(iter(models.get_model_weights(resnet))) if is_trained else None,
            norm_layer=FrozenBatchNorm2d if is_trained else nn.BatchNorm2d,
            trainable_layers=(3 if trainable_layers is None else trainable_layers)
            if is_trained
            else 5,
            returned_layers=[2, 3, 4],
            extra_blocks=LastLevelP6P7(256, 256),
        )
    return detection.RetinaNet(body, num_classes, **sizes)


@contextmanager
def _published_weights_are(state: Mapping[str, Tensor]) -> Iterator[None]:
    """Let torchvision's builders take `state` where they would download and unpickle weights."""
    original = models.WeightsEnum.get_state_dict
    models.WeightsEnum.get_state_dict = lambda self, *args, **kwargs: state
    try:
        yield
    finally:
        models.WeightsEnum.get_state_dict = original


def _backbone_state(weights: Weights | None, architecture: str) -> dict[str, Tensor]:
    """Return a state that fits the whole classifier `architecture`, random where nothing is given.

    A detector's backbone lacks the classifier's last layers, which the builder cuts off anyway.
    """
    template = models.get_model(architecture).state_dict()
    if weights is None:
        return template
    given = {key.removeprefix("backbone.body."): value for key, value in weights.state.items()}
    optional = re.compile(r"^(fc|classifier)\.|num_batches_tracked$")
    wrong = [
        key
        for key, value in template.items()
        if not optional.search(key) and (key not in given or given[key].shape != value.shape)
    ]
    if wrong:
        raise UserError(
            f"--weights-backbone {weights.source} is not a {architecture}: {len(wrong)} of its "
            f"tensors are missing or of another shape, such as {wrong[0]}"
        )
    skipped = [key for key in given if key not in template or optional.match(key)]
    of_parts = ", ".join(sorted({".".join(key.split(".")[:2]) for key in skipped}))
    logger.info(
        "weights-backbone %s: %d tensors loaded, %d skipped that belong to no backbone%s",
        *(weights.source, len(given) - len(skipped), len(skipped)),
        f": {of_parts}" if skipped else "",
    )
    return {
        key: given[key] if key in given and given[key].shape == value.shape else value
        for key, value in template.items()
    }


def _with_own_training_path(
    base: detection.RetinaNet,
    num_classes: int,
    assigner: str,
    box_subnet: str | None,
    anchors: AnchorGenerator,
) -> retinanet.RetinaNet:
    _fit_head(base.head, anchors.num_anchors_per_location()[0], num_classes)
    model = retinanet.RetinaNet(
        base.backbone,
        num_classes,
        anchor_generator=anchors,
        head=base.head,
        proposal_matcher=base.proposal_matcher,
        assigner=assigner,
        box_subnet=box_subnet,
    )
    model.transform = base.transform
    return model


def _fit_head(head: detection.retinanet.RetinaNetHead, num_anchors: int, num_classes: int) -> None:
    """Give the last layers of the head room for other anchors, initialised as they were."""
    scores, boxes = head.classification_head.cls_logits, head.regression_head.bbox_reg
    if len(boxes.weight) == 4 * num_anchors:
        return
    outputs = {scores: num_anchors * num_classes, boxes: num_anchors * 4}
    for layer, channels in outputs.items():
        layer.out_channels = channels
        layer.weight = nn.Parameter(layer.weight.new_empty(channels, *layer.weight.shape[1:]))
        nn.init.normal_(layer.weight, std=0.01)
        layer.bias = nn.Parameter(layer.bias.detach()[:1].repeat(channels))  # all are the same
    head.classification_head.num_anchors = num_anchors


def read_weights(source: str, flag: str) -> Weights:
    """Read weights from a file, or under a torchvision name from torch's cache or the network.

    A file may be a plain state dict or a checkpoint, of which the averaged weights (EMA) are
    preferred. Only tensors and plain types are ever unpickled.

    Raises:
        UserError: names `flag`, the file, and where to put it; or the tensors that are not finite.
    """
    path = Path(source)
    if path.is_file():
        try:
            # One of torchvision's scripts has its flags in a Namespace, which runs nothing.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # any bytes can be in the file, and raise anything
            reason = str(error).split("\n")[0][:200]
            raise UserError(
                f"{flag} {source}: not a file of tensors and plain types, or damaged: {reason}"
            ) from None
        if not isinstance(content, dict):
            raise UserError(f"{flag} {source}: holds a {type(content).__name__}, not weights")
        state = content.get("ema") or content.get("model") or content
        _require_tensors(state, f"{flag} {source}")
        if content.get("ema"):
            logger.info("%s %s: of its weights the averaged ones (EMA) are taken", flag[2:], source)
        _require_finite(state, f"{flag} {source}")
        published = [w for w in _published() if Path(w.url).name == path.name]
        label_map = content.get("categories")
        weights = _named_weights(source, state, published[0] if published else None, label_map)
        flags = content.get("args")
        flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
        return dataclasses.replace(weights, settings=flags)
    try:
        weights = models.get_weight(source)
    except (AttributeError, KeyError, ValueError):
        raise UserError(
            f"{flag} {source}: neither a file nor the name of torchvision weights, which look like "
            "ResNet50_Weights.IMAGENET1K_V1"
        ) from None
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"{flag} {source}: {Path(weights.url).name} is not in {cache} and cannot be downloaded "
            f"({error}); put the file there, or give its path instead of the name"
        ) from None
    except Exception as error:  # any bytes can be in the cached file, too
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise UserError(
            f"{flag} {source}: {cached} is damaged ({str(error)[:200]}); delete it to load it anew"
        ) from None
    _require_finite(state, f"{flag} {source}")
    return _named_weights(source, state, weights, None)


def _published() -> list[models.WeightsEnum]:
    names = models.list_models(module=detection)
    return [weights for name in names for weights in models.get_model_weights(name)]


def _named_weights(
    source: str,
    state: dict[str, Tensor],
    published: models.WeightsEnum | None,
    label_map: Sequence[Mapping[str, Any]] | None,
) -> Weights:
    if label_map is None and published is not None and published in _published():
        names = published.meta["categories"]
        label_map = [{"name": name, "label": i} for i, name in enumerate(names) if name != "N/A"]
    return Weights(source, dict(state), label_map, published)


def load_weights(
    model: nn.Module, weights: Weights, label_map: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Load a whole detector's weights; class scores go to the classes of the same name.

    Classes that the weights do not know keep their fresh initialisation (for RetinaNet the focal
    prior). Weights without class names must have the same number of classes.

    Returns:
        The names of the classes in `label_map` that are new.

    Raises:
        UserError: if the weights are those of another architecture.
    """
    own, state, new = model.state_dict(), dict(weights.state), []
    _require_same_anchors(own, state, weights.source)
    if weights.label_map is not None:
        old_labels = {"__background__": 0, **{c["name"]: c["label"] for c in weights.label_map}}
        pairs = [(0, 0)]
        for category in label_map:
            if category["name"] in old_labels:
                pairs.append((old_labels[category["name"]], category["label"]))
            else:
                new.append(category["name"])
        size = max(category["label"] for category in label_map) + 1
        for key in [key for key in state if CLASS_ROWS.search(key) and key in own]:
            if len(state[key]) % (len(own[key]) // size) == 0:  # else loading it says what is wrong
                state[key] = _move_rows(state[key], own[key], pairs, size, "bbox_pred" in key)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).split("\n")[1].strip()
        raise UserError(f"--weights {weights.source} do not fit --model: {reason}") from None
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    unexpected = [key for key in unexpected if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise UserError(
            f"--weights {weights.source} do not fit --model: {len(missing)} tensors are missing "
            f"{missing[:3]}, {len(unexpected)} are not known {unexpected[:3]}"
        )
    if weights.published in ZERO_EPS:
        # Move the eps that these weights never had into the variance: the same function, and one
        # that a plain torchvision model computes from our checkpoints too.
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.running_var -= module.eps
    logger.info("weights %s: %d tensors loaded", weights.source, len(state))
    _log_classes(weights.label_map, label_map)
    return new


def _require_same_anchors(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str
) -> None:
    key, known = "head.regression_head.bbox_reg.weight", {k for k in own if k.startswith("head.")}
    if key not in own or known != {k for k in state if k.startswith("head.")}:
        return  # another detector, which loading it says
    if len(own[key]) != len(state[key]):
        raise UserError(
            f"--weights {source} know {len(state[key]) // 4} anchors per place, and "
            f"--anchor-ratios make {len(own[key]) // 4}; give as many ratios as they were trained "
            "with, or train from --weights-backbone"
        )


def _log_classes(
    known: Sequence[Mapping[str, Any]] | None, own: Sequence[Mapping[str, Any]]
) -> None:
    if known is None:
        logger.info("  they name no classes: scores are taken over in the order of the labels")
        return
    # In order; torchvision's names begin with the background.
    of_weights, of_data = (
        {c["name"]: None for c in label_map if c["label"]} for label_map in (known, own)
    )
    for what, names in (
        ("taken over by name", [name for name in of_data if name in of_weights]),
        ("begun anew, as the weights lack the class", [n for n in of_data if n not in of_weights]),
        ("skipped, as the data lacks the class", [n for n in of_weights if n not in of_data]),
    ):
        if names:
            shown = ", ".join(map(printable, names[:10])) + (", …" if len(names) > 10 else "")
            logger.info("  class scores %s: %d (%s)", what, len(names), shown)


def _move_rows(
    old: Tensor, own: Tensor, pairs: list[tuple[int, int]], num_classes: int, class_first: bool
) -> Tensor:
    """Return `own` with the rows of known classes from `old`; `pairs` are (old, own) labels."""
    groups = len(own) // num_classes  # anchors per cell, or coordinates for `class_first`
    # With the same classes all rows are kept, also those of labels without a name.
    is_same = old.shape == own.shape and all(source == target for source, target in pairs)
    moved = old.clone() if is_same else own.clone()
    if class_first:
        old_rows, rows = old.unflatten(0, (-1, groups)), moved.unflatten(0, (-1, groups))
        for source, target in pairs:
            rows[target] = old_rows[source]
    else:
        old_rows, rows = old.unflatten(0, (groups, -1)), moved.unflatten(0, (groups, -1))
        for source, target in pairs:
            rows[:, target] = old_rows[:, source]
    return moved


class EMA(AveragedModel):
    """The exponential average of a model's weights over optimizer steps, and of batch statistics.

    It begins with the weights after the first step. What differs from torch's own update: that
    copies the number of updates to the device, and the host waits for each copy.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.move = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module, is_skipped: Tensor | None = None) -> None:
        """Move the average towards the weights of `model`.

        `is_skipped`, on the device, is true for a step that was not taken: nothing changes then.
        """
        averaged, current = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        is_first = self.n_averaged == 0  # which stays on the CPU
        moving = []
        if is_skipped is not None:  # the average of a value with itself is that value, to the bit
            pairs = zip(averaged, current, strict=True)
            current = [torch.where(is_skipped, mine, its) for mine, its in pairs]
        for pair in zip(averaged, current, strict=True):
            if is_first or not pair[0].is_floating_point():  # a number of batches
                pair[0].copy_(pair[1])
            else:
                moving.append(pair)
        if moving:
            self.move([mine for mine, _ in moving], [its for _, its in moving], self.n_averaged)
        self.n_averaged += 1


def make_ema(model: nn.Module, decay: float | None) -> EMA | None:
    """Return the average that `--ema-decay` asks for; None is none."""
    return None if decay is None else EMA(model, decay)


def wrap(
    model: nn.Module,
    device: torch.device,
    num_processes: int,
    compiled: bool,
    amp_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return what the training loop calls: `model`, compiled and distributed as asked for.

    Backbone and head are compiled in place, for any image size, so that the state dict stays as it
    is. `amp_dtype` is that of the training loop's autocast; None is fp32.
    """
    if compiled:
        if isinstance(model, retinanet.RetinaNet):
            model.box_subnet = "dense"  # what is compiled is the head, not what goes around it
        for name, part in model.named_children():
            if name in ("backbone", "head"):
                # Else Inductor asks for the strides of each convolution's gradients, and has a
                # graph for one image size alone; then for the next; and after eight none at all.
                part.compile(dynamic=True, options={"force_layout_optimization": True})
    if num_processes == 1:
        return model
    keeps_statistics = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    # Whether buffers are synchronized in each step. Newer versions of torch warn of the old name.
    names = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {name: keeps_statistics, "gradient_as_bucket_view": True}
    wrapped = DistributedDataParallel(model, **options)
    _warm_up(wrapped, device, amp_dtype)
    return wrapped


def _warm_up(
    model: DistributedDataParallel, device: torch.device, amp_dtype: torch.dtype | None
) -> None:
    """Run one forward and backward pass that changes nothing.

    DDP orders its gradient buckets anew after its first backward pass. Sums in another order round
    differently, so a resumed process would differ from one that ran on, from three processes up.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.module.buffers()]
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]], device=device),
        "labels": torch.ones(1, dtype=torch.int64, device=device),
    }
    # Not square: a compiled model would take both sides for one number, and be for squares alone.
    image = torch.full((3, 64, 96), 0.5, device=device)
    model.train()
    for _ in range(2):  # the buckets are rebuilt when the second forward pass begins
        # In the precision of training, else a compiled model is compiled once more for that.
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            losses = model([image], [target])
            loss = torch.stack(list(losses.values())).sum()
        loss.backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
