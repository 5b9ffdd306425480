"""Causal self-attention over packed sequences, with rotary positions and grouped kv heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyengine.nn.linear import Linear
from pyengine.ops.attention import attention
from pyengine.ops.rope import rope


@dataclass(frozen=True)
class PackedPositions:
    """Where every token of a packed batch stands; the same for all layers.

    Attributes:
        position_ids: [num_tokens] int32, from 0 within the token's own sequence.
        segment_offsets: [num_segments + 1] int32; segment i is [segment_offsets[i], segment_offsets[i + 1]).
        cos, sin: [num_positions, head_dim / 2] float32, the rotary table.
    """

    position_ids: Tensor
    segment_offsets: Tensor
    cos: Tensor
    sin: Tensor


class Attention(nn.Module):
    """o_proj(attention(rope(q_proj(x)), rope(k_proj(x)), v_proj(x))). No token attends outside its own segment."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        sliding_window: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.sliding_window = sliding_window
        self.q_proj = Linear(hidden_size, num_heads * head_dim, dtype=dtype, device=device)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, dtype=dtype, device=device)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, dtype=dtype, device=device)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, dtype=dtype, device=device)

    def forward(self, x: Tensor, packed: PackedPositions) -> Tensor:
        """x [num_tokens, hidden_size] -> the same shape."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        q = rope(q, packed.cos, packed.sin, packed.position_ids)
        k = rope(k, packed.cos, packed.sin, packed.position_ids)
        y = attention(
            q, k, v, causal=True, segment_offsets=packed.segment_offsets, sliding_window=self.sliding_window
        )
        return self.o_proj(y.flatten(-2))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
