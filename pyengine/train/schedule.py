"""Learning rates as pure functions of the step. Every one rises over `warmup_steps`, then follows its own shape."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from dataclasses import dataclass

from pyengine.errors import ConfigError
from pyengine.train.config import Config, Range

Shape = Literal["constant", "linear", "cosine", "wsd"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Config):
    """The shape of the learning rate.

    constant stays at the peak. linear and cosine (Loshchilov & Hutter 2017, arXiv:1608.03983) fall to `final_ratio` of the
    peak over all that is left after the warm-up. wsd (warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395) stays at
    the peak and falls over the last `decay_steps` with the square root (Hägele et al. 2024, arXiv:2405.18392).
    """

    shape: Shape = "cosine"
    warmup_steps: Annotated[int, Range(low=0)] = 0
    decay_steps: Annotated[int, Range(low=0)] = 0
    final_ratio: Annotated[float, Range(low=0.0, high=1.0)] = 0.1

    def check(self) -> None:
        if self.shape != "wsd" and self.decay_steps:
            raise ConfigError(f"expected 0 for shape {self.shape!r}, got {self.decay_steps}", key="decay_steps")


def learning_rate(schedule: ScheduleConfig, step: int, *, peak: float, num_steps: int) -> float:
    """The learning rate of step `step`, from 0, of `num_steps`.

    The warm-up takes the values peak * 1/W, 2/W, ... W/W, so no step is wasted at 0; the last step of a falling schedule
    is the one before it would reach `final_ratio`.
    """
    return peak * _ratio(schedule, step, num_steps)


def _ratio(schedule: ScheduleConfig, step: int, num_steps: int) -> float:
    warmup, final = schedule.warmup_steps, schedule.final_ratio
    if step < warmup:
        return (step + 1) / warmup
    if schedule.shape == "constant":
        return 1.0
    if schedule.shape == "wsd":
        start = max(warmup, num_steps - schedule.decay_steps)
        progress = _progress(step, start, num_steps)
        return 1.0 - (1.0 - final) * math.sqrt(progress)
    progress = _progress(step, warmup, num_steps)
    fallen = progress if schedule.shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))
    return 1.0 - (1.0 - final) * fallen


def _progress(step: int, start: int, end: int) -> float:
    """0 up to `start`, 1 from `end`, a line between."""
    return min(max(step - start, 0) / (end - start), 1.0) if end > start else float(step >= end)
