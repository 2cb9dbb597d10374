"""What several test files share: small data, models, runs and damage."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torchvision
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from engine import Batch
from models.averaging import make_ema
from models.build import build_model
from runtime.distributed import Processes
from runtime.optimization import build_optimizer
from runtime.run_folder import Run
from runtime.train_state import TrainState

ROOT = Path(__file__).parents[1]
CPU = Processes(torch.device("cpu"))  # a single process
# Flags that make any run small: 64 px, a ResNet-18, no worker processes.
TINY = tuple(
    "--model retinanet_resnet18_fpn --min-size 64 --max-size 64 --device cpu --workers 0 "
    "--batch-size 2 --print-freq 1 --opt adamw --lr 1e-4 --clip-grad-norm 1".split()
)


# --- running scripts ------------------------------------------------------------------------------


def run_script(
    *command: str | Path, processes: int = 1, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND`, or torchrun with several processes, from the project's folder."""
    launch = [sys.executable]
    if processes > 1:
        distributed = ["-m", "torch.distributed.run", "--standalone"]
        launch += [*distributed, f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launch, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    if check and done.returncode:
        raise AssertionError(f"{command} failed:\n{done.stdout}\n{done.stderr}")
    return done


# --- a COCO file ----------------------------------------------------------------------------------


Document = dict[str, Any]


def valid() -> Document:
    """Three images, one without boxes; four annotations, one a crowd; two classes."""
    return {
        "info": {"description": "tëst"},
        "images": [
            {"id": 10, "file_name": "a.jpg", "width": 100, "height": 80},
            {"id": 20, "file_name": "sub/b c.jpg", "width": 60, "height": 120},
            {"id": 30, "file_name": "ü.png", "width": 50, "height": 70, "license": 3},
        ],
        "annotations": [
            annotation(7, 20, 1, [1, 2.5, 30, 40]),
            annotation(5, 10, 2, [15, 10, 20.25, 30], segmentation=[[1, 2, 3.5, 4]]),
            annotation(6, 10, 1, [0, 0, 100, 80], iscrowd=1, segmentation={"counts": [1, 2]}),
            annotation(9, 20, 1, [5, 9, 7, 4], attributes=[{"text": "},{"}, {"a": []}]),
        ],
        "categories": [{"id": 2, "name": "dog"}, {"id": 1, "name": "cat"}],
    }


def annotation(number: int, image: int, category: int, box: Any, **more: Any) -> Document:
    area = 1.0 if not isinstance(box, list) or len(box) < 4 else float(box[2] * box[3])
    ids = {"id": number, "image_id": image, "category_id": category}
    return {**ids, "bbox": box, "area": area, "iscrowd": 0, **more}


def changed(*path: Any, to: Any) -> Callable[[], bytes]:
    """Return a function: the valid document, with the value at `path` changed or deleted."""

    def write() -> bytes:
        document = valid()
        node: Any = document
        for key in path[:-1]:
            node = node[key]
        if to is ...:
            del node[path[-1]]
        else:
            node[path[-1]] = to
        return json.dumps(document).encode()

    return write


def write(folder: Path, content: bytes) -> Path:
    """Write an annotation file and return its path."""
    path = folder / "coco.json"
    path.write_bytes(content)
    return path


# --- a model, its state and its batches -----------------------------------------------------------


def make_label_map(*names: str) -> list[dict[str, Any]]:
    """Return a label map with these classes, numbered from 1."""
    return [{"id": i, "name": name, "label": i} for i, name in enumerate(names, start=1)]


LABEL_MAP = make_label_map("a", "b", "c")
CAT_AND_DOG = [{"id": 3, "name": "cat", "label": 1}, {"id": 8, "name": "dog", "label": 2}]


def make_batches(count: int, size: int, boxes: float = 40.0) -> list[Batch]:
    """Return random uint8 images of 64 px with one box each, as a loader yields them."""
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
                "image_id": torch.tensor(100 * number + i),
            }
            for i in range(size)
        ]
        batches.append((images, targets))
    return batches


def make_state(
    tmp_path: Path,
    *,
    ema_decay: float | None = None,
    lr: float = 1e-3,
    scale: float | None = None,
    opt: str = "sgd",
    momentum: float = 0.9,
    wd: float = 1e-4,
    from_scratch: bool = False,
) -> TrainState:
    """Return a RetinaNet with frozen batch normalisation, as in the recipe, and plain SGD.

    Args:
        scale: the first of fp16; None is fp32.
        from_scratch: train batch normalisation.
    """
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "backbone.pth")
    model = build_model(
        "retinanet_resnet18_fpn",
        LABEL_MAP,
        weights_backbone=None if from_scratch else str(tmp_path / "backbone.pth"),
        min_size=64,
        max_size=64,
    )
    optimizer = build_optimizer(
        model, lr, opt=opt, momentum=momentum, wd=wd, norm_weight_decay=None
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    return TrainState(model, optimizer, scheduler, scaler, make_ema(model, ema_decay))


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of all parameters that train."""
    return {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}


def plain_retinanet(
    state: dict[str, torch.Tensor] | None = None, frozen: bool = False
) -> torchvision.models.detection.RetinaNet:
    """Build a RetinaNet ResNet-18 for three classes with torchvision only; load `state`.

    Args:
        frozen: freeze batch normalisation and the first layers, as with pretrained weights.
    """
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=FrozenBatchNorm2d if frozen else torch.nn.BatchNorm2d,
        trainable_layers=3 if frozen else 5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    model = torchvision.models.detection.RetinaNet(backbone, 4, min_size=64, max_size=64)
    if state is not None:
        model.load_state_dict(state)
    return model


# --- damage ---------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


class Malice:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def write_malice(path: Path, canary: Path, form: str) -> None:
    content = {"model": {"w": torch.zeros(2)}, "args": Malice(canary)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


# --- a run's folder -------------------------------------------------------------------------------


def make_run(folder: Path, processes: Processes = CPU, **settings: Any) -> Run:
    """Make a run of three epochs of five steps, after its first epoch, without data."""
    model = torch.nn.Linear(1, 1)
    nothing: Any = None
    state = TrainState(model, nothing, nothing, nothing, epoch=1, step=3)
    data = SimpleNamespace(label_map=[], annotations=SimpleNamespace(summary=dict))
    flags: dict[str, Any] = {
        "batch_size": 2,
        "batches_per_step": 1,
        "epochs": 3,
        "eval_every": 1,
        "keep_checkpoints": None,
        "max_steps": None,
        "momentum": 0.9,
        "opt": "sgd",
        "patience": None,
        "resume": None,
        "tensorboard": False,
    }
    return Run(
        folder,
        state,
        processes,
        _Stop(),  # type: ignore[arg-type]
        settings=flags | settings,
        train_data=data,
        val_data=data,
        sampler=SimpleNamespace(steps_per_epoch=5),
        stack=contextlib.ExitStack(),
    )


class _Stop:
    """A `StopSignal` that has received SIGTERM, without handlers."""

    received = "SIGTERM"

    def __call__(self) -> bool:
        return True
