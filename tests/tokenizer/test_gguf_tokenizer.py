"""The tokenizer of a real GGUF file against the one that transformers builds from the same file."""

from __future__ import annotations

import argparse
import inspect
import json
import random
import unicodedata
import unittest.mock
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.errors import ModelFileError
from pyengine.tokenizer import Tokenizer
from pyengine.tokenizer.gguf import GgufTokenizerReader
from pyengine.tokenizer.stream import token_bytes

# SmolLM2's vocabulary has no token for these bytes, so characters that need them are lost, here as in transformers.
MISSING_BYTES = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}

HARD_TEXTS = [
    "",
    " ",
    "  leading and trailing  ",
    "\n\n\r\n\t tabs \u00a0 nbsp \u3000 ideographic",
    "e\u0301 combining, \u00e9 composed, \u1e69 \u0073\u0323\u0307",
    "family 👨‍👩‍👧‍👦 flag 🇩🇪 skin 👍🏽",
    "עברית العربية हिन्दी ไทย 日本語 한국어 中文",
    "\u200b\u200d\ufeff zero width",
    "\x00\x01\x7f\x80 controls",
    "\U0010ffff \ud7ff \ue000 edges",
    "don't we'll I'M 'tis it''s",
    "3.14159 1234567890 ٣٤٥ ² ½ Ⅻ",
    "a" * 5000,
    "^" * 5000,
    " " * 5000,
    "😀" * 2000,
    "\u0301" * 2000,
]


@pytest.fixture(scope="module")
def tokenizer(smollm2_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_metadata)


@pytest.fixture(scope="module")
def oracle(smollm2_transformers: Any) -> Any:
    return smollm2_transformers


def real_texts() -> list[str]:
    """Documentation and source lines of the standard library."""
    modules = [inspect, random, unittest.mock, argparse]
    lines = [line for module in modules for line in inspect.getsource(module).splitlines() if line.strip()]
    return [" ".join(lines[i : i + 3]) for i in range(0, 3000, 3)]


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    ranges = [
        (32, 126),
        (9, 13),
        (48, 57),
        (0xA0, 0x24F),
        (0x300, 0x36F),
        (0x400, 0x4FF),
        (0x660, 0x669),
        (0x900, 0x97F),
    ]
    ranges += [(0x2000, 0x206F), (0x2150, 0x218F), (0x3040, 0x30FF), (0x4E00, 0x4FFF), (0x1F300, 0x1F6FF)]
    texts = []
    for _ in range(count):
        pool = [*rng.sample(ranges, 3), (32, 126), (32, 32)]
        texts.append("".join(chr(rng.randint(*rng.choice(pool))) for _ in range(rng.randint(1, 60))))
    return texts


@pytest.mark.slow
def test_ids_are_those_of_transformers(tokenizer: Tokenizer, oracle: Any) -> None:
    texts = HARD_TEXTS + real_texts() + random_texts(1000, seed=1)
    texts += [f"<|im_start|>user\n{text}<|im_end|>" for text in texts[::10]]
    assert len(texts) > 2000
    expected = oracle(texts, add_special_tokens=True)["input_ids"]
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text) == ids, text


def test_merges_are_those_of_transformers(smollm2_metadata: dict[str, Any], oracle: Any) -> None:
    expected = json.loads(oracle.backend_tokenizer.to_str())["model"]["merges"]
    merges = GgufTokenizerReader(smollm2_metadata, "model.gguf").description()["model"]["merges"]
    assert len(merges) == 48900
    assert merges == expected


def test_vocabulary_is_that_of_transformers(tokenizer: Tokenizer, oracle: Any) -> None:
    vocab = oracle.get_vocab()
    assert tokenizer.vocab_size == len(vocab) == 49152
    assert all(tokenizer.token_to_id(token) == token_id for token, token_id in vocab.items())
    assert all(tokenizer.id_to_token(token_id) == token for token, token_id in vocab.items())
    assert tokenizer.id_to_token(49152) is None
    assert tokenizer.token_to_id("no such token") is None


@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_bytes_without_a_token(tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.id_to_token(token_id) for token_id in range(tokenizer.vocab_size)]
    single = {token_bytes(token) for token in tokens if token is not None and len(token) == 1}
    assert {bytes([byte]) for byte in range(256)} - single == {bytes([byte]) for byte in MISSING_BYTES}


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80))
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    text = "".join(char for char in text if not set(char.encode()) & MISSING_BYTES)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=40), skip=st.booleans())
def test_decode_is_that_of_transformers(tokenizer: Tokenizer, oracle: Any, ids: list[int], skip: bool) -> None:
    assert tokenizer.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_every_digit_is_a_token(tokenizer: Tokenizer) -> None:
    for text in ("1234567890", "a1b22", " 42", "٣٤٥"):
        tokens = [tokenizer.decode([token_id]) for token_id in tokenizer.encode(text)]
        for token in tokens:
            assert sum(unicodedata.category(char) == "Nd" for char in token) <= 1
    assert len(tokenizer.encode("1234567890")) == 10


def test_specials_are_single_ids(tokenizer: Tokenizer, smollm2_metadata: dict[str, Any]) -> None:
    specials = smollm2_metadata["tokenizer.ggml.tokens"][:17]
    for index, token in enumerate(specials):
        assert tokenizer.encode(token) == [index]
        assert tokenizer.encode(f"a{token}b")[1:-1] == [index]
    assert tokenizer.special_ids == frozenset(range(17))
    assert tokenizer.decode([0, *tokenizer.encode("x"), 2]) == "x"
    assert tokenizer.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }


