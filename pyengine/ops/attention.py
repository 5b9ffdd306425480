"""Attention over packed sequences. Contract: csrc/include/pe/attention.h."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyengine import _C
from pyengine.ops._library import FLOATS, check, check_dtype, check_like, check_shape, empty_like, heads, lib

_OPTIONS = "float scale, bool causal, Tensor? segment_offsets, int? sliding_window"
lib.define(f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> Tensor")
lib.define(f"attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor y, Tensor lse)")
lib.define(
    f"attention_bwd(Tensor grad_y, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, {_OPTIONS})"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)"
)

OP = "attention"
MAX_HEAD_DIM = 256


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, offsets: Tensor | None, sliding_window: int | None) -> None:
    """One check for the real kernels and the fake ones. The values of segment_offsets are checked in the binding."""
    check(q.dim() == 3, OP, "q", "[T, H, D]", f"shape {tuple(q.shape)}")
    check_dtype(OP, "q", q, FLOATS)
    num_tokens, num_heads, head_dim = q.shape
    check(1 <= head_dim <= MAX_HEAD_DIM, OP, "q", f"a head_dim from 1 to {MAX_HEAD_DIM}", head_dim)
    check(k.dim() == 3, OP, "k", "[T, K, D]", f"shape {tuple(k.shape)}")
    num_kv_heads = k.shape[1]
    divides = num_kv_heads > 0 and num_heads > 0 and num_heads % num_kv_heads == 0
    check(divides, OP, "k", f"a number of heads that divides {num_heads}", num_kv_heads)
    check_shape(OP, "k", k, (num_tokens, num_kv_heads, head_dim), "the tokens and head_dim of q")
    check_shape(OP, "v", v, tuple(k.shape), "the shape of k")
    check_like(OP, "k", k, "q", q)
    check_like(OP, "v", v, "q", q)
    if offsets is not None:
        check_dtype(OP, "segment_offsets", offsets, (torch.int32,))
        one_row = offsets.dim() == 1 and offsets.shape[0] >= 1
        check(one_row, OP, "segment_offsets", "[num_segments + 1]", f"shape {tuple(offsets.shape)}")
    if sliding_window is not None:
        check(causal, OP, "sliding_window", "None where attention is not causal", sliding_window)
        check(sliding_window >= 1, OP, "sliding_window", "at least 1 or None", sliding_window)


def _contiguous(offsets: Tensor | None) -> Tensor | None:
    return None if offsets is None else offsets.contiguous()


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.float32)


# --- CPU --------------------------------------------------------------------------------------------------------------


@torch.library.impl(lib, "attention", "CPU")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    segment_offsets: Tensor | None,
    sliding_window: int | None,
) -> Tensor:
    _check(q, k, v, causal, segment_offsets, sliding_window)
    y, offsets = empty_like(q), _contiguous(segment_offsets)
    _C.attention_fwd_cpu(heads(q), heads(k), heads(v), y, None, scale, causal, offsets, sliding_window)
    return y


@torch.library.impl(lib, "attention_fwd", "CPU")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    segment_offsets: Tensor | None,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, causal, segment_offsets, sliding_window)
    y, lse, offsets = empty_like(q), _empty_lse(q), _contiguous(segment_offsets)
    _C.attention_fwd_cpu(heads(q), heads(k), heads(v), y, lse, scale, causal, offsets, sliding_window)
    return y, lse


@torch.library.impl(lib, "attention_bwd", "CPU")
def _(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    segment_offsets: Tensor | None,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, causal, segment_offsets, sliding_window)
    grads = empty_like(q), empty_like(k), empty_like(v)
    _C.attention_bwd_cpu(
        heads(grad_y),
        heads(q),
        heads(k),
        heads(v),
        y,
        lse,
        *grads,
        scale,
        causal,
        _contiguous(segment_offsets),
        sliding_window,
    )
    return grads


# --- fake: shapes and dtypes only, what torch.compile and meta tensors run --------------------------------------------


@torch.library.register_fake("pyengine::attention", lib=lib)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    segment_offsets: Tensor | None,
    sliding_window: int | None,
) -> Tensor:
    _check(q, k, v, causal, segment_offsets, sliding_window)
    return empty_like(q)


@torch.library.register_fake("pyengine::attention_fwd", lib=lib)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    segment_offsets: Tensor | None,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, causal, segment_offsets, sliding_window)
    return empty_like(q), _empty_lse(q)


@torch.library.register_fake("pyengine::attention_bwd", lib=lib)
def _(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    segment_offsets: Tensor | None,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, causal, segment_offsets, sliding_window)
    return empty_like(q), empty_like(k), empty_like(v)


# --- autograd and the public function ---------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        causal: bool,
        segment_offsets: Tensor | None,
        sliding_window: int | None,
    ) -> Tensor:
        options = (scale, causal, segment_offsets, sliding_window)
        y, lse = torch.ops.pyengine.attention_fwd(q, k, v, *options)
        ctx.save_for_backward(q, k, v, y, lse, segment_offsets)
        ctx.options = scale, causal, sliding_window
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        *saved, segment_offsets = ctx.saved_tensors
        scale, causal, sliding_window = ctx.options
        options = (scale, causal, segment_offsets, sliding_window)
        return *torch.ops.pyengine.attention_bwd(grad_y, *saved, *options), None, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    segment_offsets: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v over packed sequences; scale is 1 / sqrt(D) by default.

    q [T, H, D], k and v [T, K, D], f32 or bf16, H a multiple of K, D at most 256; returns [T, H, D]. Query head h reads
    kv head h // (H // K). segment_offsets [num_segments + 1] int32, from 0 to T: tokens attend within their segment
    only; None is one segment. causal: a token sees itself and what is before it, with sliding_window only the last
    `sliding_window` of these, itself included.

    Raises ArgumentError for offsets that do not ascend from 0 to T. Dao et al. 2022, arXiv:2205.14135.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    options = (scale, causal, segment_offsets, sliding_window)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, *options)  # type: ignore[no-any-return]
    return torch.ops.pyengine.attention(q, k, v, *options)  # type: ignore[no-any-return]
