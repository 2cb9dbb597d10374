"""Fill docs/retinanet*.md with numbers and code from this project, and draw their pictures.

    python -m docs.explain

Between `<!-- code: FILE | FIRST | LAST -->` and `<!-- end -->` comes the source, from the line that
holds the text FIRST to the next that holds LAST; between `<!-- table: NAME -->` and `<!-- end -->`
a table; between `<!--=NAME-->` and `<!---->` a number. A test asserts that the pages hold what the
code says now.
"""

from __future__ import annotations

from data import coco_arrays, image_files

if not __package__:  # run as a file, it would not find the modules beside tools/
    raise SystemExit("run it as: python -m docs.explain")

import argparse
import functools
import math
import re
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from data import coco_json, shapes
from docs.explain import diagrams as explain_diagrams
from docs.explain import pictures as explain_pictures
from docs.explain.pictures import CLASSES, LEVELS, PRIOR, SIZE, example_scene
from models import retinanet
from models.build import (
    ANCHOR_RATIOS,
    ANCHOR_SIZES,
    build_model,
    load_detector,
    make_anchor_generator,
)

ROOT = Path(__file__).parents[1]
PAGES = {"en": "docs/retinanet.md", "zh": "docs/retinanet.zh-CN.md"}
PICTURES = ROOT / "docs" / "pictures"
CHECKPOINT = ROOT / "runs" / "docs" / "best.pth"
SHAPES = 64  # images of the embedded data set whose assignment is counted
RECIPE = train.build_parser().parse_args([])


