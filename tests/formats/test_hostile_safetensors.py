"""Hostile files are refused with ModelFileError; what loads here loads in the reference library with equal bytes."""

import os

import numpy as np
import pytest
import safetensors

from pyengine import _C
from pyengine.errors import ModelFileError
from pyengine.formats import open_safetensors, write_safetensors
from tests.formats.hostile_safetensors import BROKEN, LOADS, VALID, info, pack

# The reference is not strict here: it takes the last of two entries, ignores unknown fields, and has no limits on names
# and dimensions.
REFERENCE_ACCEPTS = {
    "space first",
    "metadata null",
    "metadata key twice",
    "metadata key twice by escape",
    "name twice",
    "empty name",
    "name with NUL",
    "another field",
    "9 dimensions",
}


def load(path, content: bytes):
    path.write_bytes(content)
    return touch(path)


def touch(path):
    """Opens a file and makes an array of each tensor."""
    reader = open_safetensors(path)
    for name in reader:
        assert reader[name].nbytes == reader.info(name).num_bytes
    return reader


def reference_accepts(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return False
    return True


def assert_equals_reference(reader, content: bytes) -> None:
    expected = dict(safetensors.deserialize(content))
    assert set(reader) == set(expected)
    for name, fields in expected.items():
        assert reader.info(name).dtype == fields["dtype"]
        assert list(reader.info(name).shape) == fields["shape"]
        assert bytes(reader.data(name)) == bytes(fields["data"])


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(tmp_path, name):
    path = tmp_path / "hostile.safetensors"
    with pytest.raises(ModelFileError) as caught:
        load(path, BROKEN[name])
    assert caught.value.path == str(path)
    assert 0 <= caught.value.offset <= len(BROKEN[name])
    assert caught.value.field in {"header_size", "header", "__metadata__", "a", "b", "t"}
    assert reference_accepts(BROKEN[name]) == (name in REFERENCE_ACCEPTS)


@pytest.mark.parametrize("name", LOADS)
def test_odd_file_loads(tmp_path, name):
    assert_equals_reference(load(tmp_path / "odd.safetensors", LOADS[name]), LOADS[name])


def test_every_truncation(tmp_path):
    path = tmp_path / "f.safetensors"
    load(path, VALID)
    for size in reversed(range(len(VALID))):
        os.truncate(path, size)
        with pytest.raises(ModelFileError):
            touch(path)


def test_every_bit_flip(tmp_path):
    entries = {f"layer.{i}": info("F16", [2, i], i * (i - 1) * 2, i * (i + 1) * 2) for i in range(1, 8)}
    content = pack({"__metadata__": {"format": "pt", "näme": "é"}, **entries}, bytes(range(112)))
    assert 500 < len(content) < 700
    path = tmp_path / "f.safetensors"
    load(path, content)
    num_loaded = 0
    with open(path, "r+b", buffering=0) as file:
        for bit in range(8 * len(content)):
            os.pwrite(file.fileno(), bytes([content[bit // 8] ^ 1 << bit % 8]), bit // 8)
            try:
                assert_equals_reference(touch(path), path.read_bytes())
                num_loaded += 1
            except ModelFileError:
                pass
            os.pwrite(file.fileno(), content[bit // 8 : bit // 8 + 1], bit // 8)
    assert path.read_bytes() == content
    # The 112 bytes of data flip freely, and letters of names and metadata.
    assert 8 * 112 < num_loaded < 8 * 250


def test_header_limit_from_both_sides(tmp_path):
    """100,000,000 bytes of header are read, one more is refused before it is looked at."""
    path = tmp_path / "long.safetensors"
    for size in (100_000_000, 100_000_001):
        with open(path, "wb") as file:
            file.write(size.to_bytes(8, "little") + b"{}")
            file.truncate(8 + size)
        with pytest.raises(ModelFileError) as caught:
            open_safetensors(path)
        assert caught.value.field == ("header" if size == 100_000_000 else "header_size")
    path.write_bytes((100_000_000).to_bytes(8, "little") + b"{}".ljust(100_000_000))
    assert len(open_safetensors(path)) == 0


@pytest.mark.parametrize("header", ["{}", '{"t":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'])
def test_sparse_four_gigabytes(tmp_path, header):
    path = tmp_path / "sparse.safetensors"
    path.write_bytes(pack(header))
    os.truncate(path, 4 << 30)
    with pytest.raises(ModelFileError, match="expected the tensors to fill the file"):
        open_safetensors(path)


def test_what_is_not_a_file(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cases = {
        "missing": "No such file",
        "empty": "empty file",
        "folder": "directory",
        "pipe": "pipe",
        "loop": "symbolic links",
        "n" * 300: "too long",
        "empty/x": "Not a directory",
    }
    for name, message in cases.items():
        for open_file in (_C.SafetensorsFile, _C.GgufFile):
            with pytest.raises(ModelFileError, match=message) as caught:
                open_file(tmp_path / name)
            assert (caught.value.path, caught.value.offset, caught.value.field) == (str(tmp_path / name), None, None)


def test_path_of_any_bytes(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors")
    write_safetensors(path, {"t": np.arange(3)})
    assert open_safetensors(path)["t"].tolist() == [0, 1, 2]
    with pytest.raises(ModelFileError) as caught:
        open_safetensors(path + "x")
    assert caught.value.path == path + "x"
