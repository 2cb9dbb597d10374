"""Detection with RetinaNet, from images to boxes: speed, host waits, and that both sides agree.

Both sides are those of the benchmark `step`, in evaluation mode. The weights are random, so the
class logits are scaled and shifted until as many pairs of anchor and class as asked for pass the
score threshold. torchvision's side is in fp32, as its scripts evaluate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision.ops import boxes

from engine import Batch
from models.precision import autocast
from models.retinanet import make_anchors
from tools.benchmark import measuring, step
from tools.benchmark.measuring import Row
from tools.benchmark.step import Settings, Side

# Copies between host and device for which the host waits, and which are no copies on a CPU.
COPIES = (torch.tensor, torch.as_tensor, Tensor.tolist, Tensor.cpu)

Detections = list[dict[str, Tensor]]


def detection_rows(settings: Settings, batch_size: int, candidates: int, repeats: int) -> list[Row]:
    """Measure detection, and decoding with NMS by itself.

    Args:
        candidates: pairs over the threshold in an image.
    """
    ours, theirs, (batch,) = step.build(settings, 1, batch_size)
    for side in (ours, theirs):
        side.model.eval()
    spread_scores(ours, batch, candidates)
    theirs.model.load_state_dict(ours.model.state_dict())
    theirs.settings = dataclasses.replace(settings, dtype="fp32")

    whole = [functools.partial(detect, side, batch) for side in (ours, theirs)]
    last_steps = decoding_of_both(ours, theirs, batch)
    _check_equal(*(function() for function in last_steps))
    calls, waits = zip(*(count(function, ours.device) for function in whole), strict=True)
    speeds, times = (
        measuring.in_turn([step.synchronized(f, ours.device) for f in functions], repeats, rate)
        for functions, rate in ((whole, batch_size), (last_steps, None))
    )
    milliseconds = [[1e3 * seconds / batch_size for seconds in side] for side in times]
    name = f"detection, {settings.dtype}, batch {batch_size}, theirs fp32"
    per_image = [waits[0] / batch_size], [waits[1] / batch_size]
    budget = 1.3 if settings.device.type == "cpu" else None
    return [
        Row(name, "images/s", speeds[0], speeds[1], more_is_better=True, budget=budget),
        Row("decoding and NMS of the same outputs", "ms", milliseconds[0], milliseconds[1]),
        Row("operator calls of a detection", "a batch", [calls[0]], [calls[1]]),
        Row("host waits of a detection", "a batch", [waits[0]], [waits[1]]),
        Row("host waits of a detection, per image", "an image", per_image[0], per_image[1]),
    ]


@torch.inference_mode()
def detect(side: Side, batch: Batch) -> Detections:
    """Return the detections of a batch as it leaves the loader."""
    images, _ = side.to_device(batch)
    with autocast(side.device, side.settings.amp_dtype):
        return side.model(images)


def head_outputs(side: Side, batch: Batch) -> tuple[dict[str, Tensor], Any, list[tuple[int, int]]]:
    """Return logits and codes of a batch, its padded images, and (H, W) of each level."""
    images, _ = side.model.transform(side.to_device(batch)[0])
    features = list(side.model.backbone(images.tensors).values())
    return side.model.head(features), images, [(f.shape[-2], f.shape[-1]) for f in features]


@torch.no_grad()
def spread_scores(side: Side, batch: Batch, candidates: int) -> None:
    """Scale and shift the class logits so that `candidates` pass the threshold in an image."""
    last = side.model.head.classification_head.cls_logits
    last.bias.zero_()
    logits = head_outputs(side, batch)[0]["cls_logits"]
    last.weight.div_(logits.std())
    count = min(candidates * len(logits), logits.numel())
    least = (logits / logits.std()).flatten().topk(count).values[-1]
    last.bias.copy_(torch.logit(least.new_tensor(side.model.score_thresh)) - least)


@torch.inference_mode()
def decoding_of_both(ours: Side, theirs: Side, batch: Batch) -> list[Callable[[], Detections]]:
    """Return what turns the same outputs of the head into detections, on either side."""
    outputs, images, feature_sizes = head_outputs(ours, batch)
    sizes = tuple(images.tensors.shape[-2:])
    generator, device = ours.model.anchor_generator, ours.device
    anchors = make_anchors(generator, tuple(feature_sizes), sizes, torch.float32, device)
    per_cell = generator.num_anchors_per_location()[0]
    level_sizes = [height * width * per_cell for height, width in feature_sizes]
    split = {name: list(output.split(level_sizes, dim=1)) for name, output in outputs.items()}
    split_anchors = [list(anchors.split(level_sizes))] * len(images.image_sizes)
    detect_ours = torch.inference_mode()(ours.model.detect)
    detect_theirs = torch.inference_mode()(theirs.model.postprocess_detections)
    return [
        functools.partial(detect_ours, outputs, anchors, feature_sizes, images.image_sizes),
        functools.partial(detect_theirs, split, split_anchors, images.image_sizes),
    ]


def _check_equal(ours: Detections, theirs: Detections) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in other.items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=0)
        assert len(mine["scores"]) > 0, "nothing was detected"


class _CountCopies(TorchFunctionMode):
    def __init__(self) -> None:
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func in COPIES
        return func(*args, **(kwargs or {}))


def count(function: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """Count operator calls, and for what the host waits; on a CPU, what a GPU would wait for."""
    # CUDA calls NMS once per image, a CPU with many boxes once per class.
    of_cuda = boxes._batched_nms_coordinate_trick
    with _CountCopies() as copies, mock.patch.object(boxes, "_batched_nms_vanilla", of_cuda):
        counts = step.count(function)
    is_cuda = device.type == "cuda"
    waits = step.cuda_waits(function) if is_cuda else counts["waits"] + copies.count
    return counts["all"], waits
