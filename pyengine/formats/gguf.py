"""GGUF files as numpy arrays.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Shapes are in the order of numpy and Hugging Face,
[out, in], the reverse of what the file holds.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.formats.atomic import atomic_write

__all__ = ["GgufReader", "GgufTensor", "GgufTensorInfo", "open_gguf", "write_gguf"]

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_STRING_TYPE = 8
_ARRAY_TYPE = 9
_VALUE_TYPES: dict[str, tuple[int, np.dtype[Any]]] = {
    "uint8": (0, np.dtype(np.uint8)),
    "int8": (1, np.dtype(np.int8)),
    "uint16": (2, np.dtype(np.uint16)),
    "int16": (3, np.dtype(np.int16)),
    "uint32": (4, np.dtype(np.uint32)),
    "int32": (5, np.dtype(np.int32)),
    "float32": (6, np.dtype(np.float32)),
    "bool": (7, np.dtype(np.bool_)),
    "uint64": (10, np.dtype(np.uint64)),
    "int64": (11, np.dtype(np.int64)),
    "float64": (12, np.dtype(np.float64)),
}
# Pieces of a vocabulary can split a character; everything else is text.
_RAW_BYTES_KEYS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.added_tokens")
_MAX_ALIGNMENT = 65536
_MAX_NAME_BYTES = 63
_MAX_KEY_BYTES = 65535
_MAX_DIMS = 4


class GgufTensorInfo(NamedTuple):
    """What the file says of one tensor: type name, shape in elements, place in the file."""

    type: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write that is already in blocks.

    Attributes:
        data: uint8, the blocks of all rows in order, any shape; or a function that makes them, which `write_gguf` calls
            when it comes to the tensor, so that one tensor at a time is in memory.
        type: a ggml type, such as "Q4_1".
        shape: in elements, [out, in].
    """

    data: npt.NDArray[np.uint8] | Callable[[], npt.NDArray[np.uint8]]
    type: str
    shape: tuple[int, ...]


class GgufReader(Mapping[str, np.ndarray]):
    """Tensor name -> read-only array over the mapped file, made on access, without a copy.

    Quantised types come as uint8 [..., row_bytes]. Names come in the order of the file. Arrays keep the file mapped; a
    file with an alignment below the element size gives arrays that are not aligned.

    Attributes:
        path: the file.
        version: 2 or 3.
        alignment: of tensor data, in bytes.
        metadata: key -> int, float, bool, str, list[str], or an array for a list of numbers. Vocabulary entries that
            are no UTF-8 carry their bytes as surrogate escapes.
        metadata_types: key -> "uint32", "array[string]", ...: the types that `metadata` does not show.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file = _C.GgufFile(self.path)
        self._names: dict[str, None] = dict.fromkeys(self._file.names())
        self.version: int = self._file.version
        self.alignment: int = self._file.alignment
        self.metadata_types: dict[str, str] = self._file.metadata_types
        self.metadata: dict[str, Any] = {
            key: np.asarray(value) if isinstance(value, memoryview) else value
            for key, value in self._file.metadata.items()
        }

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        info = self.info(name)
        data = np.frombuffer(self._file.data(name), np.uint8)
        dtype = _DTYPES.get(info.type)
        if dtype is not None:
            return data.view(dtype).reshape(info.shape)
        _, block_elements, block_bytes = _C.gguf_type_geometry(info.type)
        return data.reshape(*info.shape[:-1], info.shape[-1] // block_elements * block_bytes)

    def info(self, name: str) -> GgufTensorInfo:
        """Type, shape and place of a tensor. KeyError where there is none of that name."""
        if name not in self._names:
            raise KeyError(name)
        return GgufTensorInfo(*self._file.info(name))

    def data(self, name: str) -> memoryview:
        """The bytes of a tensor, read-only. KeyError where there is none of that name."""
        if name not in self._names:
            raise KeyError(name)
        view: memoryview = self._file.data(name)
        return view

    def dequantize(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor as a new float32 array of its shape.

        Raises:
            KeyError: there is no tensor of that name.
            BackendUnavailable: the type is other than F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.
        """
        info = self.info(name)
        num_elements = int(np.prod(info.shape, dtype=object))
        values: npt.NDArray[np.float32] = _C.gguf_dequantize(info.type, self._file.data(name), num_elements)
        return values.reshape(info.shape)


