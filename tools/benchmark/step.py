"""The training step of RetinaNet: speed, memory, operator calls, waits, FLOPs, host time.

Ours is `engine.train_one_epoch` on the model of `models/`; torchvision's is its own model in the
loop of references/detection. Both have the same weights and see the same generated images, which
ours gets as uint8 and theirs as the float images that its loader makes. As in the recipe batch
normalisation is frozen, and so are the first layers; the weights are random.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import engine
import utils
from engine import Batch
from group_by_aspect_ratio import aspect_ratio_groups, epoch_batches
from models import retinanet
from models.build import build_model
from models.parallel import wrap
from runtime.distributed import Processes
from runtime.flags import non_negative, positive
from runtime.optimization import build_optimizer
from runtime.train_state import TrainState
from tools.benchmark import measuring
from tools.benchmark.data import coco_like_sizes
from tools.benchmark.measuring import MB, Row
from utils import UserError

PART = "anchors and loss"  # as the profile names it
NUM_LABELS = 91  # COCO's, background included
RATE = 1e-6  # small, as weights are random: the loss must stay finite
# What a device has finished all its work for before the host goes on, as the profiler names it.
WAITS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::bincount",
    "torchvision::nms",
)
DTYPES = ("fp32", "tf32", "bf16")
# On a CPU the reference scripts run fp32 whatever the flags, on CUDA unless told `--amp` (fp16).
BUDGETS = {("cpu", "fp32"): 1.1, ("cpu", "bf16"): 1.8, ("cuda", "bf16"): 2.5}
HOST_BUDGETS = {"bf16": 1.6}
# Host time is measured on images of these pixels, with this share of the channels. An epoch has
# work of its own, so that a turn takes several steps.
HOST_SIDE, HOST_CHANNELS, HOST_STEPS = 32, 1 / 16, 8


def add_flags(add: Callable[..., Any]) -> None:
    """Declare the flags of `run`."""
    add("--device", choices=("cpu", "cuda"), default=utils.default_device())
    add("--model", default="retinanet_resnet50_fpn", help="or retinanet_RESNET_fpn")
    add("--box-subnet", choices=retinanet.BOX_SUBNETS, help="of ours; sparse on a CPU, else dense")
    add("--batch-size", type=positive(int), default=2, help="images per step")
    add("--dtype", choices=DTYPES, default="fp32", help="of both sides; fp32 is without TF32")
    add("--compile", action="store_true", help="ours compiled; counts graphs over mixed sizes")
    add("--min-size", type=positive(int), default=800, help="shorter side of images, pixels")
    add("--max-size", type=positive(int), default=1333, help="longer side at most, pixels")
    add("--steps", type=positive(int), default=2, help="of one side before it is the other's turn")
    add("--repeats", type=positive(int), default=10, help="turns of either side")
    add(
        "--mixed-batches",
        type=non_negative(int),
        default=24,
        help="of an epoch of mixed sizes, with --compile",
    )


@dataclass(frozen=True)
class Settings:
    """What both sides have in common; sizes in pixels; `channels` is the share that is kept."""

    model: str
    device: torch.device
    dtype: str
    min_size: int
    max_size: int
    box_subnet: str | None = None
    channels: float = 1

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """Of autocast."""
        return torch.bfloat16 if self.dtype == "bf16" else None


def run(
    model: str,
    device: str,
    dtype: str,
    min_size: int,
    max_size: int,
    box_subnet: str | None,
    compile: bool,
    batch_size: int,
    steps: int,
    repeats: int,
    mixed_batches: int,
) -> list[Row]:
    """Measure; the flags are those of `add_flags`."""
    if compile:
        if box_subnet == "sparse":
            raise UserError("--box-subnet sparse cannot be compiled; leave out one of the flags")
        box_subnet = "dense"
    settings = Settings(model, torch.device(device), dtype, min_size, max_size, box_subnet)
    ours, theirs, batches = build(settings, steps, batch_size)
    np.testing.assert_allclose(
        ours.run(batches),
        theirs.run(batches),
        rtol=1e-4 if dtype == "fp32" else 0.05,  # under autocast their anchors and boxes are bf16
        err_msg="the two sides do not compute the same losses",
    )
    rows = count_rows(ours, theirs, batches[0])
    flops = [sum(count_flops(side, batch) for batch in batches) / steps for side in (ours, theirs)]
    if compile:
        rows += _compile(ours, make_batches(mixed_batches, batch_size, ours.device), batches)
    sides: list[Side] = [ours, theirs]
    if dtype == "bf16":
        sides.append(Torchvision(dataclasses.replace(settings, dtype="fp32")))
    turns = [synchronized(functools.partial(side.run, batches), ours.device) for side in sides]
    speeds = measuring.in_turn(turns, repeats, rate=steps)
    images = [[batch_size * speed for speed in side] for side in speeds]
    budget = BUDGETS.get((device, dtype))
    name = f"step, {dtype}{', compiled' if compile else ''}, batch {batch_size}"
    if dtype == "bf16":  # the budget is for their own step, which has no bf16
        budget_row = Row(f"{name}, theirs fp32", "images/s", images[0], images[2], True, budget)
        rows = [Row(name, "images/s", images[0], images[1], True), budget_row, *rows]
    else:
        rows = [Row(name, "images/s", images[0], images[1], True, budget), *rows]
    peak = matmul_peak(ours.device, settings.amp_dtype)
    shares = [[100 * f * s / peak for s in side] for f, side in zip(flops, speeds, strict=False)]
    memory = [
        [measuring.in_fresh_process(step_memory, number, settings, steps, batch_size)]
        for number in (0, 1)
    ]
    host = measuring.in_fresh_process(host_times, settings, batch_size, 3 * repeats)
    kind = "an eager step" if compile else "a step"  # its process compiles nothing
    unit = f"% of {peak / 1e12:.3g} TFLOP/s"
    return [
        *rows,
        Row(f"host time of {kind}, {dtype}", "ms", *host, budget=HOST_BUDGETS.get(dtype)),
        Row("FLOPs per step", "GFLOP", [flops[0] / 1e9], [flops[1] / 1e9]),
        Row("share of the matmul peak", unit, shares[0], shares[1], True),
        Row(f"peak memory of {kind}, with weights", "MB", memory[0], memory[1]),
    ]


def build(
    settings: Settings, steps: int, batch_size: int, longest: int = 640
) -> tuple[Ours, Torchvision, list[Batch]]:
    """Build both sides with the same weights, and the batches of one turn, of `longest` pixels."""
    if settings.dtype == "tf32" and settings.device.type != "cuda":
        raise UserError("--dtype tf32 is for --device cuda; use fp32 on a CPU")
    utils.set_tf32({"fp32": False, "tf32": True}.get(settings.dtype))
    torch.manual_seed(0)
    ours, theirs = Ours(settings), Torchvision(settings)
    theirs.model.load_state_dict(ours.model.state_dict())
    return ours, theirs, make_batches(steps, batch_size, settings.device, longest)


# --- the two sides --------------------------------------------------------------------------------


class Side:
    """A model, and how it takes a step."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        if settings.channels < 1:
            _keep_channels(model, settings.channels)
        for module in model.modules():
            # Random weights would let residual blocks grow without end: shrink their branches.
            last = getattr(module, "bn3", None) or getattr(module, "bn2", None)
            if isinstance(last, FrozenBatchNorm2d):
                last.weight.fill_(0.2)
        self.model: Any = model.to(settings.device).train()
        self.settings, self.device = settings, settings.device

    def run(self, batches: Sequence[Batch]) -> list[float]:
        """Take a step per batch; return the losses."""
        raise NotImplementedError

    def to_device(self, batch: Batch) -> Batch:
        """Move a batch as the loop does."""
        raise NotImplementedError

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Run the model forward."""
        dtype = self.settings.amp_dtype
        batch = self.to_device(batch)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.model(*batch)

    def backward(self, batch: Batch) -> None:
        """Run the model forward and backward, without the loop around it."""
        losses = self.losses(batch)
        (losses["classification"] + losses["bbox_regression"]).backward()
        self.model.zero_grad(set_to_none=True)


class Ours(Side):
    """The step of `train.py`."""

    def __init__(self, settings: Settings) -> None:
        label_map = [{"name": str(label), "label": label} for label in range(1, NUM_LABELS)]
        model = build_model(
            settings.model,
            label_map,
            load=False,
            weights_backbone="random, but frozen as if trained",
            min_size=settings.min_size,
            max_size=settings.max_size,
            box_subnet=settings.box_subnet,
        )
        super().__init__(model.to(memory_format=torch.channels_last), settings)
        optimizer = build_optimizer(
            self.model, RATE, opt="sgd", momentum=0.9, wd=1e-4, norm_weight_decay=None
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        self.state = TrainState(self.model, optimizer, scheduler, scaler)

    def to_device(self, batch: Batch) -> Batch:
        """Move it without waiting, as uint8."""
        return engine.to_device(*batch, self.device)

    def run(self, batches: Sequence[Batch]) -> list[float]:
        """Take a step per batch; return the losses."""
        losses: list[float] = []

        def after_step(line: dict[str, float] | None, stop: bool) -> bool:
            losses.append(line["loss"] if line else math.nan)
            return stop

        engine.train_one_epoch(
            self.model,
            self.state,
            batches,
            Processes(self.device),
            seed=0,
            batches_per_step=1,
            batch_weight=lambda position: 1.0,
            after_step=after_step,
            amp_dtype=self.settings.amp_dtype,
            print_freq=1,
        )
        return losses


class Torchvision(Side):
    """torchvision's model, in the loop of its reference scripts."""

    def __init__(self, settings: Settings) -> None:
        backbone = resnet_fpn_backbone(
            backbone_name=settings.model.removeprefix("retinanet_").removesuffix("_fpn"),
            weights=None,
            norm_layer=FrozenBatchNorm2d,
            trainable_layers=3,
            returned_layers=[2, 3, 4],
            extra_blocks=LastLevelP6P7(256, 256),
        )
        sizes = {"min_size": settings.min_size, "max_size": settings.max_size}
        model = torchvision.models.detection.RetinaNet(backbone, NUM_LABELS, **sizes)
        super().__init__(model, settings)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=RATE, momentum=0.9, weight_decay=1e-4)
        self.floats: dict[int, list[Tensor]] = {}

    def to_device(self, batch: Batch) -> Batch:
        """Move the float images that its loader makes, which is no work of the step's."""
        images, targets = batch
        if id(batch) not in self.floats:
            self.floats[id(batch)] = [image.float() / 255 for image in images]
        moved = [{k: v.to(self.device) for k, v in target.items()} for target in targets]
        return [image.to(self.device) for image in self.floats[id(batch)]], moved

    def run(self, batches: Sequence[Batch]) -> list[float]:
        """Take a step per batch; return the losses."""
        means = []
        for batch in batches:
            losses = self.losses(batch)
            loss = losses["classification"] + losses["bbox_regression"]
            means.append(loss.item())
            if not math.isfinite(means[-1]):
                raise FloatingPointError(f"the loss is {means[-1]}")
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            for part in (loss, *losses.values()):  # for the meters of its log
                part.item()
        return means


