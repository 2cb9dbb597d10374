"""Evaluation changes no state, its order no number: pytest tests/test_evaluation.py.

Real detectors look at the shapes of `conftest.tiny_shapes`; torchvision's own models say what a
loss must be.
"""

import copy
import datetime
import json
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from helpers import CPU, make_run
from torch import nn
from torchvision.models import detection

import engine
import train
import utils
from coco_eval import FILES, CocoEvaluator, Results
from coco_utils import CocoDetection, label_categories
from data.coco_json import read_annotations
from data.loading import collate
from data.splits import read_splits
from group_by_aspect_ratio import same_size_batches
from models.build import build_model, load_detector
from models.precision import autocast
from models.transform import padded_sizes
from models.weights import load_trained
from runtime import checkpoint, distributed
from runtime.distributed import PeerError, join_process_group
from runtime.options import check_flags, parse_args
from utils import UserError

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
    model = build_model(name, data.label_map, **settings).eval()  # type: ignore[arg-type]
    return model.to(memory_format=torch.channels_last)  # as train.py has it


def evaluate(
    model: nn.Module,
    data: CocoDetection,
    batch_size: int = 1,
    reverse: bool = False,
    with_losses: bool = False,
    same_size: bool = True,
) -> Results:
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
def test_validation_losses_change_neither_the_model_nor_its_detections(
    name: str, data: CocoDetection
) -> None:
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
    if name.startswith("faster"):  # an untrained head has the same output for every box
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
def test_training_continues_after_validation_losses(name: str, data: CocoDetection) -> None:
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
    with pytest.raises(ValueError, match="images were evaluated and 7 are annotated"):
        engine.evaluate(build(data), change(batches), evaluator, CPU)


def test_detections_of_nan_are_refused(data: CocoDetection) -> None:
    model = build(data)
    nn.init.constant_(model.head.regression_head.bbox_reg.bias, float("nan"))
    with pytest.raises(
        UserError, match=r"boxes or scores on 7 images are not finite \(image ids \["
    ):
        evaluate(model, data)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_order_changes_no_bit_and_batch_size_no_more_than_rounding(
    dtype: torch.dtype | None, data: CocoDetection
) -> None:
    model = build(data)
    with autocast(torch.device("cpu"), dtype):
        one, reverse = evaluate(model, data), evaluate(model, data, reverse=True)
        four = evaluate(model, data, batch_size=4)
    assert np.array_equal(one.detections, reverse.detections)
    assert one.metrics == reverse.metrics
    # Convolutions of one image go another way through the CPU than those of several, so that what
    # is found may differ in the last bits, and change places with what is found as surely.
    if dtype is None:
        for image in range(len(data)):
            scores = [np.sort(r.detections[r.detections[:, 0] == image][:, 5]) for r in (one, four)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert one.metrics == pytest.approx(four.metrics, abs=1e-3)


# --- post-processing ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUICK)
def test_post_processing_is_torchvisions_by_default_and_can_be_set(
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
    rows = evaluate(few, data).detections
    assert np.bincount(rows[:, 0].astype(int), minlength=len(data)).tolist() == [2] * len(data)


def test_candidates_are_chosen_before_suppression(data: CocoDetection) -> None:
    model = build(data, topk_candidates=1, nms_thresh=1.0)
    rows = evaluate(model, data).detections
    assert np.bincount(rows[:, 0].astype(int)).max() <= 5  # one per level of the pyramid
    assert len(evaluate(build(data, nms_thresh=1.0), data).detections) > len(rows)


def test_a_model_without_candidates_refuses_the_flag(data: CocoDetection) -> None:
    with pytest.raises(UserError, match="--topk-candidates 10: fasterrcnn.* has no such limit"):
        build(data, "fasterrcnn_mobilenet_v3_large_320_fpn", topk_candidates=10)


def test_post_processing_is_remembered_for_the_test(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"args": {"score_thresh": 0.3, "topk_candidates": 77, "nms_thresh": None}}, path)
    flags = ["--test-only", "--resume", str(path)]
    args = parse_args([*flags, "--topk-candidates", "9"])
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
        check_flags(parse_args(["--data-path", ".", *flags]))


# --- the best -------------------------------------------------------------------------------------


def test_the_best_is_the_first_of_equals_and_minus_one_is_beaten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, copied = make_run(tmp_path, epochs=9), []
    monkeypatch.setattr(checkpoint, "copy", lambda *_: copied.append(run.state.epoch - 1))
    for epoch, ap in enumerate([-1.0, 0.0, 0.5, 0.5, 0.4, 0.6]):
        run.state.epoch = epoch + 1
        assert run.evaluation_is_due()
        run.record_evaluation({"AP": ap})
        assert not run.evaluation_is_due()
    assert copied == [0, 1, 2, 5]
    assert run.state.best == 0.6


@pytest.mark.parametrize(
    "every, due", [(0, []), (4, [4, 8, 9])], ids=["0 is never", "4 and the last"]
)
def test_epochs_to_evaluate(every: int, due: list[int], tmp_path: Path) -> None:
    run = make_run(tmp_path, epochs=9, eval_every=every)
    seen = []
    for epoch in range(10):
        run.state.epoch = epoch
        if run.evaluation_is_due():
            seen.append(epoch)
    assert seen == due


# --- shares that take different times ------------------------------------------------------------


class _Slow:
    """Batches that each take `seconds` to load; `at` is called before the one of that number."""

    def __init__(self, batches: list[Any], seconds: float, at: dict[int, Callable[[], None]]):
        self.batches, self.seconds, self.at = batches, seconds, at

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.batches):
            time.sleep(self.seconds)
            self.at.get(number, lambda: None)()
            yield batch


