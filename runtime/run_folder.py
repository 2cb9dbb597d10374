"""Manages a run's output folder: its log, its records, its checkpoints and its evaluations.

Rank 0 writes. Decisions, such as whether a checkpoint or an evaluation is due, are the same on
every process.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import utils
from runtime import checkpoint, progress, summary
from runtime.distributed import Processes
from runtime.records import append_json_line, rewind_json_lines
from runtime.signals import StopSignal
from runtime.tensorboard import Board
from runtime.train_state import TrainState
from utils import file_errors, logger


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
    progress.set_up_logging(processes.rank)
    if test_only:
        return Path(resume) if resume else None

    def claim() -> Path | None:
        with file_errors("write", folder):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(utils.lock_folder(folder))
            progress.set_up_logging(0, folder / "log.txt")
            if resume == "auto":
                checkpoint.remove_leftovers(folder)
                return checkpoint.newest(folder)
            checkpoint.require_unused(folder)
            return Path(resume) if resume else None

    return processes.on_main(claim)


@dataclass(eq=False)
class Run:
    """A training run's folder: its records, its checkpoints, and which epochs are evaluated.

    Attributes:
        settings: the flags, "batches_per_step", and what else identifies the run.
        train_data, val_data: `coco_utils.CocoDetection` each.
        sampler: of the training data, a `GroupedBatchSampler`.
        stack: closes the files that the run opens.
    """

    folder: Path
    state: TrainState
    processes: Processes
    should_stop: StopSignal
    settings: dict[str, Any]
    train_data: Any
    val_data: Any
    sampler: Any
    stack: contextlib.ExitStack

    def __post_init__(self) -> None:
        self.settings = {k: str(v) if isinstance(v, Path) else v for k, v in self.settings.items()}
        # The parts of a checkpoint beside the state.
        self.extra: dict[str, Any] = {
            "args": self.settings,
            "categories": self.val_data.label_map,
            "versions": utils.versions(),
        }
        if self.processes.is_main:  # which saves
            splits = {"data": self.train_data, "val_data": self.val_data}
            self.extra["data"] = {k: split.annotations.summary() for k, split in splits.items()}
        self.global_batch = self.settings["batch_size"] * self.settings["batches_per_step"]
        self.progress = progress.Progress(
            self.sampler.steps_per_epoch, self.settings["epochs"], self.global_batch
        )
        self.lines_seen, self.is_warned = 0, False
        self.board: Board | None = None
        if self.settings["tensorboard"] and self.processes.is_main:
            self.board = Board(self.folder / "tensorboard", self.state.step)
            self.stack.callback(self.board.close)

    @property
    def lr(self) -> float:
        """The base learning rate in use."""
        return float(self.state.scheduler.base_lrs[0])

    def start(self) -> None:
        """Log the setup, write args.json, drop records after the resumed step."""
        records = self.processes.on_main(self._write_start)
        # A checkpoint is saved before its epoch is evaluated.
        self.state.evaluations |= {r["epoch"]: r["AP"] for r in records if "AP" in r}
        # If the run resumed from another checkpoint, save this one as the newest.
        if self.state.step > 0 and not self.processes.on_main(self._newest_is_this_step):
            self.save()
        if self.state.epoch and not self.state.position:
            self.processes.on_main(self._complete_epoch)

    def _write_start(self) -> list[dict[str, Any]]:
        """Return the records up to this step."""
        with file_errors("delete", self.folder / "preempted"):
            (self.folder / "preempted").unlink(missing_ok=True)
        records = rewind_json_lines(self.folder / "metrics.jsonl", self.state.step)
        content = {
            **{k: v for k, v in self.extra.items() if k != "data"},
            "effective_lr": self.lr,
            "global_batch": self.global_batch,
            "paths": {
                "train_images": str(self.train_data.root),
                "train_annotations": str(self.train_data.annotations.path),
                "val_images": str(self.val_data.root),
                "val_annotations": str(self.val_data.annotations.path),
            },
            "summary": summary.log_setup(self),
        }
        utils.replace_file(self.folder / "args.json", json.dumps(content, indent=2) + "\n")
        if self.board is not None:
            self.board.training_images(self.train_data, self.state.epoch, self.state.step)
        return records

    def _newest_is_this_step(self) -> bool:
        path = self.folder / checkpoint.NEWEST
        return checkpoint.step_of(path) == self.state.step and utils.is_verified(path)

    def _complete_epoch(self) -> None:
        """Copy the newest checkpoint to the epoch's, if a kill prevented that."""
        newest = self.folder / checkpoint.NEWEST
        copy = self.folder / f"model_{self.state.epoch - 1}.pth"
        if utils.is_verified(newest) and not utils.is_verified(copy):
            checkpoint.copy(newest, copy)
        self._prune()

    def _prune(self) -> None:
        if self.settings["keep_checkpoints"] is not None:
            checkpoint.prune(self.folder, self.settings["keep_checkpoints"])

    def after_step(self, line: dict[str, float] | None, stop: bool) -> bool:
        """Record a line, save if that is due; return whether the run stops here."""
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
        """Return whether all epochs, or `--max-steps`, are done, or AP has stopped rising."""
        limit = self.settings["max_steps"] or math.inf
        is_done = self.state.epoch >= self.settings["epochs"] or self.state.step >= limit
        return is_done or self.has_stalled()

    def has_stalled(self) -> bool:
        """Return whether the last `--patience` evaluations had no better AP."""
        return self.state.evaluations_since_best >= (self.settings["patience"] or math.inf)

    def is_stopped(self) -> bool:
        """Return whether any process was asked to stop; the same on every process."""
        return self.processes.sum([float(self.should_stop())])[0] > 0

    def save(self, name: str | None = None) -> None:
        """Write checkpoint.pth on rank 0, and a copy called `name`; if that fails, fail everywhere.

        Raises:
            UserError: on every process, with the path.
        """
        path = self.folder / checkpoint.NEWEST

        def write() -> None:
            checkpoint.save(self.state.state_dict() | self.extra, path)
            if name is not None:
                checkpoint.copy(path, self.folder / name)
                self._prune()

        self.processes.on_main(write)

    def evaluation_is_due(self) -> bool:
        """Return whether the epoch that ended last should be evaluated and was not yet."""
        every, done = self.settings["eval_every"], self.state.epoch
        if not every or self.state.position or not done or done - 1 in self.state.evaluations:
            return False
        return done % every == 0 or done == self.settings["epochs"]

    @property
    def evaluation_folder(self) -> Path:
        """The folder for the evaluation of the epoch that ended last."""
        return self.folder / "eval" / f"epoch_{self.state.epoch - 1}"

    def record_evaluation(self, metrics: dict[str, float]) -> None:
        """Record the metrics of the epoch that ended last; keep its checkpoint if it is the best.

        Raises:
            UserError: on every process, if a file cannot be written.
        """
        if self.state.best is None or metrics["AP"] > self.state.best:
            newest, best = self.folder / checkpoint.NEWEST, self.folder / checkpoint.BEST
            self.processes.on_main(lambda: checkpoint.copy(newest, best))
        self.state.evaluations[self.state.epoch - 1] = metrics["AP"]
        self._record(metrics)

    def _record(self, values: dict[str, Any]) -> None:
        """Write one record to the log, metrics.jsonl and, if there is one, the board.

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
            append_json_line(self.folder / "metrics.jsonl", record)
            if self.board is not None:
                self.board.scalars(values, self.state.step)
                if "AP" in values:
                    rows = np.load(self.evaluation_folder / "detections.npy")
                    self.board.detections(self.val_data, rows, self.state.step)

        self.processes.on_main(write)

    def _warn_of_waiting(self, line: dict[str, float]) -> None:
        """Warn once if the run waits for data, except in the first line, when workers start."""
        if self.lines_seen > 0 and not self.is_warned and self.processes.is_main:
            share, workers = line["data_time_share"], self.settings["workers"]
            for warning in summary.waiting_warnings(share, workers):
                logger.warning("warning: %s", warning)
                self.is_warned = True
        self.lines_seen += 1

    def finish(self) -> None:
        """Log where the run ended and how to go on; leave a marker if a signal ended it."""
        self.progress.close()
        how, step, advice = "ended", self.state.step, ""
        if self.is_stopped():
            received = self.should_stop.received or "a signal to another process"
            how = f"stopped by {received}"
            marker = f"{received} at step {step}\n"
            path = self.folder / "preempted"
            self.processes.on_main(lambda: utils.replace_file(path, marker))
            is_auto = self.settings["resume"] == "auto"
            go_on = "run the same command to resume" if is_auto else "add --resume auto to resume"
            advice = f", {'saved' if step else 'nothing to save yet'}; {go_on}"
        elif self.has_stalled():
            advice = (
                f": no better AP in {self.state.evaluations_since_best} evaluations (--patience "
                f"{self.settings['patience']}); the best is {self.state.best:.3f} of epoch "
                f"{self.state.best_epoch}, in {checkpoint.BEST}"
            )
        logger.info("%s after step %d%s", how, step, advice)
