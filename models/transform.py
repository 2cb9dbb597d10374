"""torchvision's normalisation, resizing and batching of images, without a GPU wait."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform


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
        for name, values in (("mean", base.image_mean), ("std", base.image_std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        # `model.to(memory_format=…)` changes buffers of four dimensions, too: this one shows it.
        self.register_buffer("layout", torch.zeros(1, 2, 2, 2), persistent=False)

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
        # In float32, as torchvision divides.
        ratio_y = float(np.float32(image.shape[-2]) / np.float32(height))
        ratio_x = float(np.float32(image.shape[-1]) / np.float32(width))
        x1, y1, x2, y2 = target["boxes"].unbind(1)
        boxes = torch.stack([x1 * ratio_x, y1 * ratio_y, x2 * ratio_x, y2 * ratio_y], dim=1)
        return image, {**target, "boxes": boxes}

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Pad images to one size `[N, 3, H, W]`, H and W multiples of `size_divisible`."""
        height, width = (
            math.ceil(max(image.shape[axis] for image in images) / size_divisible) * size_divisible
            for axis in (1, 2)
        )
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


def _scale(height: int, width: int, shorter: int, longest: int) -> float:
    """Return the factor to the shorter side `shorter`, or less if the other exceeds `longest`."""
    return min(shorter / min(height, width), longest / max(height, width))


def padded_sizes(model: nn.Module, sizes: np.ndarray) -> np.ndarray:
    """Return the size (H, W) to which `model` pads images of `sizes` for inference, `[I, 2]`."""
    assert isinstance(model.transform, BatchTransform)
    return model.transform.padded_sizes(sizes)
