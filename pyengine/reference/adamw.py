"""The specification of adamw. Contract: csrc/include/pe/adamw.h."""

import math

import torch
from torch import Tensor


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """One step in place, computed in at least float32; each tensor is rounded once."""
    acc = torch.promote_types(param.dtype, torch.float32)
    g = grad.to(acc) * grad_scale
    p = (param if master is None else master).to(acc) * (1 - lr * weight_decay)
    m = beta1 * exp_avg.to(acc) + (1 - beta1) * g
    v = beta2 * exp_avg_sq.to(acc) + (1 - beta2) * g * g
    p = p - lr / (1 - beta1**step) * m / (v.sqrt() / math.sqrt(1 - beta2**step) + eps)
    for out, value in [(param, p), (exp_avg, m), (exp_avg_sq, v)]:
        out.copy_(value)
    if master is not None:
        master.copy_(p)


def sum_of_squares(t: Tensor) -> float:
    """The sum of the squares of all elements, in float64."""
    return t.double().square().sum().item()
