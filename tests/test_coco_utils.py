"""Images and boxes: every allowed image gives PIL's pixels, every bad one an error with its id.

python -m pytest tests/test_coco_utils.py
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Document, annotation, valid, write
from image_helpers import (
    BAD,
    DAMAGED,
    GRAY,
    JPEG,
    PICTURE,
    PNG,
    encoded,
    with_alpha,
)
from PIL import Image, ImageOps

import coco_utils
import presets
from data import coco_json, coco_rules, image_files, loading, locate
from utils import UserError

LEGAL: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encoded(PICTURE, format="JPEG"),
    "jpeg, progressive": lambda: encoded(PICTURE, format="JPEG", progressive=True),
    "jpeg, 4:4:4": lambda: encoded(PICTURE, format="JPEG", subsampling=0),
    "jpeg, gray": lambda: encoded(GRAY, format="JPEG"),
    "jpeg, cmyk, as Adobe inverts it": lambda: encoded(PICTURE.convert("CMYK"), format="JPEG"),
    "jpeg, rgb": lambda: encoded(PICTURE, format="JPEG", keep_rgb=True),
    "jpeg of several pictures": lambda: encoded(
        PICTURE, format="MPO", save_all=True, append_images=[GRAY.convert("RGB")]
    ),
    "png": lambda: encoded(PICTURE, format="PNG"),
    "png, gray": lambda: encoded(GRAY, format="PNG"),
    "png, 1 bit": lambda: encoded(PICTURE.convert("1"), format="PNG"),
    "png, palette": lambda: encoded(PICTURE.quantize(64), format="PNG"),
    "png, palette of 16": lambda: encoded(PICTURE.quantize(16), format="PNG", bits=4),
    "png, palette, alpha": lambda: encoded(PICTURE.quantize(64), format="PNG", transparency=3),
    "png, alpha": lambda: encoded(with_alpha(PICTURE), format="PNG"),
    "png, gray, alpha": lambda: encoded(with_alpha(GRAY), format="PNG"),
    "png, animated": lambda: encoded(PICTURE, format="PNG", save_all=True, append_images=[GRAY]),
    "webp": lambda: encoded(PICTURE, format="WEBP"),
    "webp, lossless, alpha": lambda: encoded(with_alpha(PICTURE), format="WEBP", lossless=True),
    "one pixel wide": lambda: encoded(PICTURE.resize((1, 40)), format="JPEG"),
    "one pixel": lambda: encoded(PICTURE.resize((1, 1)), format="PNG"),
}


def read(folder: Path, content: bytes, size: tuple[int, int], name: str = "a b ü") -> torch.Tensor:
    (folder / name).write_bytes(content)
    return image_files.read_image(folder / name, folder, size)


@pytest.mark.parametrize("kind", LEGAL)
def test_allowed_images_have_the_pixels_of_pil(kind: str, tmp_path: Path) -> None:
    content = LEGAL[kind]()
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    image = read(tmp_path, content, expected.shape[:2])
    assert image.dtype == torch.uint8
    pixels = image.permute(1, 2, 0).numpy().astype(int)
    # JPEG decoders may round differently; here both are libjpeg-turbo. PNG is exact.
    assert np.abs(pixels - expected).max() <= (0 if "png" in kind else 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_turns_an_image_unless_its_size_is_that_of_the_stored_pixels(
    kind: str, orientation: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(PICTURE, format=kind, exif=exif)
    stored = Image.open(io.BytesIO(content))
    shown = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    if orientation < 5:
        with pytest.raises(image_files.ImageError, match="is 64 x 40, the annotations say 40 x 64"):
            read(tmp_path, content, (64, 40))
    else:
        as_stored = read(tmp_path, content, (40, 64)).permute(1, 2, 0).numpy()
        assert np.array_equal(as_stored, np.asarray(stored.convert("RGB")))
    turned = read(tmp_path, content, shown.shape[:2]).permute(1, 2, 0).numpy()
    assert np.array_equal(turned, shown)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", BAD)
def test_bad_image_is_an_error_with_the_reason(case: str, tmp_path: Path) -> None:
    content, rule, message = BAD[case]
    with pytest.raises(image_files.ImageError) as caught:
        read(tmp_path, content, (40, 64))
    assert caught.value.rule == rule and rule in coco_rules.RULES
    assert message in str(caught.value)


def outside(folder: Path) -> Path:
    (folder / "secret.jpg").write_bytes(JPEG)
    (folder / "images").mkdir()
    return folder / "images"


@pytest.mark.parametrize("name", ["../secret.jpg", "x/../../secret.jpg", "/absolute"])
def test_path_that_leaves_the_folder_by_its_name_is_refused(name: str, tmp_path: Path) -> None:
    root = outside(tmp_path)
    (root / "x").mkdir()
    path = tmp_path / "secret.jpg" if name == "/absolute" else root / name
    with pytest.raises(image_files.ImageError, match="lies outside"):
        image_files.read_image(path, root, (40, 64))


def test_links_are_followed_wherever_they_lead(tmp_path: Path) -> None:
    root = outside(tmp_path)
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")  # as a Hugging Face cache has them
    (root / "folder").symlink_to(tmp_path)
    (tmp_path / "elsewhere").symlink_to(root)  # the folder itself may be a link
    linked = tmp_path / "elsewhere"
    for path in (root / "link.jpg", root / "folder" / "secret.jpg", linked / "link.jpg"):
        image = image_files.read_image(path, linked if path.parent == linked else root, (40, 64))
        assert image.shape == (3, 40, 64)


def test_a_path_that_is_no_regular_file_counts_as_missing_and_blocks_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe", "nowhere", "nul\0"):
        with pytest.raises(image_files.ImageError, match="is missing"):
            image_files.read_image(tmp_path / name, tmp_path, (40, 64))


def test_unreadable_file_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    (tmp_path / "a.jpg").touch()
    with pytest.raises(image_files.ImageError, match="cannot be read: Input/output error"):
        image_files.read_image(tmp_path / "a.jpg", tmp_path, (40, 64))


def test_damaged_png_does_not_crash_the_process(tmp_path: Path) -> None:
    """torchvision's own decoder ends the process on most of these (0.29.1)."""
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(50):
        content = bytearray(PNG)
        content[random.integers(33, len(PNG) - 12)] ^= 1 << int(random.integers(8))
        try:
            read(tmp_path, bytes(content), (40, 64))
        except image_files.ImageError:
            refused += 1
    assert refused >= 45  # the others hit what no pixel depends on


