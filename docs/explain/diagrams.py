"""Two diagrams of RetinaNet as SVG: the structure of the network, and how data flow through it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from xml.sax.saxutils import escape

INK, PAPER = "#1b1f24", "#ffffff"
# Pale fills under dark text.
FILLS = {
    "backbone": "#dbe9f6",
    "pyramid": "#d9f0e3",
    "classes": "#fde8cf",
    "boxes": "#f6dcea",
    "targets": "#fff6c8",
    "data": "#eceef1",
}
FONT = "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"


class Drawing:
    """An SVG page with a white ground, so that it is legible on dark pages, too."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="{FONT}" font-size="13" fill="{INK}">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            'markerHeight="7" orient="auto">',
            f'<path d="M0 0L10 5L0 10z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        ]

    def text(self, x: float, y: float, text: str, size: int = 13, anchor: str = "middle") -> None:
        """Write a line; `y` is its base line."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )

    def box(self, x: float, y: float, w: float, h: float, lines: Sequence[str], fill: str) -> None:
        """Draw a rectangle with centred lines; the first is a heading."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="5" '
            f'fill="{FILLS[fill]}" stroke="{INK}"/>'
        )
        top = y + h / 2 - 8 * (len(lines) - 1) + 4.5
        for number, line in enumerate(lines):
            self.text(x + w / 2, top + 16 * number, line, 13 if number == 0 else 12)

    def arrow(self, *points: tuple[float, float], label: str = "", below: bool = False) -> None:
        """Draw an arrow along `points`, its label over (or under) the middle of its first leg."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.3" '
            'marker-end="url(#tip)"/>'
        )
        if label:
            (x0, y0), (x1, y1) = points[:2]
            if abs(x1 - x0) > abs(y1 - y0):
                self.text((x0 + x1) / 2, (y0 + y1) / 2 + (15 if below else -6), label, 12)
            else:
                self.text(x0 + 7, (y0 + y1) / 2 + 4, label, 12, "start")

    def svg(self) -> str:
        """Return the file's text."""
        return "\n".join([*self.parts, "</svg>", ""])


def _spread(start: float, step: float) -> Iterable[float]:
    while True:
        yield start
        start += step


def draw_structure(sizes: Mapping[str, str], per_cell: int, classes: int) -> str:
    """Draw backbone, pyramid and heads; `sizes` has "H × W" of the image, C2 to C5, P3 to P7."""
    page = Drawing(980, 545, "RetinaNet: ResNet, feature pyramid, two heads for all levels")
    for x, text in ((105, "ResNet-50"), (390, "feature pyramid, 256 channels"), (775, "heads")):
        page.text(x, 26, text, 15)
    rows = dict(zip(("P7", "P6", "C5", "C4", "C3", "C2", "image"), _spread(45, 72), strict=False))
    page.box(30, rows["image"], 150, 44, ["image", f"3 × {sizes['image']}"], "data")
    below = "image"
    for name, channels in (("C2", 256), ("C3", 512), ("C4", 1024), ("C5", 2048)):
        label = "stem, layer1" if name == "C2" else f"layer{int(name[1]) - 1}"
        page.box(30, rows[name], 150, 44, [name, f"{channels:,} × {sizes[name]}"], "backbone")
        page.arrow((105, rows[below]), (105, rows[name] + 44), label=label)
        below = name
    for level in "543":
        y = rows[f"C{level}"]
        page.arrow((180, y + 22), (262, y + 22), label="1×1")
        page.box(262, y, 70, 44, ["+"] if level != "5" else ["256 ch."], "pyramid")
        page.arrow((332, y + 22), (400, y + 22), label="3×3")
        page.box(400, y, 130, 44, [f"P{level}", sizes[f"P{level}"]], "pyramid")
        if level != "3":
            page.arrow((297, y + 44), (297, y + 72), label="× 2, nearest")
    # torchvision's own choice: the paper, Detectron2 and MMDetection compute P6 from C5.
    for name, below, label in (("P6", "C5", "3×3, stride 2"), ("P7", "P6", "ReLU, 3×3, stride 2")):
        page.box(400, rows[name], 130, 44, [name, sizes[name]], "pyramid")
        page.arrow((465, rows[below]), (465, rows[name] + 44), label=label)
    for y in (rows[name] + 22 for name in ("P7", "P6", "C5", "C4", "C3")):
        page.arrow((530, y), (600, y))
    top, bottom = rows["P7"], rows["C3"] + 44
    page.box(600, top, 12, bottom - top, [], "data")
    page.text(606, bottom + 18, "each level by itself,", 12)
    page.text(606, bottom + 34, "with the same weights", 12)
    outputs = (("classes", "class head", 60, classes), ("boxes", "box head", 228, 4))
    for fill, heading, y, width in outputs:
        page.arrow((612, y + 62), (650, y + 62))
        page.box(650, y, 130, 124, [heading, "4 × (3×3, 256", "and ReLU),", "then 3×3"], fill)
        page.arrow((780, y + 62), (815, y + 62))
        what = "logits" if fill == "classes" else "codes"
        lines = [f"{per_cell} × {width} = {per_cell * width}", f"{what} per cell"]
        page.box(815, y + 36, 140, 52, lines, fill)
    return page.svg()


