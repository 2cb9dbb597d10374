"""Every policy keeps boxes on their objects, judged by drawn pixels: pytest tests/test_presets.py.

Pictures are drawn, augmented many times, and each returned box is compared with the pixels of its
object in the result. Two drawings serve:

- Channels: object k is all of colour channel k, on black, so that objects may overlap and resizing
  blurs nothing but edges. The label is the channel.
- Stripes: grey objects on black, told apart by their stripes, which no change of colours hides
  (`ssd` distorts colours, but resizes nothing). The label is the direction of the stripes.

Covers transforms.py as well.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

import presets
from presets import MEAN_COLOUR, POLICIES, RESIZING, training_transforms
from transforms import FixedSizeCrop

CROPPING = ("lsj", "ssd", "ssdlite")
COLOUR_KEEPING = tuple(policy for policy in POLICIES if policy != "ssd")
# `lsj` makes images of a megapixel, ten times as slow as the others.
DRAWS = {"hflip": 60, "multiscale": 25, "lsj": 40, "ssd": 150, "ssdlite": 200}
SOLID, HORIZONTAL, VERTICAL = 11, 12, 13  # labels in the drawing of stripes
Target = dict[str, Any]


# --- drawing --------------------------------------------------------------------------------------


def as_target(boxes: Sequence[Sequence[float]], labels: list[int], size: tuple[int, int]) -> Target:
    return {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), format="XYXY", canvas_size=size
        ),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "image_id": 7,
    }


def draw_channels(seed: int) -> tuple[tv_tensors.Image, Target]:
    """Draw up to three rectangles that may overlap, one per channel; label = channel + 1."""
    draw = np.random.default_rng(seed)
    height, width = draw.integers(72, 112, 2).tolist()
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    channels = draw.permutation(3)[: draw.integers(1, 4)].tolist()
    boxes = []
    for channel in channels:
        w, h = draw.integers(10, 36, 2).tolist()
        x, y = draw.integers(0, [width - w + 1, height - h + 1]).tolist()
        pixels[channel, y : y + h, x : x + w] = 255
        boxes.append([x, y, x + w, y + h])
    labels = [channel + 1 for channel in channels]
    return tv_tensors.Image(pixels), as_target(boxes, labels, (height, width))


def draw_stripes(seed: int) -> tuple[tv_tensors.Image, Target]:
    """Draw three grey rectangles, apart from each other: solid, striped along, striped across."""
    draw = np.random.default_rng(seed)
    size = 96
    pixels = np.zeros((size, size), dtype=np.uint8)
    cells = draw.permutation(9)[:3].tolist()
    boxes, labels = [], []
    for cell, label in zip(cells, (SOLID, HORIZONTAL, VERTICAL), strict=True):
        w, h = draw.integers(10, 29, 2).tolist()
        left, top = 32 * (cell % 3), 32 * (cell // 3)
        x = left + int(draw.integers(1, 32 - w))
        y = top + int(draw.integers(1, 32 - h))
        rows, columns = np.mgrid[0:h, 0:w]
        across = {SOLID: 0 * rows, HORIZONTAL: rows, VERTICAL: columns}[label]
        pixels[y : y + h, x : x + w] = np.where(across // 2 % 2 == 0, 200, 100)
        boxes.append([x, y, x + w, y + h])
        labels.append(label)
    image = tv_tensors.Image(torch.from_numpy(pixels).expand(3, -1, -1).clone())
    return image, as_target(boxes, labels, (size, size))


def augment(policy: str, image: Tensor, target: Target, seed: int) -> tuple[Tensor, Target]:
    torch.manual_seed(seed)
    return training_transforms(policy)(image, target)


# --- looking --------------------------------------------------------------------------------------


def extent(mask: np.ndarray) -> np.ndarray | None:
    """Tight box xyxy of a mask [H, W], None of an empty one."""
    if not mask.any():
        return None
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=float)


def find_channels(image: Tensor) -> dict[int, np.ndarray]:
    """Return the extent of each object; the padding of `lsj` is below 127 in every channel."""
    extents = {channel + 1: extent((image[channel] > 127).numpy()) for channel in range(3)}
    return {label: box for label, box in extents.items() if box is not None}


def is_object(image: Tensor) -> np.ndarray:
    """Tell grey objects from the darkest grey, the background, and from the padding, not grey."""
    pixels = image.numpy().astype(int)
    is_grey = pixels.max(axis=0) - pixels.min(axis=0) <= 4
    brightness = pixels.mean(axis=0)
    return is_grey & (brightness > brightness[is_grey].min() + 15)


def stripes(image: Tensor, box: Tensor) -> int:
    """Tell from the pixels inside `box` how they are striped."""
    left, top, right, bottom = box.round().int().tolist()
    inside = image[0, top:bottom, left:right].numpy().astype(int)
    differs_down = bool((np.abs(np.diff(inside, axis=0)) > 15).any())
    differs_across = bool((np.abs(np.diff(inside, axis=1)) > 15).any())
    assert not (differs_down and differs_across), "the box holds more than one object"
    return HORIZONTAL if differs_down else VERTICAL if differs_across else SOLID


def check_kinds(image: Tensor, target: Target) -> None:
    boxes = target["boxes"]
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8
    assert isinstance(boxes, tv_tensors.BoundingBoxes) and boxes.dtype == torch.float32
    assert boxes.canvas_size == tuple(image.shape[-2:]) and image.shape[0] == 3
    assert target["labels"].dtype == torch.int64 and len(target["labels"]) == len(boxes)
    assert target["image_id"] == 7
    height, width = image.shape[-2:]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()


# --- boxes on objects -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", COLOUR_KEEPING)
def test_boxes_and_labels_stay_on_their_objects(policy: str) -> None:
    cut, lost = 0, 0
    for seed in range(DRAWS[policy]):
        image, target = draw_channels(seed)
        result, after = augment(policy, image, target, seed)
        check_kinds(result, after)
        visible = find_channels(result)
        labels = after["labels"].tolist()
        assert len(set(labels)) == len(labels)
        for box, label in zip(after["boxes"], labels, strict=True):
            assert visible[label] == pytest.approx(box.tolist(), abs=1.5), (policy, seed, label)
        for label in set(target["labels"].tolist()) - set(labels):
            lost += 1
            assert policy in CROPPING
            if label in visible:  # only what is hardly seen, or has its centre outside
                _check_hardly_seen(policy, visible[label], target, label)
        cut += sum(
            min(box) <= 0 or box[2] >= result.shape[2] or box[3] >= result.shape[1]
            for box in after["boxes"].tolist()
        )
    # The draws did meet what this test is about.
    assert (lost > 0) == (policy in CROPPING)
    assert cut > 0


def _check_hardly_seen(policy: str, seen: np.ndarray, before: Target, label: int) -> None:
    seen_size = seen[2:] - seen[:2]
    if policy == "lsj":
        assert min(seen_size) <= 2
        return
    box = before["boxes"][before["labels"] == label][0].numpy()
    assert (seen_size <= (box[2:] - box[:2]) / 2 + 1).any()


def test_ssd_keeps_boxes_and_labels_on_objects_whatever_it_does_to_colours() -> None:
    lost, enlarged, recoloured, checked = 0, 0, 0, 0
    for seed in range(DRAWS["ssd"]):
        image, target = draw_stripes(seed)
        result, after = augment("ssd", image, target, seed)
        check_kinds(result, after)
        objects = is_object(result)
        labels = after["labels"].tolist()
        assert len(set(labels)) == len(labels)
        outside = objects.copy()
        for box, label in zip(after["boxes"], labels, strict=True):
            left, top, right, bottom = box.round().int().tolist()
            inside = np.zeros_like(objects)
            inside[top:bottom, left:right] = True
            assert objects[inside].all(), "background in a box"
            around = np.zeros_like(objects)
            around[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = True
            assert not objects[around & ~inside].any(), "the object goes on outside of its box"
            outside &= ~inside
            if min(right - left, bottom - top) >= 5:  # stripes of smaller boxes are not visible
                assert stripes(result, box) == label
                checked += 1
        lost += 3 - len(labels)
        if len(labels) == 3:
            assert not outside.any(), "an object without a box"
        enlarged += result.shape[1] > 96 or result.shape[2] > 96
        recoloured += int(result.max()) != 200
    assert lost > 20 and enlarged > 20 and recoloured > 20 and checked > 150


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_changes_the_image_and_depends_on_torchs_random_numbers_alone(policy: str) -> None:
    image, target = draw_channels(0)
    # A fixed number per policy; at least two differ.
    results = [augment(policy, image, target, seed)[0] for seed in range(6)]
    assert any(not torch.equal(results[0], other) for other in results[1:])
    np.random.seed(0)
    again, boxes = augment(policy, image, target, 5)
    assert torch.equal(again, results[5])
    assert torch.equal(boxes["boxes"], augment(policy, image, target, 5)[1]["boxes"])


@pytest.mark.parametrize("policy", POLICIES)
def test_the_input_is_unchanged(policy: str) -> None:
    image, target = draw_channels(1)
    pixels, boxes, labels = image.clone(), target["boxes"].clone(), target["labels"].clone()
    for seed in range(5):
        augment(policy, image, target, seed)
    assert torch.equal(image, pixels)
    assert torch.equal(target["boxes"], boxes) and torch.equal(target["labels"], labels)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_image_without_objects_goes_through(policy: str) -> None:
    image, _ = draw_channels(2)
    empty = as_target([], [], tuple(image.shape[-2:]))
    for seed in range(8 if policy in RESIZING else 40):
        result, after = augment(policy, image, empty, seed)
        check_kinds(result, after)
        assert after["boxes"].shape == (0, 4)


@pytest.mark.parametrize("policy", CROPPING)
def test_no_box_of_less_than_a_pixel_is_left_by_a_crop(policy: str) -> None:
    # A grid of narrow boxes; crops leave slivers of every width.
    side = 96
    starts = np.arange(0.0, side - 3, 1.7)
    boxes = [[x, y, x + 2.5, y + 2.5] for x in starts[::5] for y in starts[::5]]
    image = tv_tensors.Image(torch.zeros(3, side, side, dtype=torch.uint8))
    labels = list(range(len(boxes)))
    dropped = 0
    for seed in range(10 if policy == "lsj" else 60):
        result, after = augment(policy, image, as_target(boxes, labels, (side, side)), seed)
        check_kinds(result, after)
        assert (after["boxes"][:, 2:] - after["boxes"][:, :2] >= 1).all()
        dropped += len(labels) - len(after["labels"])
    assert dropped > 0


@pytest.mark.parametrize("policy", ["ssd", "ssdlite"])
def test_a_box_that_sticks_out_by_less_than_a_pixel_is_cut_and_not_dropped(policy: str) -> None:
    image = tv_tensors.Image(torch.zeros(3, 96, 96, dtype=torch.uint8))
    uncropped = 0
    for seed in range(40):
        target = as_target([[60.0, 60.0, 96.4, 96.3], [-0.4, -0.3, 40.0, 50.0]], [1, 2], (96, 96))
        result, after = augment(policy, image, target, seed)
        check_kinds(result, after)
        if tuple(result.shape) == (3, 96, 96):
            assert after["labels"].tolist() == [1, 2]
            uncropped += 1
    assert uncropped > 0


@pytest.mark.parametrize("policy", ["hflip", "multiscale"])
def test_policies_that_cannot_push_a_box_out_keep_even_thin_ones(policy: str) -> None:
    image = tv_tensors.Image(torch.zeros(3, 80, 80, dtype=torch.uint8))
    boxes = [[0, 0, 80, 80], [79.75, 0, 80, 40], [0, 79.5, 0.5, 80]]
    for seed in range(4):
        _, after = augment(policy, image, as_target(boxes, [1, 2, 3], (80, 80)), seed)
        assert after["labels"].tolist() == [1, 2, 3]
        assert (after["boxes"][:, 2:] > after["boxes"][:, :2]).all()


def test_hflip_flips_half_of_the_time_and_does_nothing_else() -> None:
    image, target = draw_channels(3)
    width, flipped = image.shape[-1], 0
    for seed in range(100):
        result, after = augment("hflip", image, target, seed)
        if torch.equal(result, image):
            assert torch.equal(after["boxes"], target["boxes"])
            continue
        flipped += 1
        assert torch.equal(result, image.flip(-1))
        mirrored = target["boxes"][:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
        assert torch.equal(after["boxes"], mirrored + torch.tensor([width, 0, width, 0]))
    assert 30 < flipped < 70


def test_multiscale_sets_the_shorter_side() -> None:
    image, target = draw_channels(4)
    long, _ = draw_channels(5)
    long = F.resize(long, [40, 160])
    sides = set()
    for seed in range(12):
        result, _ = augment("multiscale", image, target, seed)
        sides.add(min(result.shape[-2:]))
        result, _ = augment("multiscale", long, as_target([], [], (40, 160)), seed)
        assert max(result.shape[-2:]) <= 1333
    assert sides <= set(presets.MULTISCALE_SIZES) and len(sides) > 3


def test_lsj_makes_every_image_one_size() -> None:
    sizes = set()
    for seed in range(8):
        image, target = draw_channels(seed)
        sizes.add(tuple(augment("lsj", image, target, seed)[0].shape))
    assert sizes == {(3, 1024, 1024)}


def test_lsj_pads_below_and_on_one_side_alone() -> None:
    # Below and right; the flip comes after that. Images of more than the size are not padded.
    fill, padded, mirrored = torch.tensor(MEAN_COLOUR)[:, None, None], 0, 0
    for seed in range(24):
        image, target = draw_channels(seed)
        result, _ = augment("lsj", image, target, seed)
        is_seen = (result != fill).any(dim=0).numpy()
        left, top, right, bottom = (int(v) for v in extent(is_seen))  # type: ignore[union-attr]
        assert is_seen[top:bottom, left:right].all()
        assert top == 0 and (left == 0 or right == 1024)
        padded += bottom < 1024
        mirrored += left > 0
    assert padded > 3 and mirrored > 1


def test_lsj_is_listed_as_a_policy_of_one_size() -> None:
    assert "lsj" in presets.FIXED_SIZE and "lsj" in RESIZING


def test_resizing_policies_are_those_that_change_the_size_by_more_than_a_crop() -> None:
    large = [[4, 4, 92, 92]]
    image = tv_tensors.Image(torch.zeros(3, 96, 96, dtype=torch.uint8))
    for policy in POLICIES:
        results = [
            augment(policy, image, as_target(large, [1], (96, 96)), seed)[1] for seed in range(5)
        ]
        sides = [max((r["boxes"][:, 2:] - r["boxes"][:, :2]).ravel(), default=0) for r in results]
        assert any(side > 88 for side in sides) == (policy in RESIZING), policy


def test_an_unknown_policy_is_named_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'autoaugment'.*hflip.*ssdlite"):
        training_transforms("autoaugment")


# --- FixedSizeCrop --------------------------------------------------------------------------------


def numbered(height: int, width: int) -> Tensor:
    """An image whose pixels hold their position: (row, column, 200)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, torch.full_like(rows, 200)]).to(torch.uint8)


