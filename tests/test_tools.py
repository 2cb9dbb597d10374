"""Every tool explains itself, and data cannot harm what tools print and draw.

python -m pytest tests/test_tools.py
"""

from __future__ import annotations

import ast
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT

from tools import average, check_data, export, predict, visualize
from tools.plots import drawing, eval_plots, run_plots
from utils import UserError

TOOLS = sorted(
    path.stem for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()
)


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_that_is_run_as_a_file_prints_how_to_run_it(name: str) -> None:
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
    with pytest.raises(UserError, match="'anchor' cannot be drawn; choose what to draw: .*anchors"):
        visualize.main(["anchor"])


def test_git_ignores_what_tools_write_by_default() -> None:
    written = [
        average.build_parser().get_default("output"),
        "averaged.pth.sha256",
        export.build_parser().get_default("output"),
        predict.build_parser().get_default("output_dir") / "detections.json",
        visualize.build_parser().get_default("picture"),
        *(f"{step}.png" for step in visualize.STEPS),
        "pipeline_detections.png",
        "report/report.html",
        "comparison/report.html",
        "mydata.png",
    ]
    command = ["git", "check-ignore", "--no-index", *map(str, written)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == list(map(str, written))
    kept = ["git", "check-ignore", "--no-index", "docs/pictures/demo.jpg"]
    assert subprocess.run(kept, cwd=ROOT, capture_output=True).returncode == 1


NAMES = ("$x$ $\\frac{", "two\nlines\x1b[2J", "$$")  # matplotlib fails on the first as mathematics


def test_a_figure_is_saved_into_a_new_folder_or_refused_in_one_line(tmp_path: Path) -> None:
    figure = drawing.new_figure(1, 1)
    drawing.save(figure, tmp_path / "a" / "b" / "plot.PNG")
    assert (tmp_path / "a" / "b" / "plot.PNG").stat().st_size > 100
    for name, message in (
        ("plot", "end its name in .png"),
        ("plot.txt", "end its name in .png"),
        ("a/b/plot.PNG/c.png", "cannot create .*plot.PNG"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            drawing.save(figure, tmp_path / name)
        assert "\n" not in str(raised.value)


def test_a_class_name_with_dollars_is_drawn_as_it_is(tmp_path: Path) -> None:
    label_map = [{"id": i, "name": name, "label": i} for i, name in enumerate(NAMES, start=1)]
    per_class = [
        {"name": c["name"], "label": c["label"], "boxes": 2, "AP": 0.5, "AP50": 0.5}
        | {"F1": 0.5, "confidence": 0.5}
        for c in label_map
    ]
    ramp = np.linspace(0, 1, 101)
    curves = {"labels": np.arange(1, 4), "recall": ramp, "confidence": ramp}
    curves |= {"precision": np.tile(ramp, (3, 3, 1)), "f1": np.tile(ramp, (3, 1))}
    figures = [
        eval_plots.draw_curves(per_class, curves, 0.5, label_map),
        eval_plots.draw_class_ap(per_class, label_map),
        eval_plots.draw_confusion(NAMES, np.eye(4, dtype=int), 0.5),
    ]
    run = run_plots.RunRecords(NAMES[0], {}, [{"step": 1, "loss": 1.0, "lr": 1.0}], [], [], [])
    figures.append(run_plots.draw_run_curves([run, run]))
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
    shown = [text.get_text() for text in figures[1].axes[0].get_yticklabels()]
    assert shown == [r"\$x\$ \$\frac{", r"two\nlines\x1b[2J", r"\$\$"]  # \$ is drawn as $

    boxes = np.array([[5.0, 30, 60, 60]] * 3)
    tile = drawing.Tile(torch.zeros(3, 64, 64, dtype=torch.uint8), boxes, [1, 2, 3], NAMES)
    assert drawing.draw_boxes(tile, drawing.class_colours(label_map), 320).shape == (3, 320, 320)


def test_pages_about_data_with_dollars_in_names_are_drawn(
    tiny_shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / NAMES[0]
    shutil.copytree(tiny_shapes, root)
    for path in (root / "annotations").iterdir():
        content = json.loads(path.read_text())
        for category, name in zip(content["categories"], NAMES, strict=True):
            category["name"] = name
        path.write_text(json.dumps(content))
    check_data.main(["--data-path", str(root), "--plot", str(tmp_path / "data.png"), "-j", "1"])
    printed = capsys.readouterr().out
    assert r"two\nlines\x1b[2J" in printed and "\x1b" not in printed
    assert (tmp_path / "data.png").stat().st_size > 10_000

    flags = ["--model", "retinanet_resnet18_fpn", "--min-size", "64", "--max-size", "64"]
    where = ["--data-path", str(root), "--workers", "0", "--picture", str(tmp_path / "batch.png")]
    visualize.main(["batch", *flags, *where, "--batch-size", "2", "--batches", "1"])
    image = str(sorted((root / "val2017").iterdir())[0])
    annotations = str(root / "annotations" / "instances_val2017.json")
    for step in ("assignment", "focal"):
        picture = str(tmp_path / f"{step}.png")
        size = ["--min-size", "64", "--max-size", "64"]
        visualize.main([step, image, "--annotations", annotations, "--picture", picture, *size])


def test_every_loader_worker_ends_with_its_parent() -> None:
    files = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("tools/**/*.py")]
    loaders = [
        (path.name, call)
        for path in files
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func).endswith(("DataLoader", "_PatientLoader"))
    ]
    assert {name for name, _ in loaders} >= {"loading.py", "predict.py"}
    for name, call in loaders:
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("worker_init_fn") == "ignore_stop_signals", name
