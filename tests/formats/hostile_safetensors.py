"""Hostile safetensors files by name: each rule of the format from both sides."""

from __future__ import annotations

import json
import struct
from typing import Any


def pack(header: bytes | str | dict[str, Any], data: bytes = b"", size: int | None = None) -> bytes:
    """A file; `size` replaces the true length of the header."""
    raw = json.dumps(header).encode() if isinstance(header, dict) else header
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


def info(dtype: str = "F32", shape: list[Any] | None = None, begin: Any = 0, end: Any = 16) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [2, 2] if shape is None else shape, "data_offsets": [begin, end]}


def one(**changes: Any) -> bytes:
    return pack({"t": info(**changes)}, bytes(16))


def raw_number(text: str) -> bytes:
    return pack('{"t":{"dtype":"F32","shape":[' + text + '],"data_offsets":[0,4]}}', bytes(4))


def named(name: str | bytes) -> bytes:
    """A file of one tensor whose name is spelt in JSON as given."""
    raw = name.encode() if isinstance(name, str) else name
    return pack(b'{"' + raw + b'":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4))


VALID = pack({"__metadata__": {"format": "pt"}, "a": info(), "b": info("U8", [3], 16, 19)}, bytes(range(19)))
_ENTRY = '"t":{"dtype":"F32","shape":[],"data_offsets":[0,4]}'

BROKEN: dict[str, bytes] = {
    # The length of the header.
    "no length": b"\x02\0\0\0\0\0\0",
    "length beyond the file": pack("{}", size=3),
    "length 2^64 - 1": pack("{}", size=2**64 - 1),
    "length 2^63": pack("{}", size=2**63),
    "length 2^64 - 8": pack("{}", size=2**64 - 8),
    "length 100,000,001": pack("{}", size=100_000_001),
    "length 0": pack(""),
    # The text of the header.
    "array at the top": pack("[]"),
    "number at the top": pack("1"),
    "null at the top": pack("null"),
    "space first": pack(" {}"),
    "byte order mark": pack(b"\xef\xbb\xbf{}"),
    "not UTF-8": named(b"\xff"),
    "UTF-16": pack("{}".encode("utf-16-le")),
    "text after the object": pack("{} {}"),
    "NUL padding": pack("{}\0\0"),
    "open object": pack("{"),
    "open string": pack('{"t'),
    "comma last": pack("{" + _ENTRY + ",}", bytes(4)),
    "comma twice": pack("{" + _ENTRY + ",,}", bytes(4)),
    "no comma": pack('{"__metadata__":{}' + _ENTRY + "}", bytes(4)),
    "single quotes": pack("{'t':1}"),
    "comment": pack("{/**/}"),
    "10,000 brackets": pack("[" * 10_000),
    "10,000 objects": pack('{"a":' * 10_000),
    "10,000 brackets in a shape": pack('{"t":{"dtype":"F32","shape":' + "[" * 10_000),
    "control character in a name": named("a\nb"),
    "bad escape": named("a\\x"),
    "short escape": named("\\u12"),
    "signed escape": named("\\u+123"),
    "lone high surrogate": named("\\ud800"),
    "lone low surrogate": named("\\udc00"),
    "high surrogate and letter": named("\\ud800\\u0041"),
    "two high surrogates": named("\\ud800\\ud800"),
    # Metadata.
    "metadata of a number": pack('{"__metadata__":{"a":1}}'),
    "metadata of null": pack('{"__metadata__":{"a":null}}'),
    "metadata of objects": pack('{"__metadata__":{"a":{}}}'),
    "metadata null": pack('{"__metadata__":null}'),
    "metadata array": pack('{"__metadata__":[]}'),
    "metadata twice": pack('{"__metadata__":{},"__metadata__":{}}'),
    "metadata key twice": pack('{"__metadata__":{"a":"1","a":"2"}}'),
    "metadata key twice by escape": pack('{"__metadata__":{"a":"1","\\u0061":"2"}}'),
    # Tensor entries.
    "name twice": pack("{" + _ENTRY + "," + _ENTRY + "}", bytes(4)),
    "empty name": named(""),
    "name with NUL": named("a\\u0000"),
    "tensor of a number": pack('{"t":1}'),
    "tensor null": pack('{"t":null}'),
    "no dtype": pack('{"t":{"shape":[],"data_offsets":[0,4]}}', bytes(4)),
    "no shape": pack('{"t":{"dtype":"F32","data_offsets":[0,4]}}', bytes(4)),
    "no offsets": pack('{"t":{"dtype":"F32","shape":[]}}', bytes(4)),
    "dtype twice": pack('{"t":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4)),
    "shape twice": pack('{"t":{"dtype":"F32","shape":[],"shape":[],"data_offsets":[0,4]}}', bytes(4)),
    "offsets twice": pack('{"t":{"dtype":"F32","shape":[],"data_offsets":[0,4],"data_offsets":[0,4]}}', bytes(4)),
    "another field": pack('{"t":{"dtype":"F32","shape":[],"data_offsets":[0,4],"x":1}}', bytes(4)),
    "unknown dtype": one(dtype="F33"),
    "lower-case dtype": one(dtype="f32"),
    "dtype of a number": one(dtype=1),  # type: ignore[arg-type]
    # Numbers.
    "negative dimension": one(shape=[-2, -2]),
    "minus zero": raw_number("-0"),
    "fraction": raw_number("1.0"),
    "exponent": raw_number("1e0"),
    "1e400": raw_number("1e400"),
    "leading zero": raw_number("01"),
    "plus": raw_number("+1"),
    "hexadecimal": raw_number("0x1"),
    "NaN": raw_number("NaN"),
    "true": raw_number("true"),
    "string for a number": raw_number('"1"'),
    "2^64": raw_number(str(2**64)),
    "2^64 + 1": raw_number(str(2**64 + 1)),
    "10^5000": raw_number("1" + "0" * 5000),
    # Sizes.
    "product 2^64": one(shape=[2**32, 2**32]),
    "product wraps to the size": one(shape=[2**63 + 2, 2]),
    "bits of 2^61": one(shape=[2**58, 1], end=2**60),
    "zero hides a product": one(shape=[2**62, 0, 2**62], end=0),
    "9 dimensions": one(shape=[1] * 8 + [4]),
    "one byte short": one(end=15),
    "one byte long": one(end=17),
    "half a byte": pack({"t": info("F4", [3], 0, 1)}, bytes(1)),
    "six bits": pack({"t": info("F6_E2M3", [1], 0, 1)}, bytes(1)),
    # Offsets.
    "end before begin": one(begin=16, end=0),
    "one offset": pack('{"t":{"dtype":"F32","shape":[],"data_offsets":[0]}}', bytes(4)),
    "three offsets": pack('{"t":{"dtype":"F32","shape":[],"data_offsets":[0,4,4]}}', bytes(4)),
    "begin 2^64 - 16": one(begin=2**64 - 16, end=2**64 - 1),
    "offsets wrap": one(begin=2**64 - 8, end=8),
    "data beyond the file": pack({"t": info()}, bytes(15)),
    "data after the tensors": pack({"t": info()}, bytes(17)),
    "data without tensors": pack("{}", b"x"),
    "hole first": pack({"t": info(begin=4, end=20)}, bytes(20)),
    "hole between": pack({"a": info(), "b": info(begin=20, end=36)}, bytes(36)),
    "overlap": pack({"a": info(), "b": info(begin=12, end=28)}, bytes(28)),
    "same bytes twice": pack({"a": info(), "b": info()}, bytes(16)),
    "empty tensor inside another": pack({"a": info(), "b": info("U8", [0], 8, 8)}, bytes(16)),
    "empty tensor beyond the end": pack({"a": info(), "b": info("U8", [0], 17, 17)}, bytes(16)),
    "a GGUF file": b"GGUF\3\0\0\0" + bytes(16),
    "a pickle": b"\x80\x02}q\x00." + bytes(20),
    "zeros": bytes(4096),
}

LOADS: dict[str, bytes] = {
    "no tensors": pack("{}"),
    "valid": VALID,
    "padded with spaces": pack("{}      "),
    "spaces everywhere": pack('{ "t" : { "dtype" : "F32" ,\n\t"shape" : [ 1 ] , "data_offsets" : [0,4] } }', bytes(4)),
    "rank 0": pack({"t": info("F32", [], 0, 4)}, bytes(4)),
    "zero size": pack({"t": info("F32", [0, 3], 0, 0)}),
    "zero sizes around data": pack(
        {"z": info("U8", [0], 16, 16), "t": info(), "a": info("U8", [0], 0, 0)}, bytes(16)
    ),
    "8 dimensions": one(shape=[1] * 7 + [4]),
    "order of the header is not the order of the bytes": pack({"b": info(begin=16, end=32), "a": info()}, bytes(32)),
    "whole bytes of half bytes": pack({"t": info("F4", [4], 0, 2)}, bytes(2)),
    "four times six bits": pack({"t": info("F6_E3M2", [4], 0, 3)}, bytes(3)),
    "not aligned": pack({"a": info("U8", [1], 0, 1), "t": info(begin=1, end=17)}, bytes(17)),
    "name of escapes": named('\\u00e9\\ud83d\\ude00\\"\\\\\\/\\b\\f\\n\\r\\t'),
    "metadata empty": pack('{"__metadata__":{}}'),
    "metadata with NUL": pack('{"__metadata__":{"a":"\\u0000"}}'),
    **{
        f"dtype {name}": pack({"t": info(name, [8], 0, bits)}, bytes(bits))
        for name, bits in {
            "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
            "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
            "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
        }.items()
    },
}  # fmt: skip
