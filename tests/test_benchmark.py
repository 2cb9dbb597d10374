"""Every subcommand of tools.benchmark runs, compares the same work, and counts what it reports.

python -m pytest tests/test_benchmark.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, run_script
from torch import nn
from torchvision.io import read_image

from data.coco_json import read_annotations
from models import retinanet
from tools.benchmark import __main__ as benchmark
from tools.benchmark import data as benchmark_data
from tools.benchmark import detection as benchmark_detection
from tools.benchmark import eval as benchmark_eval
from tools.benchmark import loader as benchmark_loader
from tools.benchmark import memory as benchmark_memory
from tools.benchmark import step as benchmark_step
from tools.benchmark.measuring import Row, in_turn
from utils import UserError

TINY_STEP = ("step", "--device", "cpu", "--model", "retinanet_resnet18_fpn", "--min-size", "64")
TINY_STEP += ("--max-size", "96", "--steps", "1", "--repeats", "1")


def rows_of(*command: str | Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    benchmark.main([*map(str, command), "--json"])
    printed = json.loads(capsys.readouterr().out)  # exactly one object
    assert set(printed) == {"rows", "machine"}
    assert {"cpu", "cores", "torch", "revision"} <= set(printed["machine"])
    for row in printed["rows"]:
        assert {"name", "ours", "torchvision", "ratio", "unit"} <= set(row)
    return {row["name"]: row for row in printed["rows"]}


# --- rows, table, picture -------------------------------------------------------------------------


def test_ratios_are_of_pairs_and_above_one_where_ours_is_better() -> None:
    slower = Row("time", "s", [1.0, 2.0, 4.0], [2.0, 2.0, 20.0], budget=2)
    assert slower.ratios() == [2.0, 1.0, 5.0] and slower.as_json()["ratio"] == 2.0
    assert slower.as_json()["spread"] == [1.0, 5.0] and slower.met() is True
    faster = Row("speed", "images/s", [3.0], [2.0], more_is_better=True, budget=2)
    assert faster.ratios() == [1.5] and faster.met() is False
    unpaired = Row("time", "s", [1.0, 2.0, 9.0], [10.0])
    assert unpaired.ratios() == [5.0] and unpaired.met() is None


def test_a_count_of_zero_has_no_ratio_and_meets_its_limit() -> None:
    assert Row("waits", "a step", [0], [28], limit=0).as_json()["ratio"] is None
    assert Row("waits", "a step", [0], [28], limit=0).met() is True
    assert Row("waits", "a step", [1], [28], limit=0).met() is False
    assert Row("speed", "images/s", [1.0], budget=2).met() is False  # nothing to compare with


def test_table_shows_medians_ratio_spread_and_verdict() -> None:
    rows = [
        Row("step", "images/s", [4.0, 5.0, 6.0], [2.0, 2.0, 2.0], True, budget=3),
        Row("order", "s", [0.5], limit=1),
        Row("share", "%", [50.0], [40.0], True),
    ]
    lines = [line.split("  ") for line in benchmark.table(rows).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[0] == ["ours", "torchvision", "ratio", "spread", "budget"]
    assert cells[1] == ["step, images/s", "5", "2", "2.5 x", "2-3", ">= 3 x", "MISSED"]
    assert cells[2] == ["order, s", "0.5", "-", "<= 1", "met"]
    assert cells[3] == ["share, %", "50", "40", "1.25 x", "1.25-1.25"]


def test_sides_take_turns_in_changing_order() -> None:
    calls: list[str] = []
    times = in_turn([lambda: calls.append("a"), lambda: calls.append("b")], 3)
    assert calls == ["a", "b", "b", "a", "a", "b"] and list(map(len, times)) == [3, 3]


def test_picture_has_a_bar_for_each_ratio(tmp_path: Path) -> None:
    rows = [Row(f"row {i}", "s", [1.0], [float(i)], budget=2) for i in (1, 3, 100)]
    benchmark.draw([*rows, Row("without", "s", [1.0])], "title", tmp_path / "plot.png")
    pixels = read_image(str(tmp_path / "plot.png"))[:3]
    green = (pixels == torch.tensor([0x00, 0x9E, 0x73])[:, None, None].byte()).all(0)
    bars = green.any(1).int().diff().eq(1).sum()
    assert bars == 3  # with that of the legend; the third is as fast as torchvision's


# --- data -----------------------------------------------------------------------------------------


def test_data_prints_start_up_workers_order_and_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = ("--size", "tiny", "--repeats", "1", "--workers", "2", "--processes", "1")
    rows = rows_of("data", *flags, "--padding-images", "40", capsys=capsys)
    assert rows["first start"]["torchvision"] > 0 and rows["first start"]["ours"] > 0
    assert rows["unshared after an epoch"]["unit"] == "MB in 2 workers"
    assert rows["order of an epoch of 1.7 million images"]["ours"] > 0
    for policy in ("hflip", "multiscale", "ssd", "ssdlite"):
        grouped, mixed = (
            rows[f"padding, {policy}, {name}"]["ours"] for name in ("grouped", "not grouped")
        )
        assert 0 < grouped < mixed
    assert rows["padding, lsj, grouped"]["ours"] == 0  # all images have one size
    kept = {path.name for path in (tmp_path / "retinanet-reference" / "benchmark").iterdir()}
    assert kept == {"tiny-1", ".tiny-1.lock"}  # nothing but the generated file stays


def test_generated_file_has_the_stated_numbers_and_both_sides_read_the_same(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    benchmark_data.write_file(path, 200, 1_000, outlines=True)
    document = json.loads(path.read_text())
    assert len(document["images"]) == 200 and len(document["annotations"]) == 1_000
    assert all(len(row["segmentation"][0]) >= 24 for row in document["annotations"])
    _, ours = benchmark_data.start_ours(path, tmp_path)
    _, theirs = benchmark_data.start_torchvision(path)
    assert 150 < len(ours) < 200  # some images have no box
    assert np.bincount(ours).tolist() == np.bincount(theirs).tolist()


def test_padding_is_counted_in_pixels() -> None:
    shapes = np.array([[32, 64], [64, 32], [64, 64]])
    batches = np.array([[0, 1], [2, -1]])
    # Two images of 2,048 pixels become 64 x 64 each, and the third needs no padding.
    assert benchmark_data.padding_percent(shapes, batches) == pytest.approx(100 * 4_096 / 8_192)


# --- loader ---------------------------------------------------------------------------------------


def test_loader_prints_both_sides_and_bare_decoding(
    tiny_shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--data-path", tiny_shapes, "--repeats", "1", "--workers", "0", "1")
    rows = rows_of("loader", *flags, "--max-images", "6", capsys=capsys)
    names = ("loader, 0 workers", "loader, 0 workers, against bare decode_image")
    assert set(rows) == {*names, "loader, 1 workers"}
    assert all(row["ours"] > 0 and row["torchvision"] > 0 for row in rows.values())


def test_both_loaders_give_the_same_pixels_and_boxes(tiny_shapes: Path) -> None:
    path = tiny_shapes / "annotations" / "instances_train2017.json"
    annotations, _ = read_annotations(path)
    number = np.arange(1)
    images = tiny_shapes / "train2017"
    label_map = benchmark_loader.coco_utils.label_categories(annotations.categories)
    image, target = benchmark_loader.coco_utils.CocoDetection(images, annotations, label_map)[0, 0]
    samples = benchmark_loader.TorchvisionSamples(path, images, annotations.image_ids[number])
    for _ in range(20):  # until it is not flipped
        theirs, their_target = samples[0]
        if torch.allclose(theirs, image.float() / 255):
            break
    torch.testing.assert_close(theirs, image.float() / 255)
    torch.testing.assert_close(their_target["boxes"], target["boxes"])
    assert their_target["masks"].shape == (len(target["boxes"]), *image.shape[1:])
    x1, y1, x2, y2 = target["boxes"][0].tolist()
    inside = their_target["masks"][0].nonzero().float()
    assert inside[:, 1].mean() == pytest.approx((x1 + x2) / 2, abs=3)
    assert inside[:, 0].mean() == pytest.approx((y1 + y2) / 2, abs=3)


# --- step -----------------------------------------------------------------------------------------


def test_step_counts_no_wait_in_ours_and_many_in_torchvisions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = rows_of(*TINY_STEP, capsys=capsys)
    waits = rows["host waits, model alone"]
    assert waits["ours"] == 0 and waits["torchvision"] >= 20 and waits["met"]
    whole = rows["host waits, whole step"]
    assert whole["met"]
    assert whole["torchvision"] == waits["torchvision"] + 4  # the loss, and three for the log
    calls = rows["operator calls, anchors and loss"]
    # At this size; the budget of a quarter is for the recipe's, where torchvision calls more. Calls
    # within calls are counted, too, and depend on the number of threads.
    assert 0 < calls["ours"] <= calls["torchvision"] / 3.5
    assert rows["operator calls, whole step"]["ours"] > calls["ours"]
    # One architecture; the box subnet leaves out cells, but most are near a box in such images.
    assert 1 < rows["FLOPs per step"]["ratio"] < 1.2
    assert rows["step, fp32, batch 2"]["ours"] > 0
    host = rows["host time of a step, fp32"]
    assert host["ours"] > 0 and host["torchvision"] > 0
    assert rows["peak memory of a step, with weights"]["ours"] > 100  # weights, gradients, momentum


def test_a_wait_in_the_model_is_counted() -> None:
    settings = benchmark_step.Settings(
        "retinanet_resnet18_fpn", torch.device("cpu"), "fp32", 64, 96
    )
    ours, theirs, batches = benchmark_step.build(settings, 1, 2)
    original = ours.model.compute_loss

    def with_waits(*arguments: Any) -> Any:
        losses = original(*arguments)
        losses["classification"].item()
        (losses["bbox_regression"].reshape(1) > 0).nonzero()
        return losses

    ours.model.compute_loss = with_waits
    rows = {row.name: row for row in benchmark_step.count_rows(ours, theirs, batches[0])}
    assert rows["host waits, model alone"].ours == [2]
    assert rows["host waits, model alone"].met() is False
    assert ours.model.compute_loss is with_waits
    assert hasattr(retinanet.make_anchors, "cache_info")  # nothing stays marked


def test_operators_are_counted_once_and_those_within_others_apart() -> None:
    layer = nn.Linear(4, 4)

    def work() -> None:
        with torch.profiler.record_function(benchmark_step.PART):
            layer(torch.ones(1, 4))
        torch.ones(3).exp()

    counts = benchmark_step.count(work)
    assert counts["outer"] == 2  # ones, linear
    assert counts["parts"] > counts["outer"]  # linear calls t and addmm
    assert counts["all"] > counts["parts"] and counts["waits"] == 0


def test_both_sides_start_from_the_same_loss() -> None:
    settings = benchmark_step.Settings(
        "retinanet_resnet18_fpn", torch.device("cpu"), "fp32", 64, 96
    )
    ours, theirs, batches = benchmark_step.build(settings, 2, 2)
    np.testing.assert_allclose(ours.run(batches), theirs.run(batches), rtol=1e-5)
    before = [parameter.detach().clone() for parameter in theirs.model.parameters()]
    theirs.run(batches)
    moved = [not torch.equal(a, b) for a, b in zip(before, theirs.model.parameters(), strict=True)]
    trained = [parameter.requires_grad for parameter in theirs.model.parameters()]
    assert any(moved) and not any(m and not t for m, t in zip(moved, trained, strict=True))


def test_flops_of_a_dense_box_subnet_are_torchvisions() -> None:
    assert benchmark_step.matmul_peak(torch.device("cpu"), None, seconds=0.01) > 1e8
    settings = benchmark_step.Settings(
        "retinanet_resnet18_fpn", torch.device("cpu"), "fp32", 64, 96, "dense"
    )
    ours, theirs, batches = benchmark_step.build(settings, 1, 1)
    assert benchmark_step.count_flops(ours, batches[0]) == benchmark_step.count_flops(
        theirs, batches[0]
    )


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_convolutions_are_left_out_of_host_time_only(memory_format: torch.memory_format) -> None:
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=2, dilation=2)
    x = torch.rand(2, 3, 9, 7).to(memory_format=memory_format).requires_grad_()

    def results() -> list[torch.Tensor]:
        conv.zero_grad()
        x.grad = None
        y = conv(x)
        y.sum().backward()
        grads = [x.grad, conv.weight.grad, conv.bias.grad]  # type: ignore[union-attr]
        return [y.detach(), *(grad for grad in grads if grad is not None)]

    expected = results()
    with benchmark_step._empty_convolutions():
        empty = results()
    assert all(not value.any() for value in empty)
    assert [v.shape for v in empty] == [v.shape for v in expected]
    assert empty[0].stride() == expected[0].stride()
    assert all(map(torch.equal, results(), expected))


def test_tf32_on_a_cpu_is_refused_with_the_fix() -> None:
    with pytest.raises(UserError, match="--dtype tf32 is for --device cuda; use fp32"):
        benchmark.main([*TINY_STEP, "--dtype", "tf32"])


# --- memory ---------------------------------------------------------------------------------------


def test_a_tensor_counts_while_it_lives_and_its_views_do_not() -> None:
    x = torch.zeros(1000)
    with benchmark_memory.LiveTensors() as live:
        live.add(x)
        y = x * 2
        z = y.view(10, 100)
        y.add_(1)
        assert (live.now, live.peak) == (8000, 8000)
        del y
        assert live.now == 8000
        del z
        assert (live.now, live.peak) == (4000, 8000)
        w = (x[:500] + 1).double()  # both for a moment
        assert (live.now, live.peak) == (8000, 10_000)
    del w
    assert live.now == 4000


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_fake_tensors_take_what_real_ones_take(dtype: torch.dtype | None) -> None:
    step = ("retinanet_resnet18_fpn", 2, (64, 96), dtype)
    peak = benchmark_memory.step_memory(*step, is_fake=False)
    assert benchmark_memory.step_memory(*step) == peak


def test_the_table_of_the_docs_is_calculated() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text().split("### Memory by batch size")[1]
    rows = [line.strip("|").split("|") for line in text.split("\n\n")[3].splitlines()[2:]]
    shown = {int(batch): [cell.strip() for cell in cells] for batch, *cells in rows}
    assert list(shown) == [1, 2, 4, 8, 16]
    column = 0
    for size in benchmark_memory.SIZES:
        for dtype in benchmark_memory.DTYPES.values():
            model = "retinanet_resnet50_fpn"
            one, two = (benchmark_memory.step_memory(model, n, size, dtype) for n in (1, 2))
            for batch, cells in shown.items():
                if cells[column]:  # it grows by the same amount with each image
                    assert cells[column] == f"{(one + (batch - 1) * (two - one)) / 1e9:.1f}"
            column += 1


# --- eval -----------------------------------------------------------------------------------------


def test_eval_compares_detections_and_all_twelve_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--images", "30", "--classes", "5", "--detections", "20", "--repeats", "1")
    flags += ("--device", "cpu", "--model", "retinanet_resnet18_fpn", "--min-size", "64")
    flags += ("--max-size", "96", "--batch-size", "2", "--candidates", "2000")
    rows = rows_of("eval", *flags, capsys=capsys)
    equal = rows["numbers equal to the last bit"]
    assert equal["ours"] == equal["torchvision"] == 12 and equal["met"]
    assert rows["scoring 30 images, 5 classes"]["torchvision"] > 0
    assert rows["detection, fp32, batch 2, theirs fp32"]["ours"] > 0
    assert rows["decoding and NMS of the same outputs"]["torchvision"] > 0
    assert rows["operator calls of a detection"]["ratio"] > 1.5
    waits = rows["host waits of a detection"]
    # Of a batch the counts, of an image NMS and a number that it copies. torchvision's of an image:
    # mean and deviation; of a level two lists of indices, two numbers; those of NMS; four sizes.
    assert (waits["ours"], waits["torchvision"]) == (1 + 2 * 2, 2 * (2 + 5 * 4 + 2 + 4))
    assert rows["host waits of a detection, per image"]["ours"] == 2.5


def test_both_sides_detect_the_asked_number_of_candidates() -> None:
    settings = benchmark_step.Settings(
        "retinanet_resnet18_fpn", torch.device("cpu"), "fp32", 64, 96
    )
    ours, theirs, (batch,) = benchmark_step.build(settings, 1, 2)
    ours.model.eval(), theirs.model.eval()
    benchmark_detection.spread_scores(ours, batch, 150)
    outputs, _, _ = benchmark_detection.head_outputs(ours, batch)
    assert abs((outputs["cls_logits"].sigmoid() > 0.05).sum().item() - 300) <= 2
    found, expected = (
        function() for function in benchmark_detection.decoding_of_both(ours, theirs, batch)
    )
    for mine, other in zip(found, expected, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in other)


def test_generated_detections_score_neither_nothing_nor_all() -> None:
    scored = benchmark_eval.score_ours(60, 5, 40)
    assert 0.02 < scored.numbers[0] < 0.9 and -1 not in scored.numbers
    assert scored.numbers == benchmark_eval.score_pycocotools(60, 5, 40).numbers


# --- the command line -----------------------------------------------------------------------------


def test_json_is_all_that_is_printed(tiny_shapes: Path, tmp_path: Path) -> None:
    flags = ("--data-path", tiny_shapes, "--repeats", "1", "--workers", "0", "--max-images", "4")
    done = run_script(
        "-m", "tools.benchmark", "loader", *flags, "--json", "--plot", tmp_path / "p.png"
    )
    assert len(done.stdout.splitlines()) == 1 and len(json.loads(done.stdout)["rows"]) == 2
    assert (tmp_path / "p.png").stat().st_size > 1_000


@pytest.mark.parametrize("command", benchmark.SUBCOMMANDS)
def test_every_flag_is_a_parameter_of_the_subcommand(command: str) -> None:
    flags = vars(benchmark.build_parser().parse_args([command]))
    code = sys.modules[f"tools.benchmark.{command}"].run.__code__
    assert set(flags) - {"command", "json", "plot"} == set(code.co_varnames[: code.co_argcount])
