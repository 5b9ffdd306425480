"""What a text must be: the part of SamplingParams that a grammar enforces."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyengine.errors import ArgumentError

MAX_GRAMMAR_BYTES = 256 << 10
MAX_CHOICES = 1024


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """Exactly one of these; names as in vLLM. The dialects are those of llguidance.

    A text that ends by itself (finish reason "stop") satisfies it; one that max_tokens cuts is the beginning of one
    that does. No text spells the name of a special token; a grammar may ask for the token itself.
    """

    json: str | Mapping[str, Any] | None = None
    """A JSON schema. Parts of the standard that cannot be enforced are an error."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """A regular expression that the whole text matches: Rust's syntax, without look-around and back references."""
    choice: tuple[str, ...] | None = None
    """One of these texts."""
    grammar: str | None = None
    """A context-free grammar in Lark's syntax; its first rule is `start`."""
    disable_any_whitespace: bool = False
    """JSON without line breaks and indentation."""

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ArgumentError(
                f"structured_outputs: expected one of json, json_object, regex, choice, grammar, got {found}"
            )
        if self.choice is not None:
            object.__setattr__(self, "choice", _checked_choices(self.choice))
        if isinstance(self.json, Mapping):
            object.__setattr__(self, "json", _dump(self.json))
        for name in ("json", "regex", "grammar"):
            text = getattr(self, name)
            if not isinstance(text, str | None):
                raise ArgumentError(f"structured_outputs.{name}: expected a str, got {type(text).__name__}")
        if self.json is not None:
            _check_schema(str(self.json))
        for text in (self.regex, self.grammar, "".join(self.choice or ())):
            _check_size(text or "")


def _dump(schema: Mapping[str, Any]) -> str:
    try:
        return jsonlib.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"structured_outputs.json: expected plain JSON values, got: {error}") from error


def _check_schema(text: str) -> None:
    _check_size(text)
    try:
        schema = jsonlib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"structured_outputs.json: expected a JSON schema, got: {error}") from error
    if not isinstance(schema, dict):
        raise ArgumentError(f"structured_outputs.json: expected an object, got {type(schema).__name__}")


def _check_size(text: str) -> None:
    try:
        size = len(text) if len(text) > MAX_GRAMMAR_BYTES else len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ArgumentError(f"structured_outputs: expected Unicode, got a lone surrogate at {error.start}") from error
    if size > MAX_GRAMMAR_BYTES:
        raise ArgumentError(f"structured_outputs: expected at most {MAX_GRAMMAR_BYTES} bytes, got {size}")


def _checked_choices(choices: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(choices, str):
        raise ArgumentError("structured_outputs.choice: expected several texts, got a str")
    choices = tuple(choices)
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise ArgumentError(f"structured_outputs.choice: expected 1 to {MAX_CHOICES} texts, got {len(choices)}")
    for text in choices:
        if not isinstance(text, str) or not text:
            raise ArgumentError(f"structured_outputs.choice: expected texts of at least 1 character, got {text!r:.60}")
    return choices
