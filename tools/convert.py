"""Convert a VOC, YOLO or COCO folder to the layout that `--data-path` trains on.

    python -m tools.convert voc VOC2012 mydata
    python -m tools.convert yolo frames mydata --val-share 0.2 --group-by '^(video\\d+)'

OUTPUT gets train2017/, val2017/ and annotations/. Images are links to the originals, unless
`--copy`. Where FOLDER has no split to evaluate on, images are drawn for it at random.
"""

from __future__ import annotations

from data import coco_arrays, coco_rules, locate

if not __package__:  # run as a file, it would not find the modules beside tools/
    raise SystemExit("run it as: python -m tools.convert")

import argparse
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

from data import coco_json, formats
from data.formats import Sample
from utils import UserError, file_errors, run_command


def read_coco(root: Path) -> tuple[dict[str, list[Sample]], list[tuple[int, str]]]:
    """Read COCO JSON files of the usual layouts; return samples by split, and (id, name).

    Raises:
        UserError: if there is no such file, or which has errors in it.
    """
    files = {
        split: next((path for path in _coco_files(root, split) if path.is_file()), None)
        for split in formats.SPLITS
    }
    if files["train"] is None:
        found = sorted(path for path in root.rglob("*.json") if path.is_file())
        if len(found) != 1:
            raise UserError(
                f"{root} has {len(found)} JSON files; give a folder with one, with "
                "annotations/instances_{train,val}2017.json, or with "
                "{train,valid}/_annotations.coco.json"
            )
        files = {"all": found[0]}
    samples: dict[str, list[Sample]] = {}
    categories: list[tuple[int, str]] = []
    for split, path in files.items():
        if path is None:
            continue
        annotations, findings = coco_json.read_annotations(path)
        for warning in findings:
            print(f"{path.name}: {warning}", file=sys.stderr)
        categories = categories or list(annotations.categories)
        extra = {name for _, name in annotations.categories} - {name for _, name in categories}
        if extra:
            raise UserError(f"{path} has classes that train has not: {sorted(extra)[:10]}")
        samples[split] = _coco_samples(annotations, root, split)
    return samples, categories


def _coco_files(root: Path, split: str) -> list[Path]:
    folders = (split, "valid") if split == "val" else (split,)
    return [
        root / "annotations" / f"instances_{split}2017.json",
        root / "annotations" / f"instances_{split}.json",
        *(root / folder / "_annotations.coco.json" for folder in folders),
    ]


def _coco_samples(annotations: coco_arrays.Annotations, root: Path, split: str) -> list[Sample]:
    places = [root / f"{split}2017", annotations.path.parent, root / split, root / "images", root]

    def count_missing(place: Path) -> int:
        _, found = locate.locate_images(annotations, place)
        return sum(f.count for f in found if f.what == "image files missing")

    folder = min((place for place in places if place.is_dir()), key=count_missing)
    if count_missing(folder) == len(annotations):
        raise UserError(
            f"{annotations.path}: {annotations.file_name(0)!r} is in none of "
            f"{', '.join(map(str, places))}; move the images to one of them"
        )
    annotations, found = locate.locate_images(annotations, folder)
    coco_rules.require_no_errors(annotations.path, found)
    samples = []
    for number in range(len(annotations)):
        start, end = annotations.offsets[number : number + 2]
        height, width = annotations.sizes[number].tolist()
        names = [annotations.categories[i][1] for i in annotations.category_index[start:end]]
        boxes = annotations.boxes_xywh[start:end].tolist()
        image = folder / annotations.file_name(number)
        crowd = annotations.iscrowd[start:end].tolist()
        samples.append(Sample(image, (height, width), boxes, names, crowd))
    return samples


