"""Typed access to the keys of a config.json or of GGUF metadata. Every error names the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyengine.errors import ArgumentError


def get_int(values: Mapping[str, Any], key: str) -> int:
    value = get_optional_int(values, key)
    if value is None:
        raise ArgumentError(f"{key}: expected an int, got none")
    return value


def get_optional_int(values: Mapping[str, Any], key: str) -> int | None:
    value = values.get(key)
    if value is not None and type(value) is not int:
        raise ArgumentError(f"{key}: expected an int, got {value!r:.80}")
    return value


def get_float(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key)
    if value is None:
        value = default
    if type(value) is int and abs(value) < 1 << 53:
        value = float(value)
    if type(value) is not float:
        raise ArgumentError(f"{key}: expected a number, got {'none' if value is None else repr(value)[:80]}")
    return value


def get_bool(values: Mapping[str, Any], key: str, default: bool) -> bool:
    value = values.get(key)
    if value is None:
        return default
    if type(value) is not bool:
        raise ArgumentError(f"{key}: expected true or false, got {value!r:.80}")
    return value


def get_ids(values: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """One id, a list of ids, or nothing."""
    value = values.get(key)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if any(type(token_id) is not int for token_id in ids):
        raise ArgumentError(f"{key}: expected an int or a list of ints, got {value!r:.80}")
    return tuple(dict.fromkeys(ids))


def get_mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{key}: expected an object, got {value!r:.80}")
    return value
