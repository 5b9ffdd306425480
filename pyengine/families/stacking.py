"""Weights as files hold them: stacked in one tensor, transposed, or with their rows in another order.

A mapping {name of a weight: name in the file} says which are stacked: weights with one name in the file are the rows of
one tensor, in the order of the mapping. `StoredTensor` says the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.spec import ModelSpec

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class StoredRows:
    """Rows [start, stop) of the tensor `name` of a file."""

    name: str
    start: int
    stop: int


def stored_rows(spec: ModelSpec, names: Mapping[str, str]) -> dict[str, StoredRows]:
    """Where each weight lies."""
    ends: dict[str, int] = {}
    places = {}
    for weight, shape in spec.tensor_shapes().items():
        stored = names[weight]
        start = ends.get(stored, 0)
        ends[stored] = start + shape[0]
        places[weight] = StoredRows(stored, start, ends[stored])
    return places


def stored_shapes(spec: ModelSpec, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the file."""
    shapes = spec.tensor_shapes()
    return {place.name: (place.stop, *shapes[weight][1:]) for weight, place in stored_rows(spec, names).items()}


def stacked_weights(names: Mapping[str, str]) -> dict[str, list[str]]:
    """The weights that each tensor of the file is made of."""
    weights: dict[str, list[str]] = {}
    for weight, stored in names.items():
        weights.setdefault(stored, []).append(weight)
    return weights


@dataclass(frozen=True)
class StoredTensor:
    """How a tensor of a file holds the weights that it is made of.

    Attributes:
        shape: in the file.
        weights: name -> the rows of the tensor, of its columns where it is transposed, that are the rows of the weight,
            in order.
        is_transposed: whether it is [in, out].
    """

    shape: tuple[int, ...]
    weights: Mapping[str, slice | npt.NDArray[np.int64]]
    is_transposed: bool

    def upright(self, array: Array) -> Array:
        """The tensor of the file with rows first."""
        return np.ascontiguousarray(array.T) if self.is_transposed else array

    def join(self, weights: Mapping[str, Array]) -> Array:
        """The tensor of the file, of the values of all its weights."""
        if len(self.weights) == 1 and isinstance(next(iter(self.weights.values())), slice):
            return self.upright(weights[next(iter(self.weights))])
        shape = self.shape[::-1] if self.is_transposed else self.shape
        rows = np.empty(shape, next(iter(weights.values())).dtype)
        for name, index in self.weights.items():
            rows[index] = weights[name]
        return self.upright(rows)