@functools.cache
def network() -> tuple[Any, dict[str, tuple[int, ...]], dict[str, float]]:
    """Return the recipe's model, shapes of its outputs, and multiply-adds per module, for `SIZE`.

    Nothing is computed: the tensors have shapes alone.
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
        scene = explain_pictures.make_scene(blank, tensor, names, min_size, max_size)
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
    facts |= {f"size_{name}": f"{h} × {w}" for name, (h, w), *_ in rows}
    return facts


def _anchor_facts() -> dict[str, str]:
    exact, rounded = base_anchors()
    shared = np.minimum(exact, rounded).prod(axis=2)
    iou = shared / (exact.prod(axis=2) + rounded.prod(axis=2) - shared)
    sides = np.arange(10, 60)
    best = [explain_pictures.best_overlap(float(side), float(side)) for side in sides]
    always = next(int(s) for s, v in zip(sides, best, strict=True) if v.min() >= 0.5)
    never = [int(s) for s, v in zip(sides, best, strict=True) if v.max() < 0.4]
    return {
        "rounding_px": f"{np.abs(exact - rounded).max():.1f}",
        "rounding_iou": f"{iou.min():.3f}",
        "rounding_level": LEVELS[int(np.unravel_index(iou.argmin(), iou.shape)[0])],
        "sure_side": str(always),
        "lost_side": str(max(never)),
        "lost_area": f"{32 * math.sqrt(0.4):.1f}",
        "wide_best": f"{explain_pictures.best_overlap(200, 50).mean():.2f}",
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
    counts = [explain_pictures.count(step) for step in explain_pictures.steps(scene)]
    for number, values in enumerate(counts, 1):
        for name, value in zip(("fg", "bg", "ignored"), values, strict=True):
            facts[f"{name}_{number}"] = f"{value:,}"
    plain, own = explain_pictures.steps(scene)[2:]
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
    box, anchor, code, overlap = explain_pictures.coding_example(scene)
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
        for kind, losses in explain_pictures.first_losses(scene, p).items():
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
        | {f"shapes_{name}": f"{value:,}" for name, value in disputes_on_shapes().items()}
        | {
            "clamp": f"{retinanet.MAX_LOG_SCALE:.3f}",
            "growth": f"{math.exp(retinanet.MAX_LOG_SCALE):g}",
            "alpha": f"{retinanet.ALPHA:g}",
            "easy_factor": f"{1 / easy:.0f}",
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
            "global_batch": str(train.RECIPE_BATCH),
            "factor": str(RECIPE.aspect_ratio_group_factor),
        }
    )


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(name: str, language: str) -> str:
    """Return a table of the pages as Markdown, its words in "en" or "zh".

    Raises:
        ValueError: if there is none of that name.
    """
    zh = language == "zh"
    if name == "parts":
        words = {"classification_head": "分类头" if zh else "class head"}
        words |= {"regression_head": "回归头" if zh else "box head"}
        header = (
            ["部分", "高 × 宽", "步长", "通道", "参数量", "10⁹ 乘加"]
            if zh
            else ["part", "height × width", "stride", "channels", "parameters", "10⁹ multiply-adds"]
        )
        rows = [
            [words.get(n, n), f"{h} × {w}" if h else "P3–P7", str(s or ""), f"{c:,}"]
            + [f"{p:,}", f"{a / 1e9:.1f}"]
            for n, (h, w), s, c, a, p in parts()
        ]
        numbers = facts()
        total = ["合计" if zh else "total", "", "", "", numbers["params"], numbers["gmacs"]]
        return _markdown(header, [*rows, total])
    if name == "anchors":
        header = (
            ["层", "步长", "格子", "锚框", "边长（1 : 1）"]
            if zh
            else ["level", "stride", "cells", "anchors", "sides of the square ones"]
        )
        _, found, _ = network()
        rows, total_cells = [], 0
        _, rounded = base_anchors()
        for level, nine in zip(LEVELS, rounded, strict=True):
            h, w = found[level][2:]
            total_cells += h * w
            sides = ", ".join(f"{side:.0f}" for side, height in nine if side == height)
            cells = f"{h} × {w} = {h * w:,}"
            rows.append([level, str(8 * 2 ** len(rows)), cells, f"{9 * h * w:,}", sides])
        total = ["合计" if zh else "sum", "", f"{total_cells:,}", f"{9 * total_cells:,}", ""]
        return _markdown(header, [*rows, total])
    if name == "rounding":
        header = (
            ["P3 的锚框", "精确值（MMDetection）", "取整后（torchvision，本项目）"]
            if zh
            else ["anchor of P3", "exact (MMDetection)", "rounded (torchvision, here)"]
        )
        exact, rounded = base_anchors()
        rows = []
        for k in range(9):
            ratio = f"{ANCHOR_RATIOS[k // 3]:g}"
            label = f"{ANCHOR_SIZES[0]} · 2^({k % 3}/3), {ratio}"
            pairs = [f"{w:.2f} × {h:.2f}" for w, h in (exact[0, k],)]
            rows.append([label, *pairs, "{:.0f} × {:.0f}".format(*rounded[0, k])])
        return _markdown(header, rows)
    if name == "gpus":
        header = (
            [
                "GPU 数",
                "每 GPU 图像",
                "`--accumulate-steps`",
                "全局批量",
                "学习率",
                "或：不累积，`--scale-lr`",
            ]
            if zh
            else ["GPUs", "images each", "`--accumulate-steps`", "global batch", "rate"]
            + ["or: without accumulating, `--scale-lr`"]
        )
        rows = []
        for gpus in (8, 4, 2, 1):
            each = RECIPE.batch_size
            steps = train.RECIPE_BATCH // (each * gpus)
            scaled = RECIPE.lr * each * gpus / train.RECIPE_BATCH
            values = (gpus, each, steps, each * gpus * steps, f"{RECIPE.lr:g}", f"{scaled:g}")
            rows.append([str(value) for value in values])
        return _markdown(header, rows)
    raise ValueError(f"table {name!r} is unknown")


def quote(spec: str) -> str:
    """Return the source that "FILE | FIRST | LAST" names, without its common indentation.

    Raises:
        ValueError: if FIRST or, from there on, LAST is in no line of the file.
    """
    path, first, last = (part.strip() for part in spec.split("|"))
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(lines) if first in line]
    ends = [i for i, line in enumerate(lines) if starts and i >= starts[0] and last in line]
    if not ends:
        raise ValueError(f"{path} has no lines from {first!r} to {last!r}")
    return textwrap.dedent("\n".join(lines[starts[0] : ends[0] + 1]))


def fill(text: str, language: str) -> str:
    """Return a page with all numbers, tables and code put in anew."""

    def region(match: re.Match[str]) -> str:
        kind, spec = match[1], match[2].strip()
        new = f"```python\n{quote(spec)}\n```" if kind == "code" else table(spec, language)
        return f"<!-- {kind}: {spec} -->\n\n{new}\n\n<!-- end -->"

    def number(match: re.Match[str]) -> str:
        name = match[1]
        if name not in facts():
            raise ValueError(f"number {name!r} is unknown")
        return f"<!--={name}-->{facts()[name]}<!---->"

    text = re.sub(r"<!-- (code|table): (.+?) -->\n.*?<!-- end -->", region, text, flags=re.DOTALL)
    return re.sub(r"<!--=(\w+)-->.*?<!---->", number, text)


def draw_all() -> None:
    """Draw the pages' pictures; the one of detections needs the model that `make docs` trains."""
    numbers = facts()
    sizes = {key.removeprefix("size_"): value for key, value in numbers.items() if "size_" in key}
    sizes["image"] = numbers["image"]
    _, found, _ = network()
    anchors, batch = found["cls_logits"][1], RECIPE.batch_size
    shown = {
        "image": "[3, H, W]",
        "batch": f"float32 [{batch}, 3, {SIZE[0]}, {SIZE[1]}]",
        "levels": f"5 × [{batch}, 256, h, w]",
        "logits": f"[{batch}, {anchors:,}, {CLASSES}]",
        "codes": f"[{batch}, {anchors:,}, 4]",
        "anchors": f"[{anchors:,}, 4]",
        "boxes": f"[{batch}, M, 4]",
        "labels": f"[{batch}, M]",
        "assigned": f"[{batch}, {anchors:,}]",
    }
    for name, svg in (
        ("structure", explain_diagrams.draw_structure(sizes, 9, CLASSES)),
        ("pipeline", explain_diagrams.draw_flow(shown)),
    ):
        (PICTURES / f"retinanet_{name}.svg").write_text(svg, encoding="utf-8")
    scene = example_scene()
    for name in ("anchors", "assignment", "coding", "focal"):
        figure = getattr(explain_pictures, f"draw_{name}")(scene)
        suffix = "jpg" if name in ("anchors", "assignment") else "png"
        figure.savefig(PICTURES / f"retinanet_{name}.{suffix}", pil_kwargs={"optimize": True})
    figure = explain_pictures.draw_coverage()
    figure.savefig(PICTURES / "retinanet_coverage.png", pil_kwargs={"optimize": True})
    if CHECKPOINT.exists():
        draw_detections()


def draw_detections() -> None:
    """Draw how the model of `CHECKPOINT` comes to its detections in an image it never saw."""
    model, label_map = load_detector(str(CHECKPOINT))
    with tempfile.TemporaryDirectory() as folder:
        root = shapes.make_shapes(folder, 1, 1)
        path = next((root / "val2017").iterdir())
        annotations, _ = coco_json.read_annotations(root / "annotations" / "instances_val2017.json")
        height, width = annotations.sizes[0].tolist()
        image = image_files.read_image(path, root, (height, width))
    names = {category["label"]: category["name"] for category in label_map}
    figure = explain_pictures.draw_detections(model, image, names)
    figure.savefig(PICTURES / "retinanet_detections.jpg", pil_kwargs={"optimize": True})


def main(argv: list[str] | None = None) -> None:
    """Fill the pages, and draw their pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--pages-only", action="store_true", help="leave the pictures as they are")
    flags = parser.parse_args(argv)
    for language, page in PAGES.items():
        path = ROOT / page
        path.write_text(fill(path.read_text(encoding="utf-8"), language), encoding="utf-8")
        print(page)
    if not flags.pages_only:
        draw_all()
        print(f"pictures in {PICTURES.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
