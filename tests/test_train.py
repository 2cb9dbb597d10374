"""Recipe, flags and the real script have their stated effect: pytest tests/test_train.py."""

from __future__ import annotations

import ast
import functools
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from helpers import CPU, ROOT, TINY, plain_retinanet, run_script
from PIL import Image

import coco_utils
import engine
import presets
import train as train_script
import utils
from data import coco_arrays, coco_json, worker_processes
from data.loading import make_loader
from data.worker_processes import worker_errors
from group_by_aspect_ratio import GroupedBatchSampler, aspect_ratio_groups
from models.build import build_model
from runtime import checkpoint, progress, resuming
from runtime.optimization import build_optimizer, lr_factor
from runtime.records import read_json_lines
from runtime.train_state import TrainState
from utils import UserError

Train = Callable[..., subprocess.CompletedProcess[str]]
PUBLISHED = (
    "--dataset coco --model retinanet_resnet50_fpn --epochs 26 --lr-steps 16 22 "
    "--aspect-ratio-group-factor 3 --lr 0.01 "
    "--weights-backbone ResNet50_Weights.IMAGENET1K_V1"
)

NEEDS_CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


def torchvision_rates(steps_per_epoch: int, epochs: int) -> list[float]:
    """The learning rates of torchvision's recipe, from its own schedulers used as its loop does."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.01)
    by_epoch = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[16, 22], gamma=0.1)
    rates = []
    for epoch in range(epochs):
        warmup = None
        if epoch == 0 and steps_per_epoch > 1:
            steps = min(1000, steps_per_epoch - 1)
            warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 1000, total_iters=steps)
        for _ in range(steps_per_epoch):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if warmup is not None:
                warmup.step()
        by_epoch.step()
    return rates


@pytest.mark.parametrize("steps_per_epoch", [1, 2, 73, 1200])
def test_every_learning_rate_is_that_of_the_published_recipe(steps_per_epoch: int) -> None:
    settings = {"epochs": 26, "lr_steps": (16, 22)}
    ours = [
        0.01 * lr_factor(steps_per_epoch, step, **settings) for step in range(26 * steps_per_epoch)
    ]
    assert ours == pytest.approx(torchvision_rates(steps_per_epoch, 26), rel=1e-6)
    assert ours[steps_per_epoch - 1] == pytest.approx(0.01)
    assert ours[-1] == pytest.approx(1e-4)


def test_warmup_steps_are_taken_literally_when_given() -> None:
    factor = functools.partial(lr_factor, 10, epochs=5, lr_steps=(4,), warmup_steps=20)
    assert factor(0) == pytest.approx(1e-3)
    assert factor(10) == pytest.approx(0.5005)
    assert factor(20) == 1.0


def test_published_command_line_is_what_the_defaults_mean() -> None:
    flags = vars(train_script.parse_args(shlex.split(PUBLISHED)))
    weights = ["--weights-backbone", "ResNet50_Weights.IMAGENET1K_V1"]
    assert flags == vars(train_script.parse_args(weights))


def test_a_step_keeps_its_batches_on_other_numbers_of_processes() -> None:
    of_run = {"args": {"batches_per_step": 8}}
    assert resuming.batches_per_step(4, 2, {}) == 8
    assert resuming.batches_per_step(1, 2, of_run) == 8  # not 2
    with pytest.raises(UserError, match=r"8 batches .* 3 processes .* can: 1, 2, 4, 8 \("):
        resuming.batches_per_step(1, 3, of_run)


def _plain_sample(
    folder: Path, annotations: coco_arrays.Annotations, number: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An image and its boxes without any of this project's data path: PIL and the JSON itself."""
    document = json.loads(annotations.path.read_text())
    entry = document["images"][number]
    image = Image.open(folder / "train2017" / entry["file_name"]).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    boxes, labels = [], []
    places = {c["id"]: i for i, c in enumerate(document["categories"], start=1)}
    for annotation in document["annotations"]:
        if annotation["image_id"] == entry["id"] and not annotation["iscrowd"]:
            x, y, width, height = annotation["bbox"]
            boxes.append([x, y, x + width, y + height])
            labels.append(places[annotation["category_id"]])
    target = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return pixels, {"boxes": target, "labels": torch.tensor(labels, dtype=torch.int64)}


