"""The ledger: an append-only `ledger.jsonl` that links what a run read to what it wrote.

One line is one JSON object. Its first field, `id`, is the BLAKE3 hash of the exact bytes of the rest of the line, and
the rest holds `previous`, the id of the line before, so an edited, removed, inserted or moved line breaks the chain at
a line number that `read` names. The chain alone cannot see that whole lines are missing at the end: keep the `head` of
a ledger (a checkpoint manifest does) and hand it to `read`.

An append is one write under a file lock, flushed and synced before `record` returns. A crash can leave a torn last
line; the next `Ledger(folder)` moves its bytes to `ledger.torn` and records a `repair` entry. Whole lines are never
lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import blake3
import msgspec

import pyengine
from pyengine.errors import ArgumentError, PyEngineError

FILE_NAME = "ledger.jsonl"
TORN_NAME = "ledger.torn"
MAX_LINE_BYTES = 16 << 20
MAX_DEPTH = 32

_CHUNK_BYTES = 1 << 20
_CONTENT_ID = re.compile(r"blake3:[0-9a-f]{64}")
_KIND = re.compile(r"[a-z][a-z0-9_]{0,63}")
_FOLDER_CONTEXT = "pyengine 2026 content id of a folder"
_GENESIS = "blake3:" + "0" * 64

REPAIR = "repair"
"""Kind of the entry that tells of a torn line: facts `line` (its number) and `bytes` (moved to `ledger.torn`)."""


class LedgerError(PyEngineError):
    """A ledger does not verify. `path` and `line` (from 1; None for the file as a whole) say where; `torn` is True if
    the only fault is an unfinished last line."""

    def __init__(
        self, message: str, *, path: str | os.PathLike[str], line: int | None = None, torn: bool = False
    ) -> None:
        self.path = Path(path)
        self.line = line
        self.torn = torn
        where = f"{path}" if line is None else f"{path}, line {line}"
        super().__init__(f"{where}: {message}")


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line. `inputs` and `outputs` map a name to a content id; `time` is UTC, ISO 8601."""

    id: str
    previous: str
    time: str
    kind: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    facts: dict[str, Any]
    version: str


def content_id(source: str | os.PathLike[str] | bytes | bytearray | memoryview) -> str:
    """ "blake3:" and the hash of bytes, of a file (what `b3sum` prints) or of a folder.

    A folder's id covers the relative path and content id of every file under it, in order of path, and nothing else
    (no times, modes or empty folders). Files are streamed. Links are followed for files and not for folders inside.

    Raises:
        ArgumentError: the path is neither a file nor a folder, or holds something that is neither.
        OSError: a file cannot be read.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return "blake3:" + blake3.blake3(source).hexdigest()
    path = Path(source)
    if path.is_file():
        return _file_id(path)
    if not path.is_dir():
        raise ArgumentError(f"source: expected a file or a folder, got {str(path)!r}")
    files = []
    for folder, folders, names in os.walk(path):
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        if linked:
            raise ArgumentError(f"source: expected no linked folders, got {os.path.join(folder, linked[0])!r}")
        files += [Path(folder, name) for name in names]
    digest = blake3.blake3(derive_key_context=_FOLDER_CONTEXT)
    for relative, file in sorted((os.fsencode(file.relative_to(path).as_posix()), file) for file in files):
        if not file.is_file():
            raise ArgumentError(f"source: expected only files in the folder, got {str(file)!r}")
        digest.update(len(relative).to_bytes(8, "little") + relative + _file_id(file).encode())
    return "blake3:" + digest.hexdigest()


def read(path: str | os.PathLike[str], *, head: str | None = None, allow_torn: bool = False) -> list[Entry]:
    """All entries of a ledger, verified.

    Args:
        path: the `ledger.jsonl` file, or the folder that holds it.
        head: id of an entry that must be there; finds whole lines cut from the end.
        allow_torn: leave an unfinished last line out (a reader beside a live or crashed run wants that), not raise.

    Raises:
        LedgerError: a line is damaged, out of place, too long or torn; `line` says which.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        with open(path, "rb") as file:
            scan = _Scan(path)
            entries = list(scan.entries(file))
    except OSError as error:
        raise LedgerError(f"cannot be read: {error.strerror}", path=path) from error
    if scan.torn and not allow_torn:
        raise LedgerError(
            f"expected a newline at the end, got a torn line of {len(scan.torn)} bytes",
            path=path,
            line=scan.line,
            torn=True,
        )
    if head is not None and all(entry.id != head for entry in entries):
        raise LedgerError(f"expected entry {head}, got {len(entries)} other entries (cut at the end?)", path=path)
    return entries


