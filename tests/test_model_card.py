"""The model card says what a checkpoint is; its code loads it: pytest tests/test_model_card.py."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from coco_eval import METRICS
from runtime.options import build_parser
from tools import report
from tools.plots import model_card, run_plots


@pytest.fixture(scope="module")
def run(train: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch of which the report was drawn."""
    folder = tmp_path_factory.mktemp("card") / "a run: <1>"
    flags = ("--epochs", "1", "--lr-steps", "1", "--score-thresh", "0", "--opt", "adamw")
    train(*flags, "--output-dir", folder)
    lines = report.draw(folder)
    assert any("MODEL_CARD.md" in line for line in lines)
    return folder


def card_of(run: Path) -> tuple[dict[str, Any], str]:
    """Return the front matter and the text of a card."""
    head, text = re.match(r"---\n(.*?)---\n(.*)", read(run), re.S).groups()  # type: ignore[union-attr]
    return yaml.safe_load(head), text


def read(run: Path) -> str:
    return (run / "MODEL_CARD.md").read_text()


def test_the_front_matter_has_the_numbers_of_the_best_evaluation(run: Path) -> None:
    head, _ = card_of(run)
    results = json.loads((run / "eval" / "epoch_0" / "results.json").read_text())
    assert head["pipeline_tag"] == "object-detection" and head["license"] == "unknown"
    (index,) = head["model-index"]
    assert index["name"] == "a run: <1>"
    (result,) = index["results"]
    assert result["dataset"]["name"] == "instances_val2017.json"
    numbers = {metric["type"]: metric["value"] for metric in result["metrics"]}
    known = {name: results[name] for name in METRICS if results[name] >= 0}
    assert numbers == pytest.approx(known, abs=5e-5) and "AP50" in numbers


def test_the_card_has_classes_numbers_and_a_recipe_that_parses_but_no_path(run: Path) -> None:
    _, text = card_of(run)
    results = json.loads((run / "eval" / "epoch_0" / "results.json").read_text())
    for name in METRICS:
        shown = f"{results[name]:.3f}" if results[name] >= 0 else "–"
        assert f"| {name} | {shown} |" in text
    assert "Classes: circle, square, triangle." in text
    per_class = json.loads((run / "eval" / "epoch_0" / "analysis.json").read_text())["per_class"]
    for row in per_class:
        assert f"| {row['name']} | {row['AP']:.3f} |" in text
    (flags,) = re.findall(r"differ from its defaults:\n\n    (.*)\n", text)
    again = vars(build_parser().parse_args(flags.split()))
    args = json.loads((run / "args.json").read_text())["args"]
    assert {k: again[k] for k in again if k not in model_card.PRIVATE} == {
        k: args[k] for k in again if k not in model_card.PRIVATE
    }
    assert "--opt adamw" in flags
    for private in (args["data_path"], args["output_dir"], str(run.parent)):
        assert private not in read(run)
    assert read(run).count("*to fill in*") == 2 and "*To fill in*" in read(run)
    assert "# a run: &lt;1&gt;" in text  # text from data stays text


def test_the_code_of_the_card_loads_the_checkpoint(
    run: Path, tiny_shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", read(run), re.S)
    assert len([line for line in code.splitlines() if line]) <= 6
    shutil.copy(next((tiny_shapes / "val2017").iterdir()), run / "photo.jpg")
    monkeypatch.chdir(run)
    names: dict[str, Any] = {}
    exec(compile(code, "MODEL_CARD.md", "exec"), names)
    assert [c["name"] for c in names["label_map"]] == ["circle", "square", "triangle"]
    assert names["detections"]["boxes"].shape[1] == 4


def test_the_card_is_of_the_best_evaluation_not_of_the_newest(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run / "eval", folder / "eval")
    shutil.copy(run / "args.json", folder)
    shutil.copy(run / "metrics.jsonl", folder)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    worse = {**records[-1], "epoch": 1, "step": records[-1]["step"] + 1, "AP": -1.0}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(worse) + "\n")
    read_again = run_plots.read_run(folder)
    assert len(read_again.evaluations) == 2
    (line,) = report.write_card(read_again, folder)
    assert "MODEL_CARD.md" in line and "epoch 0, step" in (folder / "MODEL_CARD.md").read_text()
    shutil.rmtree(folder / "eval" / "epoch_0")
    (line,) = report.write_card(read_again, folder)
    assert "epoch_0/analysis.json is missing" in line


def test_names_from_data_cannot_break_the_card() -> None:
    assert model_card._text("a|b\n*c* <x>") == r"a\|b\\n\*c\* &lt;x&gt;"
    front = model_card._front_matter('"x": y', "model", "data: set", {"AP": 0.5})
    (index,) = yaml.safe_load(front.strip("-\n"))["model-index"]
    assert index["name"] == '"x": y' and index["results"][0]["dataset"]["name"] == "data: set"
