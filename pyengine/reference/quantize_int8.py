"""The specification of quantize_int8. Contract: csrc/include/pe/quantize_int8.h."""

import torch
from torch import Tensor


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q int8 with the shape of x, scale f32 [...]): one symmetric scale per row, computed in float32."""
    x = x.float()
    largest = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    scale = torch.where(largest < 2.0**-119, 0.0, largest / torch.tensor(127.0))
    scale = torch.where(x.isfinite().all(-1), scale, torch.nan)
    usable = (scale > 0)[..., None]
    q = torch.where(usable, torch.round(x / torch.where(usable, scale[..., None], 1)), 0)
    return q.to(torch.int8), scale


def dequantize_int8(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """q * scale, rounded once to dtype."""
    return (q.float() * scale[..., None]).to(dtype)
