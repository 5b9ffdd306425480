"""Round trips and dequantisation with the gguf package as the oracle."""

import functools
import os
import weakref

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from pyengine import _C
from pyengine.errors import ArgumentError, BackendUnavailable
from pyengine.formats import GgufTensor, open_gguf, write_gguf
from pyengine.testing.smollm2 import smollm2_gguf
from tests.formats.gguf_builder import STRING, GgufFile, array

BLOCKS = [name.upper() for name in _C.block_formats()]
CONVERTED = ["F16", "BF16", *BLOCKS]
# Where the halves of a block lie that do not begin it.
SCALES = {
    "Q4_1": [0, 2],
    "Q5_1": [0, 2],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
METADATA_TYPES = {
    "a.uint8": "uint8", "a.int8": "int8", "a.uint16": "uint16", "a.int16": "int16", "a.uint32": "uint32",
    "a.int32": "int32", "a.uint64": "uint64", "a.int64": "int64", "a.float32": "float32", "a.float64": "float64",
    "a.bool": "bool", "a.text": "string",
}  # fmt: skip
METADATA = {
    "a.uint8": 255, "a.int8": -128, "a.uint16": 65535, "a.int16": -32768, "a.uint32": 2**32 - 1, "a.int32": -(2**31),
    "a.uint64": 2**64 - 1, "a.int64": -(2**63), "a.float32": 0.5, "a.float64": 0.1, "a.bool": True,
    "a.text": "é 名 😀 \0 \n",
}  # fmt: skip
ARRAYS = {
    "b.ints": [1, -2, 3], "b.floats": [0.5, -1.5], "b.bools": [True, False], "b.texts": ["a", "", "é"],
    "b.longs": [2**40, -1],
}  # fmt: skip


def fields_of(reader: gguf.GGUFReader) -> dict[str, object]:
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def test_reads_what_the_package_writes(tmp_path):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "f.gguf", "llama")
    for key, value in METADATA.items():
        getattr(writer, "add_" + METADATA_TYPES[key].replace("text", "string"))(key, value)
    for key, value in ARRAYS.items():
        if key != "b.longs":
            writer.add_array(key, value)
    tensors = {
        "f32": rng.standard_normal((3, 64), np.float32),
        "f16": rng.standard_normal((2, 3, 32)).astype(np.float16),
        "i64": rng.integers(-9, 9, (5,)),
        "vector": rng.standard_normal(7).astype(np.float32),
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    blocks = {name: quants.quantize(tensors["f32"], GGMLQuantizationType[name]) for name in ("Q4_1", "Q8_0", "BF16")}
    for name, data in blocks.items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reader = open_gguf(tmp_path / "f.gguf")
    assert (reader.version, reader.alignment) == (3, 32)
    assert reader.metadata["general.architecture"] == "llama"
    for key, value in METADATA.items():
        assert reader.metadata[key] == value
        assert type(reader.metadata[key]) is type(value)
        assert reader.metadata_types[key] == METADATA_TYPES[key]
    for key, value in ARRAYS.items():
        if key != "b.longs":
            assert list(reader.metadata[key]) == value
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(reader[name], tensor, strict=True)
    for name in ("Q4_1", "Q8_0"):
        np.testing.assert_array_equal(reader[name], blocks[name], strict=True)
    assert reader.info("Q4_1")[:2] == ("Q4_1", (3, 64))
    assert reader["BF16"].dtype == ml_dtypes.bfloat16
    assert reader["BF16"].tobytes() == blocks["BF16"].tobytes()


def test_the_package_reads_what_is_written_here(tmp_path):
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((4, 64), np.float32)
    tensors = {
        "f32": weight, "transposed": weight.T, "f16": weight.astype(np.float16), "f64": weight.astype(np.float64),
        "bf16": weight.astype(ml_dtypes.bfloat16), "i8": rng.integers(-9, 9, (3, 2, 1, 5)).astype(np.int8),
        "i16": np.arange(3, dtype=np.int16), "i32": np.arange(3, dtype=np.int32), "i64": np.arange(3),
        "q": GgufTensor(quants.quantize(weight, GGMLQuantizationType.Q5_1), "Q5_1", (4, 64)),
    }  # fmt: skip
    metadata = {"general.architecture": "llama", **METADATA, **ARRAYS, "c.array": np.arange(4, dtype=np.uint16)}
    path = tmp_path / "f.gguf"
    write_gguf(path, metadata, tensors, METADATA_TYPES)
    theirs = gguf.GGUFReader(path)
    fields = fields_of(theirs)
    assert set(fields) == set(metadata)
    for key, value in metadata.items():
        assert np.array_equal(fields[key], value), key
    for key, wanted in METADATA_TYPES.items():
        assert [kind.name.lower() for kind in theirs.fields[key].types] == [wanted]
    expected_types = {"b.ints": "INT32", "b.floats": "FLOAT32", "b.bools": "BOOL", "b.texts": "STRING",
                      "b.longs": "INT64", "c.array": "UINT16"}  # fmt: skip
    for key, kind in expected_types.items():
        assert [t.name for t in theirs.fields[key].types] == ["ARRAY", kind]
    assert [tensor.name for tensor in theirs.tensors] == list(tensors)
    for tensor in theirs.tensors:
        given = tensors[tensor.name]
        data = given.data if isinstance(given, GgufTensor) else given
        assert tuple(reversed(tensor.shape.tolist())) == given.shape
        assert tensor.data.tobytes() == data.tobytes()
        assert tensor.data_offset % 32 == 0
    ours = open_gguf(path)
    for name, given in tensors.items():
        data = given.data if isinstance(given, GgufTensor) else given
        np.testing.assert_array_equal(ours[name], data, strict=True)
    copy = tmp_path / "copy.gguf"
    copied = {name: GgufTensor(ours[name].view(np.uint8), ours.info(name).type, ours.info(name).shape)
              for name in ours}  # fmt: skip
    write_gguf(copy, ours.metadata, copied, ours.metadata_types)
    assert copy.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_alignment(tmp_path, alignment):
    tensors = {"a": np.arange(5, dtype=np.int8), "b": np.arange(7, dtype=np.float32)}
    write_gguf(tmp_path / "f", {"general.alignment": alignment}, tensors)
    reader = open_gguf(tmp_path / "f")
    assert reader.alignment == alignment
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(reader[name], tensor)
        assert reader.info(name).offset % alignment == 0
    np.testing.assert_array_equal(reader.dequantize("b"), tensors["b"])
    for tensor in gguf.GGUFReader(tmp_path / "f").tensors:
        np.testing.assert_array_equal(tensor.data, tensors[tensor.name])


def test_vocabulary_of_bytes(tmp_path):
    tokens = [b"a", "é".encode(), b"\xc3", b"\xff\x00", b""]
    (tmp_path / "f").write_bytes(bytes(GgufFile([array("tokenizer.ggml.tokens", STRING, tokens)])))
    read = open_gguf(tmp_path / "f").metadata["tokenizer.ggml.tokens"]
    assert [token.encode("utf-8", "surrogateescape") for token in read] == tokens
    write_gguf(tmp_path / "g", {"tokenizer.ggml.tokens": read}, {})
    assert (tmp_path / "g").read_bytes() == (tmp_path / "f").read_bytes()
    with pytest.raises(ArgumentError, match=r"Unicode text for 'general\.tags'"):
        write_gguf(tmp_path / "g", {"general.tags": read}, {})


@pytest.mark.parametrize("name", CONVERTED)
def test_dequantisation_is_bit_exact(name):
    """Random blocks: every scale, code and high bit; NaN results only need to be NaN."""
    kind = GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(7).integers(0, 256, (20_000, size), np.uint8)
    assert_same_values(_C.gguf_dequantize(name, raw, raw.shape[0] * elements), reference(raw, kind))


@pytest.mark.parametrize("name", CONVERTED)
def test_dequantisation_of_every_half(name):
    """All 65,536 codes of the scale (and of the minimum)."""
    kind = GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    codes = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    if elements == 1:
        raw = codes
    else:
        raw = np.random.default_rng(8).integers(0, 256, (65536, size), np.uint8)
        scale, *minimum = SCALES.get(name, [0])
        raw[:, scale : scale + 2] = codes
        for at in minimum:
            raw[:, at : at + 2] = codes[np.random.default_rng(9).permutation(65536)]
    assert_same_values(_C.gguf_dequantize(name, raw, raw.shape[0] * elements), reference(raw, kind))


def reference(raw, kind):
    with np.errstate(all="ignore"):
        return quants.dequantize(raw.reshape(1, -1), kind).reshape(-1)


def assert_same_values(ours, expected):
    assert ours.dtype == expected.dtype == np.float32
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def test_f32_passes_through():
    raw = np.random.default_rng(3).integers(0, 256, 4000, np.uint8)
    assert _C.gguf_dequantize("F32", raw, 1000).tobytes() == raw.tobytes()


def test_the_formats_of_kernels_have_the_geometry_of_their_type():
    for name, (block_size, block_bytes, _) in _C.block_formats().items():
        assert _C.gguf_type_geometry(name.upper())[1:] == (block_size, block_bytes)


def test_geometry_of_every_type():
    for kind, (elements, size) in gguf.GGML_QUANT_SIZES.items():
        assert _C.gguf_type_geometry(kind.name) == (kind.value, elements, size)


def test_types_that_are_not_converted():
    for kind, (elements, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name not in (*CONVERTED, "F32"):
            with pytest.raises(BackendUnavailable, match=kind.name):
                _C.gguf_dequantize(kind.name, bytes(size), elements)


@pytest.mark.parametrize(
    ("name", "data", "count", "message"),
    [
        ("Q4_2", bytes(18), 32, "type: expected a ggml type, got 'Q4_2'"),
        ("Q4_0", bytes(18), 31, "num_elements: expected a multiple of 32"),
        ("Q4_0", bytes(17), 32, "data: expected 1 blocks of 18 bytes, got 17"),
        ("Q4_0", bytes(19), 32, "data: expected 1 blocks of 18 bytes, got 19"),
        ("Q4_0", bytes(18), 0, "data: expected 0 blocks"),
        ("F32", bytes(4), 2**62, "num_elements: expected what 4 bytes hold"),
        ("F32", np.zeros((4, 4), np.float32)[:, ::2], 8, "data: expected a C-contiguous buffer"),
    ],
)
def test_dequantize_refuses(name, data, count, message):
    with pytest.raises(ArgumentError, match=message):
        _C.gguf_dequantize(name, data, count)


def test_nothing_to_dequantise():
    assert _C.gguf_dequantize("Q8_0", b"", 0).shape == (0,)


@pytest.mark.parametrize(
    ("metadata", "tensors", "types", "message"),
    [
        ({"general.alignment": 24}, {}, {}, "general.alignment: expected a power of two"),
        ({"general.alignment": 2**17}, {}, {}, "general.alignment: expected a power of two"),
        ({"": 1}, {}, {}, "metadata: expected a name"),
        ({"k" * 65536: 1}, {}, {}, "metadata: expected a name"),
        ({"\ud800": 1}, {}, {}, "metadata: expected names of Unicode"),
        ({"k": None}, {}, {}, "metadata: expected a value that GGUF can hold"),
        ({"k": []}, {}, {}, "metadata: expected a value that GGUF can hold"),
        ({"k": [1, "a"]}, {}, {}, "metadata: expected a value that GGUF can hold"),
        ({"k": [[1], [2]]}, {}, {}, "metadata: expected a value that GGUF can hold"),
        ({"k": 2**64}, {}, {}, "metadata: expected a value that GGUF can hold"),
        ({"k": "\ud800"}, {}, {}, "metadata: expected Unicode text"),
        ({"k": 300}, {}, {"k": "uint8"}, "metadata: expected uint8 for 'k', got 300"),
        ({"k": -1}, {}, {"k": "uint32"}, "metadata: expected uint32 for 'k', got -1"),
        ({"k": 0.5}, {}, {"k": "int32"}, "metadata: expected int32 for 'k', got 0.5"),
        ({"k": "1"}, {}, {"k": "int32"}, "metadata: expected int32 for 'k', got '1'"),
        ({"k": 1}, {}, {"k": "string"}, "metadata: expected text for 'k'"),
        ({"k": [1]}, {}, {"k": "int32"}, "metadata: expected int32 for 'k'"),
        ({"k": 1}, {}, {"k": "array[int32]"}, "metadata: expected array"),
        ({"k": 1}, {}, {"k": "int33"}, "metadata_types: expected a type"),
        ({}, {"n" * 64: np.zeros(1)}, {}, "tensors: expected a name of 1 to 63 bytes"),
        ({}, {"t": np.zeros(1, np.uint8)}, {}, "tensors: expected a dtype"),
        ({}, {"t": np.zeros([1] * 5)}, {}, "tensors: expected at most 4 dimensions"),
        ({}, {"t": GgufTensor(np.zeros(18, np.uint8), "Q4_0", (48,))}, {}, "tensors: expected 18 bytes of Q4_0"),
        ({}, {"t": GgufTensor(np.zeros(17, np.uint8), "Q4_0", (32,))}, {}, "tensors: expected 18 bytes of Q4_0"),
        ({}, {"t": GgufTensor(np.zeros(18, np.uint8), "Q4_9", (32,))}, {}, "type: expected a ggml type"),
    ],
)
def test_writer_refuses(tmp_path, metadata, tensors, types, message):
    with pytest.raises(ArgumentError, match=message):
        write_gguf(tmp_path / "f", metadata, tensors, types)
    assert os.listdir(tmp_path) == []


def test_blocks_that_are_made_when_written(tmp_path):
    """One at a time: the array of a tensor is gone before the next is made."""
    rng = np.random.default_rng(0)
    blocks = {f"t{i}": rng.integers(0, 256, (2, 36), np.uint8) for i in range(4)}
    alive = []

    def make(name):
        assert not any(array() is not None for array in alive)
        made = blocks[name].copy()
        alive.append(weakref.ref(made))
        return made

    tensors = {name: GgufTensor(functools.partial(make, name), "Q4_0", (2, 64)) for name in blocks}
    write_gguf(tmp_path / "made", {"k": 1}, tensors)
    write_gguf(tmp_path / "given", {"k": 1}, {name: GgufTensor(blocks[name], "Q4_0", (2, 64)) for name in blocks})
    assert len(alive) == 4
    assert (tmp_path / "made").read_bytes() == (tmp_path / "given").read_bytes()


@pytest.mark.parametrize("made", [np.zeros(17, np.uint8), np.zeros(18, np.int8), np.zeros((2, 18), np.uint8)])
def test_made_blocks_of_another_size(tmp_path, made):
    with pytest.raises(ArgumentError, match="tensors: expected 18 bytes of Q4_0 for 't'"):
        write_gguf(tmp_path / "f", {}, {"t": GgufTensor(lambda: made, "Q4_0", (32,))})
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_smollm2_against_the_package():
    path = smollm2_gguf()
    theirs = gguf.GGUFReader(path)
    ours = open_gguf(path)
    for key, value in fields_of(theirs).items():
        assert np.array_equal(ours.metadata[key], value), key
    assert set(ours.metadata) == set(fields_of(theirs))
    assert list(ours) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.info(tensor.name)
        assert info.type == tensor.tensor_type.name
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.offset, info.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        np.testing.assert_array_equal(ours[tensor.name], tensor.data)
    by_name = {tensor.name: tensor for tensor in theirs.tensors}
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.13.ffn_down.weight", "blk.29.ffn_up.weight",
                 "output_norm.weight"):  # fmt: skip
        values = ours.dequantize(name)
        expected = quants.dequantize(by_name[name].data, by_name[name].tensor_type)
        assert values.shape == ours.info(name).shape
        assert_same_values(values.reshape(-1), expected.reshape(-1))
