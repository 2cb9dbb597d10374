"""Warnings about the settings of a run: pytest tests/test_summary.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import utils
from runtime.summary import describe_precision, setup_warnings

# A run that nothing is wrong with.
SETTINGS = {
    "amp": None,
    "batch_size": 16,
    "batches_per_step": 1,
    "clip_grad_norm": None,
    "data_augmentation": "hflip",
    "device": "cpu",
    "max_size": None,
    "min_size": None,
    "opt": "sgd",
    "weights": None,
    "weights_backbone": "a name",
    "workers": 0,
}
MACHINE: dict[str, Any] = {
    "lr": 0.01,
    "processes_here": 8,
    "cores": 32,
    "batch_bytes": 1_000_000,
    "shared_memory": math.inf,
}


def warnings_of(**changes: Any) -> list[str]:
    """Return the warnings about `SETTINGS` on `MACHINE`, with changes to either."""
    machine = MACHINE | {name: changes.pop(name) for name in MACHINE if name in changes}
    assert changes.keys() <= SETTINGS.keys()
    return setup_warnings(SETTINGS | changes, **machine)


def test_a_run_by_the_recipe_has_no_warning() -> None:
    assert warnings_of() == []


@pytest.mark.parametrize(
    "opt, lr, batch, is_from_detector, expected",
    [
        ("sgd", 0.01, 16, False, None),
        ("sgd", 0.01, 2, False, "would be 0.00125"),
        ("sgd", 0.01, 2, True, "would be 0.00125"),
        ("sgd", 0.00125, 2, False, None),
        ("sgd", 0.01, 128, False, "would be 0.08"),
        ("sgd_nesterov", 0.04, 64, False, None),
        ("sgd", 0.001, 16, True, None),
        ("sgd", 0.001, 16, False, "would be 0.01"),
        ("adamw", 1e-4, 16, False, None),
        # What README.md and docs/own_data.md advise from scratch.
        ("adamw", 5e-4, 2, False, None),
        ("adamw", 5e-4, 4, False, None),
        ("adamw", 5e-4, 16, True, None),
        ("adamw", 2e-3, 2, False, "would be 1.25e-05"),
        ("adamw", 0.01, 16, False, "would be 0.0001"),
    ],
)
def test_a_rate_that_does_not_fit_the_batch_is_warned_of(
    opt: str, lr: float, batch: int, is_from_detector: bool, expected: str | None
) -> None:
    weights = "a.pth" if is_from_detector else None
    batches = {"batch_size": 2, "batches_per_step": batch // 2}
    warnings = warnings_of(opt=opt, lr=lr, weights=weights, **batches)
    assert len(warnings) == (expected is not None)
    assert expected is None or expected in warnings[0] and f"batch of {batch}" in warnings[0]


@pytest.mark.parametrize("batch", [2, 16, 128])
def test_sgd_from_scratch_without_clipping_is_warned_of_at_any_batch_size(
    batch: int,
) -> None:
    scratch: dict[str, Any] = {"weights_backbone": None, "batch_size": batch}
    scratch["lr"] = 0.01 * batch / 16
    for opt in ("sgd", "sgd_nesterov"):
        (warning,) = warnings_of(opt=opt, **scratch)
        assert "everything is random" in warning and "--clip-grad-norm 1" in warning
    assert warnings_of(opt="adamw", **scratch | {"lr": 1e-4 * batch / 16}) == []
    assert warnings_of(**scratch | {"weights": "a.pth"}) == []
    assert warnings_of(**scratch | {"weights_backbone": "a name"}) == []
    assert warnings_of(clip_grad_norm=1.0, **scratch) == []


def test_more_workers_than_cores_are_warned_of() -> None:
    assert warnings_of(workers=4, cores=32) == []
    (warning,) = warnings_of(workers=4, cores=16)
    assert "--workers 2 " in warning
    (warning,) = warnings_of(workers=4, cores=4)
    assert "--workers 1 " in warning


def test_slow_precision_is_warned_of() -> None:
    (warning,) = warnings_of(amp="fp16")
    assert "--amp fp16 on a CPU" in warning and "--amp bf16" in warning
    assert warnings_of(amp="bf16") == []
    assert warnings_of(amp="fp16", device="cuda") == []


def test_too_little_shared_memory_is_warned_of_with_the_fix() -> None:
    assert warnings_of(workers=4, shared_memory=96_000_000) == []
    assert warnings_of(workers=0, shared_memory=0) == []
    (warning,) = warnings_of(workers=4, shared_memory=64_000_000)
    assert "64 MB free" in warning and "96 MB" in warning and "--ipc=host" in warning


@pytest.mark.parametrize(
    "policy, min_size, max_size, is_warned",
    [
        ("lsj", 1024, 1024, True),
        ("lsj", 640, 640, True),
        ("lsj", None, None, False),
        ("lsj", 800, 1333, False),
        ("lsj", None, 1024, False),
        ("hflip", 1024, 1024, False),
    ],
)
def test_evaluating_at_the_square_size_of_lsj_is_warned_of(
    policy: str, min_size: int | None, max_size: int | None, is_warned: bool
) -> None:
    warnings = warnings_of(data_augmentation=policy, min_size=min_size, max_size=max_size)
    assert len(warnings) == is_warned
    if is_warned:
        (text,) = warnings
        assert f"--min-size {min_size} --max-size {max_size}" in text and "leave both" in text
        assert f"in evaluation, to {max_size};" in text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "allowed, expected",
    [
        (None, "fp32, with TF32 in convolutions"),
        (True, "fp32, with TF32 in convolutions and matrix products"),
        (False, "fp32, without TF32"),
    ],
)
def test_the_table_names_where_tf32_is_used(allowed: bool | None, expected: str) -> None:
    try:
        utils.set_tf32(allowed)
        assert describe_precision(None, torch.device("cuda")) == expected
    finally:  # PyTorch's defaults
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        torch.set_float32_matmul_precision("highest")
    assert describe_precision("bf16", torch.device("cuda")) == "bf16"
    assert describe_precision(None, torch.device("cpu")) == "fp32"
