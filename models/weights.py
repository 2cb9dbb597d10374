"""Weights from files and from torchvision, loaded into a detector by class name.

Weights are read as tensors and plain types only (`weights_only=True`), which torchvision's own
loading does not ensure.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from utils import UserError, load_tensors, logger, printable, require_stated_hash

LabelMap = Sequence[Mapping[str, Any]]  # {"name", "label"} of each class; 0 is the background

# torchvision trained these with a FrozenBatchNorm2d that had no eps (pytorch/vision#2933).
ZERO_EPS = (
    detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1,
    detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
)
# Parameters whose rows belong to classes: first of RetinaNet, FCOS and SSD, then of Faster R-CNN.
CLASS_ROWS = re.compile(
    r"^head\.classification_head\.(cls_logits|module_list\.\d+(\.1)?)\.(weight|bias)$"
    r"|^roi_heads\.box_predictor\.(cls_score|bbox_pred)\.(weight|bias)$"
)


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and what is known about their source."""

    source: str
    state: Mapping[str, Tensor]
    label_map: LabelMap | None = None
    published: models.WeightsEnum | None = None
    settings: Mapping[str, Any] | None = None  # flags of the run that wrote the checkpoint


def read_weights(source: str, flag: str) -> Weights:
    """Read weights from a file, or under a torchvision name from torch's cache or the network.

    A file is a plain state dict or a checkpoint; averaged weights (EMA) are preferred.

    Raises:
        UserError: names `flag`, the file, and where to put it; or the tensors that are not finite.
    """
    name, path = f"{flag} {source}", Path(source)
    if path.is_file():
        require_stated_hash(path, name)
        content = load_tensors(path, name)
        state = _state_of(content, name)
        if content.get("ema"):
            logger.info("%s: the averaged weights (EMA) are taken", name[2:])
        same_file = [w for w in published_weights() if Path(w.url).name == path.name]
        published = same_file[0] if same_file else None
        label_map = content.get("categories", _classes_of(published))
        return Weights(source, state, label_map, published, content.get("args"))
    try:
        published = models.get_weight(source)
    except (AttributeError, KeyError, ValueError):
        raise UserError(
            f"{name}: neither a file nor the name of torchvision weights, such as "
            + ", ".join(_similar_names(source))
        ) from None
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(published.url).name
    try:
        state = published.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError) as error:
        raise UserError(
            f"{name}: {cached.name} is not in {cached.parent} and cannot be downloaded ({error}); "
            "put the file there, or give its path instead of the name"
        ) from None
    except Exception as error:  # any bytes can be in the cached file, too
        raise UserError(
            f"{name}: {cached} is damaged ({str(error)[:200]}); delete it to download it again"
        ) from None
    _require_finite(state, name)
    return Weights(source, state, _classes_of(published), published)


def published_weights() -> dict[models.WeightsEnum, str]:
    """Return torchvision's weights of whole detectors, with the name of the model of each."""
    names = models.list_models(module=detection)
    return {weights: name for name in names for weights in models.get_model_weights(name)}


def _similar_names(source: str) -> list[str]:
    """Return the names of torchvision weights that are most like `source`, the best first."""
    detectors = models.list_models(module=detection, exclude=["maskrcnn*", "keypointrcnn*"])
    builders = [*models.list_models(module=models), *detectors]
    names = {str(weights) for name in builders for weights in models.get_model_weights(name)}
    similar = difflib.get_close_matches(source, sorted(names), n=3)
    return similar or ["ResNet50_Weights.IMAGENET1K_V1"]


def _classes_of(published: models.WeightsEnum | None) -> LabelMap | None:
    if published is None or published not in published_weights():
        return None
    names = enumerate(published.meta["categories"])
    return [{"name": name, "label": label} for label, name in names if name != "N/A"]


def _state_of(content: Mapping[str, Any], source: str) -> Mapping[str, Tensor]:
    """Return the weights to evaluate in a checkpoint or plain state dict: averaged ones if any.

    Raises:
        UserError: with the first names, if they are not tensors by name or not finite.
    """
    state = content.get("ema") or content.get("model") or content
    if not isinstance(state, dict):
        raise UserError(f"{source}: its weights are a {type(state).__name__}, not tensors by name")
    wrong = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong or not state:
        problem = f"{', '.join(wrong[:3])} is no tensor" if wrong else "it is empty"
        raise UserError(f"{source}: not weights, which are tensors by name: {problem}")
    _require_finite(state, source)
    return state


