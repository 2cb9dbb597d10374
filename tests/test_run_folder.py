"""If a write of rank 0 fails, every process fails: pytest tests/test_run_folder.py."""

import contextlib
import json
import os
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from helpers import CPU, TINY, make_run

import train as train_script
from data import coco_arrays, coco_json
from runtime import checkpoint, resuming, summary
from runtime import run_folder as run
from runtime.distributed import join_process_group
from runtime.flags import LOG, REFUSE
from runtime.optimization import build_optimizer
from runtime.records import read_json_lines
from utils import UserError


def _block(path: Path) -> None:
    """Let no file be written to `path`, not even by root."""
    path.mkdir()
    (path / "file").touch()


def _write_everything(rank: int, world_size: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join_process_group("cpu") as processes:
        seen = {}
        actions = {
            "metrics": ("metrics.jsonl", lambda r: r._record({"loss": 1.0})),
            "best": ("best.pth", lambda r: r.record_evaluation({"AP": 0.5})),
            "marker": ("preempted", lambda r: r.finish()),
        }
        for name, (blocked, act) in actions.items():
            run_folder = folder / name
            if processes.is_main:
                run_folder.mkdir()
                checkpoint.save({"step": 3}, run_folder / checkpoint.NEWEST)
                _block(run_folder / blocked)
            processes.barrier()
            try:
                act(make_run(run_folder, processes))
                seen[name] = "nothing"
            except UserError as error:
                seen[name] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(seen))


