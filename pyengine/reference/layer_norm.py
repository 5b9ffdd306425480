"""The specification of layer_norm. Contract: csrc/include/pe/layer_norm.h."""

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """(x - mean(x, -1)) * rsqrt(var(x, -1) + eps) * weight + bias, computed in at least float32."""
    acc = torch.promote_types(x.dtype, torch.float32)
    h = x.to(acc)
    centered = h - h.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps) * weight.to(acc)
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


def layer_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(layer_norm(h), h) with h = x + residual."""
    h = x + residual
    return layer_norm(h, weight, bias, eps=eps), h
