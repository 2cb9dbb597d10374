"""Download COCO 2017 into the layout that `--data-path` trains on.

    python -m tools.download coco /coco
    python -m tools.download coco /coco --splits val

Each archive is checked by size and MD5, unpacked and deleted. The same command continues a download
that was interrupted, and skips what is complete.
"""

from __future__ import annotations

if not __package__:  # run as a file, it would not find the modules beside tools/
    raise SystemExit("run it as: python -m tools.download")

import hashlib
import shutil
import sys
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data.splits import data_paths, read_splits
from runtime.flags import ArgumentParser
from utils import UserError, file_errors, run_command

SERVER = "http://images.cocodataset.org"  # its certificate is of another name, so no https
ATTEMPTS = 5  # without a new byte, before a download fails
PAUSE = 2.0  # seconds between two attempts
TIMEOUT = 60.0  # seconds without an answer
CHUNK = 2**20


class Archive(NamedTuple):
    """A file of the server: its path there, bytes, MD5, and the folder that it holds."""

    path: str
    size: int
    md5: str
    folder: str


# The MD5 sums are those in PaddleDetection's ppdet/utils/download.py.
ANNOTATIONS = Archive(
    "annotations/annotations_trainval2017.zip",
    252_907_541,
    "f4bbac642086de4f52a3fdda2de5fa2c",
    "annotations",
)
IMAGES = {
    "val": Archive("zips/val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80", "val2017"),
    "train": Archive(
        "zips/train2017.zip", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2", "train2017"
    ),
}


def download(archive: Archive, folder: Path, server: str) -> None:
    """Put the folder that `archive` holds into `folder`, unless it exists.

    Raises:
        UserError: if the download stops, the file is not the expected one, or the disk is full.
    """
    target, path = folder / archive.folder, folder / Path(archive.path).name
    if target.is_dir():
        print(f"{target} is there")
        return
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    needed, free = 2 * archive.size - have, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {path.name} and its content need {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free"
        )
    fetch(f"{server}/{archive.path}", part, archive.size)
    digest = hashlib.md5(usedforsecurity=False)
    with file_errors("read", part), part.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    if digest.hexdigest() != archive.md5:
        part.unlink()
        raise UserError(
            f"{server}/{archive.path} has the MD5 {digest.hexdigest()} and not {archive.md5}; "
            "it was deleted, run the command again"
        )
    unpack(part, archive.folder, folder)
    part.unlink()
    print(f"{target} is complete")


def fetch(url: str, part: Path, size: int) -> None:
    """Download `url`, `size` bytes, to the file `part`, which may hold its beginning."""
    bar = tqdm(
        total=size, unit="B", unit_scale=True, desc=part.name, disable=not sys.stderr.isatty()
    )
    failures = 0
    with bar, file_errors("write", part), part.open("ab", buffering=0) as file:
        while (done := file.seek(0, 2)) < size:
            bar.n = done
            problem = ""
            request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"})
            try:
                response = urllib.request.urlopen(request, timeout=TIMEOUT)
            except OSError as error:  # urllib's errors are of this kind, too
                problem = str(error)
            else:
                with response:
                    if response.status != 206 and done:  # the whole file from its beginning
                        file.truncate(0)
                    while not problem and (data := _read(response)):
                        if isinstance(data, str):
                            problem = data
                        else:
                            file.write(data)
                            bar.update(len(data))
            failures = 0 if file.seek(0, 2) > done else failures + 1
            if failures == ATTEMPTS:
                raise UserError(
                    f"{url}: {problem or 'the server ends the transfer'} at {done:,} of {size:,} "
                    "bytes; the same command continues"
                )
            if failures:
                time.sleep(PAUSE)
    if done > size:
        part.unlink()
        raise UserError(f"{url} has {done:,} bytes and not {size:,}; run the command again")


def _read(response: Any) -> bytes | str:
    """Return the next bytes, none at the end, or what went wrong."""
    try:
        return response.read1(CHUNK)
    except OSError as error:
        return str(error)


def unpack(archive: Path, name: str, folder: Path) -> None:
    """Unpack the folder `name` of a ZIP file into `folder`, where it appears when complete."""
    temporary = folder / f"{name}.unpacking"
    with file_errors("write", temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with zipfile.ZipFile(archive) as file:
                members = [m for m in file.namelist() if m.startswith(f"{name}/")]
                bar = tqdm(members, f"unpacking {name}", disable=not sys.stderr.isatty())
                for member in bar:
                    file.extract(member, temporary)
            (temporary / name).rename(folder / name)
        except zipfile.BadZipFile as error:
            raise UserError(f"{archive} is damaged: {error}; delete it and run again") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def build_parser() -> ArgumentParser:
    """Declare the flags."""
    parser = ArgumentParser((__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("dataset", choices=("coco",), help="what to download")
    add("folder", type=Path, help="where to put it: 41 GB for both splits, while unpacking")
    splits = ["val", "train"]
    add("--splits", nargs="+", choices=splits, default=splits, help="images of these splits")
    add("--server", default=SERVER, help="where the archives are, or a mirror")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Download, unpack, and check that every image of the annotations exists."""
    flags = build_parser().parse_args(argv)
    with file_errors("create", flags.folder):
        flags.folder.mkdir(parents=True, exist_ok=True)
    for archive in (ANNOTATIONS, *(IMAGES[split] for split in flags.splits)):
        download(archive, flags.folder, flags.server.rstrip("/"))
    for split in read_splits(data_paths("coco", flags.folder, {}), flags.splits):
        print(f"{split.path}: {len(split):,} images, {len(split.ids):,} boxes")


if __name__ == "__main__":
    run_command(main)
