"""Warnings about the settings of a run: pytest tests/test_summary.py."""

from __future__ import annotations

import pytest

from runtime.summary import size_warnings


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
    warnings = size_warnings(policy, min_size, max_size)
    assert len(warnings) == is_warned
    if is_warned:
        (text,) = warnings
        assert f"--min-size {min_size} --max-size {max_size}" in text and "leave both" in text
        assert f"in evaluation, to {max_size};" in text
