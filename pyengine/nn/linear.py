"""A matrix product with a learned weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyengine.ops.matmul import matmul


class Linear(nn.Module):
    """y = x @ weight.T, plus a bias where there is one: two roundings.

    weight [out_features, in_features] and bias [out_features] are not initialised: the model that owns the layer does
    that.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], same dtype."""
        y = matmul(x, self.weight)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
