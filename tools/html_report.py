"""One HTML file that says what a run was and how it went: no network, no script, opens from disk.

Pictures are in it as data, colours follow the reader's light or dark setting, and what is too wide
for a narrow window scrolls in its own box.
"""

from __future__ import annotations

import base64
import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coco_json import Annotations
from tools.run_plots import METRICS, RunRecords, settings_that_differ

TYPES = {".png": "image/png", ".jpg": "image/jpeg"}
ROWS = 40  # evaluations and classes that a table shows
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5c5f66; --page: #ffffff;
  --card: #f4f5f7; --line: #d5d8dd; --mark: #d7efe3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e8ea; --soft: #a3a7af; --page: #17181b;
  --card: #222429; --line: #3a3d44; --mark: #1f4636; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 1.2rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, figcaption { color: var(--soft); margin: .3rem 0; }
.scroll + .scroll { margin-top: .8rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-top: 1px solid var(--line);
  white-space: nowrap; }
tr:first-child > * { border-top: 0; }
th { background: var(--card); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.words th { text-align: left; width: 11rem; }
.wrapped td { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
@media (max-width: 600px) { .words th { width: 7.5rem; white-space: normal; } }
.best td { background: var(--mark); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr));
  gap: .7rem; margin: 1rem 0; }
.tile { background: var(--card); border-radius: 6px; padding: .6rem 1rem; }
.tile b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; }
figure .scroll { background: #fff; width: fit-content; max-width: 100%; }
figure img { display: block; max-width: max(100%, 760px); height: auto; padding: 6px; }
.warning { border-left: 4px solid #d55e00; padding: .3rem .8rem; background: var(--card);
  margin: .4rem 0; overflow-wrap: anywhere; }
"""


def write_report(
    path: Path,
    runs: Sequence[RunRecords],
    pictures: Mapping[Path, str],
    analysis: Mapping[str, Any] | None = None,
    data: Mapping[str, Annotations | str] | None = None,
) -> None:
    """Write the report of a run, or of several beside each other.

    Args:
        pictures: files, and what each shows.
        analysis: `analysis.json` of the run's newest evaluation.
        data: annotations by the name of their split, or where they were if they are not there now.
    """
    title = ", ".join(run.name for run in runs)
    parts = [f"<h1>{_text(title)}</h1>"]
    if len(runs) == 1:
        parts += _one(runs[0])
    else:
        parts += _several(runs)
    if analysis is not None:
        parts += ["<h2>By class</h2>", _classes(analysis["per_class"])]
    if data is not None:
        parts += ["<h2>Data</h2>", *_data(data)]
    parts += ["<h2>Pictures</h2>", *(_figure(file, text) for file, text in pictures.items())]
    if len(runs) == 1:
        settings = {k: _value(v) for k, v in sorted(runs[0].about["args"].items())}
        parts += ["<h2>Settings</h2>", _words(settings)]
        parts += ["<h2>Versions</h2>", _words(runs[0].about["versions"])]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body>\n"
    )
    path.write_text(page + "\n".join(parts) + "\n</body></html>\n", encoding="utf-8")


def _one(run: RunRecords) -> list[str]:
    tiles = {"steps done": f"{run.steps:,}"}
    if run.best is not None:
        tiles |= {f"best {name}": f"{run.best[name]:.3f}" for name in ("AP", "AP50", "AP75")}
        tiles["in epoch"] = str(run.best["epoch"])
    if run.training:
        tiles["last loss"] = f"{run.training[-1]['loss']:.3g}"
        tiles["images/s"] = f"{run.training[-1]['images_per_second']:.3g}"
    if run.resumed:
        tiles["resumed"] = f"{len(run.resumed)} ×"
    shown = "".join(f'<div class="tile"><b>{v}</b>{_text(k)}</div>' for k, v in tiles.items())
    parts = [f'<div class="tiles">{shown}</div>']
    parts += [f'<p class="warning">{_text(warning)}</p>' for warning in run.warnings]
    parts += ["<h2>What ran</h2>", _words(run.about["summary"])]
    return [*parts, "<h2>Evaluations</h2>", _evaluations(run)]


def _several(runs: Sequence[RunRecords]) -> list[str]:
    rows = []
    for run in runs:
        best, last = run.best or {}, run.evaluations[-1] if run.evaluations else {}
        loss = f"{run.training[-1]['loss']:.4g}" if run.training else "–"
        numbers = [_number(best.get(name)) for name in ("AP", "AP50", "AP75")]
        rows.append([run.name, *numbers, _number(last.get("AP")), loss, f"{run.steps:,}"])
    heads = ["run", "best AP", "its AP50", "its AP75", "last AP", "last loss", "steps"]
    parts = ["<h2>Results</h2>", _table(heads, rows), "<h2>Settings that differ</h2>"]
    different = settings_that_differ(runs)
    if not different:
        return [*parts, "<p>None.</p>"]
    names = [run.name for run in runs]
    rows = [[name, *values] for name, values in different.items()]
    return [*parts, _table(["setting", *names], rows, kind="wrapped")]


def _evaluations(run: RunRecords) -> str:
    if not run.evaluations:
        return "<p>None yet; train.py evaluates every --eval-every epochs.</p>"
    rows = [
        [str(r["epoch"]), f"{r['step']:,}", *(_number(r.get(name)) for name in METRICS)]
        for r in run.evaluations
    ]
    assert run.best is not None
    best = run.evaluations.index(run.best)
    shown = rows[-ROWS:]
    note = f"<p>The last {ROWS} of {len(rows)}.</p>" if len(rows) > ROWS else ""
    heads = ["epoch", "step", *METRICS]
    return note + _table(heads, shown, best - (len(rows) - len(shown)))


def _classes(per_class: Sequence[Mapping[str, Any]]) -> str:
    names = ("AP", "AP50", "AP75", "AR")
    rows = [
        [row["name"], *(_number(row[n]) for n in names), f"{row['boxes']:,}"]
        + [f"{row['detections']:,}"]
        for row in per_class[:ROWS]
    ]
    note = (
        f"<p>The best {ROWS} of {len(per_class)}; analysis.json has all.</p>"
        if len(per_class) > ROWS
        else ""
    )
    return note + _table(["class", *names, "boxes", "detections"], rows)


def _data(data: Mapping[str, Annotations | str]) -> list[str]:
    there = {name: one for name, one in data.items() if not isinstance(one, str)}
    gone = [
        f"<p>{_text(one)} is not there now.</p>" for one in data.values() if isinstance(one, str)
    ]
    if not there:
        return gone
    heads = ["", "images", "of them empty", "boxes", "boxes per image", "crowds", "median size"]
    rows = []
    for name, one in there.items():
        height, width = np.median(one.sizes, axis=0).round().astype(int) if len(one) else (0, 0)
        empty = int((np.diff(one.offsets) == 0).sum())
        counts = [f"{n:,}" for n in (len(one), empty, len(one.ids))]
        counts += [f"{len(one.ids) / max(1, len(one)):.1f}", f"{one.iscrowd.sum():,}"]
        rows.append([name, *counts, f"{width} x {height}"])
    # The most frequent classes of the first split come first.
    boxes = {name: _boxes_by_class(one) for name, one in there.items()}
    first = next(iter(boxes.values()))
    classes = sorted(dict.fromkeys(c for of in boxes.values() for c in of), key=lambda c: -first[c])
    cut = [f"<p>The {ROWS} most frequent of {len(classes)} classes.</p>"]
    lines = [[c, *(f"{of[c]:,}" for of in boxes.values())] for c in classes[:ROWS]]
    by_class = _table(["class", *(f"{name} boxes" for name in boxes)], lines)
    return [*gone, _table(heads, rows), *(cut if len(classes) > ROWS else []), by_class]


def _boxes_by_class(annotations: Annotations) -> Counter[str]:
    names = [name for _, name in annotations.categories]
    counts = np.bincount(annotations.category_index, minlength=len(names)).tolist()
    return Counter(dict(zip(names, counts, strict=True)))


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], marked: int = -1, kind: str = ""
) -> str:
    head = "".join(f"<th>{_text(text)}</th>" for text in heads)
    lines = []
    for number, row in enumerate(rows):
        best = ' class="best"' if number == marked else ""
        cells = "".join(f"<td>{_text(text)}</td>" for text in row)
        lines.append(f"<tr{best}>{cells}</tr>")
    return _scrolling(f'<table class="{kind}"><tr>{head}</tr>{"".join(lines)}</table>')


def _words(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{_text(name)}</th><td>{_text(_value(value))}</td></tr>"
        for name, value in values.items()
    )
    return _scrolling(f'<table class="words">{rows}</table>')


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    source = f"data:{TYPES[path.suffix]};base64,{data}"
    picture = _scrolling(f'<img alt="{_text(caption)}" src="{source}">')
    return (
        f"<figure>{picture}<figcaption>{_text(path.name)}: {_text(caption)}</figcaption></figure>"
    )


def _scrolling(content: str) -> str:
    """Put what may be too wide into a box that scrolls, by keys, too."""
    return f'<div class="scroll" tabindex="0">{content}</div>'


def _number(value: float | None) -> str:
    return "–" if value is None or value < 0 else f"{value:.3f}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(value: Any) -> str:
    return html.escape(str(value))