def draw_flow(shapes: Mapping[str, str]) -> str:
    """Draw the way of a batch from files to losses, and from an image to detections.

    `shapes` has those of image, batch, levels, logits, codes, anchors, boxes, labels and assigned.
    """
    page = Drawing(980, 592, "From file to loss, and from image to detections")
    page.text(20, 28, "training", 15, "start")
    page.box(20, 45, 150, 60, ["COCO JSON", "packed arrays,", "mapped labels"], "data")
    page.arrow((170, 75), (250, 75), label="index")
    page.box(250, 45, 150, 60, ["worker process", "decode, augment"], "data")
    page.arrow((400, 75), (640, 75), label=f"uint8 {shapes['image']}, boxes")
    page.box(640, 45, 170, 60, ["device", "float / 255, normalise,", "resize, pad"], "data")
    page.arrow((725, 105), (725, 155), label=shapes["batch"])
    page.box(640, 155, 170, 48, ["ResNet, pyramid"], "backbone")
    page.arrow((725, 203), (725, 253), label=shapes["levels"])
    page.box(640, 253, 170, 48, ["two heads"], "pyramid")
    page.arrow((685, 301), (685, 372))
    page.text(678, 338, f"logits {shapes['logits']}", 12, "end")
    page.arrow((765, 301), (765, 372), label=f"codes {shapes['codes']}")
    page.box(
        600,
        372,
        250,
        60,
        ["detection_losses", "focal loss, L1 of codes,", "per foreground anchor"],
        "classes",
    )
    page.arrow((850, 402), (895, 402))
    page.text(900, 398, "two", 12, "start")
    page.text(900, 414, "losses", 12, "start")
    page.box(20, 155, 190, 48, ["make_anchors", "once per shape, cached"], "targets")
    page.box(20, 253, 190, 48, ["pad_targets", "boxes and labels of a batch"], "targets")
    page.arrow((325, 105), (325, 130), (5, 130), (5, 277), (20, 277))
    page.text(330, 146, "boxes, labels", 12, "start")
    page.box(300, 203, 150, 60, ["assign", "IoU ≥ 0.5, < 0.4,", "claims"], "targets")
    page.arrow((210, 179), (255, 179), (255, 220), (300, 220))
    page.text(216, 172, f"anchors {shapes['anchors']}", 12, "start")
    page.arrow((210, 277), (255, 277), (255, 246), (300, 246))
    page.text(216, 296, f"boxes {shapes['boxes']}", 12, "start")
    page.text(216, 312, f"labels {shapes['labels']}", 12, "start")
    page.arrow((375, 263), (375, 402), (600, 402))
    page.text(383, 372, f"a box, −1 or −2: {shapes['assigned']}", 12, "start")
    page.text(383, 388, "and codes of its boxes", 12, "start")
    page.parts.append(
        f'<line x1="20" y1="460" x2="960" y2="460" stroke="{INK}" stroke-dasharray="4 4"/>'
    )
    page.text(20, 490, "detection: the same network, then for each image", 15, "start")
    names = (
        (["sigmoid", "score > 0.05"], "classes", 130),
        (["top 1,000", "of each level"], "classes", 130),
        (["decode_boxes", "clip to the image"], "boxes", 150),
        (["NMS per class", "IoU 0.5"], "pyramid", 130),
        (["best 300", "boxes, labels, scores"], "data", 160),
    )
    x = 20.0
    for number, (lines, fill, width) in enumerate(names):
        page.box(x, 520, width, 52, lines, fill)
        x += width
        if number < len(names) - 1:
            page.arrow((x, 546), (x + 60, 546), label="≤ 5,000" if number in (1, 2) else "")
            x += 60
    return page.svg()
