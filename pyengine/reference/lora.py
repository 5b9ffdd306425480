"""The specification of lora. Contract: csrc/include/pe/lora.h."""

from collections.abc import Sequence

import torch
from torch import Tensor


def lora(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y + scale * (x @ a^T) @ b^T, computed in at least float32 and rounded once, to the dtype of y."""
    acc = torch.promote_types(y.dtype, torch.float32)
    u = scale * (x.to(acc) @ a.to(acc).t())
    return (y.to(acc) + u @ b.to(acc).t()).to(y.dtype)


def lora_rows(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], adapter_of_row: Tensor
) -> Tensor:
    """y [M, N] where row m has the adapter adapter_of_row[m], or none where that is -1."""
    out = y.clone()
    for i, (a_i, b_i, scale) in enumerate(zip(a, b, scales, strict=True)):
        chosen = (adapter_of_row == i).nonzero()[:, 0]
        out = out.index_copy(0, chosen, lora(y[chosen], x[chosen], a_i, b_i, scale))
    return out
