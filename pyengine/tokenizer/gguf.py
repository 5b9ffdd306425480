"""The tokenizer of a GGUF file as the description that a tokenizer.json holds.

Kind "gpt2", byte-level BPE, with the pre-tokenizers that are written down here. The expressions are those of the models
that the names stand for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from pyengine.errors import ModelFileError
from pyengine.jsonfile import file_error
from pyengine.tokenizer.checks import MAX_TOKENS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Types of a token in `tokenizer.ggml.token_type`."""

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# What llama.cpp splits by where a file names no pre-tokenizer of its own; four expressions, each applied to what the
# one before it left.
_DEFAULT_PATTERNS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


def _splits(*patterns: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*parts, _BYTE_LEVEL | {"use_regex": False}]}


PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTE_LEVEL | {"use_regex": True},
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL | {"use_regex": True}],
    },
    "default": _splits(*_DEFAULT_PATTERNS),
    "llama-bpe": _splits(_LLAMA3_PATTERN),
    "qwen2": _splits(_QWEN2_PATTERN),
}

# What the names imply besides the split of a text.
NORMALIZERS: dict[str, dict[str, Any]] = {"qwen2": {"type": "NFC"}}
IGNORE_MERGES = frozenset({"llama-bpe"})


class GgufTokenizerReader:
    """`metadata` is that of the GGUF file at `path`; arrays are lists, those of numbers may be numpy arrays."""

    def __init__(self, metadata: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
        self.metadata = metadata
        self.path = path

    def description(self) -> dict[str, Any]:
        """The object of an equivalent tokenizer.json. Raises ModelFileError with the key."""
        if (model := self._get("model")) != "gpt2":
            raise self._fail("model", f"expected 'gpt2', got {model!r:.60}")
        pre = self._get("pre")
        if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
            raise self._fail("pre", f"expected one of {sorted(PRE_TOKENIZERS)}, got {pre!r:.60}")
        if self._get_bool("add_space_prefix", False):
            raise self._fail("add_space_prefix", "expected false for a tokenizer of kind gpt2, got true")
        tokens = self._tokens
        vocab = {token: index for index, token in enumerate(tokens)}
        if len(vocab) != len(tokens):
            raise self._fail("tokens", f"expected every token once, got {len(tokens) - len(vocab)} repeated")
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added_tokens(tokens),
            "normalizer": NORMALIZERS.get(pre),
            "pre_tokenizer": PRE_TOKENIZERS[pre],
            "post_processor": self._post_processor(tokens, add_bos=pre == "llama-bpe"),
            "decoder": _BYTE_LEVEL | {"use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": pre in IGNORE_MERGES,
                "vocab": vocab,
                "merges": self._merges(vocab),
            },
        }

    def special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, `unk_token` and `pad_token`, those that the file names."""
        tokens = self._tokens
        names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        ids = {names[key]: self._token_id(f"{key}_token_id", tokens) for key in names}
        return {f"{name}_token": tokens[token_id] for name, token_id in ids.items() if token_id is not None}

    @cached_property
    def _tokens(self) -> list[str]:
        tokens = self._get("tokens")
        if not isinstance(tokens, list) or not 1 <= len(tokens) <= MAX_TOKENS:
            raise self._fail("tokens", f"expected a list of 1 to {MAX_TOKENS} tokens")
        if not all(isinstance(token, str) for token in tokens):
            raise self._fail("tokens", "expected strings")
        try:
            "".join(tokens).encode("utf-8")
        except UnicodeEncodeError as error:
            raise self._fail("tokens", "expected UTF-8, which a byte-level vocabulary is written in") from error
        return tokens

    def _added_tokens(self, tokens: list[str]) -> list[dict[str, Any]]:
        types = self._get("token_type")
        if types is None:
            return []
        if isinstance(types, np.ndarray):
            types = types.tolist()
        if not isinstance(types, list) or len(types) != len(tokens):
            raise self._fail("token_type", f"expected {len(tokens)} types, one for each token")
        if unknown := next((kind for kind in types if type(kind) is not int or not 1 <= kind <= 6), None):
            raise self._fail("token_type", f"expected types from 1 to 6, got {unknown!r:.40}")
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": index, "content": token, **flags, "special": kind != USER_DEFINED}
            for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, USER_DEFINED, UNKNOWN)
        ]

    def _merges(self, vocab: dict[str, int]) -> list[list[str]]:
        merges = self._get("merges")
        if not isinstance(merges, list) or len(merges) > MAX_TOKENS:
            raise self._fail("merges", f"expected a list of at most {MAX_TOKENS} merges")
        # Whole-set checks: a loop over every merge would be most of the time that a small model takes to load.
        if set(map(type, merges)) <= {str}:
            pairs: list[list[str]] = [merge.split(" ") for merge in merges]
            if set(map(len, pairs)) <= {2}:
                used = {"".join(pair) for pair in pairs}.union(*pairs)
                if "" not in used and used <= vocab.keys():
                    return pairs
        raise self._bad_merge(merges, vocab)

    def _bad_merge(self, merges: list[Any], vocab: dict[str, int]) -> ModelFileError:
        """The error of the first merge that is not two tokens whose sum is a token."""
        for index, merge in enumerate(merges):
            pair = merge.split(" ") if isinstance(merge, str) else []
            if len(pair) != 2 or "" in pair:
                return self._fail(f"merges[{index}]", f"expected two tokens and a space between, got {merge!r:.60}")
            if missing := [token for token in (*pair, "".join(pair)) if token not in vocab]:
                return self._fail(f"merges[{index}]", f"expected tokens of the vocabulary, got {missing[0]!r:.60}")
        raise AssertionError("every merge is good")

    def _post_processor(self, tokens: list[str], *, add_bos: bool) -> dict[str, Any] | None:
        pieces: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
        special: dict[str, Any] = {}
        for name, default in (("bos", add_bos), ("eos", False)):
            if not self._get_bool(f"add_{name}_token", default):
                continue
            token_id = self._token_id(f"{name}_token_id", tokens)
            if token_id is None:
                raise self._fail(
                    f"{name}_token_id", f"expected an id, because every text gets a {name} token, got none"
                )
            token = tokens[token_id]
            special[token] = {"id": token, "ids": [token_id], "tokens": [token]}
            pieces.insert(0 if name == "bos" else len(pieces), {"SpecialToken": {"id": token, "type_id": 0}})
        if not special:
            return None
        pair = [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]
        return {"type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": special}

    def _token_id(self, key: str, tokens: list[str]) -> int | None:
        value = self._get(key)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(tokens):
            raise self._fail(key, f"expected an id in [0, {len(tokens)}), got {value!r:.40}")
        return value

    def _get_bool(self, key: str, default: bool) -> bool:
        value = self._get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self._fail(key, f"expected a bool, got {value!r:.40}")
        return value

    def _get(self, key: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def _fail(self, key: str, message: str) -> ModelFileError:
        return file_error(self.path, message, field=f"tokenizer.ggml.{key}")
