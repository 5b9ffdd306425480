"""`Reading`: a sequence whose tokens are all given. The engine computes it and hands out what is wanted of its rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.infer.outputs import Score, TokenLogprobs

Float32 = npt.NDArray[np.float32]
Pooling = Literal["last", "mean", "first"]

POOLINGS: tuple[Pooling, ...] = ("last", "mean", "first")


@dataclass(eq=False, kw_only=True)
class Reading:
    """A request of the scheduler beside `Sequence`: it goes through the same queue, and draws nothing.

    Rows, one per token, are handed out once and in order, from `first` on; those before it may come from the cache.
    """

    token_ids: list[int]
    first: int
    cache_salt: str = ""
    priority: int = 0
    adapter: _C.Adapter | None = None
    order: tuple[int, int] = (0, 0)
    slot: int | None = None
    """Number of the native sequence while it holds pages."""
    num_cached: int = 0
    """Tokens whose keys and values the cache holds."""
    failure: Exception | None = None
    next_row: int = field(init=False)
    """The first row that has not been handed out."""

    def __post_init__(self) -> None:
        self.next_row = self.first

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_adoptable(self) -> int:
        """Leading tokens that may come from the cache."""
        return self.next_row

    @property
    def prompt_token_ids(self) -> list[int]:
        """The tokens that others may begin with, and one more."""
        return self.token_ids[: self.first + 1]

    @property
    def has_ended(self) -> bool:
        return self.next_row >= self.num_tokens or self.failure is not None

    def num_new_rows(self, num_tokens: int) -> int:
        """How many rows that are wanted the next tokens have."""
        return max(self.num_cached + num_tokens - max(self.next_row, self.num_cached), 0)

    def next_targets(self, num_rows: int) -> list[int]:
        """Targets of the next rows; 0 where it has none."""
        return [0] * num_rows

    def pending_token_ids(self, limit: int) -> list[int]:
        """The next tokens to feed, at most `limit`."""
        return self.token_ids[self.num_cached : self.num_cached + limit]


class RowReading(Reading):
    """One that wants a number or a hidden state of a row."""


@dataclass(eq=False, kw_only=True)
class _WithTargets(Reading):
    """One that wants log-probabilities of given tokens."""

    targets: list[int]
    """One after each row from `first` on."""

    def next_targets(self, num_rows: int) -> list[int]:
        return self.targets[self.next_row - self.first : self.next_row - self.first + num_rows]


@dataclass(eq=False, kw_only=True)
class TargetReading(_WithTargets, RowReading):
    """Log-probabilities of `targets`."""

    logprobs: list[float] = field(default_factory=list)

    def take(self, logprobs: list[float]) -> None:
        """Those of the next rows."""
        self.logprobs += logprobs

    def score(self) -> Score:
        return Score(self.targets, self.logprobs)


@dataclass(eq=False, kw_only=True)
class HiddenReading(RowReading):
    """Hidden states of rows after the last norm."""

    states: list[Float32] = field(default_factory=list)

    def take(self, states: Float32) -> None:
        """Those of the next rows, [n, C]."""
        self.states.append(states)


@dataclass(eq=False, kw_only=True)
class PooledReading(HiddenReading):
    """One vector for the whole sequence: the state of its last or first token, or the mean over all."""

    pooling: Pooling
    total: npt.NDArray[np.float64] | None = None

    def take(self, states: Float32) -> None:
        if self.total is None:
            self.total = np.zeros(states.shape[1])
        # Row after row: the sum has the same shape in whatever pieces the rows come.
        for i, state in enumerate(states, self.next_row):
            if self.pooling == "mean" or i == (0 if self.pooling == "first" else self.num_tokens - 1):
                self.total += state

    def pooled(self) -> npt.NDArray[np.float64]:
        """The vector, [C]."""
        assert self.total is not None
        return self.total / self.num_tokens if self.pooling == "mean" else self.total


@dataclass(eq=False, kw_only=True)
class LogitsReading(Reading):
    """All logits of rows: far more memory than anything else, so few rows at a time."""

    logits: list[Float32] = field(default_factory=list)

    def take(self, logits: Float32, logprobs: list[float]) -> None:
        """Logits of the next rows, [n, V], and the log-probabilities of their targets, if it has targets."""
        self.logits.append(logits)


@dataclass(eq=False, kw_only=True)
class RankReading(_WithTargets, LogitsReading):
    """Log-probabilities of `targets`, and the `num_top` likeliest tokens in the place of each."""

    num_top: int
    entries: list[TokenLogprobs] = field(default_factory=list)

    def take(self, logits: Float32, logprobs: list[float]) -> None:
        num_rows, vocab_size = logits.shape
        drawn = _C.draw(logits, [_C.SampleState(vocab_size) for _ in range(num_rows)], self.num_top)
        if any(token_id < 0 for token_id in drawn.token_ids):
            self.failure = ArgumentError("logits: expected numbers or -inf, got nan or inf")
            return
        for r, (target, logprob) in enumerate(zip(self.next_targets(num_rows), logprobs, strict=True)):
            top = slice(r * self.num_top, (r + 1) * self.num_top)
            ranked = dict(zip(drawn.top_ids[top], drawn.top_logprobs[top], strict=True))
            self.entries.append(TokenLogprobs(target, logprob, ranked))
