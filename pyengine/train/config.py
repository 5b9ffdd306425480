"""Configurations: frozen dataclasses, filled from YAML and dotted overrides, checked field by field.

    @dataclass(frozen=True, kw_only=True)
    class OptimConfig(Config):
        lr: Annotated[float, Range(low=0.0)] = 1e-3

Field types: bool, int, float, str, Path, Literal of strings, another Config, `T | None`, `tuple[T, ...]`. Every error is
a ConfigError with the dotted key and, for a file, its name and line.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from pyengine.errors import ConfigError
from pyengine.train.config_nodes import Node, nearest, parse_file, parse_override

ConfigT = TypeVar("ConfigT", bound="Config")


@dataclass(frozen=True, kw_only=True)
class Range:
    """Limits of a number, both included; `above` is a lower limit that is not."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high and value > self.above

    def __str__(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"at least {self.low:g}")
        if self.above > -math.inf:
            parts.append(f"more than {self.above:g}")
        if self.high < math.inf:
            parts.append(f"at most {self.high:g}")
        return " and ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all configurations: checks types and ranges however it is made."""

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            object.__setattr__(self, name, _checked(getattr(self, name), hint, name))
        self.check()

    def check(self) -> None:
        """Rules between fields; raises ConfigError with the key."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, nested as the YAML is."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def load_config(
    kind: type[ConfigT], file: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()
) -> ConfigT:
    """A configuration from its defaults, then a YAML file, then overrides such as "optim.lr=3e-4", the last one winning.

    Raises:
        ConfigError: a key that does not exist, with the nearest that does; a value of another type or out of range; a
            file that is not YAML of mappings.
    """
    root = Node.mapping() if file is None else parse_file(Path(file))
    for override in overrides:
        root.merge(parse_override(override))
    return _build(kind, root, "")


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    text: str = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True, width=2**16)
    return text


def field_types(kind: type[Config]) -> dict[str, Any]:
    """Field name -> type, with `Annotated` kept."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _build(kind: type[ConfigT], node: Node, key: str) -> ConfigT:
    entries = node.entries(key)
    hints = field_types(kind)
    for name, child in entries.items():
        if name not in hints:
            hint = nearest(name, hints)
            raise child.key_error(f"expected a known key{hint}, got {name!r}", _join(key, name))
    required = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in entries and not _is_config(hints[name]):
            raise node.error("expected a value, got none", _join(key, name))
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        if name in entries:
            values[name] = _parse(hint, entries[name], _join(key, name))
        elif name in required:
            values[name] = _build(hint, Node.mapping(), _join(key, name))
    try:
        return kind(**values)
    except ConfigError as error:
        where = entries.get(error.key or "", node)
        raise where.error(error.message, _join(key, error.key or "")) from None


def _parse(hint: Any, node: Node, key: str) -> Any:
    hint, limits = _split(hint)
    if _is_config(hint):
        return _build(hint, node, key)
    if get_origin(hint) in (types.UnionType, typing.Union):
        if node.is_null():
            return None
        (hint,) = (member for member in get_args(hint) if member is not type(None))
        return _parse(typing.Annotated[hint, limits] if limits else hint, node, key)
    value: Any
    if get_origin(hint) is tuple:
        value = tuple(
            _parse(get_args(hint)[0], item, f"{key}[{index}]") for index, item in enumerate(node.items(key))
        )
    else:
        value = node.scalar(hint, key)
    try:
        return _checked(value, typing.Annotated[hint, limits] if limits else hint, key)
    except ConfigError as error:
        raise node.error(error.message, key) from None


def _checked(value: Any, hint: Any, key: str) -> Any:
    """`value` if it is of the type and in range, an int made a float where a float is wanted; else ConfigError."""
    hint, limits = _split(hint)
    if get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = (member for member in get_args(hint) if member is not type(None))
        return _checked(value, typing.Annotated[hint, limits] if limits else hint, key)
    if get_origin(hint) is Literal:
        if value not in get_args(hint) or not isinstance(value, str):
            raise ConfigError(f"expected one of {', '.join(get_args(hint))}, got {value!r:.80}", key=key)
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple | list):
            raise ConfigError(f"expected a list, got {value!r:.80}", key=key)
        return tuple(_checked(item, get_args(hint)[0], f"{key}[{index}]") for index, item in enumerate(value))
    if hint is float and type(value) is int:
        value = float(value)
    if hint is Path and isinstance(value, str):
        value = Path(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"expected {_NAMES.get(hint, hint.__name__)}, got {value!r:.80}", key=key)
    if hint is float and math.isnan(value):
        raise ConfigError("expected a number, got nan", key=key)
    if limits is not None and not limits.holds(value):
        raise ConfigError(f"expected {limits}, got {value!r}", key=key)
    return value


_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def _split(hint: Any) -> tuple[Any, Range | None]:
    if get_origin(hint) is typing.Annotated:
        base, *extras = get_args(hint)
        return base, next((extra for extra in extras if isinstance(extra, Range)), None)
    return hint, None


def _is_config(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Config)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key and name else key or name


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, Path) else value
