"""Detect objects in your own images: pictures with boxes, a COCO results file, a table.

    python -m tools.predict --checkpoint runs/coco/best.pth photos/ 'more/*.jpg'
    python -m tools.predict --weights RetinaNet_ResNet50_FPN_Weights.COCO_V1 street.jpg

Exits with 1 if an image could not be read or its picture not written; the others are done.
"""

from __future__ import annotations

if not __package__:  # run as a file, it would not find the modules beside tools/
    raise SystemExit("run it as: python -m tools.predict")

import csv
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import engine
import utils
from data import image_files
from data.worker_processes import ignore_stop_signals, start_worker_server
from models.build import load_detector
from models.precision import autocast
from runtime.flags import ArgumentParser, between, non_negative, positive
from tools.plots import drawing
from utils import UserError, run_command

# A number of an image, and uint8 `[3, H, W]`, or why the image cannot be used.
Loaded = tuple[int, Tensor | str]
PREFETCH = 2  # batches that each worker reads ahead


class ImageFiles(Dataset[Loaded]):
    """Images by path for a detector whose `transform` resizes them, or what is wrong with one."""

    def __init__(self, paths: Sequence[Path], transform: Any) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Loaded:
        """Return the number, and uint8 `[3, H, W]` or why it cannot be read."""
        path = self.paths[number]
        try:
            image = image_files.read_image(path, path.parent)
        except image_files.ImageError as error:
            return number, str(error)
        if vanishes(image, self.transform):
            height, width = image.shape[1:]
            return number, f"is {width} x {height}: resized, a side has less than one pixel"
        return number, image


def vanishes(image: Tensor, transform: Any) -> bool:
    """Return whether a detector's `transform` would resize `image` `[3, H, W]` to nothing."""
    shorter, longer = sorted(image.shape[1:])
    scale = min(transform.min_size[-1] / shorter, transform.max_size / longer)
    return transform.fixed_size is None and int(shorter * scale) == 0


def load_batches(images: ImageFiles, batch_size: int, workers: int) -> Iterator[list[Loaded]]:
    """Yield batches of images in order, read by worker processes.

    Damaged files can crash a decoder, and with it the worker. The images that were being read are
    then read again one by one, so that only the file that crashes is lost.
    """
    done, one_by_one = 0, 0
    while done < len(images):
        end = done + one_by_one if one_by_one else len(images)
        loader: DataLoader[Any] = DataLoader(
            Subset(images, range(done, min(end, len(images)))),
            1 if one_by_one else batch_size,
            num_workers=min(workers, 1) if one_by_one else workers,
            prefetch_factor=(1 if one_by_one else PREFETCH) if workers else None,
            collate_fn=list,
            worker_init_fn=ignore_stop_signals,  # a worker also ends when this process is killed
            multiprocessing_context="forkserver" if workers else None,
        )
        try:
            for batch in loader:
                done += len(batch)
                yield batch
            one_by_one = 0
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            if one_by_one:
                yield [(done, "ended the process that decoded it: damaged, or too large")]
                done, one_by_one = done + 1, end - done - 1
            else:
                one_by_one = workers * PREFETCH * batch_size


def find_images(names: Sequence[str]) -> list[Path]:
    """Return the images that files, folders (with all below) and glob patterns name, once each.

    Raises:
        UserError: names what leads to no image.
    """
    images: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            below = (p for p in path.rglob("*") if p.suffix.lower() in image_files.SUFFIXES)
            paths = sorted(p for p in below if not p.is_dir())
        elif path.is_file():
            paths = [path]
        else:
            paths = matching_files(name)
        if not paths:
            raise UserError(f"{name}: no image there; give files, folders or quoted patterns")
        images |= dict.fromkeys(paths)
    return list(images)


def matching_files(pattern: str) -> list[Path]:
    """Return the files that a glob pattern names; ** follows no link to a folder.

    `glob.glob` follows them, and never ends where two links lead to each other's folders.
    """
    path = Path(pattern)
    if path.name == "**":
        path /= "*"
    try:
        return sorted(
            p for p in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if p.is_file()
        )
    except ValueError:  # "a**"
        return []


@torch.inference_mode()
def detect(
    model: nn.Module, batches: Iterable[list[Loaded]], device: torch.device
) -> Iterator[tuple[int, Tensor | None, dict[str, Tensor] | str]]:
    """Yield (number, image, detections on the CPU), or (number, None, what is wrong with it)."""
    model.eval()
    for batch in batches:
        images = [(number, image) for number, image in batch if isinstance(image, Tensor)]
        for number, problem in batch:
            if isinstance(problem, str):
                yield number, None, problem
        if images:
            moved, _ = engine.to_device([image for _, image in images], [], device)
            for (number, image), detections in zip(images, model(moved), strict=True):
                yield number, image, {name: value.cpu() for name, value in detections.items()}


