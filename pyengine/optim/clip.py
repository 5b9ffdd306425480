"""The global gradient norm, with the same bits for any number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK = 4096


@torch.no_grad()
def grad_norm(grads: Iterable[Tensor]) -> float:
    """The Euclidean norm over all elements of all gradients, in the order given.

    Chunks of fixed size are summed in float32, the chunks in float64, and the tensors exactly, so how torch splits the
    work never shows. NaN and infinity come through.
    """
    return math.sqrt(_sum(_square_sum(grad) for grad in grads))


def clip_scale(norm: float, max_norm: float) -> float:
    """What to multiply gradients of this norm by so that it is at most `max_norm`; 1 where it already is.

    Pascanu et al. 2013, arXiv:1211.5063.
    """
    return min(1.0, max_norm / (norm + 1e-6))


def _square_sum(grad: Tensor) -> float:
    flat = grad.reshape(-1)
    whole = flat.numel() // _CHUNK * _CHUNK
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, _CHUNK), dim=1, dtype=torch.float32)
    tail = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)
    return _sum([*norms.double().square().tolist(), float(tail) ** 2])


def _sum(values: Iterable[float]) -> float:
    """The correctly rounded sum; what is not finite comes through, where `math.fsum` would raise."""
    values = list(values)
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
