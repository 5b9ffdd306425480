"""The specification of sample, in numpy and integers. Contract: csrc/include/pe/sample.h."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_MASK = 0xFFFFFFFF


class Draw(NamedTuple):
    token: int
    logprob: float
    # How far u and the nucleus are from a place where the token would change, as a fraction of the total weight.
    margin: float


def philox4x32_10(counter: Iterable[int], key: Iterable[int]) -> tuple[int, ...]:
    """Four random 32-bit words. Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = b >> 32 ^ x1 ^ k0, b & _MASK, a >> 32 ^ x3 ^ k1, a & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return x0, x1, x2, x3


def uniform(seed: int, sequence: int, position: int) -> float:
    """The u of a draw, in [0, 1): 53 bits."""
    counter = (sequence & _MASK, sequence >> 32, position & _MASK, position >> 32)
    x = philox4x32_10(counter, (seed & _MASK, seed >> 32))
    return ((x[0] >> 5) * 2**26 + (x[1] >> 6)) / 2**53


def penalise(logits: NDArray[np.float32], previous_ids: Iterable[int], penalty: float) -> NDArray[np.float32]:
    """Divide the positive logits of previous ids by the penalty, multiply the others; once per id."""
    out, factor = logits.copy(), np.float32(penalty)
    for i in set(previous_ids):
        out[i] = out[i] / factor if out[i] > 0 else out[i] * factor
    return out


def adjust(
    logits: NDArray[np.float32],
    *,
    allowed: NDArray[np.bool_] | None = None,
    banned_ids: Iterable[int] = (),
    biases: Mapping[int, float] | None = None,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    previous_ids: Sequence[int] = (),
    num_prompt_ids: int = 0,
) -> NDArray[np.float32]:
    """Steps 1 to 4: masks, biases, repetition, frequency and presence penalty, each operation rounded to f32."""
    out = logits.copy()
    if allowed is not None:
        out[~allowed] = -np.inf
    out[list(banned_ids)] = -np.inf
    for i, bias in (biases or {}).items():
        out[i] += np.float32(bias)
    out = penalise(out, previous_ids, repetition_penalty)
    for i, count in Counter(previous_ids[num_prompt_ids:]).items():
        out[i] -= np.float32(frequency_penalty) * np.float32(count)
        out[i] -= np.float32(presence_penalty)
    return out


def banned_by_words(output_ids: Sequence[int], words: Iterable[Sequence[int]]) -> set[int]:
    """The last token of every word whose other tokens end the output."""
    out = list(output_ids)
    return {
        word[-1] for word in words if out[len(out) - len(word) + 1 :] == list(word[:-1]) and len(word) <= len(out) + 1
    }


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    l = logits.astype(np.float64)
    return l - (l.max() + np.log(np.exp(l - l.max()).sum()))  # type: ignore[no-any-return]


def kept_weights(
    logits: NDArray[np.float32], *, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[NDArray[np.float64], float]:
    """(weight of every token, 0 where filtered out; distance of the nucleus from its neighbours in size)."""
    scaled = ((logits - logits.max()) / np.float32(temperature)).astype(np.float32)
    weights = np.exp(scaled.astype(np.float64))
    order = np.lexsort((np.arange(len(logits)), -logits))
    margin = np.inf
    if 0 < top_k < len(logits):
        order = order[:top_k]
    if top_p < 1:
        total = weights[order].sum()
        before = np.concatenate([[0.0], np.cumsum(weights[order])[:-1]])
        # The first token stays whatever top_p is, so its own boundary cannot move.
        target = float(np.float32(top_p)) * total
        margin = min([np.inf, *np.abs(before[1:] - target) / total])
        size = max(1, int((before < target).sum()))
        order = order[:size]
    kept = np.zeros_like(weights)
    kept[order] = weights[order]
    if min_p > 0:
        kept[scaled < np.float32(np.log(np.float64(np.float32(min_p))))] = 0
    return kept, float(margin)


def sample_row(
    logits: NDArray[np.float32],
    *,
    seed: int,
    sequence: int,
    position: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    previous_ids: Iterable[int] = (),
) -> Draw:
    """One token of one row, weights and sums in float64."""
    penalised = penalise(logits, previous_ids, repetition_penalty)
    raw: Any = log_softmax(logits)
    if temperature == 0:
        token = int(penalised.argmax())
        return Draw(token, float(raw[token]), np.inf)
    weights, margin = kept_weights(penalised, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ids = np.flatnonzero(weights)
    running = np.cumsum(weights[ids])
    target = uniform(seed, sequence, position) * running[-1]
    token = int(ids[np.searchsorted(running, target, side="right")])
    return Draw(token, float(raw[token]), min([margin, *np.abs(running[:-1] - target) / running[-1]]))
