"""Checks on the content of a tokenizer.json before a tokenizer is built from it.

The library accepts descriptions that cost unbounded memory or time (chained replacements, nested quantifiers, sparse
ids) or that mean something else than they say (an added token whose id is not free). All of them end here in
ModelFileError.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator
from typing import Any

from pyengine.errors import ModelFileError
from pyengine.jsonfile import file_error

MAX_TOKENS = 1 << 22
MAX_TOKEN_CHARS = 4096
MAX_ID_GAP = 65536
MAX_ADDED_TOKENS = 1 << 17
MAX_COMPONENTS = 64
MAX_EXPANSION = 16
MAX_PATTERN_CHARS = 4096
MAX_SPECIAL_IDS_PER_TEXT = 64


class DescriptionCheck:
    """`path` is the file to name in errors."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path

    def check(self, description: dict[str, Any]) -> int:
        """`description` is the object of a tokenizer.json. Returns one more than its largest id."""
        vocab = self._check_vocab(description.get("model"))
        self._check_added_tokens(description.get("added_tokens"), vocab)
        for stage in ("normalizer", "pre_tokenizer", "decoder"):
            self._check_stage(stage, description.get(stage))
        self._check_post_processor(description.get("post_processor"))
        added = description.get("added_tokens") or []
        ids: list[int] = [*vocab.values(), *(entry["id"] for entry in added)]
        return 1 + max(ids)

    def fail(self, field: str, message: str) -> ModelFileError:
        return file_error(self.path, message, field=field)

    def _check_vocab(self, model: Any) -> dict[str, int]:
        if not isinstance(model, dict):
            raise self.fail("model", f"expected an object, got {type(model).__name__}")
        if model.get("dropout"):
            raise self.fail(
                "model.dropout", f"expected none, so that equal texts give equal ids, got {model['dropout']!r:.40}"
            )
        vocab = model.get("vocab")
        if isinstance(vocab, list):
            if not all(isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) for entry in vocab):
                raise self.fail("model.vocab", "expected pairs of a token and a score")
            vocab = {entry[0]: index for index, entry in enumerate(vocab)}
        if not isinstance(vocab, dict):
            raise self.fail("model.vocab", f"expected an object or a list, got {type(vocab).__name__}")
        if not 1 <= len(vocab) <= MAX_TOKENS:
            raise self.fail("model.vocab", f"expected 1 to {MAX_TOKENS} tokens, got {len(vocab)}")
        ids = vocab.values()
        # Whole-set checks first: a loop over every token would be most of the time that a small model takes to load.
        if (
            max(map(len, vocab)) > MAX_TOKEN_CHARS
            or set(map(type, ids)) != {int}
            or not 0 <= min(ids) <= max(ids) < len(vocab) + MAX_ID_GAP
            or len(set(ids)) != len(ids)
        ):
            raise self._bad_token(vocab)
        return vocab

    def _bad_token(self, vocab: dict[str, Any]) -> ModelFileError:
        """The error of the first token whose length or id is not allowed."""
        seen: set[int] = set()
        for token, token_id in vocab.items():
            self._check_id("model.vocab", token, token_id, len(vocab))
            if token_id in seen:
                return self.fail("model.vocab", f"expected every id once, got {token_id} twice, at {token!r:.60}")
            seen.add(token_id)
        raise AssertionError("every token is good")

    def _check_id(self, field: str, token: str, token_id: Any, num_tokens: int) -> None:
        if len(token) > MAX_TOKEN_CHARS:
            raise self.fail(field, f"expected tokens of at most {MAX_TOKEN_CHARS} characters, got {len(token)}")
        if type(token_id) is not int or not 0 <= token_id < num_tokens + MAX_ID_GAP:
            raise self.fail(
                field, f"expected an id in [0, {num_tokens + MAX_ID_GAP}) for {token!r:.60}, got {token_id!r:.40}"
            )

    def _check_added_tokens(self, added: Any, vocab: dict[str, int]) -> None:
        if added is None:
            return
        if not isinstance(added, list) or len(added) > MAX_ADDED_TOKENS:
            raise self.fail("added_tokens", f"expected a list of at most {MAX_ADDED_TOKENS} tokens")
        contents: set[str] = set()
        ids = {token_id: token for token, token_id in vocab.items()}
        for index, entry in enumerate(added):
            field = f"added_tokens[{index}]"
            if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not entry["content"]:
                raise self.fail(field, "expected an object with a content that is not empty")
            content, token_id = entry["content"], entry.get("id")
            self._check_id(f"{field}.id", content, token_id, len(vocab) + len(added))
            if content in contents:
                raise self.fail(field, f"expected every added token once, got {content!r:.60} twice")
            assert isinstance(token_id, int)
            if ids.setdefault(token_id, content) != content or vocab.get(content, token_id) != token_id:
                raise self.fail(
                    f"{field}.id", f"expected an id of its own for {content!r:.60}, got the taken {token_id}"
                )
            contents.add(content)

    def _check_stage(self, stage: str, component: Any) -> None:
        expansion = 1.0
        for index, (field, part) in enumerate(self._components(stage, component, depth=0)):
            if index >= MAX_COMPONENTS:
                raise self.fail(stage, f"expected at most {MAX_COMPONENTS} components, got more")
            pattern = part.get("pattern")
            if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
                self._check_regex(f"{field}.pattern", pattern["Regex"])
            if part.get("type") == "Replace":
                expansion *= self._replace_expansion(field, part)
            elif part.get("type") == "Prepend":
                expansion *= 1 + len(str(part.get("prepend")).encode("utf-8", "replace")) / 64
            elif part.get("type") == "Precompiled":
                self._check_charsmap(field, part.get("precompiled_charsmap"))
            if expansion > MAX_EXPANSION:
                raise self.fail(
                    field, f"expected replacements that grow a text at most {MAX_EXPANSION} times, got more"
                )

    def _components(self, field: str, component: Any, *, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
        if component is None:
            return
        if not isinstance(component, dict) or depth > 8:
            raise self.fail(field, "expected an object, nested at most 8 deep")
        nested = [key for key in ("normalizers", "pretokenizers", "decoders", "processors") if key in component]
        if not nested:
            yield field, component
        for key in nested:
            if not isinstance(component[key], list) or len(component[key]) > MAX_COMPONENTS:
                raise self.fail(f"{field}.{key}", f"expected a list of at most {MAX_COMPONENTS} components")
            for index, part in enumerate(component[key]):
                yield from self._components(f"{field}.{key}[{index}]", part, depth=depth + 1)

    def _replace_expansion(self, field: str, part: dict[str, Any]) -> float:
        content, pattern = part.get("content"), part.get("pattern")
        if not isinstance(content, str) or not isinstance(pattern, dict):
            raise self.fail(field, "expected a pattern and a content")
        size = len(content.encode("utf-8", "replace"))
        if isinstance(pattern.get("String"), str) and pattern["String"]:
            return max(1.0, size / len(pattern["String"].encode("utf-8", "replace")))
        # A regex may match a single byte, or nothing at all, at every position.
        return 1.0 + size

    def _check_charsmap(self, field: str, charsmap: Any) -> None:
        """A u32 size, a trie of that size, then the replacements, each ended by a zero byte."""
        try:
            blob = base64.b64decode(charsmap, validate=True) if isinstance(charsmap, str) else b""
        except binascii.Error:
            blob = b""
        trie_size = int.from_bytes(blob[:4], "little")
        if len(blob) < 4 or trie_size > len(blob) - 4:
            raise self.fail(f"{field}.precompiled_charsmap", "expected base64 of a trie and its replacements")
        if max(map(len, blob[4 + trie_size :].split(b"\0"))) > 256:
            raise self.fail(f"{field}.precompiled_charsmap", "expected replacements of at most 256 bytes")

    def _check_post_processor(self, component: Any) -> None:
        num_ids = 0
        for field, part in self._components("post_processor", component, depth=0):
            for key in ("single", "pair"):
                pieces = part.get(key)
                if pieces is None:
                    continue
                if not isinstance(pieces, list):
                    raise self.fail(f"{field}.{key}", f"expected a list, got {type(pieces).__name__}")
                tokens = part.get("special_tokens")
                for piece in pieces:
                    special = piece.get("SpecialToken") if isinstance(piece, dict) else None
                    name = special.get("id") if isinstance(special, dict) else None
                    entry = tokens.get(name) if isinstance(tokens, dict) and isinstance(name, str) else None
                    ids = entry.get("ids") if isinstance(entry, dict) else None
                    num_ids += len(ids) if isinstance(ids, list) else 1
                if num_ids > 2 * MAX_SPECIAL_IDS_PER_TEXT:
                    raise self.fail(f"{field}.{key}", f"expected at most {MAX_SPECIAL_IDS_PER_TEXT} ids, got more")

    def _check_regex(self, field: str, pattern: str) -> None:
        if len(pattern) > MAX_PATTERN_CHARS:
            raise self.fail(field, f"expected at most {MAX_PATTERN_CHARS} characters, got {len(pattern)}")
        if reason := find_backtracking(pattern):
            raise self.fail(field, f"expected a regex without {reason}, got {pattern!r:.80}")


def find_backtracking(pattern: str) -> str | None:
    """The construct of `pattern` that lets a match take exponential time, or None.

    Sees nested repetition, back references and recursion. It does not see polynomial time, nor ambiguous alternatives
    such as (a|a)*; for those the regex engine's own limit of retries per match holds.
    """
    # Per open group: whether something in it repeats. The last entry of `closed` tells it of the atom just read.
    groups = [False]
    atom_repeats = False
    index = 0
    while index < len(pattern):
        char = pattern[index]
        if char == "\\":
            following = pattern[index + 1 : index + 2]
            if following and following in "123456789kg":
                return "back references and recursion"
            index = _skip_escape(pattern, index)
            atom_repeats = False
        elif char == "[":
            index = _skip_class(pattern, index)
            atom_repeats = False
        elif char == "(":
            groups.append(False)
            index += 1
            if pattern.startswith("?", index):
                index += 1
            atom_repeats = False
        elif char == ")":
            atom_repeats = groups.pop() if len(groups) > 1 else False
            groups[-1] = groups[-1] or atom_repeats
            index += 1
        elif (quantifier := _quantifier(pattern, index)) is not None:
            end, unbounded = quantifier
            if unbounded:
                if atom_repeats:
                    return "a repetition inside a repetition"
                groups[-1] = atom_repeats = True
            # The marks of a lazy and of a possessive quantifier.
            index = end + 1 if char != "{" and pattern[end : end + 1] in ("?", "+") else end
        else:
            index += 1
            atom_repeats = False
    return None


def _skip_escape(pattern: str, index: int) -> int:
    if pattern[index + 1 : index + 2] in ("p", "P", "x") and pattern[index + 2 : index + 3] == "{":
        end = pattern.find("}", index)
        return len(pattern) if end < 0 else end + 1
    return index + 2


def _skip_class(pattern: str, index: int) -> int:
    depth = 0
    while index < len(pattern):
        if pattern[index] == "\\":
            index += 1
        elif pattern[index] == "[":
            depth += 1
        elif pattern[index] == "]":
            depth -= 1
            if depth == 0:
                return index + 1
        index += 1
    return index


def _quantifier(pattern: str, index: int) -> tuple[int, bool] | None:
    """(end, whether it repeats without a small bound) of the quantifier at `index`."""
    char = pattern[index]
    if char in "*+?":
        return index + 1, char != "?"
    if char != "{" or (end := pattern.find("}", index)) < 0:
        return None
    low, comma, high = pattern[index + 1 : end].partition(",")
    if not (low + high).isdecimal():
        return None
    bound = high if comma else low
    return end + 1, not bound or len(bound) > 2 or int(bound) > 16