def _evaluate_share(rank: int, port: int, data: CocoDetection, case: str, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.STEP_TIMEOUT = datetime.timedelta(seconds=2)
    distributed.MEETING_EVERY = 0.2
    batches = [collate([data[0, i]]) for i in range(len(data))]
    share = batches[:1] if rank == 0 else batches[1:]  # rank 0 has less to do
    asked: list[int] = []
    at = {}
    if case == "stop" and rank == 0:
        at[0] = lambda: asked.append(1)
    elif case == "hang" and rank == 1:
        at[1] = lambda: time.sleep(60)
    model = build(data)
    with join_process_group("cpu") as processes:
        evaluator = CocoEvaluator(data.annotations, data.label_map)
        start = time.monotonic()
        try:
            finished, result = engine.evaluate(
                model, _Slow(share, 0.5, at), evaluator, processes, should_stop=lambda: bool(asked)
            )
            seen = ["finished" if finished else "stopped", result is not None]
        except PeerError as error:
            seen = [str(error), False]
        seconds = time.monotonic() - start
        (folder / f"{rank}.json").write_text(json.dumps([*seen, seconds]))
        if case == "hang":
            os._exit(0)  # the other one hangs still


def _evaluate_on_two(data: CocoDetection, case: str, folder: Path) -> list[Any]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    ranks = mp.start_processes(
        _evaluate_share, (port, data, case, folder), 2, join=False, start_method="spawn"
    )
    assert ranks is not None
    if case == "hang":
        ranks.processes[0].join()
        ranks.processes[1].kill()
    while case != "hang" and not ranks.join():
        pass
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_a_share_that_takes_longer_than_the_timeout_is_waited_for(
    data: CocoDetection, tmp_path: Path
) -> None:
    (first, second) = _evaluate_on_two(data, "slow", tmp_path)
    assert first[:2] == ["finished", True] and second[:2] == ["finished", False]
    assert first[2] > 2.5  # the timeout is 2 s


def test_a_stop_of_one_process_ends_the_evaluation_of_all_within_seconds(
    data: CocoDetection, tmp_path: Path
) -> None:
    (first, second) = _evaluate_on_two(data, "stop", tmp_path)
    assert first[0] == second[0] == "stopped"
    assert second[2] < 2.0  # its share takes 3 s


def test_a_share_that_hangs_is_named_after_the_timeout(data: CocoDetection, tmp_path: Path) -> None:
    ((message, _, seconds),) = _evaluate_on_two(data, "hang", tmp_path)
    assert "another process of the run died or hangs" in message and "Ranks 1 failed" in message
    assert 2 < seconds < 6


# --- evaluation only ------------------------------------------------------------------------------

Test = Callable[..., str]
SMALL = ("--device", "cpu", "--workers", "0")


@pytest.fixture
def test_only(capsys: pytest.CaptureFixture[str]) -> Iterator[Test]:
    """Run `train.py --test-only` in this process: `test_only(*flags)` returns what it printed."""
    numbers = utils.STOP_SIGNALS
    handlers = [signal.getsignal(number) for number in numbers]
    log = (utils.logger.handlers, utils.logger.propagate, utils.logger.level)

    def run(*flags: str | Path) -> str:
        train.main(parse_args(["--test-only", *SMALL, *map(str, flags)]))
        return capsys.readouterr().out

    yield run
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)
    utils.logger.handlers, utils.logger.propagate, utils.logger.level = log


def trained(data: CocoDetection, seed: int = 5) -> nn.Module:
    """Return a detector of other weights than `--seed 0` begins with."""
    model = build(data)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(std=0.02)
    return model


