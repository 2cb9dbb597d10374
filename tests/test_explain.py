"""The pages about the method say what the code says, and its pictures are of any image's boxes.

python -m pytest tests/test_explain.py
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from docs.explain import __main__ as explain
from docs.explain import pictures as explain_pictures
from models import retinanet
from models.build import build_model
from runtime import checkpoint
from tools import visualize
from tools.plots import method
from utils import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {lang: (ROOT / page).read_text("utf-8") for lang, page in explain.PAGES.items()}


@pytest.fixture(scope="module")
def scene() -> method.Scene:
    return explain_pictures.example_scene(paint=False)


@pytest.mark.parametrize("language", explain.PAGES)
def test_the_page_says_what_the_code_says(pages: dict[str, str], language: str) -> None:
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
    with pytest.raises(ValueError, match=r"retinanet.py has no lines from 'def assign\('"):
        explain.fill(
            "<!-- code: models/retinanet.py | def assign( | no such -->\n<!-- end -->", "en"
        )
    with pytest.raises(ValueError, match="'no-such'"):
        explain.fill("<!-- table: no-such -->\n<!-- end -->", "en")


@pytest.mark.parametrize("language", explain.PAGES)
def test_pictures_have_texts_and_links_lead_somewhere(pages: dict[str, str], language: str) -> None:
    pictures = re.findall(r"!\[(.*?)\]\((.+?)\)", pages[language])
    assert len(pictures) == 8
    for text, path in pictures:
        assert len(text) > 15
        assert (ROOT / "docs" / path).stat().st_size > 1000
    for path in re.findall(r"\]\((?!https?:)(.+?)\)", pages[language]):
        assert (ROOT / "docs" / path).exists(), path
    # A comment at the start of a line would end the paragraph, and Markdown with it.
    assert not re.findall(r"^ {0,3}<!--=", pages[language], re.MULTILINE)
    total = sum(path.stat().st_size for path in explain.PICTURES.glob("retinanet_*"))
    assert total < 1.5e6


def test_the_sum_of_anchors_is_the_one_of_torchvision() -> None:
    _, found, _ = explain.network()
    cells = [found[level][2] * found[level][3] for level in method.LEVELS]
    assert cells == [15_200, 3_800, 950, 247, 70]
    assert sum(cells) == 20_267
    assert found["cls_logits"][1] == 9 * sum(cells) == 182_403


def test_parts_add_up_to_the_whole() -> None:
    model, _, operations = explain.network()
    rows = explain.parts()
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
        own = explain_pictures.best_overlap(width, height, places)
        iou = retinanet.pairwise_iou(boxes[None], scene.anchors)[0].amax(dim=1)
        np.testing.assert_allclose(own, iou.numpy(), rtol=1e-5)


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
    own = method.first_losses(scene, p)["focal loss"]
    assert sum(own) == pytest.approx(float(losses["classification"]), rel=1e-4)


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
def test_each_step_is_drawn_on_ones_own_image(
    step: str, tiny_shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next((tiny_shapes / "train2017").iterdir())
    annotations = tiny_shapes / "annotations" / "instances_train2017.json"
    picture = tmp_path / "new" / f"{step}.png"
    flags = ["--annotations", annotations, "--picture", picture, "--min-size", 128]
    visualize.main([step, *map(str, [image, *flags])])
    assert "boxes" in capsys.readouterr().out
    with Image.open(picture) as drawn:
        assert drawn.width in (1000, 1001)
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
        assert drawn.width in (1000, 1001)


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
