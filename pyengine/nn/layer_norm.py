"""Layer normalisation with a learned scale and shift."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyengine.ops.layer_norm import layer_norm, layer_norm_residual


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension.

    weight [hidden_size] starts at 1, bias [hidden_size], where there is one, at 0.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=dtype, device=device)) if bias else None

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, weight_divisor: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(normalised h, h) with h = x + residual, or h = x where there is no residual. x [..., hidden_size]."""
        weight = self.weight if weight_divisor == 1.0 else self.weight / weight_divisor
        if residual is None:
            return layer_norm(x, weight, self.bias, eps=self.eps), x
        return layer_norm_residual(x, residual, weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"hidden_size={self.weight.shape[0]}, eps={self.eps}, bias={self.bias is not None}"