def open_gguf(path: str | os.PathLike[str]) -> GgufReader:
    """Maps a GGUF file and checks everything before the tensor data.

    Raises:
        ModelFileError: the file is missing or breaks a rule of the format.
    """
    return GgufReader(path)


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, npt.NDArray[Any] | GgufTensor],
    metadata_types: Mapping[str, str] | None = None,
) -> None:
    """Writes GGUF version 3 to `path`, whole or not at all (see `atomic_write`); `path` may be open for reading.

    Args:
        path: the file to make or replace.
        metadata: key -> bool, int, float, str, numpy scalar, numpy array, or a list or tuple of one of these kinds.
            Without an entry in `metadata_types` an int becomes uint32, or the first of int32, uint64 and int64 that
            holds it; a list of ints int32, int64 or uint64; a float float32; numpy values keep their type. Surrogate
            escapes stand for raw bytes in `tokenizer.ggml.tokens` and the like only. `general.alignment` is obeyed.
        tensors: name -> array (float16/32/64, bfloat16, int8 to int64) or GgufTensor.
        metadata_types: key -> type, in the words of `GgufReader.metadata_types`.

    Raises:
        ArgumentError: a name, type, shape or value that the format cannot hold.
        OSError: the file cannot be written.
    """
    alignment = int(metadata.get("general.alignment", 32))
    if not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ArgumentError(f"general.alignment: expected a power of two up to {_MAX_ALIGNMENT}, got {alignment}")
    types = {**(metadata_types or {}), "general.alignment": "uint32"}
    header = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        header.append(_pack_name("metadata", key, _MAX_KEY_BYTES))
        header.append(_pack_value(key, value, types.get(key)))
    sizes: list[int] = []
    offset = 0
    for name, tensor in tensors.items():
        type_id, shape, num_bytes = _describe(name, tensor)
        header.append(_pack_name("tensors", name, _MAX_NAME_BYTES))
        header.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), type_id, offset))
        sizes.append(num_bytes)
        offset += num_bytes + -num_bytes % alignment
    with atomic_write(path) as file:
        size = 0
        for part in header:
            size += file.write(part)
        file.write(bytes(-size % alignment))
        for (name, tensor), num_bytes in zip(tensors.items(), sizes, strict=True):
            file.write(_tensor_bytes(name, tensor, num_bytes).data)
            file.write(bytes(-num_bytes % alignment))


def _pack_text(text: str, errors: str) -> bytes:
    raw = text.encode("utf-8", errors)
    return struct.pack("<Q", len(raw)) + raw


def _pack_name(argument: str, name: str, max_bytes: int) -> bytes:
    try:
        raw = name.encode("utf-8")
    except UnicodeEncodeError:
        raise ArgumentError(f"{argument}: expected names of Unicode text, got {name!r}") from None
    if not raw or b"\0" in raw or len(raw) > max_bytes:
        raise ArgumentError(f"{argument}: expected a name of 1 to {max_bytes} bytes without NUL, got {name!r}")
    return struct.pack("<Q", len(raw)) + raw


def _integer_type(low: int, high: int, candidates: tuple[str, ...]) -> str | None:
    for name in candidates:
        limits = np.iinfo(_VALUE_TYPES[name][1])
        if limits.min <= low and high <= limits.max:
            return name
    return None


def _infer_type(value: Any) -> str | None:
    """The type of `value` in the words of `metadata_types`, or None where there is none."""
    if isinstance(value, str):
        return "string"
    if isinstance(value, (np.ndarray, np.generic)):
        names = {dtype: name for name, (_, dtype) in _VALUE_TYPES.items()}
        element = names.get(value.dtype.newbyteorder("="))
        if element is None or value.ndim > 1:
            return None
        return element if value.ndim == 0 else f"array[{element}]"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return _integer_type(value, value, ("uint32", "int32", "uint64", "int64"))
    if isinstance(value, float):
        return "float32"
    if isinstance(value, (list, tuple)) and value:
        for kind, name in ((str, "string"), (bool, "bool")):
            if all(isinstance(item, kind) for item in value):
                return f"array[{name}]"
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            element = _integer_type(min(value), max(value), ("int32", "int64", "uint64"))
            return element and f"array[{element}]"
        if all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in value):
            return "array[float32]"
    return None


