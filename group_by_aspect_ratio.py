"""Which images form a batch, how often and in which order: seeded and resumable.

Source: torchvision's references/detection/group_by_aspect_ratio.py for the aspect-ratio groups;
LVIS (https://arxiv.org/abs/1908.03195, section 5) for the factors that repeat images of rare
classes. What differs: the groups are cut over the whole data set and not per process, and no image
is dropped. An epoch has a constant number of samples, and its order is a pure function of (seed,
epoch, batch size, data), so that resuming, also with another number of processes, is slicing a
list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

import presets
from coco_utils import CocoDetection


def aspect_ratio_groups(sizes: np.ndarray, factor: int) -> np.ndarray:
    """Assign every image to a group of like aspect ratio (width / height).

    The borders lie at 2 ** (i / factor) for i = -factor … factor, as in torchvision.

    Args:
        sizes: `[I, 2]` (H, W), pixels.
        factor: groups per octave; 0 splits at 1 (landscape, portrait), negative is one group.

    Returns:
        `[I]` int64 group numbers from 0.
    """
    if factor < 0:
        return np.zeros(len(sizes), dtype=np.int64)
    borders = 2 ** np.linspace(-1, 1, 2 * factor + 1) if factor > 0 else np.array([1.0])
    return np.searchsorted(borders, sizes[:, 1] / sizes[:, 0], side="right").astype(np.int64)


def permutation(count: int, *key: int) -> np.ndarray:
    """Return a permutation of `range(count)` that depends only on `key`.

    NumPy promises that a bit generator's raw stream stays the same on all platforms and in all
    releases. It does not promise that of `Generator.permutation`. So this sorts raw 64-bit words.
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(words, kind="stable")


def repeat_factors(pairs: np.ndarray, num_images: int, threshold: float) -> np.ndarray:
    """Return `[I]` float64 of at least 1: how often an epoch shows each image.

    A class that a share f of the images has gets max(1, sqrt(threshold / f)); an image gets the
    largest of its classes. What is over 1 is scaled so that all images together make a whole
    number of samples, the nearest one.

    Args:
        pairs: `[P, 2]` (image, class) for each class that an image has.
        threshold: the share of images below which a class is rare; 0 repeats nothing.
    """
    images, classes = pairs.T
    shares = np.maximum(np.bincount(classes), 1) / num_images
    of_class = np.maximum(1, np.sqrt(threshold / shares))
    factors = np.ones(num_images)
    np.maximum.at(factors, images, of_class[classes])
    extra = math.fsum(factors - 1)  # the same on every platform
    return 1 + (factors - 1) * (round(extra) / extra if extra else 1)


