"""Start-up (load, filter, group), memory of processes and workers, order, padding.

The annotation file is generated once, in the user's cache folder. Its images do not exist and are
never opened. torchvision's side is `torchvision.datasets.CocoDetection` with pycocotools, used as
references/detection does: load, leave out images without boxes, group by aspect ratio.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch.utils.data import DataLoader, Subset
from torchvision import tv_tensors
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import coco_utils
import presets
from data import cache as data_cache
from data.worker_processes import ignore_stop_signals, start_worker_server
from group_by_aspect_ratio import GroupedBatchSampler, aspect_ratio_groups, epoch_batches
from models.transform import BatchTransform
from runtime.flags import non_negative, positive
from tools.benchmark import measuring
from tools.benchmark.measuring import MB, Row

# images, boxes, whether boxes have outlines; without them 25 million boxes still fill 3 GB of JSON.
SIZES = {
    "tiny": (300, 2_000, True),
    "train2017": (118_287, 860_000, True),
    "objects365": (1_700_000, 25_000_000, False),
}
FACTOR = 3  # of the aspect-ratio groups, as in the recipe
SPARE = 4000  # MB that a measurement leaves to the machine
# Width and height, and how often: like COCO's photographs, whose longer side is 640 as a rule.
SHAPES = {
    **{(640, 480): 0.42, (640, 427): 0.2, (640, 426): 0.08, (640, 360): 0.04, (640, 640): 0.02},
    **{(500, 375): 0.05, (480, 640): 0.12, (427, 640): 0.06, (360, 640): 0.01},
}
_IMAGE = '{"license":3,"file_name":"%012d.jpg","coco_url":"http://images.cocodataset.org/train2017/%012d.jpg","height":%d,"width":%d,"id":%d}'  # noqa: E501


def add_flags(add: Callable[..., Any]) -> None:
    """Declare the flags of `run`."""
    add("--size", choices=SIZES, default="train2017", help="images and boxes as this data set has")
    add("--repeats", type=positive(int), default=3, help="start-ups of either side")
    add(
        "--workers",
        type=non_negative(int),
        nargs="+",
        default=[2, 8],
        help="numbers of loader processes",
    )
    add("--processes", type=positive(int), default=8, help="that share one copy of the annotations")
    add(
        "--padding-images",
        type=non_negative(int),
        default=2000,
        help="per policy; 0 leaves the padding out",
    )


def run(
    size: str, repeats: int, workers: Sequence[int], processes: int, padding_images: int
) -> list[Row]:
    """Measure; the flags are those of `add_flags`."""
    path = generated_file(size)
    compare = size != "objects365"  # torchvision's parts would need some 25 GB of memory for it
    with tempfile.TemporaryDirectory(dir=path.parent) as cache:
        rows = _start_up_rows(path, Path(cache), repeats, compare)
        rows += _sharing_rows(path, Path(cache), processes)
        for count in workers:
            rows.append(_worker_row(path, Path(cache), count, compare))
    rows.append(_order_row())
    return rows + (padding_rows(padding_images) if padding_images else [])


# --- the generated file ---------------------------------------------------------------------------


def coco_like_sizes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw sizes (H, W) like those of COCO's images, `[count, 2]`, pixels."""
    sizes = np.array([(height, width) for width, height in SHAPES])
    return sizes[rng.choice(len(sizes), count, p=list(SHAPES.values()))]


def generated_file(size: str) -> Path:
    """Return an annotation file of one of `SIZES`, written once to the cache folder."""
    target = data_cache.folder() / "benchmark" / f"{size}-1"

    def build(folder: Path) -> None:
        write_file(folder / "instances.json", *SIZES[size])

    data_cache.built_once(target, size, build)
    return target / "instances.json"


