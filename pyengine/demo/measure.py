"""Figures of the demo, all computed by the native engine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.data.packing import PackedDataset
from pyengine.data.shards import Shard
from pyengine.evals import measure_divergence, measure_perplexity, nll_from_logits
from pyengine.evals.perplexity import IGNORE, PackedRow
from pyengine.infer import LLM


@dataclass(frozen=True)
class Comparison:
    """Two models on the same tokens: perplexity of each, and KL(before || after) in nats per token."""

    perplexity_before: float
    perplexity_after: float
    kl: float
    same_top: float
    num_tokens: int


def compare_models(before: LLM, after: LLM, sequences: Sequence[tuple[list[int], list[int]]]) -> Comparison:
    """`sequences` are (ids, mask); perplexity is over the tokens whose mask is 1, divergence over all positions."""
    nats = [0.0, 0.0]
    num_targets = 0

    def pairs() -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        nonlocal num_targets
        for ids, mask in sequences:
            targets = np.where(np.array(mask[1:]) != 0, np.array(ids[1:]), IGNORE)
            logits = [model.logits(ids[:-1]) for model in (before, after)]
            for i, values in enumerate(logits):
                nats[i] += float(nll_from_logits(values, targets).sum())
            num_targets += int((targets != IGNORE).sum())
            yield logits[0], logits[1]

    divergence = measure_divergence(pairs())
    return Comparison(
        math.exp(nats[0] / num_targets),
        math.exp(nats[1] / num_targets),
        divergence.mean_kl,
        divergence.same_top,
        divergence.num_tokens,
    )


def bits_per_byte(llm: LLM, shard: Shard, seq_len: int) -> float:
    """Of all held-out text, cut into rows as in training."""
    rows = PackedDataset(shard, seq_len, 0)

    def score(row: PackedRow) -> npt.NDArray[np.float64]:
        nll = np.zeros(seq_len)
        for segment in range(int(row.segment_ids.max()) + 1):
            (places,) = np.nonzero(row.segment_ids == segment)
            ids = row.input_ids[places].tolist()
            last = int(row.targets[places[-1]])
            # A document that goes on in the next row has its next token as the target of the last place.
            full = ids if last == IGNORE else [*ids, last]
            if len(full) > 1:
                logprobs = llm.score([full[:1]], [full[1:]])[0].logprobs
                nll[places[: len(logprobs)]] = -np.array(logprobs)
        return nll

    measured = measure_perplexity(
        score, (rows[i] for i in range(rows.rows_per_epoch)), text_bytes=shard.index.text_bytes
    )
    assert measured.bits_per_byte is not None
    return measured.bits_per_byte
