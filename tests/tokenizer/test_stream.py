"""StreamDecoder and StopStrings against whole-text references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.errors import ArgumentError
from pyengine.testing.tiny import write_tiny_tokenizer
from pyengine.tokenizer import StopStrings, StreamDecoder, Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["<s>", "</s>", "▁", "▁the", "the", "▁▁", "é", ".", "日", "▁😀", "<0x", "x"]
SENTENCEPIECE = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
WORDPIECE = {"type": "WordPiece", "prefix": "##", "cleanup": True}


def make_tokenizer(decoder: dict[str, Any] | None, tokens: list[str]) -> Tokenizer:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return Tokenizer(
        {
            "version": "1.0",
            "added_tokens": [{"id": 0, "content": tokens[0], **flags}, {"id": 1, "content": tokens[1], **flags}],
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": decoder,
            "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []},
        }
    )


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return Tokenizer.from_folder(folder)


TOKENIZERS = {
    "sentencepiece": make_tokenizer(SENTENCEPIECE, PIECES + BYTES),
    "metaspace": make_tokenizer(METASPACE, PIECES),
    "wordpiece": make_tokenizer(WORDPIECE, ["<s>", "</s>", "the", "##re", "is", ".", "n't", "##.", "'s", "?"]),
    "none": make_tokenizer(None, PIECES),
}


def check_stream(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    decoder = StreamDecoder(tokenizer, skip_special_tokens=skip)
    for _ in range(2):  # finish() makes it new
        pieces = [decoder.push(token_id) for token_id in ids]
        pieces.append(decoder.finish())
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=500, deadline=None)
@given(ids=st.lists(st.integers(0, 390), max_size=40), skip=st.booleans())
def test_byte_level_stream_equals_decode(byte_level: Tokenizer, ids: list[int], skip: bool) -> None:
    check_stream(byte_level, ids, skip)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=24), skip=st.booleans())
def test_byte_level_stream_of_broken_utf8_equals_decode(byte_level: Tokenizer, data: bytes, skip: bool) -> None:
    from pyengine.tokenizer.stream import token_bytes

    of_byte = {}
    for token_id in range(byte_level.vocab_size):
        token = byte_level.id_to_token(token_id)
        if token is not None and len(token) == 1:
            of_byte[token_bytes(token)] = token_id
    check_stream(byte_level, [of_byte[bytes([byte])] for byte in data], skip)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_other_decoders_stream_equals_decode(name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = TOKENIZERS[name]
    piece = st.integers(0, 13)
    # Bytes of UTF-8 leads and continuations are drawn often, so that runs are now whole characters, now not.
    some_byte = st.sampled_from([12 + byte for byte in (0xE2, 0x82, 0xAC, 0xC3, 0xA9, 0x41, 0xFF)])
    ids = data.draw(st.lists(piece | some_byte if name == "sentencepiece" else piece, max_size=20))
    check_stream(tokenizer, ids, skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_no_piece_ends_inside_a_character(byte_level: Tokenizer, text: str) -> None:
    decoder = StreamDecoder(byte_level)
    ids = byte_level.encode(text.replace("\ufffd", ""))
    assert not any("\ufffd" in decoder.push(token_id) for token_id in ids)
    assert decoder.finish() == ""


def test_text_comes_as_soon_as_it_is_certain(byte_level: Tokenizer) -> None:
    decoder = StreamDecoder(byte_level)
    text = "abc €"
    ids = byte_level.encode(text)
    assert "".join(decoder.push(token_id) for token_id in ids) == text


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "CTC", "pad_token": "<s>", "word_delimiter_token": "|", "cleanup": True},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]},
        {
            "type": "Sequence",
            "decoders": [{"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "ab"}, "content": "x"}],
        },
    ],
)
def test_decoders_that_cannot_stream_are_refused(decoder: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"expected a decoder that can stream, got"):
        StreamDecoder(make_tokenizer(decoder, PIECES))


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Reference: try every end, longest stop first."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=1000, deadline=None)
@given(
    pieces=st.lists(st.text("ab<", max_size=6), max_size=10),
    stops=st.lists(st.text("ab<", min_size=1, max_size=5), max_size=4),
)
def test_stop_strings_match_the_reference(pieces: list[str], stops: list[str]) -> None:
    finder = StopStrings(stops)
    expected, stop = first_stop("".join(pieces), stops)
    given_out = ""
    for piece in pieces:
        given_out += finder.push(piece)
        assert expected.startswith(given_out)
        if finder.match is None:
            # What is held back is no longer than it must be.
            seen = "".join(pieces)[: len(given_out) + len(finder._held)]
            held = max((n for s in stops for n in range(1, len(s)) if seen.endswith(s[:n])), default=0)
            assert len(finder._held) == held
    given_out += finder.finish()
    assert (given_out, finder.match) == (expected, stop)


def test_stop_across_token_borders(byte_level: Tokenizer) -> None:
    decoder, finder = StreamDecoder(byte_level, skip_special_tokens=False), StopStrings(["\nuser:"])
    text = "".join(finder.push(decoder.push(token_id)) for token_id in byte_level.encode("fine\nuse it\nuser: no"))
    assert (text, finder.match) == ("fine\nuse it", "\nuser:")
    assert finder.push("more") == ""


@pytest.mark.parametrize("stop", [[""], ["x" * 1025], ["x"] * 65, [1]])
def test_bad_stop_is_named(stop: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^stop(\[0\])?: expected"):
        StopStrings(stop)