def as_results(
    number: int, path: Path, detections: Mapping[str, Tensor], category_of: Mapping[int, Mapping]
) -> list[dict[str, Any]]:
    """Return detections as COCO results, with the file and the class by name."""
    columns = (detections[name].tolist() for name in ("boxes", "labels", "scores"))
    return [
        {
            "image_id": number,
            "file_name": path.as_posix(),
            "category_id": category_of[label]["id"],
            "category": category_of[label]["name"],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for (x1, y1, x2, y2), label, score in zip(*columns, strict=True)
        if label in category_of  # COCO's 91 labels have gaps, which a model may predict
    ]


def draw(
    image: Tensor, results: Sequence[Mapping], label_map: Sequence[Mapping], side: int
) -> Tensor:
    """Draw results of one image with class names and scores; uint8 `[3, h, w]`."""
    label_of = {category["id"]: category["label"] for category in label_map}
    boxes = torch.tensor([r["bbox"] for r in results], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = [label_of[r["category_id"]] for r in results]
    texts = [f"{r['category']} {r['score']:.2f}" for r in results]
    tile = drawing.Tile(image, boxes.numpy(), labels, texts)
    return drawing.draw_boxes(tile, drawing.class_colours(label_map), side)


def picture_paths(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Return where the picture of each image goes, with the subfolders in which images differ."""
    absolute = [Path(os.path.abspath(path)) for path in paths]  # a link by its own name
    common = os.path.commonpath([path.parent for path in absolute])
    targets = [folder / "pictures" / path.relative_to(common) for path in absolute]
    stems = Counter(target.with_suffix("") for target in targets)
    pictures: dict[Path, None] = {}
    for target in targets:
        # No two images become one picture: neither a.png and a.jpg, nor with them a.jpg.webp.
        shared = stems[target.with_suffix("")] > 1
        stem = target.with_name(target.name if shared else target.stem)
        picture, number = stem.with_name(f"{stem.name}.jpg"), 1
        while picture in pictures:
            number += 1
            picture = stem.with_name(f"{stem.name}_{number}.jpg")
        pictures[picture] = None
    return list(pictures)


def add_model_flags(parser: ArgumentParser) -> None:
    """Declare --checkpoint and --weights, of which one must be given."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="of a run of train.py, such as runs/coco/best.pth")
    source.add_argument("--weights", help="of torchvision, by name")


def build_parser() -> ArgumentParser:
    """Declare the flags."""
    parser = ArgumentParser((__doc__ or "").split("\n\n")[0])
    add_model_flags(parser)
    add = parser.add_argument
    add("images", nargs="+", help="files, folders, or quoted patterns")
    add("--output-dir", type=Path, default=Path("predictions"), help="folder for all files")
    add("--score-thresh", type=between(float, 0, 1), default=0.5, help="least score of a detection")
    add("--batch-size", type=positive(int, at_most=10_000), default=1, help="images at a time")
    workers = non_negative(int, at_most=1024)
    add("-j", "--workers", type=workers, default=2, help="processes that read images")
    add("--device", choices=("cuda", "cpu"), help="CUDA where PyTorch finds it, else the CPU")
    amp = "mixed precision; bf16 if no type is given"
    add("--amp", nargs="?", const="bf16", choices=sorted(utils.AMP_DTYPES), help=amp)
    add("--csv", action="store_true", help="write detections.csv, too")
    side = positive(int, at_most=20_000)
    add("--side", type=side, default=1024, help="longer side of the pictures, pixels")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Detect, draw, write; return the exit status."""
    flags = build_parser().parse_args(argv)
    paths = find_images(flags.images)
    if flags.workers:
        start_worker_server("data.image_files")
    device = torch.device(flags.device or utils.default_device())
    model, label_map = load_detector(flags.checkpoint or flags.weights, device)
    category_of = {category["label"]: category for category in label_map}
    batches = load_batches(ImageFiles(paths, model.transform), flags.batch_size, flags.workers)
    pictures = picture_paths(paths, flags.output_dir)
    results: list[dict[str, Any]] = []
    problems, done, start = [], 0, time.perf_counter()
    bar = tqdm(total=len(paths), unit="image", disable=not sys.stderr.isatty())
    with utils.file_errors("create", flags.output_dir):
        flags.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with autocast(device, utils.AMP_DTYPES.get(flags.amp)), bar:
            for number, image, detections in detect(model, batches, device):
                bar.update()
                if image is None or isinstance(detections, str):
                    problems.append(f"{paths[number]}: {detections}")
                    continue
                kept = detections["scores"] >= flags.score_thresh
                detections = {name: value[kept] for name, value in detections.items()}
                of_image = as_results(number + 1, paths[number], detections, category_of)
                results += of_image
                done += 1
                try:
                    picture = draw(image, of_image, label_map, flags.side)
                    drawing.write_picture(picture, pictures[number])
                except UserError as error:
                    problems.append(str(error))
    finally:  # whatever ends the loop: the results until then are not lost
        utils.replace_file(flags.output_dir / "detections.json", json.dumps(results))
        if flags.csv:
            write_csv(results, flags.output_dir / "detections.csv")
    seconds = time.perf_counter() - start
    print(
        f"{len(results)} objects in {done} images, {done / seconds:.3g} images a second with "
        f"reading and drawing: {flags.output_dir}"
    )
    for problem in problems:
        print(f"error: {utils.printable(problem)}", file=sys.stderr)
    return 1 if problems else 0


def write_csv(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write results as a table; x, y, width and height are pixels."""
    # Names of files may hold any bytes.
    with (
        utils.file_errors("write", path),
        path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["file_name", "category", "score", "x", "y", "width", "height"])
        writer.writerows([r["file_name"], r["category"], r["score"], *r["bbox"]] for r in results)


if __name__ == "__main__":
    run_command(main)
