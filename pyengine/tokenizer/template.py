"""`ChatTemplate`: messages -> the text that a model was trained on."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyengine.errors import ArgumentError, PyEngineError
from pyengine.jsonfile import file_error, read_bounded, read_json_object
from pyengine.tokenizer.gguf import GgufTokenizerReader
from pyengine.tokenizer.template_process import TemplateLimits, TemplateProcess
from pyengine.tokenizer.tokenizer import MAX_TOKENIZER_CONFIG_BYTES, read_special_tokens

_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_RESERVED = frozenset({"messages", "add_generation_prompt", "tools", "documents"})


class TemplateError(PyEngineError):
    """A chat template cannot be used.

    reason: "syntax", "render", "raised" (by the template's own raise_exception), "prefix" (see `assistant_mask`), or
    the limit that it met: "fuel", "output", "memory", "time", "crash". line: in the template, from 1, where known.
    """

    def __init__(self, reason: str, message: str, line: int | None = None) -> None:
        self.reason = reason
        self.message = message
        self.line = line
        where = "" if line is None else f" at line {line}"
        super().__init__(f"chat template{where}: {reason}: {message}")


class ChatTemplate:
    """A Jinja chat template as transformers runs it: trimmed blocks, loop controls, plain `tojson`, `raise_exception`,
    `strftime_now`, the special tokens as variables, `{% generation %}` as a block without effect.

    It is compiled and rendered in a process of its own under `limits`; whatever it does there ends in TemplateError.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        limits: TemplateLimits | None = None,
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self.limits = limits or TemplateLimits()
        if not isinstance(source, str):
            raise ArgumentError(f"source: expected a str, got {type(source).__name__}")
        if len(source) > self.limits.source_bytes:
            raise TemplateError("syntax", f"expected at most {self.limits.source_bytes} characters, got {len(source)}")
        self._process = TemplateProcess(_GENERATION_TAG.sub(_as_condition, source), self.limits)
        _text(self._process.compile())

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], *, name: str = "default") -> ChatTemplate:
        """From chat_template.jinja, else from tokenizer_config.json, in `folder`. `name` chooses one of several in the
        latter.

        Raises ModelFileError where there is none.
        """
        return cls(_read_source(Path(folder), name), special_tokens=read_special_tokens(folder))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, path: str | os.PathLike[str] = "model.gguf") -> ChatTemplate:
        """From `tokenizer.chat_template` of a GGUF file's metadata. Raises ModelFileError where there is none."""
        source = metadata.get("tokenizer.chat_template")
        if not isinstance(source, str):
            raise file_error(path, "expected a template, got none", field="tokenizer.chat_template")
        return cls(source, special_tokens=GgufTokenizerReader(metadata, path).special_tokens())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        now: datetime.datetime | None = None,
        **variables: Any,
    ) -> str:
        """The text of `messages`, which hold "role" and "content" as plain JSON values. `now` is what `strftime_now`
        tells.

        Raises TemplateError, ArgumentError for values that are not JSON, CapacityError for more than 16 MiB of them.
        """
        if reserved := sorted(_RESERVED & variables.keys()):
            raise ArgumentError(f"{reserved[0]}: expected it as an argument of its own, got it as a variable")
        values: dict[str, Any] = {
            **self.special_tokens,
            **variables,
            "messages": [dict(message) for message in messages],
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None if documents is None else [dict(document) for document in documents],
            "add_generation_prompt": add_generation_prompt,
        }
        return _text(self._process.render(values, (now or datetime.datetime.now()).isoformat()))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes chat_template.jinja."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "chat_template.jinja").write_text(self.source, encoding="utf-8", newline="")

    def close(self) -> None:
        """Ends the process that renders. It also ends with this object, and starts again when needed."""
        self._process.close()


def _as_condition(match: re.Match[str]) -> str:
    """The tag as one that every Jinja knows, with the same control of white space."""
    before, end, after = match.groups()
    return f"{{%{before} {'endif' if end else 'if true'} {after}%}}"


def _text(reply: dict[str, Any]) -> str:
    if "text" not in reply:
        raise TemplateError(reply["reason"], reply["message"], reply["line"])
    text: str = reply["text"]
    return text


def _read_source(folder: Path, name: str) -> str:
    path = folder / "chat_template.jinja"
    if path.exists() and name == "default":
        data = read_bounded(path, max_bytes=TemplateLimits().source_bytes)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise file_error(path, "expected UTF-8", offset=error.start) from error
    path = folder / "tokenizer_config.json"
    source: Any = None
    if path.exists():
        source = read_json_object(path, max_bytes=MAX_TOKENIZER_CONFIG_BYTES).get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get(name)
    elif name != "default":
        source = None
    if not isinstance(source, str):
        raise file_error(path, f"expected a template {name!r:.60}, got none", field="chat_template")
    return source
