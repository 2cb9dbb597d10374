"""Convert a VOC, YOLO or COCO folder to the layout that `--data-path` trains on.

    python -m tools.convert voc VOC2012 mydata
    python -m tools.convert yolo frames mydata --val-share 0.2 --group-by '^(video\\d+)'

OUTPUT gets train2017/, val2017/ and annotations/. Images are links to the originals, unless
`--copy`. Where FOLDER has no split to evaluate on, images are drawn for it at random, or a list
names them:

    python -m tools.convert voc VOC2007 mydata --train-list trainval --val-list lists/test.txt
"""

from __future__ import annotations

if not __package__:  # run as a file, it would not find the modules beside tools/
    raise SystemExit("run it as: python -m tools.convert")

import dataclasses
import json
import os
import random
import re
import shutil
from pathlib import Path

from data import checks, coco_arrays, coco_json, coco_rules, conversion, locate
from data.files import files_below
from data.labelled import SPLITS, Sample
from data.splits import log_warnings
from runtime.flags import ArgumentParser
from utils import UserError, file_errors, logger, run_command


def read_coco(root: Path) -> tuple[dict[str, list[Sample]], list[tuple[int, str]]]:
    """Read COCO JSON files of the usual layouts; return samples by split, and (id, name).

    Raises:
        UserError: if there is no such file, or one with errors in it.
    """
    files: dict[str, Path] = {}
    for split, folders in (("train", ["train"]), ("val", ["val", "valid", "test"])):
        paths = [root / "annotations" / f"instances_{split}{year}.json" for year in ("2017", "")]
        paths += [root / folder / "_annotations.coco.json" for folder in folders]
        paths = [path for path in paths if path.is_file()]
        files |= {split: paths[0]} if paths else {}
    if "train" not in files:
        paths = files_below(root, ".json")
        if len(paths) != 1:
            usual = "annotations/instances_{train,val}2017.json"
            raise UserError(
                f"{root} has {len(paths)} JSON files; give a folder with one, or {usual}"
            )
        files = {"train": paths[0]}
    if files.get("val", root).parent.name == "test":
        logger.warning("%s: warning: no val (test is used)", root.name)
    located = {split: _locate(path, root, split) for split, path in files.items()}
    categories = list(located["train"][0].categories)
    if "val" in located:
        extra = {name for _, name in located["val"][0].categories} - {n for _, n in categories}
        if extra:
            raise UserError(f"{files['val']} has classes that train lacks: {sorted(extra)[:10]}")
    return {split: _samples(*split_files) for split, split_files in located.items()}, categories


def _locate(path: Path, root: Path, split: str) -> tuple[coco_arrays.Annotations, Path]:
    """Read a COCO JSON file; return it with the folder that has the most of its images."""
    annotations, findings = coco_json.read_annotations(path)
    folders = [root / f"{split}2017", path.parent, root / split, root / "images", root]
    folders += [root / "data", root / "images" / "default"]  # of FiftyOne, and of CVAT
    folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    located = {folder: locate.locate_images(annotations, folder) for folder in folders}

    def count_missing(folder: Path) -> int:
        return sum(f.count for f in located[folder][1] if f.what == "image files missing")

    folder = min(located, key=count_missing)
    if count_missing(folder) == len(annotations):
        raise UserError(
            f"{path}: {annotations.file_name(0)!r} is in none of {', '.join(map(str, folders))}; "
            "move the images to one of them"
        )
    annotations, more = located[folder]
    coco_rules.require_no_errors(path, more)
    log_warnings(annotations, findings + more)
    return annotations, folder


def _samples(annotations: coco_arrays.Annotations, folder: Path) -> list[Sample]:
    samples = []
    for i, size in enumerate(annotations.sizes.tolist()):
        rows = slice(*annotations.offsets[i : i + 2])
        names = [annotations.categories[k][1] for k in annotations.category_index[rows]]
        boxes, is_crowd = annotations.boxes_xywh[rows].tolist(), annotations.iscrowd[rows].tolist()
        image = folder / annotations.file_name(i)
        samples.append(Sample(image, tuple(size), boxes, names, is_crowd))
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
        match = re.search(group_by or "", sample.image.name)
        if match is None:
            unmatched.append(sample.image.name)
            continue
        key = match[min(match.re.groups, 1)] if group_by else os.fspath(sample.image)
        groups.setdefault(key or "", []).append(sample)
    if unmatched:
        raise UserError(
            f"--group-by {group_by} does not match {len(unmatched)} of {len(samples)} file names, "
            f"such as {unmatched[0]!r}; correct it"
        )
    if len(groups) < 2:
        count = f"{len(samples)} images in {len(groups)} group{'s' * (len(groups) != 1)}"
        raise UserError(f"{count} cannot be split; two are needed, see --group-by")
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    splits: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    val_keys = set[str]()
    num_val = 0
    for key in keys[:-1]:  # the last is left to train
        if num_val and num_val >= val_share * len(samples):
            break
        val_keys.add(key)
        num_val += len(groups[key])
    for key in sorted(groups):
        splits["val" if key in val_keys else "train"] += groups[key]
    return splits