def save_run(folder: Path, data: CocoDetection, model: nn.Module, **other: Any) -> Path:
    """Write what a run of the tiny detector leaves as its newest checkpoint, after step 8."""
    folder.mkdir(parents=True)
    args = {"model": "retinanet_resnet18_fpn", "min_size": 64, "max_size": 64, "score_thresh": 0.0}
    args |= {"dataset": "coco", "data_path": str(data.root.parent)}
    content = {"model": model.state_dict(), "ema": None, "step": 8, "args": args}
    path = folder / "checkpoint.pth"
    checkpoint.save(content | {"categories": data.label_map} | other, path)
    return path


def image_info(data: CocoDetection, path: Path, *without: str) -> Path:
    """Write the annotation file of `data` without some of its lists."""
    content = json.loads(data.annotations.path.read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in without}))
    return path


def test_auto_evaluates_the_newest_checkpoint_of_the_output_folder(
    data: CocoDetection, tmp_path: Path, test_only: Test
) -> None:
    model, folder = trained(data), tmp_path / "run"
    path = save_run(folder, data, model)
    printed = test_only("--resume", "auto", "--output-dir", folder)
    assert f"evaluating {path} of step 8\n" in printed and "Average Precision" in printed
    rows = np.load(folder / "eval" / "test" / "detections.npy")
    assert np.array_equal(rows, evaluate(model, data).detections)
    assert not np.array_equal(rows, evaluate(build(data), data).detections)


def test_auto_without_a_folder_is_that_of_the_model(
    data: CocoDetection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "runs" / "retinanet_resnet18_fpn", data, build(data))
    auto = ["--test-only", "--resume", "auto"]
    args = parse_args([*auto, "--model", "retinanet_resnet18_fpn"])
    assert args.resume == "runs/retinanet_resnet18_fpn/checkpoint.pth"
    assert (args.min_size, args.data_path) == (64, data.root.parent)
    for flags in ([], ["--weights", "RetinaNet_ResNet50_FPN_Weights.COCO_V1"]):
        with pytest.raises(UserError, match="auto: no checkpoint in runs/retinanet_resnet50_fpn;"):
            parse_args([*auto, *flags])


@pytest.mark.parametrize("content", [{}, {"step": 3}, {"model": {}}], ids=["empty", "step", "none"])
def test_weights_that_were_not_loaded_are_not_evaluated(
    content: dict[str, Any], data: CocoDetection, tmp_path: Path, test_only: Test
) -> None:
    torch.save(content, tmp_path / "c.pth")
    flags = ("--data-path", data.root.parent, "--model", "retinanet_resnet18_fpn")
    with pytest.raises(UserError, match=r"--resume .*c\.pth: not weights"):
        test_only("--resume", tmp_path / "c.pth", *flags, "--min-size", "64", "--max-size", "64")


def test_of_resume_and_weights_the_checkpoint_is_evaluated(
    data: CocoDetection, tmp_path: Path, test_only: Test
) -> None:
    model = trained(data)
    path = save_run(tmp_path / "run", data, model)
    other = save_run(tmp_path / "other", data, trained(data, seed=6))
    out = ("--output-dir", tmp_path / "out")
    printed = test_only("--resume", path, "--weights", other, *out)
    assert f"evaluating {path} of step 8" in printed
    rows = np.load(tmp_path / "out" / "eval" / "test" / "detections.npy")
    assert len(rows) and np.array_equal(rows[:, :6], evaluate(model, data).detections[:, :6])


def test_only_changes_no_file_of_the_run(
    data: CocoDetection, tmp_path: Path, test_only: Test
) -> None:
    folder, test_folder = tmp_path / "run", tmp_path / "run" / "eval" / "test"
    path = save_run(folder, data, trained(data))
    before = {file.name for file in folder.iterdir()}
    test_only("--resume", path, "--output-dir", folder, "--save-detections")
    assert {file.name for file in folder.iterdir()} == before | {"eval"}
    assert {file.name for file in test_folder.iterdir()} == set(FILES)
    analysis = json.loads((test_folder / "analysis.json").read_text())
    assert analysis["tested"] == {"weights": str(path), "step": 8}
    test_only("--resume", path, "--output-dir", folder)
    assert not (
        test_folder / "detections.json"
    ).exists()  # of another evaluation than the other files


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    data: CocoDetection, tmp_path: Path, test_only: Test, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_run(tmp_path / "run", data, trained(data))
    (tmp_path / "file").touch()
    monkeypatch.setattr(engine.Evaluation, "run", lambda *_: pytest.fail("it was evaluated"))
    with pytest.raises(UserError, match="cannot create .*file/eval/test"):
        test_only("--resume", path, "--output-dir", tmp_path / "file")


