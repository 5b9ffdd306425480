"""The next token of each row of logits. Contract: csrc/include/pe/sample.h.

Inference calls the binding with numpy arrays and never loads this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyengine import _C
from pyengine.ops._library import check, check_dtype, check_shape, lib

lib.define(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor repetition_penalty,"
    " Tensor seed, Tensor sequence, Tensor position, Tensor? previous_ids, Tensor? previous_offsets, int num_logprobs)"
    " -> (Tensor token_ids, Tensor logprobs, Tensor top_ids, Tensor top_logprobs)"
)

OP = "sample"

_SETTINGS = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "repetition_penalty": torch.float32,
    "seed": torch.int64,
    "sequence": torch.int64,
    "position": torch.int64,
}


class SampleOutput(NamedTuple):
    """token_ids [B] int32, logprobs [B] f32, top_ids [B, num_logprobs] int32, top_logprobs [B, num_logprobs] f32."""

    token_ids: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def _empty(logits: Tensor, settings: Sequence[Tensor], ids: Tensor | None, num_logprobs: int) -> SampleOutput:
    """Check the arguments and make the outputs; one function for the real kernel and the fake one."""
    check(logits.dim() == 2, OP, "logits", "2 dimensions [B, V]", f"shape {tuple(logits.shape)}")
    check_dtype(OP, "logits", logits, (torch.float32,))
    for (name, dtype), t in zip(_SETTINGS.items(), settings, strict=True):
        check_dtype(OP, name, t, (dtype,))
        check_shape(OP, name, t, (logits.shape[0],), "the rows of logits")
    if ids is not None:
        check_dtype(OP, "previous_ids", ids, (torch.int32,))
    num_rows, vocab_size = logits.shape
    check(0 <= num_logprobs <= vocab_size, OP, "num_logprobs", f"0 to {vocab_size}", num_logprobs)
    return SampleOutput(
        logits.new_empty(num_rows, dtype=torch.int32),
        logits.new_empty(num_rows),
        logits.new_empty((num_rows, num_logprobs), dtype=torch.int32),
        logits.new_empty((num_rows, num_logprobs)),
    )


@torch.library.impl(lib, "sample", "CPU")
def _(logits: Tensor, *args: Any) -> SampleOutput:
    *settings, previous_ids, previous_offsets, num_logprobs = args
    out = _empty(logits, settings, previous_ids, num_logprobs)
    logits = logits if logits.stride(-1) == 1 or logits.shape[-1] <= 1 else logits.contiguous()
    settings = [t.contiguous() for t in settings]
    if previous_ids is not None:
        previous_ids, previous_offsets = previous_ids.contiguous(), previous_offsets.contiguous()
    _C.sample_cpu(logits, *settings, previous_ids, previous_offsets, *out)  # type: ignore[call-arg]
    return out


@torch.library.register_fake("pyengine::sample", lib=lib)
def _(logits: Tensor, *args: Any) -> SampleOutput:
    *settings, previous_ids, _, num_logprobs = args
    return _empty(logits, settings, previous_ids, num_logprobs)


def _per_row(value: Tensor | float, logits: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((logits.shape[0],), value, dtype=dtype, device=logits.device)


def sample(
    logits: Tensor,
    *,
    seed: Tensor | int,
    sequence: Tensor | int,
    position: Tensor | int,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    min_p: Tensor | float = 0.0,
    repetition_penalty: Tensor | float = 1.0,
    previous_ids: Tensor | None = None,
    previous_offsets: Tensor | None = None,
    num_logprobs: int = 0,
) -> SampleOutput:
    """Draw a token id from each row of logits [B, V] f32.

    Every setting is a number for all rows or a tensor [B]: temperature (0: greedy), top_p, min_p, repetition_penalty
    f32; top_k int32 (0: off); seed, sequence, position int64. Order: penalty, temperature, top_k, top_p, min_p.
    The draw is a pure function of the row, its settings and (seed, sequence, position); rows with equal triples share
    their random number. previous_ids int32 [N] holds the tokens that repetition_penalty applies to, row after row;
    previous_offsets int64 [B + 1] says where each row begins and the last one ends.

    Masks, biases and the penalties that count belong to sequences with a history: pyengine._C.SampleState.

    logprobs and top_logprobs are of the raw logits, before every setting. Not differentiable.

    Raises ArgumentError for a setting out of its range, for NaN or +inf in a row and for a row of -inf.
    """
    values = (temperature, top_k, top_p, min_p, repetition_penalty, seed, sequence, position)
    settings = [_per_row(v, logits, dtype) for v, dtype in zip(values, _SETTINGS.values(), strict=True)]
    out = torch.ops.pyengine.sample(logits.detach(), *settings, previous_ids, previous_offsets, num_logprobs)
    return SampleOutput(*out)
