"""How far the predictions of one model are from those of another: what quantisation and distillation are judged by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError

_Float64 = npt.NDArray[np.float64]


def kl_divergence(logits_p: npt.NDArray[Any], logits_q: npt.NDArray[Any]) -> _Float64:
    """KL(P || Q) of the softmaxes, nats: logits [..., V] of any float dtype -> [...], never negative.

    With d = log q - log p every term is p * (exp(d) - 1 - d), whose sum is the same because p and q both sum to 1. No
    term is negative and equal rows give exactly 0, where sum(p * (log p - log q)) would leave the rounding of large terms
    that cancel. A token that only P can produce makes it infinite; a NaN comes through.

    Raises:
        ArgumentError: the shapes differ, or there is no vocabulary.
    """
    if logits_p.shape != logits_q.shape or logits_p.ndim == 0 or logits_p.shape[-1] == 0:
        raise ArgumentError(
            f"logits: expected two arrays of one shape [..., V], got {logits_p.shape} and {logits_q.shape}"
        )
    log_p, log_q = _log_softmax(logits_p), _log_softmax(logits_q)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = log_q - log_p
        terms = p * (np.expm1(difference) - difference)
    # Where p underflows to 0 the limit of the term is q, which may be all there is.
    terms = np.where(p > 0.0, terms, np.where(np.isnan(log_p), np.nan, np.exp(log_q)))
    return np.asarray(terms.sum(-1))


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A measurement over tokens.

    Attributes:
        num_tokens: compared.
        mean_kl, max_kl, p99_kl: KL(P || Q), nats per token.
        same_top: share of tokens where both find the same token most likely.
    """

    num_tokens: int
    mean_kl: float
    max_kl: float
    p99_kl: float
    same_top: float


def measure_divergence(pairs: Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> Divergence:
    """Compare pairs of logits (of P, of Q), each [..., V], one pair in memory at a time.

    Raises:
        ArgumentError: no token, or shapes that differ.
    """
    parts: list[_Float64] = []
    same = 0
    for logits_p, logits_q in pairs:
        parts.append(kl_divergence(logits_p, logits_q).reshape(-1))
        same += int((logits_p.argmax(-1) == logits_q.argmax(-1)).sum())
    values = np.concatenate(parts) if parts else np.zeros(0)
    if not values.size:
        raise ArgumentError("pairs: expected at least one token, got none")
    return Divergence(
        num_tokens=values.size,
        mean_kl=float(values.mean()),
        max_kl=float(values.max()),
        p99_kl=float(np.quantile(values, 0.99)),
        same_top=same / values.size,
    )


def _log_softmax(logits: npt.NDArray[Any]) -> _Float64:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return np.asarray(shifted)