def write_file(path: Path, num_images: int, num_boxes: int, outlines: bool) -> None:
    """Write a COCO JSON with so many images and boxes, 1 % of the images without a box."""
    rng = np.random.default_rng(0)
    names = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    categories = [(i, n) for i, n in enumerate(names) if n not in ("__background__", "N/A")]
    sizes = coco_like_sizes(num_images, rng)
    ids = rng.permutation(num_images * 5)[:num_images]
    # Parsers build every number of an outline; its values do not matter, so a few serve all boxes.
    polygons = ["[[]]"]
    if outlines:
        polygons = [
            str([rng.uniform(0, 640, 2 * corners).round(2).tolist()])
            for corners in rng.integers(12, 38, 256)
        ]
    with path.open("w", encoding="utf-8") as file:
        rows: Any = (
            _IMAGE % (i, i, h, w, i) for i, (h, w) in zip(ids.tolist(), sizes.tolist(), strict=True)
        )
        file.write('{"images":[' + ",\n".join(rows) + '],"annotations":[')
        for start in range(0, num_boxes, 200_000):
            count = min(200_000, num_boxes - start)
            number = rng.integers(num_images // 100, num_images, count)
            extent = sizes[number, ::-1] * rng.uniform(0.02, 0.5, (count, 2))
            corner = (sizes[number, ::-1] - extent) * rng.uniform(0, 1, (count, 2))
            columns = (
                rng.integers(0, len(polygons), count).tolist(),
                (extent.prod(axis=1) * 0.6).tolist(),
                (rng.random(count) < 0.01).astype(int).tolist(),
                ids[number].tolist(),
                *corner.T.tolist(),
                *extent.T.tolist(),
                rng.choice([i for i, _ in categories], count).tolist(),
                range(start + 1, start + 1 + count),
            )
            rows = (
                f'{{"segmentation":{polygons[p]},"area":{a:.4f},"iscrowd":{crowd},"image_id":{image},'
                f'"bbox":[{x:.2f},{y:.2f},{w:.2f},{h:.2f}],"category_id":{category},"id":{i}}}'
                for p, a, crowd, image, x, y, w, h, category, i in zip(*columns, strict=True)
            )
            file.write((",\n" if start else "") + ",\n".join(rows))
        rows = (f'{{"id":{i},"name":"{name}"}}' for i, name in categories)
        file.write('],"categories":[' + ",".join(rows) + "]}")


# --- start-up -------------------------------------------------------------------------------------


def start_ours(path: Path, cache: Path) -> tuple[dict[str, float], np.ndarray]:
    """Load, filter and group as `train.py` does; return figures, and the groups."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    measuring.start_peak()
    before, begin = measuring.memory(), time.perf_counter()
    annotations, _ = data_cache.examine(path)
    assert annotations is not None
    keep = annotations.images_with_objects()
    groups = aspect_ratio_groups(annotations.sizes[keep], FACTOR)
    return _figures(before, begin), groups


def start_torchvision(path: Path) -> tuple[dict[str, float], np.ndarray]:
    """Do the same with torchvision's parts."""
    measuring.start_peak()
    before, begin = measuring.memory(), time.perf_counter()
    dataset, keep = _load_torchvision(path, torchvision.datasets.CocoDetection)
    borders = (2 ** np.linspace(-1, 1, 2 * FACTOR + 1)).tolist()
    infos = [dataset.coco.imgs[dataset.ids[i]] for i in keep]
    groups = [bisect.bisect_right(borders, info["width"] / info["height"]) for info in infos]
    return _figures(before, begin), np.array(groups)


def _load_torchvision(path: Path, kind: Callable[..., Any]) -> tuple[Any, list[int]]:
    """Return the data set, and the numbers of its images with a box of more than one pixel."""
    with contextlib.redirect_stdout(None):
        dataset = kind("", str(path))
    keep = []
    for number, image_id in enumerate(dataset.ids):
        rows = dataset.coco.loadAnns(dataset.coco.getAnnIds(imgIds=image_id, iscrowd=None))
        if any(all(side > 1 for side in row["bbox"][2:]) for row in rows):
            keep.append(number)
    return dataset, keep


def _figures(before: dict[str, float], begin: float) -> dict[str, float]:
    seconds, after = time.perf_counter() - begin, measuring.memory()
    return {
        "seconds": seconds,
        "resident": after["rss"] - before["rss"],
        "private": after["private"] - before["private"],
        "peak": measuring.peak_memory() - before["rss"],
    }


def _start_up_rows(path: Path, cache: Path, repeats: int, compare: bool) -> list[Row]:
    """Start in fresh processes, in turn; the first start of ours builds the cache each time."""
    first, again, theirs = [], [], []
    for repeat in range(repeats):
        own_cache = cache / str(repeat if repeat + 1 < repeats else "kept")
        figures, groups = measuring.in_fresh_process(start_ours, path, own_cache)
        first.append(figures)
        again.append(measuring.in_fresh_process(start_ours, path, own_cache)[0])
        if compare:
            figures, expected = measuring.in_fresh_process(start_torchvision, path)
            theirs.append(figures)
            # Their images lie in the order of ids, ours in that of the file.
            assert np.array_equal(np.bincount(groups), np.bincount(expected)), "other groups"
    budget, limit = (5, 100) if compare else (None, None)
    return [
        Row("first start", "s", *_pick("seconds", first, theirs), budget=budget),
        Row("start from the cache", "s", *_pick("seconds", again, theirs), limit=2),
        Row("resident after the first start", "MB", *_pick("resident", first, theirs), limit=limit),
        Row(
            "resident after one from the cache",
            "MB",
            *_pick("resident", again, theirs),
            limit=limit,
        ),
        Row("  of it unshared", "MB", *_pick("private", again, theirs)),
        Row("peak of the first start, with file pages", "MB", *_pick("peak", first, theirs)),
    ]


def _pick(
    name: str, ours: list[dict[str, float]], theirs: list[dict[str, float]]
) -> tuple[list[float], list[float]]:
    return [figures[name] for figures in ours], [figures[name] for figures in theirs]


# --- memory that processes share ------------------------------------------------------------------


def _sharing_rows(path: Path, cache: Path, processes: int) -> list[Row]:
    """Let processes hold the annotations at once, and add up what their mappings occupy."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        barrier, held = manager.Barrier(processes, timeout=600), manager.list()
        pool = [
            context.Process(target=_hold, args=(path, cache / "kept", barrier, held))
            for _ in range(processes)
        ]
        for process in pool:
            process.start()
        for process in pool:
            process.join()
        memory = np.array(list(held))
    if len(memory) != processes:
        raise RuntimeError("a process died while it held the annotations")
    resident, share = memory.sum(axis=0)
    if resident == 0:  # a small file is not cached
        return []
    unit = f"MB in {processes} processes"
    return [
        Row("annotations mapped from the cache, one copy", "MB", [resident / processes]),
        Row("annotations mapped from the cache, all that they occupy", unit, [share]),
    ]


def _hold(path: Path, cache: Path, barrier: Any, held: Any) -> None:
    """Read every byte of the annotations, and measure their mappings while all others do."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    annotations, _ = data_cache.examine(path)
    for name in data_cache.ARRAYS:
        getattr(annotations, name).view(np.uint8).max()
    barrier.wait()
    resident = share = 0.0
    is_ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            is_ours = str(cache) in rest
        elif is_ours and name in ("Rss:", "Pss:"):
            size = int(rest.split()[0]) * 1024 / MB
            resident += size * (name == "Rss:")
            share += size * (name == "Pss:")
    held.append((resident, share))
    barrier.wait()


class _Ours(coco_utils.CocoDetection):
    """Targets as in training, without images."""

    def _read_image(self, entry: coco_utils.Entry) -> torch.Tensor:
        return torch.zeros((3, 1, 1), dtype=torch.uint8)


class _Torchvision(torchvision.datasets.CocoDetection):
    """Annotations and what the reference scripts take from them, but for masks; no images."""

    def _load_image(self, id: int) -> Any:
        return torch.zeros((3, 1, 1))

    def __getitem__(self, index: int) -> Any:
        image, target = super().__getitem__(index)
        boxes = torch.tensor([row["bbox"] for row in target])
        names = ("category_id", "area", "iscrowd")
        return image, boxes, {k: torch.tensor([row[k] for row in target]) for k in names}


def worker_memory(path: Path, cache: Path, workers: int, side: str) -> list[float]:
    """Index an epoch, and return what each worker then has for itself, MB."""
    if side == "ours":
        os.environ["XDG_CACHE_HOME"] = str(cache / "kept")
        annotations, _ = data_cache.examine(path)
        assert annotations is not None
        keep = annotations.images_with_objects()
        label_map = coco_utils.label_categories(annotations.categories)
        data: Any = _Ours(Path(), annotations, label_map, keep=keep)
        groups = aspect_ratio_groups(data.sizes(), FACTOR)
        batches = data.with_entries(GroupedBatchSampler(groups, 16, 0))
        order: dict[str, Any] = {"batch_sampler": batches, "multiprocessing_context": "forkserver"}
        count, data = len(data), data.for_workers()
        start_worker_server("tools.benchmark.data")
    else:
        data, kept = _load_torchvision(path, _Torchvision)
        data, order = Subset(data, kept), {"batch_size": 16, "shuffle": True}
        order["multiprocessing_context"] = "fork"
        count = len(data)
        available = measuring.available_memory() - SPARE
        if workers * measuring.memory()["rss"] > available:
            return []  # workers copy what they touch: in the worst case everything
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
    loader = DataLoader(
        data,
        **order,
        num_workers=workers,
        collate_fn=len,
        worker_init_fn=ignore_stop_signals,
        persistent_workers=True,
    )
    assert sum(loader) == count
    return [measuring.memory(int(w.pid or 0))["private"] for w in multiprocessing.active_children()]


def _worker_row(path: Path, cache: Path, workers: int, compare: bool) -> Row:
    ours = measuring.in_fresh_process(worker_memory, path, cache, workers, "ours")
    theirs = []
    if compare:
        theirs = measuring.in_fresh_process(worker_memory, path, cache, workers, "torchvision")
    unit = f"MB in {workers} workers"
    return Row("unshared after an epoch", unit, [sum(ours)], [sum(theirs)] if theirs else [])


# --- order and padding ----------------------------------------------------------------------------


def _order_row(num_images: int = 1_700_000) -> Row:
    sizes = coco_like_sizes(num_images, np.random.default_rng(0))
    groups = aspect_ratio_groups(sizes, FACTOR)
    (seconds,) = measuring.in_turn([lambda: epoch_batches(groups, 2, 0, 0)], 3)
    return Row("order of an epoch of 1.7 million images", "s", seconds, limit=1)


def padding_rows(num_images: int, batch_size: int = 2) -> list[Row]:
    """Return how many pixels of padding batches have per 100 pixels of their images.

    Images go through a policy and the model's resizing to 800 px as in training; they are on the
    "meta" device, where a tensor has a shape and no pixels.
    """
    rng = np.random.default_rng(0)
    sizes = coco_like_sizes(num_images, rng)
    base = GeneralizedRCNNTransform(800, 1333, [0.0] * 3, [1.0] * 3)
    rows = []
    for policy in presets.POLICIES:
        resize = BatchTransform(base, policy not in presets.RESIZING).train().resize
        transforms = presets.training_transforms(policy)
        torch.manual_seed(0)
        shapes = []
        for height, width in sizes.tolist():
            image = torch.empty((3, height, width), dtype=torch.uint8, device="meta")
            corner = rng.uniform(0, 0.5, (7, 2)) * (width, height)
            extent = rng.uniform(0.05, 0.5, (7, 2)) * (width, height)
            boxes: Any = np.concatenate([corner, corner + extent], axis=1).astype(np.float32)
            box_format = tv_tensors.BoundingBoxFormat.XYXY
            target = {
                "boxes": tv_tensors.BoundingBoxes(
                    torch.from_numpy(boxes), format=box_format, canvas_size=(height, width)
                ),
                "labels": torch.ones(7, dtype=torch.int64),
            }
            image = transforms(tv_tensors.Image(image), target)[0].as_subclass(torch.Tensor)
            shapes.append(resize(image.float())[0].shape[1:])
        is_fixed = policy in presets.FIXED_SIZE
        for name, factor in (("grouped", -1 if is_fixed else FACTOR), ("not grouped", -1)):
            batches = epoch_batches(aspect_ratio_groups(sizes, factor), batch_size, 0, 0)
            waste = padding_percent(np.array(shapes), batches)
            rows.append(Row(f"padding, {policy}, {name}", "% of the images' pixels", [waste]))
    return rows


def padding_percent(shapes: np.ndarray, batches: np.ndarray) -> float:
    """Return the percentage of padding in batches `[B, n]` of images of `shapes` `[I, 2]`."""
    padded = pixels = 0
    for batch in batches:
        members = shapes[batch[batch >= 0]]
        height, width = (math.ceil(side / 32) * 32 for side in members.max(axis=0).tolist())
        padded += height * width * len(members)
        pixels += int(members.prod(axis=1).sum())
    return 100 * (padded / pixels - 1)
