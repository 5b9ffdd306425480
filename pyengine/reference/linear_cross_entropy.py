"""The specification of linear_cross_entropy. Contract: csrc/include/pe/linear_cross_entropy.h."""

import torch
from torch import Tensor


def linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """-log softmax(x @ w^T)[targets] for every token, 0 where ignored, computed in at least float32."""
    acc = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(acc) @ w.to(acc).t()
    nll = torch.nn.functional.cross_entropy(
        logits.reshape(-1, w.shape[0]), targets.reshape(-1).long(), ignore_index=ignore_index, reduction="none"
    )
    return nll.reshape(targets.shape)
