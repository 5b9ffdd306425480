"""The specification of matmul_w4a8. Contract: csrc/include/pe/matmul_w4a8.h."""

import torch
from torch import Tensor

from pyengine.reference.block_weights import GROUP_SIZE, dequantize


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """(xq int32 [..., K], dx f32 [..., K / 32]) of x [..., K], rounded in groups of 32."""
    groups = x.float().reshape(*x.shape[:-1], -1, GROUP_SIZE)
    largest = groups.abs().amax(-1, keepdim=True)
    finite, tiny = largest.isfinite(), largest < 2.0**-100
    # A number over a tensor is not rounded once: torch multiplies by the reciprocal. Tensors are divided.
    steps = torch.full_like(largest, 127)
    xq = torch.where(finite & ~tiny, (groups * (steps / largest)).round(), 0).to(torch.int32)
    dx = torch.where(finite, torch.where(tiny, 0, largest / steps), torch.nan)
    return xq.flatten(-2), dx.squeeze(-1)


def matmul_w4a8(x: Tensor, raw: Tensor, block_format: str, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """(dx * xq) [..., K] @ w [N, K]^T with w from raw GGUF rows, computed in float64."""
    xq, dx = quantize_activations(x)
    rounded = xq.double() * dx.double().repeat_interleave(GROUP_SIZE, -1)
    return (rounded @ dequantize(raw, block_format, torch.float64).T).to(out_dtype or x.dtype)
