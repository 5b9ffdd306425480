"""RMS normalisation with a learned scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyengine.ops.rms_norm import rms_norm, rms_norm_residual


class RMSNorm(nn.Module):
    """x / sqrt(mean(x**2) + eps) * (weight + weight_offset) over the last dimension.

    weight [hidden_size] starts at 1 - weight_offset.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float,
        weight_offset: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight_offset = weight_offset
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - weight_offset, dtype=dtype, device=device))

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, weight_divisor: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(normalised h, h) with h = x + residual, or h = x where there is no residual. x [..., hidden_size]."""
        weight = self.weight if weight_divisor == 1.0 else self.weight / weight_divisor
        if residual is None:
            return rms_norm(x, weight, eps=self.eps, weight_offset=self.weight_offset), x
        return rms_norm_residual(x, residual, weight, eps=self.eps, weight_offset=self.weight_offset)

    def extra_repr(self) -> str:
        return f"hidden_size={self.weight.shape[0]}, eps={self.eps}, weight_offset={self.weight_offset}"
