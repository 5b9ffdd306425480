"""tokenizer.json files that mean harm, and texts that do."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.errors import ArgumentError, CapacityError, ModelFileError, PyEngineError
from pyengine.testing.tiny import write_tiny_tokenizer
from pyengine.tokenizer import Tokenizer
from pyengine.tokenizer.checks import find_backtracking
from pyengine.tokenizer.gguf import PRE_TOKENIZERS
from pyengine.tokenizer.guard import typed_errors

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    description: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    return description


def changed(good: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    description = copy.deepcopy(good)
    *parents, last = path.split("/")
    place: Any = description
    for key in parents:
        place = place[key]
    place[last] = value
    return description


def added(token_id: Any, content: Any = "<x>") -> list[dict[str, Any]]:
    return [{"id": token_id, "content": content, **FLAGS}]


def replace(content: str, pattern: dict[str, str]) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(replacement: bytes) -> str:
    return base64.b64encode((4).to_bytes(4, "little") + b"trie" + replacement + b"\0").decode()


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def special_pieces(count: int, ids: int) -> dict[str, Any]:
    pieces: list[Any] = [{"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": pieces + [{"SpecialToken": {"id": "x", "type_id": 0}}] * count,
        "pair": pieces,
        "special_tokens": {"x": {"id": "x", "ids": [1] * ids, "tokens": ["x"] * ids}},
    }


HOSTILE: list[tuple[str, Any, str | None]] = [
    ("model", None, "model"),
    ("model/vocab", None, "model.vocab"),
    ("model/vocab", {}, "model.vocab"),
    ("model/vocab", {"a": -1}, "model.vocab"),
    ("model/vocab", {"a": 1.5}, "model.vocab"),
    ("model/vocab", {"a": True}, "model.vocab"),
    ("model/vocab", {"a": 2**32 - 1}, "model.vocab"),
    ("model/vocab", {"a": 2**64}, "model.vocab"),
    ("model/vocab", {"a": 0, "b": 0}, "model.vocab"),
    ("model/vocab", {"a" * 5000: 0}, "model.vocab"),
    ("model/vocab", [["a", 0.0], "b"], "model.vocab"),
    ("model/merges", [["a", "no such token"]], None),
    ("model/merges", "a b", None),
    ("model/dropout", 0.1, "model.dropout"),
    ("model/type", "Mystery", None),
    ("model/continuing_subword_prefix", "####", None),
    ("added_tokens", added(2**32 - 1), "added_tokens[0].id"),
    ("added_tokens", added(2**31), "added_tokens[0].id"),
    ("added_tokens", added(-1), "added_tokens[0].id"),
    ("added_tokens", added(2**70), "added_tokens[0].id"),
    ("added_tokens", added("7"), "added_tokens[0].id"),
    ("added_tokens", added(None), "added_tokens[0].id"),
    ("added_tokens", added(7), "added_tokens[0].id"),
    ("added_tokens", added(7, "a"), "added_tokens[0].id"),
    ("added_tokens", added(390), "added_tokens"),
    ("added_tokens", added(384) + added(384), "added_tokens[1]"),
    ("added_tokens", added(384) + added(384, "<y>"), "added_tokens[1].id"),
    ("added_tokens", added(384, ""), "added_tokens[0]"),
    ("added_tokens", added(384, 5), "added_tokens[0]"),
    ("added_tokens", added(384, "x" * 5000), "added_tokens[0].id"),
    ("added_tokens", {"a": 1}, "added_tokens"),
    ("normalizer", "NFC", "normalizer"),
    ("normalizer", {"type": "Mystery"}, None),
    ("normalizer", replace("a" * 100, {"String": "a"}), "normalizer"),
    ("normalizer", replace("a" * 16, {"Regex": "."}), "normalizer"),
    (
        "normalizer",
        {"type": "Sequence", "normalizers": [replace("aaa", {"String": "a"})] * 3},
        "normalizer.normalizers[2]",
    ),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 65}, "normalizer.normalizers"),
    ("normalizer", {"type": "Sequence", "normalizers": 7}, "normalizer.normalizers"),
    ("normalizer", {"type": "Prepend", "prepend": "x" * 5000}, "normalizer"),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "!!"}, "normalizer.precompiled_charsmap"),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": None}, "normalizer.precompiled_charsmap"),
    (
        "normalizer",
        {"type": "Precompiled", "precompiled_charsmap": charsmap(b"x" * 300)},
        "normalizer.precompiled_charsmap",
    ),
    ("decoder", replace("a" * 100, {"String": "a"}), "decoder"),
    ("pre_tokenizer", split("(a+)+$"), "pre_tokenizer.pattern"),
    ("pre_tokenizer", split("a" * 5000), "pre_tokenizer.pattern"),
    ("pre_tokenizer", split("(a"), None),
    (
        "pre_tokenizer",
        {"type": "Sequence", "pretokenizers": [split("(a*)*b")]},
        "pre_tokenizer.pretokenizers[0].pattern",
    ),
    ("post_processor", special_pieces(1000, 1), "post_processor.single"),
    ("post_processor", special_pieces(1, 1000), "post_processor.single"),
]


@pytest.mark.parametrize(("path", "value", "field"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_description(good: dict[str, Any], path: str, value: Any, field: str | None) -> None:
    with pytest.raises(ModelFileError) as caught:
        Tokenizer(changed(good, path, value), path="tokenizer.json")
    assert caught.value.field == field


def test_deep_nesting(good: dict[str, Any]) -> None:
    normalizer: dict[str, Any] = {"type": "NFC"}
    for _ in range(500):
        normalizer = {"type": "Sequence", "normalizers": [normalizer]}
    with pytest.raises(ModelFileError, match=r"nested at most 8 deep"):
        Tokenizer(changed(good, "normalizer", normalizer))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"[" * 200_000, b"\x00" * 100, b'{"model": {"vocab": {"a": 0, "a": 1}}}', b'{"model": NaN}', b"\xff"],
)
def test_hostile_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        Tokenizer.from_file(path)
    assert Path(caught.value.path) == path


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ModelFileError, match=r"regular file"):
        Tokenizer.from_file(tmp_path)


def test_every_truncation_is_an_error(good: dict[str, Any], tmp_path: Path) -> None:
    small = {"a": 0, "b": 1, "ab": 2}
    data = json.dumps(changed(changed(good, "model/vocab", small), "model/merges", ["a b"]) | {"added_tokens": []})
    path = tmp_path / "tokenizer.json"
    path.write_text(data)
    Tokenizer.from_file(path)
    for size in range(len(data)):
        path.write_text(data[:size])
        with pytest.raises(ModelFileError):
            Tokenizer.from_file(path)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_changed_byte_loads_or_raises_the_typed_error(good: dict[str, Any], data: st.DataObject) -> None:
    text = bytearray(
        json.dumps(good | {"model": {**good["model"], "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}).encode()
    )
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 127))
    try:
        description = json.loads(text)
    except ValueError:
        return
    if not isinstance(description, dict):
        return
    try:
        tokenizer = Tokenizer(description)
        tokenizer.decode(tokenizer.encode("abab <|im_end|>"))
    except PyEngineError:
        pass


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", 5, None, b"x"])
def test_bad_text_is_named(good: dict[str, Any], text: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^text: expected"):
        Tokenizer(good).encode(text)


@pytest.mark.parametrize("ids", [[-1], [2**32], ["a"], [1.5], [None], 7])
def test_bad_ids_are_named(good: dict[str, Any], ids: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^ids: expected"):
        Tokenizer(good).decode(ids)


@pytest.mark.parametrize("token_id", [-1, 2**32, "a"])
def test_bad_id_is_named(good: dict[str, Any], token_id: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^token_id: expected"):
        Tokenizer(good).id_to_token(token_id)


def test_ids_without_a_token_give_no_text(good: dict[str, Any]) -> None:
    tokenizer = Tokenizer(good)
    assert tokenizer.decode([tokenizer.vocab_size, *tokenizer.encode("x"), 2**31]) == "x"


def test_input_is_capped(good: dict[str, Any]) -> None:
    tokenizer = Tokenizer(good, max_input_bytes=8)
    assert tokenizer.decode(tokenizer.encode("é" * 4)) == "é" * 4
    for text in ("é" * 5, "a" * 9, "a" * 100):
        with pytest.raises(CapacityError, match=r"^text: expected at most 8 bytes"):
            tokenizer.encode(text)


LONG_TEXTS = ["a", " ", "^", "<|im_end|>", "<|im_", *(pytest.param(c, marks=pytest.mark.slow) for c in "😀\u03010")]


@pytest.mark.parametrize("text", LONG_TEXTS)
def test_long_texts_of_one_class_round_trip(good: dict[str, Any], text: str) -> None:
    tokenizer = Tokenizer(good)
    text *= 1_000_000 // len(text)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_truncation_and_padding_of_the_file_are_off(good: dict[str, Any]) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "<|im_end|>",
    }
    tokenizer = Tokenizer(good | {"truncation": truncation, "padding": padding})
    assert tokenizer.encode("a b c d e f g h") == Tokenizer(good).encode("a b c d e f g h")


def test_a_panic_in_encode_is_a_typed_error(good: dict[str, Any]) -> None:
    """Ambiguous alternatives pass the static check; the engine gives up after its retries, by a panic."""
    tokenizer = Tokenizer(changed(good, "pre_tokenizer", split("(?:a|aa)+$")))
    with pytest.raises(ArgumentError, match=r"^text: .*retry-limit"):
        tokenizer.encode("a" * 60 + "b")


def test_guard_lets_interrupts_through() -> None:
    for error in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(error), typed_errors(ArgumentError):
            raise error


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+",
        "(a*)*",
        "(?:a+)+$",
        "(?:a+|b)*c",
        "((a+)b?)+",
        "(?=(a+))+",
        r"(\w+\s?)*",
        r"([a-z]+)*",
        r"(x{2,})+",
        r"(x+){20,}",
        r"(x+){100}",
        r"(.*a){30}",
        r"(?:\p{L}+)+",
        r"([\])]+)+",
        r"(a)\1",
        r"(?<n>a)\k<n>",
        r"\g<0>",
        "a+*",
        "(?:(?:(?:a+)))+",
        "(a+?)+",
    ],
)
def test_regexes_that_backtrack(pattern: str) -> None:
    assert find_backtracking(pattern) is not None


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "a+b+",
        "(a|b)+",
        r"\s+(?!\S)|\s+",
        r"[^\s\p{L}\p{N}]+[\r\n/]*",
        r"[a+*]+",
        r"\(\+\)\*",
        "a++",
        "a+?b",
        r"\p{N}{1,3}",
        "(?:ab){2}",
        r"(?i:'s|'t)?",
        # GPT-4o's expression.
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"{not a quantifier}+",
    ],
)
def test_regexes_that_do_not(pattern: str) -> None:
    assert find_backtracking(pattern) is None


def test_known_pre_tokenizers_pass_the_check(good: dict[str, Any]) -> None:
    for pre_tokenizer in PRE_TOKENIZERS.values():
        tokenizer = Tokenizer(changed(good, "pre_tokenizer", pre_tokenizer))
        assert tokenizer.decode(tokenizer.encode("ab 12")) == "ab 12"
