"""Check a data set by every rule, opening every image, and describe it.

    python -m tools.check_data --data-path /coco --plot data.png
    python -m tools.check_data --dataset voc --data-path VOC2012

Exits with 1 if there are errors. The rules are in docs/data.md.
"""

from __future__ import annotations

if not __package__:  # run as a file, it would not find the modules beside tools/
    raise SystemExit("run it as: python -m tools.check_data")

import json
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import coco_utils
import utils
from data import checks, coco_rules, image_files, locate, splits
from data.coco_arrays import Annotations
from data.coco_rules import Finding, Findings
from data.splits import data_paths, require_folders
from data.worker_processes import end_with_parent, start_worker_server
from group_by_aspect_ratio import repeat_factors
from runtime.flags import ArgumentParser, non_negative, positive
from runtime.options import LAYOUTS, PATHS
from runtime.summary import describe_repeats
from utils import UserError, run_command

AREAS = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}  # COCO's, px²
THRESHOLDS = (0.001, 0.01, 0.1, 0.3)  # for --repeat-threshold; the first is LVIS's
MOST_CLASSES = 25  # rows of the class table on the terminal
OF_SWAPPED_SIZES = (
    "image files of another size than annotated",
    "boxes partly outside of their image",
    "boxes without width or height in their image",
)
CHUNK = 32  # images that a process opens at a time
IN_FLIGHT = 1024  # images opened one by one after a crash
CRASHED = "image files that crash their decoder"
MOST_CRASHES = 10  # then it is the machine, not the images
# Bytes before any other marker than 0xd0 … 0xd7 cost no pixels; before those, some were lost.
_STRAY = re.compile(r"extraneous bytes before marker 0x(?!d[0-7])")


@dataclass
class Split:
    """One split and its findings; `annotations` is None if the file has not COCO's structure."""

    name: str
    images: Path
    path: Path
    annotations: Annotations | None
    findings: list[Finding]


def check_split(
    name: str, images: Path, annotations: Path, workers: int, min_size: int, max_size: int
) -> Split:
    """Apply every rule to one split: to its annotation file, then to each image.

    Raises:
        UserError: if there is no such file.
    """
    packed, findings = splits.examine(annotations)
    if packed is not None:
        is_broken = any(finding.severity == "error" for finding in findings)
        packed, missing = locate.locate_images(packed, images)
        opened = check_images(packed, images, workers, f"{name} images")
        seen = {finding.what for finding in opened}
        findings = [f for f in findings + missing if f.what not in seen] + opened
        if any(finding.what == "width and height that are swapped" for finding in findings):
            findings = [f for f in findings if f.what not in OF_SWAPPED_SIZES]
        shorter, longer = np.maximum(packed.sizes.min(axis=1), 1), packed.sizes.max(axis=1)
        scale = np.minimum(min_size / shorter, max_size / np.maximum(longer, 1))
        findings += checks.check_sizes(packed, packed.sizes * scale[:, None])
        if not is_broken:  # otherwise boxes may be missing that are meant
            findings += checks.boxes_findings(packed, for_training=name == "train")
    return Split(name, images, annotations, packed, findings)


def check_images(
    annotations: Annotations, root: Path, workers: int, title: str = "images"
) -> list[Finding]:
    """Open every image in `workers` processes; on a terminal with a progress bar.

    Raises:
        UserError: if too many images end the process that reads them.
    """
    findings = Findings()
    opened = _open_images(annotations, root, max(1, workers))
    bar = tqdm(opened, title, len(annotations), unit="", disable=not sys.stderr.isatty())
    for number, problems in enumerate(bar):
        for rule, detail in problems:
            findings.add(rule, f"{annotations.describe(number)} {detail}".rstrip())
    return findings.as_list()


def _open_images(
    annotations: Annotations, root: Path, workers: int
) -> Iterator[list[tuple[str, str]]]:
    """Yield the rules that each image breaks, in order.

    If a process dies, the next images are opened one by one, which shows the image that ends it.
    """
    number = crashes = 0
    one_by_one = False
    while number < len(annotations):
        end = min(number + IN_FLIGHT, len(annotations)) if one_by_one else len(annotations)
        names = map(annotations.file_name, range(number, end))
        sizes = annotations.sizes[number:end].tolist()
        try:
            with ProcessPoolExecutor(
                max_workers=1 if one_by_one else workers,
                mp_context=multiprocessing.get_context("forkserver"),
                initializer=_start_worker,
                initargs=(root,),
            ) as pool:
                chunk = 1 if one_by_one else CHUNK
                for problems in pool.map(_check_image, names, sizes, chunksize=chunk):
                    number += 1
                    yield problems
            one_by_one = False
        except BrokenProcessPool:
            if one_by_one:
                number, crashes = number + 1, crashes + 1
                yield [(CRASHED, "ends the process that reads it")]
            if crashes == MOST_CRASHES:
                raise UserError(
                    f"{crashes} images ended the process that read them, the last is "
                    f"{root / annotations.file_name(number - 1)}; see whether memory runs out"
                ) from None
            one_by_one = True


