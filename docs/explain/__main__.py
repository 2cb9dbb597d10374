"""Fill docs/retinanet*.md with numbers and code from this project, and draw their pictures.

    python -m docs.explain

Between `<!-- code: FUNCTION | FIRST | LAST -->` and `<!-- end -->` comes the source of a function,
from its line that holds the text FIRST to the next that holds LAST; between `<!-- table: NAME -->`
and `<!-- end -->` a table; between `<!--=NAME-->` and `<!---->` a number. A test asserts that the
pages hold what the code says now.
"""

from __future__ import annotations

if not __package__:  # run as a file, it would not find the modules beside it
    raise SystemExit("run it as: python -m docs.explain")

import argparse
import ast
import re
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from data import coco_json, image_files, shapes
from docs.explain import diagrams, interactive, photograph, pictures
from docs.explain.facts import RECIPE, facts, network
from docs.explain.pictures import SIZE, example_scene
from docs.explain.tables import table
from models.build import load_detector
from tools.plots import method
from tools.plots.method import CLASSES

ROOT = Path(__file__).parents[2]
PAGES = {"en": "docs/retinanet.md", "zh": "docs/retinanet.zh-CN.md"}
INTERACTIVE = ROOT / "docs" / "retinanet.html"
PICTURES = ROOT / "docs" / "pictures"
CHECKPOINT = ROOT / "runs" / "docs" / "best.pth"
QUOTED = ("models", "runtime")  # the rooms whose code the pages show


def quote(spec: str) -> str:
    """Return the source that "FUNCTION | FIRST | LAST" names, without its common indentation.

    Raises:
        ValueError: unless one function of that name has lines with FIRST and, from there on, LAST.
    """
    name, first, last = (part.strip() for part in spec.split("|"))
    bodies = [
        source.splitlines()[node.lineno - 1 : node.end_lineno]
        for path in (path for room in QUOTED for path in sorted((ROOT / room).glob("*.py")))
        for source in [path.read_text(encoding="utf-8")]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    if len(bodies) != 1:
        raise ValueError(f"{len(bodies)} functions are called {name!r}")
    lines = bodies[0]
    starts = [i for i, line in enumerate(lines) if first in line]
    ends = [i for i, line in enumerate(lines) if starts and i >= starts[0] and last in line]
    if not ends:
        raise ValueError(f"{name} has no lines from {first!r} to {last!r}")
    return textwrap.dedent("\n".join(lines[starts[0] : ends[0] + 1]))


def fill(text: str, language: str) -> str:
    """Return a page with all numbers, tables and code put in again."""

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


def make_diagrams() -> dict[str, str]:
    """Return the SVG of the two diagrams by the name of its picture."""
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
    return {
        "structure": diagrams.draw_structure(sizes, 9, CLASSES),
        "pipeline": diagrams.draw_flow(shown, numbers),
    }


def draw_all() -> None:
    """Draw the pages' pictures; the one of detections needs the model that `make docs` trains."""
    for name, svg in make_diagrams().items():
        (PICTURES / f"retinanet_{name}.svg").write_text(svg, encoding="utf-8")
    scene = example_scene()
    photo = photograph.photograph_scene()
    # Lines and text only: SVG, with text as text. Date and random ids would differ in every file.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "retinanet", "font.size": 11}
    with matplotlib.rc_context(settings):
        for name, figure in (
            ("coverage", pictures.draw_coverage()),
            ("focal", method.draw_focal(scene)),
        ):
            figure.savefig(PICTURES / f"retinanet_{name}.svg", metadata={"Date": None})
    for name, figure in (
        ("anchors", method.draw_anchors(scene)),
        ("assignment", method.draw_assignment(scene)),
        ("coding", method.draw_coding(scene)),
        ("photograph", photograph.draw_photograph(photo)),
    ):
        _save_jpeg(figure, name)
    if CHECKPOINT.exists():
        draw_detections()
    else:  # the page keeps the candidates that it has
        found = interactive.candidates_of(INTERACTIVE.read_text(encoding="utf-8"))
        INTERACTIVE.write_text(interactive.page(found), encoding="utf-8")


def _save_jpeg(figure: Figure, name: str) -> None:
    options = {"optimize": True, "quality": 80}
    figure.savefig(PICTURES / f"retinanet_{name}.jpg", pil_kwargs=options)


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
    _save_jpeg(method.draw_detections(model, image, label_map), "detections")
    stages = method.detect_in_stages(model, image)
    found = interactive.candidates(stages, names)
    INTERACTIVE.write_text(interactive.page(found), encoding="utf-8")


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
