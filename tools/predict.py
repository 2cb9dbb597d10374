"""Detect objects in one's own images: pictures with boxes, a COCO results file, a table.

    python -m tools.predict --checkpoint runs/coco/best.pth photos/ 'more/*.jpg'
    python -m tools.predict --weights RetinaNet_ResNet50_FPN_Weights.COCO_V1 street.jpg

Exits with 1 if an image could not be read or its picture not written; the others are done.
"""

from __future__ import annotations

from data import image_files
from data.worker_processes import ignore_stop_signals, start_worker_server

if not __package__:  # run as a file, it would not find the modules beside tools/
    raise SystemExit("run it as: python -m tools.predict")

import argparse
import csv
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.io import encode_jpeg
from tqdm import tqdm

import engine
import utils
from models.build import load_detector, mixed_precision
from runtime.flags import between, non_negative, positive
from tools.plots import drawing
from utils import UserError, run_command

SUFFIXES = image_files.SUFFIXES


class ImageFiles(Dataset):
    """Images by path for a detector whose `transform` resizes them, or what is wrong with one."""

    def __init__(self, paths: Sequence[Path], transform: Any) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        """Return the number, and uint8 `[3, H, W]` or why it cannot be read."""
        path = self.paths[number]
        try:
            image = image_files.read_image(path, path.parent, shown_size(path))
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


def shown_size(path: Path) -> tuple[int, int]:
    """Return the size (H, W) of an image as EXIF turns it; (0, 0) if its header is unreadable."""
    if not path.is_file():  # opening a pipe would wait until somebody writes to it
        return 0, 0
    try:
        return image_files.read_header(path).shown
    except image_files.ImageError:  # reading it will say what is wrong
        return 0, 0


def find_images(given: Sequence[str]) -> list[Path]:
    """Return the images that files, folders (with all below) and glob patterns name, once each.

    Raises:
        UserError: names what leads to no image.
    """
    found: dict[Path, None] = {}
    for text in given:
        path = Path(text)
        if path.is_dir():
            below = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            paths = sorted(p for p in below if not p.is_dir())
        elif path.is_file():
            paths = [path]
        else:
            paths = matching_files(text)
        if not paths:
            raise UserError(f"{text}: no image there; give files, folders or quoted patterns")
        found |= dict.fromkeys(paths)
    return list(found)


def matching_files(pattern: str) -> list[Path]:
    """Return the files that a glob pattern names; ** follows no link to a folder, as in a circle.

    `glob.glob` follows them: two links that lead to each other's folders keep it busy for ever.
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
    model: nn.Module, loader: DataLoader, device: torch.device
) -> Iterator[tuple[int, Tensor | None, dict[str, Tensor] | str]]:
    """Yield (number, image, detections on the CPU), or (number, None, what is wrong with it)."""
    model.eval()
    for batch in loader:
        images = [(number, image) for number, image in batch if isinstance(image, Tensor)]
        for number, problem in batch:
            if isinstance(problem, str):
                yield number, None, problem
        if images:
            moved, _ = engine.to_device([image for _, image in images], [], device)
            for (number, image), found in zip(images, model(moved), strict=True):
                yield number, image, {name: value.cpu() for name, value in found.items()}


def as_results(
    number: int, path: Path, found: Mapping[str, Tensor], category_of: Mapping[int, Mapping]
) -> list[dict[str, Any]]:
    """Return detections as COCO results, with the file and the class by name."""
    return [
        {
            "image_id": number,
            "file_name": path.as_posix(),
            "category_id": category_of[label]["id"],
            "category": category_of[label]["name"],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for (x1, y1, x2, y2), label, score in zip(
            found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True
        )
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
    colours = drawing.class_colours(label_map)
    return drawing.draw_boxes(image, boxes.numpy(), labels, texts, colours, side)


def picture_paths(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Return where the picture of each image goes, with the subfolders in which images differ."""
    absolute = [Path(os.path.abspath(path)) for path in paths]  # a link by its own name
    common = os.path.commonpath([path.parent for path in absolute])
    places = [folder / "pictures" / path.relative_to(common) for path in absolute]
    stems = Counter(place.with_suffix("") for place in places)
    pictures: dict[Path, None] = {}
    for place in places:
        # No two images become one picture: neither a.png and a.jpg, nor with them a.jpg.webp.
        shared = stems[place.with_suffix("")] > 1
        stem = place.with_name(place.name if shared else place.stem)
        picture, number = stem.with_name(f"{stem.name}.jpg"), 1
        while picture in pictures:
            number += 1
            picture = stem.with_name(f"{stem.name}_{number}.jpg")
        pictures[picture] = None
    return list(pictures)


