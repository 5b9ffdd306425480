"""A linear layer with a low-rank adapter beside its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyengine.nn.linear import Linear
from pyengine.ops.lora import lora
from pyengine.ops.matmul import matmul


class LoraLinear(Linear):
    """y = x @ weight.T + scale * (dropout(x) @ lora_A.T) @ lora_B.T, plus a bias where there is one.

    Three roundings: of the product, of the sum with the adapter's, of the sum with the bias: the bits of the engine
    that serves the adapter. weight and bias are those of `linear`.

    Args:
        linear: the layer to adapt.
        lora_A: [rank, in_features] float32 or bfloat16, perhaps shared with other layers.
        lora_B: [out_features, rank].
        scale: what the adapter's product is multiplied by.
        dropout: share of the adapter's input that is set to 0 in training.
    """

    def __init__(
        self, linear: Linear, lora_A: nn.Parameter, lora_B: nn.Parameter, *, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A, self.lora_B = lora_A, lora_B
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], same dtype."""
        y = lora(matmul(x, self.weight), self.dropout(x), self.lora_A, self.lora_B, self.scale)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """weight + scale * lora_B @ lora_A, computed in float32 and rounded once."""
        delta = self.scale * (self.lora_B.float() @ self.lora_A.float())
        return (self.weight.float() + delta).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={len(self.lora_A)}, scale={self.scale}"
