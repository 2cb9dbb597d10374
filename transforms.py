"""Only what `torchvision.transforms.v2` lacks.

Source: large-scale jitter, https://arxiv.org/abs/2012.07177, as in torchvision's reference scripts.
"""

from __future__ import annotations

from typing import Any

import torch
from torchvision.transforms.v2 import Transform
from torchvision.transforms.v2 import functional as F


class FixedSizeCrop(Transform):
    """Crop a random window, or pad right and below, so that every image has one size.

    v2's `RandomCrop(pad_if_needed=True)` pads on both sides by the full difference, which makes
    other training data than the published recipe. Boxes are cut at the window;
    `SanitizeBoundingBoxes` drops those that it leaves empty.

    Args:
        size: (H, W) of the result, pixels.
        fill: value of the padding, 0-255 per channel.
    """

    def __init__(self, size: tuple[int, int], fill: tuple[float, float, float]) -> None:
        super().__init__()
        self.size, self.fill = size, list(fill)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the window's corner, uniform over all positions in the image."""
        height, width = F.get_size(flat_inputs[0])
        crop_height, crop_width = min(height, self.size[0]), min(width, self.size[1])
        draw_top, draw_left = torch.rand(2).tolist()
        window = {
            "top": int(draw_top * (height - crop_height + 1)),
            "left": int(draw_left * (width - crop_width + 1)),
            "height": crop_height,
            "width": crop_width,
        }
        padding = [0, 0, self.size[1] - crop_width, self.size[0] - crop_height]
        return {"window": window, "padding": padding}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop, then pad, one image or set of boxes."""
        inpt = self._call_kernel(F.crop, inpt, **params["window"])
        if not any(params["padding"]):
            return inpt
        return self._call_kernel(F.pad, inpt, padding=params["padding"], fill=self.fill)
