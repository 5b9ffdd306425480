"""Token shards: `NAME.bin`, raw little-endian ids, beside `NAME.json`, the index.

`NAME.bin` is what nanotron and datatrove read as `.ds`: ids of all documents one after another, 16 bits each if the
vocabulary allows, else 32. The index says where documents end, what they are called, which tokenizer made them, and the
hash of the ids. It is written last, so a shard without an index is unfinished.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import blake3
import msgspec
import numpy as np
import numpy.typing as npt

from pyengine.data.errors import DataFileError
from pyengine.data.files import replacing
from pyengine.errors import ArgumentError
from pyengine.ledger import content_id

FORMAT = "pyengine token shard"
VERSION = 1
MAX_INDEX_BYTES = 1 << 30
MAX_VOCAB_SIZE = 1 << 31

_CHUNK_TOKENS = 1 << 20


class TokenisedDocument(NamedTuple):
    """Ids of one document, its name, and the UTF-8 bytes of its text."""

    id: str
    ids: npt.ArrayLike
    text_bytes: int


class ShardIndex(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The JSON beside the ids. `document_ends[i]` is the count of tokens up to the end of document i; `token_bits` is
    16 or 32; `text_bytes` are the UTF-8 bytes of the text; `tokens_id` is the content id of the `.bin` file."""

    format: str
    version: int
    token_bits: int
    vocab_size: int
    tokenizer: str
    tokens: int
    documents: int
    text_bytes: int
    tokens_id: str
    document_ends: list[int]
    document_ids: list[str]


def write_shard(
    path: str | os.PathLike[str], documents: Iterable[TokenisedDocument], *, vocab_size: int, tokenizer: str
) -> ShardIndex:
    """Write `path` + `.bin` and `.json`.

    Args:
        path: without suffix.
        documents: with at least one token each, ids in [0, vocab_size).
        vocab_size: 1 to 2**31; up to 65536 gives 16-bit ids.
        tokenizer: content id of the `tokenizer.json`.

    Raises:
        ArgumentError: a document is empty or holds an id outside the vocabulary.
    """
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ArgumentError(f"vocab_size: expected 1 to {MAX_VOCAB_SIZE}, got {vocab_size}")
    bits = 16 if vocab_size <= 1 << 16 else 32
    digest = blake3.blake3()
    ends: list[int] = []
    names: list[str] = []
    total = text_bytes = 0
    with replacing(_bin(path)) as file:
        for document in documents:
            ids = np.asarray(document.ids)
            if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
                raise ArgumentError(
                    f"documents[{document.id!r}]: expected a list of at least one integer, got {ids.dtype} {ids.shape}"
                )
            if ids.min() < 0 or ids.max() >= vocab_size:
                got = f"{ids.min()} to {ids.max()}"
                raise ArgumentError(f"documents[{document.id!r}]: expected ids from 0 to {vocab_size - 1}, got {got}")
            data = ids.astype(_dtype(bits)).tobytes()
            file.write(data)
            digest.update(data)
            total += ids.size
            text_bytes += document.text_bytes
            ends.append(total)
            names.append(document.id)
    index = ShardIndex(
        format=FORMAT,
        version=VERSION,
        token_bits=bits,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        tokens=total,
        documents=len(ends),
        text_bytes=text_bytes,
        tokens_id="blake3:" + digest.hexdigest(),
        document_ends=ends,
        document_ids=names,
    )
    with replacing(_json(path)) as file:
        file.write(msgspec.json.encode(index) + b"\n")
    return index


def add_boundaries(
    documents: Iterable[TokenisedDocument], *, start: int | None = None, end: int | None = None
) -> Iterator[TokenisedDocument]:
    """Documents with an id put before and after each. With a start id the first token of the text has something to be
    predicted from, so bits per byte count all of the text."""
    before = [] if start is None else [start]
    after = [] if end is None else [end]
    for document in documents:
        ids = np.concatenate([np.asarray(part, dtype=np.int64) for part in (before, document.ids, after)])
        yield document._replace(ids=ids)


