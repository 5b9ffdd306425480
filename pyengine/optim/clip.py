"""The global gradient norm, with the same bits for any number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from pyengine.ops.adamw import sum_of_squares


def grad_norm(grads: Iterable[Tensor]) -> float:
    """The Euclidean norm over all elements of all gradients. NaN and infinity come through."""
    squares = [sum_of_squares(grad) for grad in grads]
    # The exact sum: no order of the tensors is better than another. It would raise for what is not finite.
    total = math.fsum(squares) if all(map(math.isfinite, squares)) else sum(squares)
    return math.sqrt(total)


def clip_scale(norm: float, max_norm: float) -> float:
    """What to multiply gradients of this norm by so that it is at most `max_norm`; 1 where it already is.

    Pascanu et al. 2013, arXiv:1211.5063.
    """
    return min(1.0, max_norm / (norm + 1e-6))
