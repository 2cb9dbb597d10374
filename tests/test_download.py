"""Downloads are resumed, verified and unpacked whole: pytest tests/test_download.py."""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tools import download
from utils import UserError


class Server(BaseHTTPRequestHandler):
    """Serves `files`; ends each of the first `cuts` answers after half of what was asked for."""

    files: dict[str, bytes] = {}
    cuts = 0
    ranges: list[str] = []
    knows_ranges = True

    def do_GET(self) -> None:  # noqa: N802
        kind, asked = type(self), self.headers["Range"]
        kind.ranges.append(asked)
        data = self.files[self.path]
        start = int(re.findall(r"bytes=(\d+)-", asked)[0]) if self.knows_ranges else 0
        self.send_response(206 if self.knows_ranges else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end = len(data)
        if kind.cuts:
            kind.cuts -= 1
            end = start + (end - start) // 2
        self.wfile.write(data[start:end])

    def log_message(self, format: str, *values: Any) -> None: ...


@pytest.fixture
def server(
    tiny_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, type[Server]]]:
    """A server of the embedded data set in COCO's archives, and its handler."""
    kind = type("Handler", (Server,), {"files": {}, "ranges": []})

    def packed(original: download.Archive) -> download.Archive:
        name = str(tmp_path / "packed" / original.folder)
        data = Path(shutil.make_archive(name, "zip", tiny_shapes, original.folder)).read_bytes()
        kind.files[f"/{original.path}"] = data
        return original._replace(size=len(data), md5=hashlib.md5(data).hexdigest())

    monkeypatch.setattr(download, "ANNOTATIONS", packed(download.ANNOTATIONS))
    images = {split: packed(archive) for split, archive in download.IMAGES.items()}
    monkeypatch.setattr(download, "IMAGES", images)
    monkeypatch.setattr(download, "PAUSE", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", kind
        running.shutdown()


def run(folder: Path, url: str, *flags: str) -> None:
    download.main(["coco", str(folder), "--server", url, *flags])


def test_archives_are_unpacked_checked_and_skipped_the_second_time(
    server: tuple[str, type[Server]],
    tiny_shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(tmp_path / "coco", server[0])
    for name in ("train2017", "val2017", "annotations"):
        files = sorted((tiny_shapes / name).iterdir())
        assert len(files) > 1
        for file in files:
            assert (tmp_path / "coco" / name / file.name).read_bytes() == file.read_bytes()
    assert len(list((tmp_path / "coco").iterdir())) == 3  # no archive, no temporary folder
    assert "instances_val2017.json: 7 images" in capsys.readouterr().out
    asked = len(server[1].ranges)
    run(tmp_path / "coco", server[0])
    assert len(server[1].ranges) == asked


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_cut_transfer_goes_on_where_it_ended(
    knows_ranges: bool, server: tuple[str, type[Server]], tmp_path: Path
) -> None:
    url, kind = server
    kind.cuts, kind.knows_ranges = 2, knows_ranges
    run(tmp_path / "coco", url, "--splits", "val")
    size = download.ANNOTATIONS.size
    assert kind.ranges[:2] == ["bytes=0-", f"bytes={size // 2}-"]
    assert (tmp_path / "coco" / "val2017").is_dir()


def test_a_server_that_sends_nothing_more_is_named_and_the_part_kept(
    server: tuple[str, type[Server]], tmp_path: Path
) -> None:
    url, kind = server
    kind.files[f"/{download.ANNOTATIONS.path}"] = kind.files[f"/{download.ANNOTATIONS.path}"][:99]
    with pytest.raises(UserError, match="at 99 of .* bytes; the same command continues"):
        run(tmp_path / "coco", url)
    part = tmp_path / "coco" / "annotations_trainval2017.zip.part"
    assert part.stat().st_size == 99


def test_a_file_with_another_hash_is_deleted_and_not_unpacked(
    server: tuple[str, type[Server]], tmp_path: Path
) -> None:
    data = bytearray(server[1].files[f"/{download.ANNOTATIONS.path}"])
    data[len(data) // 2] ^= 1
    server[1].files[f"/{download.ANNOTATIONS.path}"] = bytes(data)
    with pytest.raises(UserError, match="has the MD5 .* run the command again"):
        run(tmp_path / "coco", server[0])
    assert list((tmp_path / "coco").iterdir()) == []


def test_a_full_disk_is_one_message(server: tuple[str, type[Server]], tmp_path: Path) -> None:
    (tmp_path / "annotations_trainval2017.zip.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*zip.part: No space left on device"):
        run(tmp_path, server[0])


def test_too_little_disk_space_is_refused_before_the_transfer(
    server: tuple[str, type[Server]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="need 0.0 GB, 0.0 GB are free"):
        run(tmp_path, server[0])
    assert server[1].ranges == []
