"""Rotary parameters of a config.json, in the older dialect (`rope_theta`, `rope_scaling`) and the newer
(`rope_parameters`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pyengine.errors import ArgumentError
from pyengine.families.fields import get_float, get_int, get_mapping
from pyengine.spec import LinearScaling, Llama3Scaling, RopeScaling, RopeSpec

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_KEYS: dict[str, tuple[str, ...]] = {"default": (), "linear": ("factor",), "llama3": _LLAMA3_KEYS}


def rope_from_config(config: Mapping[str, Any], *, default_theta: float, partial: bool = False) -> RopeSpec:
    """`partial` allows a partial_rotary_factor, which `partial_rotary_factor` reads.

    Both dialects may be present if they say the same; anything not understood is an ArgumentError with the key."""
    found: list[RopeSpec] = []
    if config.get("rope_parameters") is not None:
        parameters = get_mapping(config, "rope_parameters")
        theta = get_float(parameters, "rope_theta", get_float(config, "rope_theta", default_theta))
        found.append(RopeSpec(theta=theta, scaling=_scaling(parameters, "rope_parameters", partial)))
    if config.get("rope_scaling") is not None or (not found and config.get("rope_theta") is not None):
        theta = get_float(config, "rope_theta", found[0].theta if found else default_theta)
        scaling = _scaling(get_mapping(config, "rope_scaling"), "rope_scaling", partial)
        found.append(RopeSpec(theta=theta, scaling=scaling))
    elif found and get_float(config, "rope_theta", found[0].theta) != found[0].theta:
        raise ArgumentError(
            f"rope_theta: expected the value in rope_parameters, {found[0].theta}, got {config['rope_theta']!r:.80}"
        )
    if len(found) == 2 and found[0] != found[1]:
        raise ArgumentError(f"rope_scaling: expected the same as rope_parameters, {found[0]}, got {found[1]}")
    return found[0] if found else RopeSpec(theta=default_theta)


def partial_rotary_factor(config: Mapping[str, Any]) -> float:
    """The part of a head that turns, in (0, 1]; 1 where neither dialect says it."""
    places = [("partial_rotary_factor", config)]
    for where in ("rope_parameters", "rope_scaling"):
        places.append((f"{where}.partial_rotary_factor", get_mapping(config, where)))
    found = {key: get_float(values, "partial_rotary_factor", 1.0) for key, values in places}
    said = {key: factor for key, factor in found.items() if factor != 1.0}
    for key, factor in said.items():
        if not 0.0 < factor < 1.0:
            raise ArgumentError(f"{key}: expected more than 0, at most 1, got {factor}")
        if factor != next(iter(said.values())):
            raise ArgumentError(f"{key}: expected the same everywhere, {next(iter(said.values()))}, got {factor}")
    return next(iter(said.values()), 1.0)


def _factor_of(rotary_dim: int, head_dim: int) -> float:
    """The factor that gives `rotary_dim` when a reader multiplies and truncates."""
    factor = rotary_dim / head_dim
    return factor if int(head_dim * factor) == rotary_dim else math.nextafter(factor, 1.0)


def rope_to_config(rope: RopeSpec, *, rotary_dim: int | None, head_dim: int) -> dict[str, Any]:
    """Both dialects, because a reader that knows only the older one would fall back to a default theta."""
    scaling: dict[str, Any] | None = None
    if isinstance(rope.scaling, LinearScaling):
        scaling = {"rope_type": "linear", "factor": rope.scaling.factor}
    elif isinstance(rope.scaling, Llama3Scaling):
        scaling = {"rope_type": "llama3"} | {key: getattr(rope.scaling, key) for key in _LLAMA3_KEYS}
    elif rope.scaling is not None:
        raise ArgumentError(
            f"rope.scaling: expected one that config.json can say, none, linear or llama3, got {rope.scaling!r:.60}"
        )
    parameters = {"rope_theta": rope.theta} | (scaling or {"rope_type": "default"})
    config = {"rope_theta": rope.theta, "rope_scaling": scaling, "rope_parameters": parameters}
    if rotary_dim is not None:
        parameters["partial_rotary_factor"] = config["partial_rotary_factor"] = _factor_of(rotary_dim, head_dim)
    return config


def _scaling(values: Mapping[str, Any], where: str, partial: bool) -> RopeScaling | None:
    names = {key: values[key] for key in ("rope_type", "type") if values.get(key) is not None}
    if len(set(map(repr, names.values()))) > 1:
        raise ArgumentError(f"{where}.type: expected the same as rope_type, got {names}")
    name = next(iter(names.values()), "default")
    if not isinstance(name, str) or name not in _KEYS:
        raise ArgumentError(f"{where}.rope_type: expected one of {sorted(_KEYS)}, got {name!r:.80}")
    allowed = {"rope_type", "type", "rope_theta", *_KEYS[name]}
    if not partial and get_float(values, "partial_rotary_factor", 1.0) != 1.0:
        raise ArgumentError(f"{where}.partial_rotary_factor: expected 1, got {values['partial_rotary_factor']!r:.80}")
    unknown = sorted(
        str(k) for k, v in values.items() if v is not None and k not in allowed | {"partial_rotary_factor"}
    )
    # Transformers adds this key to every type when it saves; only llama3 reads it.
    unknown = [key for key in unknown if key != "original_max_position_embeddings"]
    if unknown:
        raise ArgumentError(f"{where}.{unknown[0]}: expected no such key for rope_type {name!r}, got one")
    named = {f"{where}.{key}": value for key, value in values.items()}
    if name == "linear":
        return LinearScaling(factor=get_float(named, f"{where}.factor"))
    if name == "llama3":
        return Llama3Scaling(
            factor=get_float(named, f"{where}.factor"),
            low_freq_factor=get_float(named, f"{where}.low_freq_factor"),
            high_freq_factor=get_float(named, f"{where}.high_freq_factor"),
            original_max_position_embeddings=get_int(named, f"{where}.original_max_position_embeddings"),
        )
    return None
