"""Tokenizers written as GGUF metadata: read back, they give the ids of the tokenizer.json they came from."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.errors import BackendUnavailable, ModelFileError
from pyengine.testing.tiny import CHATML_TEMPLATE, write_tiny_tokenizer
from pyengine.tokenizer import Tokenizer
from pyengine.tokenizer.gguf import PRE_TOKENIZERS
from pyengine.tokenizer.gguf_writer import gguf_tokenizer_metadata

SPECIALS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
TEXTS = [
    "",
    "  two  spaces ",
    "don't we'll I'M 1234567 3.14",
    "naïve café, e\u0301 文字 😀",
    "a<|im_start|>b<|im_end|>\r\n\n x",
    "STOP!!!\n\n ^^^ $5 ²½",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(path)
    return path


@pytest.fixture
def description(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return result


def read_back(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(metadata)


def check_same(description: dict[str, Any], metadata: dict[str, Any]) -> None:
    expected, got = Tokenizer(description), read_back(metadata)
    for text in TEXTS:
        for add in (True, False):
            ids = expected.encode(text, add_special_tokens=add)
            assert got.encode(text, add_special_tokens=add) == ids, text
        for skip in (True, False):
            assert got.decode(ids, skip_special_tokens=skip) == expected.decode(ids, skip_special_tokens=skip)
    assert got.special_ids == expected.special_ids


def test_a_real_vocabulary_survives(smollm2_metadata: dict[str, Any], tmp_path: Path) -> None:
    """GGUF -> tokenizer.json -> GGUF: the file's own keys are the oracle."""
    Tokenizer.from_gguf(smollm2_metadata).save(tmp_path)
    metadata = gguf_tokenizer_metadata(tmp_path, smollm2_metadata["tokenizer.chat_template"])
    original = {key: value for key, value in smollm2_metadata.items() if key.startswith("tokenizer.")}
    original["tokenizer.ggml.token_type"] = original["tokenizer.ggml.token_type"].tolist()
    assert metadata == original | {"tokenizer.ggml.add_eos_token": False}


def test_ids_of_a_folder(folder: Path, description: dict[str, Any]) -> None:
    metadata = gguf_tokenizer_metadata(folder, CHATML_TEMPLATE)
    check_same(description, metadata)
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert metadata["tokenizer.chat_template"] == CHATML_TEMPLATE
    assert read_back(metadata).special_tokens == Tokenizer.from_folder(folder).special_tokens
    assert "tokenizer.chat_template" not in gguf_tokenizer_metadata(folder)


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Tokenizer, Tokenizer]:
    return Tokenizer.from_folder(folder), read_back(gguf_tokenizer_metadata(folder))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_ids_of_any_text(pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    expected, got = pair
    assert got.encode(text) == expected.encode(text)


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_known_pre_tokenizer(description: dict[str, Any], pre: str) -> None:
    description["pre_tokenizer"] = copy.deepcopy(PRE_TOKENIZERS[pre])
    description["model"]["ignore_merges"] = pre == "llama-bpe"
    description["normalizer"] = {"type": "NFC"} if pre == "qwen2" else None
    metadata = gguf_tokenizer_metadata(description)
    assert metadata["tokenizer.ggml.pre"] == pre
    check_same(description, metadata)


def test_spellings_of_one_pre_tokenizer(description: dict[str, Any]) -> None:
    """Nested sequences, a default left out, and what bears on offsets only."""
    digits, byte_level = description["pre_tokenizer"]["pretokenizers"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": not byte_level["trim_offsets"]}
    nested = {"type": "Sequence", "pretokenizers": [byte_level]}
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, nested]}
    metadata = gguf_tokenizer_metadata(description)
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    check_same(description, metadata)


