"""Make docs/retinanet.html, the page to play with, from the anchors and numbers that train.

`interactive.js` holds the arithmetic and what the page does, `interactive.html` its text.
"""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from docs.explain import pictures
from models import retinanet
from models.build import build_model
from models.retinanet import ANCHOR_RATIOS, make_anchor_generator
from tools.plots import method

FOLDER = Path(__file__).parent
ZOOM = 6  # the model's small image is shown this many times as large


def _data_url(image: Tensor, width: int, kind: str, **options: Any) -> str:
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = picture.resize((width, picture.height * width // picture.width))
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def candidates(stages: method.Stages, names: dict[int, str]) -> dict[str, Any]:
    """Return what the page needs of a model's candidates: image, boxes, scores, labels, names."""
    height, width = stages.image.shape[1:]
    found = stages.candidates
    return {
        "image": _data_url(stages.image, width, "png", optimize=True),
        "width": width,
        "height": height,
        "boxes": [[round(v, 2) for v in box] for box in found["boxes"].tolist()],
        "scores": [round(v, 4) for v in found["scores"].tolist()],
        "labels": found["labels"].tolist(),
        "names": names,
    }


def candidates_of(html: str) -> dict[str, Any]:
    """Return the candidates that a page was made with.

    Raises:
        ValueError: if the text is not such a page.
    """
    match = re.search(r"^const DATA = (\{.*\});$", html, re.MULTILINE)
    if match is None:
        raise ValueError("docs/retinanet.html is not a page of docs.explain")
    return json.loads(match[1])["candidates"]


def _data() -> dict[str, Any]:
    scene = pictures.example_scene()
    generator = make_anchor_generator()
    levels = [
        {
            "name": name,
            "rows": rows,
            "columns": columns,
            "spacing": [across, down],
            "base": generator.generate_anchors(list(sizes), list(ANCHOR_RATIOS)).tolist(),
        }
        for name, (rows, columns), (down, across), sizes in zip(
            method.LEVELS, scene.feature_sizes, scene.spacing(), generator.sizes, strict=True
        )
    ]
    model: Any = build_model("retinanet_resnet18_fpn", [{"name": "any", "label": 1}], load=False)
    height, width = scene.image.shape[1:]
    return {
        "width": width,
        "height": height,
        "image": _data_url(scene.image, width // 2, "jpeg", quality=70),
        "levels": levels,
        "boxes": scene.boxes.tolist(),
        "fg": model.proposal_matcher.high_threshold,
        "bg": model.proposal_matcher.low_threshold,
        "alpha": retinanet.ALPHA,
        "prior": method.PRIOR,
        "detections": model.detections_per_img,
    }


def page(found: dict[str, Any]) -> str:
    """Return the HTML page; `found` is what `candidates` returns."""
    data = _data()
    radio = '<label><input type="radio" name="level" value="{}"{}> {}</label>'
    parts = {
        "LEVELS": " ".join(
            radio.format(number, " checked" * (number == 2), level["name"])
            for number, level in enumerate(data["levels"])
        ),
        "WIDTH": str(ZOOM * found["width"]),
        "HEIGHT": str(ZOOM * found["height"]),
        "DATA": json.dumps(data | {"candidates": found}, separators=(",", ":")),
        "SCRIPT": (FOLDER / "interactive.js").read_text(encoding="utf-8").strip(),
    }
    text = (FOLDER / "interactive.html").read_text(encoding="utf-8")
    return re.sub(r"__(\w+?)__", lambda match: parts[match[1]], text)
