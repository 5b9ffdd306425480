"""Perplexity and bits per byte over packed rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError

IGNORE = -100

_Int32 = npt.NDArray[np.int32]


class PackedRow(Protocol):
    """A row as `pyengine.data.packing` makes it: four int32 arrays [seq_len]; padding has segment -1."""

    @property
    def input_ids(self) -> _Int32: ...
    @property
    def targets(self) -> _Int32: ...
    @property
    def segment_ids(self) -> _Int32: ...
    @property
    def position_ids(self) -> _Int32: ...


Score = Callable[[PackedRow], npt.NDArray[Any]]
"""A model: row -> nats [seq_len], the negative log-likelihood of every target. Values at `IGNORE` are not read."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A measurement.

    Attributes:
        nats: sum over all targets.
        num_targets: how many.
        text_bytes: UTF-8 bytes of the text behind the targets, or None.
    """

    nats: float
    num_targets: int
    text_bytes: int | None = None

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_targets

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite where that does not fit."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709.0 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits to write down one byte of text; comparable between tokenizers. None where the bytes are not known."""
        return None if self.text_bytes is None else self.nats / math.log(2.0) / self.text_bytes


def measure_perplexity(score: Score, rows: Iterable[PackedRow], *, text_bytes: int | None = None) -> Perplexity:
    """Score every target of `rows`.

    Args:
        score: the model.
        rows: each once; for bits per byte, those of a whole epoch.
        text_bytes: UTF-8 bytes of the text of these rows, the `text_bytes` of a shard.

    Raises:
        ArgumentError: no target, a result of another shape, or NaN.
    """
    sums: list[float] = []
    num_targets = 0
    for row in rows:
        counted = row.targets != IGNORE
        nll = np.asarray(score(row), dtype=np.float64)
        if nll.shape != row.targets.shape:
            raise ArgumentError(f"score: expected nats of shape {row.targets.shape}, got {nll.shape}")
        values = nll[counted]
        if np.isnan(values).any():
            raise ArgumentError(f"score: expected numbers, got NaN at target {int(np.isnan(values).argmax())} of a row")
        sums.append(math.fsum(values) if np.isfinite(values).all() else math.inf)
        num_targets += int(counted.sum())
    if num_targets == 0:
        raise ArgumentError("rows: expected at least one target, got none")
    nats = math.fsum(sums) if all(map(math.isfinite, sums)) else math.inf
    return Perplexity(nats=nats, num_targets=num_targets, text_bytes=text_bytes)


def nll_from_logits(logits: npt.NDArray[Any], targets: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float64]:
    """logits [..., V] of any float dtype, targets [...] -> nats [...], 0 where the target is `IGNORE`."""
    counted = targets != IGNORE
    index = np.where(counted, targets, 0)[..., None].astype(np.int64)
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    picked = np.take_along_axis(shifted, index, -1)[..., 0]
    return np.asarray(np.where(counted, np.log(np.exp(shifted).sum(-1)) - picked, 0.0))
