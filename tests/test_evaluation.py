"""Evaluating changes nothing, and how makes no difference: pytest tests/test_evaluation.py.

Real detectors look at the shapes of `conftest.tiny_shapes`; torchvision's own models say what a
loss must be.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import detection

import engine
import run as run_module
import train
from coco_eval import CocoEvaluator
from coco_utils import CocoDetection, collate, label_categories, read_annotations
from group_by_aspect_ratio import same_size_batches
from model import build_model, mixed_precision, padded_sizes
from utils import Processes, UserError

CPU = Processes(torch.device("cpu"))
DETECTORS = {  # of every kind that the project builds the smallest
    "retinanet_resnet18_fpn": {"min_size": 64, "max_size": 64},
    "retinanet_resnet50_fpn_v2": {"min_size": 64, "max_size": 64},
    "fcos_resnet50_fpn": {"min_size": 64, "max_size": 64},
    # Large enough to have more boxes than it samples.
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"min_size": 192, "max_size": 192},
    "ssd300_vgg16": {},
    "ssdlite320_mobilenet_v3_large": {},
}
QUICK = [name for name in DETECTORS if name != "ssd300_vgg16"]  # SSDlite is of its class


@pytest.fixture(scope="module")
def data(tiny_shapes: Path) -> CocoDetection:
    annotations, _ = read_annotations(tiny_shapes / "annotations" / "instances_val2017.json")
    assert annotations is not None
    label_map = label_categories(annotations.categories)
    return CocoDetection(tiny_shapes / "val2017", annotations, label_map)


def build(
    data: CocoDetection, name: str = "retinanet_resnet18_fpn", **settings: float
) -> nn.Module:
    torch.manual_seed(0)
    settings = {"score_thresh": 0.0, **DETECTORS[name], **settings}
    return build_model(name, data.label_map, **settings).eval()  # type: ignore[arg-type]


def evaluate(
    model: nn.Module,
    data: CocoDetection,
    batch_size: int = 1,
    reverse: bool = False,
    with_losses: bool = False,
    same_size: bool = True,
) -> engine.Evaluation:
    sizes = padded_sizes(model, data.sizes())
    numbers = same_size_batches(sizes if same_size else np.zeros_like(sizes), batch_size)
    batches = [collate([data[0, i] for i in batch]) for batch in numbers]
    evaluator = CocoEvaluator(data.annotations, data.label_map)
    finished, result = engine.evaluate(
        model, batches[::-1] if reverse else batches, evaluator, CPU, with_losses=with_losses
    )
    assert finished and result is not None
    return result


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_change_neither_the_model_nor_what_it_finds(name: str, data: CocoDetection) -> None:
    model = build(data, name)
    plain = evaluate(model, data)
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    result = evaluate(model, data, with_losses=True)
    assert np.array_equal(result.detections, plain.detections) and len(plain.detections)
    assert {k: result.metrics[k] for k in plain.metrics} == plain.metrics
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes == [False] * len(modes)
    losses = {k: v for k, v in result.metrics.items() if k not in plain.metrics}
    assert losses["val_loss"] > 0 and all(map(math.isfinite, losses.values()))
    parts = [value for key, value in losses.items() if key != "val_loss"]
    assert len(parts) >= 2 and math.fsum(parts) == losses["val_loss"]


@pytest.mark.parametrize("name", QUICK)
def test_losses_do_not_depend_on_batches_and_order(name: str, data: CocoDetection) -> None:
    model = build(data, name)
    if name.startswith("faster"):  # an untrained head says the same of every box it samples
        nn.init.normal_(model.rpn.head.cls_logits.bias)
    results = [
        evaluate(model, data, batch_size, reverse, with_losses=True, same_size=False)
        for batch_size, reverse in ((1, False), (3, True))
    ]
    losses = [{k: v for k, v in r.metrics.items() if k.startswith("val")} for r in results]
    assert losses[0] == losses[1]


def test_the_loss_is_the_mean_of_torchvisions_training_losses(data: CocoDetection) -> None:
    model = build(data)
    with torch.no_grad():  # statistics unlike those of a batch
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 2)
    plain = detection.RetinaNet(copy.deepcopy(model.backbone), 4, min_size=64, max_size=64)
    plain.load_state_dict(model.state_dict())
    plain.train()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    expected: dict[str, list[float]] = {}
    for number in range(len(data)):
        image, target = data[0, number]
        with torch.no_grad():
            losses = plain([image / 255], [target])
        for key, value in losses.items():
            expected.setdefault(f"val_{key}", []).append(float(value))
    metrics = evaluate(model, data, with_losses=True).metrics
    assert len(expected) == 2
    for key, values in expected.items():
        assert metrics[key] == pytest.approx(np.mean(values), rel=1e-5), key


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn_v2", "retinanet_resnet18_fpn"])
def test_training_goes_on_after_losses_were_taken(name: str, data: CocoDetection) -> None:
    # Anchors are kept from one pass to the next: a loss may need them on its way back.
    model = build(data, name)
    evaluate(model, data, with_losses=True)
    kept, original = [], model.compute_loss

    def watched(*inputs: Any) -> dict[str, torch.Tensor]:
        kept.append(inputs[2])
        return original(*inputs)

    model.compute_loss = watched
    image, target = next((i, t) for i, t in (data[0, k] for k in range(7)) if len(t["boxes"]))
    sum(model.train()([image / 255], [target]).values()).backward()
    gradient = model.head.classification_head.cls_logits.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0
    assert len(kept) == 1 and not kept[0].is_inference()


# --- what is compared -----------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: [*b, b[0]]], ids=["less", "twice"])
def test_images_left_out_or_seen_twice_are_refused(
    change: Callable[[list[engine.Batch]], list[engine.Batch]], data: CocoDetection
) -> None:
    batches = [collate([data[0, i]]) for i in range(len(data))]
    evaluator = CocoEvaluator(data.annotations, data.label_map)
    with pytest.raises(UserError, match="images were evaluated and 7 are annotated"):
        engine.evaluate(build(data), change(batches), evaluator, CPU)


def test_a_model_that_finds_no_numbers_is_refused(data: CocoDetection) -> None:
    model = build(data)
    nn.init.constant_(model.head.regression_head.bbox_reg.bias, float("nan"))
    with pytest.raises(UserError, match=r"found on 7 images are not finite \(image ids \["):
        evaluate(model, data)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_order_changes_no_bit_and_batch_size_no_more_than_rounding(
    dtype: torch.dtype | None, data: CocoDetection
) -> None:
    model = build(data)
    with mixed_precision(model, dtype):
        one, reverse = evaluate(model, data), evaluate(model, data, reverse=True)
        four = evaluate(model, data, batch_size=4)
    assert np.array_equal(one.detections, reverse.detections)
    assert one.metrics == reverse.metrics
    # Convolutions of one image go another way through the CPU than those of several, so that what
    # is found may differ in the last bits, and change places with what is found as surely.
    if dtype is None:
        for image in range(len(data)):
            found = [np.sort(r.detections[r.detections[:, 0] == image][:, 5]) for r in (one, four)]
            assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert one.metrics == pytest.approx(four.metrics, abs=1e-3)


# --- post-processing ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUICK)
def test_post_processing_is_the_users_choice_and_torchvisions_by_default(
    name: str, data: CocoDetection
) -> None:
    default = build_model(name, data.label_map, **DETECTORS[name])
    torchvision_default = getattr(detection, name, None)
    names = ("score_thresh", "nms_thresh", "detections_per_img")
    if torchvision_default is not None:
        plain = torchvision_default(weights=None, weights_backbone=None, num_classes=4)
        stage, ours = (getattr(m, "roi_heads", m) for m in (plain, default))
        assert [getattr(ours, n) for n in names] == [getattr(stage, n) for n in names]
    model = build(data, name, score_thresh=0.2, nms_thresh=0.3, detections_per_image=5)
    stage = getattr(model, "roi_heads", model)
    assert [getattr(stage, n) for n in names] == [0.2, 0.3, 5]
    few = build(data, name, detections_per_image=2)
    found = evaluate(few, data).detections
    assert np.bincount(found[:, 0].astype(int), minlength=len(data)).tolist() == [2] * len(data)


def test_candidates_are_chosen_before_suppression(data: CocoDetection) -> None:
    model = build(data, topk_candidates=1, nms_thresh=1.0)
    found = evaluate(model, data).detections
    assert np.bincount(found[:, 0].astype(int)).max() <= 5  # one per level of the pyramid
    assert len(evaluate(build(data, nms_thresh=1.0), data).detections) > len(found)


def test_a_model_without_candidates_refuses_the_flag(data: CocoDetection) -> None:
    with pytest.raises(UserError, match="--topk-candidates 10: fasterrcnn.* has none"):
        build(data, "fasterrcnn_mobilenet_v3_large_320_fpn", topk_candidates=10)


def test_post_processing_is_remembered_for_the_test(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"args": {"score_thresh": 0.3, "topk_candidates": 77, "nms_thresh": None}}, path)
    flags = ["--test-only", "--resume", str(path)]
    args = train.parse_args([*flags, "--topk-candidates", "9"])
    assert (args.score_thresh, args.topk_candidates, args.nms_thresh) == (0.3, 9, None)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--score-thresh", "1.5"], "1.5 is out of range; give a number from 0 to 1"),
        (["--nms-thresh", "-0.1"], "-0.1 is out of range; give a number from 0 to 1"),
        (["--detections-per-image", "0"], "0 is out of range; give a whole number greater than 0"),
        (["--topk-candidates", "-3"], "-3 is out of range; give a whole number greater than 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_impossible_post_processing_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train.check_flags(train.parse_args(["--data-path", ".", *flags]))


# --- the best -------------------------------------------------------------------------------------


def bare_run(monkeypatch: pytest.MonkeyPatch, aps: list[float]) -> tuple[run_module.Run, list[int]]:
    """Make a run that scores `aps`, and the list of epochs that it kept as best."""
    copied: list[int] = []
    run = object.__new__(run_module.Run)
    run.folder, run.processes, run.tensorboard = Path("nowhere"), CPU, None
    run.evaluated, run.settings = set(), {"eval_every": 1, "epochs": 9}
    run.state = SimpleNamespace(best=None, epoch=0, position=0, model_to_evaluate=nn.Identity())  # type: ignore[assignment]
    results = iter(aps)
    run.evaluation = SimpleNamespace(run=lambda *_: (True, {"AP": next(results)}))  # type: ignore[assignment]
    monkeypatch.setattr(run_module.Run, "_record", lambda *_: None)
    checkpoint = run_module.checkpoint
    monkeypatch.setattr(checkpoint, "copy", lambda *_: copied.append(run.state.epoch - 1))
    return run, copied


def test_the_best_is_the_first_of_equals_and_minus_one_is_beaten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, copied = bare_run(monkeypatch, [-1.0, 0.0, 0.5, 0.5, 0.4, 0.6])
    for epoch in range(6):
        run.state.epoch = epoch + 1
        assert run.evaluation_is_due() and run.evaluate() and not run.evaluation_is_due()
    assert copied == [0, 1, 2, 5]
    assert run.state.best == 0.6


def test_eval_every_zero_is_never(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = bare_run(monkeypatch, [])
    run.settings["eval_every"] = 0
    for epoch in range(10):
        run.state.epoch = epoch
        assert not run.evaluation_is_due()
    run.settings["eval_every"] = 4
    due = []
    for run.state.epoch in range(10):
        due += [run.state.epoch] if run.evaluation_is_due() else []
    assert due == [4, 8, 9]  # and the last
