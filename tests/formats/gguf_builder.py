"""GGUF files byte by byte, valid or not: knows nothing of the reader or the writer under test."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
SCALAR_FORMATS = {
    UINT8: "B", INT8: "b", UINT16: "H", INT16: "h", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?",
    UINT64: "Q", INT64: "q", FLOAT64: "d",
}  # fmt: skip
F32, F16, Q4_0, Q4_1, Q8_0, I8, I64 = 0, 1, 2, 3, 8, 24, 27


def text(value: bytes | str, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def entry(key: bytes | str, type_id: int, payload: bytes, key_length: int | None = None) -> bytes:
    return text(key, key_length) + struct.pack("<I", type_id) + payload


def scalar(key: bytes | str, type_id: int, value: Any) -> bytes:
    return entry(key, type_id, struct.pack("<" + SCALAR_FORMATS[type_id], value))


def string(key: bytes | str, value: bytes | str) -> bytes:
    return entry(key, STRING, text(value))


def array(key: bytes | str, type_id: int, values: list[Any], length: int | None = None) -> bytes:
    head = struct.pack("<IQ", type_id, len(values) if length is None else length)
    if type_id == STRING:
        body = b"".join(text(value) for value in values)
    else:
        body = struct.pack(f"<{len(values)}{SCALAR_FORMATS[type_id]}", *values)
    return entry(key, ARRAY, head + body)


def tensor(name: bytes | str, dims: list[int], type_id: int, offset: int, num_dims: int | None = None) -> bytes:
    """`dims` in the order of the file: the row length first."""
    count = len(dims) if num_dims is None else num_dims
    raw_dims = b"".join((dim & (2**64 - 1)).to_bytes(8, "little") for dim in dims)
    return text(name) + struct.pack("<I", count) + raw_dims + struct.pack("<IQ", type_id, offset)


@dataclass
class GgufFile:
    """A whole file; every count and the padding can be made wrong."""

    entries: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    num_tensors: int | None = None
    num_entries: int | None = None
    alignment: int = 32

    def __bytes__(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_entries = len(self.entries) if self.num_entries is None else self.num_entries
        head = self.magic + struct.pack("<IQQ", self.version, num_tensors, num_entries)
        head += b"".join(self.entries) + b"".join(self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.data


def small_valid_file() -> bytes:
    """About 600 bytes with a value of every kind and two tensors; the last one ends at the end of the file."""
    entries = [
        string("general.architecture", "llama"),
        scalar("general.alignment", UINT32, 32),
        scalar("a.bool", BOOL, True),
        scalar("a.float", FLOAT32, 0.5),
        scalar("a.long", INT64, -7),
        array("tokenizer.ggml.tokens", STRING, ["<s>", "a", "é"]),
        array("a.shorts", INT16, [1, -2, 3]),
    ]
    tensors = [tensor("w", [32, 2], Q4_0, 0), tensor("b", [8], F32, 64)]
    data = bytes(range(36)) + bytes(28) + bytes(range(32))
    return bytes(GgufFile(entries, tensors, data))


def middle_valid_file() -> bytes:
    """About 2 kB: every value type, scalar and array, and tensors of several types."""
    samples: dict[int, list[Any]] = {
        BOOL: [True, False, True], FLOAT32: [1.5, -2.0, 3.25], FLOAT64: [0.1, 2.0, -3.0],
        **{kind: [1, 2, 3] for kind in (UINT8, INT8, UINT16, INT16, UINT32, INT32, UINT64, INT64)},
    }  # fmt: skip
    entries = [string("general.name", "näme"), scalar("general.alignment", UINT32, 64)]
    for kind, values in samples.items():
        entries.append(scalar(f"scalar.{kind}", kind, values[0]))
        entries.append(array(f"array.{kind}", kind, values))
    entries.append(array("tokenizer.ggml.tokens", STRING, [f"token{i}" for i in range(10)] + [b"\xff\xfe"]))
    entries.append(array("empty", STRING, []))
    shapes = [("w4", [64, 3], Q4_1, 120), ("w8", [32, 4], Q8_0, 136), ("f", [3, 5], F32, 60), ("z", [4, 0], F32, 0)]
    tensors, data = [], b""
    for name, dims, kind, size in shapes:
        tensors.append(tensor(name, dims, kind, len(data)))
        data += bytes(i % 251 for i in range(size)) + bytes(-size % 64)
    tensors.append(tensor("last", [64], I8, len(data)))
    data += bytes(range(64))
    return bytes(GgufFile(entries, tensors, data, alignment=64))
