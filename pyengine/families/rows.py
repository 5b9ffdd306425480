"""The row order of q_proj and k_proj.

Hugging Face rotates the pair (i, i + D/2) of a head; GGUF files of Llama rotate (2i, 2i + 1), so their rows are
permuted. Whole rows move: a quantised row, whatever its blocks, stays one piece.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError


def unpermute_rows(num_heads: int, head_dim: int) -> npt.NDArray[np.int64]:
    """Index array [num_heads * head_dim] with hf_weight = gguf_weight[index]."""
    _check(num_heads, head_dim)
    return np.arange(num_heads * head_dim, dtype=np.int64).reshape(num_heads, head_dim // 2, 2).swapaxes(1, 2).ravel()


def permute_rows(num_heads: int, head_dim: int) -> npt.NDArray[np.int64]:
    """Index array [num_heads * head_dim] with gguf_weight = hf_weight[index]; the inverse of `unpermute_rows`."""
    _check(num_heads, head_dim)
    return np.arange(num_heads * head_dim, dtype=np.int64).reshape(num_heads, 2, head_dim // 2).swapaxes(1, 2).ravel()


def grouped_rows(num_heads: int, num_kv_heads: int, head_dim: int, part: str) -> npt.NDArray[np.int64]:
    """Index array of the rows of `part`, "q_proj", "k_proj" or "v_proj", in a matrix where a kv head follows the query
    heads that it serves: [num_kv_heads, queries of one, then key, then value, head_dim]."""
    _check(num_heads, head_dim)
    group = num_heads // num_kv_heads
    rows = np.arange((num_heads + 2 * num_kv_heads) * head_dim, dtype=np.int64)
    wanted = {"q_proj": slice(group), "k_proj": slice(group, group + 1), "v_proj": slice(group + 1, group + 2)}[part]
    return rows.reshape(num_kv_heads, group + 2, head_dim)[:, wanted].ravel()


def _check(num_heads: int, head_dim: int) -> None:
    if num_heads < 1:
        raise ArgumentError(f"num_heads: expected at least 1, got {num_heads}")
    if head_dim < 2 or head_dim % 2:
        raise ArgumentError(f"head_dim: expected a positive even number, got {head_dim}")
