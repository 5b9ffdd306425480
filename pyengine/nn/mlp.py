"""The feed-forward block, with a gate and without one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyengine.nn.linear import Linear
from pyengine.ops.gelu import gelu
from pyengine.ops.swiglu import swiglu


class SwiGluMlp(nn.Module):
    """down_proj(activation(gate_proj(x)) * up_proj(x)), with "silu" or "gelu_tanh". Shazeer 2020, arXiv:2002.05202."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias, dtype=dtype, device=device)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias, dtype=dtype, device=device)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """x [num_tokens, hidden_size] -> the same shape."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), activation=self.activation))  # type: ignore[no-any-return]


class PlainMlp(nn.Module):
    """down_proj(activation(up_proj(x))), with "gelu" or its tanh form, "gelu_tanh"."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "gelu",
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.approximate = {"gelu": "none", "gelu_tanh": "tanh"}[activation]
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias, dtype=dtype, device=device)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """x [num_tokens, hidden_size] -> the same shape."""
        return self.down_proj(gelu(self.up_proj(x), approximate=self.approximate))  # type: ignore[no-any-return]
