"""Attention over a paged cache, and the write into it. Inference only. Contract: csrc/include/pe/attention_decode.h."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyengine import _C
from pyengine.ops._library import FLOATS, check, check_dtype, check_like, check_shape, empty_like, heads, lib

lib.define(
    "attention_decode(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor seq, Tensor position,"
    " float scale, int? sliding_window, Tensor? k_scales=None, Tensor? v_scales=None) -> Tensor"
)
lib.define(
    "kv_append(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, Tensor seq,"
    " Tensor position, Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> ()"
)

LANE_KEYS = 16  # keys side by side in a transposed block of K


def _check_cache(
    op: str,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq: Tensor,
    position: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    num_rows: int,
) -> None:
    check(v_pages.dim() == 4, op, "v_pages", "[num_pages, num_kv_heads, page_size, D]", f"shape {tuple(v_pages.shape)}")
    check_dtype(op, "v_pages", v_pages, (*FLOATS, torch.int8))
    num_pages, num_kv_heads, page_size, head_dim = v_pages.shape
    multiple = page_size > 0 and page_size % LANE_KEYS == 0
    check(multiple, op, "v_pages", f"a page size that is a multiple of {LANE_KEYS}", page_size)
    shape = (num_pages, num_kv_heads, page_size // LANE_KEYS, head_dim, LANE_KEYS)
    check_shape(op, "k_pages", k_pages, shape, "the transposed pages of v_pages")
    check_like(op, "k_pages", k_pages, "v_pages", v_pages)
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if scales is None:
            check(v_pages.dtype != torch.int8, op, name, "a tensor, for int8 pages", None)
        else:
            check(v_pages.dtype == torch.int8, op, name, "None, for pages that are not int8", "a tensor")
            check_dtype(op, name, scales, (torch.float32,))
            check_shape(op, name, scales, (num_pages, num_kv_heads, page_size), "one for each head of a slot")
    for name, t in (("block_table", block_table), ("seq", seq), ("position", position)):
        check_dtype(op, name, t, (torch.int32,))
    check(block_table.dim() == 2, op, "block_table", "[num_seqs, max_pages]", f"shape {tuple(block_table.shape)}")
    check_shape(op, "seq", seq, (num_rows,), "one for each row")
    check_shape(op, "position", position, (num_rows,), "one for each row")


def _check_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq: Tensor,
    position: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    """One check for the real kernel and the fake one. What the data says is checked in the binding."""
    op = "attention_decode"
    check(q.dim() == 3, op, "q", "[T, H, D]", f"shape {tuple(q.shape)}")
    check_dtype(op, "q", q, FLOATS)
    _check_cache(op, k_pages, v_pages, block_table, seq, position, k_scales, v_scales, q.shape[0])
    num_kv_heads, head_dim = v_pages.shape[1], v_pages.shape[3]
    check(q.shape[2] == head_dim, op, "q", f"head_dim {head_dim}, that of v_pages", q.shape[2])
    divides = num_kv_heads > 0 and q.shape[1] > 0 and q.shape[1] % num_kv_heads == 0
    check(divides, op, "q", f"a number of heads that is a multiple of {num_kv_heads} (kv heads)", q.shape[1])


def _check_append(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq: Tensor,
    position: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    op = "kv_append"
    check(k.dim() == 3, op, "k", "[T, K, D]", f"shape {tuple(k.shape)}")
    check_dtype(op, "k", k, FLOATS)
    _check_cache(op, k_pages, v_pages, block_table, seq, position, k_scales, v_scales, k.shape[0])
    check_shape(op, "k", k, (k.shape[0], v_pages.shape[1], v_pages.shape[3]), "the heads of v_pages")
    check_shape(op, "v", v, tuple(k.shape), "the shape of k")
    check_like(op, "v", v, "k", k)


# --- CPU --------------------------------------------------------------------------------------------------------------


@torch.library.impl(lib, "attention_decode", "CPU")
def _(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq: Tensor,
    position: Tensor,
    scale: float,
    sliding_window: int | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    _check_decode(q, k_pages, v_pages, block_table, seq, position, k_scales, v_scales)
    y = empty_like(q)
    _C.attention_decode_cpu(
        heads(q),
        k_pages,
        v_pages,
        block_table.contiguous(),
        seq.contiguous(),
        position.contiguous(),
        y,
        scale,
        sliding_window,
        k_scales,
        v_scales,
    )
    return y


@torch.library.impl(lib, "kv_append", "CPU")
def _(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq: Tensor,
    position: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    _check_append(k, v, k_pages, v_pages, block_table, seq, position, k_scales, v_scales)
    _C.kv_append_cpu(
        heads(k),
        heads(v),
        k_pages,
        v_pages,
        block_table.contiguous(),
        seq.contiguous(),
        position.contiguous(),
        k_scales,
        v_scales,
    )


# --- fake: shapes and dtypes only, what torch.compile and meta tensors run --------------------------------------------


@torch.library.register_fake("pyengine::attention_decode", lib=lib)
def _(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq: Tensor,
    position: Tensor,
    scale: float,
    sliding_window: int | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    _check_decode(q, k_pages, v_pages, block_table, seq, position, k_scales, v_scales)
    return empty_like(q)


@torch.library.register_fake("pyengine::kv_append", lib=lib)
def _(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq: Tensor,
    position: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    _check_append(k, v, k_pages, v_pages, block_table, seq, position, k_scales, v_scales)


# --- the public functions ---------------------------------------------------------------------------------------------


def attention_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq: Tensor,
    position: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of rows q [T, H, D] over a paged cache; returns [T, H, D] of q's dtype.

    Row t is at position[t] of sequence seq[t] and sees keys 0..position[t], or the last `sliding_window` of them.
    block_table [num_seqs, max_pages] names their pages; k_pages [num_pages, K, page_size / 16, D, 16] and
    v_pages [num_pages, K, page_size, D] are f32, bf16 or int8, whatever q is; int8 pages come with k_scales, v_scales
    f32 [num_pages, K, page_size]. seq, position, block_table: int32.
    A row has the bits that `attention` gives it over the same stored keys and values, in any batch, chunk or page size.

    Raises ArgumentError for a page, position or sequence out of range. Kwon et al. 2023, arXiv:2309.06180.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return torch.ops.pyengine.attention_decode(  # type: ignore[no-any-return]
        q, k_pages, v_pages, block_table, seq, position, scale, sliding_window, k_scales, v_scales
    )


def kv_append(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq: Tensor,
    position: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Write k, v [T, K, D] to the slots of (seq[t], position[t]), rounded to the dtype of the pages; to int8 as
    quantize_int8 rounds rows of D.

    Shapes as in attention_decode. Raises ArgumentError for a slot out of range, or one that is named twice.
    """
    torch.ops.pyengine.kv_append(k, v, k_pages, v_pages, block_table, seq, position, k_scales, v_scales)
