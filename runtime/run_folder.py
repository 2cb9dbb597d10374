"""A run as its folder shows it: the log, the records, checkpoints and evaluations, when and where.

Rank 0 writes; what it decides, such as whether a checkpoint or an evaluation is due, is the same on
every process.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

import coco_eval
import coco_utils
import engine
import utils
from coco_eval import CocoEvaluator
from data import coco_arrays
from models.build import mixed_precision
from runtime import checkpoint, progress
from utils import Processes, file_errors, logger

SAMPLES = 4  # images that TensorBoard shows at a time
SHOWN_SCORE = 0.5  # of detections there
# What an evaluation writes; results.json is the last, so it marks a finished one.
FILES = ("detections.json", "analysis.json", "curves.npz", "detections.npy", "results.json")


def open_folder(
    folder: Path,
    resume: str | None,
    test_only: bool,
    processes: Processes,
    stack: contextlib.ExitStack,
) -> Path | None:
    """Start the log, claim a run's folder until `stack` closes; return the checkpoint to load.

    Raises:
        UserError: if the folder holds a run that `resume` does not continue, or is being written.
    """
    path = Path(resume) if resume and resume != "auto" else None
    if test_only:
        utils.set_up_logging(processes.is_main)
        return Path(resume) if resume else None

    def claim() -> Path | None:
        """Be the one process that holds the folder and knows what is in it."""
        with file_errors("write", folder):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(utils.lock_folder(folder))
            utils.set_up_logging(True, folder / "log.txt")
            if resume == "auto":
                checkpoint.remove_leftovers(folder)
                return checkpoint.newest(folder)
            checkpoint.require_unused(folder)
            return path

    utils.set_up_logging(processes.is_main)
    return processes.on_main(claim)


@dataclass
class Evaluation:
    """The validation data on one process, and how it is evaluated."""

    data: coco_utils.CocoDetection
    loader: DataLoader
    processes: Processes
    coco_eval: str
    save_detections: bool
    val_loss: bool
    amp_dtype: torch.dtype | None
    should_stop: utils.StopSignal

    def run(
        self,
        model: nn.Module,
        place: Path | None,
        tested: Mapping[str, Any] | None = None,
    ) -> tuple[bool, dict[str, float]]:
        """Evaluate on all processes, print the table, write what was found to the folder `place`.

        Args:
            tested: what `--test-only` evaluates, for `analysis.json`: "weights" and "step".

        Returns:
            Whether it was not stopped, and the metrics.

        Raises:
            UserError: on every process, if the folder cannot be written.
        """
        evaluator = coco_eval.CocoEvaluator(self.data.annotations, self.data.label_map)
        with mixed_precision(model, self.amp_dtype):
            finished, result = engine.evaluate(
                model,
                self.loader,
                evaluator,
                self.processes,
                backend=self.coco_eval,
                with_losses=self.val_loss,
                should_stop=self.should_stop,
            )
        if not finished:
            return False, {}
        self.processes.broadcast(None)  # the others wait here, as long as rank 0 scores
        write = functools.partial(self._write, result, evaluator, place, tested)
        return True, self.processes.on_main(write)

    def _write(
        self,
        result: engine.Evaluation | None,
        evaluator: CocoEvaluator,
        place: Path | None,
        tested: Mapping[str, Any] | None,
    ) -> dict[str, float]:
        """Log a result and write it to the folder `place`; return its metrics."""
        assert result is not None, "rank 0 has it"
        self._log(result)
        if place is not None:
            with file_errors("create", place):
                place.mkdir(parents=True, exist_ok=True)
                for name in reversed(FILES):  # of an earlier evaluation, perhaps of other weights
                    (place / name).unlink(missing_ok=True)
        if self.save_detections:
            path = (place or Path()) / "detections.json"
            evaluator.write_results(result.detections, path)
            logger.info("detections written to %s", path)
        if place is not None and result.analysis is not None:
            about = {
                "images": str(self.data.root.resolve()),
                "annotations": str(self.data.annotations.path.resolve()),
                "categories": self.data.label_map,
            }
            extra = {"speed": result.speed, "data": about, "tested": tested}
            coco_eval.write_analysis(result.analysis, place, extra)
            content = io.BytesIO()
            np.save(content, result.detections, allow_pickle=False)
            utils.replace_file(place / "detections.npy", content.getvalue())
            results = json.dumps(result.metrics, indent=2) + "\n"
            utils.replace_file(place / "results.json", results)
        return result.metrics

    def _log(self, result: engine.Evaluation) -> None:
        """Log the numbers and the tables; without annotations there are none."""
        others = dict(list(result.metrics.items())[12:])
        shown = "  ".join(f"{k} {v:.3g}" for k, v in (result.speed | others).items())
        if result.analysis is None:
            text = "%d detections on %d images, which have no annotations to score them by: %s"
            logger.info(text, len(result.detections), len(self.data), shown)
            return
        classes = coco_eval.class_table(result.analysis.per_class)
        logger.info("evaluated %d images: %s\n%s", len(self.data), shown, result.table)
        errors = coco_eval.error_line(result.analysis)
        logger.info("by class, best first:\n%s\n%s", classes, errors)
        if result.metrics["AP"] < 0:
            logger.warning("no box is annotated on the validation images, so AP is -1")


class Run:
    """A training run's folder: its records, its checkpoints, what was evaluated when."""

    def __init__(
        self,
        folder: Path,
        state: engine.TrainState,
        evaluation: Evaluation,
        settings: dict[str, Any],
        paths: dict[str, Path],
        stack: contextlib.ExitStack,
    ) -> None:
        self.folder, self.state, self.evaluation, self.paths = folder, state, evaluation, paths
        self.processes = evaluation.processes
        self.settings: dict[str, Any] = {
            k: str(v) if isinstance(v, Path) else v for k, v in settings.items()
        }
        self.extra: dict[str, Any] = {
            "args": self.settings,
            "categories": evaluation.data.label_map,
            "versions": utils.versions(),
        }
        self.evaluated: set[int] = set()
        self.lines_seen, self.is_warned = 0, False
        self.tensorboard: Any = None
        if settings["tensorboard"]:
            self.processes.on_main(lambda: self._open_tensorboard(stack))

    def _open_tensorboard(self, stack: contextlib.ExitStack) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was written after the checkpoint that is resumed from, will be written again.
        place = self.folder / "tensorboard"
        with file_errors("write", place):
            writer = SummaryWriter(str(place), purge_step=self.state.step + 1)
            self.tensorboard = stack.enter_context(writer)

    def start(self, data: coco_utils.CocoDetection, lr: float, steps_per_epoch: int) -> None:
        """Say what will run, in the log and in args.json; take the records back to this step."""
        settings = self.settings
        global_batch = settings["batch_size"] * settings["batches_per_step"]
        self.progress = progress.Progress(
            steps_per_epoch, settings["epochs"], global_batch, self.processes.is_main
        )

        def write() -> list[dict[str, Any]]:
            """Log the setup, write args.json; return the records up to this step."""
            splits = {"data": data, "val_data": self.evaluation.data}
            self.extra["data"] = {k: split.annotations.summary() for k, split in splits.items()}
            with file_errors("delete", self.folder / "preempted"):
                (self.folder / "preempted").unlink(missing_ok=True)
            kept = utils.rewind_json_lines(self.folder / "metrics.jsonl", self.state.step)
            about = {
                **{k: v for k, v in self.extra.items() if k != "data"},
                "effective_lr": lr,
                "global_batch": global_batch,
                "paths": {name: str(path) for name, path in self.paths.items()},
                "summary": self._summary(data, lr, steps_per_epoch),
            }
            utils.replace_file(self.folder / "args.json", json.dumps(about, indent=2) + "\n")
            processes_here = progress.processes_on_this_machine()
            warnings = [
                *progress.rate_warnings(settings["opt"], lr, global_batch, settings["weights"]),
                *progress.scratch_warnings(
                    settings["opt"],
                    not (settings["weights"] or settings["weights_backbone"]),
                    settings["clip_grad_norm"],
                ),
                *progress.worker_warnings(
                    settings["workers"], processes_here, utils.usable_cores()
                ),
                *self._shared_memory_warnings(data, processes_here),
                *progress.precision_warnings(settings["amp"], self.processes.device),
                *self._disk_use(steps_per_epoch)[1],
            ]
            title = f"{self.folder} from step {self.state.step}"
            progress.log_table(title, about["summary"], warnings)
            if self.tensorboard is not None:
                with file_errors("write", self.folder / "tensorboard"):
                    self._show_samples(data)
            return kept

        kept = self.processes.on_main(write)
        aps = {r["epoch"]: r["AP"] for r in kept if "AP" in r}
        self.evaluated = set(aps)
        self.state.best = max(aps.values(), default=self.state.best)
        # Resumed from another checkpoint, of this folder or not: from here on it is the newest.
        if self.state.step > 0 and not self.processes.on_main(self._newest_is_this_step):
            self.save()
        if self.state.epoch and not self.state.position:
            name = f"model_{self.state.epoch - 1}.pth"
            self.processes.on_main(lambda: self._keep(name, anew=False))

    def _shared_memory_warnings(
        self, data: coco_utils.CocoDetection, processes_here: int
    ) -> list[str]:
        if not Path("/dev/shm").is_dir():  # not on macOS
            return []
        pixels = float(data.sizes().astype(np.float64).prod(axis=1).mean())
        batch = int(self.settings["batch_size"] * 3 * pixels)
        free = shutil.disk_usage("/dev/shm").free
        return progress.shared_memory_warnings(
            self.settings["workers"], processes_here, batch, free
        )

    def _newest_is_this_step(self) -> bool:
        path = self.folder / checkpoint.NEWEST
        return checkpoint.step_of(path) == self.state.step and checkpoint.is_verified(path)

    def _disk_use(self, steps_per_epoch: int) -> tuple[str, list[str]]:
        """Return what checkpoints will take and what is free, for people, and warnings."""
        limit = self.settings["max_steps"]
        epochs = self.settings["epochs"]
        if limit:
            epochs = min(epochs, limit // steps_per_epoch)
        keep = self.settings["keep_checkpoints"]
        kept = epochs if keep is None else min(epochs, keep)
        size, others = (
            _checkpoint_bytes(self.state, self.settings),
            3,
        )  # checkpoint.pth, the one before, best.pth
        there = [path for path in checkpoint.own(self.folder) if path.is_file()]
        # Another one for a moment, as a temporary file beside the others.
        needed = (kept + others + 1) * size - sum(path.stat().st_size for path in there)
        with file_errors("read", self.folder):
            free = shutil.disk_usage(self.folder).free
        text = (
            f"{kept} model_EPOCH.pth and {others} more checkpoints of {size / 1e9:.2g} GB: "
            f"{(kept + others) * size / 1e9:.3g} GB; {free / 1e9:.3g} GB free"
        )
        warnings = []
        if needed > free:
            warnings.append(
                f"{self.folder} needs {needed / 1e9:.3g} GB for checkpoints and has "
                f"{free / 1e9:.3g} GB free; --keep-checkpoints 1 keeps one epoch and the best"
            )
        return text, warnings

    def _summary(
        self, data: coco_utils.CocoDetection, lr: float, steps_per_epoch: int
    ) -> dict[str, str]:
        """Return what will run, by name, for people."""
        settings, processes, versions = self.settings, self.processes, self.extra["versions"]
        per_step = settings["batches_per_step"]
        count = sum(parameter.numel() for parameter in self.state.model.parameters())
        trained = sum(p.numel() for p in self.state.model.parameters() if p.requires_grad)
        images = f"{len(data)} of {len(data.annotations)} images to train on"
        classes = [utils.printable(category["name"]) for category in data.label_map]
        names = ", ".join(classes)
        return {
            "data": f"{images}, {len(self.evaluation.data)} to evaluate",
            "classes": f"{len(classes)}: {names if len(names) <= 70 else names[:69] + '…'}",
            "model": f"{settings['model']}, {count:,} parameters, {trained:,} of them trained",
            "weights": progress.describe_weights(
                settings["weights"], settings["weights_backbone"], self.state.step
            ),
            "global batch": f"{settings['batch_size'] * per_step} images: {settings['batch_size']} "
            f"x {processes.world_size} processes x {per_step // processes.world_size} accumulated",
            "learning rate": f"{lr:g}, {settings['opt']}",
            "length": f"{settings['epochs']} epochs of {steps_per_epoch} steps",
            "disk": self._disk_use(steps_per_epoch)[0],
            "precision": settings["amp"] or "fp32",
            "devices": progress.describe_devices(processes.device, processes.world_size),
            "versions": ", ".join(f"{k} {v}" for k, v in versions.items() if k != "revision"),
            "git revision": versions["revision"],
        }

    def _show_samples(self, data: coco_utils.CocoDetection) -> None:
        """Write the first training images, as they are in this epoch, to TensorBoard."""
        assert self.tensorboard is not None
        names = {category["label"]: category["name"] for category in data.label_map}
        for number in range(min(SAMPLES, len(data))):
            image, target = data[self.state.epoch, number]
            texts = [names[label] for label in target["labels"].tolist()]
            self.tensorboard.add_image_with_boxes(
                f"training/{number}", image, target["boxes"], self.state.step, labels=texts
            )

    def _show_detections(self, place: Path) -> None:
        """Write the first validation images with what was found there to TensorBoard."""
        assert self.tensorboard is not None
        data, found = self.evaluation.data, np.load(place / "detections.npy")
        names = {category["label"]: category["name"] for category in data.label_map}
        ranks = np.argsort(np.argsort(data.annotations.image_ids))
        for number in range(min(SAMPLES, len(data))):
            image, _ = data[0, number]
            rows = found[(found[:, 0] == ranks[number]) & (found[:, 5] >= SHOWN_SCORE)]
            texts = [f"{names.get(int(row[6]), '?')} {row[5]:.2f}" for row in rows]
            boxes = torch.from_numpy(coco_arrays.to_xyxy(rows[:, 1:5]))
            self.tensorboard.add_image_with_boxes(
                f"validation/{number}", image, boxes, self.state.step, labels=texts
            )

    def after_step(self, line: dict[str, float] | None, stop: bool) -> bool:
        """Record a line, save if it is time to; return whether the run stops here."""
        if self.processes.is_main:
            self.progress.step(self.state.step)
        if line is not None:
            self._record(line)
            self._warn_of_waiting(line)
        stop |= self.is_complete()
        every = self.settings["checkpoint_every"]
        if stop or (every and self.state.step % every == 0):
            self.save()
        return stop

    def is_complete(self) -> bool:
        """Return whether all epochs, or `--max-steps`, are done."""
        limit = self.settings["max_steps"] or math.inf
        return self.state.epoch >= self.settings["epochs"] or self.state.step >= limit

    def evaluation_is_due(self) -> bool:
        """Return whether the epoch that ended last is to be evaluated, and was not yet."""
        every, done = self.settings["eval_every"], self.state.epoch
        if not every or self.state.position or not done or done - 1 in self.evaluated:
            return False
        return done % every == 0 or done == self.settings["epochs"]

    def evaluate(self) -> bool:
        """Evaluate the epoch that was just saved, keep the best; return whether it was finished."""
        epoch = self.state.epoch - 1
        place = self.folder / "eval" / f"epoch_{epoch}"
        model = self.state.model_to_evaluate
        # Batch statistics are each process's own; a checkpoint has those of rank 0.
        self.processes.equalize(model.buffers())
        finished, metrics = self.evaluation.run(model, place)
        if not finished:
            return False
        ap = metrics["AP"]
        if self.state.best is None or ap > self.state.best:
            newest, best = self.folder / checkpoint.NEWEST, self.folder / checkpoint.BEST
            self.processes.on_main(lambda: checkpoint.copy(newest, best))
            self.state.best = ap
        self.evaluated.add(epoch)
        self._record(metrics, place)
        return True

    def save(self, name: str | None = None) -> None:
        """Write checkpoint.pth on rank 0, and a copy called `name`; if that fails, fail everywhere.

        Raises:
            UserError: on every process, with the path.
        """
        path = self.folder / checkpoint.NEWEST

        def write() -> None:
            checkpoint.save(self.state.state_dict() | self.extra, path)
            if name is not None:
                self._keep(name)

        self.processes.on_main(write)

    def _keep(self, name: str, anew: bool = True) -> None:
        """Copy the newest checkpoint to `name`, or see that a killed process did; prune others."""
        newest, copy = self.folder / checkpoint.NEWEST, self.folder / name
        if anew or (checkpoint.is_verified(newest) and not checkpoint.is_verified(copy)):
            checkpoint.copy(newest, copy)
        if self.settings["keep_checkpoints"] is not None:
            checkpoint.prune(self.folder, self.settings["keep_checkpoints"])

    def is_stopped(self) -> bool:
        """Return, the same on every process, whether any of them was asked to stop."""
        received = self.evaluation.should_stop.received
        return self.processes.sum([float(received is not None)])[0] > 0

    def finish(self) -> None:
        """Log where the run ended and how to go on; leave a marker if a signal ended it."""
        self.progress.close()
        how, step, advice = "ended", self.state.step, ""
        if self.is_stopped():
            received = self.evaluation.should_stop.received or "a signal to another process"
            how = f"stopped by {received}"
            marker = f"{received} at step {step}\n"
            path = self.folder / "preempted"
            self.processes.on_main(lambda: utils.replace_file(path, marker))
            is_auto = self.settings["resume"] == "auto"
            go_on = "the same command goes on" if is_auto else "add --resume auto to go on"
            advice = f", {'saved' if step else 'nothing to save yet'}; {go_on}"
        logger.info("%s after step %d%s", how, step, advice)

    def _record(self, values: dict[str, Any], evaluation: Path | None = None) -> None:
        """Write one record to the log, metrics.jsonl and, if asked for, TensorBoard.

        Args:
            evaluation: the folder of the evaluation whose detections TensorBoard shows.

        Raises:
            UserError: on every process, if it cannot be written.
        """
        epoch = self.state.epoch if self.state.position else self.state.epoch - 1
        record = {"step": self.state.step, "epoch": epoch, **values}

        def write() -> None:
            if "images_per_second" in values:
                self.progress.line(self.state.step, record)
            else:
                logger.info("  ".join(f"{name} {progress.short(v)}" for name, v in record.items()))
            utils.append_json_line(self.folder / "metrics.jsonl", record)
            if self.tensorboard is not None:
                with file_errors("write", self.folder / "tensorboard"):
                    for name, value in values.items():
                        self.tensorboard.add_scalar(name, value, self.state.step)
                    if evaluation is not None:
                        self._show_detections(evaluation)

        self.processes.on_main(write)

    def _warn_of_waiting(self, line: dict[str, float]) -> None:
        """Warn once if data is what the run waits for; in the first line workers still start."""
        if self.lines_seen > 0 and not self.is_warned and self.processes.is_main:
            for warning in progress.waiting_warnings(
                line["data_time_share"], self.settings["workers"]
            ):
                logger.warning("warning: %s", warning)
                self.is_warned = True
        self.lines_seen += 1


def _checkpoint_bytes(state: engine.TrainState, settings: dict[str, Any]) -> int:
    """Return about how large a checkpoint is, from its tensors; a new optimizer has none yet."""

    def size(tensors: Iterable[torch.Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    weights = size(state.model.state_dict().values())
    trained = size(p for p in state.model.parameters() if p.requires_grad)
    moments = 2 if settings["opt"] == "adamw" else int(settings["momentum"] > 0)
    return weights * (1 if state.ema is None else 2) + trained * moments
