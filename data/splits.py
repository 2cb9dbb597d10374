"""Where the splits of a data set are, and reading their annotations with every finding logged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import utils
from data import cache as data_cache
from data import conversion, locate, shapes
from data.checks import overlap_findings
from data.coco_arrays import Annotations
from data.coco_rules import UNANNOTATED, Finding, require_no_errors
from utils import UserError, logger


def data_paths(
    dataset: str, folder: Path | None, overrides: dict[str, Path | None]
) -> dict[str, Path]:
    """Return where "train_images", "train_annotations", "val_images" and "val_annotations" are."""
    if dataset == "shapes":
        with utils.file_errors("find", "a folder for the drawn images"):
            drawn = folder or data_cache.folder()
        with utils.file_errors("draw images in", drawn):
            folder = shapes.make_shapes(drawn)
    folder = folder or Path()
    if dataset in conversion.LAYOUTS:
        paths = conversion.coco_paths(dataset, folder)
    else:
        paths = {f"{split}_images": folder / f"{split}2017" for split in ("train", "val")}
        for split in ("train", "val"):
            paths[f"{split}_annotations"] = folder / "annotations" / f"instances_{split}2017.json"
    return paths | {name: path for name, path in overrides.items() if path is not None}


def require_folders(paths: dict[str, Path], splits: Sequence[str]) -> None:
    """Raise UserError, in one line, unless the image folders of `splits` exist."""
    missing = [str(p) for p in (paths[f"{s}_images"] for s in sorted(splits)) if not p.is_dir()]
    if missing:
        folders = f"image folder{'s' * (len(missing) > 1)} {' and '.join(missing)}"
        raise UserError(f"cannot find the {folders}; check --data-path")


def examine(path: Path) -> tuple[Annotations | None, list[Finding]]:
    """Do what `cache.examine` does; for a converted folder in its user's own names."""
    annotations, findings = data_cache.examine(path)
    source, converted = conversion.read_origin(path)
    if annotations is not None:
        annotations = dataclasses.replace(annotations, source=source)
    return annotations, converted + findings


def log_warnings(annotations: Annotations, findings: Sequence[Finding]) -> None:
    """Log `findings`, each after the name of the file."""
    for warning in findings:
        logger.warning("%s: %s", Path(annotations.title).name, warning)


def read_splits(
    paths: dict[str, Path], splits: Sequence[str], allow_unannotated: bool = False
) -> list[Annotations]:
    """Read the annotations of `splits`, find the images, and log all warnings.

    Args:
        allow_unannotated: take a file without annotations, which is enough to detect.

    Raises:
        UserError: lists what is missing or wrong, in all splits.
    """
    require_folders(paths, splits)
    read: dict[str, Annotations] = {}
    problems = []
    for split in splits:
        images, path = paths[f"{split}_images"], paths[f"{split}_annotations"]
        try:
            annotations, findings = examine(path)
            if annotations is not None:
                annotations, more = locate.locate_images(annotations, images)
                findings += more
                if allow_unannotated and not annotations.is_annotated:
                    findings = [f for f in findings if f.what not in UNANNOTATED]
            require_no_errors(annotations.title if annotations else path, findings)
        except UserError as error:
            problems.append(str(error))
            continue
        assert annotations is not None
        read[split] = annotations
        log_warnings(annotations, findings)
    if problems:
        raise UserError("\nerror: ".join(problems))
    if read.keys() >= {"train", "val"}:
        pairs = [(read[split], paths[f"{split}_images"]) for split in ("train", "val")]
        log_warnings(read["val"], overlap_findings(pairs[0], pairs[1]))
    return list(read.values())
