"""A matrix product with a learned weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyengine.ops.matmul import matmul


class Linear(nn.Module):
    """y = x @ weight.T, without bias.

    weight [out_features, in_features] is not initialised: the model that owns the layer does that.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], same dtype."""
        return matmul(x, self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
