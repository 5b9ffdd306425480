"""The folder of a run: resume, metrics, checkpoints, ledger, and the model at the end.

config.yaml  metrics.jsonl  loss.png  ledger.jsonl  checkpoints/step-*/  model/
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import pyengine
from pyengine.errors import ArgumentError
from pyengine.formats.atomic import atomic_write
from pyengine.ledger import Ledger, content_id
from pyengine.models import CausalLM, save_pretrained
from pyengine.models.pretrained import config_json
from pyengine.train.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, save_checkpoint
from pyengine.train.config import Config, to_yaml
from pyengine.train.loop import Callback, Metrics, Trainer, TrainingError
from pyengine.train.metrics import MetricsLog, plot_loss, read_metrics
from pyengine.train.progress import ProgressReport
from pyengine.train.random_state import get_random_state, set_random_state
from pyengine.train.signals import StopRequest

CHECKPOINTS = "checkpoints"
MODEL = "model"
MAX_FAILED_SAVES = 3

# What may differ between a run and its continuation; anything else would change what was already done.
_FREE_KEYS = frozenset(
    f"loop.{name}"
    for name in ("num_steps", "eval_every", "num_eval_rows", "checkpoint_every", "keep_checkpoints", "recompute")
) | {"folder", "resume"}

logger = logging.getLogger("pyengine")


class TrainingStopped(TrainingError):
    """A signal asked for the end; the run was saved first. `signal` says which, `checkpoint` where."""

    def __init__(self, signal: Signals, checkpoint: Checkpoint) -> None:
        super().__init__(f"stopped by {signal.name} after step {checkpoint.step}, saved in {checkpoint.path}")
        self.signal = signal
        self.checkpoint = checkpoint


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to.

    Attributes:
        folder, model_folder: of the run, and of the trained model in Hugging Face layout.
        num_steps, num_tokens: done since the first step.
        seconds: wall time, continuations added up.
        train_loss, eval_loss: the last ones, nats per target.
        checkpoint: the last one, if any was asked for.
        resumed_from: step that the run went on from, 0 if it began.
        damaged: checkpoints that were left out when it went on.
    """

    folder: Path
    model_folder: Path
    num_steps: int
    num_tokens: int
    seconds: float
    train_loss: float | None
    eval_loss: float | None
    checkpoint: Path | None
    resumed_from: int
    damaged: list[CheckpointError]


def run_training(
    trainer: Trainer,
    model: CausalLM,
    folder: Path,
    *,
    stage: str,
    config: Config,
    inputs: Mapping[str, str],
    resume: bool = True,
    ledger: Ledger | None = None,
) -> TrainResult:
    """Train to the end inside `folder`, going on from its latest checkpoint.

    Args:
        trainer: at step 0.
        model: what the trainer trains.
        folder: of the run.
        stage: its name in the ledger.
        config: the whole configuration; kept beside the run and in every checkpoint.
        inputs: name -> content id of what the run reads.
        resume: if false, a folder that already has a checkpoint is an error.
        ledger: of a larger run that this one is a stage of; None keeps one in `folder`.

    Raises:
        ArgumentError: the folder belongs to a run with another configuration or other data.
        CheckpointError: saving failed `MAX_FAILED_SAVES` times in a row.
        TrainingStopped: a signal came.
    """
    with contextlib.ExitStack() as stack:
        if ledger is None:
            ledger = stack.enter_context(Ledger(folder))
        run = _Run(trainer, model, folder, stage, config, inputs, ledger)
        stop = stack.enter_context(StopRequest())
        run.stop = stop
        run.start(resume)
        with ProgressReport(trainer.config.num_steps, first_step=trainer.step) as run.progress:
            trainer.callbacks.append(run)
            try:
                trainer.train()
            finally:
                trainer.callbacks.remove(run)
                run.metrics.close()
        return run.finish()


