"""A corpus of real text that every machine has: the Python standard library.

Prose (docstrings, comments) and code, with stable ids, exact-duplicate removal, simple filters with counts, and a split
into training and held-out text by source file, so that no file has text on both sides.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from pyengine.data.jsonl import Conversation, Document, Message
from pyengine.data.python_source import Piece, PythonSource, parse_quietly
from pyengine.errors import ArgumentError
from pyengine.ledger import content_id

Split = Literal["train", "held_out"]

DOCSTRING_PROMPT = "Write the docstring of this Python function:\n"
LICENSE = "PSF-2.0"
SKIPPED_FOLDERS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "_bundled",
        "dist-packages",
        "idle_test",
        "lib-dynload",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
_GENERATED = re.compile(rb"(?i)generated (from|by)|auto-?generated|do not edit")
_GENERATED_LINES = 5


class Filters(msgspec.Struct, frozen=True, kw_only=True):
    """Limits on one document. Lengths are UTF-8 bytes; shares are of the characters of the text."""

    min_bytes: int = 32
    max_bytes: int = 65536
    min_printable: float = 0.99
    min_letters: float = 0.4


class CorpusStatistics(msgspec.Struct, kw_only=True):
    """What was read, kept and dropped. `bytes` are UTF-8 bytes of kept text; `dropped` counts files and documents by
    reason; `source_id` is the hash over the content ids of all files read, in order."""

    files: int = 0
    source_bytes: int = 0
    source_id: str = ""
    documents: int = 0
    bytes: int = 0
    train_documents: int = 0
    train_bytes: int = 0
    held_out_documents: int = 0
    held_out_bytes: int = 0
    documents_by_kind: dict[str, int] = {}
    bytes_by_kind: dict[str, int] = {}
    dropped: dict[str, int] = {}

    def drop(self, reason: str) -> None:
        """Count one more dropped file or document."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def keep(self, kind: str, size: int, split: Split) -> None:
        """Count one more kept document."""
        self.documents += 1
        self.bytes += size
        self.documents_by_kind[kind] = self.documents_by_kind.get(kind, 0) + 1
        self.bytes_by_kind[kind] = self.bytes_by_kind.get(kind, 0) + size
        if split == "train":
            self.train_documents += 1
            self.train_bytes += size
        else:
            self.held_out_documents += 1
            self.held_out_bytes += size


class Corpus(msgspec.Struct, frozen=True):
    """The kept documents of each split, in order of source path and offset, and the counts."""

    train: list[Document]
    held_out: list[Document]
    statistics: CorpusStatistics


class Conversations(msgspec.Struct, frozen=True):
    """The kept conversations of each split, in order of source path and offset, and the counts."""

    train: list[Conversation]
    held_out: list[Conversation]
    statistics: CorpusStatistics


class SourceFile(msgspec.Struct, frozen=True):
    """A source file: path relative to the root with `/`, bytes and content id."""

    path: str
    data: bytes
    id: str


def split_of(file_id: str, held_out_share: float) -> Split:
    """The split of every document of a file: a function of the file's content id alone.

    Args:
        file_id: content id of the source file.
        held_out_share: expected share of held-out files, from 0 to 1.
    """
    if not 0 <= held_out_share <= 1:
        raise ArgumentError(f"held_out_share: expected 0 to 1, got {held_out_share}")
    draw = int.from_bytes(hashlib.blake2b(file_id.encode(), digest_size=6, person=b"pyengine split").digest(), "big")
    return "held_out" if draw < held_out_share * (1 << 48) else "train"


def source_files(root: str | os.PathLike[str] | None = None) -> Iterator[SourceFile]:
    """The Python files under `root` (default: the standard library) in order of path, without `SKIPPED_FOLDERS`.
    Links are not followed."""
    top = Path(sysconfig.get_path("stdlib") if root is None else root)
    if not top.is_dir():
        raise ArgumentError(f"root: expected a folder, got {str(top)!r}")
    paths = []
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    for relative, path in sorted((path.relative_to(top).as_posix(), path) for path in paths):
        if not path.is_symlink():
            data = path.read_bytes()
            yield SourceFile(relative, data, content_id(data))


