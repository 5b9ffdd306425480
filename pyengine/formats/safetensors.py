"""safetensors files as numpy arrays.

Format: https://github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.formats.atomic import atomic_write

__all__ = ["SafetensorsReader", "SafetensorsTensorInfo", "open_safetensors", "write_safetensors"]

_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The reference library refuses longer headers.
_MAX_HEADER_BYTES = 100_000_000


class SafetensorsTensorInfo(NamedTuple):
    """What the header says of one tensor; `offset` and `num_bytes` in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsReader(Mapping[str, np.ndarray]):
    """Tensor name -> read-only array over the mapped file, made on access, without a copy.

    Names come in the order of the bytes. Types that numpy cannot address (F4, F6_*) come as a flat uint8 array of the
    packed bytes. Arrays keep the file mapped; they need not be aligned to their element size.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file = _C.SafetensorsFile(self.path)
        self._names: dict[str, None] = dict.fromkeys(self._file.names())
        self.metadata: dict[str, str] = self._file.metadata

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        info = self.info(name)
        data = np.frombuffer(self._file.data(name), np.uint8)
        dtype = _DTYPES.get(info.dtype)
        return data if dtype is None else data.view(dtype).reshape(info.shape)

    def info(self, name: str) -> SafetensorsTensorInfo:
        """dtype, shape and place of a tensor. KeyError where there is none of that name."""
        if name not in self._names:
            raise KeyError(name)
        return SafetensorsTensorInfo(*self._file.info(name))

    def data(self, name: str) -> memoryview:
        """The bytes of a tensor, read-only. KeyError where there is none of that name."""
        if name not in self._names:
            raise KeyError(name)
        view: memoryview = self._file.data(name)
        return view


def open_safetensors(path: str | os.PathLike[str]) -> SafetensorsReader:
    """Maps a safetensors file and checks all of its header.

    Raises:
        ModelFileError: the file is missing or breaks a rule of the format.
    """
    return SafetensorsReader(path)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes `path` whole or not at all (see `atomic_write`); `path` may be open for reading.

    Tensors are laid out by falling element size, then name, so that all are aligned; one tensor at a time is copied,
    and only where it is not contiguous.

    Args:
        path: the file to make or replace.
        tensors: name -> array of a dtype the format knows.
        metadata: str -> str, kept in the header.

    Raises:
        ArgumentError: a name, dtype or metadata entry that the format cannot hold.
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {}
    if metadata:
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise ArgumentError(f"metadata: expected str -> str, got {key!r}: {value!r}")
        header["__metadata__"] = dict(metadata)
    for name, tensor in tensors.items():
        if not name or name == "__metadata__" or "\0" in name:
            raise ArgumentError(f"tensors: expected a name without NUL other than '__metadata__', got {name!r}")
        if tensor.dtype.newbyteorder("=") not in _NAMES:
            raise ArgumentError(f"tensors: expected a dtype that safetensors knows for {name!r}, got {tensor.dtype}")
        if tensor.ndim > 8:
            raise ArgumentError(f"tensors: expected at most 8 dimensions for {name!r}, got {tensor.ndim}")
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    offset = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": _NAMES[tensor.dtype.newbyteorder("=")],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ArgumentError(f"tensors: expected names and metadata of Unicode text, got {error.object!r}") from None
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER_BYTES:
        raise ArgumentError(f"tensors: expected a header of at most {_MAX_HEADER_BYTES} bytes, got {len(text)}")
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            tensor = tensors[name]
            native = tensor.astype(tensor.dtype.newbyteorder("="), order="C", copy=False)
            file.write(native.reshape(-1).view(np.uint8).data)
