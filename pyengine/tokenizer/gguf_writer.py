"""A tokenizer.json as the metadata of a GGUF file: the inverse of `pyengine.tokenizer.gguf`.

A GGUF file names a pre-tokenizer where a tokenizer.json spells it out, so only those that have a name can be written.
Whatever the file could not say is refused: what is written encodes every text to the same ids.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from pyengine.errors import BackendUnavailable, ModelFileError
from pyengine.jsonfile import file_error, parse_json_object, read_bounded
from pyengine.tokenizer.gguf import (
    CONTROL,
    IGNORE_MERGES,
    NORMAL,
    NORMALIZERS,
    PRE_TOKENIZERS,
    UNUSED,
    USER_DEFINED,
)
from pyengine.tokenizer.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer, read_special_tokens

_SPECIAL_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def gguf_tokenizer_metadata(
    source: str | os.PathLike[str] | Mapping[str, Any],
    chat_template: str | None = None,
    *,
    special_tokens: Mapping[str, str] | None = None,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """The `tokenizer.*` keys of a GGUF file for a byte-level BPE.

    Args:
        source: a folder with tokenizer.json, or the object of a tokenizer.json.
        chat_template: Jinja source, or None.
        special_tokens: "bos_token" and the like -> token; None takes what the files of the folder name.
        vocab_size: rows of the model's embedding. Ids without a token, up to it, become unused tokens "[PAD<id>]".

    Raises:
        ModelFileError: a broken tokenizer.json, or more ids than `vocab_size`.
        BackendUnavailable: a tokenizer that a GGUF file cannot describe; the text says which part of it.
    """
    if isinstance(source, Mapping):
        path, description = "tokenizer.json", dict(source)
    else:
        path = str(Path(source) / "tokenizer.json")
        description = parse_json_object(read_bounded(path, max_bytes=MAX_TOKENIZER_BYTES), path)
        special_tokens = read_special_tokens(source) if special_tokens is None else special_tokens
    Tokenizer(description, path=path)  # Refuses whatever is no tokenizer.
    return _Writer(path, description, special_tokens or {}, vocab_size).metadata(chat_template)


class _Writer:
    """`description` is one that `Tokenizer` takes."""

    def __init__(
        self, path: str, description: dict[str, Any], special_tokens: Mapping[str, str], vocab_size: int | None
    ) -> None:
        self.path = path
        self.description = description
        self.model: dict[str, Any] = description["model"]
        self.added: list[dict[str, Any]] = description.get("added_tokens") or []
        self.special_tokens = special_tokens
        self.vocab_size = vocab_size

    def metadata(self, chat_template: str | None) -> dict[str, Any]:
        pre = self._pre_tokenizer()
        self._check_model(pre)
        self._check_stages(pre)
        self._check_added_tokens()
        tokens, types = self._tokens()
        ids = {
            key: self._special_id(name, tokens) for name, key in _SPECIAL_KEYS.items() if name in self.special_tokens
        }
        add_bos, add_eos = self._template(ids)
        metadata: dict[str, Any] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": self._merges(),
            **{f"tokenizer.ggml.{key}_token_id": token_id for key, token_id in ids.items()},
            "tokenizer.ggml.add_space_prefix": False,
            "tokenizer.ggml.add_bos_token": add_bos,
            "tokenizer.ggml.add_eos_token": add_eos,
        }
        if chat_template is not None:
            metadata["tokenizer.chat_template"] = chat_template
        return metadata

    def _pre_tokenizer(self) -> str:
        found = _canonical(self.description.get("pre_tokenizer"))
        for name, known in PRE_TOKENIZERS.items():
            if found == _canonical(known):
                return name
        raise self._refuse("pre_tokenizer", f"one of {sorted(PRE_TOKENIZERS)}", self.description.get("pre_tokenizer"))

    def _check_model(self, pre: str) -> None:
        if self.model.get("type", "BPE") != "BPE":
            raise self._refuse("model.type", "'BPE'", self.model["type"])
        # Where every byte has a token, none is unknown.
        has_every_byte = self.model["vocab"].keys() >= set(pre_tokenizers.ByteLevel.alphabet())
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
            if self.model.get(key) and not (key == "unk_token" and has_every_byte):
                raise self._refuse(f"model.{key}", "none", self.model[key])
        for key, expected in (("byte_fallback", False), ("ignore_merges", pre in IGNORE_MERGES)):
            if bool(self.model.get(key)) != expected:
                raise self._refuse(f"model.{key}", f"{expected} beside the pre-tokenizer {pre}", self.model.get(key))

    def _check_stages(self, pre: str) -> None:
        normalizer = NORMALIZERS.get(pre)
        if _canonical(self.description.get("normalizer")) != _canonical(normalizer):
            raise self._refuse("normalizer", f"{normalizer} beside {pre}", self.description.get("normalizer"))
        decoder = _canonical(self.description.get("decoder"))
        if [part.get("type") for part in decoder] != ["ByteLevel"]:
            raise self._refuse("decoder", "ByteLevel", self.description.get("decoder"))

    def _check_added_tokens(self) -> None:
        # A normalised token is looked for in the normalised text, which is the text where nothing normalises.
        flags = ["single_word", "lstrip", "rstrip"] + (["normalized"] if self.description.get("normalizer") else [])
        for entry in self.added:
            for flag in flags:
                if entry.get(flag):
                    raise self._refuse(f"added_tokens: {flag} of {entry['content']!r:.60}", "False", entry[flag])

    def _tokens(self) -> tuple[list[str], list[int]]:
        """Token and type of every id."""
        found = {token_id: (token, NORMAL) for token, token_id in self.model["vocab"].items()}
        for entry in self.added:
            found[entry["id"]] = (entry["content"], CONTROL if entry.get("special") else USER_DEFINED)
        needed = max(found) + 1
        if self.vocab_size is not None and needed > self.vocab_size:
            message = f"expected at most {self.vocab_size} ids, one per row of the embedding, got {needed}"
            raise self._fail("model.vocab", message)
        taken = {token for token, _ in found.values()}
        for token_id in range(self.vocab_size or needed):
            if token_id not in found:
                if (name := f"[PAD{token_id}]") in taken:
                    raise self._fail("model.vocab", f"expected {name!r} to be free for an unused id, got it taken")
                found[token_id] = (name, UNUSED)
        ordered = [found[token_id] for token_id in range(len(found))]
        return [token for token, _ in ordered], [kind for _, kind in ordered]

    def _merges(self) -> list[str]:
        merges = []
        for index, merge in enumerate(self.model.get("merges") or []):
            pair = merge.split(" ") if isinstance(merge, str) else merge
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) and p for p in pair)):
                raise self._fail(f"model.merges[{index}]", f"expected two tokens, got {merge!r:.60}")
            if any(" " in part for part in pair):
                raise self._refuse(f"model.merges[{index}]", "tokens without a space", merge)
            merges.append(" ".join(pair))
        return merges

    def _special_id(self, name: str, tokens: list[str]) -> int:
        token = self.special_tokens[name]
        if token not in tokens:
            raise self._fail(name, f"expected a token of the vocabulary, got {token!r:.60}")
        return tokens.index(token)

    def _template(self, ids: dict[str, int]) -> tuple[bool, bool]:
        """Whether every text begins with bos and ends with eos."""
        found = self.description.get("post_processor")
        parts = [part for part in _parts(found) if part.get("type") != "ByteLevel"]
        if not parts:
            return False, False
        template = parts[0]
        pieces = template.get("single")
        if len(parts) > 1 or template.get("type") != "TemplateProcessing" or not isinstance(pieces, list):
            raise self._refuse("post_processor", "a template of bos, text and eos", found)
        names = [next(iter(piece)) for piece in pieces]
        text = names.index("Sequence") if names.count("Sequence") == 1 else len(names)
        if text > 1 or len(names) > text + 2:
            raise self._refuse("post_processor", "a template of bos, text and eos", found)
        for index, key in ((text - 1, "bos"), (text + 1, "eos")):
            if 0 <= index < len(names):
                token = pieces[index]["SpecialToken"]["id"]
                added = template["special_tokens"][token]["ids"]
                if added != [ids.get(key)]:
                    raise self._refuse("post_processor", f"the {key} token, id {ids.get(key)}, beside the text", token)
        return text == 1, len(names) == text + 2

    def _fail(self, field: str, message: str) -> ModelFileError:
        return file_error(self.path, message, field=field)

    def _refuse(self, field: str, expected: str, got: Any) -> BackendUnavailable:
        return BackendUnavailable(f"{self.path}: {field}: a GGUF file can say {expected}, got {got!r:.400}")


def _parts(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The components of a stage in order; sequences, also nested ones, are taken apart."""
    if component is None:
        return []
    for key in ("normalizers", "pretokenizers", "decoders", "processors"):
        if key in component:
            return [leaf for part in component[key] for leaf in _parts(part)]
    return [component]


def _canonical(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """`_parts` with defaults filled in, without what bears on offsets only: equal lists give equal ids."""
    result = []
    for part in _parts(component):
        if part.get("type") == "ByteLevel":
            part = {"use_regex": True} | {key: value for key, value in part.items() if key != "trim_offsets"}
        result.append(part)
    return result
