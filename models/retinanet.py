"""RetinaNet's training path for a whole batch: anchors, assignment, box coding, losses.

Sources: Focal Loss for Dense Object Detection (arXiv 1708.02002), section 3 for the loss and 4 for
anchors, assignment and training; Faster R-CNN (arXiv 1506.01497), section 3.1.2, for box coding;
Generalized IoU (arXiv 1902.09630) for the box loss of v2.

What differs from `torchvision.models.detection.RetinaNet`, whose parameters, state dict, inference
and losses these are: the boxes of a batch are padded to one number and masked, so that every step
works on whole tensors of known shape. There is no loop over images, no boolean indexing and no
`.item()`, so nothing makes a GPU wait for the host. Anchors are made once per shape. Box
arithmetic and losses are fp32 under autocast too (torchvision's bf16 anchors are up to 8 px off).
That every box has an area is for the data path to check.
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead

from models.box_subnet import sparse_codes
from models.detection import best_candidates, suppress
from utils import UserError

BOX_SUBNETS = ("dense", "sparse")
ASSIGNERS = ("torchvision", "max-iou")
BACKGROUND, IGNORED = -1, -2  # instead of the index of a box, as in torchvision's Matcher

# A target for each anchor: boxes [N, M, 4] and labels [N, M] of `pad_targets`, and `assign` [N, A].
Assigned = tuple[Tensor, Tensor, Tensor]

# One size per level of the pyramid, and height / width: section 4 of the paper, as in torchvision.
ANCHOR_SIZES, ANCHOR_RATIOS = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)

ALPHA = 0.25  # of the focal loss: with gamma = 2 the best pair of table 1b
MAX_LOG_SCALE = math.log(1000 / 16)  # Faster R-CNN's: no anchor grows more than 62.5-fold
GIOU_EPS = 1e-7  # torchvision's
MIN_BOXES = 8
# IoUs computed at a time, at least: 32 MB, and four times that on the way to them. Two images of
# the recipe's size (182,403 anchors each) with up to 16 boxes each are one chunk.
CHUNK = 2**23
CHUNK_SHARE = 1 / 16  # of a GPU's memory that one chunk of IoUs may take, 20 bytes each
# Image sizes whose anchors are kept. `multiscale` makes 117 padded sizes of COCO's images.
CACHED_SHAPES = 128


def make_anchor_generator(
    sizes: Sequence[int] | None = None, ratios: Sequence[float] | None = None
) -> AnchorGenerator:
    """Return RetinaNet's anchors: three sizes within an octave per level, each in all ratios.

    Args:
        sizes: the smallest of each level P3 to P7, the side of a square in pixels; positive.
        ratios: height / width, positive. None is for both torchvision's choice, the paper's.

    Raises:
        UserError: if there are not five sizes.
    """
    sizes = ANCHOR_SIZES if sizes is None else sizes
    ratios = ANCHOR_RATIOS if ratios is None else ratios
    if len(sizes) != len(ANCHOR_SIZES):
        raise UserError(
            f"--anchor-sizes {' '.join(map(str, sizes))}: give five numbers, one for each of the "
            "levels P3 to P7, such as 32 64 128 256 512"
        )
    octaves = tuple((s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in sizes)
    return AnchorGenerator(octaves, (tuple(ratios),) * len(octaves))


@functools.lru_cache(maxsize=CACHED_SHAPES)
@torch.inference_mode(False)  # those that an evaluation made are used to train, too
def make_anchors(
    generator: AnchorGenerator,
    feature_sizes: tuple[tuple[int, ...], ...],
    image_size: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return the anchors that `generator` makes for one image: [A, 4], xyxy in absolute pixels.

    Sizes are (H, W); `image_size` is that of the padded batch and fixes the strides. The result
    (3 MB at 800 × 1216) stays in a cache: do not write to it.
    """
    # One pass under autocast rounds a generator's base anchors for good: take fresh ones.
    generator = copy.copy(generator)
    generator.cell_anchors = [
        generator.generate_anchors(list(sizes), list(ratios), dtype=dtype)
        for sizes, ratios in zip(generator.sizes, generator.aspect_ratios, strict=True)
    ]
    # It reads only shape, dtype and device of images and features. On the CPU the values are the
    # same, and from pinned memory they get to a GPU without a wait.
    blank = torch.empty((), dtype=dtype, device="cpu")
    images = ImageList(blank.expand(1, 3, *image_size), [(image_size[0], image_size[1])])
    (anchors,) = generator(images, [blank.expand(1, 1, *size) for size in feature_sizes])
    if device.type == "cuda":
        anchors = anchors.pin_memory()
    return anchors.to(device, non_blocking=True)


