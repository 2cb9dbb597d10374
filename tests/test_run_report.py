"""Reports show the records of a run: pytest tests/test_run_report.py.

The page is opened in a real browser where there is one: Debian's `chromium`.
"""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coco_eval import METRICS
from tools import report
from tools.plots import html_report, run_plots

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
NASTY = "<script>alert('x')</script> & \"quotes\""


def write_run(folder: Path, steps: int = 8, ap: float = 0.4, **settings: Any) -> Path:
    """Write what train.py leaves, of a run that was resumed after steps 3 and 6."""
    folder.mkdir(parents=True)
    training = [
        {"step": step, "epoch": (step - 1) // 4, "loss": 2 / step, "classification": 1.5 / step}
        | {"bbox_regression": 0.5 / step, "lr": 0.01, "images_per_second": 30.0 + step}
        | {"data_time_share": 0.01, "memory_mb": 800.0}
        for step in range(1, steps + 1)
    ]
    evaluations = [
        {"step": 4 * (epoch + 1), "epoch": epoch} | {name: ap * (epoch + 1) / 2 for name in METRICS}
        for epoch in range(steps // 4)
    ]
    records = sorted([*training, *evaluations], key=lambda record: record["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    about = {
        "args": {"lr": 0.01, "model": "retinanet_resnet18_fpn", "output_dir": str(folder)}
        | settings,
        "categories": [{"id": 1, "name": NASTY, "label": 1}],
        "versions": {"torch": "2.14.1"},
        "summary": {"data": "16 images", "classes": f"1: {NASTY}"},
    }
    (folder / "args.json").write_text(json.dumps(about))
    (folder / "log.txt").write_text(
        f"10:00:00 {folder} from step 0\n  data 16\n10:00:01 warning: --lr 9 is much\n"
        f"10:01:00 {folder} from step 3\n10:01:01 warning: --lr 9 is much\n"
        f"10:02:00 {folder} from step 6\n"
    )
    return folder


def test_records_are_read_with_the_places_where_a_run_was_resumed(tmp_path: Path) -> None:
    run = run_plots.read_run(write_run(tmp_path / "run"))
    assert run.name == "run" and run.resumed == [3, 6] and run.warnings == ["--lr 9 is much"]
    assert [r["step"] for r in run.training] == list(range(1, 9))
    assert [r["epoch"] for r in run.evaluations] == [0, 1]
    assert run.best == run.evaluations[1]


def lines_of(axes: Any) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def test_curves_show_the_records_and_mark_where_a_run_was_resumed(tmp_path: Path) -> None:
    run = run_plots.read_run(write_run(tmp_path / "run"))
    loss, rate, ap, speed = run_plots.draw_run_curves([run]).axes
    for name in ("loss", "classification", "bbox_regression"):
        assert lines_of(loss)[name] == [record[name] for record in run.training]
    for name in ("AP", "AP50", "AP75"):
        assert lines_of(ap)[name] == [record[name] for record in run.evaluations]
    assert lines_of(rate)["run"] == [0.01] * 8
    assert lines_of(speed)["run"] == [record["images_per_second"] for record in run.training]
    for axes in (loss, rate, ap, speed):
        vertical = [x for line in axes.get_lines() for x in line.get_xdata()[:1]]
        assert [x for x in vertical if x in (3, 6)] == [3, 6]
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()


def test_a_run_that_has_just_begun_is_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=2)
    lines = report.draw(folder)
    assert "  no evaluation yet; train.py makes one every --eval-every epochs" in lines
    assert "None yet" in (folder / "report.html").read_text()
    (folder / "metrics.jsonl").unlink()
    report.draw(folder)
    assert "nothing yet" in [
        t.get_text() for t in run_plots.draw_run_curves([run_plots.read_run(folder)]).axes[0].texts
    ]


def test_runs_are_laid_over_each_other_with_what_differs(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", seed=0, lr=0.01),
        write_run(tmp_path / "b", ap=0.6, seed=0, lr=0.02),
    ]
    report.compare(folders, tmp_path / "both")
    page = (tmp_path / "both" / "report.html").read_text()
    runs = [run_plots.read_run(folder) for folder in folders]
    assert run_plots.settings_that_differ(runs) == {"lr": ["0.01", "0.02"]}
    assert "<td>lr</td><td>0.01</td><td>0.02</td>" in page
    assert "<td>a</td><td>0.400</td>" in page and "<td>b</td><td>0.600</td>" in page
    for axes in run_plots.draw_run_curves(runs).axes:
        assert {"a", "b"} <= set(lines_of(axes))
        colours = [line.get_color() for line in axes.get_lines() if line.get_label() in ("a", "b")]
        assert len(set(colours)) == 2


def test_the_page_is_one_file_and_text_stays_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    run = run_plots.read_run(folder)
    run_plots.draw_run_curves([run]).savefig(folder / "curves.png")
    row = {"name": NASTY, "AP": 0.5, "AP50": 0.5, "AP75": 0.5, "AR": 0.5, "boxes": 3}
    analysis = {"per_class": [row | {"detections": 9}]}
    page = folder / "report.html"
    html_report.write_report(page, [run], {folder / "curves.png": NASTY}, analysis)
    text = page.read_text()
    assert "<script" not in text and text.count(html.escape(NASTY)) >= 3
    for source in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert source.startswith("data:image/")
    assert "url(" not in text and "@import" not in text


MEASURE = """
const found = [];
window.onload = () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    const images = [...page.images];
    found.push({
      width: frame.clientWidth, needed: root.scrollWidth, height: root.scrollHeight,
      images: images.length, shown: images.filter(i => i.naturalWidth > 0).length,
      widest: Math.max(...images.map(i => i.getBoundingClientRect().width)),
      background: getComputedStyle(page.body).backgroundColor,
      ink: getComputedStyle(page.body).color,
    });
  }
  document.body.innerHTML = `<pre>measured ${JSON.stringify(found)}</pre>`;
};
"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Open a page at 400 and 1400 px: `browse(page, dark)` gives measures and console errors."""
    if BROWSER is None:
        pytest.skip("there is no chromium here")

    def open_page(page: Path, dark: bool) -> tuple[list[dict[str, Any]], list[str]]:
        content = html.escape(page.read_text(), quote=True)
        frames = "".join(
            f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{content}"></iframe>'
            for width in (400, 1400)
        )
        wrapper = page.with_name("wrapper.html")
        scheme = '<meta name="color-scheme" content="light dark">'
        wrapper.write_text(
            f'<!doctype html><meta charset="utf-8">{scheme}<script>{MEASURE}</script>{frames}'
        )
        command = [
            BROWSER or "",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
            "--window-size=1500,2000",
            "--enable-logging=stderr",
            "--virtual-time-budget=10000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--dump-dom",
            wrapper.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        (measured,) = re.findall(r"<pre>measured (\[.*\])</pre>", done.stdout)
        errors = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        return json.loads(html.unescape(measured)), errors

    return open_page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with a long name, wide tables and two pictures."""
    folder = write_run(tmp_path_factory.mktemp("page") / ("a_long_name_" * 6))
    run = run_plots.read_run(folder)
    run_plots.draw_run_curves([run]).savefig(folder / "curves.png")
    shutil.copy(folder / "curves.png", folder / "again.png")
    row = {"name": "c" * 60, "AP": 0.5, "AP50": 0.5, "AP75": 0.5, "AR": 0.5, "boxes": 3}
    pictures = {folder / "curves.png": "curves", folder / "again.png": "once more"}
    analysis = {"per_class": [row | {"detections": 9}] * 3}
    html_report.write_report(folder / "report.html", [run], pictures, analysis)
    return folder / "report.html"


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_all_of_it_at_any_width(
    dark: bool, page: Path, browse: Callable[..., Any]
) -> None:
    measured, errors = browse(page, dark)
    assert errors == []
    assert [found["width"] for found in measured] == [400, 1400]
    for found in measured:
        assert found["images"] == found["shown"] == 2
        assert found["needed"] <= found["width"] and found["widest"] <= found["width"]
        assert found["height"] > 900
        assert (brightness(found["background"]) < 100) == dark
        assert abs(brightness(found["ink"]) - brightness(found["background"])) > 150


def test_the_browser_check_detects_a_broken_page(
    page: Path, tmp_path: Path, browse: Callable[..., Any]
) -> None:
    wrong = tmp_path / "wrong.html"
    bad = '<img src="nowhere.png"><div style="width:2000px">wide</div>'
    script = "<script>console.error('it went wrong')</script>"
    wrong.write_text(page.read_text().replace("<h2>", bad + script + "<h2>", 1))
    measured, errors = browse(wrong, False)
    for found in measured:
        assert found["shown"] == found["images"] - 1 and found["needed"] > found["width"]
    assert any("it went wrong" in line for line in errors)
