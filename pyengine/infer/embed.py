"""Readings that end in one vector for a text: embeddings, and what a classifier says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.infer.classifier import Classifier
from pyengine.infer.prompts import Prompt, PromptEncoder
from pyengine.infer.reading import POOLINGS, Float32, PooledReading, Pooling
from pyengine.infer.scheduler import check_priority, check_salt


def pooled_readings(
    encoder: PromptEncoder,
    prompts: Iterable[Prompt],
    adapters: Iterable[_C.Adapter | None],
    *,
    pooling: Pooling,
    priority: int,
    cache_salt: str,
    classifier: Classifier | None = None,
) -> Iterator[PooledReading]:
    """One for each prompt, made as it is asked for; `adapters` has one for each. For a classifier without the padding
    at the end."""
    check_priority(priority)
    check_salt(cache_salt)
    if pooling not in POOLINGS:
        raise ArgumentError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r:.60}")

    def reading(index: int, prompt: Prompt, adapter: _C.Adapter | None) -> PooledReading:
        name = f"prompts[{index}]"
        ids = encoder.encode_some(prompt, name)
        encoder.check_length(len(ids), name)
        if classifier is not None:
            ids = classifier.without_padding(ids)
        return PooledReading(
            token_ids=ids,
            first=len(ids) - 1 if pooling == "last" else 0,
            pooling=pooling,
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter,
        )

    each = zip(prompts, adapters, strict=False)
    return (reading(index, prompt, adapter) for index, (prompt, adapter) in enumerate(each))


def embedding(pooled: npt.NDArray[np.float64], *, scale: float, normalize: bool) -> Float32:
    """pooled [C], times `scale` or to length 1."""
    if normalize:
        return (pooled / max(float(np.sqrt(np.square(pooled).sum())), 1e-12)).astype(np.float32)
    return (pooled * scale).astype(np.float32)
