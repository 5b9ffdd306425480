import json

import pytest

from pyengine.calibrate import read_sequences
from pyengine.data.errors import DataFileError
from pyengine.errors import ArgumentError
from pyengine.testing.tiny import write_tiny_tokenizer
from pyengine.tokenizer import ChatTemplate, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder)


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_documents_and_conversations(tokenizer, tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path = lines(tmp_path / "a.jsonl", {"id": "1", "text": "the quick fox"}, {"messages": messages})
    encoder, template = tokenizer
    expected = [encoder.encode("the quick fox"), encoder.encode(template.render(messages), add_special_tokens=False)]
    assert read_sequences(path, encoder, template, 1000) == expected
    with pytest.raises(ArgumentError, match="holds conversations, and the model has no chat template"):
        read_sequences(path, encoder, None, 1000)


def test_long_texts_are_cut_and_the_tokens_counted(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the lazy dog " * 2000)
    ids = tokenizer[0].encode(path.read_text())
    sequences = read_sequences(path, *tokenizer, 1300, seq_len=500)
    assert [len(s) for s in sequences] == [500, 500, 300]
    assert [token for sequence in sequences for token in sequence] == ids[:1300]


def test_bad_files(tokenizer, tmp_path):
    with pytest.raises(ArgumentError, match=r"calibration: expected text in .*, got none"):
        read_sequences(lines(tmp_path / "empty.jsonl"), *tokenizer, 10)
    with pytest.raises(DataFileError, match="a text or with messages, got neither"):
        read_sequences(lines(tmp_path / "other.jsonl", {"prompt": "x"}), *tokenizer, 10)
    with pytest.raises(DataFileError, match="cannot be read"):
        read_sequences(tmp_path / "none.txt", *tokenizer, 10)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9!")
    with pytest.raises(DataFileError, match="expected UTF-8, got another byte at 3"):
        read_sequences(tmp_path / "latin.txt", *tokenizer, 10)
    with pytest.raises(ArgumentError, match="max_tokens: expected at least 1, got 0"):
        read_sequences(tmp_path / "none.txt", *tokenizer, 0)
