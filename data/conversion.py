"""VOC and YOLO folders become COCO JSON in the cache, once per machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from data import cache as data_cache
from data import voc, yolo
from data.coco_rules import Finding, require_no_errors
from data.labelled import SPLITS, Layout, Sample
from utils import UserError

_FIND = {"voc": voc.find, "yolo": yolo.find}
LAYOUTS = tuple(_FIND)


def coco_paths(layout_name: str, root: Path) -> dict[str, Path]:
    """Convert a folder to COCO JSON in the cache, once per machine, and return where things are.

    Categories get the ids 1 … K: those of VOC by name, those of YOLO in the order of data.yaml.

    Args:
        layout_name: one of `LAYOUTS`.
        root: the folder; for YOLO also its YAML file.

    Returns:
        "train_images", "train_annotations", "val_images" and "val_annotations".

    Raises:
        UserError: lists what the folder lacks, or what is wrong in its files.
    """
    layout = find(layout_name, root)
    if set(layout.splits) != set(SPLITS):
        raise UserError(
            f"--data-path {root} has no split to evaluate on; make one: "
            f"python -m tools.convert {layout_name} {root} NEW_FOLDER --val-share 0.2"
        )
    root = Path(os.path.abspath(root))
    name = f"{root.name}-{hashlib.sha256(bytes(root)).hexdigest()[:16]}"

    def build(folder: Path) -> None:
        rows, names = read(layout, root)
        for split, split_rows in rows.items():
            content = layout.splits[split]
            document = as_coco(split_rows, content.root, list(enumerate(names, start=1)))
            (folder / f"{split}.json").write_text(json.dumps(document))
            findings = [asdict(finding) for finding in content.findings.as_list()]
            origin = {"source": f"{root}: {split}", "findings": findings}
            (folder / f"{split}.origin.json").write_text(json.dumps(origin))

    try:
        folder = data_cache.folder() / layout_name / name
        data_cache.built_once(folder, _key(layout), build)
    except OSError as error:
        raise UserError(f"cannot keep {root} as COCO JSON: {error}; set XDG_CACHE_HOME") from None
    images = {f"{split}_images": layout.splits[split].root for split in SPLITS}
    return images | {f"{split}_annotations": folder / f"{split}.json" for split in SPLITS}


def read_origin(annotations: Path) -> tuple[str, list[Finding]]:
    """Return what `annotations` were converted from, and the warnings; for any other file none."""
    path = annotations.with_suffix(".origin.json")
    if not path.is_file():
        return "", []
    origin = json.loads(path.read_text())
    return origin["source"], msgspec.convert(origin["findings"], list[Finding])


def find(layout_name: str, root: Path, lists: Mapping[str, Path] | None = None) -> Layout:
    """Find the splits of a folder, without opening images or label files.

    Args:
        lists: files that name the images of "train", or of "train" and "val".

    Raises:
        UserError: if the folder has another layout.
    """
    if not root.is_dir() and not (layout_name == "yolo" and root.is_file()):
        raise UserError(f"--data-path {root} is no folder; --dataset {layout_name} needs one")
    root = Path(os.path.abspath(root))  # links stay: labels lie beside them
    return _FIND[layout_name](root, lists or {})


def read(layout: Layout, root: Path) -> tuple[dict[str, list[Sample]], list[str]]:
    """Read all splits; return their samples, and the names of the classes.

    Raises:
        UserError: lists every error in all of them.
    """
    rows = {name: layout.read(split) for name, split in layout.splits.items()}
    findings = [finding for split in layout.splits.values() for finding in split.findings.as_list()]
    require_no_errors(root, findings)
    names = {name for samples in rows.values() for sample in samples for name in sample.classes}
    return rows, layout.names or sorted(names)


def as_coco(
    rows: Sequence[Sample], root: Path, categories: Sequence[tuple[int, str]]
) -> dict[str, Any]:
    """Return COCO JSON; images and annotations are numbered from 1, file names are below `root`."""
    id_of = {name: number for number, name in categories}
    images, annotations = [], list[dict[str, Any]]()
    for image_id, sample in enumerate(rows, start=1):
        file_name = Path(os.path.relpath(sample.image, root)).as_posix()
        height, width = sample.size
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for box, name, crowd in zip(sample.boxes, sample.classes, sample.is_crowd, strict=True):
            ids = {"id": len(annotations) + 1, "image_id": image_id, "category_id": id_of[name]}
            shape = {"bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd)}
            annotations.append(ids | shape)
    named = [{"id": number, "name": name} for number, name in categories]
    return {"images": images, "annotations": annotations, "categories": named}


def _key(layout: Layout) -> str:
    """Hash the code, and name, size and times of all files that a conversion reads."""
    content = hashlib.sha256(data_cache.hash_code().encode())
    paths = {name: (*split.images, *split.labels) for name, split in layout.splits.items()}
    for name, files in (paths | {"sources": tuple(layout.sources)}).items():
        for path in files:
            state = data_cache.file_state(path) if path.is_file() else None
            content.update(os.fsencode(f"{name} {path} {state}\n"))
    return content.hexdigest()
