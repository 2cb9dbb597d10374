"""From the scores of a whole batch to its detections: the best candidates, and NMS.

What differs from torchvision's `RetinaNet.postprocess_detections`: all levels of all images are
one list, so the host waits once for a batch and then for NMS, once per image. torchvision waits
twice per level and image before that.

The results are torchvision's to the bit and in its order; tests/test_detection.py holds that in
place. Three of its steps therefore stay as they are, each on the same numbers:

- the sigmoid of one level of one image: on a CPU the last elements of a tensor round differently;
- `topk` of the scores over the threshold: which of equal scores it takes, and in which order,
  depends on all of its input;
- `batched_nms` of one image, in fp32: its strategy depends on the number of boxes, its rounding on
  the largest coordinate. One NMS for the batch in float64, with an offset for each image and class,
  decides differently where an IoU is at the threshold, and its work grows with the square of the
  number of images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image


def best_candidates(
    logits: Tensor, level_sizes: Sequence[int], score_thresh: float, limit: int
) -> tuple[Tensor, Tensor, list[int]]:
    """Find the best pairs of anchor and class of each image and level, best first.

    Args:
        logits: [N, A, K]; level_sizes: the number of anchors of each level, A together.
        score_thresh: what scores this or less is left out.
        limit: of pairs per image and level.

    Returns:
        The indices [C] of the pairs in the flattened logits, by image and level; their scores [C];
        the number of pairs of each image.
    """
    levels = [level for image in logits for level in image.split(list(level_sizes))]
    scores = torch.cat([level.sigmoid().flatten() for level in levels])
    is_over = scores > score_thresh
    masks = is_over.split([level.numel() for level in levels])
    counts = torch.stack([mask.count_nonzero() for mask in masks]).tolist()  # the host waits
    total = sum(counts)
    # Of a known size, which needs no wait; some versions of torch cannot do it with size 0.
    index = torch.nonzero_static(is_over, size=max(1, total))[:total, 0]
    best = [level.topk(min(len(level), limit)) for level in scores[index].split(counts)]
    chosen = [pairs[top.indices] for pairs, top in zip(index.split(counts), best, strict=True)]
    per_image = np.minimum(counts, limit).reshape(len(logits), -1).sum(axis=1).tolist()
    return torch.cat(chosen), torch.cat([top.values for top in best]), per_image


def suppress(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    image_size: tuple[int, int],
    nms_thresh: float,
    limit: int,
) -> dict[str, Tensor]:
    """Return the detections of one image: "boxes" [D, 4], "scores" [D], "labels" [D], best first.

    Args:
        boxes: [C, 4], xyxy; they are cut to `image_size` (H, W) first. scores, labels: [C].
        nms_thresh: the largest IoU with a better detection of the same class.
        limit: of detections.
    """
    boxes = clip_boxes_to_image(boxes, image_size)
    keep = batched_nms(boxes, scores, labels, nms_thresh)[:limit]
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}
