"""Predictions equal the model's, for files, folders and patterns; bad images are reported.

python -m pytest tests/test_predict.py
"""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CAT_AND_DOG
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from models.build import load_detector
from runtime import checkpoint
from tools import predict, visualize
from tools.plots import drawing, method
from utils import UserError


@pytest.fixture
def images(tiny_shapes: Path, tmp_path: Path) -> Path:
    """A folder with images in two places, of two formats."""
    sources = sorted((tiny_shapes / "val2017").iterdir())[:3]
    for source, name in zip(sources, ("a.jpg", "sub/a.jpg", "a.png"), strict=True):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(source).save(tmp_path / "in" / name)
    return tmp_path / "in"


def run(*arguments: Path | str) -> int:
    return predict.main(["--workers", "0", *map(str, arguments), "--device", "cpu"])


def test_results_are_those_of_the_model_called_by_hand(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ("--output-dir", out, "--csv", "--score-thresh", "0.3")
    assert run("--checkpoint", trained, images, *flags) == 0
    results = json.loads((out / "detections.json").read_text())
    model, label_map = load_detector(str(trained))
    assert label_map == CAT_AND_DOG and not model.training
    with torch.no_grad():
        (detected,) = model([decode_image(str(images / "sub" / "a.jpg"), ImageReadMode.RGB) / 255])
    kept = (detected["scores"] >= 0.3) & (
        detected["labels"] > 0
    )  # untrained, it sees background, too
    of_image = [r for r in results if r["file_name"].endswith("sub/a.jpg")]
    assert len(of_image) == int(kept.sum()) > 0
    assert [r["score"] for r in of_image] == detected["scores"][kept].tolist()
    assert {(r["category_id"], r["category"]) for r in results} <= {(3, "cat"), (8, "dog")}
    x1, y1, x2, y2 = detected["boxes"][kept][0].tolist()
    assert of_image[0]["bbox"] == [x1, y1, x2 - x1, y2 - y1]
    with (out / "detections.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [r["score"] for r in results]
    assert f"{len(results)} objects in 3 images" in capsys.readouterr().out
    pictures = {p.relative_to(out / "pictures").as_posix() for p in out.rglob("*.jpg")}
    assert pictures == {"a.jpg.jpg", "a.png.jpg", "sub/a.jpg"}


def test_an_unreadable_image_is_reported_and_the_others_are_predicted(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "b.jpg").write_bytes((images / "a.jpg").read_bytes()[:300])
    (images / "c.jpg").write_bytes(b"")
    out = tmp_path / "out"
    assert run("--checkpoint", trained, images, "--output-dir", out, "--batch-size", "2") == 1
    printed = capsys.readouterr()
    assert "in 3 images" in printed.out
    assert [line.split(": ")[1] for line in printed.err.splitlines()] == [
        *(f"{images / name}" for name in ("b.jpg", "c.jpg")),
    ]
    assert "is empty" in printed.err and "is damaged" in printed.err
    assert len(list((out / "pictures").rglob("*.jpg"))) == 3


def test_odd_files_do_not_affect_other_images(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(images / "pipe.jpg")  # opened, it would wait until somebody writes to it
    (images / "folder.jpg").mkdir()
    (images / "gone.jpg").symlink_to("nowhere.jpg")
    Image.new("RGB", (20_000, 1)).save(images / "thin.png")
    Image.open(images / "a.jpg").save(images / "b.jpg")
    (images / "a.jpg").rename(images / "new\nline\x1b[2J.jpg")
    out = tmp_path / "out"
    (out / "pictures" / "b.jpg").mkdir(parents=True)  # so that its picture cannot be written
    assert run("--checkpoint", trained, images, "--output-dir", out, "--workers", "1", "--csv") == 1
    printed = capsys.readouterr()
    assert "in 4 images" in printed.out
    assert sorted(printed.err.splitlines()) == [
        f"error: {images}/gone.jpg: is missing",
        f"error: {images}/pipe.jpg: is missing: not a regular file",
        f"error: {images}/thin.png: is 20000 x 1: resized, a side has less than one pixel",
        f"error: cannot write {out}/pictures/b.jpg: Is a directory",
    ]
    results = json.loads((out / "detections.json").read_text())
    names = [images / name for name in ("a.png", "b.jpg", "new\nline\x1b[2J.jpg", "sub/a.jpg")]
    assert {r["file_name"] for r in results} == set(map(str, names))
    assert len(list(csv.reader((out / "detections.csv").open(newline="")))) == len(results) + 1


class CrashingFiles(predict.ImageFiles):
    """Images; those named crash… kill the process that reads them, as a decoder may."""

    def __getitem__(self, number: int) -> predict.Loaded:
        if self.paths[number].name.startswith("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().__getitem__(number)


def test_a_decoder_that_crashes_costs_only_its_file(
    trained: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("crash.jpg", "d.jpg", "e.jpg", "f.jpg", "g.jpg"):
        Image.open(images / "a.jpg").save(images / name)
    monkeypatch.setattr(predict, "ImageFiles", CrashingFiles)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 1.0)
    out = tmp_path / "out"
    flags = ["--output-dir", out, "--batch-size", "2", "--workers", "1", "--score-thresh", "0"]
    assert run("--checkpoint", trained, images, *flags) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        f"error: {images}/crash.jpg: ended the process that decoded it: damaged, or too large"
    ]
    results = json.loads((out / "detections.json").read_text())
    names = {Path(r["file_name"]).name for r in results}
    assert names == {"a.jpg", "a.png", "d.jpg", "e.jpg", "f.jpg", "g.jpg"}
    assert "in 7 images" in printed.out


def test_detections_so_far_are_written_on_an_interrupt(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = drawing.write_picture

    def interrupted(picture: torch.Tensor, path: Path) -> None:
        written(picture, path)
        if path.stem == "a.png":
            raise KeyboardInterrupt

    monkeypatch.setattr(drawing, "write_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--checkpoint", trained, images, "--output-dir", tmp_path)
    results = json.loads((tmp_path / "detections.json").read_text())
    assert {Path(r["file_name"]).name for r in results} == {"a.jpg", "a.png"}


def test_no_two_images_become_one_picture(tmp_path: Path) -> None:
    names = ("a.jpg", "a.png", "a.jpg.webp", "b.webp", "b_2.jpg", "c/b.webp", "c/b.jpg.jpg")
    paths = [tmp_path / name for name in names]
    pictures = predict.picture_paths([*paths, paths[3], paths[0]], tmp_path)
    assert len(set(pictures)) == len(pictures) == 9
    first = [p.relative_to(tmp_path / "pictures").as_posix() for p in pictures[:3]]
    assert first == ["a.jpg.jpg", "a.png.jpg", "a.jpg_2.jpg"]


def test_the_picture_of_a_link_has_the_name_of_the_link(images: Path, tmp_path: Path) -> None:
    links = [tmp_path / name for name in ("1.jpg", "2.jpg")]
    for link in links:
        link.symlink_to(images / "sub" / "a.jpg")
    pictures = predict.picture_paths(links, tmp_path / "out")
    assert pictures == [tmp_path / "out" / "pictures" / link.name for link in links]


def test_patterns_do_not_follow_links_that_lead_in_circles(images: Path) -> None:
    for folder in ("x", "y"):
        (images / folder).mkdir()
        for link in range(3):
            (images / folder / f"link{link}").symlink_to("../y" if folder == "x" else "../x")
    expected = [images / "a.jpg", images / "sub" / "a.jpg"]
    assert predict.find_images([str(images / "**" / "*.jpg")]) == expected
    assert predict.find_images([str(images / "**")]) == predict.find_images([str(images)])
    with pytest.raises(UserError, match="no image there"):
        predict.find_images([str(images / "sub**")])


def test_files_folders_and_patterns_name_each_image_once(images: Path) -> None:
    paths = predict.find_images([str(images), str(images / "a.png"), str(images / "**" / "*.jpg")])
    assert paths == [images / "a.jpg", images / "a.png", images / "sub" / "a.jpg"]
    with pytest.raises(UserError, match=r"nothing\*.jpg: no image there"):
        predict.find_images([str(images), "nothing*.jpg"])


def test_an_image_is_seen_as_exif_turns_it(trained: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.new("RGB", (64, 40), "gray").save(path, exif=exif)
    _, image = predict.ImageFiles([path], load_detector(str(trained))[0].transform)[0]
    assert isinstance(image, torch.Tensor) and image.shape == (3, 64, 40)


@pytest.mark.parametrize("content", ["checkpoint", "weights"])
def test_a_checkpoint_of_no_detector_is_refused(
    content: str, trained: Path, tmp_path: Path
) -> None:
    if content == "checkpoint":
        source = tmp_path / "plain.pth"
        torch.save(checkpoint.load(trained)["model"], source)
        with pytest.raises(UserError, match="is no checkpoint of train.py"):
            load_detector(str(source))
    else:
        with pytest.raises(UserError, match="neither a file nor the name of torchvision weights"):
            load_detector("runs/nowhere/best.pth")


def test_post_processing_may_be_chosen(trained: Path, images: Path) -> None:
    image = decode_image(str(images / "a.jpg"), ImageReadMode.RGB) / 255
    counts = []
    for most in (3, 7):
        model, _ = load_detector(str(trained), detections_per_image=most)
        with torch.no_grad():
            counts.append(len(model([image])[0]["scores"]))
    assert counts == [3, 7]


def test_a_batch_is_drawn_with_the_flags_of_train_py(tiny_shapes: Path, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "batch.jpg"
    flags = ["--data-path", tiny_shapes, "--model", "retinanet_resnet18_fpn", "--workers", 0]
    sizes = ["--min-size", 64, "--max-size", 64, "--batch-size", 3, "--batches", 2, "--side", 200]
    where = ["--output-dir", picture.parent, "--picture", picture.name]
    visualize.main(["batch", *map(str, [*flags, *sizes, *where])])
    with Image.open(picture) as image:
        assert image.width == 3 * 206 + 6  # three tiles of 200 in a row, 6 px apart
        assert len({image.getpixel((x, 40)) for x in range(image.width)}) > 20
    with pytest.raises(UserError, match="choose what to draw"):
        visualize.main(["--data-path", str(tiny_shapes)])


@pytest.mark.parametrize(
    ("flags", "side"), [([], 64), (["--min-size", "96", "--max-size", "96"], 96)]
)
def test_both_pictures_of_the_pipeline_have_the_size_that_the_checkpoint_sees(
    flags: list[str],
    side: int,
    trained: Path,
    tiny_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = []
    sheet = method._sheet

    def noted(image: torch.Tensor, *grid: int) -> Any:
        shapes.append(tuple(image.shape))
        return sheet(image, *grid)

    monkeypatch.setattr(method, "_sheet", noted)
    image = sorted((tiny_shapes / "val2017").iterdir())[0]
    annotations = tiny_shapes / "annotations" / "instances_val2017.json"
    named = ["--annotations", annotations, "--checkpoint", trained, "--picture", tmp_path / "p.png"]
    visualize.main(["pipeline", str(image), *map(str, named), *flags])
    assert [max(shape) for shape in shapes] == [side] * 2  # only the first is padded
    assert {p.name for p in tmp_path.iterdir()} == {"p.png", "p_detections.png"}
