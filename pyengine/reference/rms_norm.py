"""The specification of rms_norm. Contract: csrc/include/pe/rms_norm.h."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, weight_offset: float = 0.0) -> Tensor:
    """x * rsqrt(mean(x**2, -1) + eps) * (weight + weight_offset), computed in at least float32."""
    acc = torch.promote_types(x.dtype, torch.float32)
    h = x.to(acc)
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h * rstd * (weight.to(acc) + weight_offset)).to(x.dtype)


def rms_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(rms_norm(h), h) with h = x + residual."""
    h = x + residual
    return rms_norm(h, weight, eps=eps, weight_offset=weight_offset), h
