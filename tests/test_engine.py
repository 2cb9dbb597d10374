"""Proves what a training step does besides its losses: pytest tests/test_engine.py."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine
import model as model_module
import train as train_script
import utils
from model import build_model, make_ema, mixed_precision
from utils import UserError

LABEL_MAP = [{"id": i, "name": name, "label": i} for i, name in enumerate("abc", start=1)]
Batch = engine.Batch


def make_batches(count: int, size: int, boxes: float = 40.0) -> list[Batch]:
    """Return random uint8 images of 64 px with one box each, as the loader gives them."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(count):
        images = [
            torch.randint(256, (3, 64, 64), generator=generator, dtype=torch.uint8)
            for _ in range(size)
        ]
        targets = [
            {
                "boxes": torch.tensor([[8.0, 8.0, boxes, 40.0]]),
                "labels": torch.tensor([1 + number % 3]),
                "image_id": torch.tensor(100 * number + place),
            }
            for place in range(size)
        ]
        batches.append((images, targets))
    return batches


def make_state(
    tmp_path: Path, *, ema_decay: float | None = None, lr: float = 1e-3, scale: float | None = None
) -> engine.TrainState:
    """Return a RetinaNet with frozen batch normalisation, as in the recipe, and plain SGD.

    Args:
        scale: that fp16 starts with; None is for fp32.
    """
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "backbone.pth")
    model = build_model(
        "retinanet_resnet18_fpn",
        LABEL_MAP,
        weights_backbone=str(tmp_path / "backbone.pth"),
        min_size=64,
        max_size=64,
    )
    optimizer = train_script.build_optimizer(
        model, lr, opt="sgd", momentum=0.9, wd=1e-4, norm_weight_decay=None
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    return engine.TrainState(model, optimizer, scheduler, scaler, make_ema(model, ema_decay))


def run(
    state: engine.TrainState,
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
        utils.Processes(torch.device("cpu")),
        seed=0,
        batches_per_step=per_step,
        weight=lambda position: 1 / per_step,
        after_step=after_step,
        amp_dtype=amp_dtype,
        print_freq=1,
    )
    return losses


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of all parameters that train."""
    return {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}


def test_accumulation_equals_the_larger_batch(tmp_path: Path) -> None:
    batches = make_batches(6, size=2)
    joined = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(batches[::2], batches[1::2], strict=True)]
    accumulated, whole = make_state(tmp_path), make_state(tmp_path)
    losses = run(accumulated, batches, per_step=2)
    assert losses == pytest.approx(run(whole, joined), rel=1e-5)
    assert accumulated.step == whole.step == 3
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
    with torch.device("meta"):  # in place of a GPU: to copy to it is to wait for it
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    ema = make_ema(model, 0.9)
    if kind == "torch":
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    assert ema is not None
    with Crossings() as crossings:
        for _ in range(3):
            ema.update_parameters(model)
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


def test_ema_goes_on_after_a_resume_as_if_there_had_been_none(tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match="step 2 is not finite.*--lr"):
        run(state, [bad])
    for name, weight in weights_of(state.model).items():
        assert torch.equal(weight, before[name]), name
    assert "[100, 101]" in caplog.text
    assert state.step == 1


def test_a_stop_is_honoured_between_two_steps(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    finished = engine.train_one_epoch(
        state.model,
        state,
        make_batches(4, size=1),
        utils.Processes(torch.device("cpu")),
        seed=0,
        batches_per_step=1,
        weight=lambda position: 1.0,
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


def test_no_gradient_comes_from_uninitialised_memory(tmp_path: Path) -> None:
    # An image of 64 x 128 has a P6 map one column wide: see model.FullPrecisionP6P7.
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
        with mixed_precision(model, torch.bfloat16):
            mixed = model(image)[0]
        after = model(image)[0]["boxes"]
    assert seen == [torch.float32] * 3
    assert mixed["boxes"].dtype == mixed["scores"].dtype == torch.float32
    assert torch.equal(before, after)
    assert isinstance(model.backbone.fpn.extra_blocks, model_module.FullPrecisionP6P7)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("before, after", [(0, 1), (1, 0)])
def test_a_resume_with_another_memory_format_updates_every_weight_alike(
    tmp_path: Path, opt: str, before: int, after: int
) -> None:
    formats = (torch.contiguous_format, torch.channels_last)

    def state_in(memory_format: torch.memory_format) -> engine.TrainState:
        state = make_state(tmp_path, ema_decay=0.9)
        state.model.to(memory_format=memory_format)
        state.optimizer = train_script.build_optimizer(
            state.model, 1e-3, opt=opt, momentum=0.9, wd=1e-4, norm_weight_decay=None
        )
        state.scheduler = torch.optim.lr_scheduler.LambdaLR(state.optimizer, lambda step: 1.0)
        state.ema = make_ema(state.model, 0.9)
        return state

    def step(state: engine.TrainState, seed: int) -> None:
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
