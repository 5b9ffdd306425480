"""The figure that any language model must beat."""

from __future__ import annotations

import numpy as np

from pyengine.data.shards import Shard
from pyengine.errors import ArgumentError

_CHUNK_TOKENS = 1 << 20


def unigram_bits_per_byte(train: Shard, held_out: Shard, held_out_bytes: int | None = None) -> float:
    """Bits per byte of held-out text under token frequencies of the training text, with add-one smoothing.

    p(token) = (count + 1) / (tokens + vocab_size). Summed over the tokens that a causal model predicts (`PackedDataset`
    has them as targets), which is all but the first of each document, so the figure compares with the model's own.

    Args:
        train, held_out: shards of one tokenizer.
        held_out_bytes: UTF-8 bytes of the held-out text; default: what the shard says.

    Raises:
        ArgumentError: the tokenizers differ, or there are no bytes.
    """
    if held_out.index.tokenizer != train.index.tokenizer or held_out.index.vocab_size != train.index.vocab_size:
        raise ArgumentError(f"held_out: expected tokenizer {train.index.tokenizer}, got {held_out.index.tokenizer}")
    size = held_out.index.text_bytes if held_out_bytes is None else held_out_bytes
    if size < 1:
        raise ArgumentError(f"held_out_bytes: expected at least 1, got {size}")
    train_counts = _counts(train) - _first_counts(train) + 1
    held_out_counts = _counts(held_out) - _first_counts(held_out)
    bits = np.log2(train_counts.sum()) - np.log2(train_counts)
    return float(held_out_counts @ bits) / size


def _counts(shard: Shard) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    counts = np.zeros(shard.index.vocab_size, dtype=np.int64)
    for start in range(0, len(shard.tokens), _CHUNK_TOKENS):
        counts += np.bincount(shard.tokens[start : start + _CHUNK_TOKENS], minlength=len(counts))
    return counts


def _first_counts(shard: Shard) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    starts = shard.ends - np.diff(shard.ends, prepend=0)
    return np.bincount(shard.tokens[starts], minlength=shard.index.vocab_size).astype(np.int64)
