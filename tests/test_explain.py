"""The pages about the method have the code's numbers, and pictures work for any image.

python -m pytest tests/test_explain.py
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from torchvision.models.detection._utils import Matcher
from torchvision.ops import batched_nms, sigmoid_focal_loss

from docs.explain import __main__ as explain
from docs.explain import facts, interactive
from docs.explain import pictures as explain_pictures
from docs.explain.tables import table
from models import retinanet
from models.build import build_model
from runtime import checkpoint
from tools import visualize
from tools.plots import method
from utils import UserError

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {lang: (ROOT / page).read_text("utf-8") for lang, page in explain.PAGES.items()}


@pytest.fixture(scope="module")
def scene() -> method.Scene:
    return explain_pictures.example_scene(paint=False)


@pytest.mark.parametrize("language", explain.PAGES)
def test_the_page_has_the_numbers_and_code_of_this_project(
    pages: dict[str, str], language: str
) -> None:
    # After a change of the code: `make docs`, and read whether the sentences are still true.
    assert explain.fill(pages[language], language) == pages[language]


def test_both_pages_have_the_same_numbers_code_and_pictures(pages: dict[str, str]) -> None:
    marks = [
        re.findall(r"<!--=(\w+)-->|<!-- (?:code|table): (.+?) -->|\]\((pictures/\S+)\)", page)
        for page in pages.values()
    ]
    assert sorted(marks[0]) == sorted(marks[1])
    assert len(marks[0]) > 100
    headings = [re.findall(r"^#+", page, re.MULTILINE) for page in pages.values()]
    assert headings[0] == headings[1]


def test_a_wrong_number_and_a_wrong_line_of_code_are_found(pages: dict[str, str]) -> None:
    page = pages["en"]
    wrong = page.replace("-->182,403<!", "-->182,484<!", 1)
    assert wrong != page and explain.fill(wrong, "en") == page
    wrong = page.replace("matched.masked_fill_(best_iou < fg_iou_thresh", "matched.masked_fill_(0")
    assert wrong != page and explain.fill(wrong, "en") == page
    with pytest.raises(ValueError, match="'no_such'"):
        explain.fill("<!--=no_such-->1<!---->", "en")
    with pytest.raises(ValueError, match=r"assign has no lines from 'def assign\('"):
        explain.fill("<!-- code: assign | def assign( | no such -->\n<!-- end -->", "en")
    with pytest.raises(ValueError, match="0 functions are called 'no_such'"):
        explain.fill("<!-- code: no_such | a | b -->\n<!-- end -->", "en")
    with pytest.raises(ValueError, match="'no-such'"):
        explain.fill("<!-- table: no-such -->\n<!-- end -->", "en")


@pytest.mark.parametrize("language", explain.PAGES)
def test_pictures_have_alternative_texts_and_links_have_targets(
    pages: dict[str, str], language: str
) -> None:
    pictures = re.findall(r"!\[(.*?)\]\((.+?)\)", pages[language])
    assert len(pictures) == 9
    for text, path in pictures:
        assert len(text) > 15
        assert (ROOT / "docs" / path).stat().st_size > 1000
    for path in re.findall(r"\]\((?!https?:)(.+?)\)", pages[language]):
        file, _, part = path.partition("#")
        assert (ROOT / "docs" / file).exists(), path
        if not part:
            continue
        text = (ROOT / "docs" / file).read_text("utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        parts = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert part in parts or f'id="{part}"' in text, path
    # A comment at the start of a line would end the paragraph, and Markdown with it.
    assert not re.findall(r"^ {0,3}<!--=", pages[language], re.MULTILINE)
    total = sum(path.stat().st_size for path in explain.PICTURES.glob("retinanet_*"))
    assert total < 2.5e6


# Numbers that no mark fills. Of the code:
def numbers_in_code() -> dict[str, float]:
    model, *_ = facts.network()
    matcher, head = model.proposal_matcher, model.head.classification_head
    return {
        "0.5": matcher.high_threshold,
        "0.4": matcher.low_threshold,
        "800": model.transform.min_size[0],
        "1,333": model.transform.max_size,
        "32": model.transform.size_divisible,
        "256": model.backbone.out_channels,
        "9": head.num_anchors,
        "0.01": method.PRIOR,
        "0.25": retinanet.ALPHA,
        "-1": retinanet.BACKGROUND,
        "-2": retinanet.IGNORED,
        "100": 10**2,  # how many times less an easy "no" counts with gamma 2
        "81": 100 * (1 - 0.1) ** 2,  # percent that p = 0.1 keeps
        "1000": 16 * np.exp(retinanet.MAX_LOG_SCALE),
    }


# Of others, with the source; the page links to it or names its file.
PUBLISHED = {
    "the paper": "32.8 36.0 34.0 34.3 35.7 90,000 600 101",
    "torchvision": "36.4 41.5 26 0.02 90 300",
    "Detectron2": "37.4 38.7 270,000 640 0.1 0.9 100",
    "MMDetection": "36.5 39.5 39.0 36 12 24 0.3",
    "ATSS": "37.0 37.8 39.3",
    "issues": "2371 3239 8601 296 4118 7464 25",
    "Faster R-CNN": "10 16",
    "a copied note": "20,276",
}
# Measured once, as noted on the page: BCCD, and two runs of `make docs`.
MEASURED = "292 3,980 996 22 135,483 320 135,495 0.715 0.665 128 18 3"
# Sizes, sections, and numbers that are explained where they stand.
EXAMPLES = "0 1 2 3 4 5 6 7 8 10 12 13 16 19 20 25 38 50 64 128 200 427 512 640 1216 3.1 4.1 1,000"


def unmarked_numbers(page: str) -> Counter[str]:
    """Count the numbers of a page outside of marks, code, formulas, links and headings."""
    page = re.sub(r"<!-- (code|table): .+? -->\n.*?<!-- end -->", "", page, flags=re.DOTALL)
    for pattern in (
        r"<!--=\w+-->.*?<!---->",
        r"^    .*$",
        r"^代码注释：.*$",  # a translation of comments in the code
        r"`[^`]*`",
        r"\]\([^)]*\)",
        r"^#+ .*$",
        r"^\d+\. ",
    ):
        page = re.sub(pattern, "", page, flags=re.MULTILINE)
    return Counter(re.findall(r"(?<![\w.,])\d{1,4}(?:,\d{3})*(?:\.\d+)?(?![\dA-Za-z])", page))


def test_every_number_is_of_the_code_or_has_a_source(pages: dict[str, str]) -> None:
    code = numbers_in_code()
    for text, value in code.items():
        assert float(text.replace(",", "")) == pytest.approx(value), text
    known = {*code, *MEASURED.split(), *EXAMPLES.split()}
    known |= {number for numbers in PUBLISHED.values() for number in numbers.split()}
    numbers = {language: unmarked_numbers(page) for language, page in pages.items()}
    assert set(numbers["en"]) - known == set()
    # What one language has in figures, the other has too.
    assert numbers["en"] == numbers["zh"]
    wrong = pages["en"].replace("AP 32.8", "AP 32.9")
    assert set(unmarked_numbers(wrong)) - known == {"32.9"}


@pytest.mark.parametrize("language", explain.PAGES)
def test_a_claim_about_another_code_base_names_its_file(
    pages: dict[str, str], language: str
) -> None:
    for path in (
        "detectron2/modeling/anchor_generator.py",
        "detectron2/modeling/matcher.py",
        "modeling/meta_arch/retinanet.py",
        "mmdet/models/task_modules/assigners/max_iou_assigner.py",
        "mmdet/models/task_modules/prior_generators/anchor_generator.py",
        "models/dense_heads/anchor_head.py",
        "torchvision/models/detection/faster_rcnn.py",
        "torchvision/models/detection/_utils.py",
        "pycocotools/cocoeval.py",
    ):
        assert f"`{path}`" in pages[language]


def test_gradients_are_those_of_the_loss() -> None:
    for p in (0.01, 0.3, 0.9):
        logits = torch.full((2,), np.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
        sigmoid_focal_loss(logits, torch.tensor([0.0, 1.0]).double(), reduction="sum").backward()
        ours = facts.gradients(p)
        assert logits.grad is not None
        assert [ours["fl_absent"], ours["fl_present"]] == pytest.approx(logits.grad.tolist())
    assert facts.facts()["grad_ratio"] == f"{0.01 / facts.gradients(0.01)['fl_absent']:,.0f}"


def test_the_worked_example_is_that_of_both_originals() -> None:
    iou, (*rules, last, other) = facts.worked_example()
    assert torch.equal(last, Matcher(0.5, 0.4, allow_low_quality_matches=True)(iou))
    assert torch.equal(rules[2], Matcher(0.5, 0.4)(iou))
    # MMDetection's steps, in its own codes.
    codes = torch.full((8,), -1)
    codes[iou.amax(dim=0) < 0.4] = 0
    fits = iou.amax(dim=0) >= 0.5
    codes[fits] = iou.argmax(dim=0)[fits] + 1
    for number in range(3):
        codes[iou[number] == iou[number].max()] = number + 1
    cells = [row.split(" | ")[1:] for row in table("worked", "en").splitlines()]
    assert [cell.split(" / ")[1].strip(" |") for cell in cells[-1]] == [
        str(code).replace("-", "−") for code in codes.tolist()
    ]
    assert sorted((last != other).nonzero()[:, 0].tolist()) == [4]
    assert not (last == 2).any() and (other == 2).any()


def test_boxes_per_detector_are_counted() -> None:
    counted = facts.facts()
    assert counted["rpn_anchors"] == f"{3 * (200 * 304 + 15_200 + 3_800 + 950 + 247):,}"
    assert (counted["ssd_boxes"], counted["fcos_points"]) == ("8,732", "20,267")
    assert (counted["roi_sample"], counted["roi_ratio"]) == ("512", "1 : 3")
    assert (counted["named"], counted["unnamed"], counted["one_class"]) == (
        "80",
        "11",
        "[18, 256, 3, 3]",
    )


def test_the_diagrams_have_the_numbers_of_the_code() -> None:
    for name, svg in explain.make_diagrams().items():
        assert (explain.PICTURES / f"retinanet_{name}.svg").read_text("utf-8") == svg


def test_the_sum_of_anchors_is_the_one_of_torchvision() -> None:
    _, total, _ = facts.network()
    cells = [total[level][2] * total[level][3] for level in method.LEVELS]
    assert cells == [15_200, 3_800, 950, 247, 70]
    assert sum(cells) == 20_267
    assert total["cls_logits"][1] == 9 * sum(cells) == 182_403


def test_the_parts_of_the_loss_add_up_to_the_whole() -> None:
    model, _, operations = facts.network()
    rows = facts.parts()
    assert sum(row[5] for row in rows) == sum(p.numel() for p in model.parameters()) == 34_014_999
    assert 2 * sum(row[4] for row in rows) == pytest.approx(2 * operations["Global"])


def test_best_overlap_is_that_with_all_anchors(scene: method.Scene) -> None:
    # The formula knows no border, so the boxes lie in the middle, at the places that it takes.
    places = 5
    grid = (np.arange(places) + 0.5) * 128 / places
    for width, height in ((18.0, 18.0), (40.0, 90.0), (300.0, 75.0)):
        corner = torch.tensor(
            [[512 + x - width / 2, 384 + y - height / 2] for y in grid for x in grid]
        )
        boxes = torch.cat([corner, corner + torch.tensor([width, height])], dim=1).float()
        ours = explain_pictures.best_overlap(width, height, places)
        iou = retinanet.pairwise_iou(boxes[None], scene.anchors)[0].amax(dim=1)
        np.testing.assert_allclose(ours, iou.numpy(), rtol=1e-5)


def test_steps_are_the_four_rules(scene: method.Scene) -> None:
    iou = retinanet.pairwise_iou(scene.boxes[None], scene.anchors)[0]  # [M, A]
    best, box = iou.max(dim=0)
    first, second, third, last = method.steps(scene)
    assert (first == retinanet.IGNORED).all()
    expected = torch.full_like(box, retinanet.IGNORED)
    expected[best < 0.4] = retinanet.BACKGROUND
    assert torch.equal(second, expected)
    expected[best >= 0.5] = box[best >= 0.5]
    assert torch.equal(third, expected)
    claimed = (iou == iou.amax(dim=1, keepdim=True)).any(dim=0)
    expected[claimed] = box[claimed]
    assert torch.equal(last, expected)
    assert not torch.equal(last, third)


def test_first_losses_are_those_of_the_whole_image(scene: method.Scene) -> None:
    matched = scene.assign()[None]
    boxes, labels = retinanet.pad_targets([{"boxes": scene.boxes, "labels": scene.labels}])
    p = 0.01
    logits = torch.full((1, len(scene.anchors), method.CLASSES), np.log(p / (1 - p)))
    codes = torch.zeros(1, len(scene.anchors), 4)
    losses = retinanet.detection_losses(logits, codes, scene.anchors, boxes, labels, matched)
    ours = method.first_losses(scene, p)["focal loss"]
    assert sum(ours) == pytest.approx(float(losses["classification"]), rel=1e-4)


def test_stages_end_with_the_models_own_detections() -> None:
    torch.manual_seed(0)
    classes = [{"name": "a", "label": 1}, {"name": "b", "label": 2}]
    model = build_model("retinanet_resnet18_fpn", classes, min_size=64, max_size=128).eval()
    torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.5)
    image = torch.randint(256, (3, 64, 90), dtype=torch.uint8)
    stages = method.detect_in_stages(model, image)
    with torch.no_grad():
        (expected,) = model([image / 255])
    assert len(expected["scores"]) > 10
    for key in ("boxes", "scores", "labels"):
        torch.testing.assert_close(stages.detections[key], expected[key])
    assert stages.pairs > stages.above >= len(stages.candidates["scores"])
    assert len(stages.candidates["scores"]) > len(stages.after_nms["scores"])


@pytest.mark.parametrize("step", visualize.STEPS)
def test_each_step_is_drawn_on_an_image_of_the_user(
    step: str, tiny_shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next((tiny_shapes / "train2017").iterdir())
    annotations = tiny_shapes / "annotations" / "instances_train2017.json"
    picture = tmp_path / "new" / f"{step}.png"
    flags = ["--annotations", annotations, "--picture", picture, "--min-size", 128]
    visualize.main([step, *map(str, [image, *flags])])
    assert "boxes" in capsys.readouterr().out
    with Image.open(picture) as drawn:
        assert drawn.width in (2000, 2001)
        assert len(drawn.convert("RGB").getcolors(1 << 24) or []) > 200


def test_the_pipeline_goes_on_to_the_detections_of_a_checkpoint(
    tiny_shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label_map = [{"id": 1, "name": "circle", "label": 1}]
    args = {"model": "retinanet_resnet18_fpn", "min_size": 64, "max_size": 64}
    torch.manual_seed(0)
    model = build_model("retinanet_resnet18_fpn", label_map, min_size=64, max_size=64)
    torch.nn.init.zeros_(model.head.classification_head.cls_logits.bias)
    content = {"model": model.state_dict(), "ema": None, "args": args, "categories": label_map}
    checkpoint.save(content, tmp_path / "best.pth")
    image = next((tiny_shapes / "train2017").iterdir())
    annotations = tiny_shapes / "annotations" / "instances_train2017.json"
    flags = ["--annotations", annotations, "--picture", tmp_path / "way.png", "--min-size", 64]
    command = ["pipeline", image, *flags, "--checkpoint", tmp_path / "best.pth"]
    visualize.main([*map(str, command)])
    assert "way_detections.png" in capsys.readouterr().out
    with Image.open(tmp_path / "way_detections.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(1 << 24) or []) > 200


@pytest.mark.parametrize("step", ["assignment", "pipeline"])
def test_a_step_is_drawn_of_voc_data_with_the_flags_of_train_py(
    step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / "voc" / folder).mkdir(parents=True)
    for split, name in (("train", "a"), ("val", "b")):
        Image.new("RGB", (96, 64), "gray").save(tmp_path / "voc" / "JPEGImages" / f"{name}.jpg")
        (tmp_path / "voc" / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{name}\n")
        (tmp_path / "voc" / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>96</width>"
            "<height>64</height><depth>3</depth></size><object><name>cup</name><bndbox>"
            "<xmin>11</xmin><ymin>5</ymin><xmax>60</xmax><ymax>44</ymax></bndbox></object>"
            "</annotation>"
        )
    picture = tmp_path / "picture.png"
    flags = ["--dataset", "voc", "--data-path", tmp_path / "voc", "--picture", picture]
    image = tmp_path / "voc" / "JPEGImages" / "b.jpg"
    visualize.main([step, *map(str, [image, *flags, "--min-size", "64", "--max-size", "96"])])
    assert "1 boxes, " in capsys.readouterr().out
    with Image.open(picture) as drawn:
        assert drawn.width in (2000, 2001)


def test_the_assignment_of_one_box_has_no_empty_row_and_close_up_means_near() -> None:
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    one = method.make_scene(image, torch.tensor([[10.0, 5, 60, 44]]), ["cup"], 256, 384)
    assert len(method.draw_assignment(one).axes) == 4
    scene = explain_pictures.example_scene(paint=False)
    figure = method.draw_assignment(scene)
    assert len(figure.axes) == 6
    low, high = figure.axes[4].get_xlim()
    assert high - low < 0.15 * scene.image.shape[2]  # the three small circles


def test_of_many_boxes_the_panels_of_detections_show_the_best_50() -> None:
    torch.manual_seed(0)
    label_map = [{"name": "a", "label": 1}, {"name": "b", "label": 2}]
    model = build_model("retinanet_resnet18_fpn", label_map, min_size=64, max_size=128).eval()
    torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.5)
    image = torch.randint(256, (3, 64, 90), dtype=torch.uint8)
    model.score_thresh = 0.0
    figure = method.draw_detections(model, image, label_map)
    assert figure.axes[2].get_title("left").endswith("the best 50 drawn")
    assert sum(len(c.get_paths()) for c in figure.axes[2].collections) == 50


def test_an_image_without_annotations_is_refused(tiny_shapes: Path, tmp_path: Path) -> None:
    annotations = str(tiny_shapes / "annotations" / "instances_train2017.json")
    with pytest.raises(
        UserError,
        match=r"instances_train2017.json: no image named other.jpg; give an image of this",
    ):
        visualize.main(["coding", str(tmp_path / "other.jpg"), "--annotations", annotations])


def test_the_spacing_is_that_of_the_anchors(scene: method.Scene) -> None:
    levels = scene.level_of_anchor()
    for number, ((rows, columns), spacing) in enumerate(
        zip(scene.feature_sizes, scene.spacing(), strict=True)
    ):
        anchors = scene.anchors[levels == number].reshape(rows, columns, 9, 4)
        down, across = (
            anchors[1, 0, 0, 1] - anchors[0, 0, 0, 1],
            anchors[0, 1, 0] - anchors[0, 0, 0],
        )
        assert (int(down), int(across[0])) == spacing
    assert scene.spacing() == [(8, 8), (16, 16), (32, 32), (61, 64), (114, 121)]


@pytest.mark.parametrize("language", explain.PAGES)
def test_the_table_of_anchors_has_the_sides_of_the_anchors_that_train(
    pages: dict[str, str], scene: method.Scene, language: str
) -> None:
    levels = scene.level_of_anchor()
    for number, level in enumerate(method.LEVELS):
        sizes = scene.anchors[levels == number][:, 2:] - scene.anchors[levels == number][:, :2]
        squares = sorted({int(w) for w, h in sizes.unique(dim=0).tolist() if w == h})
        rows = [line for line in pages[language].splitlines() if line.startswith(f"| {level} |")]
        assert any(row.endswith(f"| {', '.join(map(str, squares))} |") for row in rows)


# --- docs/retinanet.html -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def web_page() -> str:
    return explain.INTERACTIVE.read_text(encoding="utf-8")


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., Any]:
    """Run a script in a page of the given width: `browse(page, script)` is what it returns."""
    if BROWSER is None:
        pytest.skip("there is no chromium here")

    def open_page(page: str, script: str, width: int = 1000) -> Any:
        content = html.escape(page, quote=True)
        wrapper = tmp_path / "wrapper.html"
        wrapper.write_text(
            f'''<!doctype html><meta charset="utf-8">
            <iframe style="width:{width}px;height:900px;border:0" srcdoc="{content}"></iframe>
            <script>onload = () => {{
              const frame = document.querySelector("iframe");
              const run = frame.contentWindow.eval(`() => {{ {script} }}`);
              document.body.innerHTML = `<pre>result ${{JSON.stringify(run())}}</pre>`;
            }};</script>''',
            encoding="utf-8",
        )
        command = [BROWSER or "", "--headless", "--no-sandbox", "--disable-gpu"]
        command += ["--no-first-run", "--disable-background-networking", "--lang=en"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
        command += ["--virtual-time-budget=10000", "--dump-dom", wrapper.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ":CONSOLE" not in done.stderr
        (result,) = re.findall(r"<pre>result (.*?)</pre>", done.stdout, re.DOTALL)
        return json.loads(html.unescape(result))

    return open_page


def test_the_interactive_page_is_made_from_the_code(web_page: str) -> None:
    candidates = interactive.candidates_of(web_page)

    def without_pixels(page: str) -> str:  # another version of the encoder may write other bytes
        return re.sub(r'data:image/[^"]*', "", page)

    assert without_pixels(interactive.page(candidates)) == without_pixels(web_page)
    script = (interactive.FOLDER / "interactive.js").read_text(encoding="utf-8")
    assert len(script.splitlines()) < 600
    # One file, no network.
    assert "http:" not in web_page and "https:" not in web_page and "fetch(" not in web_page
    for source in re.findall(r"""(?:src|href)=["']([^"']*)""", web_page):
        assert source in ("retinanet.md", "retinanet.zh-CN.md")
    with pytest.raises(ValueError, match="not a page"):
        interactive.candidates_of("<html></html>")


@pytest.mark.parametrize("assigner", retinanet.ASSIGNERS)
def test_the_browser_assigns_and_encodes_like_the_python(
    assigner: str, web_page: str, scene: method.Scene, browse: Callable[..., Any]
) -> None:
    generator = torch.Generator().manual_seed(3)
    sides = (6 * 100 ** torch.rand(40, 5, 2, generator=generator)).round()
    corners = (torch.rand(40, 5, 2, generator=generator) * torch.tensor([1216, 800])).round()
    corners[::2, 1:] = corners[::2, :1] + corners[::2, 1:] % 16  # half of them compete for anchors
    boxes = torch.cat([corners, corners + sides], dim=2)
    script = """
        return BOXES.map((boxes) => {
          const matched = assign(anchors, boxes, "ASSIGNER");
          const pairs = [];
          matched.forEach((value, i) => {
            if (value === BACKGROUND) return;
            pairs.push([i, value, value < 0 ? [] : encode(boxes[value], anchorAt(i))]);
          });
          return pairs;
        });
    """.replace("BOXES", json.dumps(boxes.tolist())).replace("ASSIGNER", assigner)
    for of_browser, pairs in zip(boxes, browse(web_page, script), strict=True):
        padded, labels = retinanet.pad_targets(
            [{"boxes": of_browser, "labels": torch.ones(5).long()}]
        )
        matched = retinanet.assign(scene.anchors, padded, labels, assigner)[0]
        index = (matched != retinanet.BACKGROUND).nonzero()[:, 0]
        assert [pair[:2] for pair in pairs] == torch.stack([index, matched[index]], 1).tolist()
        index = (matched >= 0).nonzero()[:, 0]
        codes = retinanet.encode_boxes(of_browser[matched[index]], scene.anchors[index])
        theirs = torch.tensor([pair[2] for pair in pairs if pair[2]])
        torch.testing.assert_close(theirs, codes, rtol=1e-5, atol=1e-5)


def test_the_browser_has_the_loss_and_the_nms_of_the_python(
    web_page: str, browse: Callable[..., Any]
) -> None:
    logits = [-7.0, -4.6, -1.0, 0.0, 2.0, 5.0]
    limits = [(0.05, 0.5), (0.5, 0.5), (0.3, 0.2), (0.05, 0.9)]
    losses, kept = browse(
        web_page,
        f"""
        const values = (x, isThere) => Object.values(focal(x, isThere, DATA.alpha, 2));
        return [
          {logits}.map((x) => [...values(x, false), ...values(x, true)]),
          {[list(pair) for pair in limits]}.map(
            (pair) => nonMaximumSuppression(DATA.candidates, ...pair).kept),
        ];
        """,
    )
    for logit, values in zip(logits, losses, strict=True):
        x = torch.full((2,), logit, dtype=torch.float64, requires_grad=True)
        loss = sigmoid_focal_loss(x, torch.tensor([0.0, 1.0]).double())
        (slope,) = torch.autograd.grad(loss.sum(), x)
        expected = torch.stack([loss, slope], dim=1).flatten().tolist()
        assert values == pytest.approx(expected, rel=1e-5)
    candidates = interactive.candidates_of(web_page)
    boxes, scores, labels = (torch.tensor(candidates[key]) for key in ("boxes", "scores", "labels"))
    for (threshold, iou), of_browser in zip(limits, kept, strict=True):
        above = (scores > threshold).nonzero()[:, 0]
        keep = batched_nms(boxes[above], scores[above], labels[above], iou)
        assert sorted(of_browser) == sorted(above[keep].tolist())


@pytest.mark.parametrize("width", [400, 1400])
def test_the_interactive_page_works_by_keyboard_at_any_width_in_both_languages(
    width: int, web_page: str, browse: Callable[..., Any]
) -> None:
    script = """
        const text = (id) => byId(id + "-text").textContent;
        const press = (id, key, shiftKey = false) =>
          byId(id).dispatchEvent(new KeyboardEvent("keydown", {key, shiftKey, cancelable: true}));
        const slide = (id, value) => {
          byId(id).value = value;
          byId(id).dispatchEvent(new Event("input"));
        };
        const seen = {width: document.documentElement.scrollWidth, before: text("anchors")};
        press("anchors", "ArrowRight");
        seen.moved = text("anchors");
        const [x1, y1, x2, y2] = state.box;
        press("box", "ArrowDown");
        press("box", "ArrowRight", true);
        seen.box = state.box.map((v, k) => v - [x1, y1, x2, y2][k]);
        state.box = [703.5, 123.5, 709.5, 129.5];
        drawBox();
        seen.small = text("box");
        slide("score", 0.05);
        seen.detections = text("detections");
        slide("gamma", 0);
        seen.focal = text("focal");
        seen.focusable = document.querySelectorAll("canvas[tabindex='0'], button, input").length;
        byId("language").click();
        seen.language = document.documentElement.lang;
        seen.chinese = [text("anchors"), document.querySelector("h1").textContent];
        byId("language").click();
        seen.back = document.querySelector("h1").textContent;
        return seen;
    """
    seen = browse(web_page, script, width)
    assert seen["width"] <= width
    assert seen["before"].startswith("P5, row 13, column 19")
    assert seen["moved"].startswith("P5, row 13, column 20")
    assert seen["box"] == [0, 4, 4, 4]
    assert "Rule 4 decides" in seen["small"] and "P3" in seen["small"]
    assert seen["detections"].startswith(f"{len(interactive.candidates_of(web_page)['scores'])} ")
    assert "0.0075 for an absent class" in seen["focal"]
    assert seen["focusable"] >= 14
    assert seen["language"] == "zh-CN"
    assert "第 13 行" in seen["chinese"][0] and seen["chinese"][1] == "RetinaNet 交互演示"
    assert seen["back"] == "RetinaNet to play with"