def groups_and_factors(
    data: CocoDetection, policy: str, group_factor: int, repeat_threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return `aspect_ratio_groups` and `repeat_factors` of data augmented by a `policy`."""
    has_one_size = policy in presets.FIXED_SIZE  # then groups gain nothing
    groups = aspect_ratio_groups(data.sizes(), -1 if has_one_size else group_factor)
    pairs = data.annotations.classes_in_images(data.keep)
    return groups, repeat_factors(pairs, len(data), repeat_threshold)


def epoch_samples(factors: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Repeat images by their factors: each comes as often as its factor, rounded down or up.

    Systematic sampling: image i owns a stretch as long as its factor exceeds 1 on a line, and each
    point offset + k on the line, for whole k, repeats its image. The line has a whole length, so
    that the number of points never changes. The offset moves by the golden ratio per epoch, which
    makes the mean over epochs converge faster than with independent offsets.

    Args:
        factors: `[I]`, at least 1, of a whole sum.

    Returns:
        `[S]` int64: image i's k-th copy is i + k * I, so that copies are augmented independently.
    """
    numbers = np.arange(len(factors))
    ends = np.cumsum(factors - 1)
    length = round(ends[-1])
    if not length:
        return numbers
    start = int(np.random.Philox(np.random.SeedSequence((seed, 2))).random_raw())
    position = (start + epoch * 0x9E3779B97F4A7C15) % 2**64  # 64 bits of the golden ratio
    offset = (position >> 40) / 2**24  # 24 bits: adding it to a whole number does not round
    points = np.floor(ends / ends[-1] * length + offset).astype(np.int64)
    copies = np.diff(points, prepend=0)
    first = np.cumsum(copies) - copies
    images = np.repeat(numbers, copies)
    nth = np.arange(length) - first[images] + 1
    return np.concatenate([numbers, images + nth * len(factors)])


def epoch_batches(groups: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Cut a shuffled data set into micro-batches of one group each, and shuffle those.

    The images left over in each group (fewer than `batch_size`) form mixed batches of neighbouring
    groups. The last of these may be short.

    Args:
        groups: `[I]` group number of every image.

    Returns:
        `[B, batch_size]` int64 image indices, -1 where the one short batch has no image.
    """
    shuffled = permutation(len(groups), seed, epoch, 0)
    by_group = shuffled[np.argsort(groups[shuffled], kind="stable")]
    sizes = np.bincount(groups)
    rank_in_group = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    is_left_over = rank_in_group >= np.repeat(sizes // batch_size * batch_size, sizes)
    ordered = np.concatenate([by_group[~is_left_over], by_group[is_left_over]])
    num_batches = -(-len(groups) // batch_size)
    padding = np.full(num_batches * batch_size - len(groups), -1)
    batches = np.concatenate([ordered, padding]).reshape(num_batches, batch_size)
    return batches[permutation(num_batches, seed, epoch, 1)]


class GroupedBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yield this process's micro-batches of an epoch as lists of (epoch, sample index).

    Micro-batch s * world_size + rank is this process's s-th. An epoch ends with a full optimizer
    step: where the list does not fill it, its first batches stand in, and the training loop gives
    them weight 0 (`weight`), so every sample counts once. Sample i is image i % len(groups).

    Args:
        groups: `[I]` group number of every image.
        batch_size: images per micro-batch.
        batches_per_step: micro-batches per optimizer step, over all processes.
        factors: `[I]` how often an epoch shows each image (`repeat_factors`); once if not given.
    """

    def __init__(
        self,
        groups: np.ndarray,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        batches_per_step: int = 1,
        factors: np.ndarray | None = None,
    ) -> None:
        self.factors = np.ones(len(groups)) if factors is None else factors
        self.groups, self.batch_size, self.seed = groups, batch_size, seed
        self.rank, self.world_size, self.batches_per_step = rank, world_size, batches_per_step
        self.num_batches = -(-round(self.factors.sum()) // batch_size)
        self.steps_per_epoch = -(-self.num_batches // batches_per_step)
        self.epoch, self.position = 0, 0

    def set_epoch(self, epoch: int, position: int = 0) -> None:
        """Choose the epoch, and how many of its micro-batches (of all processes) are done."""
        self.epoch, self.position = epoch, position

    def weight(self, position: int) -> float:
        """Return what the loss of micro-batch `position` of the epoch counts.

        DDP averages gradients over the processes and accumulation adds them up, so that with this
        weight a step's gradient is the mean over the micro-batches that it really has.
        """
        if position >= self.num_batches:
            return 0.0
        first = position // self.batches_per_step * self.batches_per_step
        return self.world_size / min(self.batches_per_step, self.num_batches - first)

    def __len__(self) -> int:
        return (self.steps_per_epoch * self.batches_per_step - self.position) // self.world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        samples = epoch_samples(self.factors, self.seed, self.epoch)
        groups = self.groups[samples % len(self.groups)]
        batches = epoch_batches(groups, self.batch_size, self.seed, self.epoch)
        end = self.steps_per_epoch * self.batches_per_step
        for position in range(self.position + self.rank, end, self.world_size):
            batch = batches[position % self.num_batches]
            yield [(self.epoch, index) for index in samples[batch[batch >= 0]].tolist()]


def same_size_batches(padded_sizes: np.ndarray, batch_size: int) -> list[list[int]]:
    """Cut a data set, unshuffled, into batches of images that are padded to the same size.

    A network sees the padding, so a batch of mixed sizes would change predictions. What a batch
    holds does not depend on the number of processes; process r of W takes every W-th batch.

    Args:
        padded_sizes: `[I, 2]` size (H, W) to which the model pads each image, pixels.
    """
    _, group = np.unique(padded_sizes, axis=0, return_inverse=True)
    batches = []
    for number in range(group.max(initial=-1) + 1):
        members = np.flatnonzero(group == number).tolist()
        batches += [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
    return batches
