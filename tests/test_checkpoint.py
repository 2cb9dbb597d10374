"""A verified checkpoint survives every crash and damage: pytest tests/test_checkpoint.py.

Saves are killed in forked processes at every operation on a file: the n-th one ends the process,
for all n until a save gets through. Power failure is played as well: what was not yet synced is cut
in half first.
"""

import copy
import errno
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import flip_a_bit, sidecar, truncate, write_malice

import utils
from runtime import checkpoint, resuming
from runtime.checkpoint import NEWEST, PREVIOUS
from runtime.flags import IGNORE, LOG, REFUSE, ArgumentParser
from utils import UserError

KILLED = 77
FILE_EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.truncate"}


def state(step: int) -> dict[str, Any]:
    """Plain types and tensors, of some kilobytes, different for every step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.rand(40, 50, generator=generator), "n": torch.tensor(step)},
        "ema": None,
        "optimizer": {
            "state": {0: {"exp_avg": torch.rand(9, generator=generator)}},
            "param_groups": [],
        },
        "step": step,
        "args": {"lr": 0.01, "lr_steps": [16, 22], "data_path": "/coco", "amp": None},
        "categories": [{"id": 1, "name": "Käfer", "label": 1}],
        "best": 0.25,
    }


def assert_holds(path: Path, step: int) -> None:
    content, expected = checkpoint.load(path), state(step)
    assert torch.equal(content.pop("model")["w"], expected.pop("model")["w"])
    assert content.pop("optimizer").keys() == expected.pop("optimizer").keys()
    assert content == expected


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sha256sum(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check all sidecars with the tool that they are for."""
    sidecars = sorted(path.name for path in folder.glob("*.sha256"))
    return subprocess.run(
        ["sha256sum", "--check", "--strict", *sidecars],
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """The warnings of the project's logger, independent of its handlers."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    checkpoint.logger.addHandler(handler)
    yield messages
    checkpoint.logger.removeHandler(handler)


# --- what a save leaves ---------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    checkpoint.save(state(1), tmp_path / NEWEST)
    assert_holds(tmp_path / NEWEST, 1)
    assert checkpoint.newest(tmp_path) == tmp_path / NEWEST


def test_a_checkpoint_loads_everywhere_with_weights_only(tmp_path: Path) -> None:
    checkpoint.save(state(1), tmp_path / NEWEST)
    content = torch.load(tmp_path / NEWEST, weights_only=True)
    assert content.keys() == state(1).keys()


def test_tensors_keep_their_kind_and_bits(tmp_path: Path) -> None:
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
    tensors = [torch.tensor([0.0, -0.0, 1e-7, 3.0]).to(kind) for kind in kinds]
    tensors.append(torch.tensor([float("nan"), float("inf")]))
    tensors.append(torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last))
    checkpoint.save({"tensors": tensors}, tmp_path / NEWEST)
    for loaded, tensor in zip(checkpoint.load(tmp_path / NEWEST)["tensors"], tensors, strict=True):
        assert loaded.dtype == tensor.dtype and loaded.stride() == tensor.stride()
        assert loaded.contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8))


def test_sidecars_are_accepted_by_sha256sum(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(state(step), tmp_path / NEWEST)
    checkpoint.copy(tmp_path / NEWEST, tmp_path / "model_0.pth")
    checkpoint.copy(tmp_path / NEWEST, tmp_path / "best.pth")
    done = sha256sum(tmp_path)
    assert done.returncode == 0, done.stderr
    expected = [NEWEST, PREVIOUS, "best.pth", "model_0.pth"]
    assert sorted(done.stdout.splitlines()) == sorted(f"{name}: OK" for name in expected)


def test_a_save_keeps_the_checkpoint_before_and_no_other_file(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(state(step), tmp_path / NEWEST)
    assert_holds(tmp_path / NEWEST, 3)
    assert_holds(tmp_path / PREVIOUS, 2)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_system_without_links_also_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(target))

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2, 3):
        checkpoint.save(state(step), tmp_path / NEWEST)
    assert_holds(tmp_path / NEWEST, 3)
    assert_holds(tmp_path / PREVIOUS, 2)
    assert utils.is_verified(tmp_path / NEWEST) and utils.is_verified(tmp_path / PREVIOUS)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("link", [False, True])
def test_a_copy_outlives_its_source(tmp_path: Path, link: bool) -> None:
    checkpoint.save(state(1), tmp_path / NEWEST)
    checkpoint.copy(tmp_path / NEWEST, tmp_path / "best.pth", link=link)
    for step in (2, 3):
        checkpoint.save(state(step), tmp_path / NEWEST)
    assert utils.is_verified(tmp_path / "best.pth")
    assert_holds(tmp_path / "best.pth", 1)


def test_a_copy_replaces_the_one_that_was_there(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(state(step), tmp_path / NEWEST)
        checkpoint.copy(tmp_path / NEWEST, tmp_path / "best.pth")
        assert utils.is_verified(tmp_path / "best.pth")
        assert_holds(tmp_path / "best.pth", step)


def test_content_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, last = set(), []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced.add((status.st_ino, status.st_size))
        last.append(status.st_ino)

    def watched_replace(source: Path, target: Path) -> None:
        status = os.stat(source)
        assert (status.st_ino, status.st_size) in synced, f"{source} was renamed before its sync"
        replace(source, target)
        last.append(None)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    for step in (1, 2):
        checkpoint.save(state(step), tmp_path / NEWEST)
        assert last[-1] == tmp_path.stat().st_ino  # and at the end, so are the names
    checkpoint.copy(tmp_path / NEWEST, tmp_path / "best.pth")
    assert last[-1] == tmp_path.stat().st_ino


# --- damage ---------------------------------------------------------------------------------------


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zero_a_block(path: Path) -> None:
    data = bytearray(path.read_bytes())
    start = len(data) // 3
    data[start : start + 2048] = bytes(2048)
    path.write_bytes(data)


def append_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def lose_the_sidecar(path: Path) -> None:
    sidecar(path).unlink()


def take_a_foreign_sidecar(path: Path) -> None:
    sidecar(path).write_text(f"{'0' * 64}  {path.name}\n")


def empty_the_sidecar(path: Path) -> None:
    sidecar(path).write_bytes(b"")


def write_rubbish_to_the_sidecar(path: Path) -> None:
    sidecar(path).write_bytes(b"\xff\xfe\x00 \x80")


def make_it_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


TO_THE_FILE = (flip_a_bit, truncate, empty, zero_a_block, append_a_byte)
TO_THE_SIDECAR = (
    *(lose_the_sidecar, take_a_foreign_sidecar, empty_the_sidecar, write_rubbish_to_the_sidecar),
)
DAMAGES = (*TO_THE_FILE, *TO_THE_SIDECAR, make_it_a_folder)
Damage = Callable[[Path], None]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_logged_and_the_one_before_is_used(
    tmp_path: Path, damage: Damage, warnings: list[str]
) -> None:
    for step in (1, 2):
        checkpoint.save(state(step), tmp_path / NEWEST)
    damage(tmp_path / NEWEST)
    assert not utils.is_verified(tmp_path / NEWEST)
    assert checkpoint.newest(tmp_path) == tmp_path / PREVIOUS
    assert_holds(tmp_path / PREVIOUS, 1)
    assert len(warnings) == 1
    assert str(tmp_path / NEWEST) in warnings[0] and "damaged" in warnings[0]


def test_an_intact_checkpoint_is_used_without_a_warning(
    tmp_path: Path, warnings: list[str]
) -> None:
    for step in (1, 2):
        checkpoint.save(state(step), tmp_path / NEWEST)
    flip_a_bit(tmp_path / PREVIOUS)
    assert checkpoint.newest(tmp_path) == tmp_path / NEWEST
    assert warnings == []


def test_the_fallback_is_the_newest_that_verifies(tmp_path: Path, warnings: list[str]) -> None:
    checkpoint.save(state(1), tmp_path / NEWEST)
    checkpoint.copy(tmp_path / NEWEST, tmp_path / "model_0.pth")
    checkpoint.save(state(2), tmp_path / NEWEST)
    checkpoint.save(state(3), tmp_path / NEWEST)  # the end of an epoch, while PREVIOUS is mid-epoch
    checkpoint.copy(tmp_path / NEWEST, tmp_path / "model_1.pth")
    flip_a_bit(tmp_path / NEWEST)
    assert_holds(checkpoint.newest(tmp_path) or tmp_path, 3)
    flip_a_bit(tmp_path / "model_1.pth")
    assert_holds(checkpoint.newest(tmp_path) or tmp_path, 2)
    flip_a_bit(tmp_path / PREVIOUS)
    assert_holds(checkpoint.newest(tmp_path) or tmp_path, 1)


def test_if_all_are_damaged_the_error_names_each(tmp_path: Path, warnings: list[str]) -> None:
    for step in (1, 2):
        checkpoint.save(state(step), tmp_path / NEWEST)
        checkpoint.copy(tmp_path / NEWEST, tmp_path / f"model_{step}.pth")
    checkpoint.copy(tmp_path / NEWEST, tmp_path / "best.pth")
    names = [NEWEST, PREVIOUS, "model_1.pth", "model_2.pth", "best.pth"]
    for name, damage in zip(names, DAMAGES, strict=False):
        damage(tmp_path / name)
    with pytest.raises(UserError) as error:
        checkpoint.newest(tmp_path)
    assert all(name in str(error.value) for name in names) and str(tmp_path) in str(error.value)
    assert len(warnings) == len(names)


def test_an_empty_folder_has_no_newest(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d is not lose_the_sidecar])
def test_load_refuses_damage_and_names_the_file(tmp_path: Path, damage: Damage) -> None:
    path = tmp_path / NEWEST
    checkpoint.save(state(1), path)
    damage(path)
    with pytest.raises(UserError, match="--resume") as error:
        checkpoint.load(path)
    assert str(path) in str(error.value)


def test_a_file_without_sidecar_loads_unverified(tmp_path: Path) -> None:
    torch.save(state(1), tmp_path / "given.pth")
    assert_holds(tmp_path / "given.pth", 1)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world", b"<!DOCTYPE html><html>404</html>", b'{"model": 1}', b"PK\3\4", b"\x80"],
)
def test_a_file_of_another_kind_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "given.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="--resume") as error:
        checkpoint.load(path)
    assert str(path) in str(error.value)


def test_a_broken_file_without_sidecar_never_ends_in_another_error(tmp_path: Path) -> None:
    torch.save(state(1), tmp_path / "new.pth")
    torch.save(state(1), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    sources = [(tmp_path / name).read_bytes() for name in ("new.pth", "old.pth")]
    draw, refused = random.Random(0), 0
    for _ in range(150):
        data = bytearray(draw.choice(sources))
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.3:
            data = data[: draw.randrange(len(data))]
        (tmp_path / "given.pth").write_bytes(data)
        try:
            assert isinstance(checkpoint.load(tmp_path / "given.pth"), dict)
        except UserError as error:
            assert str(tmp_path / "given.pth") in str(error)
            refused += 1
    assert refused > 30


def test_a_missing_file_and_a_list_are_refused_with_their_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--resume .*nowhere\.pth.* does not exist"):
        checkpoint.load(tmp_path / "nowhere.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"--resume .*list\.pth.* a list"):
        checkpoint.load(tmp_path / "list.pth")


# --- kills ----------------------------------------------------------------------------------------


def survive(scenario: Callable[[], None], folder: Path, number: int, tear: bool) -> bool:
    """Run `scenario` in a forked process that dies at its `number`-th file operation.

    Args:
        tear: before dying in a sync, cut the file in half, as a power failure may.

    Returns:
        Whether the scenario got through before.
    """
    child = os.fork()
    if child == 0:
        try:
            _die_at(folder, number, tear)
            scenario()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED), status
    return status == 0


def _die_at(folder: Path, number: int, tear: bool) -> None:
    count = 0

    def operation() -> bool:
        nonlocal count
        count += 1
        return count == number

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(folder)) and operation():
            os._exit(KILLED)

    def dying_fsync(descriptor: int) -> None:
        if operation():
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if tear and os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
            os._exit(KILLED)

    os.fsync = dying_fsync
    sys.addaudithook(audit)


def save_as_training_does(folder: Path, step: int, epoch: int | None = None) -> None:
    """Save; at the end of an epoch, keep a copy and the best, which is this one."""
    checkpoint.save(state(step), folder / NEWEST)
    if epoch is not None:
        checkpoint.copy(folder / NEWEST, folder / f"model_{epoch}.pth")
        checkpoint.copy(folder / NEWEST, folder / "best.pth")


def assert_recovers(folder: Path, steps: set[int]) -> None:
    """See that there is a checkpoint of one of `steps`, and that all goes on from there."""
    newest = checkpoint.newest(folder)
    assert newest is not None
    step = checkpoint.load(newest)["step"]
    assert step in steps
    assert_holds(newest, step)
    checkpoint.remove_leftovers(folder)
    assert all(path.suffix in (".pth", ".sha256") for path in folder.iterdir())
    again = checkpoint.newest(folder)
    assert again is not None and checkpoint.load(again)["step"] == step


def copy_of(folder: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of saves are quick if none waits for the disk, or for another process."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(utils, "PATIENCE", 0)


@pytest.mark.parametrize("tear", [False, True])
@pytest.mark.parametrize("history", [1, 3])
def test_a_kill_at_any_point_of_a_save_leaves_a_verified_checkpoint(
    tmp_path: Path, history: int, tear: bool, warnings: list[str], no_sync: None
) -> None:
    before, folder = tmp_path / "before", tmp_path / "run"
    before.mkdir()
    for step in range(1, history + 1):
        save_as_training_does(before, step, epoch=step - 1 if step > 1 else None)
    new, number, finished = history + 1, 0, False
    while not finished:
        number += 1
        copy_of(before, folder)
        finished = survive(
            lambda: save_as_training_does(folder, new, epoch=new), folder, number, tear
        )
        assert_recovers(folder, {new} if finished else {history, new})
        save_as_training_does(folder, new + 1)
        assert_holds(folder / NEWEST, new + 1)
        assert utils.is_verified(folder / NEWEST) and utils.is_verified(folder / PREVIOUS)
    assert number > 15  # opens, syncs and renames of a save and two copies


@pytest.mark.parametrize("tear", [False, True])
def test_a_second_kill_in_the_save_after_leaves_one_too(
    tmp_path: Path, tear: bool, warnings: list[str], no_sync: None
) -> None:
    before, middle, folder = tmp_path / "before", tmp_path / "middle", tmp_path / "run"
    before.mkdir()
    for step in (1, 2):
        save_as_training_does(before, step)
    first, finished, seen = 0, False, list[dict[str, bytes]]()
    while not finished:
        first += 1
        copy_of(before, middle)
        finished = survive(lambda: save_as_training_does(middle, 3), middle, first, tear)
        if files(middle) in seen:  # this kill left what another one did
            continue
        seen.append(files(middle))
        second, finished_too = 0, False
        while not finished_too:
            second += 1
            copy_of(middle, folder)
            # One relaunch cleans first, the other does not.
            if second % 2:
                checkpoint.remove_leftovers(folder)
            finished_too = survive(lambda: save_as_training_does(folder, 4), folder, second, tear)
            assert_recovers(folder, {4} if finished_too else {2, 3, 4})
    assert first > 6 and len(seen) > 5


def test_a_kill_in_the_very_first_save_leaves_a_whole_checkpoint_or_none_that_counts(
    tmp_path: Path, no_sync: None
) -> None:
    folder, number, finished = tmp_path / "run", 0, False
    while not finished:
        number += 1
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        finished = survive(lambda: save_as_training_does(folder, 1), folder, number, True)
        if utils.is_verified(folder / NEWEST):
            assert_holds(folder / NEWEST, 1)
        else:
            assert not finished
        checkpoint.remove_leftovers(folder)
        assert {path.suffix for path in folder.iterdir()} <= {".pth", ".sha256"}
    assert number > 4


def test_remove_leftovers_leaves_the_rest(tmp_path: Path) -> None:
    checkpoint.save(state(1), tmp_path / NEWEST)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    kept = files(tmp_path)
    (tmp_path / "checkpoint.pth.tmp").write_bytes(b"half")
    (tmp_path / "best.pth.sha256.tmp").write_bytes(b"half")
    checkpoint.remove_leftovers(tmp_path)
    assert files(tmp_path) == kept


# --- write errors ---------------------------------------------------------------------------------


def run_in_fork(action: Callable[[], None]) -> str:
    """Run `action` in a forked process and return the repr of what it raised, if it did."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            action()
            report = ""
        except BaseException as error:
            report = f"{type(error).__name__} {error}"
        os.write(writer, report.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        report = file.read()
    os.waitpid(child, 0)
    return report


def test_a_file_that_the_system_refuses_to_write_leaves_the_old_ones(tmp_path: Path) -> None:
    for step in (1, 2):
        save_as_training_does(tmp_path, step, epoch=step)
    before = files(tmp_path)

    def save_beyond_the_limit() -> None:
        limit = (tmp_path / NEWEST).stat().st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        checkpoint.save(state(3), tmp_path / NEWEST)

    report = run_in_fork(save_beyond_the_limit)
    assert report.startswith("UserError")
    checkpoint.remove_leftovers(tmp_path)
    assert files(tmp_path) == before
    assert str(tmp_path / NEWEST) in report  # the docstring's promise


def test_a_full_disk_at_any_point_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setattr(utils, "PATIENCE", 0)
    before, folder = tmp_path / "before", tmp_path / "run"
    before.mkdir()
    for step in (1, 2):
        save_as_training_does(before, step, epoch=step)
    number, failed = 0, True
    while failed:
        number += 1
        copy_of(before, folder)
        with monkeypatch.context() as patch:
            _disk_is_full_at(patch, number)
            try:
                save_as_training_does(folder, 3, epoch=3)
                failed = False
            except UserError as error:
                assert os.strerror(errno.ENOSPC) in str(error)
        assert_recovers(folder, {2, 3} if failed else {3})
        save_as_training_does(folder, 4)  # once there is room again
        assert_holds(folder / NEWEST, 4)
    assert number > 8


def _disk_is_full_at(patch: pytest.MonkeyPatch, number: int) -> None:
    count = 0

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "link", "replace"):
        patch.setattr(os, name, failing(getattr(os, name)))
    patch.setattr(shutil, "copyfileobj", failing(shutil.copyfileobj))


# --- malice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_sidecar", [False, True])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_malicious_checkpoint_is_refused_and_does_nothing(
    tmp_path: Path, form: str, has_sidecar: bool
) -> None:
    path, canary = tmp_path / NEWEST, tmp_path / "canary"
    write_malice(path, canary, form)
    if has_sidecar:
        done = subprocess.run(["sha256sum", path.name], cwd=tmp_path, capture_output=True)
        sidecar(path).write_bytes(done.stdout)
        assert utils.is_verified(path)
    with pytest.raises(UserError, match="not a file of tensors and plain types") as error:
        checkpoint.load(path)
    assert str(path) in str(error.value)
    assert not canary.exists()


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_the_malicious_file_works_if_it_is_unpickled(tmp_path: Path, form: str) -> None:
    # Else the test above could not fail.
    write_malice(tmp_path / NEWEST, tmp_path / "canary", form)
    torch.load(tmp_path / NEWEST, weights_only=False)
    assert (tmp_path / "canary").exists()


