"""Every hostile file is refused with ModelFileError, naming what is wrong; odd but legal files load."""

import os
import struct

import pytest

from pyengine import _C
from pyengine.errors import BackendUnavailable, ModelFileError
from pyengine.formats import open_gguf
from tests.formats.gguf_builder import (
    UINT8,
    GgufFile,
    array,
    entry,
    middle_valid_file,
    scalar,
    small_valid_file,
    tensor,
)
from tests.formats.hostile_gguf import BROKEN, LOADS, UPSTREAM, field_of

CONVERTED = {"F32", "F16", "BF16", *(name.upper() for name in _C.block_formats())}


def load(path, content: bytes):
    path.write_bytes(content)
    return touch(path)


def touch(path):
    """Opens a file and reads everything in it."""
    reader = open_gguf(path)
    assert set(reader.metadata) == set(reader.metadata_types)
    for name in reader:
        assert reader[name].nbytes == reader.info(name).num_bytes == len(bytes(reader.data(name)))
        if reader.info(name).type in CONVERTED:
            assert reader.dequantize(name).shape == reader.info(name).shape
        else:
            with pytest.raises(BackendUnavailable, match=reader.info(name).type):
                reader.dequantize(name)
    return reader


def assert_refused(path, content: bytes) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        load(path, content)
    error = caught.value
    assert error.path == str(path)
    assert 0 <= error.offset <= len(content)
    return error


@pytest.mark.parametrize("name", UPSTREAM)
def test_upstream_case(tmp_path, name):
    content, loads = UPSTREAM[name]
    if loads:
        load(tmp_path / "f.gguf", content)
    else:
        assert assert_refused(tmp_path / "f.gguf", content).field == field_of(name)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(tmp_path, name):
    assert assert_refused(tmp_path / "f.gguf", BROKEN[name]).field == field_of(name)


@pytest.mark.parametrize("name", LOADS)
def test_odd_file_loads(tmp_path, name):
    load(tmp_path / "f.gguf", LOADS[name])


def test_every_truncation(tmp_path):
    content = middle_valid_file()
    assert 1700 < len(content) < 2300
    path = tmp_path / "f.gguf"
    load(path, content)
    for size in reversed(range(len(content))):
        os.truncate(path, size)
        with pytest.raises(ModelFileError):
            touch(path)


def test_every_bit_flip(tmp_path):
    content = small_valid_file()
    assert 450 < len(content) < 650
    path = tmp_path / "f.gguf"
    load(path, content)
    num_loaded = 0
    with open(path, "r+b", buffering=0) as file:
        for bit in range(8 * len(content)):
            os.pwrite(file.fileno(), bytes([content[bit // 8] ^ 1 << bit % 8]), bit // 8)
            try:
                touch(path)
                num_loaded += 1
            except ModelFileError:
                pass
            os.pwrite(file.fileno(), content[bit // 8 : bit // 8 + 1], bit // 8)
    assert path.read_bytes() == content
    # The data, the padding, and values and letters of metadata flip freely.
    assert 8 * 96 < num_loaded < 8 * 300


def test_limits_of_counts_from_both_sides(tmp_path):
    """2^20 tensors and 2^17 entries may be asked for; one more is refused, though the file is large enough."""
    path = tmp_path / "f.gguf"
    for field, position, limit in (("n_tensors", 8, 2**20), ("n_kv", 16, 2**17)):
        for count in (limit, limit + 1):
            head = bytearray(bytes(GgufFile()))
            head[position : position + 8] = struct.pack("<Q", count)
            path.write_bytes(head)
            os.truncate(path, 64 << 20)
            with pytest.raises(ModelFileError) as caught:
                open_gguf(path)
            assert (caught.value.field == field) == (count > limit)


def test_limit_of_strings_from_both_sides(tmp_path):
    path = tmp_path / "f.gguf"
    for length in (64 << 20, (64 << 20) + 1):
        path.write_bytes(bytes(GgufFile([entry("k", 8, struct.pack("<Q", length))], alignment=1)))
        os.truncate(path, 100 << 20)
        if length <= 64 << 20:
            assert len(open_gguf(path).metadata["k"]) == length
        else:
            with pytest.raises(ModelFileError, match="at most 67108864 bytes"):
                open_gguf(path)


def test_limit_of_array_strings_from_both_sides(tmp_path):
    """4 Mi strings in all arrays together."""
    path = tmp_path / "f.gguf"
    for second in (2, 3):
        first = array("k", 8, [], length=2**22 - 2) + bytes(8 * (2**22 - 2))
        path.write_bytes(bytes(GgufFile([first, array("tags", 8, ["a"] * second)])))
        if second == 2:
            assert len(open_gguf(path).metadata["k"]) == 2**22 - 2
        else:
            with pytest.raises(ModelFileError, match="expected at most 4194304 strings"):
                open_gguf(path)


def test_message_holds_no_raw_bytes_of_the_file(tmp_path):
    key = "\x1b[2J" + "k" * 60_000
    error = assert_refused(tmp_path / "f.gguf", bytes(GgufFile([entry(key, 13, b"")])))
    assert str(error).isprintable()
    assert len(str(error)) < 500


def test_readable_text(tmp_path):
    path = tmp_path / "f.gguf"
    with pytest.raises(ModelFileError) as caught:
        load(path, bytes(GgufFile(num_tensors=7)))
    assert str(caught.value) == f"{path}: at byte 8, field 'n_tensors': expected at most 0 in this file, got 7"


def test_names_that_differ_late_are_told_apart(tmp_path):
    stem = "k" * 60_000
    reader = load(tmp_path / "f.gguf", bytes(GgufFile([scalar(stem + str(i), UINT8, i) for i in range(10)])))
    assert {key[-1]: value for key, value in reader.metadata.items()} == {str(i): i for i in range(10)}
    reader = load(tmp_path / "f.gguf", bytes(GgufFile([], [tensor("n" * 62 + c, [0], 0, 0) for c in "ab"])))
    assert [name[-1] for name in reader] == ["a", "b"]