def template(*names: str) -> dict[str, Any]:
    ids = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}} if name == "A" else {"SpecialToken": {"id": name, "type_id": 0}}
        for name in names
    ]
    special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names if name != "A"}
    pair = [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": special}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


@pytest.mark.parametrize(
    ("post_processor", "flags"),
    [
        (None, (False, False)),
        (BYTE_LEVEL, (False, False)),
        (template("A"), (False, False)),
        (template("<|im_start|>", "A"), (True, False)),
        (template("A", "<|im_end|>"), (False, True)),
        (template("<|im_start|>", "A", "<|im_end|>"), (True, True)),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, template("<|im_start|>", "A")]}, (True, False)),
    ],
)
def test_tokens_around_a_text(description: dict[str, Any], post_processor: Any, flags: tuple[bool, bool]) -> None:
    description["post_processor"] = post_processor
    metadata = gguf_tokenizer_metadata(description, special_tokens=SPECIALS)
    assert (metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"]) == flags
    check_same(description, metadata)


def test_user_defined_and_late_tokens(description: dict[str, Any]) -> None:
    entry = description["added_tokens"][0]
    first = len(description["model"]["vocab"])
    description["added_tokens"] += [
        entry | {"id": first, "content": "<tool>", "special": False},
        entry | {"id": first + 1, "content": "<think>", "special": True},
    ]
    metadata = gguf_tokenizer_metadata(description, vocab_size=first + 4)
    assert metadata["tokenizer.ggml.token_type"][-4:] == [4, 3, 5, 5]
    assert metadata["tokenizer.ggml.tokens"][-3:] == ["<think>", f"[PAD{first + 2}]", f"[PAD{first + 3}]"]
    check_same(description, metadata)
    assert read_back(metadata).encode("a<tool>b<think>c")[1::2] == [first, first + 1]
    assert read_back(metadata).decode([first, first + 1]) == "<tool>"


def test_merges_in_the_older_form(description: dict[str, Any]) -> None:
    expected = gguf_tokenizer_metadata(description)
    description["model"]["merges"] = [" ".join(pair) for pair in description["model"]["merges"]]
    assert gguf_tokenizer_metadata(description) == expected


def test_unknown_token_without_effect(description: dict[str, Any]) -> None:
    """All bytes are tokens, so none is unknown."""
    description["model"]["unk_token"] = "<|endoftext|>"
    check_same(description, gguf_tokenizer_metadata(description))


def without_a_byte(description: dict[str, Any]) -> dict[str, Any]:
    """One byte that no merge needs loses its token."""
    vocab = description["model"]["vocab"]
    merged = {char for pair in description["model"]["merges"] for char in "".join(pair)}
    lost = next(token for token in vocab if len(token) == 1 and token not in merged)
    vocab["[lost]"] = vocab.pop(lost)
    return description


def changed(description: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *parents, last = path.split(".")
    place = description
    for parent in parents:
        place = place[int(parent)] if isinstance(place, list) else place[parent]
    place[last] = value
    return description


PREFIX_SPACE = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
PLAIN_GPT2 = PRE_TOKENIZERS["gpt-2"]


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        ("pre_tokenizer", None, "pre_tokenizer: .*'llama-bpe'.* got None"),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer: .*Whitespace"),
        ("pre_tokenizer", PREFIX_SPACE, "pre_tokenizer: .*'add_prefix_space': True"),
        ("pre_tokenizer.pretokenizers", [{"type": "Digits", "individual_digits": False}, PLAIN_GPT2], "pre_tokenizer"),
        ("pre_tokenizer", PRE_TOKENIZERS["llama-bpe"], "ignore_merges: .*True beside the pre-tokenizer llama-bpe"),
        ("pre_tokenizer", PRE_TOKENIZERS["qwen2"], "normalizer: .*NFC.* got None"),
        ("model.ignore_merges", True, "ignore_merges: .*False beside the pre-tokenizer smollm, got True"),
        ("model.byte_fallback", True, "byte_fallback"),
        ("normalizer", {"type": "Lowercase"}, "normalizer: .*None beside smollm.*Lowercase"),
        ("decoder", None, "decoder: .*ByteLevel, got None"),
        ("decoder", {"type": "Fuse"}, "decoder: .*Fuse"),
        ("added_tokens.1.lstrip", True, "lstrip of '<|im_start|>'".replace("|", r"\|")),
        ("added_tokens.1.rstrip", True, "rstrip of"),
        ("added_tokens.1.single_word", True, "single_word of"),
        ("post_processor", template("<|endoftext|>", "A"), "post_processor: .*bos token, id 1.*<.endoftext.>"),
        ("post_processor", template("A", "<|im_start|>"), "post_processor: .*eos token, id 2"),
        ("post_processor", template("<|im_start|>", "<|im_start|>", "A"), "post_processor: .*a template of bos"),
        ("post_processor", template("A", "<|im_end|>", "<|im_end|>"), "post_processor: .*a template of bos"),
        ("post_processor", template("A", "A"), "post_processor: .*a template of bos"),
    ],
)
def test_what_a_gguf_file_cannot_say(description: dict[str, Any], path: str, value: Any, match: str) -> None:
    gguf_tokenizer_metadata(copy.deepcopy(description), special_tokens=SPECIALS)
    with pytest.raises(BackendUnavailable, match=match):
        gguf_tokenizer_metadata(changed(description, path, copy.deepcopy(value)), special_tokens=SPECIALS)