def test_pruning_keeps_the_newest_epochs_and_every_other_checkpoint(tmp_path: Path) -> None:
    for epoch in (8, 9, 10, 11):
        checkpoint.save({"epoch": epoch, "step": epoch}, tmp_path / "checkpoint.pth")
        checkpoint.copy(tmp_path / "checkpoint.pth", tmp_path / f"model_{epoch}.pth")
    checkpoint.copy(tmp_path / "checkpoint.pth", tmp_path / "best.pth")
    checkpoint.prune(tmp_path, keep=2)
    names = {
        "checkpoint.pth",
        "checkpoint.previous.pth",
        "best.pth",
        "model_10.pth",
        "model_11.pth",
    }
    assert {path.name for path in tmp_path.glob("*.pth")} == names
    assert {path.name for path in tmp_path.glob("*.sha256")} == {f"{n}.sha256" for n in names}
    checkpoint.prune(tmp_path, keep=0)
    assert not list(tmp_path.glob("model_*"))
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint.pth"


# --- whose files these are ------------------------------------------------------------------------


STRANGERS = (
    "model_best.pth",
    "model_0 (1).pth",
    "model_final.pth",
    "model_01.pth",
    "model_-1.pth",
    "model_1.pth.bak",
    "my.tmp",
    "notes.pth.tmp",
    "checkpoint.pth.old",
    "model_²۳.pth",
)


