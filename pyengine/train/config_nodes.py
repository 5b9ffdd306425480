"""YAML and overrides as a tree that remembers where each value stood. Scalars stay text until a field gives them a
type, so `3e-4` is a number and `on` is a name where the field says so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from pyengine.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 16

_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {"true": True, "True": True, "false": False, "False": False}


@dataclass
class Node:
    """A scalar (`text`), a list or a mapping, with the place it came from: `file` and `line`, or an override."""

    file: str | None = None
    line: int | None = None
    text: str | None = None
    quoted: bool = False
    sequence: list[Node] | None = None
    children: dict[str, Node] | None = None
    key_line: int | None = field(default=None)

    @classmethod
    def mapping(cls) -> Node:
        return cls(children={})

    def error(self, message: str, key: str) -> ConfigError:
        """At the value."""
        return ConfigError(message, key=key or None, file=self.file, line=self.line)

    def key_error(self, message: str, key: str) -> ConfigError:
        """At the key, which may stand lines above the value."""
        return ConfigError(message, key=key, file=self.file, line=self.key_line or self.line)

    def is_null(self) -> bool:
        return self.text is not None and not self.quoted and self.text in _NULLS

    def entries(self, key: str) -> dict[str, Node]:
        if self.is_null():
            return {}
        if self.children is None:
            raise self.error(f"expected a mapping, got {self.describe()}", key)
        return self.children

    def items(self, key: str) -> list[Node]:
        if self.sequence is None:
            raise self.error(f"expected a list, got {self.describe()}", key)
        return self.sequence

    def describe(self) -> str:
        if self.children is not None:
            return "a mapping"
        return "a list" if self.sequence is not None else f"{self.text!r:.80}"

    def scalar(self, kind: Any, key: str) -> Any:
        """The text as a value of `kind`: bool, int, float, str, Path or Literal."""
        if self.text is None:
            raise self.error(f"expected one value, got {self.describe()}", key)
        is_text = kind in (str, Path) or get_origin(kind) is not None
        if self.is_null() or (self.quoted and not is_text):
            expected = f"one of {', '.join(get_args(kind))}" if get_args(kind) else _EXPECTED[kind]
            raise self.error(f"expected {expected}, got {'nothing' if self.is_null() else repr(self.text)}", key)
        if is_text:
            return Path(self.text) if kind is Path else self.text
        try:
            return _BOOLS[self.text] if kind is bool else kind(self.text)
        except (KeyError, ValueError, OverflowError):
            raise self.error(f"expected {_EXPECTED[kind]}, got {self.text!r:.80}", key) from None

    def merge(self, other: Node) -> None:
        """Lay `other`, a chain of mappings, over this mapping."""
        for name, child in (other.children or {}).items():
            mine = (self.children or {}).get(name)
            if mine is not None and mine.children is not None and child.children is not None:
                mine.merge(child)
            else:
                self.children = (self.children or {}) | {name: child}


_EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def parse_file(path: Path) -> Node:
    """The mapping in a YAML file of at most `MAX_FILE_BYTES`, without aliases, tags or repeated keys."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"expected at most {MAX_FILE_BYTES} bytes, got more", file=str(path))
    node = _compose(data, str(path))
    if node is None:
        return Node(file=str(path), line=1, children={})
    root = _convert(node, str(path))
    if root.children is None:
        raise root.error(f"expected a mapping, got {root.describe()}", "")
    return root


def parse_override(override: str) -> Node:
    """ "a.b=value" as nested mappings; the value is YAML."""
    key, separator, text = override.partition("=")
    names = key.split(".")
    if not separator or not all(names) or len(names) > MAX_DEPTH:
        raise ConfigError(f"expected KEY.KEY=VALUE, got {override!r:.80}")
    composed = _compose(text.encode("utf-8", "surrogateescape"), None)
    node = Node(text="") if composed is None else _convert(composed, None)
    node.line = None
    for name in reversed(names):
        node = Node(children={name: node})
    return node


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", perhaps 'x'" for the known name that is most like `name`, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", perhaps {found[0]!r}" if found else f": one of {', '.join(known)}"


def _compose(data: bytes, file: str | None) -> yaml.Node | None:
    try:
        depth = 0
        # Events come as the text is read, so deep nesting, for which the scanner needs quadratic time, ends it early.
        for event in yaml.parse(data, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            line = event.start_mark.line + 1 if event.start_mark is not None and file is not None else None
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError("expected no aliases, got one", file=file, line=line)
            if depth > MAX_DEPTH:
                raise ConfigError(f"expected at most {MAX_DEPTH} levels, got more", file=file, line=line)
        node: yaml.Node | None = yaml.compose(data, Loader=yaml.SafeLoader)
        return node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None and file is not None else None
        raise ConfigError(f"expected YAML: {error.problem}", file=file, line=line) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected YAML: {str(error).splitlines()[0]}", file=file) from error


def _convert(node: yaml.Node, file: str | None) -> Node:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        return Node(file=file, line=line, text=node.value, quoted=node.style is not None)
    if isinstance(node, yaml.SequenceNode):
        return Node(file=file, line=line, sequence=[_convert(item, file) for item in node.value])
    children: dict[str, Node] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError("expected a name as key, got a list or mapping", file=file, line=key_line)
        if key_node.value in children:
            raise ConfigError("expected every key once, got it twice", key=key_node.value, file=file, line=key_line)
        child = _convert(value_node, file)
        child.key_line = key_line
        children[key_node.value] = child
    return Node(file=file, line=line, children=children)
