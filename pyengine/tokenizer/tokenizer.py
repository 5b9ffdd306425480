"""`Tokenizer`: text <-> token ids, from a tokenizer.json, a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from pyengine.errors import ArgumentError, CapacityError
from pyengine.jsonfile import file_error, parse_json_object, read_bounded, read_json_object
from pyengine.tokenizer.checks import DescriptionCheck
from pyengine.tokenizer.gguf import GgufTokenizerReader
from pyengine.tokenizer.guard import typed_errors

MAX_TOKENIZER_BYTES = 128 << 20
MAX_TOKENIZER_CONFIG_BYTES = 16 << 20
MAX_INPUT_BYTES = 8 << 20

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Immutable. Every failure of the library underneath, panics included, is a typed error.

    `description` is the object of a tokenizer.json; `special_tokens` maps names such as "eos_token" to token strings;
    `path` is named in errors. Truncation and padding that the description asks for are off: they lose text in silence.
    """

    def __init__(
        self,
        description: dict[str, Any],
        *,
        special_tokens: Mapping[str, str] | None = None,
        path: str | os.PathLike[str] = "tokenizer.json",
        max_input_bytes: int = MAX_INPUT_BYTES,
    ) -> None:
        self._vocab_size = DescriptionCheck(path).check(description)
        self.path = path
        self.special_tokens: dict[str, str] = dict(special_tokens or {})
        self.max_input_bytes = max_input_bytes
        self.decoder: dict[str, Any] = description.get("decoder") or {}
        with typed_errors(lambda reason: file_error(path, reason)):
            text = json.dumps(description, ensure_ascii=False)
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(index for index, token in self._added.items() if token.special)
        for entry in description.get("added_tokens") or []:
            if self.token_to_id(entry["content"]) != entry["id"]:
                raise file_error(
                    path,
                    f"expected the id {self.token_to_id(entry['content'])}, which is the next free one, for "
                    f"{entry['content']!r:.60}, got {entry['id']}",
                    field="added_tokens",
                )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """From a tokenizer.json of at most 128 MiB."""
        return cls(parse_json_object(read_bounded(path, max_bytes=MAX_TOKENIZER_BYTES), path), path=path)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """From tokenizer.json in `folder`, and the special tokens that the files beside it name."""
        path = Path(folder) / "tokenizer.json"
        description = parse_json_object(read_bounded(path, max_bytes=MAX_TOKENIZER_BYTES), path)
        return cls(description, special_tokens=read_special_tokens(folder), path=path)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, path: str | os.PathLike[str] = "model.gguf") -> Tokenizer:
        """From the metadata of a GGUF file; its byte-level BPE kind ("gpt2") only."""
        reader = GgufTokenizerReader(metadata, path)
        return cls(reader.description(), special_tokens=reader.special_tokens(), path=path)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._vocab_size

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out."""
        return self._special_ids

    def token_to_id(self, token: str) -> int | None:
        """None where there is no such token."""
        with typed_errors(lambda reason: ArgumentError(f"token: {reason}")):
            return self._tokenizer.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it; None where there is no such id."""
        with typed_errors(lambda reason: ArgumentError(f"token_id: expected a 32-bit id, got {token_id!r:.40}")):
            return self._tokenizer.id_to_token(token_id)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. `add_special_tokens` adds what the model wants around every text, such as a bos token.

        Raises ArgumentError for lone surrogates, CapacityError for a text over `max_input_bytes` or more than 16 ids
        per byte and 65,536 above.
        """
        return self._encode(text, add_special_tokens).ids

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, and for every id where its characters begin and end in `text`."""
        encoding = self._encode(text, add_special_tokens)
        return encoding.ids, encoding.offsets

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of every text."""
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. An id without a token gives no text; bytes that are not UTF-8 give U+FFFD."""
        with typed_errors(lambda reason: ArgumentError(f"ids: expected token ids, got: {reason}")):
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def to_json(self) -> str:
        """The tokenizer.json."""
        with typed_errors(lambda reason: ArgumentError(f"tokenizer: {reason}")):
            text: str = self._tokenizer.to_str()
        return text

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `from_folder` and transformers read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        _replace_file(folder / "tokenizer.json", self._tokenizer.to_str(pretty=True))
        _replace_file(folder / "tokenizer_config.json", json.dumps(config | self.special_tokens, indent=2) + "\n")

    def _encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        num_bytes = self._check_text(text)
        with typed_errors(
            lambda reason: ArgumentError(f"text: expected text that the tokenizer can split, got: {reason}")
        ):
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if len(encoding) > 16 * num_bytes + 65536:
            raise CapacityError(f"text: expected at most 16 ids per byte and 65,536 above, got {len(encoding)} ids")
        return encoding

    def _check_text(self, text: str) -> int:
        if not isinstance(text, str):
            raise ArgumentError(f"text: expected a str, got {type(text).__name__}")
        # The bound on characters comes first: encoding a huge text would itself be the cost.
        if len(text) <= self.max_input_bytes:
            try:
                num_bytes = len(text.encode("utf-8"))
            except UnicodeEncodeError as error:
                raise ArgumentError(f"text: expected Unicode, got a lone surrogate at {error.start}") from error
            if num_bytes <= self.max_input_bytes:
                return num_bytes
        raise CapacityError(f"text: expected at most {self.max_input_bytes} bytes, got more")


def read_special_tokens(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Name -> token string from tokenizer_config.json, then special_tokens_map.json (the older place) in `folder`."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = Path(folder) / name
        if not path.exists():
            continue
        config = read_json_object(path, max_bytes=MAX_TOKENIZER_CONFIG_BYTES)
        for key in _SPECIAL_NAMES:
            value = config.get(key)
            if isinstance(value, dict):
                value = value.get("content")
            if value is None:
                continue
            if not isinstance(value, str):
                raise file_error(path, f"expected a token, got {type(value).__name__}", field=key)
            found[key] = value
    return found


def _replace_file(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
