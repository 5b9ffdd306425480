"""Causal self-attention over packed sequences, with rotary positions and grouped kv heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyengine.nn.linear import Linear
from pyengine.nn.rms_norm import RMSNorm
from pyengine.ops.attention import attention
from pyengine.ops.rope import rope


@dataclass(frozen=True)
class PackedPositions:
    """Where every token of a packed batch stands; the same for all layers.

    Attributes:
        position_ids: [num_tokens] int32, from 0 within the token's own sequence.
        segment_offsets: [num_segments + 1] int32; segment i is [segment_offsets[i], segment_offsets[i + 1]).
        cos, sin: [num_positions, P] float32, the rotary table of the P pairs of a head that turn.
        local: the same for layers that have another one, or None.
    """

    position_ids: Tensor
    segment_offsets: Tensor
    cos: Tensor
    sin: Tensor
    local: tuple[Tensor, Tensor] | None = None


class Attention(nn.Module):
    """o_proj(attention(rope(norm(q_proj(x))), rope(norm(k_proj(x))), v_proj(x))).

    No token attends outside its own segment.

    Args:
        qkv_bias, o_bias: whether these projections have one.
        qk_norm: None, or the RMS norm of q and k: of each "head", or of their "full" width.
        norm_eps, norm_weight_offset: of that norm.
        use_rope: whether q and k turn with the position; with tables narrower than head_dim / 2, only the leading part
            of each head.
        use_local_rope: whether they turn by the table `PackedPositions.local`.
        sliding_window: tokens that a token sees, itself included.
        scale: of q @ k; 1 / sqrt(head_dim) by default.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
        norm_weight_offset: float = 0.0,
        use_rope: bool = True,
        use_local_rope: bool = False,
        sliding_window: int | None = None,
        scale: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.qk_norm = qk_norm
        self.use_rope = use_rope
        self.use_local_rope = use_local_rope
        self.sliding_window = sliding_window
        self.scale = scale
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = Linear(hidden_size, q_size, bias=qkv_bias, dtype=dtype, device=device)
        self.k_proj = Linear(hidden_size, kv_size, bias=qkv_bias, dtype=dtype, device=device)
        self.v_proj = Linear(hidden_size, kv_size, bias=qkv_bias, dtype=dtype, device=device)
        if qk_norm is not None:
            q_width, k_width = (head_dim, head_dim) if qk_norm == "head" else (q_size, kv_size)
            self.q_norm = RMSNorm(q_width, eps=norm_eps, weight_offset=norm_weight_offset, dtype=dtype, device=device)
            self.k_norm = RMSNorm(k_width, eps=norm_eps, weight_offset=norm_weight_offset, dtype=dtype, device=device)
        self.o_proj = Linear(q_size, hidden_size, bias=o_bias, dtype=dtype, device=device)

    def forward(self, x: Tensor, packed: PackedPositions) -> Tensor:
        """x [num_tokens, hidden_size] -> the same shape."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q)[0], self.k_norm(k)[0]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q)[0], self.k_norm(k)[0]
        if self.use_rope:
            q, k = self._rotate(q, packed), self._rotate(k, packed)
        y = attention(
            q,
            k,
            v,
            scale=self.scale,
            causal=True,
            segment_offsets=packed.segment_offsets,
            sliding_window=self.sliding_window,
        )
        return self.o_proj(y.flatten(-2))  # type: ignore[no-any-return]

    def _rotate(self, x: Tensor, packed: PackedPositions) -> Tensor:
        cos, sin = packed.cos, packed.sin
        if self.use_local_rope and packed.local is not None:
            cos, sin = packed.local
        width = 2 * cos.shape[-1]
        if width == x.shape[-1]:
            return rope(x, cos, sin, packed.position_ids)
        turned = rope(x[..., :width], cos, sin, packed.position_ids)
        return torch.cat([turned, x[..., width:]], -1)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