def test_missing_images_are_found_by_listing(tmp_path: Path) -> None:
    document = valid()
    annotations, _ = coco_json.read_annotations(write(tmp_path, json.dumps(document).encode()))
    (tmp_path / "ü.png").touch()
    (tmp_path / "a.jpg").mkdir()  # a folder is no image
    located, (finding,) = locate.locate_images(annotations, tmp_path)
    assert located is annotations
    assert finding.cases == (f"10 {tmp_path}/a.jpg", f"20 {tmp_path}/sub/b c.jpg")
    assert (finding.severity, finding.what) == ("error", "image files missing")


def test_error_names_id_file_and_fix(tmp_path: Path) -> None:
    data = data_set(tmp_path, valid())
    path = tmp_path / "sub" / "b c.jpg"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(image_files.ImageError) as caught:
        data[0, 1]
    message = str(caught.value)
    assert f"image id 20, {tmp_path}/sub/b c.jpg: is damaged: Image is incomplete" in message
    assert "tools.check_data" in message and caught.value.rule == DAMAGED


def test_official_classes_keep_their_labels() -> None:
    names = coco_utils.RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    official = tuple((i, n) for i, n in enumerate(names) if n not in ("__background__", "N/A"))
    label_map = coco_utils.label_categories(official)
    assert len(label_map) == 80 and all(c["label"] == c["id"] for c in label_map)
    assert coco_utils.num_classes(label_map) == 91
    others = coco_utils.label_categories(((0, "x"), (5, "y"), (9, "z")))
    assert [c["label"] for c in others] == [1, 2, 3] and coco_utils.num_classes(others) == 4


def test_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    annotations, _ = coco_json.read_annotations(write(tmp_path, json.dumps(valid()).encode()))
    label_map = coco_utils.label_categories(((1, "cat"), (2, "cow")))
    with pytest.raises(UserError, match=r"only here \['dog'\], only in the checkpoint \['cow'\]"):
        coco_utils.match_classes(label_map, annotations, "the checkpoint")


def data_set(folder: Path, document: Document, **options: Any) -> coco_utils.CocoDetection:
    for image in document["images"]:
        path = folder / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (image["width"], image["height"]), (9, 9, 9)).save(path)
    annotations, _ = coco_json.read_annotations(write(folder, json.dumps(document).encode()))
    label_map = coco_utils.label_categories(annotations.categories)
    return coco_utils.CocoDetection(folder, annotations, label_map, **options)


