"""The training loop: micro-batches, exact accumulation, clipping, evaluation, callbacks.

A step is a pure function of the parameters, the optimizer state and the rows that its number gives, so a run that goes
on from a checkpoint has the bits of one that never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from pyengine.errors import ConfigError, PyEngineError
from pyengine.optim import AdamW, clip_scale, grad_norm
from pyengine.train.accumulate import GradientAccumulator
from pyengine.train.batch import Batch, RowSource, batches_of
from pyengine.train.config import Config, Range
from pyengine.train.schedule import ScheduleConfig, learning_rate

Metrics = dict[str, int | float]


class TrainingError(PyEngineError):
    """Training cannot go on: the loss or the gradient is not finite, or a batch has no target."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Config):
    """Sizes and intervals of a run. `num_*` count rows of the data and optimizer steps; `eval_first` also measures the
    held-out loss before the first step."""

    num_steps: Annotated[int, Range(low=1)]
    rows_per_step: Annotated[int, Range(low=1)] = 8
    rows_per_micro_batch: Annotated[int, Range(low=1)] | None = None
    max_grad_norm: Annotated[float, Range(above=0.0)] | None = 1.0
    eval_every: Annotated[int, Range(low=1)] | None = None
    eval_first: bool = False
    num_eval_rows: Annotated[int, Range(low=1)] = 32
    checkpoint_every: Annotated[int, Range(low=1)] | None = None
    keep_checkpoints: Annotated[int, Range(low=2)] = 2
    recompute: bool = False

    def check(self) -> None:
        if self.rows_per_micro_batch is not None and self.rows_per_micro_batch > self.rows_per_step:
            message = f"expected at most rows_per_step = {self.rows_per_step}, got {self.rows_per_micro_batch}"
            raise ConfigError(message, key="rows_per_micro_batch")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Config):
    """AdamW; see `pyengine.optim.AdamW`. `learning_rate` is the peak of the schedule."""

    learning_rate: Annotated[float, Range(above=0.0, high=10.0)] = 3e-4
    beta1: Annotated[float, Range(low=0.0, high=0.999999)] = 0.9
    beta2: Annotated[float, Range(low=0.0, high=0.999999)] = 0.95
    eps: Annotated[float, Range(above=0.0, high=1.0)] = 1e-8
    weight_decay: Annotated[float, Range(low=0.0, high=10.0)] = 0.1

    def build(self, model: nn.Module) -> AdamW:
        return AdamW(
            model.named_parameters(),
            lr=self.learning_rate,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )


class Callback:
    """Hooks into a run; override what is needed."""

    def on_train_begin(self, trainer: Trainer, metrics: Metrics) -> None:
        """Before the first step, with the held-out loss of the untrained model if there is one to measure."""

    def on_step_end(self, trainer: Trainer, metrics: Metrics) -> None:
        """After every step, with its line of metrics."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last step."""


Loss = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> scalar sum of the loss over the targets of the batch."""


def sum_nll(model: nn.Module, batch: Batch) -> Tensor:
    """The negative log-likelihood of all targets, nats."""
    nll: Tensor = model(**batch.inputs())
    return nll.sum()


class Trainer:
    """Runs steps. `step` (optimizer steps done) and `num_tokens` (tokens seen) are its whole own state.

    Args:
        model: takes `Batch.inputs()`.
        optimizer: of the model's parameters.
        rows: training data; step s uses rows [s * rows_per_step, (s + 1) * rows_per_step).
        eval_rows: held-out data, whose first `num_eval_rows` rows are scored every `eval_every` steps.
        loss: summed over targets.
        callbacks: called in this order.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AdamW,
        rows: RowSource,
        *,
        config: LoopConfig,
        schedule: ScheduleConfig,
        eval_rows: RowSource | None = None,
        loss: Loss = sum_nll,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.rows = rows
        self.config = config
        self.schedule = schedule
        self.eval_rows = eval_rows
        self.loss = loss
        self.callbacks = list(callbacks)
        self.step = 0
        self.num_tokens = 0
        self.last_metrics: Metrics = {}

    @property
    def sample_index(self) -> int:
        """The data cursor: the first row that was not used yet."""
        return self.step * self.config.rows_per_step

    def train(self) -> None:
        """Run until `config.num_steps` steps are done."""
        self.model.train()
        if self.config.eval_first and self.step == 0 and self.eval_rows is not None:
            for callback in self.callbacks:
                callback.on_train_begin(self, {"step": 0, "tokens": 0, "eval/loss": self.evaluate()})
        while self.step < self.config.num_steps:
            metrics = self.train_step()
            is_last = self.step == self.config.num_steps
            every = self.config.eval_every
            if self.eval_rows is not None and every is not None and (is_last or self.step % every == 0):
                metrics["eval/loss"] = self.evaluate()
            self.last_metrics = metrics
            for callback in self.callbacks:
                callback.on_step_end(self, metrics)
        for callback in self.callbacks:
            callback.on_train_end(self)

    def train_step(self) -> Metrics:
        """One optimizer step.

        The loss of a step is the mean over the targets of all its rows, however they are cut into micro-batches.

        Raises:
            TrainingError: nothing to predict, or a loss or gradient that is not finite; the parameters are unchanged.
        """
        start = time.perf_counter()
        config = self.config
        micro_batches = batches_of(
            self.rows, self.sample_index, config.rows_per_step, config.rows_per_micro_batch or config.rows_per_step
        )
        num_targets = sum(batch.num_targets for batch in micro_batches)
        if num_targets == 0:
            raise TrainingError(f"step {self.step}: expected at least one target in its rows, got none")
        accumulator = GradientAccumulator(self.optimizer.parameters)
        losses = []
        for batch in micro_batches:
            if batch.num_targets == 0:
                continue
            loss = self.loss(self.model, batch) / num_targets
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
            accumulator.add()
        grads = accumulator.grads()
        norm = grad_norm(grads.values())
        if not math.isfinite(norm) or not all(map(math.isfinite, losses)):
            self.optimizer.zero_grad()
            raise TrainingError(f"step {self.step}: expected a finite loss and gradient, got {sum(losses)} and {norm}")
        rate = learning_rate(self.schedule, self.step, peak=self.optimizer.lr, num_steps=config.num_steps)
        scale = 1.0 if config.max_grad_norm is None else clip_scale(norm, config.max_grad_norm)
        self.optimizer.step(lr=rate, grad_scale=scale, grads=grads)
        self.optimizer.zero_grad()
        num_tokens = sum(batch.num_tokens for batch in micro_batches)
        self.step += 1
        self.num_tokens += num_tokens
        return {
            "step": self.step,
            "tokens": self.num_tokens,
            "train/loss": math.fsum(losses),
            "train/grad_norm": norm,
            "train/learning_rate": rate,
            "train/tokens_per_second": num_tokens / (time.perf_counter() - start),
        }

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the targets of the first `num_eval_rows` rows, or of one epoch if it has fewer; nats."""
        if self.eval_rows is None:
            raise TrainingError("eval_rows: expected data to evaluate on, got none")
        self.model.eval()
        rows_per_batch = self.config.rows_per_micro_batch or self.config.rows_per_step
        num_rows = min(self.config.num_eval_rows, self.eval_rows.rows_per_epoch)
        batches = batches_of(self.eval_rows, 0, num_rows, rows_per_batch)
        losses = [self.loss(self.model, batch).item() for batch in batches if batch.num_targets]
        self.model.train()
        return math.fsum(losses) / sum(batch.num_targets for batch in batches)