def split_samples(
    samples: list[Sample], val_share: float, seed: int, group_by: str | None
) -> dict[str, list[Sample]]:
    """Draw a share of the images, or of whole groups of them, for val.

    Args:
        group_by: a regular expression; images whose paths give the same match (of its first group,
            if it has one) stay together.

    Raises:
        UserError: if an image does not match, or there are fewer than two groups.
    """
    groups: dict[str, list[Sample]] = {}
    unmatched = []
    for sample in samples:
        match = re.search(group_by, sample.image.name) if group_by else None
        if group_by and match is None:
            unmatched.append(sample.image.name)
        key = match[match.re.groups and 1] if match else os.fspath(sample.image)
        groups.setdefault(key or "", []).append(sample)
    if unmatched:
        raise UserError(
            f"--group-by {group_by} does not match {len(unmatched)} of {len(samples)} file names, "
            f"such as {unmatched[0]!r}; correct it"
        )
    if len(groups) < 2:
        raise UserError(
            f"{len(samples)} images in {len(groups)} group{'s' * (len(groups) != 1)} cannot be "
            "split; two are needed, see --group-by"
        )
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    chosen: set[str] = set()
    num_val = 0
    for key in keys[:-1]:  # the last is left to train
        if num_val and num_val >= val_share * len(samples):
            break
        chosen.add(key)
        num_val += len(groups[key])
    return {
        split: [
            s for key in sorted(groups) if (key in chosen) == (split == "val") for s in groups[key]
        ]
        for split in formats.SPLITS
    }


def write(
    samples: dict[str, list[Sample]], categories: list[tuple[int, str]], output: Path, copy: bool
) -> None:
    """Write train2017/, val2017/ and annotations/ below `output`, all of it or nothing.

    Raises:
        UserError: if `output` is there, or cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already; give a new folder")
    unfinished = output.with_name(f".{output.name}.tmp")
    with file_errors("write", output):
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "annotations").mkdir(parents=True)
        for split, rows in samples.items():
            root = Path(os.path.commonpath([os.fspath(sample.image.parent) for sample in rows]))
            for sample in rows:
                place = unfinished / f"{split}2017" / os.path.relpath(sample.image, root)
                place.parent.mkdir(parents=True, exist_ok=True)
                if copy:
                    shutil.copyfile(sample.image, place)
                else:
                    place.symlink_to(sample.image)
            document = formats.as_coco(rows, root, categories)
            path = unfinished / "annotations" / f"instances_{split}2017.json"
            path.write_text(json.dumps(document), encoding="utf-8")
        if output.exists():
            output.rmdir()
        os.replace(unfinished, output)


def build_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("layout", choices=(*formats.LAYOUTS, "coco"), help="of FOLDER")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for YOLO, or its YAML file")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a new folder")
    parser.add_argument(
        "--val-share", type=float, default=0.2, help="of the images, where val is missing"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw for val")
    parser.add_argument(
        "--group-by",
        metavar="REGEX",
        help="images with the same match in their names stay together",
    )
    parser.add_argument("--copy", action="store_true", help="copy images instead of linking them")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Read, split, write; return the exit status."""
    flags = build_parser().parse_args(argv)
    if not 0 < flags.val_share < 1:
        raise UserError(f"--val-share {flags.val_share}: give a share between 0 and 1, such as 0.2")
    try:
        re.compile(flags.group_by or "")
    except re.error as error:
        raise UserError(f"--group-by {flags.group_by} is no regular expression: {error}") from None
    folder = Path(os.path.abspath(flags.folder))
    if flags.layout == "coco":
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; give the one with the JSON file and images")
        samples, categories = read_coco(folder)
    else:
        about = formats.find(flags.layout, folder)
        samples = formats.read(about, folder)
        names = about.names or formats.class_names(samples.values())
        categories = list(enumerate(names, start=1))
        for split, found in about.splits.items():
            for warning in found.found.findings():
                print(f"{split}: {warning}", file=sys.stderr)
    if "val" not in samples:
        (rows,) = samples.values()
        samples = split_samples(rows, flags.val_share, flags.seed, flags.group_by)
    write(samples, categories, Path(os.path.abspath(flags.output)), flags.copy)
    for split, rows in samples.items():
        print(f"{split}: {len(rows)} images, {sum(len(s.boxes) for s in rows)} boxes")
    print(f"train on it: python train.py --data-path {flags.output} --output-dir runs/mydata")
    return 0


if __name__ == "__main__":
    run_command(main)