def test_unknown_token_for_a_missing_byte(description: dict[str, Any]) -> None:
    description = without_a_byte(description)
    gguf_tokenizer_metadata(description)
    description["model"]["unk_token"] = "<|endoftext|>"
    with pytest.raises(BackendUnavailable, match=r"unk_token: .*none, got '<.endoftext.>'"):
        gguf_tokenizer_metadata(description)


def test_a_normalised_token_beside_a_normalizer(description: dict[str, Any]) -> None:
    description |= {"pre_tokenizer": PRE_TOKENIZERS["qwen2"], "normalizer": {"type": "NFC"}}
    gguf_tokenizer_metadata(description)
    description["added_tokens"][2]["normalized"] = True
    with pytest.raises(BackendUnavailable, match=r"normalized of '<.im_end.>'"):
        gguf_tokenizer_metadata(description)


def test_other_kinds_of_model() -> None:
    description = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": PRE_TOKENIZERS["gpt-2"],
        "decoder": PRE_TOKENIZERS["gpt-2"],
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    }
    with pytest.raises(BackendUnavailable, match=r"model.type: .*'BPE', got 'WordLevel'"):
        gguf_tokenizer_metadata(description)


def test_broken_descriptions(folder: Path, description: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"tokenizer.json"):
        gguf_tokenizer_metadata(tmp_path)
    with pytest.raises(ModelFileError, match="model"):
        gguf_tokenizer_metadata({})
    with pytest.raises(ModelFileError, match=r"bos_token.*expected a token of the vocabulary, got '<s>'"):
        gguf_tokenizer_metadata(description, special_tokens={"bos_token": "<s>"})
    num_tokens = len(description["model"]["vocab"])
    with pytest.raises(ModelFileError, match=f"at most {num_tokens - 1} ids.* got {num_tokens}"):
        gguf_tokenizer_metadata(folder, vocab_size=num_tokens - 1)


def test_an_unused_id_whose_name_is_taken(description: dict[str, Any]) -> None:
    num_tokens = len(description["model"]["vocab"])
    entry = description["added_tokens"][0]
    description["added_tokens"].append(entry | {"id": num_tokens, "content": f"[PAD{num_tokens + 1}]"})
    with pytest.raises(ModelFileError, match=rf"'\[PAD{num_tokens + 1}\]' to be free"):
        gguf_tokenizer_metadata(description, vocab_size=num_tokens + 2)


def test_shuffled_vocabulary(description: dict[str, Any]) -> None:
    """The order of the object does not matter, the ids do."""
    expected = gguf_tokenizer_metadata(description)
    items = list(description["model"]["vocab"].items())
    random.Random(0).shuffle(items)
    description["model"]["vocab"] = dict(items)
    assert gguf_tokenizer_metadata(description) == expected