@settings(deadline=None, max_examples=80)
@given(
    image_size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    seed=st.integers(0, 2**32),
)
def test_fixed_size_crop_gives_a_window_padded_right_and_below_only(
    image_size: tuple[int, int], size: tuple[int, int], seed: int
) -> None:
    (height, width), fill = image_size, (123.0, 117.0, 104.0)
    target = as_target([[0, 0, width, height]], [1], image_size)
    torch.manual_seed(seed)
    image, after = FixedSizeCrop(size, fill)(tv_tensors.Image(numbered(height, width)), target)
    assert image.shape == (3, *size) and image.dtype == torch.uint8
    seen_height, seen_width = min(height, size[0]), min(width, size[1])
    window = image[:, :seen_height, :seen_width]
    top, left = window[:2, 0, 0].tolist()
    assert torch.equal(
        window, numbered(height, width)[:, top : top + seen_height, left : left + seen_width]
    )
    padding = torch.ones(size, dtype=torch.bool)
    padding[:seen_height, :seen_width] = False
    assert (image[:, padding] == torch.tensor(fill, dtype=torch.uint8)[:, None]).all()
    assert after["boxes"].canvas_size == size
    assert after["boxes"].tolist() == [[0, 0, seen_width, seen_height]]


def test_fixed_size_crop_reaches_every_place_equally() -> None:
    crop, places = FixedSizeCrop((4, 4), MEAN_COLOUR), []
    torch.manual_seed(0)
    for _ in range(600):
        image = crop(tv_tensors.Image(numbered(6, 5)))
        places.append((int(image[0, 0, 0]), int(image[1, 0, 0])))
    counts = {position: places.count(position) for position in set(places)}
    assert set(counts) == {(top, left) for top in range(3) for left in range(2)}
    assert min(counts.values()) > 60 and max(counts.values()) < 140