class Ledger:
    """Appends to the ledger of a run folder. Several processes may append to one ledger; a lock orders them.

    Opening verifies the whole chain. `repaired_line` is the number of a torn line that was moved away, or None.

    Raises:
        LedgerError: the existing ledger does not verify.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILE_NAME
        self.head = _GENESIS
        self.repaired_line: int | None = None
        self._size = 0
        self._line = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = open(self.path, "ab+", buffering=0)  # noqa: SIM115
        try:
            _sync_folder(self.folder)
            with self._locked():
                pass
        except BaseException:
            self._file.close()
            raise

    def record(
        self,
        kind: str,
        *,
        inputs: Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> str:
        """Append one entry; when this returns, the line is on disk.

        Args:
            kind: lower-case word; `pyengine.report.facts.KINDS` lists the ones that reports know, with their facts.
            inputs, outputs: name -> content id (`content_id`, or the id of an earlier entry).
            facts: JSON values. Numpy and torch scalars become numbers; a number that is not finite becomes the string
                "NaN", "Infinity" or "-Infinity", because JSON has no such number and null means unknown.

        Returns:
            The id of the entry.

        Raises:
            ArgumentError: a name or value is not of the stated form, or the line would pass `MAX_LINE_BYTES`.
            OSError: the line could not be written; the ledger is as before.
        """
        if not isinstance(kind, str) or not _KIND.fullmatch(kind):
            raise ArgumentError(f"kind: expected a lower-case word, got {kind!r}")
        plain_inputs, plain_outputs = _ids("inputs", inputs or {}), _ids("outputs", outputs or {})
        plain_facts = _plain("facts", dict(facts or {}), 0)
        if self._file.closed:
            raise ArgumentError(f"ledger: expected an open ledger, got {str(self.path)!r} after close()")
        with self._locked():
            return self._append(kind, plain_inputs, plain_outputs, plain_facts)

    def close(self) -> None:
        """Close the file. Entries are on disk already."""
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the file lock, with `head` and `_size` caught up with what others appended and no torn tail."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            self._catch_up()
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _catch_up(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size == self._size:
            return
        if size < self._size:
            raise LedgerError(f"expected at least {self._size} bytes, got {size} (cut while open)", path=self.path)
        scan = _Scan(self.path, head=self.head, line=self._line)
        self._file.seek(self._size)
        with os.fdopen(os.dup(self._file.fileno()), "rb") as reader:
            for entry in scan.entries(reader):
                self.head = entry.id
        self._line = scan.line - 1 if scan.torn else scan.line
        self._size = size - len(scan.torn)
        if not scan.torn:
            return
        if scan.torn_entry is not None:
            os.write(self._file.fileno(), b"\n")
            os.fsync(self._file.fileno())
            self.head, self._line, self._size = scan.torn_entry.id, scan.line, size + 1
            return
        with open(self.folder / TORN_NAME, "ab") as torn:
            torn.write(scan.torn + b"\n")
            torn.flush()
            os.fsync(torn.fileno())
        os.ftruncate(self._file.fileno(), self._size)
        self.repaired_line = scan.line
        self._append(REPAIR, {}, {}, {"line": scan.line, "bytes": len(scan.torn)})

    def _append(self, kind: str, inputs: dict[str, str], outputs: dict[str, str], facts: Any) -> str:
        body = msgspec.json.encode(
            {
                "previous": self.head,
                "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
                "kind": kind,
                "inputs": inputs,
                "outputs": outputs,
                "facts": facts,
                "version": pyengine.__version__,
            }
        )
        entry_id = content_id(body)
        line = b'{"id":"' + entry_id.encode() + b'",' + body[1:] + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise ArgumentError(f"facts: expected a line of at most {MAX_LINE_BYTES} bytes, got {len(line)}")
        try:
            view = memoryview(line)
            while view:
                view = view[os.write(self._file.fileno(), view) :]
            os.fsync(self._file.fileno())
        except BaseException:
            os.ftruncate(self._file.fileno(), self._size)
            raise
        self.head = entry_id
        self._size += len(line)
        self._line += 1
        return entry_id


class _Scan:
    """Verifies lines one after another. After `entries`, `line` is the number of the last line seen, `torn` the bytes
    of an unfinished last line, and `torn_entry` its entry if only the newline is missing."""

    def __init__(self, path: Path, *, head: str = _GENESIS, line: int = 0) -> None:
        self.path = path
        self.head = head
        self.line = line
        self.torn = b""
        self.torn_entry: Entry | None = None

    def entries(self, file: BinaryIO) -> Iterator[Entry]:
        while line := file.readline(MAX_LINE_BYTES + 1):
            self.line += 1
            if len(line) > MAX_LINE_BYTES:
                raise self._error(f"expected at most {MAX_LINE_BYTES} bytes, got more")
            if not line.endswith(b"\n"):
                self.torn = line
                with contextlib.suppress(LedgerError):
                    self.torn_entry = self._entry(line)
                return
            entry = self._entry(line[:-1])
            self.head = entry.id
            yield entry

    def _entry(self, line: bytes) -> Entry:
        try:
            entry = msgspec.json.decode(line, type=Entry)
        except (msgspec.DecodeError, msgspec.ValidationError, RecursionError, UnicodeDecodeError) as error:
            raise self._error(f"expected a ledger entry, got {error}") from error
        prefix = b'{"id":"' + entry.id.encode("utf-8", "replace") + b'",'
        if not line.startswith(prefix) or content_id(b"{" + line[len(prefix) :]) != entry.id:
            raise self._error("expected an id that is the hash of the line, got another (the line was changed)")
        if entry.previous != self.head:
            raise self._error(
                f"expected the entry after {self.head}, got the one after {entry.previous} "
                "(a line was removed, added or moved)"
            )
        return entry

    def _error(self, message: str) -> LedgerError:
        return LedgerError(message, path=self.path, line=self.line)


def _file_id(path: Path) -> str:
    digest = blake3.blake3()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return "blake3:" + digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ids(argument: str, ids: Mapping[str, str]) -> dict[str, str]:
    for name, value in ids.items():
        if not isinstance(name, str) or not isinstance(value, str) or not _CONTENT_ID.fullmatch(value):
            raise ArgumentError(f"{argument}[{name!r}]: expected 'blake3:' and 64 hex digits, got {value!r}")
        _plain(f"{argument} name", name, 0)
    return dict(ids)


def _plain(name: str, value: Any, depth: int) -> Any:
    """`value` as what JSON can hold and give back unchanged, or an ArgumentError that names it."""
    if depth > MAX_DEPTH:
        raise ArgumentError(f"{name}: expected at most {MAX_DEPTH} levels, got more")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(f"{name}: expected text that UTF-8 can hold, got {value!r}") from error
        return str(value)
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 64:
            raise ArgumentError(f"{name}: expected an integer of at most 64 bits, got {value}")
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, os.PathLike):
        return _plain(name, os.fspath(value), depth)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ArgumentError(f"{name}: expected text as key, got {key!r}")
            _plain(f"{name} key", key, depth)
        return {str(key): _plain(f"{name}.{key}", item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{index}]", item, depth + 1) for index, item in enumerate(value)]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return _plain(name, value.item(), depth + 1)
    raise ArgumentError(f"{name}: expected a JSON value, got {type(value).__name__}")
