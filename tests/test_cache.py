"""The annotation cache: equal to the parsed file, built once, rebuilt when stale or damaged.

python -m pytest tests/test_cache.py
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import changed, valid, write

from data import cache as data_cache
from data import coco_json
from utils import UserError


@pytest.fixture
def json_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is worth caching, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data_cache, "CACHED_FROM", 0)
    return write(tmp_path, changed("annotations", 1, "iscrowd", to=...)())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is read as JSON, in order."""
    paths: list[Path] = []
    read = coco_json.examine

    def record(path: Path) -> Any:
        paths.append(path)
        return read(path)

    monkeypatch.setattr(coco_json, "examine", record)
    return paths


def assert_right(path: Path) -> None:
    expected, warnings = coco_json.read_annotations(path)
    cached, findings = data_cache.examine(path)
    assert cached is not None
    assert findings == warnings and len(findings) == 1  # the missing iscrowd is reported every time
    for field in dataclasses.fields(expected):
        value, other = getattr(expected, field.name), getattr(cached, field.name)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype and np.array_equal(value, other), field.name
        else:
            assert value == other, field.name
    assert cached.fingerprint() == expected.fingerprint()


def place(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "cache" / "retinanet-reference" / "annotations").glob("coco-*")
    return folder


def test_second_start_maps_what_the_first_built(
    json_file: Path, reads: list[Path], tmp_path: Path
) -> None:
    data_cache.examine(json_file)
    assert reads == [json_file]
    cached, _ = data_cache.examine(json_file)
    assert reads == [json_file]
    assert cached is not None and not cached.boxes_xywh.flags.writeable
    assert type(cached.boxes_xywh) is np.ndarray  # slicing a memmap object is slow
    assert isinstance(cached.boxes_xywh.base, np.memmap)  # shared between processes
    assert not [p for p in place(tmp_path).parent.iterdir() if p.suffix == ".tmp"]
    assert_right(json_file)


def test_small_files_are_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data_cache.examine(write(tmp_path, json.dumps(valid()).encode()))
    assert not (tmp_path / "cache").exists()


