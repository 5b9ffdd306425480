"""The specification of matmul. Contract: csrc/include/pe/matmul.h."""

import torch
from torch import Tensor


def matmul(x: Tensor, w: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """x @ w^T, computed in at least float32 and rounded once, to out_dtype (the dtype of x where None)."""
    acc = torch.promote_types(x.dtype, torch.float32)
    return (x.to(acc) @ w.to(acc).t()).to(out_dtype or x.dtype)
