"""Rotary parameters of a config.json, in the older dialect (`rope_theta`, `rope_scaling`) and the newer
(`rope_parameters`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pyengine.errors import ArgumentError
from pyengine.families.fields import get_bool, get_float, get_int, get_mapping, get_optional_int
from pyengine.spec import (
    MAX_POSITIONS,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
    yarn_attention_factor,
)

_ORIGINAL = "original_max_position_embeddings"
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)
_YARN_KEYS = ("factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "truncate")
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": _LLAMA3_KEYS,
    "yarn": (*_YARN_KEYS, "mscale", "mscale_all_dim"),
    "longrope": ("factor", _ORIGINAL, "attention_factor", "short_factor", "long_factor"),
}
# The name of LongRoPE in the first models that had it.
_OLD_NAMES = {"su": "longrope"}


def rope_from_config(config: Mapping[str, Any], *, default_theta: float, partial: bool = False) -> RopeSpec:
    """`partial` allows a partial_rotary_factor, which `partial_rotary_factor` reads.

    Both dialects may be present if they say the same; anything not understood is an ArgumentError with the key."""
    found: list[RopeSpec] = []
    if config.get("rope_parameters") is not None:
        parameters = get_mapping(config, "rope_parameters")
        theta = get_float(parameters, "rope_theta", get_float(config, "rope_theta", default_theta))
        found.append(RopeSpec(theta=theta, scaling=_scaling(parameters, "rope_parameters", partial, config)))
    if config.get("rope_scaling") is not None or (not found and config.get("rope_theta") is not None):
        theta = get_float(config, "rope_theta", found[0].theta if found else default_theta)
        scaling = _scaling(get_mapping(config, "rope_scaling"), "rope_scaling", partial, config)
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


def with_default_factor(config: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """`config` with a partial_rotary_factor, the default where neither dialect says one."""
    places = (config, get_mapping(config, "rope_parameters"), get_mapping(config, "rope_scaling"))
    if any(place.get("partial_rotary_factor") is not None for place in places):
        return dict(config)
    return dict(config) | {"partial_rotary_factor": default}


def with_factor(config: Mapping[str, Any], rotary_dim: int | None) -> dict[str, Any]:
    """The keys of `rope_to_config` with the factor said even where it is 1, for readers with another default."""
    parameters = dict(config["rope_parameters"])
    if rotary_dim is None:
        parameters["partial_rotary_factor"] = 1.0
    return {"rope_parameters": parameters, "partial_rotary_factor": parameters["partial_rotary_factor"]}


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
    elif isinstance(rope.scaling, YarnScaling):
        scaling = {"rope_type": "yarn"} | {key: getattr(rope.scaling, key) for key in _YARN_KEYS}
    elif isinstance(rope.scaling, LongRopeScaling):
        scaling = {
            "rope_type": "longrope",
            "short_factor": list(rope.scaling.short_factors),
            "long_factor": list(rope.scaling.long_factors),
            "attention_factor": rope.scaling.attention_factor,
            _ORIGINAL: rope.scaling.original_max_position_embeddings,
        }
    elif rope.scaling is not None:
        raise ArgumentError(
            f"rope.scaling: expected none, or one that config.json can say by its parameters, got {rope.scaling!r:.60}"
        )
    parameters = {"rope_theta": rope.theta} | (scaling or {"rope_type": "default"})
    config = {"rope_theta": rope.theta, "rope_scaling": scaling, "rope_parameters": parameters}
    if scaling is not None and _ORIGINAL in scaling:
        # Where it stands outside too, readers give that precedence.
        config[_ORIGINAL] = scaling[_ORIGINAL]
    if rotary_dim is not None:
        parameters["partial_rotary_factor"] = config["partial_rotary_factor"] = _factor_of(rotary_dim, head_dim)
    return config


def _scaling(values: Mapping[str, Any], where: str, partial: bool, config: Mapping[str, Any]) -> RopeScaling | None:
    names = {key: values[key] for key in ("rope_type", "type") if values.get(key) is not None}
    if len(set(map(repr, names.values()))) > 1:
        raise ArgumentError(f"{where}.type: expected the same as rope_type, got {names}")
    name = next(iter(names.values()), "default")
    if name == "dynamic":
        raise ArgumentError(
            f"{where}.rope_type: expected angles that a position alone decides, got 'dynamic', whose angles depend on "
            "the length of the sequence; say the scaled base as rope_theta instead"
        )
    name = _OLD_NAMES.get(name, name) if isinstance(name, str) else name
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
    if name == "default":
        return None
    original = _original_context(values, where, config)
    if name == "llama3":
        return Llama3Scaling(
            factor=get_float(named, f"{where}.factor"),
            low_freq_factor=get_float(named, f"{where}.low_freq_factor"),
            high_freq_factor=get_float(named, f"{where}.high_freq_factor"),
            original_max_position_embeddings=original,
        )
    # Some files say the factor by the two contexts alone.
    factor = get_float(
        named, f"{where}.factor", min(get_int(config, "max_position_embeddings"), MAX_POSITIONS) / max(original, 1)
    )
    if name == "longrope":
        implied = math.sqrt(1.0 + math.log(factor) / math.log(original)) if factor > 1.0 and original > 1 else 1.0
        return LongRopeScaling(
            short_factors=_factors(values, where, "short_factor"),
            long_factors=_factors(values, where, "long_factor"),
            original_max_position_embeddings=original,
            attention_factor=get_float(named, f"{where}.attention_factor", implied),
        )
    multipliers = {key: get_float(named, f"{where}.{key}", 0.0) for key in ("mscale", "mscale_all_dim")}
    for key, multiplier in multipliers.items():
        if not 0.0 <= multiplier <= 1e6:
            raise ArgumentError(f"{where}.{key}: expected a number in [0, 1e+06], got {multiplier}")
    implied = yarn_attention_factor(factor)
    if all(multipliers.values()):
        of_all, of_part = (yarn_attention_factor(factor, multiplier) for multiplier in multipliers.values())
        implied = of_all / of_part
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=get_float(named, f"{where}.attention_factor", implied),
        beta_fast=get_float(named, f"{where}.beta_fast", 32.0),
        beta_slow=get_float(named, f"{where}.beta_slow", 1.0),
        truncate=get_bool(named, f"{where}.truncate", True),
    )


def _original_context(values: Mapping[str, Any], where: str, config: Mapping[str, Any]) -> int:
    """The context that the model was pretrained on. The key outside the rotary parameters has precedence."""
    if (found := get_optional_int(config, _ORIGINAL)) is not None:
        return found
    if values.get(_ORIGINAL) is not None:
        return get_int({f"{where}.{_ORIGINAL}": values[_ORIGINAL]}, f"{where}.{_ORIGINAL}")
    return get_int(config, "max_position_embeddings")


def _factors(values: Mapping[str, Any], where: str, key: str) -> tuple[float, ...]:
    factors = values.get(key)
    if not isinstance(factors, list) or any(type(factor) not in (int, float) for factor in factors):
        raise ArgumentError(f"{where}.{key}: expected a list of numbers, got {factors!r:.80}")
    return tuple(get_float({f"{where}.{key}": factor}, f"{where}.{key}") for factor in factors)
