"""Weights that a file holds stacked in one tensor.

A mapping {name of a weight: name in the file} says it all: weights with one name in the file are the rows of one
tensor, in the order of the mapping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pyengine.spec import ModelSpec


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
