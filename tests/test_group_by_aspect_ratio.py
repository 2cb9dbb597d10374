"""Every image as often as its factor, in one order for all.

pytest tests/test_group_by_aspect_ratio.py. The groups are compared with torchvision's rule, written
here as its reference scripts have it; the batches with what they promise, over data sets, batch
sizes, factors, seeds and numbers of processes that hypothesis draws.
"""

import json
import math
from bisect import bisect_right
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coco_utils import CocoDetection, label_categories
from data import coco_json
from group_by_aspect_ratio import (
    GroupedBatchSampler,
    aspect_ratio_groups,
    epoch_batches,
    epoch_samples,
    permutation,
    repeat_factors,
    same_size_batches,
)
from presets import training_transforms
from runtime.summary import describe_repeats

FEW = settings(deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**63 - 1)
SIDES = st.integers(1, 5000)
Batch = list[tuple[int, int]]


class Case(NamedTuple):
    """A data set of groups, and how it is cut."""

    groups: np.ndarray
    batch_size: int
    seed: int
    epoch: int
    factors: np.ndarray | None = None


PLAIN = st.builds(
    Case,
    st.lists(st.integers(0, 7), min_size=1, max_size=70).map(np.array),
    st.integers(1, 9),
    SEEDS,
    st.integers(0, 100),
    st.none(),
)


def pairs_in(num_images: int) -> st.SearchStrategy[np.ndarray]:
    """Draw which images have which of five classes, as `repeat_factors` takes it."""
    pair = st.tuples(st.integers(0, num_images - 1), st.integers(0, 4))
    return st.sets(pair).map(lambda pairs: np.array(sorted(pairs), np.int64).reshape(-1, 2))


@st.composite
def repeated_cases(draw: st.DrawFn) -> Case:
    """Draw a data set, some images of which an epoch repeats."""
    case = draw(PLAIN)
    pairs, threshold = draw(pairs_in(len(case.groups))), draw(st.floats(0, 1))
    return case._replace(factors=repeat_factors(pairs, len(case.groups), threshold))


REPEATED = repeated_cases()
CASES = PLAIN | REPEATED


def sampler(
    case: Case, rank: int = 0, world_size: int = 1, per_step: int = 1
) -> GroupedBatchSampler:
    made = GroupedBatchSampler(
        case.groups, case.batch_size, case.seed, rank, world_size, per_step, case.factors
    )
    made.set_epoch(case.epoch)
    return made


def interleaved(shares: list[list[Batch]]) -> list[Batch]:
    """Undo the deal: batch s * W + r is the s-th of process r."""
    assert len({len(share) for share in shares}) == 1
    return [share[step] for step in range(len(shares[0])) for share in shares]


# --- groups ---------------------------------------------------------------------------------------


@FEW
@given(
    sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=50),
    factor=st.integers(0, 6),
)
@example(sizes=[(1, 2), (2, 1), (1, 1), (1, 4), (4, 1), (100, 199), (100, 201)], factor=0)
@example(sizes=[(1, 2), (2, 1), (1, 1), (1, 4), (4, 1), (100, 199), (100, 201)], factor=3)
def test_groups_are_those_of_torchvisions_rule(sizes: list[tuple[int, int]], factor: int) -> None:
    borders = (2 ** np.linspace(-1, 1, 2 * factor + 1)).tolist() if factor > 0 else [1.0]
    expected = [bisect_right(borders, float(width) / float(height)) for height, width in sizes]
    for dtype in (np.int32, np.int64):
        groups = aspect_ratio_groups(np.array(sizes, dtype=dtype), factor)
        assert groups.dtype == np.int64
        assert groups.tolist() == expected


def test_a_negative_factor_is_one_group() -> None:
    assert aspect_ratio_groups(np.array([[1, 5], [5, 1], [2, 2]]), -1).tolist() == [0, 0, 0]


def test_no_images_are_no_groups() -> None:
    assert len(aspect_ratio_groups(np.empty((0, 2), dtype=np.int32), 3)) == 0


# --- the permutation ------------------------------------------------------------------------------