def test_files_of_other_names_are_never_counted_read_or_deleted(
    tmp_path: Path, warnings: list[str]
) -> None:
    for name in STRANGERS:
        (tmp_path / name).write_text("precious")
    (tmp_path / "x.tmp").mkdir()
    (tmp_path / "foo.pth").symlink_to("nowhere")
    os.mkfifo(tmp_path / "bar.pth")
    assert checkpoint.newest(tmp_path) is None
    checkpoint.require_unused(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    for epoch in range(3):
        checkpoint.save(state(epoch), tmp_path / NEWEST)
        checkpoint.copy(tmp_path / NEWEST, tmp_path / f"model_{epoch}.pth")
    checkpoint.prune(tmp_path, keep=0)
    checkpoint.remove_leftovers(tmp_path)
    assert checkpoint.newest(tmp_path) == tmp_path / NEWEST and warnings == []
    ours = {NEWEST, PREVIOUS, NEWEST + ".sha256", PREVIOUS + ".sha256"}
    assert sorted({path.name for path in tmp_path.iterdir()} - ours) == before
    assert all((tmp_path / name).read_text() == "precious" for name in STRANGERS)


@pytest.mark.parametrize("name", [NEWEST, "best.pth", "model_3.pth"])
def test_a_new_run_is_refused_in_a_folder_with_a_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("of some run, without args.json")
    with pytest.raises(UserError, match=f"holds a run .*{name}.*--resume auto"):
        checkpoint.require_unused(tmp_path)


@pytest.fixture
def half_a_minute() -> Iterator[None]:
    """Raise TimeoutError in what would wait for ever."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_it_a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_its_sidecar_a_fifo(path: Path) -> None:
    make_it_a_fifo(sidecar(path))


def make_it_a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    "damage", [make_it_a_fifo, make_its_sidecar_a_fifo, make_it_a_dangling_link]
)
def test_a_file_of_another_kind_hangs_nothing(
    tmp_path: Path, damage: Damage, warnings: list[str], half_a_minute: None
) -> None:
    for step in (1, 2):
        checkpoint.save(state(step), tmp_path / NEWEST)
    damage(tmp_path / NEWEST)
    assert not utils.is_verified(tmp_path / NEWEST)
    assert checkpoint.newest(tmp_path) == tmp_path / PREVIOUS
    with pytest.raises(UserError, match="--resume"):
        checkpoint.load(tmp_path / NEWEST)
    checkpoint.remove_leftovers(tmp_path)


def test_temporary_files_do_not_follow_links(tmp_path: Path) -> None:
    folder, victim = tmp_path / "run", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("precious")
    for name in (NEWEST, NEWEST + ".sha256", "best.pth", "best.pth.sha256"):
        (folder / f"{name}.tmp").symlink_to(victim)
    checkpoint.save(state(1), folder / NEWEST)
    checkpoint.copy(folder / NEWEST, folder / "best.pth")
    assert utils.is_verified(folder / NEWEST) and utils.is_verified(folder / "best.pth")
    assert victim.read_text() == "precious"
    assert not list(folder.glob("*.tmp"))


# --- the newest -----------------------------------------------------------------------------------


def test_the_newest_is_the_one_with_most_steps_whatever_the_times_of_files(
    tmp_path: Path, warnings: list[str]
) -> None:
    for step in (1, 2):
        checkpoint.save(state(step), tmp_path / NEWEST)
    checkpoint.copy(tmp_path / NEWEST, tmp_path / "best.pth")
    (tmp_path / "elsewhere").mkdir()
    checkpoint.save(state(1), tmp_path / "elsewhere" / NEWEST)
    for name in (NEWEST, NEWEST + ".sha256"):
        os.replace(tmp_path / "elsewhere" / name, tmp_path / name)
    os.utime(tmp_path / "best.pth", ns=(1, 1))
    assert checkpoint.newest(tmp_path) == tmp_path / "best.pth"
    checkpoint.copy(tmp_path / "best.pth", tmp_path / PREVIOUS)
    assert checkpoint.newest(tmp_path) == tmp_path / PREVIOUS
    flip_a_bit(tmp_path / PREVIOUS)
    (tmp_path / "best.pth").unlink()
    assert checkpoint.newest(tmp_path) == tmp_path / NEWEST
    assert len(warnings) == 1 and PREVIOUS in warnings[0]


def test_a_save_keeps_the_one_before_if_that_holds_more_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 6):
        checkpoint.save(state(step), tmp_path / NEWEST)
    (tmp_path / "elsewhere").mkdir()
    checkpoint.save(state(1), tmp_path / "elsewhere" / NEWEST)
    for name in (NEWEST, NEWEST + ".sha256"):
        os.replace(tmp_path / "elsewhere" / name, tmp_path / name)
    checkpoint.save(state(6), tmp_path / NEWEST)  # resumed from PREVIOUS, at step 5
    assert_holds(tmp_path / PREVIOUS, 5)
    assert_holds(tmp_path / NEWEST, 6)


def test_the_step_of_a_checkpoint_is_read_without_its_tensors(tmp_path: Path) -> None:
    checkpoint.save(state(7), tmp_path / NEWEST)
    assert checkpoint.step_of(tmp_path / NEWEST) == 7
    checkpoint.save({"model": {}}, tmp_path / NEWEST)
    assert checkpoint.step_of(tmp_path / NEWEST) is None
    assert checkpoint.step_of(tmp_path / "nowhere.pth") is None


def test_a_reader_of_a_file_that_is_being_replaced_never_finds_it_damaged(tmp_path: Path) -> None:
    checkpoint.save(state(0), tmp_path / NEWEST)
    child = os.fork()
    if child == 0:
        replace = os.replace

        def slow(source: Path, target: Path) -> None:
            replace(source, target)
            time.sleep(0.02)  # between the file and its sidecar

        os.replace = slow
        for step in range(1, 60):
            checkpoint.save(state(step), tmp_path / NEWEST)
        os._exit(0)
    steps = set()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        steps.add(checkpoint.load(tmp_path / NEWEST)["step"])
        newest = checkpoint.newest(tmp_path)
        assert newest is not None
    assert len(steps) > 3


# --- the same run ---------------------------------------------------------------------------------


def test_a_change_is_refused_logged_or_ignored_as_declared(warnings: list[str]) -> None:
    saved, now = {"lr": 0.1, "wd": 0.2, "workers": 1}, {"lr": 0.3, "wd": 0.2, "workers": 2}
    on_resume = {"lr": LOG, "wd": REFUSE, "workers": IGNORE}
    resuming.check_same_run(saved, now, on_resume, Path("c.pth"), {})
    assert warnings == ["resuming with another lr: 0.1 → 0.3"]
    with pytest.raises(UserError, match="other settings: wd: 0.2 → 0.4; give the old"):
        resuming.check_same_run(saved, now | {"wd": 0.4}, on_resume, Path("c.pth"), {})
    assert len(warnings) == 1


def test_a_setting_that_a_checkpoint_lacks_counts_as_its_default(
    warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = ArgumentParser("test")
    add = parser.group("a", on_resume=REFUSE)
    add("--lr", default=0.1)
    add("--loss", default="focal")
    state, parts = _run_state()
    state["args"] = {"lr": 0.1, "batches_per_step": 1}
    loaded: list[Any] = []
    parts.load_state_dict = loaded.append
    now = {"lr": 0.1, "loss": "focal", "batches_per_step": 1}
    path, more = Path("c.pth"), {"parser": parser, "explained": {}, "steps_per_epoch": 1}
    resuming.resume_run(parts, state, path, settings=now, **more)
    assert warnings == [] and loaded == [state]
    with pytest.raises(UserError, match="loss: focal → other"):
        resuming.resume_run(parts, state, path, settings=now | {"loss": "other"}, **more)


def test_changed_data_is_named_in_words_and_not_by_its_hash() -> None:
    explained = {"data": lambda: "training data: images 3 → 2"}
    saved, now = {"data": "a" * 64}, {"data": "b" * 64}
    with pytest.raises(UserError, match="training data: images 3 → 2; give the old") as error:
        resuming.check_same_run(saved, now, resuming.ON_RESUME, Path("c.pth"), explained)
    assert "a" * 64 not in str(error.value) and "b" * 64 not in str(error.value)


# --- a checkpoint of the wrong structure ----------------------------------------------------------


def _run_state(opt: str = "sgd", fp16: bool = False) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """A checkpoint after one step of a small model, and what it has to fit."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    options = {"momentum": 0.9} if opt == "sgd" else {}
    optimizer = kinds[opt](model.parameters(), lr=0.1, **options)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    state = {
        "model": model.state_dict(),
        "ema": None,
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "scaler": scaler.state_dict(),
        "epoch": 0,
        "step": 1,
        "position": 1,
        "window": {"loss": 1.0},
        "evaluations": {0: 0.5},
        "args": {"batches_per_step": 1},
        "categories": [{"id": 1, "name": "a", "label": 1}],
    }
    return state, SimpleNamespace(model=model, optimizer=optimizer, scaler=scaler)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("fp16", [False, True])
def test_a_checkpoint_of_the_same_run_fits(tmp_path: Path, opt: str, fp16: bool) -> None:
    state, parts = _run_state(opt, fp16)
    torch.save(state, tmp_path / "a.pth")
    resuming.require_fitting(checkpoint.load(tmp_path / "a.pth"), parts, tmp_path / "a.pth")


def _change(**parts: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update(parts)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no optimizer": (lambda s: s.pop("optimizer"), "lacks optimizer"),
    "no position": (lambda s: s.pop("position"), "lacks position"),
    "no args": (lambda s: s.pop("args"), "lacks args"),
    "model a list": (_change(model=[1]), "'model' is .* Expected `object`, got `array`"),
    "model of numbers": (
        _change(model={"0.weight": 1}),
        "'model' is .* Expected `Tensor`, got `int`",
    ),
    "ema a number": (_change(ema=3), "'ema' is .* Expected `object | null`, got `int`"),
    "ema of another model": (_change(ema={"x": torch.ones(1)}), "'ema', 5 .* 0.weight is missing"),
    "optimizer a string": (_change(optimizer="sgd"), "'optimizer' is .* got `str`"),
    "optimizer without state": (
        _change(optimizer={"param_groups": []}),
        "'optimizer' is .* missing required field `state`",
    ),
    "optimizer of another model": (
        lambda s: s["optimizer"]["param_groups"][0]["params"].pop(),
        r"'optimizer' is for \[3\] parameters by group, not \[4\]",
    ),
    "optimizer of another kind": (
        lambda s: s.update(optimizer=_run_state("adamw")[0]["optimizer"]),
        "'optimizer' lacks momentum",
    ),
    "momentum of another shape": (
        lambda s: s["optimizer"]["state"][0].update(momentum_buffer=torch.ones(7)),
        r"momentum_buffer 0 of its 'optimizer' is \[7\], not of shape \[3, 2\]",
    ),
    "scaler a list": (_change(scaler=[]), "'scaler' is .* got `array`"),
    "step negative": (_change(step=-1), "'step' is .* Expected `int` >= 0"),
    "epoch not whole": (_change(epoch=0.5), "'epoch' is .* Expected `int`, got `float`"),
    "position a tensor": (_change(position=torch.ones(1)), "'position' is .* got `Tensor`"),
    "step true": (_change(step=True), "'step' is .* got `bool`"),
    "window a list": (_change(window=[1.0]), "'window' is .* got `array`"),
    "evaluations a list": (_change(evaluations=[0.5]), "'evaluations' is .* got `array`"),
    "evaluation a string": (
        _change(evaluations={0: "0.5"}),
        "'evaluations' is .* got `str`",
    ),
    "evaluation of no epoch": (
        _change(evaluations={"0": 0.5}),
        "'evaluations' is .* got `str`",
    ),
    "args a list": (_change(args=["--lr"]), "'args' is .* got `array`"),
    "batches per step 0": (_change(args={"batches_per_step": 0}), "'args' is .* >= 1"),
    "label 0": (
        lambda s: s["categories"][0].update(label=0),
        r"'categories' is .* >= 1 - at `\$\[0\].label`",
    ),
    "data a list": (_change(data=[]), "'data' is .* got `array`"),
    "categories of text": (
        _change(categories=["a"]),
        r"'categories' is .* got `str` - at `\$\[0\]`",
    ),
    "weights of another shape": (
        lambda s: s["model"].update({"1.bias": torch.ones(9)}),
        r"1 tensors differ: 1.bias has the shape \[9\], not \[1\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_of_wrong_structure_is_refused_with_its_name(
    tmp_path: Path, name: str
) -> None:
    change, message = WRONG[name]
    state, parts = _run_state()
    change(state)
    path = tmp_path / "wrong.pth"
    torch.save(state, path)
    with pytest.raises(UserError, match=message) as raised:
        saved = resuming.from_torchvision(checkpoint.load(path), {}, 1, path)
        resuming.require_fitting(saved, parts, path)
    assert str(path) in str(raised.value)


def test_a_checkpoint_without_the_gradient_scale_does_not_fit_fp16(tmp_path: Path) -> None:
    state, _ = _run_state()
    with pytest.raises(UserError, match="'scaler' lacks scale, growth_factor"):
        resuming.require_fitting(state, _run_state(fp16=True)[1], tmp_path / "a.pth")