def test_a_changed_file_is_read_again(json_file: Path) -> None:
    before, _ = data_cache.examine(json_file)
    stat = json_file.stat()
    content = json_file.read_bytes().replace(b"[15, 10, 20.25, 30]", b"[15, 10, 20.25, 31]")
    json_file.write_bytes(content)
    os.utime(json_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    after, _ = data_cache.examine(json_file)
    assert before is not None and after is not None
    assert before.fingerprint() != after.fingerprint()
    assert_right(json_file)


def test_a_change_anywhere_in_a_large_file_is_noticed(json_file: Path) -> None:
    # Without a change of size and time, and between the blocks that a sample would hash.
    content, blank = json_file.read_bytes(), b" " * 2**22
    for shift in range(0, 130_000, 25_000):  # samples of 64 KiB would leave gaps of 46 KiB
        old = content[:1] + blank + b" " * shift + content[1:-1] + blank + content[-1:]
        json_file.write_bytes(old)
        stat = json_file.stat()
        before, _ = data_cache.examine(json_file)
        changed = old.replace(b"20.25", b"20.75")
        assert changed != old
        json_file.write_bytes(changed)
        os.utime(json_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        after, _ = data_cache.examine(json_file)
        assert before is not None and after is not None
        assert before.fingerprint() != after.fingerprint()


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    json_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = coco_json.examine

    def change(path: Path) -> Any:
        result = read(path)
        path.write_bytes(path.read_bytes() + b" ")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(coco_json, "examine", change)
        with pytest.raises(UserError, match="changed while it was read"):
            data_cache.examine(json_file)
    assert not list((tmp_path / "cache").rglob("*.npy"))
    assert_right(json_file)


def test_touched_or_copied_file_is_not_read_again_as_its_content_is_known(
    json_file: Path, reads: list[Path]
) -> None:
    data_cache.examine(json_file)
    os.utime(json_file, ns=(1, 1))
    data_cache.examine(json_file)
    copy = json_file.with_name("copy")
    copy.write_bytes(json_file.read_bytes())
    os.replace(copy, json_file)
    data_cache.examine(json_file)
    assert len(reads) == 1


def damage_none(folder: Path) -> None:
    pass


def truncate(folder: Path) -> None:
    path = folder / "boxes_xywh.npy"
    path.write_bytes(path.read_bytes()[:-8])


def zero_a_block(folder: Path) -> None:
    path = folder / "boxes_xywh.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-32] + bytes(32))


def flip_a_bit(folder: Path) -> None:
    path = folder / "ids.npy"
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)


def swap_two_words(folder: Path) -> None:
    path = folder / "ids.npy"
    content = path.read_bytes()
    assert content[-16:-8] != content[-8:]
    path.write_bytes(content[:-16] + content[-8:] + content[-16:-8])


def edit_the_categories(folder: Path) -> None:
    path = folder / "about.json"
    edited = path.read_text().replace("cat", "dog")
    assert edited != path.read_text()
    path.write_text(edited)


def lose_the_hashes(folder: Path) -> None:
    (folder / "written.json").write_text("\0" * 50)


def add_a_file(folder: Path) -> None:
    (folder / "other.npy").write_bytes(b"")


def make_it_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def make_it_a_dangling_link(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


def remove_an_array(folder: Path) -> None:
    (folder / "area.npy").unlink()


def cut_the_description(folder: Path) -> None:
    path = folder / "about.json"
    path.write_text(path.read_text()[:50])


def replace_the_description(folder: Path) -> None:
    (folder / "about.json").write_text("[]")


def leave_it_unfinished(folder: Path) -> None:
    (folder / "about.json").unlink()
    os.rename(folder, folder.with_name(f".{folder.name}.tmp"))


DAMAGES = [
    *(truncate, zero_a_block, flip_a_bit, swap_two_words, remove_an_array, add_a_file),
    *(edit_the_categories, lose_the_hashes, make_it_a_file, make_it_a_dangling_link),
    *(cut_the_description, replace_the_description, leave_it_unfinished),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_built_again(
    damage: Any, json_file: Path, reads: list[Path], tmp_path: Path
) -> None:
    data_cache.examine(json_file)
    damage(place(tmp_path))
    data_cache.examine(json_file)
    assert len(reads) == 2
    assert_right(json_file)


def test_nothing_is_unpickled(json_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    data_cache.examine(json_file)
    canary = tmp_path / "canary"

    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (canary,)

    folder = place(tmp_path)
    np.save(folder / "ids.npy", np.array([Attack()], dtype=object), allow_pickle=True)
    written = json.loads((folder / "written.json").read_text())
    written["hashes"] = data_cache._hashes(folder)
    (folder / "written.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="Python objects"):
        data_cache.examine(json_file)
    assert not canary.exists()
    assert pickle.dumps(Attack())  # it would have worked


def test_files_with_errors_are_read_once_and_not_kept(
    tmp_path: Path, json_file: Path, reads: list[Path]
) -> None:
    write(tmp_path, changed("annotations", 0, "category_id", to=11)())
    annotations, findings = data_cache.examine(json_file)
    assert annotations is not None and [f.severity for f in findings] == ["error"]
    assert len(reads) == 1
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_an_unwritable_cache_is_logged_and_not_used(
    json_file: Path, tmp_path: Path, reads: list[Path]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    annotations, findings = data_cache.examine(json_file)
    assert annotations is not None and len(reads) == 1
    (finding,) = [f for f in findings if f.what == "annotations that cannot be cached"]
    assert finding.severity == "warning" and "cache" in finding.cases[0]


def _count_and_read(path: Path, log: Path, start: Any) -> None:
    read = coco_json.examine

    def record(path: Path) -> Any:
        with log.open("a") as file:
            file.write("read\n")
        time.sleep(0.3)  # time for the others to come
        return read(path)

    coco_json.examine = record
    start.wait()
    annotations, findings = data_cache.examine(path)
    assert annotations is not None and len(annotations.ids) == 4 and len(findings) == 1


@pytest.mark.parametrize("before", [damage_none, zero_a_block, None])
def test_one_of_six_processes_builds(before: Any, json_file: Path, tmp_path: Path) -> None:
    if before is not None:
        data_cache.examine(json_file)
        before(place(tmp_path))
    fork = multiprocessing.get_context("fork")
    log, start = tmp_path / "log", fork.Event()
    log.touch()
    processes = [
        fork.Process(target=_count_and_read, args=(json_file, log, start)) for _ in range(6)
    ]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert log.read_text() == ("" if before is damage_none else "read\n")
    assert_right(json_file)


def test_a_killed_builder_does_not_block_the_next(json_file: Path, tmp_path: Path) -> None:
    def build_and_die() -> None:
        def save(*_: Any) -> None:
            os.kill(os.getpid(), 9)

        data_cache._save = save
        data_cache.examine(json_file)

    process = multiprocessing.get_context("fork").Process(target=build_and_die)
    process.start()
    process.join(60)
    assert process.exitcode == -9
    assert list((tmp_path / "cache").rglob("*.tmp"))
    assert_right(json_file)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_folder_follows_the_xdg_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert data_cache.folder() == Path("/home/someone/.cache/retinanet-reference")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast/disk")
    assert data_cache.folder() == Path("/fast/disk/retinanet-reference")


def test_a_lock_does_not_follow_a_link(json_file: Path, tmp_path: Path) -> None:
    data_cache.examine(json_file)
    folder, victim = place(tmp_path), tmp_path / "victim"
    victim.write_text("precious")
    lock = folder.with_name(f".{folder.name}.lock")
    lock.unlink()
    lock.symlink_to(victim)
    truncate(folder)
    _, findings = data_cache.examine(json_file)
    assert any(finding.what == "annotations that cannot be cached" for finding in findings)
    assert victim.read_text() == "precious"


def test_an_unfinished_folder_that_is_a_link_is_removed_and_not_followed(
    json_file: Path, tmp_path: Path
) -> None:
    data_cache.examine(json_file)
    folder, victim = place(tmp_path), tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").touch()
    folder.with_name(f".{folder.name}.tmp").symlink_to(victim)
    truncate(folder)
    assert_right(json_file)
    assert [path.name for path in victim.iterdir()] == ["precious"]
