"""One HTML file that says what a run was and how it went: no network, no script, opens from disk.

Pictures are in it as data, colours follow the reader's light or dark setting, and what is too wide
for a narrow window scrolls in its own box.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coco_eval import METRICS
from tools.plots.run_plots import RunRecords, settings_that_differ

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
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-top: 1px solid var(--line);
  white-space: nowrap; }
tr:first-child > * { border-top: 0; }
th { background: var(--card); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.words th { text-align: left; width: 11rem; }
.best td { background: var(--mark); }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1rem 0; }
.tile { background: var(--card); border-radius: 6px; padding: .6rem 1rem; min-width: 7rem; }
.tile b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; padding: 6px;
  border: 1px solid var(--line); border-radius: 6px; }
.warning { border-left: 4px solid #d55e00; padding: .3rem .8rem; background: var(--card);
  margin: .4rem 0; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class TestEvaluation:
    """What `train.py --test-only` left: a title, its two JSON files, pictures and what each shows.

    It belongs to one checkpoint and any data, so it is no part of a run's own evaluations.
    """

    __test__ = False  # no test of pytest's

    title: str
    results: Mapping[str, float]
    analysis: Mapping[str, Any]
    pictures: Mapping[Path, str]


def write_report(
    path: Path,
    runs: Sequence[RunRecords],
    pictures: Mapping[Path, str],
    analysis: Mapping[str, Any] | None = None,
    test: TestEvaluation | None = None,
) -> None:
    """Write the report of a run, or of several beside each other, or of a test evaluation only.

    Args:
        pictures: files, and what each shows.
        analysis: `analysis.json` of the run's newest evaluation.
    """
    title = ", ".join(run.name for run in runs) or path.resolve().parent.name
    parts = [f"<h1>{_text(title)}</h1>"]
    if len(runs) == 1:
        parts += _one(runs[0])
    elif runs:
        parts += _several(runs)
    if analysis is not None:
        parts += ["<h2>By class</h2>", _classes(analysis["per_class"])]
    if pictures:
        parts += ["<h2>Pictures</h2>", *(_figure(file, text) for file, text in pictures.items())]
    if test is not None:
        parts += _tested(test)
    if len(runs) == 1:
        settings = {k: _value(v) for k, v in sorted(runs[0].setup["args"].items())}
        parts += ["<h2>Settings</h2>", _words(settings)]
        parts += ["<h2>Versions</h2>", _words(runs[0].setup["versions"])]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body>\n"
    )
    path.write_text(page + "\n".join(parts) + "\n</body></html>\n", encoding="utf-8")


def _one(run: RunRecords) -> list[str]:
    last = max((r["step"] for r in (*run.training, *run.evaluations)), default=0)
    tiles = {"optimizer steps done": f"{last:,}"}
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
    parts += ["<h2>What ran</h2>", _words(run.setup["summary"])]
    return [*parts, "<h2>Evaluations</h2>", _evaluations(run)]


def _tested(test: TestEvaluation) -> list[str]:
    data = {name: test.analysis["data"][name] for name in ("images", "annotations")}
    numbers = [_number(test.results.get(name)) for name in METRICS]
    return [
        f"<h2>{_text(test.title)}</h2>",
        _words(data),
        "<p></p>",
        _table(METRICS, [numbers]),
        "<p></p>",
        _classes(test.analysis["per_class"]),
        *(_figure(file, text) for file, text in test.pictures.items()),
    ]


def _several(runs: Sequence[RunRecords]) -> list[str]:
    rows = []
    for run in runs:
        best, last = run.best or {}, run.evaluations[-1] if run.evaluations else {}
        loss = f"{run.training[-1]['loss']:.4g}" if run.training else "–"
        numbers = [_number(best.get(name)) for name in ("AP", "AP50", "AP75")]
        steps = max((r["step"] for r in (*run.training, *run.evaluations)), default=0)
        rows.append([run.name, *numbers, _number(last.get("AP")), loss, f"{steps:,}"])
    heads = ["run", "best AP", "its AP50", "its AP75", "last AP", "last loss", "steps"]
    parts = ["<h2>Results</h2>", _table(heads, rows), "<h2>Settings that differ</h2>"]
    different = settings_that_differ(runs)
    if not different:
        return [*parts, "<p>None.</p>"]
    names = [run.name for run in runs]
    return [*parts, _table(["setting", *names], [[k, *v] for k, v in different.items()])]


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


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], marked: int = -1) -> str:
    head = "".join(f"<th>{_text(text)}</th>" for text in heads)
    lines = []
    for number, row in enumerate(rows):
        kind = ' class="best"' if number == marked else ""
        cells = "".join(f"<td>{_text(text)}</td>" for text in row)
        lines.append(f"<tr{kind}>{cells}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _words(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{_text(name)}</th><td>{_text(_value(value))}</td></tr>"
        for name, value in values.items()
    )
    return f'<div class="scroll"><table class="words">{rows}</table></div>'


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    source = f"data:{TYPES[path.suffix]};base64,{data}"
    return (
        f'<figure><img alt="{_text(caption)}" src="{source}">'
        f"<figcaption>{_text(path.name)}: {_text(caption)}</figcaption></figure>"
    )


def _number(value: float | None) -> str:
    return "–" if value is None or value < 0 else f"{value:.3f}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(value: Any) -> str:
    return html.escape(str(value))
