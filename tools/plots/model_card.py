"""A model card in Markdown: what a published checkpoint is, how good it is, how to load it.

The front matter is what the Hugging Face hub reads: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coco_eval import METRICS
from runtime import checkpoint
from runtime.options import PATHS, build_parser
from tools.plots.run_plots import RunRecords
from utils import printable

# Rows of a run's summary.
SETUP = ("model", "global batch", "learning rate", "length", "precision", "devices", "versions")
# Flags that say where a run is, which is nobody else's business, or how it was started.
PRIVATE = (*PATHS, "data_path", "output_dir", "resume", "test_only", "device", "workers")
LOADING = f"""\
```python
import torchvision
from models.build import load_detector

model, label_map = load_detector("{checkpoint.BEST}")
image = torchvision.io.decode_image("photo.jpg", "RGB") / 255
(detections,) = model([image])  # "boxes" xyxy in pixels, "scores", "labels"
```"""


def model_card(run: RunRecords, analysis: Mapping[str, Any]) -> str:
    """Return the card of a run's best checkpoint.

    Args:
        run: with at least one evaluation.
        analysis: `analysis.json` of the run's best evaluation.
    """
    best = run.best
    assert best is not None, "a run without an evaluation has no card"
    args, summary = run.setup["args"], run.setup["summary"]
    scores = {name: best[name] for name in METRICS if best[name] >= 0}
    per_class = analysis["per_class"]
    annotations = printable(Path(analysis["data"]["annotations"]).name).replace("`", "'")
    classes = ", ".join(_text(row["name"]) for row in sorted(per_class, key=lambda r: r["label"]))
    numbers = [[name, f"{best[name]:.3f}" if name in scores else "–"] for name in METRICS]
    return "\n".join(
        [
            _front_matter(run.name, args["model"], annotations, scores),
            f"# {_text(run.name)}\n",
            f"A `{args['model']}` that detects {len(per_class)} classes, by RetinaNet reference "
            f"training. AP {best['AP']:.3f} on `{annotations}`.\n",
            "## Data and classes\n",
            f"{_text(summary.get('data', ''))}. Where the images are from: *to fill in*.\n",
            f"Classes: {classes}.\n",
            "## Recipe\n",
            f"The flags of `train.py` that differ from its defaults:\n\n    {_flags(args)}\n",
            _table(["what", "value"], [[k, summary[k]] for k in SETUP if k in summary]),
            "## Results\n",
            f"`{checkpoint.BEST}`, epoch {best['epoch']}, step {best['step']:,}, by COCO's twelve "
            f"numbers on `{annotations}`:\n",
            _table(["metric", "value"], numbers),
            _class_table(per_class),
            "## How to load it\n",
            f"In the folder of the training scripts:\n\n{LOADING}\n",
            "## Limits\n",
            _limits(len(per_class), analysis["confidence"]),
            "## Licence\n",
            "*To fill in*, here and as `license` above: the weights' licence, and what that of the "
            "training images allows.",
        ]
    )


def _front_matter(name: str, model: str, dataset: str, scores: Mapping[str, float]) -> str:
    """Return YAML; every text in it is a JSON string, which YAML reads."""
    metrics = [
        f"    - type: {json.dumps(key)}\n      value: {value:.4f}" for key, value in scores.items()
    ]
    return "\n".join(
        [
            "---",
            "license: unknown",
            "library_name: pytorch",
            "pipeline_tag: object-detection",
            f"tags: [object-detection, {json.dumps(model)}]",
            "model-index:",
            f"- name: {json.dumps(name)}",
            "  results:",
            "  - task:",
            "      type: object-detection",
            "    dataset:",
            f"      name: {json.dumps(dataset)}",
            f"      type: {json.dumps(dataset)}",
            "    metrics:",
            *metrics,
            "---\n",
        ]
    )


def _flags(args: Mapping[str, Any]) -> str:
    """Return the public flags of a run that differ from the defaults, as one command line."""
    words: list[str] = []
    for name, default in build_parser().defaults().items():
        value = args.get(name, default)
        if name in PRIVATE or value == default:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
            continue
        if name in ("weights", "weights_backbone"):
            value = Path(value).name
        values = value if isinstance(value, list) else [value]
        words += [flag, *(shlex.quote(str(v)) for v in values)]
    return printable(" ".join(words)) or "none: all defaults"


def _class_table(per_class: Sequence[Mapping[str, Any]]) -> str:
    names = ("AP", "AP50", "AP75", "AR")
    rows = []
    for row in per_class:
        numbers = ["–" if row[name] < 0 else f"{row[name]:.3f}" for name in names]
        rows.append([row["name"], *numbers, f"{row['boxes']:,}"])
    return _table(["class", *names, "boxes"], rows)


def _limits(num_classes: int, confidence: float) -> str:
    return (
        f"- It knows these {num_classes} classes only, and takes other objects for one of them or "
        "for background.\n"
        "- The numbers are of images like the training images. For other cameras, places or times "
        "measure again.\n"
        "- The checkpoint is the best of its run on these images, so its AP is a little "
        "optimistic.\n"
        f"- Scores are not probabilities. {confidence:.2f} is the threshold with the best mean F1 "
        "here.\n"
        "- What it must not be used for: *to fill in*.\n"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([_text(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _text(value: Any) -> str:
    """Return text from data that stays text in Markdown, on one line."""
    escaped = html.escape(printable(str(value)), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in escaped)
