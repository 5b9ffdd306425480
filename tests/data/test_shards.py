"""Token shards: round trip, the layout on disk, and every kind of damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.data import shards
from pyengine.data.errors import DataFileError
from pyengine.data.shards import Shard, TokenisedDocument, add_boundaries, shard_content_id, write_shard
from pyengine.errors import ArgumentError
from pyengine.ledger import content_id

TOKENIZER = content_id(b"tokenizer")


def write(path: Path, documents: list[list[int]], vocab_size: int = 1000) -> None:
    items = [TokenisedDocument(f"d{number}", ids, 3 * len(ids)) for number, ids in enumerate(documents)]
    write_shard(path, items, vocab_size=vocab_size, tokenizer=TOKENIZER)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([2, 65535, 65536, 65537, 1 << 31]).flatmap(
        lambda vocab: st.tuples(
            st.just(vocab), st.lists(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=9), max_size=7)
        )
    )
)
def test_documents_come_back(tmp_path_factory: pytest.TempPathFactory, case: tuple[int, list[list[int]]]) -> None:
    vocab_size, documents = case
    path = tmp_path_factory.mktemp("shard") / "train.v1"
    write(path, documents, vocab_size)
    shard = Shard(path)
    assert len(shard) == len(documents)
    assert [shard.document(index).tolist() for index in range(len(shard))] == documents
    flat = [token for ids in documents for token in ids]
    raw = np.array(flat, dtype="<u2" if vocab_size <= 65536 else "<u4").tobytes()
    assert Path(f"{path}.bin").read_bytes() == raw
    assert shard.index.tokens_id == content_id(raw)
    assert (shard.index.tokens, shard.index.text_bytes) == (len(flat), 3 * len(flat))
    assert shard.index.document_ids == [f"d{number}" for number in range(len(documents))]
    assert not shard.tokens.flags.writeable or not flat


def test_either_file_name_opens_it_and_the_id_covers_both(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2], [3]])
    assert Shard(tmp_path / "a.bin").index == Shard(tmp_path / "a.json").index == Shard(tmp_path / "a").index
    first = shard_content_id(tmp_path / "a")
    write(tmp_path / "a", [[1, 2], [4]])
    assert shard_content_id(tmp_path / "a") != first
    with pytest.raises(ArgumentError, match="index"):
        Shard(tmp_path / "a").document(2)


def test_boundaries() -> None:
    documents = [TokenisedDocument("a", [5], 1), TokenisedDocument("b", [6, 7], 2)]
    ids = [list(np.asarray(item.ids)) for item in add_boundaries(documents, start=1, end=2)]
    assert ids == [[1, 5, 2], [1, 6, 7, 2]]
    assert [list(np.asarray(item.ids)) for item in add_boundaries(documents, end=2)] == [[5, 2], [6, 7, 2]]


@pytest.mark.parametrize("ids", [[], [-1], [1000], [1.5], [[1]], [0, 2**40]])
def test_bad_documents_are_named_and_nothing_is_written(tmp_path: Path, ids: list[Any]) -> None:
    with pytest.raises(ArgumentError, match="documents\\['d1'\\]"):
        write(tmp_path / "a", [[1], ids])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_truncated_or_longer_tokens(tmp_path: Path, cut: int) -> None:
    write(tmp_path / "a", [[1, 2], [3]])
    data = (tmp_path / "a.bin").read_bytes()
    for damaged in (data[:cut], data + b"\0" * (cut + 1)):
        (tmp_path / "a.bin").write_bytes(damaged)
        with pytest.raises(DataFileError) as error:
            Shard(tmp_path / "a", verify=False)
        assert error.value.field == "tokens"
        assert error.value.path == tmp_path / "a.bin"


@pytest.mark.parametrize("verify_chunk", [1, 2, 1 << 20])
def test_ids_outside_the_vocabulary_and_flipped_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify_chunk: int
) -> None:
    monkeypatch.setattr(shards, "_CHUNK_TOKENS", verify_chunk)
    write(tmp_path / "a", [[1, 2], [3]])
    (tmp_path / "a.bin").write_bytes(np.array([1, 999, 1000], "<u2").tobytes())
    with pytest.raises(DataFileError, match="below 1000, got 1000") as error:
        Shard(tmp_path / "a")
    assert error.value.offset == 4
    (tmp_path / "a.bin").write_bytes(np.array([1, 2, 4], "<u2").tobytes())
    with pytest.raises(DataFileError) as error:
        Shard(tmp_path / "a")
    assert error.value.field == "tokens_id"
    Shard(tmp_path / "a", verify=False)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version"),
        ({"token_bits": 8}, "token_bits"),
        ({"token_bits": 32}, "tokens"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": 70000}, "token_bits"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"tokens": -3}, "tokens"),
        ({"tokens": 4}, "document_ends"),
        ({"tokens": 2}, "document_ends[1]"),
        ({"tokens": 1 << 62}, "tokens"),
        ({"documents": 3}, "documents"),
        ({"document_ids": ["a"]}, "document_ids"),
        ({"document_ends": [2, 4]}, "document_ends[1]"),
        ({"document_ends": [2, 2]}, "document_ends[1]"),
        ({"document_ends": [3, 2]}, "document_ends[1]"),
        ({"document_ends": [0, 3]}, "document_ends[0]"),
        ({"document_ends": [-1, 3]}, "document_ends[0]"),
        ({"document_ends": [1, 2]}, "document_ends"),
        ({"text_bytes": -1}, "text_bytes"),
    ],
)
def test_damaged_index_names_the_field(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    write(tmp_path / "a", [[1, 2], [3]])
    index = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps(index | change))
    with pytest.raises(DataFileError) as error:
        Shard(tmp_path / "a")
    assert error.value.field == field


def test_every_truncation_of_the_index_is_a_typed_error(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2], [3]])
    data = (tmp_path / "a.json").read_bytes()
    for cut in range(len(data) - 1):
        (tmp_path / "a.json").write_bytes(data[:cut])
        with pytest.raises(DataFileError):
            Shard(tmp_path / "a")


@pytest.mark.parametrize(
    "text",
    ["[]", "3", '{"tokens": 1e400}', '{"document_ends": [1.5]}', "[" * 100_000, '{"tokens": 99999999999999999999}'],
)
def test_hostile_index(tmp_path: Path, text: str) -> None:
    write(tmp_path / "a", [[1]])
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataFileError):
        Shard(tmp_path / "a")


def test_missing_and_oversized_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataFileError, match="cannot be read"):
        Shard(tmp_path / "absent")
    write(tmp_path / "a", [[1]])
    monkeypatch.setattr(shards, "MAX_INDEX_BYTES", 10)
    with pytest.raises(DataFileError, match="at most 10"):
        Shard(tmp_path / "a")
    monkeypatch.undo()
    (tmp_path / "a.bin").unlink()
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(DataFileError, match="regular"):
        Shard(tmp_path / "a")