def test_target_is_clipped_and_without_crowds(tmp_path: Path) -> None:
    document = valid()
    document["annotations"] += [
        annotation(100, 10, 1, [-5, 70, 20, 20]),
        annotation(101, 10, 1, [10, 10, 0, 5]),
        annotation(102, 10, 1, [100, 10, 5, 5]),
    ]
    image, target = data_set(tmp_path, document)[0, 0]
    assert image.shape == (3, 80, 100) and image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[15, 10, 35.25, 40], [0, 70, 15, 80]]
    assert target["labels"].tolist() == [2, 1]
    assert target["image_id"].item() == 10 and target["image_id"].dtype == torch.int64


def test_targets_equal_torchvisions(bccd: Path) -> None:
    from torchvision.datasets import CocoDetection

    path = bccd / "annotations" / "instances_val2017.json"
    theirs = CocoDetection(str(bccd / "val2017"), str(path))
    annotations, _ = coco_json.read_annotations(path)
    label_map = coco_utils.label_categories(annotations.categories)
    ours = coco_utils.CocoDetection(bccd / "val2017", annotations, label_map)
    number_of = {number: i for i, number in enumerate(annotations.image_ids.tolist())}
    for i in range(0, len(theirs), 9):
        pixels, objects = theirs[i]
        image, target = ours[0, number_of[theirs.ids[i]]]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(pixels))
        boxes = torch.as_tensor([o["bbox"] for o in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(min=0, max=image.shape[2])
        boxes[:, 1::2].clamp_(min=0, max=image.shape[1])
        assert torch.equal(target["boxes"], boxes)


def test_images_with_objects_follows_torchvision(tmp_path: Path) -> None:
    document = valid()
    document["annotations"] = [
        annotation(1, 10, 1, [1, 1, 1, 9]),  # one pixel wide: does not count
        annotation(2, 20, 1, [1, 1, 1.5, 9], iscrowd=1),
    ]
    annotations, _ = coco_json.read_annotations(write(tmp_path, json.dumps(document).encode()))
    assert annotations.images_with_objects().tolist() == [1]


def test_same_sample_for_same_seed_epoch_index(tmp_path: Path) -> None:
    transforms = presets.training_transforms("ssd")
    data = data_set(tmp_path, valid(), transforms=transforms, seed=3)
    torch.manual_seed(1)
    first, _ = data[2, 0]
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, _ = data[2, 0]
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
    other, _ = data[3, 0]
    assert not (first.shape == other.shape and torch.equal(first, other))


def test_a_batch_is_unchanged_on_its_way_out_of_a_worker(tmp_path: Path) -> None:
    document = valid()
    document["annotations"] = document["annotations"][:1]  # one image has no box
    data = data_set(tmp_path, document)
    order = [[(0, 0), (0, 1)], [(0, 1)]]
    options: Any = {"batch_sampler": order, "collate_fn": loading.collate}
    direct, sent = (
        list(torch.utils.data.DataLoader(data, num_workers=workers, **options))
        for workers in (0, 1)
    )
    for (images, targets), (sent_images, sent_targets) in zip(direct, sent, strict=True):
        assert all(map(torch.equal, images, sent_images))
        for target, sent_target in zip(targets, sent_targets, strict=True):
            assert target.keys() == sent_target.keys()
            for name, value in target.items():
                assert value.dtype == sent_target[name].dtype
                assert torch.equal(value, sent_target[name])
                # By value, not by a file descriptor of its own, which costs far more.
                assert not sent_target[name].is_shared()


def test_what_a_loader_worker_gets_does_not_grow_with_the_annotations(tmp_path: Path) -> None:
    document = valid()
    image = document["images"][0]
    document["images"] = [image | {"id": n, "file_name": f"{n}.jpg"} for n in range(10_000)]
    document["annotations"] = [annotation(n, n, 1, [1, 1, 9, 9]) for n in range(1, 10_000)]
    annotations, _ = coco_json.read_annotations(write(tmp_path, json.dumps(document).encode()))
    assert annotations is not None
    label_map = coco_utils.label_categories(annotations.categories)
    data = coco_utils.CocoDetection(tmp_path, annotations, label_map)
    assert len(pickle.dumps(data)) > 1_000_000 and len(pickle.dumps(data.for_workers())) < 5_000
    (batch,) = data.with_entries([[(3, 7)]])
    assert batch[0][:2] == (3, 7) and len(pickle.dumps(batch)) < 2_000
    entry = batch[0][2]
    assert (entry.image_id, entry.file_name, entry.size) == (7, "7.jpg", (80, 100))
    assert entry.boxes_xywh.tolist() == [[1, 1, 9, 9]] and entry.labels.tolist() == [1]