def test_save_and_load(tokenizer: Tokenizer, oracle: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    back = Tokenizer.from_folder(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert back.special_tokens == tokenizer.special_tokens
    assert (other.eos_token_id, other.bos_token_id, other.pad_token_id) == (2, 1, 2)
    for text in HARD_TEXTS + random_texts(100, seed=2):
        ids = tokenizer.encode(text)
        assert back.encode(text) == ids
        assert other.encode(text) == ids


TINY: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<s>", "</s>", "<tool>", "a", "b", "ab", "Ġ", "Ġa", "1", "2", "12"],
    "tokenizer.ggml.token_type": [3, 3, 4, 1, 1, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b", "Ġ a", "1 2"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"model": "llama"}, "model"),
        ({"model": None}, "model"),
        ({"pre": "mystery"}, "pre"),
        ({"pre": None}, "pre"),
        ({"pre": ["smollm"]}, "pre"),
        ({"tokens": "abc"}, "tokens"),
        ({"tokens": []}, "tokens"),
        ({"tokens": ["a", 1]}, "tokens"),
        ({"tokens": ["a"] * 11}, "tokens"),
        ({"tokens": ["a", "\udcff"]}, "tokens"),
        ({"token_type": np.ones(11)}, "token_type"),
        ({"token_type": np.ones((11, 1), np.int32)}, "token_type"),
        ({"token_type": [1]}, "token_type"),
        ({"token_type": [1.0] * 11}, "token_type"),
        ({"token_type": [7] * 11}, "token_type"),
        ({"merges": None}, "merges"),
        ({"merges": ["a b", "a z"]}, "merges[1]"),
        ({"merges": ["ab"]}, "merges[0]"),
        ({"merges": ["a b c"]}, "merges[0]"),
        ({"merges": [5]}, "merges[0]"),
        ({"merges": ["b a"]}, "merges[0]"),
        ({"bos_token_id": 11, "add_bos_token": True}, "bos_token_id"),
        ({"bos_token_id": -1, "add_bos_token": True}, "bos_token_id"),
        ({"bos_token_id": None, "add_bos_token": True}, "bos_token_id"),
        ({"add_bos_token": 1}, "add_bos_token"),
        ({"add_space_prefix": True}, "add_space_prefix"),
    ],
)
def test_hostile_metadata(extra: dict[str, Any], field: str) -> None:
    metadata = TINY | {f"tokenizer.ggml.{key}": value for key, value in extra.items()}
    with pytest.raises(ModelFileError) as caught:
        Tokenizer.from_gguf(metadata, path="tiny.gguf")
    assert caught.value.field == f"tokenizer.ggml.{field}"
    assert str(caught.value.path) == "tiny.gguf"


def test_bos_and_eos_flags() -> None:
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert Tokenizer.from_gguf(TINY).encode("ab") == [5]
    tokenizer = Tokenizer.from_gguf(TINY | flags)
    assert tokenizer.encode("ab") == [0, 5, 1]
    assert tokenizer.encode("ab", add_special_tokens=False) == [5]


def test_types_may_be_an_array() -> None:
    types = np.asarray(TINY["tokenizer.ggml.token_type"], np.int32)
    assert Tokenizer.from_gguf(TINY | {"tokenizer.ggml.token_type": types}).encode("a<tool>b<s>") == [3, 2, 4, 0]


def test_user_defined_tokens_are_kept_in_text() -> None:
    tokenizer = Tokenizer.from_gguf(TINY)
    assert tokenizer.encode("a<tool>b<s>") == [3, 2, 4, 0]
    assert tokenizer.decode([3, 2, 4, 0]) == "a<tool>b"


def test_llama_bpe_takes_whole_words_first_and_adds_bos() -> None:
    metadata = TINY | {
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*TINY["tokenizer.ggml.tokens"], "baab"],
        "tokenizer.ggml.token_type": [*TINY["tokenizer.ggml.token_type"], 1],
    }
    # No merge leads to "baab": only the rule "a piece that is a token stays whole" gives it.
    assert Tokenizer.from_gguf(metadata).encode("baab") == [0, 11]
    assert Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": "smollm"}).encode("baab") == [4, 3, 5]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["Ġ", "1", "2", "3", "4", "Ġdon", "'t", "ĠSTOP", "!!!", "ĊĊ"]),
        ("gpt-2", ["Ġ1234", "Ġdon", "'t", "ĠSTOP", "!!!", "ĊĊ"]),
        ("llama-bpe", ["Ġ", "123", "4", "Ġdon", "'t", "ĠSTOP", "!!!ĊĊ"]),
        ("qwen2", ["Ġ", "1", "2", "3", "4", "Ġdon", "'t", "ĠSTOP", "!!!ĊĊ"]),
        ("default", ["Ġ", "123", "4", "Ġdon", "'", "t", "ĠSTOP", "!!!", "ĊĊ"]),
    ],
)
def test_pre_tokenizers_split_as_their_models(pre: str, pieces: list[str]) -> None:
    description = GgufTokenizerReader(TINY | {"tokenizer.ggml.pre": pre}, "tiny.gguf").description()
    library = tokenizers.Tokenizer.from_str(json.dumps(description))
    got = [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str(" 1234 don't STOP!!!\n\n")]
    assert got == pieces