def test_ten_steps_equal_a_plain_torchvision_loop(tiny_shapes: Path, tmp_path: Path) -> None:
    annotations, _ = coco_json.read_annotations(
        tiny_shapes / "annotations" / "instances_train2017.json"
    )
    label_map = coco_utils.label_categories(annotations.categories)
    data = coco_utils.CocoDetection(tiny_shapes / "train2017", annotations, label_map)
    groups = aspect_ratio_groups(data.sizes(), 3)
    sampler = GroupedBatchSampler(groups, batch_size=2, seed=0)
    torch.manual_seed(0)
    # As in the recipe, batch normalisation is frozen; the weights' values do not matter here.
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "backbone.pth")
    ours = build_model(
        "retinanet_resnet18_fpn",
        label_map,
        weights_backbone=str(tmp_path / "backbone.pth"),
        min_size=64,
        max_size=64,
    )
    plain = plain_retinanet(ours.state_dict(), frozen=True)

    gradients: list[dict[str, torch.Tensor]] = []
    expected_losses = []
    trained = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.001, momentum=0.9, weight_decay=1e-4)
    plain.train()
    order = [batch for epoch in (0, 1) for batch in _epoch(sampler, epoch)][:10]
    for batch in order:
        samples = [_plain_sample(tiny_shapes, annotations, index) for _, index in batch]
        losses = plain([image for image, _ in samples], [target for _, target in samples])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        if not gradients:
            gradients.append(_gradients(plain))
        optimizer.step()
        expected_losses.append(float(sum(losses.values()).detach()))

    optimizer = build_optimizer(
        ours, 0.001, opt="sgd", momentum=0.9, wd=1e-4, norm_weight_decay=None
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(ours, optimizer, scheduler, scaler)
    measured: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: gradients.append(_gradients(ours)))

    def after_step(line: dict[str, float] | None, stop: bool) -> bool:
        assert line is not None
        measured.append(line["loss"])
        return len(measured) == 10

    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        loader = make_loader(data, sampler, 0, torch.device("cpu"), keep=False)
        engine.train_one_epoch(
            ours,
            state,
            loader,
            CPU,
            seed=0,
            batches_per_step=1,
            batch_weight=sampler.weight,
            after_step=after_step,
            print_freq=1,
        )
        state.epoch, state.position = epoch + 1, 0
    assert measured == pytest.approx(expected_losses, rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(float(expected.abs().max()) for expected in gradients[0].values())
    for name, expected in gradients[0].items():
        # P6 and P7 have no positive anchor here; their gradients are sums of rounding errors, 1e-9
        # of the others in size, and are held to an error of 1e-11 of the others.
        scale = max(float(expected.abs().max()), 1e-6 * largest)
        assert float((gradients[1][name] - expected).abs().max()) <= 1e-5 * scale, name


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def _epoch(sampler: GroupedBatchSampler, epoch: int) -> list[list[tuple[int, int]]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def train_set(folder: Path, transforms: Any) -> coco_utils.CocoDetection:
    annotations, _ = coco_json.read_annotations(folder / "annotations" / "instances_train2017.json")
    label_map = coco_utils.label_categories(annotations.categories)
    return coco_utils.CocoDetection(
        folder / "train2017", annotations, label_map, transforms, seed=3
    )


@pytest.mark.usefixtures("worker_server")
@pytest.mark.parametrize("policy", presets.POLICIES)
def test_samples_are_the_same_for_any_number_of_workers(tiny_shapes: Path, policy: str) -> None:
    data = train_set(tiny_shapes, presets.training_transforms(policy))
    batches = [[(epoch, index)] for epoch in (0, 1) for index in range(4)]
    seen = []
    for workers in (0, 1, 2):
        torch.manual_seed(workers)  # what came before must not matter
        loader = make_loader(data, batches, workers, torch.device("cpu"), keep=False)
        seen.append([(images[0], targets[0]) for images, targets in loader])
    for other in seen[1:]:
        for (image, target), (image_2, target_2) in zip(seen[0], other, strict=True):
            assert torch.equal(image, image_2)
            assert torch.equal(target["boxes"], target_2["boxes"])
    first, second = seen[0][:4], seen[0][4:]
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True)), (
        "an image has to look different in another epoch"
    )