def write(
    samples: dict[str, list[Sample]],
    categories: list[tuple[int, str]],
    source: Path,
    output: Path,
    copy: bool,
    keep_empty: bool,
) -> None:
    """Write train2017/, val2017/ and annotations/ below `output`, all of it or nothing.

    Args:
        source: the folder of the samples, for messages.

    Raises:
        UserError: if `output` exists, or cannot be written; or if there is no box to train on,
            unless `keep_empty`.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already; give a new folder")
    unfinished = output.with_name(f".{output.name}.tmp")
    try:
        with file_errors("write", output):
            shutil.rmtree(unfinished, ignore_errors=True)
            (unfinished / "annotations").mkdir(parents=True)
            roots = {
                split: Path(os.path.commonpath([os.fspath(sample.image.parent) for sample in rows]))
                for split, rows in samples.items()
            }
            for split, root in roots.items():
                document = conversion.as_coco(samples[split], root, categories)
                path = unfinished / "annotations" / f"instances_{split}2017.json"
                path.write_text(json.dumps(document), encoding="utf-8")
            if not keep_empty:
                path = unfinished / "annotations" / "instances_train2017.json"
                train, _ = coco_json.read_annotations(path)
                checks.require_boxes(dataclasses.replace(train, source=f"{source}: train"))
            for split, root in roots.items():
                for image in {sample.image for sample in samples[split]}:  # COCO's may share a file
                    path = unfinished / f"{split}2017" / os.path.relpath(image, root)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if copy:
                        shutil.copyfile(image, path)
                    else:
                        path.symlink_to(image)
            if output.exists():
                output.rmdir()
            os.replace(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def build_parser() -> ArgumentParser:
    """Declare the flags."""
    parser = ArgumentParser((__doc__ or "").split("\n\n")[0])
    parser.add_argument("layout", choices=(*conversion.LAYOUTS, "coco"), help="of FOLDER")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for YOLO, or its YAML file")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a new folder")
    parser.add_argument("--val-share", type=float, default=0.2, help="of images, if val is missing")
    parser.add_argument("--seed", type=int, default=0, help="of the draw for val")
    together = "images with the same match in their names stay together"
    parser.add_argument("--group-by", metavar="REGEX", help=together)
    for split in SPLITS:
        text = f"list of the images of {split}, for VOC and YOLO; or the name of a VOC list"
        parser.add_argument(f"--{split}-list", type=Path, metavar="FILE", help=text)
    keep_empty = "accept a set without a box to train on, as train.py's --keep-empty does"
    parser.add_argument("--keep-empty", action="store_true", help=keep_empty)
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
    lists = {"train": flags.train_list, "val": flags.val_list}
    lists = {s: path.absolute() if path.exists() else path for s, path in lists.items() if path}
    if lists and (flags.layout == "coco" or "train" not in lists):
        raise UserError("--train-list is needed beside --val-list, and neither is for coco")
    if not folder.is_dir() and not (flags.layout == "yolo" and folder.is_file()):
        raise UserError(f"{folder} is no folder; give the one with the images and their boxes")
    if flags.layout == "coco":
        samples, categories = read_coco(folder)
    else:
        layout = conversion.find(flags.layout, folder, lists)
        samples, names = conversion.read(layout, folder)
        categories = list(enumerate(names, start=1))
        for name, content in layout.splits.items():
            for warning in content.findings.as_list():
                logger.warning("%s: %s: %s", folder.name, name, warning)
    if "val" not in samples:
        samples = split_samples(samples["train"], flags.val_share, flags.seed, flags.group_by)
    shared = set.intersection(*({sample.image for sample in rows} for rows in samples.values()))
    names = sorted(os.path.relpath(image, folder) for image in shared)
    for warning in coco_rules.finding("images that are in train and val", names, repr):
        logger.warning("%s: %s", folder.name, warning)
    output = Path(os.path.abspath(flags.output))
    write(samples, categories, folder, output, flags.copy, flags.keep_empty)
    for split, rows in samples.items():
        print(f"{split}: {len(rows)} images, {sum(len(s.boxes) for s in rows)} boxes")
    print(f"train on it: python train.py --data-path {flags.output} --output-dir runs/mydata")
    return 0


if __name__ == "__main__":
    run_command(main)