def test_a_write_that_fails_on_rank_0_raises_the_same_error_on_all(tmp_path: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    mp.spawn(_write_everything, (2, port, tmp_path), 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for name, blocked in (
        ("metrics", "metrics.jsonl"),
        ("best", "best.pth"),
        ("marker", "preempted"),
    ):
        assert first[name].startswith(f"cannot write {tmp_path / name / blocked}")
        assert not list((tmp_path / name).glob("*.tmp"))


@pytest.mark.parametrize("opt, momentum, copies", [("sgd", 0.9, 2), ("sgd", 0, 1), ("adamw", 0, 3)])
def test_a_checkpoint_has_the_size_that_the_setup_says(
    tmp_path: Path, opt: str, momentum: float, copies: int
) -> None:
    one = make_run(tmp_path)
    one.state.model = model = torch.nn.Linear(1000, 1000)
    one.state.optimizer = optimizer = build_optimizer(
        model, 0.1, opt=opt, momentum=momentum, wd=0, norm_weight_decay=None
    )
    size = summary.checkpoint_bytes(one.state)
    assert size == pytest.approx(4_004_000 * copies, rel=0.01)
    model(torch.zeros(1, 1000)).sum().backward()
    optimizer.step()
    content = {"step": 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.save(content, tmp_path / checkpoint.NEWEST)
    assert size == pytest.approx((tmp_path / checkpoint.NEWEST).stat().st_size, rel=0.01)


def test_the_setup_has_the_disk_use_and_warns_if_it_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, settings = 8_000_000, make_run(tmp_path).settings
    (tmp_path / checkpoint.NEWEST).write_bytes(bytes(size))

    def use(gigabytes_free: float, **changed: Any) -> tuple[str, list[str]]:
        usage = SimpleNamespace(free=int(gigabytes_free * 1e9))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        return summary.disk_use(tmp_path, settings | changed, size, steps_per_epoch=5)

    text, warnings = use(1)  # 3 epochs and 3 others of 8 MB
    assert text.startswith("3 model_EPOCH.pth and 3 more") and "0.048 GB; 1 GB free" in text
    assert warnings == []
    (warning,) = use(0.045)[1]  # 56 MB at most, less the 8 MB that are there
    assert "--keep-checkpoints" in warning and str(tmp_path) in warning
    text, warnings = use(0.045, keep_checkpoints=1)
    assert text.startswith("1 model_EPOCH.pth") and warnings == []
    assert use(0.045, max_steps=9)[0].startswith("1 model_EPOCH.pth")


def _train(data: Path, folder: Path, *flags: object) -> str:
    """Train by `main` on 16 images in two steps an epoch; return the log of the whole run."""
    words = ["--data-path", data, *TINY, "--batch-size", "8", "--output-dir", folder, *flags]
    assert train_script.main(train_script.parse_args([str(word) for word in words])) == 0
    return (folder / "log.txt").read_text()


def test_a_run_stops_when_ap_stops_rising_and_a_resumed_one_at_the_same_step(
    tiny_shapes: Path, tmp_path: Path
) -> None:
    # Nothing is that confident after eight steps, so that AP is 0 and the first epoch is the best.
    flags = ("--epochs", "9", "--patience", "2", "--score-thresh", "0.99", "--resume", "auto")
    reason = "no better AP in 2 evaluations (--patience 2); the best is 0.000 of epoch 0, in best"
    whole, stopped, other = (tmp_path / name for name in ("whole", "stopped", "other"))
    text = _train(tiny_shapes, whole, *flags)
    assert f"ended after step 6: {reason}" in text
    assert "9 epochs of 2 steps, at most: until 2 evaluations bring no better AP" in text

    assert reason not in _train(tiny_shapes, stopped, *flags, "--max-steps", "5")
    # Step 5 is in the third epoch: another folder knows of two evaluations by the checkpoint only.
    copy = ("--resume", stopped / checkpoint.NEWEST)
    assert f"ended after step 6: {reason}" in _train(tiny_shapes, other, *flags, *copy)
    assert f"ended after step 6: {reason}" in _train(tiny_shapes, stopped, *flags)
    for folder in (whole, stopped):
        records = read_json_lines(folder / "metrics.jsonl")
        assert [record["epoch"] for record in records if "AP" in record] == [0, 1, 2]
        assert checkpoint.load(folder / checkpoint.NEWEST)["evaluations"] == {0: 0.0, 1: 0.0}
    before = (whole / checkpoint.NEWEST).read_bytes()
    _train(tiny_shapes, whole, *flags)
    assert (whole / checkpoint.NEWEST).read_bytes() == before
    text = _train(tiny_shapes, whole, *flags, "--patience", "3")
    assert "resuming with another patience: 2 → 3" in text and "ended after step 8: no be" in text


def test_a_better_ap_starts_the_count_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, epochs=99, patience=2)
    checkpoint.save({"step": 3}, tmp_path / checkpoint.NEWEST)
    stalled = []
    for epoch, ap in enumerate([0.1, 0.3, 0.2, 0.4, 0.4, 0.3]):
        run.state.epoch = epoch + 1
        run.state.evaluations[epoch] = ap
        stalled.append(run.is_complete())
    assert stalled == [False, False, False, False, False, True]
    assert (run.state.best, run.state.best_epoch) == (0.4, 3)
    run.settings["patience"] = None
    assert not run.is_complete()


def test_patience_without_evaluations_is_refused() -> None:
    words = ["--dataset", "shapes", "--patience", "2", "--eval-every", "0"]
    with pytest.raises(UserError, match="--patience counts evaluations, and --eval-every 0"):
        train_script.check_flags(train_script.parse_args(words))


def test_the_table_says_how_many_samples_an_epoch_has(tiny_shapes: Path, tmp_path: Path) -> None:
    flags = ("--eval-every", "0", "--max-steps", "1", "--repeat-threshold")
    text = _train(tiny_shapes, tmp_path / "1", *flags, "1")
    assert "18 an epoch of 15 images; square in 9 images comes 11 times, circle in 11" in text
    assert "26 epochs of 3 steps\n" in text
    assert "15 an epoch, each image once\n" in _train(tiny_shapes, tmp_path / "0", *flags, "0")
    with pytest.raises(UserError, match="repeat_threshold: 1.0 → 0.5"):
        _train(tiny_shapes, tmp_path / "1", *flags, "0.5", "--resume", "auto")


def test_a_folder_with_a_checkpoint_and_no_args_json_is_not_written_over(tmp_path: Path) -> None:
    checkpoint.save({"step": 3}, tmp_path / checkpoint.NEWEST)
    before = (tmp_path / checkpoint.NEWEST).read_bytes()
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match="holds a run"):
        run.open_folder(tmp_path, None, False, CPU, stack)
    assert (tmp_path / checkpoint.NEWEST).read_bytes() == before
    with contextlib.ExitStack() as stack:
        path = run.open_folder(tmp_path, "auto", False, CPU, stack)
    assert path == tmp_path / checkpoint.NEWEST


def test_a_resume_on_other_data_names_the_difference_without_hashes(tmp_path: Path) -> None:
    def read(number: int) -> coco_arrays.Annotations:
        document = {
            "images": [{"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in (3, 5)],
            "annotations": [
                {"id": i, "image_id": 5, "category_id": 1, "bbox": [1, 1, 3, 3], "iscrowd": 0}
                for i in range(1, number + 1)
            ],
            "categories": [{"id": 1, "name": "cat"}],
        }
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(document))
        return coco_json.read_annotations(path)[0]

    old, new = read(4), read(3)
    summaries = {"data": old.summary(), "val_data": old.summary()}
    saved = {"data": old.fingerprint(), "val_data": old.fingerprint()}
    for remembered, message in (
        (summaries, "training data: boxes 4 → 3, boxes by class: cat 4 → 3, the first difference"),
        ({}, "training data: changed (this checkpoint does not remember"),
    ):
        on_resume = {"data": REFUSE, "val_data": LOG}
        explained = train_script.data_changes(remembered, new, new)
        now = {"data": new.fingerprint(), "val_data": new.fingerprint()}
        with pytest.raises(UserError) as error:
            resuming.check_same_run(saved, now, on_resume, tmp_path, explained)
        assert message in str(error.value) and "another --output-dir" in str(error.value)
        assert not re.search("[0-9a-f]{20}", str(error.value))