def test_permutation_is_the_same_on_every_platform_and_release() -> None:
    # A run that is resumed after an upgrade must see the same order: these lists never change.
    assert permutation(10, 0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert permutation(12, 1, 2, 3).tolist() == [1, 8, 2, 4, 6, 5, 0, 9, 7, 10, 3, 11]
    assert permutation(8, 2**63 - 1, 25, 1).tolist() == [0, 1, 6, 3, 7, 2, 4, 5]


def test_epoch_batches_are_the_same_on_every_platform_and_release() -> None:
    batches = epoch_batches(np.array([0, 1, 0, 1, 0, 1, 0]), batch_size=2, seed=7, epoch=3)
    assert batches.tolist() == [[4, 2], [1, 3], [5, -1], [6, 0]]


@FEW
@given(count=st.integers(0, 300), key=st.lists(SEEDS, min_size=1, max_size=3))
def test_permutation_holds_every_number_once(count: int, key: list[int]) -> None:
    assert sorted(permutation(count, *key).tolist()) == list(range(count))


# --- repeated images ------------------------------------------------------------------------------


def lvis_factors(pairs: np.ndarray, num_images: int, threshold: float) -> list[float]:
    """LVIS's rule as Detectron2's RepeatFactorTrainingSampler has it, image by image."""
    classes_of = defaultdict(set)
    for image, number in pairs.tolist():
        classes_of[image].add(number)
    freq = Counter(number for classes in classes_of.values() for number in classes)
    rep = {c: max(1.0, math.sqrt(threshold / (n / num_images))) for c, n in freq.items()}
    return [max((rep[c] for c in classes_of[image]), default=1.0) for image in range(num_images)]


@FEW
@given(data=st.data(), num_images=st.integers(1, 60), threshold=st.floats(0, 1))
def test_factors_are_lvis_and_make_a_whole_number_of_samples(
    data: st.DataObject, num_images: int, threshold: float
) -> None:
    pairs = data.draw(pairs_in(num_images))
    extra = np.array(lvis_factors(pairs, num_images, threshold)) - 1
    factors = repeat_factors(pairs, num_images, threshold)
    # All that is over 1 is scaled alike, by less than half a sample in all.
    assert factors.sum() == pytest.approx(num_images + round(extra.sum()), abs=1e-9)
    assert (factors - 1) * extra.sum() == pytest.approx(extra * round(extra.sum()), abs=1e-9)


def test_a_class_in_one_of_twenty_images_comes_as_the_rule_says() -> None:
    pairs = np.array([(image, 0) for image in range(400)] + [(image, 1) for image in range(20)])
    factors = repeat_factors(pairs, 400, 0.2)  # sqrt(0.2 / 0.05) = 2
    assert factors.tolist() == [2.0] * 20 + [1.0] * 380
    assert (repeat_factors(pairs, 400, 0) == 1).all()
    assert describe_repeats(repeat_factors(pairs, 400, 0.2), pairs, ["cat", "dog"]) == (
        "420 an epoch of 400 images; dog in 20 images comes 40 times, cat in 400 images comes 420 "
        "times"
    )
    assert describe_repeats(np.ones(400), pairs, ["cat", "dog"]) == "400 an epoch, each image once"


@FEW
@given(REPEATED)
@example(Case(np.zeros(5, int), 2, 0, 0, np.array([1, 4.5, 1, 1.5, 1])))
def test_an_epoch_has_each_image_as_often_as_its_factor_rounded(case: Case) -> None:
    assert case.factors is not None
    num_images = len(case.groups)
    samples = sorted(index for batch in sampler(case) for _, index in batch)
    assert len(samples) == round(case.factors.sum())  # in every epoch
    counts = np.bincount(np.array(samples) % num_images)
    assert (counts >= np.floor(case.factors + 1e-9)).all()
    assert (counts <= np.ceil(case.factors - 1e-9)).all()
    # The copies of an image are numbered, so that each gets random numbers of its own.
    expected = [i + k * num_images for i, count in enumerate(counts) for k in range(count)]
    assert samples == sorted(expected)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_the_mean_over_epochs_of_each_image_is_its_factor(seed: int) -> None:
    rng = np.random.default_rng(3)
    extra = rng.choice([0, 0.01, 0.3, 0.5, 1, 2.25], 80) * rng.uniform(0, 1.5, 80)
    factors = 1 + extra * (round(extra.sum()) / extra.sum())
    totals = np.zeros(80)
    for epoch in range(1000):
        samples = epoch_samples(factors, seed, epoch)
        totals += np.bincount(samples % 80, minlength=80)
    # 3 in 1000 epochs; independent offsets would have a standard deviation of 16.
    assert totals == pytest.approx(factors * 1000, abs=3)


def test_repeated_samples_are_the_same_on_every_platform_and_release() -> None:
    factors = np.array([1, 1.5, 3.25, 1, 1.25])
    epochs = [epoch_samples(factors, 7, epoch).tolist() for epoch in range(4)]
    assert epochs[0] == epochs[2] == [0, 1, 2, 3, 4, 7, 12, 9]
    assert epochs[1] == epochs[3] == [0, 1, 2, 3, 4, 6, 7, 12]
    case = Case(np.array([0, 1, 0, 1, 0]), 2, 7, 3, factors)
    assert [[index for _, index in batch] for batch in sampler(case)] == [
        [0, 4],
        [1, 3],
        [2, 6],
        [12, 7],
    ]


@FEW
@given(PLAIN)
def test_factors_of_one_are_the_order_without_factors(case: Case) -> None:
    ones = case._replace(factors=np.ones(len(case.groups)))
    batches = epoch_batches(case.groups, case.batch_size, case.seed, case.epoch).tolist()
    expected = [[(case.epoch, i) for i in batch if i >= 0] for batch in batches]
    assert list(sampler(ones)) == list(sampler(case)) == expected


def test_which_images_have_a_class_leaves_crowds_and_images_out(tiny_shapes: Path) -> None:
    path = tiny_shapes / "annotations" / "instances_train2017.json"
    document = json.loads(path.read_text())
    annotations, _ = coco_json.read_annotations(path)
    ids = [image["id"] for image in document["images"]]
    numbers = {category: k for k, (category, _) in enumerate(annotations.categories)}
    images = np.array([1, 3, 4, 9])
    expected = {
        (images.tolist().index(ids.index(row["image_id"])), numbers[row["category_id"]])
        for row in document["annotations"]
        if not row["iscrowd"] and ids.index(row["image_id"]) in images
    }
    assert any(row["iscrowd"] for row in document["annotations"] if row["image_id"] == ids[3])
    pairs = annotations.classes_in_images(images).tolist()
    assert sorted(map(tuple, pairs)) == sorted(expected)


def test_a_copy_is_the_same_image_with_other_random_numbers(tiny_shapes: Path) -> None:
    path = tiny_shapes / "annotations" / "instances_train2017.json"
    annotations, _ = coco_json.read_annotations(path)
    label_map = label_categories(annotations.categories)
    transforms = training_transforms("multiscale")
    data = CocoDetection(tiny_shapes / "train2017", annotations, label_map, transforms)
    samples = [data[2, 4 + copy * len(data)] for copy in range(6)]
    assert len({int(target["image_id"]) for _, target in samples}) == 1
    assert len({tuple(image.shape) for image, _ in samples}) > 2


# --- one epoch ------------------------------------------------------------------------------------


@FEW
@given(PLAIN)
def test_every_image_comes_exactly_once_per_epoch(case: Case) -> None:
    batches = [[index for _, index in batch] for batch in sampler(case)]
    assert sorted(sum(batches, [])) == list(range(len(case.groups)))
    # All are full but one, which has what remains.
    shortfall = [case.batch_size - len(batch) for batch in batches if len(batch) < case.batch_size]
    assert len(shortfall) <= 1 and sum(shortfall) == -len(case.groups) % case.batch_size


@FEW
@given(CASES)
def test_a_batch_is_of_one_group_unless_of_leftovers(case: Case) -> None:
    drawn = [np.array([index for _, index in batch]) for batch in sampler(case)]
    batches = [case.groups[batch % len(case.groups)] for batch in drawn]
    sizes = Counter(np.concatenate(batches).tolist())
    pure = Counter(
        int(batch[0])
        for batch in batches
        if len(batch) == case.batch_size and len(set(batch.tolist())) == 1
    )
    for group, size in sizes.items():
        assert pure[group] >= size // case.batch_size
    # What is not in those is fewer than a batch of each group, and lies in neighbouring groups.
    mixed = [batch for batch in batches if len(set(batch.tolist())) > 1]
    for group, count in Counter(np.concatenate([*mixed, np.empty(0, int)]).tolist()).items():
        assert count <= sizes[group] % case.batch_size
    spans = sorted((int(batch.min()), int(batch.max())) for batch in mixed)
    assert all(one[1] <= two[0] for one, two in zip(spans, spans[1:], strict=False))


@FEW
@given(CASES)
def test_the_order_is_a_function_of_seed_epoch_batch_size_and_data(case: Case) -> None:
    np.random.seed(0)
    first = list(sampler(case))
    np.random.seed(1)
    other = sampler(case)
    other.set_epoch(case.epoch + 1)
    list(other)
    other.set_epoch(case.epoch)
    assert list(other) == list(other) == first
    assert {epoch for batch in first for epoch, _ in batch} == {case.epoch}


def test_the_order_is_another_in_every_epoch_and_for_every_seed() -> None:
    groups = np.arange(120) % 3
    orders = {
        tuple(epoch_batches(groups, 4, seed, epoch).ravel().tolist())
        for seed in range(20)
        for epoch in range(20)
    }
    assert len(orders) == 400


def test_both_the_batches_and_their_images_change_each_epoch() -> None:
    groups = np.zeros(64, dtype=np.int64)
    first, second = (
        {frozenset(batch) for batch in epoch_batches(groups, 4, 0, epoch).tolist()}
        for epoch in (0, 1)
    )
    assert len(first & second) <= 1


def test_groups_are_spread_over_the_epoch() -> None:
    groups = np.repeat([0, 1], 400)
    batches = epoch_batches(groups, 2, seed=0, epoch=0)
    in_first_half = groups[batches[:200, 0]].mean()
    assert 0.35 < in_first_half < 0.65


# --- over processes -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(case=CASES, world_size=st.integers(1, 5), accumulate=st.integers(1, 3))
def test_several_processes_share_the_batches_of_one(
    case: Case, world_size: int, accumulate: int
) -> None:
    per_step = world_size * accumulate
    single = sampler(case, per_step=per_step)
    samplers = [sampler(case, rank, world_size, per_step) for rank in range(world_size)]
    shares = [list(one) for one in samplers]
    assert interleaved(shares) == list(single)
    assert [len(share) for share in shares] == [len(one) for one in samplers]
    # The list of an epoch is the plain one, and then its beginning until the last step is full.
    plain = list(sampler(case))
    count = len(plain)
    assert len(list(single)) == single.steps_per_epoch * per_step
    assert list(single) == [plain[i % count] for i in range(single.steps_per_epoch * per_step)]
    assert 0 <= len(list(single)) - count < per_step


@FEW
@given(
    case=CASES,
    world_size=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    data=st.data(),
)
def test_resuming_at_any_step_is_a_slice(
    case: Case, world_size: int, accumulate: int, data: st.DataObject
) -> None:
    per_step = world_size * accumulate
    one = sampler(case, data.draw(st.integers(0, world_size - 1)), world_size, per_step)
    whole = list(one)
    step = data.draw(st.integers(0, one.steps_per_epoch))
    one.set_epoch(case.epoch, step * per_step)
    assert list(one) == whole[step * accumulate :]
    assert len(one) == len(list(one))


@FEW
@given(case=CASES, per_step=st.sampled_from([4, 6, 12]), data=st.data())
def test_another_number_of_processes_trains_the_same_batches_per_step(
    case: Case, per_step: int, data: st.DataObject
) -> None:
    divisors = [count for count in range(1, per_step + 1) if per_step % count == 0]
    steps = []
    for world_size in data.draw(st.permutations(divisors))[:3]:
        samplers = [sampler(case, rank, world_size, per_step) for rank in range(world_size)]
        ordered = interleaved([list(one) for one in samplers])
        steps.append([ordered[i : i + per_step] for i in range(0, len(ordered), per_step)])
    assert steps[0] == steps[1] == steps[2]


@FEW
@given(case=CASES, world_size=st.integers(1, 4), accumulate=st.integers(1, 3))
def test_weights_make_a_step_the_mean_of_its_batches_and_stand_ins_count_nothing(
    case: Case, world_size: int, accumulate: int
) -> None:
    per_step = world_size * accumulate
    one = sampler(case, 0, world_size, per_step)
    for first in range(0, one.steps_per_epoch * per_step, per_step):
        positions = range(first, first + per_step)
        weights = [one.weight(position) for position in positions]
        assert sum(weights) / world_size == pytest.approx(1, abs=1e-12)
        real = [w for p, w in zip(positions, weights, strict=True) if p < one.num_batches]
        assert len(set(real)) == 1 and real[0] > 0
        assert all(w == 0 for w in weights[len(real) :])


def test_weights_of_a_full_step_without_accumulation_are_one() -> None:
    case = Case(np.zeros(16, dtype=np.int64), 2, 0, 0)
    assert [sampler(case, 0, 4, 4).weight(position) for position in range(8)] == [1.0] * 8


# --- evaluation -----------------------------------------------------------------------------------


@FEW
@given(
    sizes=st.lists(
        st.tuples(st.sampled_from([64, 96]), st.sampled_from([64, 96, 128])), max_size=40
    ),
    batch_size=st.integers(1, 5),
)
def test_evaluation_batches_never_mix_padded_sizes(
    sizes: list[tuple[int, int]], batch_size: int
) -> None:
    batches = same_size_batches(np.array(sizes, dtype=np.int64).reshape(-1, 2), batch_size)
    assert all(len({sizes[index] for index in batch}) == 1 for batch in batches)
    assert sorted(sum(batches, [])) == list(range(len(sizes)))
    # As few as can be: one of each size may be short.
    assert len(batches) == sum(-(-count // batch_size) for count in Counter(sizes).values())
    assert all(1 <= len(batch) <= batch_size for batch in batches)
