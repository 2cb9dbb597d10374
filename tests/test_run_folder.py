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
from helpers import CPU, make_run

import train as train_script
from data import coco_arrays, coco_json
from runtime import checkpoint, resuming, summary
from runtime import run_folder as run
from runtime.distributed import join_process_group
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


def test_the_setup_has_the_disk_use_and_warns_if_it_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_run(tmp_path)
    model = torch.nn.Linear(1000, 1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    one.state.model = model
    model(torch.zeros(1, 1000)).sum().backward()
    size = one._checkpoint_bytes()
    optimizer.step()
    content = {"step": 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.save(content, tmp_path / checkpoint.NEWEST)
    assert size == pytest.approx((tmp_path / checkpoint.NEWEST).stat().st_size, rel=0.01)

    def use(gigabytes_free: float, **changed: Any) -> tuple[str, list[str]]:
        usage = SimpleNamespace(free=int(gigabytes_free * 1e9))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        return summary.disk_use(tmp_path, one.settings | changed, size, steps_per_epoch=5)

    text, warnings = use(1)  # 3 epochs and 3 others of 8 MB
    assert text.startswith("3 model_EPOCH.pth and 3 more") and "0.048 GB; 1 GB free" in text
    assert warnings == []
    (warning,) = use(0.045)[1]  # 56 MB at most, less the 8 MB that are there
    assert "--keep-checkpoints" in warning and str(tmp_path) in warning
    text, warnings = use(0.045, keep_checkpoints=1)
    assert text.startswith("1 model_EPOCH.pth") and warnings == []
    assert use(0.045, max_steps=9)[0].startswith("1 model_EPOCH.pth")


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
        explained = train_script.data_changes(remembered, new, new)
        now = {"data": new.fingerprint(), "val_data": new.fingerprint()}
        with pytest.raises(UserError) as error:
            resuming.check_same_run(saved, now, {"val_data"}, tmp_path, explained=explained)
        assert message in str(error.value) and "another --output-dir" in str(error.value)
        assert not re.search("[0-9a-f]{20}", str(error.value))
