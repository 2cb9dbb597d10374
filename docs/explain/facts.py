"""The numbers of docs/retinanet*.md, computed by the code that trains."""

from __future__ import annotations

import functools
import math
import tempfile
from typing import Any

import numpy as np
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from data import coco_arrays, coco_json, shapes
from docs.explain import photograph, pictures
from docs.explain.pictures import SIZE, example_scene
from models import retinanet
from models.build import build_model
from models.retinanet import ANCHOR_RATIOS, make_anchor_generator
from runtime.options import build_parser
from runtime.summary import RECIPE_BATCH
from tools.plots import method
from tools.plots.method import CLASSES, LEVELS, PRIOR

SHAPES = 64  # images of the embedded data set whose assignment is counted
RECIPE = build_parser().parse_args([])
# The worked example of section 4, xyxy in pixels. Box 2 lies in the same anchors as box 1, and is
# smaller.
WORKED_BOXES = ((10, 10, 50, 50), (104, 14, 124, 34), (100, 10, 116, 26))
WORKED_ANCHORS = (
    (12, 10, 52, 50),
    (20, 10, 60, 50),
    (26, 10, 66, 50),
    (40, 10, 80, 50),
    (96, 8, 128, 40),
    (104, 8, 136, 40),
    (72, 8, 104, 40),
    (150, 50, 182, 82),
)


@functools.cache
def network() -> tuple[Any, dict[str, tuple[int, ...]], dict[str, float]]:
    """Return the recipe's model, shapes of its outputs, and multiply-adds per module, for `SIZE`.

    Nothing is computed: the tensors only have shapes.
    """
    classes = [{"name": "any", "label": CLASSES - 1}]
    backbone = "ResNet50_Weights.IMAGENET1K_V1"
    model: Any = build_model(
        "retinanet_resnet50_fpn", classes, load=False, weights_backbone=backbone
    )
    model = model.eval().to("meta")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        features = model.backbone(torch.empty(1, 3, *SIZE, device="meta"))
        outputs = model.head(list(features.values()))
    found = dict(zip(LEVELS, features.values(), strict=True)) | outputs
    # It counts a multiply-add as two operations.
    operations = {name: sum(v.values()) / 2 for name, v in counter.get_flop_counts().items()}
    return model, {name: tuple(tensor.shape) for name, tensor in found.items()}, operations


def parts() -> list[tuple[str, tuple[int, int], int, int, float, int]]:
    """Return (name, size, stride, channels, multiply-adds, parameters) of each of the network's."""
    model, found, operations = network()
    body, fpn, head = model.backbone.body, model.backbone.fpn, model.head
    stages = [("C2", [body.conv1, body.bn1, body.layer1], ["body.conv1", "body.layer1"], 256)]
    for number, channels in ((2, 512), (3, 1024), (4, 2048)):
        layer = getattr(body, f"layer{number}")
        stages.append((f"C{number + 1}", [layer], [f"body.layer{number}"], channels))
    for number, level in enumerate(("P3", "P4", "P5")):
        names = [f"fpn.{kind}_blocks.{number}" for kind in ("inner", "layer")]
        modules = [getattr(fpn, f"{kind}_blocks")[number] for kind in ("inner", "layer")]
        stages.append((level, modules, names, 256))
    for level in ("P6", "P7"):
        name = level.lower()
        module = getattr(fpn.extra_blocks, name)
        stages.append((level, [module], [f"fpn.extra_blocks.{name}"], 256))
    rows = []
    for name, modules, names, channels in stages:
        number = int(name[1])
        size = found[name][-2:] if name in found else (SIZE[0] >> number, SIZE[1] >> number)
        count = sum(p.numel() for module in modules for p in module.parameters())
        adds = sum(operations[f"BackboneWithFPN.{n}"] for n in names)
        rows.append((name, (size[0], size[1]), 2**number, channels, adds, count))
    for name, outputs in (("classification_head", CLASSES), ("regression_head", 4)):
        count = sum(p.numel() for p in getattr(head, name).parameters())
        rows.append((name, (0, 0), 0, 9 * outputs, operations[f"RetinaNetHead.{name}"], count))
    return rows


