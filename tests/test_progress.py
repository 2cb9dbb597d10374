"""The bar, the log and TensorBoard of a run: pytest tests/test_progress.py."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runtime import progress
from runtime.progress import Progress
from runtime.summary import describe_weights, waiting_warnings
from runtime.tensorboard import SIDE

Train = Callable[..., Any]


def run_on_a_terminal(columns: int, flags: str) -> tuple[int, str]:
    """Run train.py on a terminal; return its exit status and all that the terminal got."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "train.py", *flags.split()]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True
    )
    os.close(theirs)
    parts = []
    try:
        while part := os.read(ours, 65536):
            parts.append(part)
    except OSError:  # Linux raises this when the other side is closed
        pass
    os.close(ours)
    return process.wait(), b"".join(parts).decode()


@pytest.fixture(scope="module")
def on_a_terminal(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("terminal") / "run"
    status, text = run_on_a_terminal(
        160,
        f"--data-path {tiny_shapes} --output-dir {folder} --model retinanet_resnet18_fpn "
        "--min-size 64 --max-size 64 --lr 1e-3 --epochs 2 --lr-steps 1 --batch-size 4 "
        "--workers 1 --print-freq 2 --tensorboard",
    )
    assert status == 0, text
    return folder, text


def test_a_terminal_has_a_bar_in_place_of_the_lines(on_a_terminal: tuple[Path, str]) -> None:
    folder, text = on_a_terminal
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    steps = max(record["step"] for record in records)
    per_epoch = steps // 2
    for epoch in (0, 1):
        assert re.search(rf"epoch {epoch} of 2: +\d+%.*{per_epoch}/{per_epoch}", text)
    (last,) = re.findall(r"loss=[^\r]*run left=[^\r]*", text)[-1:]
    for name in ("loss=", "lr=", "img/s=", "data=", "MB=", "run left="):
        assert name in last
    line = re.compile(r"step \d+  epoch \d+  loss ")
    assert not line.search(text)
    log = (folder / "log.txt").read_text()
    assert len(line.findall(log)) == sum("loss" in record for record in records)
    assert "run_left 0:00:00" in log and "epoch_left" in log
    assert "AP" in text and "AP" in log  # all else is in both


def test_the_log_starts_with_the_setup(on_a_terminal: tuple[Path, str]) -> None:
    folder, text = on_a_terminal
    setup = json.loads((folder / "args.json").read_text())["summary"]
    for name, value in setup.items():
        assert re.search(rf"  {name} +{re.escape(value)}", text), name
    assert {"data", "classes", "model", "global batch", "learning rate", "precision"} <= set(setup)
    assert {"devices", "versions", "git revision"} <= set(setup)


def test_tensorboard_gets_scalars_and_sample_images(on_a_terminal: tuple[Path, str]) -> None:
    folder, _ = on_a_terminal
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    losses = [(r["step"], r["loss"]) for r in records if "loss" in r]
    written = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in written] == [step for step, _ in losses]
    assert [value for _, value in written] == pytest.approx([value for _, value in losses])
    pictures = {f"{split}/{i}" for split in ("training", "validation") for i in range(4)}
    assert set(events.Tags()["images"]) == pictures
    image = events.Images("training/0")[0]
    # Enlarged from 64 pixels, or the labels could not be read.
    assert max(image.width, image.height) == SIDE and len(image.encoded_image_string) > 1000
    names = {name for record in records for name in record} - {"step", "epoch"}
    groups = {tag.split("/")[0] for tag in events.Tags()["scalars"]}
    assert groups == {"train", "val", "speed"} and len(events.Tags()["scalars"]) == len(names)


def test_tensorboard_shows_each_step_once_after_a_crash(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = ("--output-dir", folder, "--resume", "auto", "--tensorboard", "--eval-every", "0")
    train(*flags, "--checkpoint-every", "2", "--max-steps", "4")
    for name in ("checkpoint.pth", "checkpoint.pth.sha256"):
        (folder / name).unlink()  # as if it had been killed before the save at step 4
    train(*flags, "--max-steps", "5")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_a_terminal_without_a_width_gets_lines(tiny_shapes: Path, tmp_path: Path) -> None:
    status, text = run_on_a_terminal(
        0,
        f"--data-path {tiny_shapes} --output-dir {tmp_path / 'run'} --model retinanet_resnet18_fpn "
        "--min-size 64 --max-size 64 --print-freq 1 --max-steps 1 --workers 0",
    )
    assert status == 0, text
    assert re.search(r"step 1  epoch 0  loss ", text) and "%|" not in text


def test_time_left_is_that_of_the_images_left() -> None:
    shown = Progress(steps_per_epoch=10, epochs=3, global_batch=16)
    # 16 images a step at 4 images a second: 4 seconds a step.
    assert shown.time_left(4, 4.0) == {"epoch_left": "0:00:24", "run_left": "0:01:44"}
    assert shown.time_left(10, 4.0) == {"epoch_left": "0:00:00", "run_left": "0:01:20"}
    assert shown.time_left(31, 4.0)["run_left"] == "0:00:00"  # --epochs was lowered


def test_the_bar_tells_the_time_left_from_the_second_step_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter((100.0, 103.0, 110.0))
    monkeypatch.setattr(progress, "is_terminal", lambda stream: True)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    shown = Progress(steps_per_epoch=10, epochs=3, global_batch=16)
    shown.step(4)
    assert shown.bar is not None and not shown.bar.postfix
    shown.step(5)  # 3 seconds a step, 25 steps
    assert shown.bar.postfix == "run left=0:01:15"
    shown.step(6)  # 10 seconds for two steps
    assert shown.bar.postfix == "run left=0:02:00"
    shown.close()


def test_the_setup_names_the_weights(on_a_terminal: tuple[Path, str]) -> None:
    folder, text = on_a_terminal  # SGD from scratch
    assert re.search(r"  weights +none: everything random", text)
    assert text.count("warning: everything is random and sgd does not clip") == 1
    assert describe_weights("a.pth", "b.pth", 0) == "a.pth, of the detector"
    backbone = "b.pth, of the backbone; the rest is random"
    assert describe_weights(None, "b.pth", 0) == backbone
    assert describe_weights(None, "b.pth", 7) == f"of step 7; at the start {backbone}"


def test_waiting_for_data_is_warned_of_with_a_number_of_workers() -> None:
    assert waiting_warnings(0.2, 4) == []
    (warning,) = waiting_warnings(0.5, 4)
    assert "50%" in warning and "--workers at least 8 " in warning
    (warning,) = waiting_warnings(0.3, 0)
    assert "--workers as many as there are cores" in warning
