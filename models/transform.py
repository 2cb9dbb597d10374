"""torchvision's normalisation, resizing and batching of images, without a GPU wait."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from utils import LocalError


class BatchTransform(GeneralizedRCNNTransform):
    """torchvision's transform without a wait between host and device; the values are the same.

    torchvision copies means and ratios to the device for every image, and each copy waits. Batches
    have the memory format of the model, so that no convolution gets two. `resize_in_training=False`
    leaves the size to the data's augmentation.
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
        # By `training`: the newest batch (N, H, W), and the largest before it. See memory_errors.
        self.batches = {mode: ((0, 0, 0), (0, 0, 0)) for mode in (True, False)}
        for name, values in (("mean", base.image_mean), ("std", base.image_std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        # `model.to(memory_format=…)` changes buffers of four dimensions, too: this one shows it.
        self.register_buffer("layout", torch.zeros(1, 2, 2, 2), persistent=False)

    @property
    def resizes(self) -> bool:
        """Whether min_size and max_size choose the size of images in the current mode."""
        return self.fixed_size is None and (self.resize_in_training or not self.training)

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
            size: dict[str, Any] = {"size": self.fixed_size[::-1]}  # torchvision keeps (W, H)
        else:
            several = self.training and len(self.min_size) > 1
            shorter = self.torch_choice(self.min_size) if several else self.min_size[-1]
            scale = _scale(height, width, shorter, self.max_size)
            size = {"scale_factor": scale, "recompute_scale_factor": True}
        image = F.interpolate(image[None], mode="bilinear", align_corners=False, **size)[0]
        if target is None:
            return image, target
        boxes = _scale_boxes(target["boxes"], (height, width), tuple(image.shape[-2:]))
        return image, {**target, "boxes": boxes}

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Pad images to one size `[N, 3, H, W]`, H and W multiples of `size_divisible`."""
        height, width = (
            math.ceil(max(image.shape[axis] for image in images) / size_divisible) * size_divisible
            for axis in (1, 2)
        )
        largest = max(self.batches[self.training], key=math.prod)
        self.batches[self.training] = (len(images), height, width), largest
        is_last = self.layout.is_contiguous(memory_format=torch.channels_last)
        batch = torch.empty(
            (len(images), 3, height, width),
            dtype=images[0].dtype,
            device=images[0].device,
            memory_format=torch.channels_last if is_last else torch.contiguous_format,
        ).zero_()
        for padded, image in zip(batch, images, strict=True):
            padded[:, : image.shape[1], : image.shape[2]].copy_(image)
        return batch

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Scale the boxes of detections from the resized images to the original ones, in place."""
        # RCNNs come here in training, too, with detections of no image.
        sizes = zip(result, image_shapes, original_image_sizes, strict=False)
        for detections, size, original_size in sizes:
            detections["boxes"] = _scale_boxes(detections["boxes"], size, original_size)
        return result

    def resized_sizes(self, sizes: np.ndarray) -> np.ndarray:
        """Return the size (H, W) of each image after inference resized it, `[I, 2]`."""
        if self.fixed_size is not None:
            return np.broadcast_to(np.array(self.fixed_size[::-1]), sizes.shape)
        scales = [_scale(h, w, self.min_size[-1], self.max_size) for h, w in sizes.tolist()]
        return np.floor(sizes * np.array(scales)[:, None])

    def padded_sizes(self, sizes: np.ndarray) -> np.ndarray:
        """Return the size (H, W) of each image after inference resized and padded it, `[I, 2]`."""
        resized = self.resized_sizes(sizes)
        return (np.ceil(resized / self.size_divisible) * self.size_divisible).astype(np.int64)


@contextmanager
def memory_errors(model: nn.Module, batches_per_step: int, is_mixed: bool) -> Iterator[None]:
    """Turn an out-of-memory error of the device into a message.

    Args:
        batches_per_step: micro-batches of this process per optimizer step, if the model trains.
        is_mixed: whether the precision is mixed already.

    Raises:
        LocalError: names the batch, the largest that fitted before it, and the flags to change.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        transform = getattr(model, "transform", None)
        if not isinstance(transform, BatchTransform):
            raise
        newest, largest = transform.batches[transform.training]
        number = max(newest[0], largest[0])  # the last batch of an epoch may be short
        advice = []
        if number > 1 and transform.training:
            parts = next(n for n in range(2, number + 1) if number % n == 0)
            accumulated = f"--accumulate-steps {batches_per_step * parts}"
            advice.append(f"--batch-size {number // parts} {accumulated}")
        elif number > 1:
            advice.append(f"--eval-batch-size {number // 2}")
        if not is_mixed:
            advice.append("--amp")
        if transform.resizes:
            advice.append("smaller --min-size and --max-size")
        fitted = f"the largest that fitted is {_describe(largest)}" if largest[0] else "none fitted"
        raise LocalError(
            f"out of memory in a batch of {_describe(newest)} ({fitted}); give "
            + (", or ".join(advice) or "a smaller --model")
        ) from error


def _describe(batch: tuple[int, int, int]) -> str:
    number, height, width = batch
    return f"{number} image{'s' if number > 1 else ''} of {height} x {width} pixels"


def _scale_boxes(boxes: Tensor, size: tuple[int, ...], new_size: tuple[int, ...]) -> Tensor:
    """Scale boxes [M, 4], xyxy, of an image of `size` (H, W) to those of `new_size`."""
    # In float32, as torchvision divides.
    ratio_y, ratio_x = (float(np.float32(new_size[i]) / np.float32(size[i])) for i in (0, 1))
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([x1 * ratio_x, y1 * ratio_y, x2 * ratio_x, y2 * ratio_y], dim=1)


def _scale(height: int, width: int, shorter: int, longest: int) -> float:
    """Return the factor to the shorter side `shorter`, or less if the other exceeds `longest`."""
    return min(shorter / min(height, width), longest / max(height, width))


def padded_sizes(model: nn.Module, sizes: np.ndarray) -> np.ndarray:
    """Return the size (H, W) to which `model` pads images of `sizes` for inference, `[I, 2]`."""
    assert isinstance(model.transform, BatchTransform)
    return model.transform.padded_sizes(sizes)
