"""A training step: accumulation, EMA, clipping, fp16, stops: pytest tests/test_engine.py."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn as dist_nn
import torch.nn.functional as F
from helpers import CPU, LABEL_MAP, Batch, make_batches, make_state, weights_of
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine
import utils
from models import precision
from models.averaging import make_ema
from models.build import build_model
from runtime import train_state
from runtime.distributed import Processes
from runtime.optimization import build_optimizer
from runtime.train_state import MIN_SCALE, TrainState
from utils import UserError


def run(
    state: TrainState,
    batches: list[Batch],
    per_step: int = 1,
    amp_dtype: torch.dtype | None = None,
) -> list[float]:
    """Train on `batches`; return the loss of each step."""
    losses: list[float] = []

    def after_step(line: dict[str, float] | None, stop: bool) -> bool:
        assert line is not None
        losses.append(line["loss"])
        return stop

    engine.train_one_epoch(
        state.model,
        state,
        batches,
        CPU,
        seed=0,
        batches_per_step=per_step,
        batch_weight=lambda position: 1 / per_step,
        after_step=after_step,
        amp_dtype=amp_dtype,
        print_freq=1,
        image_name=lambda image_id: f"photos/{image_id}.jpg",
    )
    return losses


@pytest.mark.parametrize("per_step", [2, 8])
def test_accumulation_equals_the_larger_batch(tmp_path: Path, per_step: int) -> None:
    """Eight batches of 2 are one of 16, for images that need no padding."""
    batches, joined = make_batches(2 * per_step, size=2), []
    for first in (0, per_step):
        group = batches[first : first + per_step]
        joined.append(([x for a, _ in group for x in a], [x for _, b in group for x in b]))
    accumulated, whole = make_state(tmp_path), make_state(tmp_path)
    losses = run(accumulated, batches, per_step=per_step)
    assert losses == pytest.approx(run(whole, joined), rel=1e-5)
    assert accumulated.step == whole.step == 2
    expected = weights_of(whole.model)
    for name, weight in weights_of(accumulated.model).items():
        assert torch.allclose(weight, expected[name], rtol=1e-4, atol=1e-6), name


def test_ema_is_its_closed_form_and_is_what_gets_evaluated(tmp_path: Path) -> None:
    decay, state = 0.9, make_state(tmp_path, ema_decay=0.9)
    history = []
    for batch in make_batches(4, size=1):
        run(state, [batch])
        history.append(weights_of(state.model))
    # The average starts from the weights after the first step, as torch.optim.swa_utils does.
    name = "head.classification_head.cls_logits.weight"
    expected = history[0][name]
    for weights in history[1:]:
        expected = decay * expected + (1 - decay) * weights[name]
    averaged = dict(state.model_to_evaluate.named_parameters())[name]
    assert torch.allclose(averaged, expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(averaged, history[-1][name], rtol=1e-5, atol=1e-7)


class Crossings(TorchDispatchMode):
    """Counts the operators that have tensors on two devices."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        self.count += len({tensor.device.type for tensor in tensors}) > 1
        return result


@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_the_host_never_waits_for_the_ema(kind: str) -> None:
    with torch.device("meta"):  # instead of a GPU: a copy to it is a wait
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    ema = make_ema(model, 0.9)
    if kind == "torch":
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    assert ema is not None
    is_skipped = {"is_skipped": torch.ones((), dtype=torch.bool, device="meta")}
    with Crossings() as crossings:
        for _ in range(3):
            ema.update_parameters(model, **(is_skipped if kind == "ours" else {}))
    assert int(ema.n_averaged) == 3
    # torch: from the second update on, for weights and for the number of batches.
    assert crossings.count == (4 if kind == "torch" else 0)


def test_the_ema_is_torchs_to_the_bit() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.BatchNorm1d(5, momentum=0.5))
    ours = make_ema(model, 0.9)
    assert ours is not None
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(4):
        model(torch.rand(3, 5))
        for parameter in model.parameters():
            parameter.data.add_(torch.rand_like(parameter))
        for ema in (ours, torchs):
            ema.update_parameters(model)
    expected = torchs.module.state_dict()
    for name, value in ours.module.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, expected[name]), name
        else:
            assert value == 4  # as many batches as the model has seen


