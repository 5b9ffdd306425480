"""The specification of linear_cross_entropy. Contract: csrc/include/pe/linear_cross_entropy.h."""

import torch
from torch import Tensor


def linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """logsumexp(logits) - logits[target] with logits = x @ w^T, 0 where ignored, computed in at least float32."""
    acc = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(acc) @ w.to(acc).t()
    ignored = targets == ignore_index
    target_logits = logits.gather(-1, targets.long().masked_fill(ignored, 0)[..., None])[..., 0]
    return (logits.logsumexp(-1) - target_logits).masked_fill(ignored, 0.0)