def _kill_itself(image: Any, target: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("worker_server")
def test_a_loader_worker_that_dies_ends_the_run_within_seconds(tiny_shapes: Path) -> None:
    transforms: Any = _kill_itself
    data = train_set(tiny_shapes, transforms)
    loader = make_loader(data, [[(0, 0)]], 1, torch.device("cpu"), keep=True)
    start = time.monotonic()
    with pytest.raises(utils.LocalError, match="a loader worker was killed"):
        with worker_errors():
            next(iter(loader))
    assert time.monotonic() - start < 15


def _stop_itself(image: Any, target: Any) -> Any:
    """Be a transform whose loader worker stops, as by SIGSTOP or a dead file server."""
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.usefixtures("worker_server")
def test_a_loader_worker_that_hangs_ends_the_run_with_a_message(
    tiny_shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_processes, "LOADER_TIMEOUT", 8.0)  # and PyTorch is imported in 3
    transforms: Any = _stop_itself
    data = train_set(tiny_shapes, transforms)
    loader = make_loader(data, [[(0, 0)]], 1, torch.device("cpu"), keep=True)
    try:
        with pytest.raises(utils.LocalError, match="no loader worker delivered .* for 8 seconds"):
            with worker_errors():
                next(iter(loader))
    finally:
        (worker,) = multiprocessing.active_children()
        utils.kill_workers()
    worker.join(5)
    assert worker.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_prints_no_warning_of_a_library(
    processes: int, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Also of what Python hides, but for one: torchvision 0.29 wants images decoded by a package
    # that torchvision 0.25 does not know.
    hidden = "ignore:The image decoding and encoding capabilities:DeprecationWarning"
    monkeypatch.setenv("PYTHONWARNINGS", f"default,{hidden}")
    flags = ("--epochs", "1", "--workers", "3", "--val-loss", "--output-dir", tmp_path / "run")
    done = train(*flags, processes=processes)
    text = done.stdout + done.stderr
    assert "ended after step" in text and "--workers 3 for" in text  # the project's own words
    assert "Warning" not in text, text


@pytest.fixture(scope="module", params=[1, 2], ids=["1-process", "2-processes"])
def finished_run(
    request: pytest.FixtureRequest, train: Train, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A run of two epochs by the real script, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = train("--epochs", "2", "--output-dir", folder, processes=request.param)
    return folder, done.stdout


def test_a_run_leaves_the_files_that_the_design_lists(finished_run: tuple[Path, str]) -> None:
    folder, _ = finished_run
    for name in ("checkpoint.pth", "model_0.pth", "model_1.pth", "best.pth"):
        assert utils.is_verified(folder / name), name
        check = ["sha256sum", "-c", f"{name}.sha256"]
        assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 0
    for epoch in (0, 1):
        results = json.loads((folder / "eval" / f"epoch_{epoch}" / "results.json").read_text())
        assert set(results) >= {"AP", "AP50", "AR100"}
        assert (folder / "eval" / f"epoch_{epoch}" / "detections.npy").is_file()
    record = json.loads((folder / "args.json").read_text())
    assert record["args"]["epochs"] == 2
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["global_batch"] in (2, 4) and record["effective_lr"] == 1e-4
    assert (folder / "log.txt").read_text().count("step ") >= 2


def test_metrics_are_the_numbers_that_were_printed(finished_run: tuple[Path, str]) -> None:
    folder, printed = finished_run
    records = read_json_lines(folder / "metrics.jsonl")
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) == 2 * -(
        -16 // json.loads((folder / "args.json").read_text())["global_batch"]
    )
    for record in records:
        line = "  ".join(f"{key} {progress.short(value)}" for key, value in record.items())
        assert line in printed
    evaluated = [record for record in records if "AP" in record]
    assert [record["epoch"] for record in evaluated] == [0, 1]
    tables = re.findall(r"\| area=   all \| maxDets=100 \] = (\S+)\n.*IoU=0.50  ", printed)
    assert tables == [f"{record['AP']:.3f}" for record in evaluated]


def test_checkpoints_load_into_a_plain_torchvision_model(finished_run: tuple[Path, str]) -> None:
    content = torch.load(finished_run[0] / "checkpoint.pth", weights_only=True)
    plain = plain_retinanet(content["model"])
    assert len(plain.eval()([torch.rand(3, 64, 64)])) == 1
    assert set(content) >= {"model", "ema", "optimizer", "lr_scheduler", "scaler", "epoch", "step"}
    assert set(content) >= {"position", "args", "categories", "versions"}
    names = [category["name"] for category in content["categories"]]
    assert names == ["circle", "square", "triangle"]


@pytest.mark.parametrize("finished_run", [2], indirect=True, ids=["2-processes"])
def test_evaluation_alone_gives_one_set_of_numbers(
    finished_run: tuple[Path, str], tiny_shapes: Path, tmp_path: Path
) -> None:
    folder, _ = finished_run
    content = torch.load(folder / "checkpoint.pth", weights_only=True)
    torch.save(content["model"], tmp_path / "plain.pth")
    expected = [r for r in read_json_lines(folder / "metrics.jsonl") if "AP" in r][-1]
    outputs = []
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        flags = ("--test-only", "--resume", folder / "checkpoint.pth", "--workers", "1")
        run_script("train.py", *flags, "--output-dir", out, processes=processes)
        outputs.append(json.loads((out / "eval" / "test" / "results.json").read_text()))
    for backend in ("hotcoco", "pycocotools"):
        flags = ("--test-only", "--resume", tmp_path / "plain.pth", "--output-dir", tmp_path)
        flags = (*TINY, "--data-path", tiny_shapes, "--coco-eval", backend, *flags)
        run_script("train.py", *flags)
        results = tmp_path / "eval" / "test" / "results.json"
        outputs.append(json.loads(results.read_text()))
    assert all(output == outputs[0] for output in outputs)
    assert outputs[0] == {key: expected[key] for key in outputs[0]}


def test_resuming_at_the_end_of_an_epoch_equals_a_run_without_a_break(
    finished_run: tuple[Path, str], train: Train, tmp_path: Path
) -> None:
    folder, _ = finished_run
    processes = json.loads((folder / "args.json").read_text())["global_batch"] // 2
    flags = ("--output-dir", tmp_path / "run", "--resume", "auto")
    train("--epochs", "1", *flags, processes=processes)
    train("--epochs", "2", *flags, processes=processes)
    expected = torch.load(folder / "checkpoint.pth", weights_only=True)
    resumed = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    for name, tensor in expected["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    keys = ("step", "epoch", "loss", "AP")
    records = [
        [{k: r.get(k) for k in keys} for r in read_json_lines(where / "metrics.jsonl")]
        for where in (folder, tmp_path / "run")
    ]
    assert records[0] == records[1]


@pytest.mark.parametrize("device", ["cpu", NEEDS_CUDA])
def test_a_deterministic_run_that_stopped_within_an_epoch_ends_with_the_same_bits(
    device: str, train: Train, tmp_path: Path
) -> None:
    flags = ("--use-deterministic-algorithms", "--device", device, "--amp", "bf16")
    flags = (*flags, "--data-augmentation", "multiscale", "--ema-decay", "0.9", "--eval-every", "0")
    for folder, steps in (("whole", (2,)), ("parts", (1, 2))):
        for step in steps:
            more = ("--resume", "auto", "--max-steps", str(step))
            train(*flags, *more, "--output-dir", tmp_path / folder)
    whole, parts = (checkpoint.load(tmp_path / f / "checkpoint.pth") for f in ("whole", "parts"))
    assert whole["step"] == 2 and whole["position"] == 2  # within an epoch
    for part in ("model", "ema", "optimizer"):
        assert_equal(whole[part], parts[part])


def assert_equal(first: Any, second: Any) -> None:
    """Assert that two trees of tensors are the same to the bit."""
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_run_at_max_steps_stays_there_and_resumes_only_with_its_settings(
    train: Train, tmp_path: Path
) -> None:
    flags = ("--output-dir", tmp_path / "run", "--resume", "auto", "--eval-every", "0")
    newest = tmp_path / "run" / "checkpoint.pth"
    train(*flags, "--max-steps", "2")
    before = newest.read_bytes()
    done = train(*flags, "--max-steps", "2", "--workers", "1", "--clip-grad-norm", "2")
    assert "ended after step 2" in done.stdout and newest.read_bytes() == before
    assert "resuming with another clip_grad_norm: 1.0 → 2.0" in done.stdout
    done = train(*flags, "--wd", "0.05", check=False)
    assert done.returncode == 1 and "wd: 0.0001 → 0.05" in done.stderr
    assert newest.read_bytes() == before


def test_another_folder_may_continue_from_a_checkpoint(train: Train, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train("--epochs", "1", "--eval-every", "0", "--output-dir", first)
    flags = ("--epochs", "2", "--output-dir", second, "--resume", first / "model_0.pth")
    train(*flags)  # evaluates epoch 0 first, as nobody has
    assert [r["epoch"] for r in read_json_lines(second / "metrics.jsonl") if "AP" in r] == [
        0,
        1,
    ]
    assert checkpoint.load(second / "checkpoint.pth")["epoch"] == 2
    assert utils.is_verified(second / "best.pth")


def test_a_folder_that_holds_a_run_is_not_written_over(
    finished_run: tuple[Path, str], train: Train
) -> None:
    folder, _ = finished_run
    before = (folder / "metrics.jsonl").read_bytes()
    done = train("--output-dir", folder, check=False)
    assert done.returncode == 1
    assert "holds a run" in done.stderr and "--resume auto" in done.stderr
    assert (folder / "metrics.jsonl").read_bytes() == before


WRONG = {
    "no-such-folder": (["--data-path", "nowhere"], ["nowhere", "--data-path"]),
    "unknown-model": (["--model", "retinanet_resnet51_fpn"], ["--model", "retinanet_resnet50_fpn"]),
    "mask-model": (["--model", "maskrcnn_resnet50_fpn"], ["--model", "boxes"]),
    "unknown-weights": (["--weights", "Foo.BAR"], ["--weights", "neither a file nor"]),
    "unknown-backbone-weights": (
        ["--weights-backbone", "Foo.BAR"],
        ["--weights-backbone", "ResNet50_Weights.IMAGENET1K_V1"],
    ),
    "steps-not-increasing": (["--lr-steps", "22", "16"], ["--lr-steps", "increase"]),
    "zero-batch": (["--batch-size", "0"], ["--batch-size: 0", "greater than 0"]),
    "test-nothing": (["--test-only"], ["--test-only", "--resume"]),
    "sizes-swapped": (["--min-size", "80"], ["--min-size 80", "--max-size 64"]),
    "no-such-checkpoint": (["--resume", "gone.pth"], ["--resume gone.pth", "does not exist"]),
    "freeze-untrained": (
        ["--trainable-backbone-layers", "3"],
        ["--trainable-backbone-layers", "--weights-backbone"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_gets_one_message_that_names_the_flag_and_the_fix(
    case: str, error_of: Callable[..., str]
) -> None:
    flags, expected = WRONG[case]
    message = error_of(*flags)
    for part in expected:
        assert part in message, message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none(error_of: Callable[..., str]) -> None:
    message = error_of("--device", "cuda")
    assert "--device cuda" in message and "--device cpu" in message


def test_missing_annotations_are_named(error_of: Callable[..., str], tmp_path: Path) -> None:
    assert "gone.json" in error_of("--val-annotations", tmp_path / "gone.json")


def test_a_checkpoint_of_other_classes_is_refused(
    finished_run: tuple[Path, str],
    command_line: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    tiny_shapes: Path,
    tmp_path: Path,
) -> None:
    document = json.loads((tiny_shapes / "annotations" / "instances_val2017.json").read_text())
    document["categories"][0]["name"] = "ellipse"
    (tmp_path / "other.json").write_text(json.dumps(document))
    flags = ("--test-only", "--resume", finished_run[0] / "checkpoint.pth")
    with pytest.raises(SystemExit) as raised:
        command_line(*flags, "--val-annotations", tmp_path / "other.json")
    assert raised.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    assert "ellipse" in message and "circle" in message and "other.json" in message


def test_remembered_paths_are_dropped_with_other_data(tmp_path: Path) -> None:
    saved = {
        "dataset": "voc",
        "data_path": "old",
        "val_images": "old/images",
        "val_annotations": None,
        "min_size": 64,
        "model": "fcos_resnet50_fpn",
    }
    checkpoint.save({"args": saved}, tmp_path / "c.pth")

    def remembered(*flags: str) -> tuple[str, str, str, str]:
        argv = ["--test-only", "--resume", str(tmp_path / "c.pth"), *flags]
        args = train_script.parse_args(argv)
        assert (args.min_size, args.model) == (64, "fcos_resnet50_fpn")
        names = ("dataset", "data_path", "val_images", "val_annotations")
        return tuple(str(getattr(args, name)) for name in names)  # type: ignore[return-value]

    assert remembered() == ("voc", "old", "old/images", "None")
    assert remembered("--val-annotations", "x") == ("voc", "old", "old/images", "x")
    assert remembered("--data-path", "new") == ("voc", "new", "None", "None")
    assert remembered("--dataset", "voc") == ("voc", "old", "old/images", "None")
    assert remembered("--dataset", "shapes") == ("shapes", "None", "None", "None")


def test_main_is_one_sequence_of_plain_statements() -> None:
    tree = ast.parse((ROOT / "train.py").read_text())
    (main,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    # Statements, not lines: ruff gives each argument of a large call its own line.
    assert sum(isinstance(node, ast.stmt) for node in ast.walk(main)) <= 62
    assert not any(isinstance(n, (ast.FunctionDef, ast.Lambda)) for n in main.body)
    dicts = [k for n in ast.walk(main) if isinstance(n, ast.Call) for k in n.keywords if not k.arg]
    assert len(dicts) == 2  # the groups "model" and "schedule"; every other argument is named
