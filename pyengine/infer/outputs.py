"""What generation and scoring return."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, under the raw softmax of the logits (before temperature and filters)."""

    token_id: int
    logprob: float
    top: dict[int, float] = field(default_factory=dict)
    """The likeliest tokens and their log-probabilities, as many as asked for."""


@dataclass(frozen=True)
class Completion:
    """One finished answer."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None
    """One entry per token, if asked for."""
    stop_reason: int | str | None = None
    """The stop string, or the id of stop_token_ids that ended the text; None for the model's own end tokens."""
    index: int = 0
    """Which of the completions drawn for its prompt this is."""
    cumulative_logprob: float | None = None
    """Log-probability of the whole completion and of the token that ended it, if logprobs or best_of asked for it."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One entry per token of the prompt, if asked for; the first has none."""


@dataclass(frozen=True)
class TextPiece:
    """A piece of streamed text. The last piece of a stream carries the whole Completion."""

    text: str
    token_ids: list[int]
    completion: Completion | None = None
    index: int = 0
    """Which of the completions of the prompt it belongs to."""


@dataclass(frozen=True)
class Score:
    """Log-probabilities of a given completion after a given prompt."""

    token_ids: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        """Log-probability of the whole completion."""
        return float(sum(self.logprobs))


@dataclass(frozen=True)
class Classification:
    """What a sequence classifier says about a text."""

    labels: tuple[str, ...]
    """No two are equal."""
    logits: list[float]
    """One per label."""

    @property
    def label(self) -> str:
        """The likeliest; of equals, the first."""
        return self.labels[self.logits.index(max(self.logits))]

    @property
    def probabilities(self) -> dict[str, float]:
        """Softmax of the logits, by label: for a model that knows one label per text."""
        most = max(self.logits)
        weights = [math.exp(logit - most) for logit in self.logits]
        total = sum(weights)
        return {label: weight / total for label, weight in zip(self.labels, weights, strict=True)}
