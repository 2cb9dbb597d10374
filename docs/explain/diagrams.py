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
            f'width="{width}" height="{height}" font-family="{FONT}" font-size="14" fill="{INK}">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            'markerHeight="7" orient="auto">',
            f'<path d="M0 0L10 5L0 10z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        ]

    def text(self, x: float, y: float, text: str, size: int = 14, anchor: str = "middle") -> None:
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
        top = y + h / 2 - 9 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            self.text(x + w / 2, top + 18 * number, line, 15 if number == 0 else 14)

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
                self.text((x0 + x1) / 2, (y0 + y1) / 2 + (16 if below else -7), label)
            else:
                self.text(x0 + 7, (y0 + y1) / 2 + 5, label, anchor="start")

    def svg(self) -> str:
        """Return the file's text."""
        return "\n".join([*self.parts, "</svg>", ""])


def _spread(start: float, step: float) -> Iterable[float]:
    while True:
        yield start
        start += step


def draw_structure(sizes: Mapping[str, str], per_cell: int, classes: int) -> str:
    """Draw backbone, pyramid and heads; `sizes` has "H × W" of the image, C2 to C5, P3 to P7."""
    page = Drawing(1000, 545, "RetinaNet: ResNet, feature pyramid, two heads for all levels")
    for x, text in ((105, "ResNet-50"), (390, "feature pyramid, 256 channels"), (800, "heads")):
        page.text(x, 26, text, 17)
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
        page.arrow((530, y), (625, y))
    top, bottom = rows["P7"], rows["C3"] + 44
    page.box(625, top, 12, bottom - top, [], "data")
    page.text(631, bottom + 18, "each level by itself,")
    page.text(631, bottom + 34, "with the same weights")
    outputs = (("classes", "class head", 60, classes), ("boxes", "box head", 228, 4))
    for fill, heading, y, width in outputs:
        page.arrow((637, y + 62), (672, y + 62))
        page.box(672, y, 130, 124, [heading, "4 × (3×3, 256", "and ReLU),", "then 3×3"], fill)
        page.arrow((802, y + 62), (835, y + 62))
        what = "logits" if fill == "classes" else "codes"
        lines = [f"{per_cell} × {width} = {per_cell * width}", f"{what} per cell"]
        page.box(835, y + 36, 140, 52, lines, fill)
    return page.svg()


def draw_flow(shapes: Mapping[str, str], numbers: Mapping[str, str]) -> str:
    """Draw the way of a batch from files to losses, and from an image to detections.

    `shapes` has those of image, batch, levels, logits, codes, anchors, boxes, labels and assigned;
    `numbers` is what `facts` returns.
    """
    page = Drawing(1000, 680, "From file to loss, and from image to detections")

    def note(x: float, y: float, *lines: str, anchor: str = "start") -> None:
        for number, line in enumerate(lines):
            page.text(x, y + 18 * number, line, anchor=anchor)

    page.text(20, 28, "training", 17, "start")
    page.box(20, 45, 150, 66, ["COCO JSON", "packed arrays,", "mapped labels"], "data")
    page.arrow((170, 78), (240, 78), label="index")
    page.box(240, 45, 160, 66, ["worker process", "decode, augment"], "data")
    page.arrow((400, 78), (650, 78), label=f"uint8 {shapes['image']}, boxes, labels")
    page.box(650, 45, 210, 66, ["device", "float / 255, normalise;", "resize both, pad"], "data")
    page.arrow((800, 111), (800, 175), label=shapes["batch"])
    page.box(700, 175, 200, 46, ["ResNet, pyramid"], "backbone")
    page.arrow((800, 221), (800, 275), label=shapes["levels"])
    page.box(700, 275, 200, 46, ["two heads"], "pyramid")
    page.arrow((740, 321), (740, 400))
    note(732, 350, "logits", shapes["logits"], anchor="end")
    page.arrow((850, 321), (850, 400))
    note(858, 350, "codes", shapes["codes"])
    # The boxes that are assigned are those of the resized image.
    page.arrow((690, 111), (690, 143), (8, 143), (8, 298), (20, 298))
    note(682, 136, "boxes, resized with the image, and labels", anchor="end")
    page.box(20, 175, 200, 46, ["make_anchors", "cached for each shape"], "targets")
    page.box(20, 275, 200, 46, ["pad_targets", "one tensor per batch"], "targets")
    thresholds = f"IoU ≥ {numbers['fg_iou']}, < {numbers['bg_iou']},"
    page.box(370, 215, 150, 66, ["assign", thresholds, "claims"], "targets")
    page.arrow((220, 198), (300, 198), (300, 232), (370, 232))
    note(228, 190, f"anchors {shapes['anchors']}")
    page.arrow((220, 298), (300, 298), (300, 264), (370, 264))
    note(228, 318, f"boxes {shapes['boxes']}", f"labels {shapes['labels']}")
    page.box(400, 400, 500, 86, [], "classes")
    page.box(415, 428, 150, 48, ["encode_boxes", "boxes → codes"], "targets")
    page.text(650, 420, "detection_losses", 15)
    note(
        580, 446, "focal loss of the logits, L1 of the codes;", "per foreground anchor of the image"
    )
    page.arrow((445, 281), (445, 400))
    note(453, 304, "of each anchor a box,", f"−1 or −2: {shapes['assigned']}")
    page.arrow((120, 321), (120, 452), (415, 452))
    note(128, 444, "boxes, labels, and the anchors")
    page.arrow((900, 443), (935, 443))
    note(940, 438, "two", "losses")
    page.parts.append(
        f'<line x1="20" y1="525" x2="980" y2="525" stroke="{INK}" stroke-dasharray="4 4"/>'
    )
    text = "detection: the same network, then what torchvision's postprocess_detections does"
    page.text(20, 560, text, 17, "start")
    names = (
        (["sigmoid", f"score > {numbers['score_thresh']}"], "classes", 120),
        ([f"top {numbers['topk']}", "of each level"], "classes", 120),
        (["BoxCoder", "decode, clip"], "boxes", 120),
        (["NMS per class", f"IoU {numbers['nms_thresh']}"], "pyramid", 130),
        ([f"best {numbers['detections']}", "boxes, labels, scores"], "data", 170),
    )
    x, most = 20.0, f"≤ {numbers['most_candidates']}"
    for number, (lines, fill, width) in enumerate(names):
        page.box(x, 590, width, 54, lines, fill)
        x += width
        if number < len(names) - 1:
            page.arrow((x, 617), (x + 74, 617), label=most if number in (1, 2) else "")
            x += 74
    return page.svg()
