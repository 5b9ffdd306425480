"""Token sequences to calibrate on, from files of text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pyengine.data.errors import DataFileError
from pyengine.data.jsonl import Message, read_jsonl
from pyengine.errors import ArgumentError
from pyengine.tokenizer import ChatTemplate, Tokenizer

READ_BYTES = 4 << 20


class _Record(msgspec.Struct, frozen=True):
    """A document or a conversation."""

    text: str | None = None
    messages: list[Message] | None = None


def read_sequences(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    max_tokens: int,
    *,
    seq_len: int = 512,
) -> list[list[int]]:
    """The first `max_tokens` tokens of a file, in sequences of at most `seq_len`.

    Args:
        path: .jsonl with documents ("text") or conversations ("messages"), or else one text in UTF-8, of which the
            first 4 MiB are read.
        template: makes texts of conversations.

    Raises:
        ArgumentError: a file without text, or conversations for a model without a chat template.
        DataFileError: a bad line.
    """
    if max_tokens < 1:
        raise ArgumentError(f"max_tokens: expected at least 1, got {max_tokens}")
    sequences: list[list[int]] = []
    left = max_tokens
    for text, is_conversation in _texts(Path(path), template):
        # A chat template writes the special tokens itself.
        ids = tokenizer.encode(text, add_special_tokens=not is_conversation)[:left]
        sequences += [ids[i : i + seq_len] for i in range(0, len(ids), seq_len)]
        left -= len(ids)
        if left == 0:
            break
    if not sequences:
        raise ArgumentError(f"calibration: expected text in {os.fspath(path)}, got none")
    return sequences


def _texts(path: Path, template: ChatTemplate | None) -> Iterator[tuple[str, bool]]:
    """Texts, and whether each is a conversation."""
    if path.suffix != ".jsonl":
        yield _read_text(path), False
        return
    for record in read_jsonl(path, _Record):
        if record.messages is not None:
            if template is None:
                raise ArgumentError(f"calibration: {path} holds conversations, and the model has no chat template")
            yield template.render([{"role": m.role, "content": m.content} for m in record.messages]), True
        elif record.text is not None:
            yield record.text, False
        else:
            raise DataFileError("expected records with a text or with messages, got neither", path=path)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(READ_BYTES)
    except OSError as error:
        raise DataFileError(f"cannot be read: {error.strerror}", path=path) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start > len(data) - 4 and len(data) == READ_BYTES:  # the cut went through a character
            return data[: error.start].decode("utf-8")
        raise DataFileError(f"expected UTF-8, got another byte at {error.start}", path=path) from error