def count_disputes(
    annotations: coco_arrays.Annotations, min_size: int, max_size: int
) -> dict[str, int]:
    """Count over a data set what its boxes claim, and in what the two assigners differ.

    Returns:
        `images` with boxes; `boxes`; `fg`, foreground anchors; `claims`, of these the anchors that
        are foreground only because a box claims them; `differ`, of these the anchors that the two
        assigners give to different boxes; `losers`, boxes with fewer anchors for that.
    """
    totals = dict.fromkeys(("images", "boxes", "fg", "claims", "differ", "losers"), 0)
    for i in range(len(annotations)):
        rows = slice(*annotations.offsets[i : i + 2])
        boxes = coco_arrays.to_xyxy(annotations.boxes_xywh[rows])[~annotations.iscrowd[rows]]
        if not len(boxes):
            continue
        height, width = annotations.sizes[i].tolist()
        blank = torch.zeros((3, height, width), dtype=torch.uint8)
        names = ["any"] * len(boxes)
        tensor = torch.from_numpy(boxes)
        scene = method.make_scene(blank, tensor, names, min_size, max_size)
        own, other = scene.assign(), scene.assign(assigner="max-iou")
        plain = scene.assign(allow_low_quality=False)
        loses = [int((own == k).sum()) < int((other == k).sum()) for k in range(len(boxes))]
        totals["images"] += 1
        totals["boxes"] += len(boxes)
        totals["fg"] += int((own >= 0).sum())
        totals["claims"] += int((own >= 0).sum() - (plain >= 0).sum())
        totals["differ"] += int((own != other).sum())
        totals["losers"] += sum(loses)
    return totals


@functools.cache
def disputes_on_shapes() -> dict[str, int]:
    """Count them on the first training images of the embedded data set."""
    with tempfile.TemporaryDirectory() as folder:
        root = shapes.make_shapes(folder, SHAPES, 1)
        path = root / "annotations" / "instances_train2017.json"
        annotations, _ = coco_json.read_annotations(path)
    return count_disputes(annotations, 128, 128)


@functools.cache
def _detector_facts() -> dict[str, str]:
    """Count the boxes that torchvision's detectors score in an image, and those they train on."""
    detection = torchvision.models.detection
    none = {"weights": None, "weights_backbone": None}

    def scored(model: Any, anchors: AnchorGenerator | DefaultBoxGenerator, *size: int) -> int:
        features = model.backbone(torch.empty(1, 3, *size)).values()
        cells = [feature.shape[2] * feature.shape[3] for feature in features]
        return int(np.dot(cells, anchors.num_anchors_per_location()))

    with torch.device("meta"), torch.no_grad():
        two_stages: Any = detection.fasterrcnn_resnet50_fpn(**none).eval()
        ssd: Any = detection.ssd300_vgg16(**none).eval()
        fcos: Any = detection.fcos_resnet50_fpn(**none).eval()
        rpn, sampler = two_stages.rpn, two_stages.roi_heads.fg_bg_sampler
        return {
            "rpn_anchors": f"{scored(two_stages, rpn.anchor_generator, *SIZE):,}",
            "rpn_sample": str(rpn.fg_bg_sampler.batch_size_per_image),
            "rpn_per_cell": str(rpn.anchor_generator.num_anchors_per_location()[0]),
            "proposals": f"{rpn.post_nms_top_n():,}",
            "proposals_training": f"{rpn._post_nms_top_n['training']:,}",
            "roi_sample": str(sampler.batch_size_per_image),
            "roi_ratio": f"1 : {1 / sampler.positive_fraction - 1:.0f}",
            "ssd_boxes": f"{scored(ssd, ssd.anchor_generator, 300, 300):,}",
            "ssd_ratio": f"1 : {ssd.neg_to_pos_ratio:.0f}",
            "fcos_points": f"{scored(fcos, fcos.anchor_generator, *SIZE):,}",
        }


