"""The tables of docs/retinanet*.md, in English and Chinese, from the numbers of `facts`."""

from __future__ import annotations

from collections.abc import Sequence

from docs.explain import facts
from docs.explain.pictures import example_scene
from models import retinanet
from models.retinanet import ANCHOR_RATIOS, ANCHOR_SIZES
from tools.plots.method import LEVELS

HEADERS = {
    "parts": (
        ("part", "height × width", "stride", "channels", "parameters", "10⁹ multiply-adds"),
        ("部分", "高 × 宽", "步长", "通道", "参数量", "10⁹ 乘加"),
    ),
    "anchors": (
        ("level", "stride", "cells", "pixels between cells", "anchors", "sides of the square ones"),
        ("层", "步长", "格子", "格子间距（像素）", "锚框", "边长（1 : 1）"),
    ),
    "rounding": (
        ("anchor of P3", "exact (MMDetection)", "rounded (torchvision, here)"),
        ("P3 的锚框", "精确值（MMDetection）", "取整后（torchvision，本项目）"),
    ),
    "gpus": (
        ("GPUs", "images each", "`--accumulate-steps`", "global batch", "rate")
        + ("or: without accumulating, `--scale-lr`",),
        ("GPU 数", "每 GPU 图像", "`--accumulate-steps`", "全局批量", "学习率")
        + ("或：不累积，`--scale-lr`",),
    ),
    "worked_iou": (
        ("IoU", *(f"anchor {k}" for k in range(8))),
        ("交并比", *(f"锚框 {k}" for k in range(8))),
    ),
    "worked": (
        ("after", *(f"anchor {k}" for k in range(8))),
        ("执行之后", *(f"锚框 {k}" for k in range(8))),
    ),
    "gradients": (
        ("p", "absent: cross entropy", "absent: focal loss", "present: cross entropy")
        + ("present: focal loss",),
        ("p", "不存在：交叉熵", "不存在：焦点损失", "存在：交叉熵", "存在：焦点损失"),
    ),
}


def _minus(number: int | str) -> str:
    return str(number).replace("-", "−")


def _parts(zh: bool) -> list[list[str]]:
    names = {
        "classification_head": "分类头" if zh else "class head",
        "regression_head": "回归头" if zh else "box head",
    }
    rows = [
        [
            names.get(name, name),
            f"{height} × {width}" if height else "P3–P7",
            str(stride or ""),
            f"{channels:,}",
            f"{parameters:,}",
            f"{adds / 1e9:.1f}",
        ]
        for name, (height, width), stride, channels, adds, parameters in facts.parts()
    ]
    numbers = facts.facts()
    return [*rows, ["合计" if zh else "total", "", "", "", numbers["params"], numbers["gmacs"]]]


def _anchors(zh: bool) -> list[list[str]]:
    _, shapes, _ = facts.network()
    _, rounded = facts.base_anchors()
    spacings = example_scene(paint=False).spacing()
    rows, total = [], 0
    for number, (level, nine) in enumerate(zip(LEVELS, rounded, strict=True)):
        height, width = shapes[level][2:]
        cells = height * width
        total += cells
        sides = ", ".join(f"{w:.0f}" for w, h in nine if w == h)
        sizes = f"{height} × {width} = {cells:,}"
        spacing = "{} × {}".format(*spacings[number])
        rows.append([level, str(8 * 2**number), sizes, spacing, f"{9 * cells:,}", sides])
    return [*rows, ["合计" if zh else "sum", "", f"{total:,}", "", f"{9 * total:,}", ""]]


def _rounding(zh: bool) -> list[list[str]]:
    exact, rounded = facts.base_anchors()
    return [
        [
            f"{ANCHOR_SIZES[0]} · 2^({k % 3}/3), {ANCHOR_RATIOS[k // 3]:g}",
            "{:.2f} × {:.2f}".format(*exact[0, k]),
            "{:.0f} × {:.0f}".format(*rounded[0, k]),
        ]
        for k in range(9)
    ]


def _gpus(zh: bool) -> list[list[str]]:
    rate, batch = facts.RECIPE.lr, facts.RECIPE_BATCH
    rows = []
    for gpus, each in ((8, 2), (4, 4), (2, 8), (1, 16), (1, 8), (1, 2)):
        steps = batch // (each * gpus)
        scaled = rate * each * gpus / batch
        rows.append([f"{v:g}" for v in (gpus, each, steps, each * gpus * steps, rate, scaled)])
    return rows


def _worked_iou(zh: bool) -> list[list[str]]:
    iou, _ = facts.worked_example()
    peaks, best = iou.amax(dim=1, keepdim=True), iou.amax(dim=0)
    rows = []
    for number, values in enumerate(iou):
        cells = []
        for value, best_here in zip(values, best, strict=True):
            # Bold: the best box of an anchor. A star: a best anchor of the box, which it claims.
            text = f"{value:.2f}" if value else "0"
            text = f"**{text}**" if 0 < value == best_here else text
            cells.append(f"{text} \\*" if value == peaks[number] else text)
        rows.append([f"框 {number}" if zh else f"box {number}", *cells])
    return rows


def _worked(zh: bool) -> list[list[str]]:
    """Show the assignment as its codes: "here / MMDetection"."""
    codes = {retinanet.IGNORED: -1, retinanet.BACKGROUND: 0}
    _, steps = facts.worked_example()
    names = ["规则 1", "规则 2", "规则 3"] if zh else ["rule 1", "rule 2", "rule 3"]
    names += [f"{'规则' if zh else 'rule'} 4, `{name}`" for name in retinanet.ASSIGNERS]
    rows = []
    for name, step in zip(names, steps, strict=True):
        cells = [f"{_minus(v)} / {_minus(codes.get(v, v + 1))}" for v in step.tolist()]
        rows.append([name, *cells])
    return rows


def _gradients(zh: bool) -> list[list[str]]:
    rows = []
    for p in (0.01, 0.1, 0.5, 0.9, 0.99):
        values = facts.gradients(p)
        order = ("ce_absent", "fl_absent", "ce_present", "fl_present")
        rows.append([f"{p:g}", *(facts.significant(values[key]) for key in order)])
    return rows


ROWS = {
    "parts": _parts,
    "anchors": _anchors,
    "rounding": _rounding,
    "gpus": _gpus,
    "worked_iou": _worked_iou,
    "worked": _worked,
    "gradients": _gradients,
}


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(name: str, language: str) -> str:
    """Return a table of the pages as Markdown, its words in "en" or "zh".

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in ROWS:
        raise ValueError(f"table {name!r} is unknown")
    zh = language == "zh"
    return _markdown(HEADERS[name][zh], ROWS[name](zh))