def make_batches(
    count: int, batch_size: int, device: torch.device, longest: int = 640
) -> list[Batch]:
    """Draw batches of COCO-like sizes, of one aspect-ratio group each, with 7 boxes an image."""
    rng = np.random.default_rng(0)
    sizes = np.minimum(coco_like_sizes(count * batch_size, rng), longest)
    order = epoch_batches(aspect_ratio_groups(sizes, 3), batch_size, 0, 0)
    generator = torch.Generator().manual_seed(0)
    batches: list[Batch] = []
    for members in order:
        images, targets = [], []
        for number in members.tolist():
            height, width = sizes[number].tolist()
            image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)
            low = torch.rand((7, 2), generator=generator) * 0.6
            high = low + 0.02 + torch.rand((7, 2), generator=generator) * 0.38
            boxes = torch.cat([low, high], 1) * torch.tensor([width, height] * 2)
            labels = torch.randint(1, NUM_LABELS, (7,), generator=generator)
            target = {"boxes": boxes, "labels": labels, "image_id": torch.tensor(number)}
            pinned = device.type == "cuda"
            images.append(image.pin_memory() if pinned else image)
            targets.append({k: v.pin_memory() if pinned else v for k, v in target.items()})
        batches.append((images, targets))
    return batches


def synchronized(function: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Let a function wait for the device to finish."""

    def call() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return call


# --- counts ---------------------------------------------------------------------------------------


def count_rows(ours: Ours, theirs: Torchvision, batch: Batch) -> list[Row]:
    """Count operator calls and waits of one step of either side; by default as a GPU runs it."""
    counts = []
    options = retinanet.TrainingOptions(box_subnet=ours.settings.box_subnet or "dense")
    with mock.patch.object(ours.model, "options", options):
        for side in (ours, theirs):
            with _labels(side):
                model = count(functools.partial(side.backward, batch))
            whole = count(functools.partial(side.run, [batch]))
            if side.device.type == "cuda":
                model["waits"] = cuda_waits(functools.partial(side.backward, batch))
                whole["waits"] = cuda_waits(functools.partial(side.run, [batch]))
            counts.append((model, whole))
    (model, whole), (their_model, their_whole) = counts

    def row(name: str, mine: float, other: float, **asked: float) -> Row:
        return Row(name, "a step", [mine], [other], **asked)  # type: ignore[arg-type]

    return [
        row("host waits, model alone", model["waits"], their_model["waits"], limit=0),
        row("host waits, whole step", whole["waits"], their_whole["waits"], limit=1),
        row("operator calls, anchors and loss", model["parts"], their_model["parts"], budget=4),
        row("  of these, not from within others", model["outer"], their_model["outer"]),
        row("operator calls, whole step", whole["all"], their_whole["all"]),
    ]


def _labels(side: Side) -> contextlib.ExitStack:
    """Mark what makes anchors and losses, so that the profiler tells it from the rest."""
    parts = [(side.model, "compute_loss")]
    if isinstance(side, Torchvision):
        parts.append((side.model.anchor_generator, "forward"))
    else:
        parts += [(retinanet, "make_anchors"), (side.model, "assign_targets")]
    stack = contextlib.ExitStack()
    for owner, name in parts:
        marked = record_function(PART)(getattr(owner, name))
        stack.enter_context(mock.patch.object(owner, name, marked))
    return stack


def count(function: Callable[[], Any]) -> dict[str, int]:
    """Count operators: "all", those of the "parts" marked, of these the "outer", and "waits"."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    counts = {"all": 0, "parts": 0, "outer": 0, "waits": 0}
    for event in profiler.events() or ():
        if not _is_operator(event.name):
            continue
        above = []
        parent = event.cpu_parent
        while parent is not None:
            above.append(parent.name)
            parent = parent.cpu_parent
        counts["all"] += 1
        counts["waits"] += event.name in WAITS
        if PART in above:
            counts["parts"] += 1
            counts["outer"] += not any(map(_is_operator, above[: above.index(PART)]))
    return counts


def _is_operator(name: str) -> bool:
    return name.startswith(("aten::", "torchvision::"))


def cuda_waits(function: Callable[[], Any]) -> int:
    """Count the calls for which the host waits; an event that it waits for is not seen."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def count_flops(side: Side, batch: Batch) -> int:
    """Return the floating-point operations of matrix products and convolutions of one step."""
    with FlopCounterMode(display=False) as counter:
        side.backward(batch)
    return counter.get_total_flops()


def matmul_peak(device: torch.device, dtype: torch.dtype | None, seconds: float = 1.0) -> float:
    """Return the FLOP/s of this device at the best of several large matrix products."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype or torch.float32) for _ in "ab")
    product = synchronized(lambda: a @ b, device)
    (times,) = measuring.in_turn([product], 3)
    (times,) = measuring.in_turn([product], max(3, int(seconds / min(times))))
    return 2 * side**3 / min(times)


def step_memory(side: int, settings: Settings, steps: int, batch_size: int) -> float:
    """Return the peak of one side alone, MB; on a CPU beyond what the imports take."""
    batches = make_batches(steps, batch_size, settings.device)
    before = measuring.start_peak()
    (Ours, Torchvision)[side](settings).run(batches)
    if settings.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / MB
    return measuring.peak_memory() - before


# --- host time ------------------------------------------------------------------------------------


def host_times(
    settings: Settings, batch_size: int, repeats: int
) -> tuple[list[float], list[float]]:
    """Return the processor time of a step of either side on one thread, ms, without arithmetic.

    It is what a fast GPU waits for: the host's work to launch the kernels. Images are tiny, layers
    have a sixteenth of their channels, and on a CPU convolutions return zeros, as most of their
    time would be oneDNN's.
    """
    torch.set_num_threads(1)
    settings = dataclasses.replace(
        settings,
        min_size=HOST_SIDE,
        max_size=HOST_SIDE,
        box_subnet=settings.box_subnet or "dense",  # as on a GPU
        channels=HOST_CHANNELS,
    )
    with _empty_convolutions() if settings.device.type == "cpu" else contextlib.nullcontext():
        ours, theirs, batches = build(settings, HOST_STEPS, batch_size, HOST_SIDE)
        turns = [functools.partial(side.run, batches) for side in (ours, theirs)]
        measuring.in_turn(turns, 2)
        mine, other = measuring.in_turn(turns, repeats, clock=time.process_time)
    return [1e3 * s / HOST_STEPS for s in mine], [1e3 * s / HOST_STEPS for s in other]


def _keep_channels(model: nn.Module, share: float) -> None:
    """Keep this share of the channels between the layers of a RetinaNet, in place."""
    head: Any = model.head
    outputs = (head.classification_head.cls_logits, head.regression_head.bbox_reg)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            size, inputs = module.weight.shape[:2]
            kept = size if module in outputs else int(size * share)
            inputs = inputs if inputs == 3 else int(inputs * share)
            module.weight.data = module.weight.data[:kept, :inputs].clone()
            if module.bias is not None:
                module.bias.data = module.bias.data[:kept].clone()
        elif isinstance(module, FrozenBatchNorm2d):
            for buffer in module.buffers():
                buffer.data = buffer.data[: int(len(buffer) * share)].clone()


@contextlib.contextmanager
def _empty_convolutions() -> Iterator[None]:
    """Let convolutions on a CPU, and their gradients, be zeros of the right shape and layout."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        numbers = zip(x.shape[2:], weight.shape[2:], *rest[:3], strict=True)
        sides = [(n + 2 * pad - gap * (k - 1) - 1) // by + 1 for n, k, by, pad, gap in numbers]
        is_last = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if is_last else torch.contiguous_format
        shape = (len(x), len(weight), *sides)
        return torch.empty(shape, dtype=x.dtype, memory_format=layout).zero_()

    def backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, needs_bias = rest[-1]
        return (
            torch.zeros_like(x) if needs_x else None,
            torch.zeros_like(weight) if needs_weight else None,
            grad.new_zeros(len(weight)) if needs_bias else None,
        )

    library = torch.library.Library("aten", "IMPL")
    library.impl("convolution", forward, "CPU")
    library.impl("convolution_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def _compile(ours: Ours, mixed: list[Batch], timed: list[Batch]) -> list[Row]:
    """Compile backbone and head; count graphs after one batch and after an epoch of others."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    wrap(ours.model, ours.device, 1, compiled=True)
    ours.run(mixed[:1])
    first = counters["stats"]["unique_graphs"]
    ours.run(mixed)
    later = counters["stats"]["unique_graphs"]
    ours.run(timed)
    shapes = {image.shape for images, _ in mixed for image in images}
    name = f"graphs compiled again, {len(mixed)} batches of {len(shapes)} image sizes"
    return [
        Row("graphs compiled in the first step", "graphs", [first]),
        Row(name, "graphs", [later - first]),
    ]