class _Run(Callback):
    progress: ProgressReport
    metrics: MetricsLog
    stop: StopRequest

    def __init__(
        self,
        trainer: Trainer,
        model: CausalLM,
        folder: Path,
        stage: str,
        config: Config,
        inputs: Mapping[str, str],
        ledger: Ledger,
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.folder = folder
        self.stage = stage
        self.config = config
        self.inputs = dict(inputs)
        self.checkpoint: Checkpoint | None = None
        self.resumed_from = 0
        self.damaged: list[CheckpointError] = []
        self.ledger = ledger
        self._failed_saves = 0
        self._seconds_before = 0.0
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._start

    def start(self, resume: bool) -> None:
        self.checkpoint, self.damaged = latest_checkpoint(self.folder / CHECKPOINTS)
        if self.checkpoint is None and self.damaged:
            raise self.damaged[0]
        if self.checkpoint is not None:
            if not resume:
                raise ArgumentError(f"folder: expected no checkpoint without resume, got {self.checkpoint.path}")
            self._restore(self.checkpoint)
        with atomic_write(self.folder / "config.yaml") as file:
            file.write(to_yaml(self.config).encode())
        self.metrics = MetricsLog(self.folder, resume_step=self.trainer.step)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state()
        if state["stage"] != self.stage or state["inputs"] != self.inputs:
            raise ArgumentError(
                f"folder: expected a run of {self.stage} on the same data, got {state['stage']} in {checkpoint.path}"
            )
        then, now = _flatten(state["config"]), _flatten(self.config.to_dict())
        for key in sorted((then.keys() | now.keys()) - _FREE_KEYS):
            if then.get(key) != now.get(key):
                raise ArgumentError(
                    f"{key}: expected {then.get(key)!r}, with which {self.folder} began, got {now.get(key)!r}"
                )
        self.model.load_state_dict(checkpoint.tensors("model"))
        self.trainer.optimizer.load_state_dict(checkpoint.tensors("optimizer"), num_steps=state["optimizer_steps"])
        self.trainer.step = state["step"]
        self.trainer.num_tokens = state["tokens"]
        if self.trainer.sample_index != state["sample_index"]:
            raise CheckpointError(
                checkpoint.path, f"sample_index: expected {self.trainer.sample_index}, got {state['sample_index']}"
            )
        set_random_state(state["random"])
        self.resumed_from = checkpoint.step
        self._seconds_before = state["seconds"]
        logger.info("going on from %s", checkpoint.path)

    def on_train_begin(self, trainer: Trainer, metrics: Metrics) -> None:
        self.metrics.write(metrics)

    def on_step_end(self, trainer: Trainer, metrics: Metrics) -> None:
        self.metrics.write(metrics)
        self.progress.update(trainer.step, metrics)
        every = trainer.config.checkpoint_every
        is_last = trainer.step == trainer.config.num_steps
        if self.stop.signal is not None and not is_last:
            raise TrainingStopped(self.stop.signal, self._save())
        if every is not None and (is_last or trainer.step % every == 0):
            self._try_to_save(is_last)

    def _try_to_save(self, is_last: bool) -> None:
        """A full disk now may have room at the next interval, so training goes on, up to a limit."""
        try:
            self._save()
            self._failed_saves = 0
        except (CheckpointError, OSError) as error:
            self._failed_saves += 1
            if is_last or self._failed_saves == MAX_FAILED_SAVES:
                raise
            logger.warning("checkpoint of step %d was not saved: %s", self.trainer.step, error)

    def _save(self) -> Checkpoint:
        trainer = self.trainer
        state = {
            "stage": self.stage,
            "step": trainer.step,
            "tokens": trainer.num_tokens,
            "sample_index": trainer.sample_index,
            "optimizer_steps": trainer.optimizer.num_steps,
            "random": get_random_state(),
            "config": self.config.to_dict(),
            "inputs": self.inputs,
            "ledger_head": self.ledger.head,
            "seconds": self.seconds,
            "version": pyengine.__version__,
        }
        self.checkpoint = save_checkpoint(
            self.folder / CHECKPOINTS,
            trainer.step,
            tensors={"model": self.model.state_dict(), "optimizer": trainer.optimizer.state_dict()},
            state=state,
            files={"config.json": config_json(self.model)},
            keep=trainer.config.keep_checkpoints,
        )
        self.ledger.record(
            "checkpoint",
            inputs=self.inputs,
            outputs={"checkpoint": self.checkpoint.id},
            facts={
                "stage": self.stage,
                "step": trainer.step,
                "path": self._place(self.checkpoint.path),
                "bytes": self.checkpoint.num_bytes,
            },
        )
        return self.checkpoint

    def _place(self, path: Path) -> str:
        """A path as the ledger names it: relative to its own folder."""
        return os.path.relpath(path, self.ledger.folder)

    def finish(self) -> TrainResult:
        save_pretrained(self.model, self.folder / MODEL)
        plot_loss(self.folder)
        entries = read_metrics(self.folder)
        last = {key: entry[key] for entry in entries for key in ("train/loss", "eval/loss") if key in entry}
        outputs = {"model": content_id(self.folder / MODEL)}
        if self.checkpoint is not None:
            outputs["checkpoint"] = self.checkpoint.id
        facts: dict[str, Any] = {
            "stage": self.stage,
            "config": self.config.to_dict(),
            "metrics": self._place(self.metrics.path),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "steps": self.trainer.step,
            "tokens": self.trainer.num_tokens,
            "seconds": self.seconds,
        }
        for key, fact in (("train/loss", "train_loss"), ("eval/loss", "eval_loss")):
            if key in last:
                facts[fact] = last[key]
        self.ledger.record("train", inputs=self.inputs, outputs=outputs, facts=facts)
        return TrainResult(
            folder=self.folder,
            model_folder=self.folder / MODEL,
            num_steps=self.trainer.step,
            num_tokens=self.trainer.num_tokens,
            seconds=self.seconds,
            train_loss=last.get("train/loss"),
            eval_loss=last.get("eval/loss"),
            checkpoint=None if self.checkpoint is None else self.checkpoint.path,
            resumed_from=self.resumed_from,
            damaged=self.damaged,
        )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= _flatten(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result