def _pack_value(key: str, value: Any, wanted: str | None) -> bytes:
    name = wanted or _infer_type(value)
    if name is None:
        raise ArgumentError(f"metadata: expected a value that GGUF can hold for {key!r}, got {value!r:.100}")
    is_array = name.startswith("array[") and name.endswith("]")
    element = name[len("array[") : -1] if is_array else name
    if element == "string":
        texts = value if is_array else [value]
        if not all(isinstance(text, str) for text in texts):
            raise ArgumentError(f"metadata: expected text for {key!r}, got {value!r:.100}")
        type_id, count = _STRING_TYPE, len(texts)
        errors = "surrogateescape" if is_array and key in _RAW_BYTES_KEYS else "strict"
        try:
            payload = b"".join(_pack_text(text, errors) for text in texts)
        except UnicodeEncodeError:
            raise ArgumentError(f"metadata: expected Unicode text for {key!r}, got {value!r:.100}") from None
    elif element in _VALUE_TYPES:
        type_id, dtype = _VALUE_TYPES[element]
        numbers = _as_numbers(key, value, name, dtype)
        if numbers.ndim != int(is_array):
            raise ArgumentError(f"metadata: expected {name} for {key!r}, got {value!r:.100}")
        count, payload = numbers.size, numbers.tobytes()
    else:
        raise ArgumentError(f"metadata_types: expected a type such as 'uint32' or 'array[string]', got {name!r}")
    if is_array:
        return struct.pack("<IIQ", _ARRAY_TYPE, type_id, count) + payload
    return struct.pack("<I", type_id) + payload


def _as_numbers(key: str, value: Any, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    try:
        given = np.asarray(value)
        # An empty list is float64 to numpy.
        numbers = given.astype(dtype) if given.size == 0 else np.asarray(value, dtype)
    except (OverflowError, TypeError, ValueError):
        raise ArgumentError(f"metadata: expected {name} for {key!r}, got {value!r:.100}") from None
    if dtype.kind in "iub" and not np.array_equal(numbers, given):
        raise ArgumentError(f"metadata: expected {name} for {key!r}, got {value!r:.100}")
    return numbers


def _describe(name: str, tensor: npt.NDArray[Any] | GgufTensor) -> tuple[int, tuple[int, ...], int]:
    """Type id, shape in elements and number of bytes."""
    if isinstance(tensor, GgufTensor):
        type_id, block_elements, block_bytes = _C.gguf_type_geometry(tensor.type)
        shape = tuple(int(size) for size in tensor.shape)
        num_bytes = int(np.prod(shape, dtype=object)) // block_elements * block_bytes
        row = shape[-1] if shape else 1
        if row % block_elements or min(shape, default=0) < 0:
            raise ArgumentError(
                f"tensors: expected {num_bytes} bytes of {tensor.type} for {name!r} in rows of a multiple of "
                f"{block_elements}, got shape {shape}"
            )
        if not callable(tensor.data):
            _check_blocks(name, tensor, tensor.data, num_bytes)
    else:
        dtype = tensor.dtype.newbyteorder("=")
        if dtype not in _NAMES:
            raise ArgumentError(f"tensors: expected a dtype that GGUF knows for {name!r}, got {tensor.dtype}")
        type_id = _C.gguf_type_geometry(_NAMES[dtype])[0]
        shape, num_bytes = tensor.shape, tensor.nbytes
    if len(shape) > _MAX_DIMS:
        raise ArgumentError(f"tensors: expected at most {_MAX_DIMS} dimensions for {name!r}, got {len(shape)}")
    return type_id, shape, num_bytes


def _check_blocks(name: str, tensor: GgufTensor, data: npt.NDArray[Any], num_bytes: int) -> None:
    if data.dtype != np.uint8 or data.nbytes != num_bytes:
        raise ArgumentError(
            f"tensors: expected {num_bytes} bytes of {tensor.type} for {name!r} of shape {tuple(tensor.shape)}, "
            f"got {data.dtype} {data.shape}"
        )


def _tensor_bytes(name: str, tensor: npt.NDArray[Any] | GgufTensor, num_bytes: int) -> npt.NDArray[np.uint8]:
    """The bytes as the file holds them, flat."""
    if not isinstance(tensor, GgufTensor):
        return tensor.astype(tensor.dtype.newbyteorder("="), order="C", copy=False).reshape(-1).view(np.uint8)
    data = tensor.data
    if callable(data):
        data = data()
        _check_blocks(name, tensor, data, num_bytes)
    return np.ascontiguousarray(data).reshape(-1)