# --- images without annotations -------------------------------------------------------------------


@pytest.mark.parametrize("without", [("annotations",), ("annotations", "categories")])
def test_images_without_annotations_give_a_results_file_and_no_table(
    without: tuple[str, ...], data: CocoDetection, tmp_path: Path, test_only: Test
) -> None:
    model, folder = trained(data), tmp_path / "out" / "eval" / "test"
    path = save_run(tmp_path / "run", data, model)
    info = image_info(data, tmp_path / "info.json", *without)
    flags = ("--resume", path, "--output-dir", tmp_path / "out", "--save-detections")
    test_only(*flags)
    expected = json.loads((folder / "detections.json").read_text())
    assert "AP" in json.loads((folder / "results.json").read_text())
    printed = test_only(*flags, "--val-annotations", info)
    assert "on 7 images, which have no annotations" in printed
    assert "Average Precision" not in printed and "AP50" not in printed
    assert [file.name for file in folder.iterdir()] == ["detections.json"]
    results = json.loads((folder / "detections.json").read_text())
    assert results == expected and len(results) > 7
    ids = {int(image) for image in data.annotations.image_ids}
    assert {result["image_id"] for result in results} == ids
    assert {result["category_id"] for result in results} <= {
        n for n, _ in data.annotations.categories
    }


def test_images_without_annotations_are_refused_where_boxes_are_needed(
    data: CocoDetection, tmp_path: Path, test_only: Test
) -> None:
    path = save_run(tmp_path / "run", data, trained(data))
    info = image_info(data, tmp_path / "info.json", "annotations")
    flags = ("--resume", path, "--val-annotations", info)
    reason = r"no list of annotations: .* train\.py --test-only --save-detections"
    with pytest.raises(UserError, match=reason):
        test_only(*flags)
    with pytest.raises(UserError, match=r"--val-loss: .*info\.json has no annotations"):
        test_only(*flags, "--save-detections", "--val-loss")
    paths = {"train_images": data.root, "train_annotations": info}
    with pytest.raises(UserError, match=reason):
        read_splits(paths, ["train"])
    with pytest.raises(UserError, match=reason):
        read_annotations(info)  # as tools.score does


def test_classes_come_from_a_checkpoint_or_the_file(
    data: CocoDetection, tmp_path: Path, test_only: Test
) -> None:
    info = image_info(data, tmp_path / "info.json", "annotations", "categories")
    plain = tmp_path / "plain.pth"
    torch.save(trained(data).state_dict(), plain)
    flags = ("--val-annotations", info, "--val-images", data.root, "--save-detections")
    with pytest.raises(UserError, match=r"info\.json has no categories; add them, or give by"):
        test_only("--resume", plain, *flags)


# --- weights that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("averaged", [False, True], ids=["model", "ema"])
def test_weights_that_are_not_finite_are_refused(
    value: float, averaged: bool, data: CocoDetection, tmp_path: Path, test_only: Test
) -> None:
    good, bad = trained(data), trained(data)
    name = "head.classification_head.cls_logits.bias"
    with torch.no_grad():
        bad.get_parameter(name)[1] = value
    ema = bad.state_dict() if averaged else None
    path = save_run(tmp_path / "run", data, good if averaged else bad, ema=ema)
    reason = rf"{path}: 1 of \d+ tensors are not finite \({name}\)"
    with pytest.raises(UserError, match=f"--resume {reason}"):
        test_only("--resume", path)
    with pytest.raises(UserError, match=f"--weights {reason}"):
        test_only("--weights", path, "--data-path", data.root.parent, "--model", "ssd300_vgg16")
    with pytest.raises(UserError, match=reason):
        load_detector(str(path))


def test_only_the_weights_that_are_evaluated_must_be_finite(data: CocoDetection) -> None:
    good, bad = trained(data), trained(data)
    nn.init.constant_(bad.head.classification_head.cls_logits.bias, math.nan)
    model = build(data)
    load_trained(model, {"model": bad.state_dict(), "ema": good.state_dict()}, "c.pth")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, good.state_dict()[name]), name


def test_batch_statistics_must_be_finite_and_the_first_names_are_given(data: CocoDetection) -> None:
    bad = trained(data)
    for name, buffer in bad.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(math.inf)
    names = r"backbone\.body\.bn1\.running_var, backbone\.\S+, backbone\.\S+, …"
    with pytest.raises(UserError, match=rf"20 of \d+ tensors are not finite \({names}\)"):
        load_trained(build(data), bad.state_dict(), "c.pth")
