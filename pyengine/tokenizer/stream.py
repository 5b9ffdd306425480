"""Text from ids one at a time: `StreamDecoder` and `StopStrings`."""

from __future__ import annotations

import codecs
import re
import weakref
from collections.abc import Sequence
from typing import Any

from pyengine.errors import ArgumentError
from pyengine.tokenizer.tokenizer import Tokenizer

MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")


# Bytes of the tokens that have come, for the decoders of one tokenizer: looking a token up costs more than decoding it.
_BYTES: weakref.WeakKeyDictionary[Tokenizer, dict[int, bytes]] = weakref.WeakKeyDictionary()


class StreamDecoder:
    """Incremental `Tokenizer.decode`: the pieces of `push` and `finish` joined are `decode` of all ids, and no piece
    ends inside a UTF-8 character.

    A run of byte-fallback tokens comes out when it ends, because its last byte decides how its first is read.
    Raises ArgumentError for a decoder whose earlier text depends on later tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._is_byte_level = _is_byte_level(tokenizer.decoder)
        if not self._is_byte_level and (reason := _unstable_part(tokenizer.decoder)):
            raise ArgumentError(f"tokenizer: expected a decoder that can stream, got {reason}")
        self._bytes = _BYTES.setdefault(tokenizer, {})
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` has come; may be empty."""
        if self._is_byte_level:
            known = self._bytes.get(token_id)
            if known is not None:
                return "" if token_id in self._skipped else self._utf8.decode(known)
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        if self._is_byte_level:
            self._bytes[token_id] = token_bytes(token)
            return self._utf8.decode(self._bytes[token_id])
        self._pending.append(token_id)
        return "" if _BYTE_TOKEN.match(token) else self._flush()

    def finish(self) -> str:
        """The rest of the text. The decoder is then as new."""
        text = self._utf8.decode(b"", final=True) if self._is_byte_level else self._flush()
        self._utf8.reset()
        self._context, self._pending = [], []
        return text

    def _flush(self) -> str:
        if not self._pending:
            return ""
        before = self._tokenizer.decode(self._context, skip_special_tokens=False)
        after = self._tokenizer.decode(self._context + self._pending, skip_special_tokens=False)
        # One token of context, because a first token may lose its leading space; but one that has text.
        if self._tokenizer.id_to_token(self._pending[-1]):
            self._context = self._pending[-1:]
        else:
            self._context += self._pending
        self._pending = []
        return after[len(before) :]


class StopStrings:
    """Finds the first stop string in a text that comes in pieces, wherever the borders between the pieces lie.

    First means: the one that ends first; of several that end together, the longest. Text that may be the beginning of a
    stop string is held back.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if isinstance(stop, str):
            stop = [stop]
        if len(stop) > MAX_STOP_STRINGS:
            raise ArgumentError(f"stop: expected at most {MAX_STOP_STRINGS} strings, got {len(stop)}")
        for index, string in enumerate(stop):
            if not isinstance(string, str) or not 1 <= len(string) <= MAX_STOP_CHARS:
                raise ArgumentError(f"stop[{index}]: expected 1 to {MAX_STOP_CHARS} characters, got {string!r:.60}")
        # Longest first, so that of the matches with one end the longest is seen first.
        self._stops = sorted(set(stop), key=lambda string: (-len(string), string))
        self._failures = [_failure_table(string) for string in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.match: str | None = None
        """The stop string that was found."""

    def push(self, text: str) -> str:
        """The text before the stop string that can be given out now. After a match nothing more comes."""
        if self.match is not None:
            return ""
        text = self._held + text
        for end in range(len(self._held), len(text)):
            for index, stop in enumerate(self._stops):
                length = self._advance(index, text[end])
                if length == len(stop):
                    self.match, self._held = stop, ""
                    return text[: end + 1 - length]
        keep = max(self._matched, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text that was held back, when no more comes."""
        text, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return text

    def _advance(self, index: int, char: str) -> int:
        """One step of Knuth-Morris-Pratt: how much of the beginning of stop string `index` the text now ends with."""
        stop, failure, length = self._stops[index], self._failures[index], self._matched[index]
        while length and stop[length] != char:
            length = failure[length - 1]
        if stop[length] == char:
            length += 1
        self._matched[index] = length
        return length


def token_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for."""
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:
        return token.encode("utf-8")


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _failure_table(string: str) -> list[int]:
    """Per position: the length of the longest proper beginning of `string` that also ends there."""
    table = [0] * len(string)
    length = 0
    for index in range(1, len(string)):
        while length and string[length] != string[index]:
            length = table[length - 1]
        if string[length] == string[index]:
            length += 1
        table[index] = length
    return table


def _parts(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        return [leaf for part in decoder["decoders"] for leaf in _parts(part)]
    return [decoder] if decoder else []


def _is_byte_level(decoder: dict[str, Any]) -> bool:
    return [part.get("type") for part in _parts(decoder)] == ["ByteLevel"]


def _unstable_part(decoder: dict[str, Any]) -> str | None:
    """The part of the decoder by which a later token can change the text of an earlier one, or None."""
    fused = False
    for part in _parts(decoder):
        kind = part.get("type")
        if kind == "Fuse":
            fused = True
        elif kind == "Strip":
            if part.get("stop") or part.get("start", 0) > 1:
                return "Strip of more than one leading character"
        elif kind == "Replace":
            if fused:
                return "Replace after Fuse"
        elif kind not in ("ByteFallback", "Metaspace", "WordPiece"):
            return str(kind)
    return None
