"""The specification of gelu. Contract: csrc/include/pe/gelu.h."""

import torch
from torch import Tensor


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """x times the normal distribution up to x, or its "tanh" form, computed in at least float32."""
    acc = torch.promote_types(x.dtype, torch.float32)
    return torch.nn.functional.gelu(x.to(acc), approximate=approximate).to(x.dtype)
