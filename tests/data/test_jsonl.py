"""JSON lines: round trip, damage, limits, files that appear whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyengine.data import jsonl
from pyengine.data.errors import DataFileError
from pyengine.data.files import replacing
from pyengine.data.jsonl import Conversation, Document, Message, read_jsonl, write_jsonl
from pyengine.errors import ArgumentError
from pyengine.ledger import content_id

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(st.builds(Document, TEXT, TEXT, TEXT, st.dictionaries(TEXT, TEXT, max_size=2)), max_size=6))
def test_documents_come_back_and_are_plain_json(
    tmp_path_factory: pytest.TempPathFactory, documents: list[Document]
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    written = write_jsonl(path, documents)
    assert list(read_jsonl(path, Document)) == documents
    data = path.read_bytes()
    assert (written.lines, written.bytes, written.content_id) == (len(documents), len(data), content_id(data))
    lines = data.decode().split("\n")[:-1]
    assert [json.loads(line)["text"] for line in lines] == [document.text for document in documents]


def test_conversation_layout_is_the_common_one(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a", [Conversation([Message("user", "hi"), Message("assistant", "ho")])])
    record = json.loads((tmp_path / "a").read_text())
    assert record["messages"] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b'{"id":"a"}',
        b'{"id":"a","text":3}',
        b'{"id":"a","text":"\xff"}',
        b'{"id":"a","text":"b"} {"id":"a","text":"b"}',
        b'{"id":"a","text":"b","x":' + b"[" * 200_000,
        b"\x00",
    ],
)
def test_damage_names_file_and_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id":"1","text":"one","extra":1}\n\n' + line + b"\n")
    reader = read_jsonl(path, Document)
    assert next(reader).text == "one"
    with pytest.raises(DataFileError) as error:
        next(reader)
    assert (error.value.path, error.value.line) == (path, 3)


def test_line_length_is_bounded_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    with pytest.raises(ArgumentError, match=r"records\[1\]"):
        write_jsonl(tmp_path / "a", [Document("a", "x"), Document("a", "x" * 100)])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b").write_bytes(b" " * 1000)
    with pytest.raises(DataFileError, match="at most 100") as error:
        list(read_jsonl(tmp_path / "b", Document))
    assert error.value.line == 1


def test_missing_file_and_unwritable_text(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="cannot be read"):
        list(read_jsonl(tmp_path / "absent", Document))
    with pytest.raises(ArgumentError, match=r"records\[0\]"):
        write_jsonl(tmp_path / "a", [Document("a", "\ud800")])


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
