"""The specification of rope. Contract: csrc/include/pe/rope.h."""

import torch
from torch import Tensor


def rope_table(inv_freq: Tensor, num_positions: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """scale * (cos, sin) [num_positions, D/2] f32 of position * inv_freq, computed in float64."""
    angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * inv_freq.double()
    return (scale * angle.cos()).float(), (scale * angle.sin()).float()


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x [T, H, D] by the angles of `positions` [T], in at least float32."""
    acc = torch.promote_types(x.dtype, torch.float32)
    low, high = x.to(acc).chunk(2, -1)
    c, s = (table[positions.long()].to(acc)[:, None] for table in (cos, sin))
    return torch.cat([low * c - high * s, high * c + low * s], -1).to(x.dtype)