def _require_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError, with the first names, for NaN or infinity: such a detector finds nothing."""
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        more = ", …" if len(broken) > 3 else ""
        raise UserError(
            f"{source}: {len(broken)} of {len(state)} tensors are not finite "
            f"({', '.join(broken[:3])}{more}); take an earlier checkpoint"
        )


def load_trained(model: nn.Module, content: Mapping[str, Any], source: str) -> None:
    """Load a checkpoint or a plain state dict to evaluate; averaged weights are preferred.

    Raises:
        UserError: if it is of another architecture or number of classes, or not finite.
    """
    _load(model, _state_of(content, f"--resume {source}"), f"--resume {source}")


def _load(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    shapes, expected = ({k: v.shape for k, v in s.items()} for s in (state, model.state_dict()))
    wrong = [k for k in expected | shapes if shapes.get(k) != expected.get(k)]
    # Frozen batch normalisation counts no batches, and is the same as the other for inference.
    wrong = [key for key in wrong if not key.endswith("num_batches_tracked")]
    if wrong:
        raise UserError(
            f"{source} does not fit --model and the classes: {len(wrong)} tensors are missing, "
            f"unknown or of another shape, such as {', '.join(wrong[:3])}"
        )
    model.load_state_dict(state, strict=False)


def load_weights(model: nn.Module, weights: Weights, label_map: LabelMap) -> list[str]:
    """Load a whole detector's weights; class scores go to the classes of the same name.

    Classes that the weights do not know keep their initialisation (for RetinaNet the focal prior).
    Weights without class names must have the same number of classes.

    Returns:
        The names of the classes in `label_map` that are new.

    Raises:
        UserError: if the weights are those of another architecture.
    """
    expected, state, new = model.state_dict(), dict(weights.state), []
    if weights.label_map is not None:
        old_labels = {"__background__": 0, **{c["name"]: c["label"] for c in weights.label_map}}
        new = [c["name"] for c in label_map if c["name"] not in old_labels]
        pairs = [(old_labels[c["name"]], c["label"]) for c in label_map if c["name"] in old_labels]
        size = max(category["label"] for category in label_map) + 1
        for key in filter(CLASS_ROWS.search, state.keys() & expected.keys()):
            rows = expected[key]
            if len(state[key]) % (len(rows) // size) == 0:  # otherwise loading it refuses
                state[key] = _move_rows(state[key], rows, [(0, 0), *pairs], size, "bbox" in key)
    _load(model, state, f"--weights {weights.source}")
    if weights.published in ZERO_EPS:
        # Move the eps that these weights never had into the variance: the same function, and one
        # that a plain torchvision model computes from our checkpoints too.
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.running_var -= module.eps
    logger.info("weights %s: %d tensors loaded", weights.source, len(state))
    _log_classes(weights.label_map, label_map)
    return new


def _move_rows(
    old: Tensor, fresh: Tensor, pairs: list[tuple[int, int]], num_classes: int, class_first: bool
) -> Tensor:
    """Return `fresh` with the rows of known classes from `old`; `pairs` are (old, new) labels."""
    groups = len(fresh) // num_classes  # anchors per cell, or coordinates for `class_first`
    # With the same classes all rows are kept, also those of labels without a name.
    is_same = old.shape == fresh.shape and all(before == after for before, after in pairs)
    moved = old.clone() if is_same else fresh.clone()
    axis, shape = (0, (-1, groups)) if class_first else (1, (groups, -1))
    old_rows, rows = (x.unflatten(0, shape).movedim(axis, 0) for x in (old, moved))
    for before, after in pairs:
        rows[after] = old_rows[before]
    return moved


def _log_classes(old: LabelMap | None, new: LabelMap) -> None:
    if old is None:
        logger.info("  they name no classes: scores are copied in the order of the labels")
        return
    # In order; torchvision's names begin with the background.
    old_names, new_names = ([c["name"] for c in classes if c["label"]] for classes in (old, new))
    for what, names in (
        ("copied by name", [name for name in new_names if name in old_names]),
        ("initialised, not in the weights", [n for n in new_names if n not in old_names]),
        ("skipped, not in the data", [n for n in old_names if n not in new_names]),
    ):
        if names:
            shown = ", ".join(map(printable, names[:10])) + (", …" if len(names) > 10 else "")
            logger.info("  class scores %s: %d (%s)", what, len(names), shown)


def compare_anchors(
    model: nn.Module,
    weights: Weights,
    sizes: Sequence[float] | None,
    ratios: Sequence[float] | None,
) -> None:
    """Warn if a run trained `weights` with other anchors than those of `model`.

    Raises:
        UserError: if the number of anchors per cell differs, for a model of the same architecture.
    """
    settings = weights.settings or {}
    for flag, now in (("anchor_sizes", sizes), ("anchor_ratios", ratios)):
        before, after = settings.get(flag), None if now is None else list(now)
        if settings and before != after:
            texts = ("default" if v is None else " ".join(map(str, v)) for v in (before, after))
            logger.warning(
                "warning: %s was trained with --%s %s, not %s; boxes begin at another size",
                *(weights.source, flag.replace("_", "-"), *texts),
            )
    key, expected = "head.regression_head.bbox_reg.weight", model.state_dict()
    heads = [{k for k in state if k.startswith("head.")} for state in (expected, weights.state)]
    if key in expected and heads[0] == heads[1] and len(expected[key]) != len(weights.state[key]):
        raise UserError(
            f"--weights {weights.source} have {len(weights.state[key]) // 4} anchors per cell, and "
            f"--anchor-ratios make {len(expected[key]) // 4}; give as many ratios as they were "
            "trained with, or train from --weights-backbone"
        )