def build_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("images", nargs="+", help="files, folders, or quoted patterns")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="of a run of train.py, such as runs/coco/best.pth")
    source.add_argument("--weights", help="of torchvision, by name")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("predictions"), help="for all files"
    )
    parser.add_argument(
        "--score-thresh",
        type=between(float, 0, 1),
        default=0.5,
        help="detections below are left out",
    )
    parser.add_argument("--batch-size", type=positive(int), default=1, help="images at a time")
    parser.add_argument(
        "-j",
        "--workers",
        type=non_negative(int, at_most=1024),
        default=2,
        help="processes that read images",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="cuda where there is one, else cpu"
    )
    parser.add_argument(
        "--amp", nargs="?", const="bf16", choices=("fp16", "bf16"), help="alone: bf16"
    )
    parser.add_argument("--csv", action="store_true", help="write detections.csv, too")
    parser.add_argument(
        "--side",
        type=positive(int, at_most=20_000),
        default=1024,
        help="longer side of the pictures, pixels",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Detect, draw, write; return the exit status."""
    flags = build_parser().parse_args(argv)
    paths = find_images(flags.images)
    if flags.workers:
        start_worker_server("tools.predict")
    device = torch.device(flags.device or utils.default_device())
    model, label_map = load_detector(flags.checkpoint or flags.weights, device)
    category_of = {category["label"]: category for category in label_map}
    loader = DataLoader(
        ImageFiles(paths, model.transform),
        flags.batch_size,
        num_workers=flags.workers,
        collate_fn=list,
        worker_init_fn=ignore_stop_signals,  # a worker also ends when this process is killed
        multiprocessing_context="forkserver" if flags.workers else None,
    )
    places = picture_paths(paths, flags.output_dir)
    results: list[dict[str, Any]] = []
    problems, done, start = [], 0, time.perf_counter()
    bar = tqdm(total=len(paths), unit="image", disable=not sys.stderr.isatty())
    with utils.file_errors("create", flags.output_dir):
        flags.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with mixed_precision(model, utils.AMP_DTYPES.get(flags.amp)), bar:
            for number, image, found in detect(model, loader, device):
                bar.update()
                if image is None or isinstance(found, str):
                    problems.append(f"{paths[number]}: {found}")
                    continue
                kept = found["scores"] >= flags.score_thresh
                found = {name: value[kept] for name, value in found.items()}
                own = as_results(number + 1, paths[number], found, category_of)
                results += own
                done += 1
                try:
                    write_picture(draw(image, own, label_map, flags.side), places[number])
                except UserError as error:
                    problems.append(str(error))
    finally:  # whatever ends the loop: what was found until then is not lost
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


def write_picture(picture: Tensor, path: Path) -> None:
    """Write uint8 `[3, H, W]` as JPEG.

    Raises:
        UserError: if the file cannot be written.
    """
    with utils.file_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_jpeg(picture, quality=90).numpy().tobytes())


def write_csv(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write results as a table; x, y, width and height are pixels."""
    # Names of files may hold any bytes.
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "category", "score", "x", "y", "width", "height"])
        writer.writerows([r["file_name"], r["category"], r["score"], *r["bbox"]] for r in results)


if __name__ == "__main__":
    run_command(main)