def test_ema_is_equal_with_and_without_a_resume(tmp_path: Path) -> None:
    batches = make_batches(4, size=1)
    whole = make_state(tmp_path, ema_decay=0.9)
    run(whole, batches)
    first = make_state(tmp_path, ema_decay=0.9)
    run(first, batches[:2])
    second = make_state(tmp_path, ema_decay=0.9)
    second.load_state_dict(first.state_dict())
    run(second, batches[2:])
    expected = whole.model_to_evaluate.state_dict()
    for name, value in second.model_to_evaluate.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_loss_that_is_not_finite_stops_before_the_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = make_state(tmp_path)
    good, bad = make_batches(1, size=2)[0], make_batches(2, size=2, boxes=float("nan"))[1]
    run(state, [good])
    before = weights_of(state.model)
    utils.logger.propagate = True
    with pytest.raises(UserError, match="loss of step 2 is not finite.*--lr"):
        run(state, [bad])
    for name, weight in weights_of(state.model).items():
        assert torch.equal(weight, before[name]), name
    assert "images: photos/100.jpg, photos/101.jpg\n" in caplog.text
    assert state.step == 1


@pytest.mark.parametrize(
    "amp_dtype, clip, opt, first",
    [
        (None, None, "sgd", "the learning rate .* --clip-grad-norm 1; SGD from scratch needs that"),
        (None, 1.0, "sgd", r"the learning rate \(0.001\) is too high: resume with a lower --lr\."),
        (None, None, "adamw", r"the learning rate .* with --clip-grad-norm 1\."),
        (torch.float16, None, "sgd", "a value overflowed in fp16: .*--amp bf16, or the learning"),
    ],
)
def test_the_error_on_a_loss_that_is_not_finite_names_the_likeliest_cause_first(
    tmp_path: Path, amp_dtype: torch.dtype | None, clip: float | None, opt: str, first: str
) -> None:
    optimizer = make_state(tmp_path, opt=opt).optimizer
    text = train_state.advice_on_not_finite(optimizer, 1e-3, amp_dtype, clip)
    assert re.search(f"Most likely {first}.*Only then check the boxes", text), text


def epoch(state: TrainState, batches: list[Batch], **options: Any) -> list[dict[str, float] | None]:
    """Train on `batches`; return what `after_step` got of each step."""
    lines: list[dict[str, float] | None] = []
    options = {
        "batch_weight": lambda position: 1.0,
        "batches_per_step": 1,
        "print_freq": 100,
    } | options

    def after_step(line: dict[str, float] | None, stop: bool) -> bool:
        lines.append(line)
        return stop

    processes = CPU
    options = {"after_step": after_step, **options}
    engine.train_one_epoch(state.model, state, batches, processes, seed=0, **options)
    return lines


def overflow_at(state: TrainState, *steps: int) -> None:
    """Make gradients overflow at these optimizer steps, counted from 1, under a finite loss."""
    weight = state.model.head.classification_head.cls_logits.weight
    weight.register_hook(lambda grad: grad * (math.inf if state.step + 1 in steps else 1.0))