class Shard:
    """A memory-mapped shard.

    Attributes:
        index: the index.
        tokens: [num_tokens] uint16 or uint32, read-only, mapped.
        ends: [num_documents] int64, `index.document_ends`.

    Args:
        path: without suffix, or of either file.
        verify: read all ids once and compare hash and range. Without it only sizes and the index are checked.

    Raises:
        DataFileError: a file is missing or damaged; `path`, `field` and `offset` say where.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        path = Path(path)
        if path.suffix in (".bin", ".json"):
            path = path.with_suffix("")
        self.path = path
        self.index = _read_index(_json(path))
        self.ends = np.asarray(self.index.document_ends, dtype=np.int64)
        dtype = _dtype(self.index.token_bits)
        expected = self.index.tokens * dtype.itemsize
        size = _size(_bin(path))
        if size != expected:
            raise DataFileError(
                f"expected {expected} bytes ({self.index.tokens} ids of {self.index.token_bits} bits), got {size}",
                path=_bin(path),
                field="tokens",
            )
        self.tokens: npt.NDArray[np.uint16] | npt.NDArray[np.uint32] = (
            np.memmap(_bin(path), dtype=dtype, mode="r") if expected else np.empty(0, dtype)
        )
        if verify:
            self._verify()

    def __len__(self) -> int:
        return self.index.documents

    def document(self, index: int) -> npt.NDArray[np.int32]:
        """[num_tokens] int32 ids of one document, a copy."""
        if not 0 <= index < len(self):
            raise ArgumentError(f"index: expected 0 to {len(self) - 1}, got {index}")
        start = int(self.ends[index - 1]) if index else 0
        return np.asarray(self.tokens[start : int(self.ends[index])]).astype(np.int32)

    def _verify(self) -> None:
        digest = blake3.blake3()
        for start in range(0, len(self.tokens), _CHUNK_TOKENS):
            chunk = np.asarray(self.tokens[start : start + _CHUNK_TOKENS])
            digest.update(chunk.tobytes())
            wrong = np.flatnonzero(np.greater_equal(chunk, self.index.vocab_size))
            if wrong.size:
                position = start + int(wrong[0])
                raise DataFileError(
                    f"expected ids below {self.index.vocab_size}, got {int(chunk[wrong[0]])}",
                    path=_bin(self.path),
                    offset=position * chunk.itemsize,
                    field="tokens",
                )
        found = "blake3:" + digest.hexdigest()
        if found != self.index.tokens_id:
            raise DataFileError(
                f"expected {self.index.tokens_id}, got {found}", path=_bin(self.path), field="tokens_id"
            )


def shard_content_id(path: str | os.PathLike[str]) -> str:
    """Content id of the index, which names the ids by their hash: the id of the whole shard."""
    return content_id(_json(path))


def _read_index(path: Path) -> ShardIndex:
    size = _size(path)
    if size > MAX_INDEX_BYTES:
        raise DataFileError(f"expected at most {MAX_INDEX_BYTES} bytes, got {size}", path=path)
    try:
        index = msgspec.json.decode(path.read_bytes(), type=ShardIndex)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataFileError(f"expected a shard index: {error}", path=path) from error
    checks = (
        ("format", index.format == FORMAT, repr(FORMAT), repr(index.format)),
        ("version", index.version == VERSION, VERSION, index.version),
        ("token_bits", index.token_bits in (16, 32), "16 or 32", index.token_bits),
        ("vocab_size", 1 <= index.vocab_size <= MAX_VOCAB_SIZE, f"1 to {MAX_VOCAB_SIZE}", index.vocab_size),
        ("tokens", 0 <= index.tokens < 1 << 60, "a count", index.tokens),
        ("text_bytes", index.text_bytes >= 0, "a count", index.text_bytes),
        ("documents", index.documents == len(index.document_ends), len(index.document_ends), index.documents),
        ("document_ids", index.documents == len(index.document_ids), index.documents, len(index.document_ids)),
    )
    for field, holds, expected, got in checks:
        if not holds:
            raise DataFileError(f"expected {expected}, got {got}", path=path, field=field)
    if index.token_bits == 16 and index.vocab_size > 1 << 16:
        raise DataFileError(f"expected 32 for {index.vocab_size} entries, got 16", path=path, field="token_bits")
    previous = 0
    for number, end in enumerate(index.document_ends):
        if not previous < end <= index.tokens:
            raise DataFileError(
                f"expected {previous + 1} to {index.tokens}, got {end}", path=path, field=f"document_ends[{number}]"
            )
        previous = end
    if previous != index.tokens:
        raise DataFileError(f"expected {index.tokens} at the end, got {previous}", path=path, field="document_ends")
    return index


def _dtype(bits: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    return np.dtype("<u2") if bits == 16 else np.dtype("<u4")


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:
        raise DataFileError(f"cannot be read: {error.strerror}", path=path) from error
    if not stat.S_ISREG(status.st_mode):
        raise DataFileError("expected a regular file", path=path)
    return status.st_size


def _bin(path: str | os.PathLike[str]) -> Path:
    return Path(os.fspath(path) + ".bin")


def _json(path: str | os.PathLike[str]) -> Path:
    return Path(os.fspath(path) + ".json")