def build_corpus(
    root: str | os.PathLike[str] | None = None, *, filters: Filters | None = None, held_out_share: float = 0.05
) -> Corpus:
    """Docstrings, prose comments and code of every module as documents.

    An id is `path#kind#offset`, the offset in bytes of the source file. No text occurs twice: code comes without
    docstrings and whole-line comments, and of equal texts the first in order stays.

    Args:
        root: folder of Python files; default: the standard library.
        filters: limits on one document.
        held_out_share: expected share of held-out files.
    """
    filters = filters or Filters()
    statistics = CorpusStatistics()
    splits: dict[Split, list[Document]] = {"train": [], "held_out": []}
    seen: set[bytes] = set()
    for file, source in _parsed(root, statistics):
        split = split_of(file.id, held_out_share)
        for kind, piece in _pieces(source, filters.max_bytes):
            reason = _reason_to_drop(kind, piece.text, filters) or _duplicate(piece.text, seen)
            if reason:
                statistics.drop(reason)
                continue
            statistics.keep(kind, len(piece.text.encode()), split)
            document_id = f"{file.path}#{kind}#{piece.offset}"
            splits[split].append(Document(document_id, piece.text, file.path, {"kind": kind, "file": file.id}))
    return Corpus(splits["train"], splits["held_out"], statistics)


def signature_docstring_pairs(
    root: str | os.PathLike[str] | None = None,
    *,
    filters: Filters | None = None,
    max_signature_bytes: int = 400,
    held_out_share: float = 0.05,
) -> Conversations:
    """Conversations that ask for the docstring of a function, given its signature and the classes around it.

    Of functions with equal docstrings the first in order stays.

    Args:
        root: folder of Python files; default: the standard library.
        filters: limits on a docstring; default: 16 to 600 bytes.
        max_signature_bytes: limit on a signature with its class lines.
        held_out_share: expected share of held-out files; the split is that of `build_corpus`.
    """
    filters = filters or Filters(min_bytes=16, max_bytes=600)
    statistics = CorpusStatistics()
    splits: dict[Split, list[Conversation]] = {"train": [], "held_out": []}
    seen: set[bytes] = set()
    for file, source in _parsed(root, statistics):
        split = split_of(file.id, held_out_share)
        for offset, signature, docstring in source.signatures():
            reason = _reason_to_drop("docstring", docstring, filters)
            if not reason and len(signature.encode()) > max_signature_bytes:
                reason = "signature_too_long"
            reason = reason or _duplicate(docstring, seen)
            if reason:
                statistics.drop(reason)
                continue
            messages = [Message("user", DOCSTRING_PROMPT + signature), Message("assistant", docstring)]
            statistics.keep("pair", sum(len(message.content.encode()) for message in messages), split)
            conversation_id = f"{file.path}#pair#{offset}"
            metadata = {"kind": "pair", "file": file.id}
            splits[split].append(Conversation(messages, conversation_id, file.path, metadata))
    return Conversations(splits["train"], splits["held_out"], statistics)


def _parsed(
    root: str | os.PathLike[str] | None, statistics: CorpusStatistics
) -> Iterator[tuple[SourceFile, PythonSource]]:
    ids = []
    for file in source_files(root):
        statistics.files += 1
        statistics.source_bytes += len(file.data)
        ids.append(file.id)
        if _GENERATED.search(b"\n".join(file.data[:4096].splitlines()[:_GENERATED_LINES])):
            statistics.drop("file_generated")
            continue
        try:
            source = PythonSource(file.data)
        except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
            statistics.drop("file_not_parsed")
            continue
        yield file, source
    statistics.source_id = content_id("\n".join(ids).encode())


def _pieces(source: PythonSource, max_bytes: int) -> Iterable[tuple[str, Piece]]:
    pieces = [("docstring", piece) for piece in source.docstrings()]
    pieces += [("comment", piece) for piece in source.comments()]
    pieces += [("code", piece) for piece in source.code(max_bytes)]
    return sorted(pieces, key=lambda pair: (pair[1].offset, pair[0]))


def _reason_to_drop(kind: str, text: str, filters: Filters) -> str | None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return f"{kind}_not_utf8"
    if size < max(filters.min_bytes, 1):
        return f"{kind}_too_short"
    if size > filters.max_bytes:
        return f"{kind}_too_long"
    printable = sum(character.isprintable() or character in "\n\t" for character in text)
    if printable < filters.min_printable * len(text):
        return f"{kind}_unprintable"
    if kind != "code" and sum(map(str.isalpha, text)) < filters.min_letters * len(text):
        return f"{kind}_few_letters"
    if kind == "comment" and _is_code(text):
        return "comment_is_code"
    return None


def _is_code(text: str) -> bool:
    try:
        parse_quietly(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _duplicate(text: str, seen: set[bytes]) -> str | None:
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    if digest in seen:
        return "duplicate"
    seen.add(digest)
    return None
