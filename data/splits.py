"""Where the splits of a data set are, and reading their annotations with every finding logged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import utils
from data import cache as data_cache
from data import coco_json, conversion, locate, shapes
from utils import UserError, logger


def data_paths(
    dataset: str, folder: Path | None, overrides: dict[str, Path | None]
) -> dict[str, Path]:
    """Return where "train_images", "train_annotations", "val_images" and "val_annotations" are."""
    if dataset == "shapes":
        with utils.file_errors("find", "a folder for the drawn images"):
            place = folder or data_cache.folder()
        with utils.file_errors("draw images in", place):
            folder = shapes.make_shapes(place)
    folder = folder or Path()
    paths = {f"{split}_images": folder / f"{split}2017" for split in ("train", "val")}
    for split in ("train", "val"):
        paths[f"{split}_annotations"] = folder / "annotations" / f"instances_{split}2017.json"
    if dataset in conversion.LAYOUTS:
        paths = conversion.coco_paths(dataset, folder)
    return paths | {name: path for name, path in overrides.items() if path is not None}


def read_splits(
    paths: dict[str, Path], splits: Sequence[str], allow_unannotated: bool = False
) -> list[coco_json.Annotations]:
    """Read the annotations of `splits`, find the images, and log all warnings.

    Args:
        allow_unannotated: take a file without annotations, which is enough to detect.

    Raises:
        UserError: lists what is missing or wrong, in all splits.
    """
    read: list[coco_json.Annotations] = []
    problems = []
    for split in splits:
        images, annotations = paths[f"{split}_images"], paths[f"{split}_annotations"]
        if not images.is_dir():
            problems.append(f"the image folder {images} does not exist; check --data-path")
            continue
        try:
            packed, findings = data_cache.examine(annotations)
            findings = conversion.kept_findings(annotations) + findings
            if packed is not None:
                packed, more = locate.locate_images(packed, images)
                findings = findings + more
            if packed is not None and allow_unannotated and not packed.is_annotated:
                findings = [f for f in findings if f.what not in coco_json.UNANNOTATED]
            coco_json.require_no_errors(annotations, findings)
        except UserError as error:
            problems.append(str(error))
            continue
        assert packed is not None
        read.append(packed)
        for warning in findings:
            logger.warning("%s: %s", annotations.name, warning)
    if problems:
        raise UserError("\n".join(problems))
    if len(read) == 2:
        val, train = ((read[splits.index(s)], paths[f"{s}_images"]) for s in ("val", "train"))
        for warning in locate.overlap_findings(train, val):
            logger.warning("%s: %s", val[0].path.name, warning)
    return read
