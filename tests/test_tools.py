"""Every tool explains itself, and data cannot harm what tools print and draw.

python -m pytest tests/test_tools.py
"""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from conftest import ROOT

from tools import visualize
from utils import UserError

TOOLS = sorted(
    path.stem for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()
)


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_that_is_run_as_a_file_says_how_to_run_it(name: str) -> None:
    command = [sys.executable, ROOT / "tools" / f"{name}.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"run it as: python -m tools.{name}\n"


@pytest.mark.parametrize("name", TOOLS)
def test_help_of_a_tool_lists_its_flags_and_exits_with_0(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [f"tools.{name}", "--help"])
    status: object = None
    try:
        importlib.import_module(f"tools.{name}").main()
    except SystemExit as end:
        status = end.code
    assert status in (None, 0)
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_visualize_lists_what_it_can_draw(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    visualize.main(argv)
    shown = capsys.readouterr().out
    assert all(name in shown for name in visualize.DRAW)
    with pytest.raises(UserError, match="'anchor' cannot be drawn; say what to draw: .*anchors"):
        visualize.main(["anchor"])