def everything_of(state: TrainState) -> dict[str, torch.Tensor]:
    """Return copies of weights, averages, batch statistics and optimizer state, by name."""
    own = state._state_dict()
    tensors = {**own["model"], **{f"ema.{k}": v for k, v in (own["ema"] or {}).items()}}
    for number, values in own["optimizer"]["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare two of `everything_of` to the bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("opt", ["sgd", "sgd_nesterov", "adamw"])
def test_gradients_that_are_not_finite_change_nothing_and_stop_the_run_at_the_next_step(
    tmp_path: Path, opt: str, clip: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    state = make_state(tmp_path, ema_decay=0.9, opt=opt)
    batches = make_batches(4, size=1)
    run(state, batches[:1])
    before = everything_of(state)
    assert all(tensor.isfinite().all() for tensor in before.values())
    overflow_at(state, 2)
    utils.logger.propagate = True
    with pytest.raises(UserError, match=r"gradients of step 2 are not finite \(norm inf|nan\)"):
        epoch(state, batches[1:], clip_grad_norm=clip)
    assert state.step == 2  # the third was not taken
    assert_equal(everything_of(state), before)
    assert "step 2 is not finite; its images: 100\n" in caplog.text


@pytest.mark.parametrize("when", ["line", "stop", "save", "end"])
def test_a_step_that_is_not_finite_is_neither_logged_nor_saved_nor_evaluated(
    tmp_path: Path, when: str
) -> None:
    state, batches = make_state(tmp_path), make_batches(2, size=1)
    overflow_at(state, 2)
    seen = []

    def after_step(line: dict[str, float] | None, stop: bool) -> bool:
        if state.step == 2 and when == "save":
            state.state_dict()
        seen.append(state.step)
        return when == "stop" and state.step == 2

    options: dict[str, Any] = {"after_step": after_step}
    if when == "line":
        options["print_freq"] = 2
    with pytest.raises(UserError, match="gradients of step 2 are not finite"):
        epoch(state, batches, **options)  # also at its end, when an evaluation would follow
    assert seen == ([1] if when in ("line", "save") else [1, 2])
    with pytest.raises(UserError, match="gradients of step 2 are not finite"):
        state.state_dict()


@pytest.mark.parametrize("place", ["model", "statistics", "ema", "optimizer"])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path, place: str) -> None:
    state = make_state(tmp_path, ema_decay=0.9)
    run(state, make_batches(1, size=1))
    state.state_dict()
    weight = state.model.head.classification_head.conv[0][0].weight
    assert state.ema is not None
    tensor = {
        "model": weight,
        "statistics": state.model.backbone.body.bn1.running_var,
        "ema": next(state.ema.module.parameters()),
        "optimizer": state.optimizer.state[weight]["momentum_buffer"],
    }[place]
    tensor.data.view(-1)[0] = math.nan if place == "model" else math.inf
    with pytest.raises(UserError, match="1 tensors are not finite.*such as .*nothing was saved"):
        state.state_dict()


@pytest.mark.parametrize("clip", [None, 0.1])
def test_lines_have_the_mean_norm_of_the_gradients_before_clipping(
    tmp_path: Path, clip: float | None
) -> None:
    state = make_state(tmp_path, opt="sgd", momentum=0.0, wd=0.0)
    norms, moved = [], []
    for number, batch in enumerate(make_batches(2, size=1)):
        before = weights_of(state.model)
        torch.manual_seed(utils.derive_seed(0, 0, number))
        state.model.train()
        losses = state.model(*engine.to_device(*batch, torch.device("cpu")))
        torch.stack(list(losses.values())).sum().backward()
        grads = [p.grad.flatten() for p in state.model.parameters() if p.grad is not None]
        norms.append(float(torch.cat(grads).double().norm()))
        state.model.zero_grad()
        epoch(state, [batch], clip_grad_norm=clip)
        after = weights_of(state.model)
        moved.append(float(torch.cat([(after[k] - before[k]).flatten() for k in after]).norm()))
    assert moved == pytest.approx([1e-3 * min(n, clip or n) for n in norms], rel=1e-3)
    assert norms[0] > 0.1
    again = make_state(tmp_path, opt="sgd", momentum=0.0, wd=0.0)
    _, line = epoch(again, make_batches(2, size=1), clip_grad_norm=clip, print_freq=2)
    assert line is not None and line["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-3)
    assert "norms" not in line and "steps" not in line


def test_the_norm_of_a_window_outlives_a_resume(tmp_path: Path) -> None:
    batches = make_batches(3, size=1)
    *_, expected = epoch(make_state(tmp_path), batches, print_freq=3)
    first, second = make_state(tmp_path), make_state(tmp_path)
    epoch(first, batches[:2])
    second.load_state_dict(first.state_dict())
    (line,) = epoch(second, batches[2:], print_freq=3)
    assert line is not None and expected is not None
    assert line["grad_norm"] == expected["grad_norm"] > 0


class Waits(TorchDispatchMode):
    """Counts the operators by which the host reads a number from the device."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_the_host_does_not_wait_to_skip_a_step(tmp_path: Path, opt: str) -> None:
    state = make_state(tmp_path, opt=opt)
    run(state, make_batches(1, size=1))
    for parameter in weights_of(state.model):
        state.model.get_parameter(parameter).grad = torch.ones_like(
            state.model.get_parameter(parameter)
        )
    with Waits() as waits:
        _, is_skipped = engine._take_step(state, None)  # clipping waits on a CPU, but on no GPU
    assert waits.count == 0
    with Waits() as waits:
        assert not is_skipped
    assert waits.count == 1


def test_a_stop_is_honoured_between_two_steps(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    finished = engine.train_one_epoch(
        state.model,
        state,
        make_batches(4, size=1),
        CPU,
        seed=0,
        batches_per_step=1,
        batch_weight=lambda position: 1.0,
        after_step=lambda line, stop: stop,
        should_stop=lambda: state.step == 1,
    )
    assert not finished
    assert (state.step, state.position) == (2, 2)


def test_a_step_in_fp16_is_that_of_fp32_with_the_scale_taken_out(tmp_path: Path) -> None:
    batches = make_batches(1, size=1)
    half, full = make_state(tmp_path, scale=2.0**12), make_state(tmp_path)
    before = weights_of(full.model)
    assert run(half, batches, amp_dtype=torch.float16) == pytest.approx(run(full, batches), 1e-3)
    moved, expected = (
        torch.cat([(weight - before[k]).flatten() for k, weight in weights_of(state.model).items()])
        for state in (half, full)
    )
    # Rounding turns some ReLUs around: 0.044 was seen, and 0.11 with bf16.
    assert (moved - expected).norm() < 0.08 * expected.norm()
    assert moved.norm() == pytest.approx(float(expected.norm()), rel=0.01)


def test_an_overflow_in_fp16_skips_the_step_and_the_scale_outlives_a_resume(tmp_path: Path) -> None:
    state, batches = make_state(tmp_path, scale=2.0**40), make_batches(1, size=1)
    before = weights_of(state.model)
    (loss,) = run(state, batches, amp_dtype=torch.float16)
    assert math.isfinite(loss)  # it is its gradients that do not fit
    assert all(torch.equal(weight, before[k]) for k, weight in weights_of(state.model).items())
    assert state.step == 1 and state.scaler.get_scale() == 2.0**39
    resumed = make_state(tmp_path, scale=1.0)
    resumed.load_state_dict(state.state_dict())
    assert resumed.scaler.state_dict() == state.scaler.state_dict()


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_first_step_that_fp16_skips_changes_nothing(tmp_path: Path, opt: str) -> None:
    options: dict[str, Any] = {"ema_decay": 0.9, "opt": opt, "from_scratch": True}
    state, batches = make_state(tmp_path, scale=2.0**40, **options), make_batches(2, size=1)
    before = everything_of(state)
    garbage = [torch.full((2**k,), float("nan")) for k in range(8, 23) for _ in range(2)]
    del garbage  # what is allocated next begins as NaN
    (line,) = epoch(state, batches[:1], amp_dtype=torch.float16, print_freq=1)
    after = everything_of(state)
    assert_equal({name: after[name] for name in before}, before)
    assert not any(value.any() for name, value in after.items() if name not in before)  # Adam's
    assert line is not None and line["grad_norm"] == 0
    # The next step is that of a run which never saw this one.
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 2.0**12})
    fresh = make_state(tmp_path, scale=2.0**12, **options)
    fresh.position = 1
    for s in (state, fresh):
        epoch(s, batches[1:], amp_dtype=torch.float16)
    assert_equal(
        *({k: v for k, v in everything_of(s).items() if "ema" not in k} for s in (state, fresh))
    )


def test_fp16_stops_where_no_scale_helps(tmp_path: Path) -> None:
    state, batches = make_state(tmp_path, scale=3 * MIN_SCALE), make_batches(3, size=1)
    overflow_at(state, 1, 2, 3)
    with pytest.raises(UserError, match="gradients of step 2 .* Most likely a value overflowed"):
        epoch(state, batches, amp_dtype=torch.float16)


def test_a_micro_batch_of_weight_0_changes_nothing(tmp_path: Path) -> None:
    batches, states = make_batches(2, size=2), []
    for count in (1, 2):
        states.append(make_state(tmp_path, from_scratch=True, ema_decay=0.9))
        weight = [1.0, 0.0].__getitem__
        epoch(states[-1], batches[:count], batches_per_step=count, batch_weight=weight)
    assert any("num_batches_tracked" in name for name in everything_of(states[0]))
    assert_equal(*map(everything_of, states))


class HostSyncBatchNorm(torch.nn.SyncBatchNorm):
    """torch's, which works on GPUs only, written again for a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = self.process_group or dist.group.WORLD
        size = dist.get_world_size(group)
        if size <= 1:
            return F.batch_norm(
                *(x, self.running_mean, self.running_var, self.weight, self.bias),
                True,
                self.momentum,
                self.eps,
            )
        mean, square = (dist_nn.all_reduce(v.mean(0) / size, group=group) for v in (x, x.square()))
        variance, count = square - mean.square(), len(x) * size
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


class Normalised(torch.nn.Module):
    """A model of one batch normalisation, whose images are rows of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.last = torch.nn.Linear(3, 1)

    def forward(self, images: list[torch.Tensor], targets: Any) -> dict[str, torch.Tensor]:
        return {"square": self.last(self.norm(torch.stack(images).flatten(1))).square().mean()}


def train_normalised(rank: int, world_size: int, folder: Path) -> None:
    """Train on three batches, two a step for two processes; rank 0 writes what it has then."""
    init = f"file://{folder}/meeting{world_size}"
    dist.init_process_group("gloo", init, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model, batches = Normalised(), make_batches(3, size=4)
    batches = [([i[:, :1, :1] for i in images], targets) for images, targets in batches]
    if world_size == 1:
        joined = (batches[0][0] + batches[1][0], batches[0][1] + batches[1][1])
        shard, weight = [joined, batches[2]], [1.0, 1.0]
    else:
        shard, weight = [batches[rank], batches[2 * (1 - rank)]], [1.0, 1.0, 2.0, 0.0]
    wrapped = DistributedDataParallel(model)  # which takes no SyncBatchNorm on a CPU
    model.norm.__class__, model.norm.process_group = HostSyncBatchNorm, None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(model, optimizer, scheduler, scaler)
    engine.train_one_epoch(
        wrapped,
        state,
        shard,
        Processes(torch.device("cpu"), rank, world_size),
        seed=0,
        batches_per_step=world_size,
        batch_weight=weight.__getitem__,
        after_step=lambda line, stop: stop,
    )
    if rank == 0:
        torch.save(model.state_dict(), folder / f"{world_size}.pth")
    dist.destroy_process_group()


def test_a_process_of_weight_0_does_not_change_synchronised_statistics(
    tmp_path: Path,
) -> None:
    for world_size in (1, 2):
        torch.multiprocessing.spawn(train_normalised, (world_size, tmp_path), world_size)
    one, two = (torch.load(tmp_path / f"{size}.pth") for size in (1, 2))
    for name, value in two.items():
        assert torch.allclose(value, one[name], rtol=1e-4, atol=1e-6), name


def test_no_gradient_comes_from_uninitialised_memory(tmp_path: Path) -> None:
    # An image of 64 x 128 has a P6 map one column wide: see FullPrecisionP6P7.
    model = build_model("retinanet_resnet18_fpn", LABEL_MAP, min_size=64, max_size=128)
    model.train()
    images = [torch.rand(3, 128, 64) for _ in range(2)]
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    for _ in range(3):
        garbage = [torch.full((2**k,), float("nan")) for k in range(8, 23) for _ in range(2)]
        del garbage  # what is allocated next begins as NaN
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(images, [target, target])
        torch.stack(list(losses.values())).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_boxes_are_computed_in_fp32_under_mixed_precision() -> None:
    torch.manual_seed(0)
    model = build_model("retinanet_resnet18_fpn", LABEL_MAP, min_size=256, max_size=256).eval()
    model.score_thresh = 0.0
    image = [torch.rand(3, 256, 256)]
    seen: list[torch.dtype] = []
    original = model.anchor_generator.forward

    def watched(*inputs: object) -> list[torch.Tensor]:
        anchors = original(*inputs)
        seen.append(anchors[0].dtype)
        return anchors

    model.anchor_generator.forward = watched
    with torch.inference_mode():
        before = model(image)[0]["boxes"]
        with precision.autocast(torch.device("cpu"), torch.bfloat16):
            mixed = model(image)[0]
        after = model(image)[0]["boxes"]
    assert seen == [torch.float32]  # once for all three
    assert mixed["boxes"].dtype == mixed["scores"].dtype == torch.float32
    assert torch.equal(before, after)
    assert isinstance(model.backbone.fpn.extra_blocks, precision.FullPrecisionP6P7)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("before, after", [(0, 1), (1, 0)])
def test_a_resume_with_another_memory_format_updates_every_weight_alike(
    tmp_path: Path, opt: str, before: int, after: int
) -> None:
    formats = (torch.contiguous_format, torch.channels_last)

    def state_in(memory_format: torch.memory_format) -> TrainState:
        state = make_state(tmp_path, ema_decay=0.9)
        state.model.to(memory_format=memory_format)
        state.optimizer = build_optimizer(
            state.model, 1e-3, opt=opt, momentum=0.9, wd=1e-4, norm_weight_decay=None
        )
        state.scheduler = torch.optim.lr_scheduler.LambdaLR(state.optimizer, lambda step: 1.0)
        state.ema = make_ema(state.model, 0.9)
        return state

    def step(state: TrainState, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in state.model.parameters():
            if parameter.requires_grad:
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
        state.optimizer.step()
        state.scheduler.step()
        assert state.ema is not None
        state.ema.update_parameters(state.model)

    uninterrupted = state_in(formats[before])
    for seed in range(2):
        step(uninterrupted, seed)
    resumed = state_in(formats[after])
    saved = uninterrupted.state_dict() | {"step": 2}
    resumed.load_state_dict(copy.deepcopy(saved))
    for seed in (2, 3):
        step(uninterrupted, seed)
        step(resumed, seed)
        for which in ("model", "ema"):
            expected, actual = uninterrupted.state_dict()[which], resumed.state_dict()[which]
            for name, value in expected.items():
                torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-7, msg=name)
