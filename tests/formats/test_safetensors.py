"""Round trips with the safetensors library as the oracle."""

import gc
import os
import pickle

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine import _C
from pyengine.errors import ArgumentError, ModelFileError, PyEngineError
from pyengine.formats import open_safetensors, write_safetensors

DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F32": np.float32, "F64": np.float64, "C64": np.complex64, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu, "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip


def random_array(rng, dtype, shape):
    dtype = np.dtype(dtype)
    raw = rng.integers(0, 2 if dtype == np.bool_ else 256, (*shape, dtype.itemsize), np.uint8)
    return raw.reshape(-1).view(dtype).reshape(shape)


def test_reads_what_the_library_writes(tmp_path):
    rng = np.random.default_rng(0)
    names = ["BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64"]
    tensors = {name: random_array(rng, DTYPES[name], (3, 5)) for name in names}
    tensors |= {"scalar": np.array(7, np.float32), "empty": np.zeros((0, 4), np.float16), "naïve 名": np.arange(3)}
    metadata = {"format": "pt", "ключ": 'é\n"\\\0😀'}
    safetensors.numpy.save_file(tensors, tmp_path / "f.safetensors", metadata)
    reader = open_safetensors(tmp_path / "f.safetensors")
    assert reader.metadata == metadata
    assert set(reader) == set(tensors)
    for name, tensor in tensors.items():
        assert reader[name].dtype == tensor.dtype
        assert reader[name].shape == tensor.shape
        assert reader[name].tobytes() == tensor.tobytes()


def test_the_library_reads_what_is_written_here(tmp_path):
    rng = np.random.default_rng(1)
    tensors = {f"x.{name}": random_array(rng, dtype, (4, 3)) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": np.array(7), "empty": np.zeros((2, 0), np.float32), "naïve 名": np.arange(3)}
    metadata = {"a": "b", "ключ": 'é\n"\\\0😀'}
    path = tmp_path / "f.safetensors"
    write_safetensors(path, tensors, metadata)
    read = dict(safetensors.deserialize(path.read_bytes()))
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert (tuple(read[name]["shape"]), bytes(read[name]["data"])) == (tensor.shape, tensor.tobytes())
        if name.startswith("x."):
            assert read[name]["dtype"] == name[2:]
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == metadata
    again = open_safetensors(path)
    assert again.metadata == metadata
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert again[name].flags.aligned
        assert again[name].tobytes() == tensor.tobytes()


def test_same_bytes_as_the_library_for_one_dtype(tmp_path):
    """Header padding and order agree, so that hashes of files agree too."""
    rng = np.random.default_rng(2)
    tensors = {f"layer.{i}": random_array(rng, np.float32, (i, 4)) for i in range(5)}
    write_safetensors(tmp_path / "ours", tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs")
    ours, theirs = (tmp_path / "ours").read_bytes(), (tmp_path / "theirs").read_bytes()
    assert ours == theirs


def test_not_contiguous_and_big_endian_arrays(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    tensors = {"t": base.T, "s": base[::2, ::-3], "e": base.astype(">f4"), "f": np.asfortranarray(base)}
    write_safetensors(tmp_path / "f", tensors)
    reader = open_safetensors(tmp_path / "f")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(reader[name], tensor)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=4)),
        max_size=5,
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
def test_round_trip_of_any_names_and_shapes(tmp_path_factory, specs, metadata):
    rng = np.random.default_rng(3)
    tensors = {name: random_array(rng, DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in specs.items()}
    path = tmp_path_factory.mktemp("any") / "f"
    write_safetensors(path, tensors, metadata)
    reader = open_safetensors(path)
    expected = dict(safetensors.deserialize(path.read_bytes()))
    assert set(reader) == set(expected) == set(tensors)
    assert reader.metadata == metadata
    for name, tensor in tensors.items():
        assert reader[name].shape == tensor.shape
        assert reader[name].tobytes() == tensor.tobytes() == bytes(expected[name]["data"])


def test_views_outlive_the_reader_and_are_read_only(tmp_path):
    write_safetensors(tmp_path / "f", {"t": np.arange(1000)})
    reader = open_safetensors(tmp_path / "f")
    array, view = reader["t"], reader.data("t")
    assert not array.flags.writeable
    assert not array.flags.owndata
    assert view.readonly
    del reader
    gc.collect()
    os.unlink(tmp_path / "f")
    assert array.sum() == 499500
    assert view.nbytes == 8000
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 1


def test_saving_over_a_file_that_is_mapped(tmp_path):
    path = tmp_path / "f"
    write_safetensors(path, {"t": np.arange(100_000)})
    old = open_safetensors(path)["t"]
    write_safetensors(path, {"t": old[:10] + 1})
    assert old.sum() == 4999950000
    assert open_safetensors(path)["t"].tolist() == list(range(1, 11))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_safetensors(path, {"t": np.arange(3)})

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(path, {"t": np.arange(4)})
    monkeypatch.undo()
    assert open_safetensors(path)["t"].tolist() == [0, 1, 2]
    assert os.listdir(tmp_path) == ["f"]


def test_written_before_renamed(tmp_path, monkeypatch):
    """The new bytes are on the disk before the name points to them, and the name after that."""
    events = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor):
        events.append("sync " + os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def logged_replace(source, target):
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    write_safetensors(tmp_path / "f", {"t": np.arange(3)})
    assert events[0].startswith(f"sync {tmp_path}/.f.")
    assert events[1:] == ["rename", f"sync {tmp_path}"]


def test_file_mode_follows_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        write_safetensors(tmp_path / "f", {})
    finally:
        os.umask(previous)
    assert os.stat(tmp_path / "f").st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"": np.zeros(1)}, None, "tensors: expected a name"),
        ({"__metadata__": np.zeros(1)}, None, "tensors: expected a name"),
        ({"a\0": np.zeros(1)}, None, "tensors: expected a name"),
        ({"\ud800": np.zeros(1)}, None, "Unicode text"),
        ({"t": np.zeros(1, "U3")}, None, "expected a dtype"),
        ({"t": np.zeros(1, object)}, None, "expected a dtype"),
        ({"t": np.zeros(1, np.complex128)}, None, "expected a dtype"),
        ({"t": np.zeros([1] * 9)}, None, "at most 8 dimensions"),
        ({}, {"a": 1}, "metadata: expected str -> str"),
    ],
)
def test_writer_refuses(tmp_path, tensors, metadata, message):
    with pytest.raises(ArgumentError, match=message):
        write_safetensors(tmp_path / "f", tensors, metadata)
    assert os.listdir(tmp_path) == []


def test_unknown_name(tmp_path):
    write_safetensors(tmp_path / "f", {"t": np.zeros(1)})
    reader = open_safetensors(tmp_path / "f")
    for access in (reader.__getitem__, reader.info, reader.data):
        with pytest.raises(KeyError):
            access("u")
    assert "u" not in reader
    assert reader.get("u") is None
    with pytest.raises(ArgumentError, match=r"name: expected a tensor of .*, got 'u'"):
        _C.SafetensorsFile(tmp_path / "f").info("u")


def test_model_file_error():
    error = ModelFileError("/m.gguf", 24, "n_tensors", "expected 1, got 2")
    assert str(error) == "/m.gguf: at byte 24, field 'n_tensors': expected 1, got 2"
    assert str(ModelFileError("/m", None, None, "x")) == "/m: x"
    assert isinstance(error, PyEngineError)
    again = pickle.loads(pickle.dumps(error))
    assert (again.path, again.offset, again.field, str(again)) == ("/m.gguf", 24, "n_tensors", str(error))
