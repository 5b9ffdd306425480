"""Rotary embeddings of a `ModelSpec`, and the checks that its fields share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError

MAX_POSITIONS = 1 << 28


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every frequency divided by `factor` (position interpolation)."""

    factor: float

    def __post_init__(self) -> None:
        check_float(self, "rope.scaling.factor", "factor", low=1.0, high=1e6)

    def scale(self, inv_freq: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return inv_freq / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, a linear blend between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        check_float(self, "rope.scaling.factor", "factor", low=1.0, high=1e6)
        check_float(self, "rope.scaling.low_freq_factor", "low_freq_factor", low=1e-6, high=1e6)
        check_float(self, "rope.scaling.high_freq_factor", "high_freq_factor", low=1e-6, high=1e6)
        name = "rope.scaling.original_max_position_embeddings"
        check_int(self, name, "original_max_position_embeddings", low=1, high=MAX_POSITIONS)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ArgumentError(
                f"rope.scaling.high_freq_factor: expected more than low_freq_factor = {self.low_freq_factor}, "
                f"got {self.high_freq_factor}"
            )

    def scale(self, inv_freq: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        # How many periods of each frequency fit into the context that the model was pretrained on.
        num_periods = self.original_max_position_embeddings * inv_freq / (2.0 * math.pi)
        blend = (num_periods - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return inv_freq * (blend + (1.0 - blend) / self.factor)


@dataclass(frozen=True, kw_only=True)
class FactorScaling:
    """One divisor per frequency, as a GGUF file stores them in `rope_freqs.weight` [D/2]."""

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.factors, tuple):
            raise ArgumentError(f"rope.scaling.factors: expected a tuple, got {type(self.factors).__name__}")
        for index, factor in enumerate(self.factors):
            if not isinstance(factor, float) or not 1e-6 <= factor <= 1e6:
                raise ArgumentError(
                    f"rope.scaling.factors[{index}]: expected a float in [1e-06, 1e+06], got {factor!r}"
                )

    def scale(self, inv_freq: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return inv_freq / np.asarray(self.factors, dtype=np.float64)


RopeScaling = LinearScaling | Llama3Scaling | FactorScaling
_SCALINGS: dict[str, type[RopeScaling]] = {"linear": LinearScaling, "llama3": Llama3Scaling, "factors": FactorScaling}


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding: pair i of a head turns by position * theta^(-2i/D), after `scaling`."""

    theta: float
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        check_float(self, "rope.theta", "theta", low=1.0, high=1e12)
        if self.scaling is not None and not isinstance(self.scaling, tuple(_SCALINGS.values())):
            raise ArgumentError(f"rope.scaling: expected None or a scaling dataclass, got {self.scaling!r}")


def rope_to_dict(rope: RopeSpec) -> dict[str, Any]:
    return {"theta": rope.theta, "scaling": _scaling_to_dict(rope.scaling)}


def rope_from_dict(values: Any, name: str) -> RopeSpec:
    values = take(mapping(values, name), name, {"theta", "scaling"})
    return RopeSpec(theta=values["theta"], scaling=_scaling_from_dict(values["scaling"]))


def _scaling_to_dict(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if isinstance(scaling, FactorScaling):
        return {"type": "factors", "factors": list(scaling.factors)}
    name = next(name for name, kind in _SCALINGS.items() if type(scaling) is kind)
    return {"type": name} | {field.name: getattr(scaling, field.name) for field in fields(scaling)}


def _scaling_from_dict(values: Any) -> RopeScaling | None:
    if values is None:
        return None
    values = dict(mapping(values, "rope.scaling"))
    name = values.pop("type", None)
    if not isinstance(name, str) or name not in _SCALINGS:
        raise ArgumentError(f"rope.scaling.type: expected one of {sorted(_SCALINGS)}, got {name!r}")
    kind = _SCALINGS[name]
    arguments = take(values, "rope.scaling", {field.name for field in fields(kind)})
    if isinstance(arguments.get("factors"), list):
        arguments["factors"] = tuple(arguments["factors"])
    return kind(**arguments)


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{name}: expected a mapping, got {type(value).__name__}")
    return value


def take(values: Mapping[str, Any], name: str, expected: set[str]) -> dict[str, Any]:
    """A copy of `values`, which must have exactly the expected keys."""
    values = mapping(values, name)
    if missing := sorted(expected - values.keys()):
        raise ArgumentError(f"{name}: expected the key {missing[0]!r}, got none")
    if unknown := sorted(str(key) for key in values.keys() - expected):
        raise ArgumentError(f"{name}: expected only the keys {sorted(expected)}, got {unknown[0]!r:.80}")
    return dict(values)


def check_int(owner: object, name: str, attribute: str, *, low: int, high: int) -> None:
    value = getattr(owner, attribute)
    # bool is an int in Python, never in a model description.
    if type(value) is not int or not low <= value <= high:
        raise ArgumentError(f"{name}: expected an int in [{low}, {high}], got {value!r:.80}")


def check_float(owner: object, name: str, attribute: str, *, low: float, high: float) -> None:
    value = getattr(owner, attribute)
    if type(value) is int and abs(value) < 1 << 53:
        value = float(value)
        object.__setattr__(owner, attribute, value)
    if type(value) is not float or not low <= value <= high:
        raise ArgumentError(f"{name}: expected a float in [{low:g}, {high:g}], got {value!r:.80}")