def gradients(p: float) -> dict[str, float]:
    """Return derivatives by the logit of a class of probability `p`: of both losses, there or not.

    `ce` is cross entropy, `fl` the focal loss; `absent` a class that is not there, `present` one
    that is.
    """
    logits = torch.full((1, 2, 1), math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    is_there = torch.tensor([[True, False]])
    retinanet.focal_loss(logits, torch.zeros(1, 2, dtype=torch.int64), is_there).sum().backward()
    assert logits.grad is not None
    present, absent = logits.grad.flatten().tolist()
    return {"ce_absent": p, "fl_absent": absent, "ce_present": p - 1, "fl_present": present}


def worked_example() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the IoU, `[3, 8]`, and the assignment, `[8]`, after rules 1 to 4, and by "max-iou"."""
    boxes = torch.tensor(WORKED_BOXES, dtype=torch.float32)
    anchors = torch.tensor(WORKED_ANCHORS, dtype=torch.float32)
    blank = torch.empty(3, 0, 0, dtype=torch.uint8)
    scene = method.Scene(blank, boxes, ("box",) * 3, torch.ones(3).long(), (), anchors)
    iou = retinanet.pairwise_iou(boxes[None], anchors)[0]
    return iou, [*method.steps(scene), scene.assign(assigner="max-iou")]


def significant(value: float) -> str:
    """Return a number with three digits that count, without an exponent."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}".replace("-", "−")


def _gradient_facts() -> dict[str, str]:
    scene = example_scene(paint=False)
    foreground, background, _ = method.count(scene.assign())
    absent = (foreground * (CLASSES - 1) + background * CLASSES) / foreground  # per fg. anchor
    g = gradients(PRIOR)
    return {
        "grad_ratio": f"{g['ce_absent'] / g['fl_absent']:,.0f}",
        "grad_balance": f"{-g['fl_present'] / g['fl_absent']:,.0f}",
        "grad_keeps": f"{100 * g['fl_present'] / g['ce_present']:.0f} %",
        **{f"pull_{name}_fg": significant(-g[f"{name}_present"]) for name in ("ce", "fl")},
        **{f"pull_{name}_bg": significant(absent * g[f"{name}_absent"]) for name in ("ce", "fl")},
    }


def _class_facts() -> dict[str, str]:
    """Count the outputs of the class head that no class has."""
    weights = torchvision.models.detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1
    named = [name for name in weights.meta["categories"] if name not in ("N/A", "__background__")]
    classes = [{"name": "cell", "label": 1}]
    one_class: Any = build_model("retinanet_resnet18_fpn", classes, load=False)
    layer = one_class.head.classification_head.cls_logits
    return {
        "named": str(len(named)),
        "unnamed": str(CLASSES - len(named)),
        "one_class": str(list(layer.weight.shape)),
        "first_missing": str(weights.meta["categories"].index("N/A")),
    }


def _size_facts() -> dict[str, str]:
    """Follow an image of 640 × 427 px, a usual size in COCO, to what the network gets."""
    transform = GeneralizedRCNNTransform(800, 1333, [0.0] * 3, [1.0] * 3)
    batch, _ = transform([torch.zeros(3, 427, 640)])
    height, width = batch.image_sizes[0]
    padded = batch.tensors.shape[2:]
    return {"resized": f"{height} × {width}", "padded": f"{padded[0]} × {padded[1]}"}


def _photograph_facts() -> dict[str, str]:
    scene = photograph.photograph_scene()
    foreground, _, ignored = method.count(scene.assign())
    iou, best = retinanet.pairwise_iou(scene.boxes[None], scene.anchors)[0].max(dim=1)
    levels = scene.level_of_anchor()[best].tolist()
    tie = retinanet.encode_boxes(scene.boxes[1], scene.anchors[best[1]]).tolist()
    shares = torch.bincount(scene.assign().clamp(min=-1) + 1, minlength=3)[1:].tolist()
    return {
        "photo_size": f"{scene.image.shape[1]} × {scene.image.shape[2]}",
        "photo_anchors": f"{len(scene.anchors):,}",
        "photo_fg": f"{foreground:,}",
        "photo_ignored": f"{ignored:,}",
        "photo_person": f"{iou[0]:.2f}",
        "photo_person_level": LEVELS[levels[0]],
        "photo_person_anchors": str(shares[0]),
        "photo_tie": f"{iou[1]:.2f}",
        "photo_tie_level": LEVELS[levels[1]],
        "photo_tie_anchors": str(shares[1]),
        "photo_tie_code": ", ".join(f"{v:+.2f}".replace("-", "−") for v in tie),
    }


def _network_facts() -> dict[str, str]:
    _, found, _ = network()
    rows = parts()
    cells = [found[level][2] * found[level][3] for level in LEVELS]
    params, adds = sum(row[5] for row in rows), sum(row[4] for row in rows)
    heads = sum(row[4] for row in rows[-2:])
    facts = {
        "image": f"{SIZE[0]} × {SIZE[1]}",
        "cells": f"{sum(cells):,}",
        "cells_sum": " + ".join(f"{n:,}" for n in cells),
        "anchors": f"{9 * sum(cells):,}",
        "scores": f"{9 * sum(cells) * CLASSES:,}",
        "params": f"{params:,}",
        "gmacs": f"{adds / 1e9:.1f}",
        "gflops": f"{2 * adds / 1e9:.1f}",
        "heads_share": f"{100 * heads / adds:.0f} %",
        "heads_params_share": f"{100 * sum(row[5] for row in rows[-2:]) / params:.0f} %",
        "p3_share": f"{100 * cells[0] / sum(cells):.0f} %",
        "class_share": f"{100 * rows[-2][4] / adds:.0f} %",
        "bias": f"−{math.log((1 - PRIOR) / PRIOR):.3f}",
        "classes": str(CLASSES),
    }
    (height, width), (down, across) = found["P7"][2:], example_scene(paint=False).spacing()[-1]
    facts["drift_p7"] = f"{(height - 1) * (128 - down)} × {(width - 1) * (128 - across)}"
    facts |= {f"size_{name}": f"{h} × {w}" for name, (h, w), *_ in rows}
    return facts


def _anchor_facts() -> dict[str, str]:
    exact, rounded = base_anchors()
    shared = np.minimum(exact, rounded).prod(axis=2)
    iou = shared / (exact.prod(axis=2) + rounded.prod(axis=2) - shared)
    sides = np.arange(10, 60)
    best = [pictures.best_overlap(float(side), float(side)) for side in sides]
    always = next(int(s) for s, v in zip(sides, best, strict=True) if v.min() >= 0.5)
    never = [int(s) for s, v in zip(sides, best, strict=True) if v.max() < 0.4]
    return {
        "rounding_px": f"{np.abs(exact - rounded).max():.1f}",
        "rounding_iou": f"{iou.min():.3f}",
        "rounding_level": LEVELS[int(np.unravel_index(iou.argmin(), iou.shape)[0])],
        "sure_side": str(always),
        "lost_side": str(max(never)),
        "lost_area": f"{32 * math.sqrt(0.4):.1f}",
        "wide_best": f"{pictures.best_overlap(200, 50).mean():.2f}",
    }


def base_anchors() -> tuple[np.ndarray, np.ndarray]:
    """Return width and height of each level's nine anchors, `[5, 9, 2]`: exact, and as they are.

    Exact is 4 strides · 2^(k/3) in each ratio, the rule that MMDetection's configuration states.
    """
    generator = make_anchor_generator()
    stretch = 1 / np.sqrt(np.array(ANCHOR_RATIOS))[:, None]
    octave = 4 * 2 ** (np.arange(3) / 3)[None]
    exact, rounded = [], []
    for level, sizes in enumerate(generator.sizes):
        side = 8 * 2**level * octave
        exact.append(np.stack([(side * stretch).ravel(), (side / stretch).ravel()], axis=1))
        boxes = generator.generate_anchors(list(sizes), list(ANCHOR_RATIOS)).numpy()
        rounded.append(boxes[:, 2:] - boxes[:, :2])
    return np.stack(exact), np.stack(rounded)


def _example_facts() -> dict[str, str]:
    scene = example_scene(paint=False)
    facts: dict[str, str] = {"boxes": str(len(scene.boxes))}
    counts = [method.count(step) for step in method.steps(scene)]
    for number, values in enumerate(counts, 1):
        for name, value in zip(("fg", "bg", "ignored"), values, strict=True):
            facts[f"{name}_{number}"] = f"{value:,}"
    plain, own = method.steps(scene)[2:]
    other = scene.assign(assigner="max-iou")
    total = len(scene.boxes)
    without = torch.bincount(plain[plain >= 0], minlength=total) == 0
    facts["claimed"] = str(counts[3][0] - counts[2][0])
    facts["unmatched"] = str(int(without.sum()))
    facts["differ"] = str(int((own != other).sum()))
    for name, assigned in (("own", own), ("other", other)):
        shares = torch.bincount(assigned[assigned >= 0], minlength=total)[without]
        facts[f"shares_{name}"] = ", ".join(map(str, shares.tolist()))
    iou = retinanet.pairwise_iou(scene.boxes[None], scene.anchors)[0]
    facts["smallest_iou"] = f"{float(iou.amax(dim=1).min()):.2f}"
    facts["share_fg"] = f"{100 * counts[3][0] / len(scene.anchors):.2f} %"
    first = int((own != other).nonzero()[0, 0])
    mine, theirs = int(own[first]), int(other[first])
    facts["dispute_own"] = f"{float(iou[mine, first]):.2f}"
    facts["dispute_other"] = f"{float(iou[theirs, first]):.2f}"
    box, anchor, code, overlap = method.coding_example(scene)
    facts["code_iou"] = f"{overlap:.2f}"
    for name, corners in (("box", box), ("anchor", anchor)):
        x, y = ((corners[:2] + corners[2:]) / 2).tolist()
        w, h = (corners[2:] - corners[:2]).tolist()
        facts |= {f"{name}_{k}": f"{v:.2f}" for k, v in zip("xywh", (x, y, w, h), strict=True)}
        facts[name] = ", ".join(f"{v:.2f}" for v in corners.tolist())
    facts |= {
        f"d{k}": f"{v:+.4f}".replace("-", "−") for k, v in zip("xywh", code.tolist(), strict=True)
    }
    back = retinanet.decode_boxes(code, anchor).tolist()
    facts["decoded"] = ", ".join(f"{v:.2f}" for v in back)
    for name, p in (("half", 0.5), ("prior", PRIOR)):
        for kind, losses in method.first_losses(scene, p).items():
            for side, loss in zip(("fg", "bg"), losses, strict=True):
                shown = f"{loss:,.0f}" if loss >= 100 else f"{loss:.2f}"
                facts[f"{'ce' if kind == 'cross entropy' else 'fl'}_{name}_{side}"] = shown
    return facts


@functools.cache
def facts() -> dict[str, str]:
    """Return every number of the pages by its name."""
    model, *_ = network()
    easy = (1 - 0.9) ** 2
    return (
        _network_facts()
        | _anchor_facts()
        | _example_facts()
        | _detector_facts()
        | _gradient_facts()
        | _class_facts()
        | _size_facts()
        | _photograph_facts()
        | {f"shapes_{name}": f"{value:,}" for name, value in disputes_on_shapes().items()}
        | {
            "clamp": f"{retinanet.MAX_LOG_SCALE:.3f}",
            "growth": f"{math.exp(retinanet.MAX_LOG_SCALE):g}",
            "alpha": f"{retinanet.ALPHA:g}",
            "easy_factor": f"{1 / easy:.0f}",
            "fg_iou": f"{model.proposal_matcher.high_threshold:g}",
            "bg_iou": f"{model.proposal_matcher.low_threshold:g}",
            "most_candidates": f"{len(LEVELS) * model.topk_candidates:,}",
            "score_thresh": f"{model.score_thresh:g}",
            "topk": f"{model.topk_candidates:,}",
            "nms_thresh": f"{model.nms_thresh:g}",
            "detections": str(model.detections_per_img),
            "epochs": str(RECIPE.epochs),
            "lr": f"{RECIPE.lr:g}",
            "lr_steps": ", ".join(map(str, RECIPE.lr_steps)),
            "lr_gamma": f"{RECIPE.lr_gamma:g}",
            "momentum": f"{RECIPE.momentum:g}",
            "wd": f"{RECIPE.wd:g}",
            "batch": str(RECIPE.batch_size),
            "global_batch": str(RECIPE_BATCH),
            "factor": str(RECIPE.aspect_ratio_group_factor),
        }
    )