_root: Path
_complaints: IO[bytes]


def _start_worker(root: Path) -> None:
    """Prepare a process; libjpeg's messages go to a file, because it prints them only."""
    global _root, _complaints
    end_with_parent()
    _root = root
    _complaints = tempfile.TemporaryFile(buffering=0)
    os.dup2(_complaints.fileno(), 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def _check_image(file_name: str, size: list[int]) -> list[tuple[str, str]]:
    """Return the rules that an image breaks, and how."""
    path = _root / file_name
    try:
        height, width = size
        image_files.read_image(path, _root, (height, width))
    except image_files.ImageError as error:
        _take_complaints()
        return [(error.rule, str(error))]
    problems = []
    for line in _take_complaints():  # "Corrupt JPEG data: premature end of data segment"
        rule = (
            "image files with stray bytes"
            if _STRAY.search(line)
            else "image files that are damaged"
        )
        problems.append((rule, line))
    header = image_files.read_header(path)
    if header.is_slow:
        problems.append(("image files in a slow format", ""))
    if header.is_animated:
        problems.append(("image files that are animated", ""))
    if header.is_ambiguous:
        rule = "image files turned by EXIF, which their size cannot confirm"
        problems.append((rule, f"orientation {header.orientation}"))
    with Image.open(path, formats=image_files.IMAGE_FORMATS) as image:
        if image.has_transparency_data:
            problems.append(("image files with an alpha channel", ""))
    return problems


def _take_complaints() -> list[str]:
    if _complaints.tell() == 0:  # the position is shared with standard error
        return []
    _complaints.seek(0)
    text = _complaints.read().decode(errors="replace")
    _complaints.seek(0)
    _complaints.truncate()
    return sorted({line.strip() for line in text.splitlines() if line.strip()})


def describe(annotations: Annotations) -> dict[str, Any]:
    """Return what a split holds, as plain numbers."""
    height, width = annotations.sizes.T.astype(np.float64)
    per_image = np.diff(annotations.offsets)
    area = annotations.area
    names = [name for _, name in annotations.categories]
    per_class = np.bincount(annotations.category_index, minlength=len(names))
    return {
        "images": len(annotations),
        "images_without_boxes": int((per_image == 0).sum()),
        "boxes": len(annotations.ids),
        "crowds": int(annotations.iscrowd.sum()),
        "classes": len(names),
        **{
            f"{name}_boxes": int(((area >= least) & (area < most)).sum())
            for name, (least, most) in AREAS.items()
        },
        "width": _spread(width),
        "height": _spread(height),
        "aspect_ratio": _spread(width / np.maximum(height, 1)),
        "boxes_per_image": _spread(per_image),
        "boxes_per_class": dict(zip(names, per_class.tolist(), strict=True)),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    if len(values) == 0:
        return {}
    low, middle, high = np.quantile(values, [0, 0.5, 1]).tolist()
    return {"min": low, "median": middle, "mean": float(values.mean()), "max": high}


def summary_lines(checked: Sequence[Split], data: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the terminal's tables: what the splits hold, their classes, and the findings."""
    if data:
        yield _row("", list(data))
        for label, key, whole in (
            ("images", "images", None),
            ("  without boxes", "images_without_boxes", "images"),
            ("boxes", "boxes", None),
            ("  crowds", "crowds", "boxes"),
            ("  small  (area below 32²)", "small_boxes", "boxes"),
            ("  medium (below 96²)", "medium_boxes", "boxes"),
            ("  large", "large_boxes", "boxes"),
        ):
            yield _row(label, [_count(d[key], d[whole] if whole else 0) for d in data.values()])
        for label, key in (
            ("width", "width"),
            ("height", "height"),
            ("width / height", "aspect_ratio"),
            ("boxes per image", "boxes_per_image"),
        ):
            yield _row(f"{label}: least, median, most", [_three(d[key]) for d in data.values()])
        yield ""
        yield from _class_lines(data)
        for split in checked:
            if split.name == "train" and split.annotations is not None:
                yield from repeat_lines(split.annotations)
        yield ""
    yield from _finding_lines(checked)


def _three(spread: Mapping[str, float]) -> str:
    return "  ".join(f"{spread[key]:.4g}" for key in ("min", "median", "max") if spread)


def _row(label: str, cells: Sequence[str]) -> str:
    return f"{label[:38]:<38}" + "".join(f"{cell:>22}" for cell in cells)


def _count(value: int, whole: int) -> str:
    return f"{value:,}" + (f" ({value / whole:5.1%})" if whole else "")


def _class_lines(data: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    counts = [d["boxes_per_class"] for d in data.values()]
    names = sorted({n for c in counts for n in c}, key=lambda n: (-counts[0].get(n, 0), n))
    yield _row(f"boxes of {len(names)} classes", list(data))
    half = MOST_CLASSES // 2
    shown = names if len(names) <= MOST_CLASSES else [*names[: half + 1], "…", *names[-half:]]
    for name in shown:
        if name == "…" and name not in names:
            yield f"  … {len(names) - 2 * half - 1} more (--json has all)"
            continue
        cells = [
            _count(c.get(name, 0), d["boxes"]) for c, d in zip(counts, data.values(), strict=True)
        ]
        yield _row(f"  {utils.printable(name)}", cells)


def repeat_lines(train: Annotations) -> Iterator[str]:
    """Yield what --repeat-threshold would do in training, one line for each value that matters."""
    images = train.images_with_objects()
    pairs, names = train.classes_in_images(images), [name for _, name in train.categories]
    for threshold in THRESHOLDS:
        factors = repeat_factors(pairs, len(images), threshold)
        if factors.sum() > len(images):
            text = describe_repeats(factors, pairs, names)
            yield f"--repeat-threshold {threshold:g}: {utils.printable(text)}"


def _finding_lines(checked: Sequence[Split]) -> Iterator[str]:
    findings = [(split.name, finding) for split in checked for finding in split.findings]
    if not findings:
        yield "findings: none"
        return
    yield "findings"
    for name, finding in sorted(findings, key=lambda pair: pair[1].severity):
        yield f"  {finding.severity.upper():<8}{finding.count:>8,}  {name}: {finding.what}"
        for case in finding.cases:
            yield f"{'':20}{coco_rules.one_line(case, coco_rules.LINE - 20)}"
        if finding.count > len(finding.cases):
            yield f"{'':20}and {finding.count - len(finding.cases):,} more"
        yield f"{'':20}→ {finding.fix}"


def build_parser() -> ArgumentParser:
    """Declare the flags; those that name the data are `train.py`'s."""
    parser = ArgumentParser((__doc__ or "").split("\n\n")[0])
    add, pixels = parser.add_argument, positive(int, at_most=20_000)
    add("--dataset", choices=LAYOUTS, default="coco", help="layout of the folder")
    add("--data-path", type=Path, help="COCO, VOC or YOLO folder")
    for name in PATHS:
        add("--" + name.replace("_", "-"), type=Path, help="instead of the one in DATA_PATH")
    both = ["train", "val"]
    add("--splits", nargs="+", choices=both, default=both, help="what to check")
    workers = non_negative(int, at_most=1024)
    cores = utils.usable_cores()
    add("-j", "--workers", type=workers, default=cores, help="processes that open images")
    add("--json", action="store_true", help="print one JSON object, no tables")
    add("--plot", type=Path, metavar="PNG", help="draw a page of plots")
    add("--min-size", type=pixels, default=800, help="shorter side in training, pixels")
    add("--max-size", type=pixels, default=1333, help="longer side at most, pixels")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Check, print, draw; return the exit status."""
    flags = build_parser().parse_args(argv)
    start_worker_server("data.image_files")
    overrides = {name: getattr(flags, name) for name in PATHS}
    if flags.dataset != "shapes" and flags.data_path is None and not any(overrides.values()):
        raise UserError("--data-path is missing: a folder in COCO layout, or see --dataset")
    paths = data_paths(flags.dataset, flags.data_path, overrides)
    require_folders(paths, flags.splits)
    checked = [
        check_split(
            split,
            paths[f"{split}_images"],
            paths[f"{split}_annotations"],
            flags.workers,
            flags.min_size,
            flags.max_size,
        )
        for split in flags.splits
    ]
    whole = [(split, split.annotations) for split in checked if split.annotations is not None]
    if len(whole) == 2:
        (first, train_set), (second, val_set) = sorted(whole, key=lambda pair: pair[0].name)
        label_map = coco_utils.label_categories(train_set.categories)
        second.findings += coco_utils.class_findings(label_map, val_set)
        second.findings += checks.overlap_findings(
            (train_set, first.images), (val_set, second.images), with_copies=True
        )
    data = {split.name: describe(annotations) for split, annotations in whole}
    num_errors = sum(f.severity == "error" for split in checked for f in split.findings)
    if flags.json:
        contents = {
            split.name: {
                "annotations": str(split.path),
                "images": str(split.images),
                "findings": [asdict(finding) for finding in split.findings],
                "data": data.get(split.name),
            }
            for split in checked
        }
        print(json.dumps({"errors": num_errors, "splits": contents}, indent=2))
    else:
        print("\n".join(summary_lines(checked, data)))
    if flags.plot and whole:
        from tools.plots import data_plots

        data_plots.draw_page(whole, flags.min_size, flags.max_size, flags.plot)
        print(f"drawn: {flags.plot}", file=sys.stderr)
    return 1 if num_errors else 0


if __name__ == "__main__":
    run_command(main)
