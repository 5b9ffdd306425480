"""Documents and conversations as JSON lines: one record a line, UTF-8, lines of bounded length."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import blake3
import msgspec

from pyengine.data.errors import DataFileError
from pyengine.data.files import replacing
from pyengine.errors import ArgumentError

MAX_LINE_BYTES = 64 << 20

Record = TypeVar("Record", bound=msgspec.Struct)


class Document(msgspec.Struct, frozen=True):
    """A text with a stable id. The fields are those of dolma and datatrove; unknown ones are ignored when read.

    `metadata` of the documents that `pyengine.data.corpus` makes: `kind`, and `file`, the content id of the source
    file, which decides the split.
    """

    id: str
    text: str
    source: str = ""
    metadata: dict[str, str] = {}


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Conversation(msgspec.Struct, frozen=True):
    """Chat messages, in the layout that OpenAI and transformers share."""

    messages: list[Message]
    id: str = ""
    source: str = ""
    metadata: dict[str, str] = {}


class JsonlFile(msgspec.Struct, frozen=True):
    """What was written: lines, bytes and content id of the file."""

    path: str
    lines: int
    bytes: int
    content_id: str


def write_jsonl(path: str | os.PathLike[str], records: Iterable[msgspec.Struct]) -> JsonlFile:
    """Write records, one a line, to a file that appears whole or not at all.

    Raises:
        ArgumentError: a record would pass `MAX_LINE_BYTES` or holds text that UTF-8 cannot.
    """
    lines = size = 0
    digest = blake3.blake3()
    with replacing(path) as file:
        for record in records:
            try:
                line = msgspec.json.encode(record) + b"\n"
            except UnicodeEncodeError as error:
                raise ArgumentError(f"records[{lines}]: expected text that UTF-8 can hold, got {error}") from error
            if len(line) > MAX_LINE_BYTES:
                raise ArgumentError(f"records[{lines}]: expected at most {MAX_LINE_BYTES} bytes, got {len(line)}")
            file.write(line)
            digest.update(line)
            lines += 1
            size += len(line)
    return JsonlFile(str(path), lines, size, "blake3:" + digest.hexdigest())


def read_jsonl(path: str | os.PathLike[str], record_type: type[Record]) -> Iterator[Record]:
    """The records of a file, one at a time; empty lines are skipped.

    Raises:
        DataFileError: a line is too long, not JSON or not such a record; `line` says which.
    """
    decoder = msgspec.json.Decoder(record_type)
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise DataFileError(f"cannot be read: {error.strerror}", path=path) from error
    with file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataFileError(f"expected at most {MAX_LINE_BYTES} bytes, got more", path=Path(path), line=number)
            if line.isspace():
                continue
            try:
                yield decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise DataFileError(f"expected {record_type.__name__}: {error}", path=path, line=number) from error
