"""Named augmentation policies: torchvision's five, on uint8 images and `tv_tensors`.

Source: torchvision's references/detection/presets.py. Resizing to the training size is the model's
job, except for the two policies in `RESIZING`, which choose the size.
"""

from __future__ import annotations

from typing import Any

import torch
from torchvision.transforms import v2

from transforms import FixedSizeCrop

POLICIES = ("hflip", "multiscale", "lsj", "ssd", "ssdlite")
RESIZING = ("multiscale", "lsj")
# One fixed size: batches need no padding, so grouping by aspect ratio gains nothing.
FIXED_SIZE = ("lsj",)

# The mean colour of ImageNet, 0-255, as torchvision's recipes round it.
MEAN_COLOUR = (123.0, 117.0, 104.0)
MULTISCALE_SIZES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


def _per_box(sample: tuple[Any, dict[str, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """Return the tensors with one entry per box, which go when the box is dropped."""
    return (sample[1]["labels"],)


def training_transforms(policy: str) -> v2.Transform:
    """Build one of `POLICIES`: (uint8 image `[3, H, W]`, target) to the same, augmented.

    Boxes are clamped to the image and those of less than one pixel dropped where a policy crops;
    the others cannot push a box out, and keep every one.

    Raises:
        ValueError: for an unknown policy.
    """
    flip = v2.RandomHorizontalFlip(p=0.5)
    tidy = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=_per_box)]
    steps: dict[str, list[v2.Transform]] = {
        "hflip": [flip],
        "multiscale": [v2.RandomShortestSize(MULTISCALE_SIZES, max_size=1333), flip],
        "lsj": [
            v2.ScaleJitter(target_size=(1024, 1024)),
            FixedSizeCrop(size=(1024, 1024), fill=MEAN_COLOUR),
            flip,
            *tidy,
        ],
        "ssd": [
            v2.RandomPhotometricDistort(),
            v2.RandomZoomOut(fill=list(MEAN_COLOUR)),
            v2.RandomIoUCrop(),
            flip,
            *tidy,
        ],
        "ssdlite": [v2.RandomIoUCrop(), flip, *tidy],
    }
    if policy not in steps:
        raise ValueError(f"unknown augmentation policy {policy!r}; choose from {POLICIES}")
    return v2.Compose(steps[policy])
