"""Sums of gradients over micro-batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class GradientAccumulator:
    """Adds up gradients in float32, in the order of the micro-batches; a single one is passed through as it is.

    Args:
        parameters: name -> parameter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self) -> None:
        """Take the gradients of one backward pass away from the parameters."""
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if name not in self._sums:
                self._sums[name] = parameter.grad
            else:
                self._sums[name] = self._sums[name].float().add_(parameter.grad)
            parameter.grad = None

    def grads(self) -> dict[str, Tensor]:
        """Name -> sum: the parameter's dtype after one micro-batch, float32 after several."""
        return self._sums