def pad_targets(targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stack the targets of N images: boxes [N, M, 4], zeros as padding; labels [N, M], -1 there.

    M is the largest number of boxes, rounded up to a power of two of at least 8, so that few shapes
    occur. A target has `boxes` [M_i, 4] and `labels` int64 [M_i], 0 or more.
    """
    boxes = pad_sequence([target["boxes"] for target in targets], True)
    # Labels tell what is padding: a mask of the lengths would be copied from the host, a wait.
    labels = pad_sequence([target["labels"] for target in targets], True, padding_value=-1)
    longest = labels.shape[1]
    extra = max(MIN_BOXES, 1 << (longest - 1).bit_length()) - longest
    return F.pad(boxes, (0, 0, 0, extra)), F.pad(labels, (0, extra), value=-1)


def pairwise_iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return the IoU [N, M, A] of boxes [N, M, 4] with anchors [A, 4], both xyxy.

    Equal to `torchvision.ops.box_iou` to the bit. On a CPU it is 8 times as fast, because the
    coordinates are taken apart first.
    """
    x1, y1, x2, y2 = boxes.unsqueeze(-1).unbind(-2)  # [N, M, 1] each
    anchor_x1, anchor_y1, anchor_x2, anchor_y2 = anchors.t().contiguous()  # [A] each
    areas = (x2 - x1) * (y2 - y1) + (anchor_x2 - anchor_x1) * (anchor_y2 - anchor_y1)
    widths = torch.minimum(x2, anchor_x2).sub_(torch.maximum(x1, anchor_x1)).clamp_(min=0)
    heights = torch.minimum(y2, anchor_y2).sub_(torch.maximum(y1, anchor_y1)).clamp_(min=0)
    overlaps = widths.mul_(heights)  # [N, M, A]
    return overlaps.div_(areas.sub_(overlaps))


def _chunk(device: torch.device) -> int:
    """Return how many IoUs to compute at a time. On a GPU, each chunk costs 34 kernel launches."""
    if device.type != "cuda":
        return CHUNK
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(CHUNK, int(memory * CHUNK_SHARE) // 20)


def _match(anchors: Tensor, boxes: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # For each anchor, [N, A]: the best IoU, the box it is with, and the last box that claims it.
    iou = pairwise_iou(boxes, anchors)  # [N, M, A], 0 for padding
    best_iou, best_box = iou.max(dim=1)  # of boxes with the same IoU the first
    # A box that overlaps no anchor has the peak 0, which is its IoU with every anchor, and claims
    # them all. Both originals do so: MMDetection asks for a peak >= 0, torchvision for nothing. The
    # default anchors leave no such box in an image. Padding is like that, but must claim nothing.
    peak = iou.amax(dim=2, keepdim=True).masked_fill_(padding.unsqueeze(2), math.inf)  # [N, M, 1]
    index = torch.arange(boxes.shape[1], dtype=torch.int32, device=boxes.device).unsqueeze(1)
    claimed_by = torch.where(iou == peak, index, index.new_full((), -1)).amax(dim=1)
    return best_iou, best_box, claimed_by


@torch.no_grad()
def assign(
    anchors: Tensor,
    boxes: Tensor,
    labels: Tensor,
    assigner: str = "torchvision",
    fg_iou_thresh: float = 0.5,
    bg_iou_thresh: float = 0.4,
    allow_low_quality: bool = True,
) -> Tensor:
    """Assign each anchor of N images to a box, to the background, or to nothing.

    An anchor belongs to the box that it overlaps most if their IoU reaches `fg_iou_thresh`; it is
    background below `bg_iou_thresh` and ignored in between. With `allow_low_quality` every box then
    claims the anchors that overlap it most, all ties, however little that is. The assigners differ
    in one case, an anchor that a box claims and another box overlaps more, or as much and earlier:
    "torchvision" (its Matcher, to the bit) gives it to the other; "max-iou" (MMDetection's
    MaxIoUAssigner, min_pos_iou 0, gt_max_assign_all) to the box that claims it, of many the last.

    Args:
        anchors: [A, 4], xyxy in absolute pixels, as are boxes [N, M, 4]; both and labels [N, M] as
            of `pad_targets`.

    Returns:
        int64 [N, A]: the index of a box, -1 for background, -2 for ignored.
    """
    padding = labels < 0  # [N, M]
    # All anchors and some of the boxes at a time, to bound the memory.
    step = max(1, _chunk(anchors.device) // (len(boxes) * len(anchors)))
    best_iou, best_box, claimed_by = _match(anchors, boxes[:, :step], padding[:, :step])
    for start in range(step, boxes.shape[1], step):
        chunk = slice(start, start + step)
        iou, box, claim = _match(anchors, boxes[:, chunk], padding[:, chunk])
        best_box = torch.where(iou > best_iou, box + start, best_box)
        best_iou = torch.maximum(iou, best_iou)
        claimed_by = torch.where(claim >= 0, claim + start, claimed_by)

    matched = best_box
    if allow_low_quality:
        claimed = claimed_by >= 0
        best_iou.masked_fill_(claimed, math.inf)
        if assigner == "max-iou":
            matched = torch.where(claimed, claimed_by, matched)
    # Padding comes last: without a first box there is none, and all is background.
    best_iou.masked_fill_(padding[:, :1], -math.inf)
    matched.masked_fill_(best_iou < fg_iou_thresh, IGNORED)
    return matched.masked_fill_(best_iou < bg_iou_thresh, BACKGROUND)


def _center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    size = high - low
    return low.add(size, alpha=0.5), size


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return the codes (dx, dy, dw, dh) that turn anchors into boxes; all are [..., 4], xyxy.

    A code is the shift of the center in units of the anchor's size and the logarithm of the growth.
    Equal to torchvision's BoxCoder to the bit.
    """
    center, size = _center_and_size(boxes)
    anchor_center, anchor_size = _center_and_size(anchors)
    return torch.cat([(center - anchor_center) / anchor_size, (size / anchor_size).log()], dim=-1)


def decode_boxes(codes: Tensor, anchors: Tensor) -> Tensor:
    """Return the boxes, [..., 4] xyxy, into which the codes of `encode_boxes` turn the anchors.

    An anchor grows 62.5-fold at most, so that an untrained head makes no infinite boxes.
    """
    anchor_center, anchor_size = _center_and_size(anchors)
    center = codes[..., :2] * anchor_size + anchor_center
    half = 0.5 * (codes[..., 2:].clamp(max=MAX_LOG_SCALE).exp() * anchor_size)
    return torch.cat([center - half, center + half], dim=-1)


def _absent_class_terms(logits: Tensor, weight: float, zero: Tensor) -> tuple[Tensor, Tensor]:
    # The loss of a class that is not there, w p² · -log(1 - p), and its derivative by the logit,
    # w p² · (p - 2 (1 - p) log(1 - p)); in place, as these tensors are the largest of the step.
    p = logits.sigmoid()
    loss = F.softplus(logits)  # -log(1 - p), exact for small p as well
    slope = torch.addcmul(zero, p, p, value=weight)
    loss.mul_(slope)
    slope.mul_(p).add_(loss, alpha=2).addcmul_(loss, p, value=-2)
    return loss, slope


class _FocalLoss(torch.autograd.Function):
    """The focal loss of each anchor, [N, A], computed together with its derivative.

    Autograd would keep four tensors of the size of the logits for the backward, this keeps one. A
    class that is there has the terms of one that is not, with the sign of the logit turned and
    another weight; there is one such class per anchor at most, so they are written over the others.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor, foreground: Tensor) -> Tensor:
        ctx.dtype = logits.dtype
        logits = _full_precision(logits)
        index, foreground = classes.unsqueeze(2), foreground.unsqueeze(2)  # [N, A, 1]
        zero = logits.new_zeros(())
        loss, slope = _absent_class_terms(logits, 1 - ALPHA, zero)  # [N, A, K]
        own_loss, own_slope = _absent_class_terms(-logits.gather(2, index), ALPHA, zero)
        for terms, own in ((loss, own_loss), (slope, -own_slope)):
            terms.scatter_(2, index, torch.where(foreground, own, terms.gather(2, index)))
        ctx.save_for_backward(slope)
        return loss.sum(dim=2)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grad.unsqueeze(2)).to(ctx.dtype), None, None


def focal_loss(logits: Tensor, classes: Tensor, foreground: Tensor) -> Tensor:
    """Return the focal loss (alpha 0.25, gamma 2) of each anchor, summed over classes: [N, A].

    Args:
        logits: [N, A, K]; classes: int64 [N, A], the class that is there where `foreground`, bool
            [N, A], is true, and elsewhere, where none is, any in [0, K).
    """
    return _FocalLoss.apply(logits, classes, foreground)


def _area(size: Tensor) -> Tensor:
    return size[..., 0] * size[..., 1]


def giou_loss(predicted: Tensor, boxes: Tensor) -> Tensor:
    """Return 1 - generalized IoU, [...], of boxes in pairs, both [..., 4], xyxy.

    torchvision's `generalized_box_iou_loss` looks up which pairs overlap, for which a GPU waits.
    """
    low, high = predicted[..., :2], predicted[..., 2:]
    box_low, box_high = boxes[..., :2], boxes[..., 2:]
    # relu: where boxes just touch there is no gradient, as in torchvision.
    overlap = _area(F.relu(torch.minimum(high, box_high) - torch.maximum(low, box_low)))
    union = _area(high - low) + _area(box_high - box_low) - overlap
    hull = _area(torch.maximum(high, box_high) - torch.minimum(low, box_low))
    return 1 - (overlap / (union + GIOU_EPS) - (hull - union) / (hull + GIOU_EPS))


def _l1_of_codes(codes: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
    return (codes - encode_boxes(boxes, anchors)).abs().sum(dim=2)


def _giou_of_boxes(codes: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
    return giou_loss(decode_boxes(codes, anchors), boxes)


# From codes [N, A, 4], anchors [A, 4] and the box of each anchor [N, A, 4] to the loss [N, A].
BOX_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "l1": _l1_of_codes,
    "giou": _giou_of_boxes,
}


@dataclass(frozen=True)
class TrainingOptions:
    """How RetinaNet trains; inference does not depend on it.

    Attributes:
        assigner: the rule of `assign`, "torchvision" or "max-iou".
        box_subnet: "dense" computes the box head everywhere, "sparse" only where boxes are (see
            box_subnet.py); None is sparse on a CPU, and dense elsewhere, where sparse makes the
            host wait.
        box_loss: one of `BOX_LOSSES`; None is torchvision's: "giou" for v2, otherwise "l1".

    Raises:
        ValueError: if one is unknown.
    """

    assigner: str = "torchvision"
    box_subnet: str | None = None
    box_loss: str | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("assigner", ASSIGNERS),
            ("box_subnet", (None, *BOX_SUBNETS)),
            ("box_loss", (None, *BOX_LOSSES)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown: use one of {known}")


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def detection_losses(
    logits: Tensor,
    codes: Tensor,
    anchors: Tensor,
    boxes: Tensor,
    labels: Tensor,
    matched: Tensor,
    box_loss: str = "l1",
) -> dict[str, Tensor]:
    """Return the losses of N images, "classification" and "bbox_regression": two fp32 scalars.

    Each is summed over the anchors of an image, divided by the number of its foreground anchors, at
    least 1, and averaged over images. Foreground is in both, background in the first, ignored in
    none.

    Args:
        logits: [N, A, K], codes: [N, A, 4], of any floating-point type; anchors: [A, 4];
        boxes: [N, M, 4], labels: [N, M] as of `pad_targets`; matched: [N, A] as of `assign`;
        box_loss: a name in `BOX_LOSSES`: "l1" of the codes, or "giou" of the boxes (v2).

    `codes` may be NaN outside the foreground: the sparse box subnet does not compute them there. A
    loss that reads them is then NaN, which stops the run; train it with `--box-subnet dense`.
    """
    with torch.autocast(logits.device.type, enabled=False):
        foreground = matched >= 0  # [N, A]
        divisor = foreground.sum(dim=1, dtype=torch.float32).clamp(min=1) * len(matched)  # [N]
        index = matched.clamp(min=0)  # an anchor without a box gets the first, be it padding

        classes = labels.gather(1, index).clamp(min=0)
        cls_losses = focal_loss(logits, classes, foreground)  # [N, A]
        cls_losses.masked_fill_(matched == IGNORED, 0)

        targets = boxes.gather(1, index.unsqueeze(2).expand(-1, -1, 4))
        # Without a box an anchor is its own target: the code of padding is log 0, which the mask
        # below hides from L1, but not from a loss whose gradient grows with it: 0 · inf is NaN.
        targets = torch.where(foreground.unsqueeze(2), targets, anchors)  # [N, A, 4]
        box_losses = BOX_LOSSES[box_loss](_full_precision(codes), anchors, targets)
        box_losses.masked_fill_(~foreground, 0)  # [N, A]

        return {
            "classification": (cls_losses.sum(dim=1) / divisor).sum(),
            "bbox_regression": (box_losses.sum(dim=1) / divisor).sum(),
        }


class RetinaNet(torchvision.models.detection.RetinaNet):
    """torchvision's RetinaNet: its parameters and detections, with the training path above."""

    options = TrainingOptions()

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Return the losses (see `detection_losses`) in training, else torchvision's detections.

        Args:
            images: N tensors [3, H_i, W_i] in 0..1; targets: for each `boxes` [M_i, 4], xyxy in
                absolute pixels and with an area, and `labels` int64 [M_i]. Detection ignores them.

        Raises:
            ValueError: in training without targets.
        """
        if self.training and targets is None:
            raise ValueError("training needs targets: pass them, or call eval() first to detect")
        batch, scaled_targets = self.transform(images, targets if self.training else None)
        features = self.backbone(batch.tensors)
        features = [features] if isinstance(features, Tensor) else list(features.values())
        feature_sizes = tuple(tuple(feature.shape[-2:]) for feature in features)
        anchors = make_anchors(
            self.anchor_generator,
            feature_sizes,
            tuple(batch.tensors.shape[-2:]),
            torch.promote_types(features[0].dtype, torch.float32),
            features[0].device,
        )
        if not self.training:
            detections = self.detect(self.head(features), anchors, feature_sizes, batch.image_sizes)
            original_sizes = [tuple(image.shape[-2:]) for image in images]
            return self.transform.postprocess(detections, batch.image_sizes, original_sizes)
        boxes, labels, matched = self.assign_targets(scaled_targets, anchors)
        outputs = self._head_outputs(features, matched >= 0)
        return self.compute_loss((boxes, labels, matched), outputs, anchors)

    def detect(
        self,
        head_outputs: dict[str, Tensor],
        anchors: Tensor,
        feature_sizes: Sequence[tuple[int, ...]],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Return the detections of each of N images, best first; see `suppress`.

        Args:
            head_outputs: logits and codes of the A anchors; box arithmetic is fp32 in any case.
            feature_sizes: (H, W) of each level; image_sizes: (H, W) of each image without padding.
        """
        logits = _full_precision(head_outputs["cls_logits"])
        num_anchors, num_classes = logits.shape[1:]
        cells = [height * width for height, width in feature_sizes]
        level_sizes = [count * (num_anchors // sum(cells)) for count in cells]
        index, scores, counts = best_candidates(
            logits, level_sizes, self.score_thresh, self.topk_candidates
        )
        row = index // num_classes  # of an anchor of an image
        codes = _full_precision(head_outputs["bbox_regression"].flatten(0, 1)[row])
        boxes = decode_boxes(codes, anchors[row % num_anchors])
        labels = index % num_classes
        parts = (boxes.split(counts), scores.split(counts), labels.split(counts))
        return [
            suppress(b, s, c, image_size, self.nms_thresh, self.detections_per_img)
            for b, s, c, image_size in zip(*parts, image_sizes, strict=True)
        ]

    def assign_targets(self, targets: list[dict[str, Tensor]], anchors: Tensor) -> Assigned:
        """Assign each of the anchors [A, 4] to a box of each image, with this model's thresholds.

        Raises:
            ValueError: if `proposal_matcher` is not torchvision's Matcher itself: only its
                thresholds are used, another rule would be lost.
        """
        matcher = self.proposal_matcher
        if type(matcher) is not Matcher:
            raise ValueError(f"proposal_matcher must be a Matcher, not {matcher!r}")
        boxes, labels = pad_targets(targets)
        boxes = boxes.to(anchors.dtype)
        matched = assign(
            anchors,
            boxes,
            labels,
            self.options.assigner,
            matcher.high_threshold,
            matcher.low_threshold,
            matcher.allow_low_quality_matches,
        )
        return boxes, labels, matched

    def _head_outputs(self, features: list[Tensor], foreground: Tensor) -> dict[str, Tensor]:
        subnet = self.options.box_subnet or ("sparse" if foreground.is_cpu else "dense")
        # A head of another class may do more than call its two parts.
        if subnet == "sparse" and type(self.head) is RetinaNetHead:
            codes = sparse_codes(self.head.regression_head, features, foreground)
            if codes is not None:
                logits = self.head.classification_head(features)
                return {"cls_logits": logits, "bbox_regression": codes}
        return self.head(features)

    def compute_loss(
        self, targets: Assigned, head_outputs: dict[str, Tensor], anchors: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of the head's outputs, with the targets of `assign_targets`."""
        return detection_losses(
            head_outputs["cls_logits"],
            head_outputs["bbox_regression"],
            anchors,
            *targets,
            self.options.box_loss or self.head.regression_head._loss_type,
        )
