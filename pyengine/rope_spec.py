"""Rotary embeddings of a `ModelSpec`, and the checks that its fields share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError

MAX_POSITIONS = 1 << 28

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every frequency divided by `factor` (position interpolation)."""

    factor: float

    def __post_init__(self) -> None:
        check_float(self, "rope.scaling.factor", "factor", low=1.0, high=1e6)

    def scale(self, inv_freq: FloatArray, theta: float, context_length: int) -> FloatArray:
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

    def scale(self, inv_freq: FloatArray, theta: float, context_length: int) -> FloatArray:
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
        _check_factors("rope.scaling.factors", self.factors)

    def scale(self, inv_freq: FloatArray, theta: float, context_length: int) -> FloatArray:
        return inv_freq / np.asarray(self.factors, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Frequencies below `beta_slow` turns in the original context divided by `factor`, those above `beta_fast` kept, a
    blend that is linear in the index of the pair between; cos and sin times `attention_factor`. Peng et al. 2023,
    arXiv:2309.00071.

    With `truncate` the blend starts and ends at whole pairs.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        check_float(self, "rope.scaling.factor", "factor", low=1.0, high=1e6)
        for attribute in ("attention_factor", "beta_fast", "beta_slow"):
            check_float(self, f"rope.scaling.{attribute}", attribute, low=1e-6, high=1e6)
        name = "rope.scaling.original_max_position_embeddings"
        check_int(self, name, "original_max_position_embeddings", low=1, high=MAX_POSITIONS)
        if self.beta_fast < self.beta_slow:
            raise ArgumentError(
                f"rope.scaling.beta_fast: expected at least beta_slow = {self.beta_slow}, got {self.beta_fast}"
            )
        if type(self.truncate) is not bool:
            raise ArgumentError(f"rope.scaling.truncate: expected a bool, got {self.truncate!r:.80}")

    def scale(self, inv_freq: FloatArray, theta: float, context_length: int) -> FloatArray:
        num_pairs = len(inv_freq)

        def pair_that_turns(num_turns: float) -> float:
            ratio = self.original_max_position_embeddings / (num_turns * 2.0 * math.pi)
            return num_pairs * math.log(ratio) / math.log(theta)

        first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0.0), min(last, 2.0 * num_pairs - 1.0)
        width = last - first if last != first else 0.001
        blend = np.clip((np.arange(num_pairs, dtype=np.float64) - first) / width, 0.0, 1.0)
        return inv_freq * (1.0 - blend + blend / self.factor)


def yarn_attention_factor(factor: float, multiplier: float = 1.0) -> float:
    """What YaRN multiplies cos and sin by unless a model says otherwise."""
    return 1.0 if factor <= 1.0 else 0.1 * multiplier * math.log(factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """One divisor per frequency, from one of two lists; cos and sin times `attention_factor`. Ding et al. 2024,
    arXiv:2402.13753.

    The long list serves where the context that a model is loaded for is longer than the original one: never the length
    of a sequence, whose first tokens would change with its last.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float

    def __post_init__(self) -> None:
        _check_factors("rope.scaling.short_factors", self.short_factors)
        _check_factors("rope.scaling.long_factors", self.long_factors)
        if len(self.short_factors) != len(self.long_factors):
            raise ArgumentError(
                f"rope.scaling.long_factors: expected {len(self.short_factors)} factors, as many as short_factors, "
                f"got {len(self.long_factors)}"
            )
        check_float(self, "rope.scaling.attention_factor", "attention_factor", low=1e-6, high=1e6)
        name = "rope.scaling.original_max_position_embeddings"
        check_int(self, name, "original_max_position_embeddings", low=1, high=MAX_POSITIONS)

    def scale(self, inv_freq: FloatArray, theta: float, context_length: int) -> FloatArray:
        is_long = context_length > self.original_max_position_embeddings
        return inv_freq / np.asarray(self.long_factors if is_long else self.short_factors, dtype=np.float64)


RopeScaling = LinearScaling | Llama3Scaling | FactorScaling | YarnScaling | LongRopeScaling
_SCALINGS: dict[str, type[RopeScaling]] = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "factors": FactorScaling,
    "yarn": YarnScaling,
    "longrope": LongRopeScaling,
}


class RopeTable(NamedTuple):
    """What a rotary table is computed from."""

    inv_freq: FloatArray
    """Angle per position of each rotary pair: float64 [P], radians."""
    attention_factor: float
    """Of cos and sin."""


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding: pair i of a head turns by position * theta^(-2i/D), after `scaling`."""

    theta: float
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        check_float(self, "rope.theta", "theta", low=1.0, high=1e12)
        if self.scaling is not None and not isinstance(self.scaling, tuple(_SCALINGS.values())):
            raise ArgumentError(f"rope.scaling: expected None or a scaling dataclass, got {self.scaling!r}")
        if isinstance(self.scaling, YarnScaling) and self.theta <= 1.0:
            raise ArgumentError(f"rope.theta: expected more than 1 beside YaRN, got {self.theta}")

    @property
    def attention_factor(self) -> float:
        """Of cos and sin."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling | LongRopeScaling) else 1.0

    def factor_counts(self) -> dict[str, int]:
        """Length of each list with a factor per rotary pair, by its name."""
        if self.scaling is None:
            return {}
        values = {field.name: getattr(self.scaling, field.name) for field in fields(self.scaling)}
        return {name: len(value) for name, value in values.items() if isinstance(value, tuple)}


def rope_to_dict(rope: RopeSpec) -> dict[str, Any]:
    return {"theta": rope.theta, "scaling": _scaling_to_dict(rope.scaling)}


def rope_from_dict(values: Any, name: str) -> RopeSpec:
    values = take(mapping(values, name), name, {"theta", "scaling"})
    return RopeSpec(theta=values["theta"], scaling=_scaling_from_dict(values["scaling"]))


def _scaling_to_dict(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    name = next(name for name, kind in _SCALINGS.items() if type(scaling) is kind)
    values = {field.name: getattr(scaling, field.name) for field in fields(scaling)}
    return {"type": name} | {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _scaling_from_dict(values: Any) -> RopeScaling | None:
    if values is None:
        return None
    values = dict(mapping(values, "rope.scaling"))
    name = values.pop("type", None)
    if not isinstance(name, str) or name not in _SCALINGS:
        raise ArgumentError(f"rope.scaling.type: expected one of {sorted(_SCALINGS)}, got {name!r}")
    kind = _SCALINGS[name]
    arguments = take(values, "rope.scaling", {field.name for field in fields(kind)})
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
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


def _check_factors(name: str, factors: Any) -> None:
    if not isinstance(factors, tuple):
        raise ArgumentError(f"{name}: expected a tuple, got {type(factors).__name__}")
    for index, factor in enumerate(factors):
        if not isinstance(factor, float) or not 1e-6 <= factor <= 1e6:
            raise ArgumentError(f"{name}[{index}]: expected a float in [1e-06, 1e+06], got {factor!r:.80}")


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
