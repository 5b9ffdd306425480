"""Hostile GGUF files by name.

`UPSTREAM` holds the 33 cases of tests/test-gguf.cpp of https://github.com/ggml-org/llama.cpp under their names,
`BROKEN` one file for each published parser fault and each limit. All must be refused; `LOADS` are odd, and legal.
"""

from __future__ import annotations

import struct

from tests.formats.gguf_builder import (
    ARRAY,
    BOOL,
    F32,
    FLOAT32,
    I8,
    I64,
    INT32,
    Q4_0,
    Q4_1,
    Q8_0,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    GgufFile,
    array,
    entry,
    scalar,
    string,
    tensor,
    text,
)  # fmt: skip

_ALL_ONES = 2**64 - 1
_KEYS = [string("my_key_0", "value"), scalar("my_key_1", UINT8, 3), array("my_key_2", FLOAT32, [1.0, 2.0])]
# Geometry by the id of the type: elements per block, bytes per block.
QUANTISED = {
    2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84), 11: (256, 110), 12: (256, 144),
    13: (256, 176), 14: (256, 210), 20: (32, 18), 23: (256, 136), 39: (32, 17),
}  # fmt: skip
_TENSORS = [tensor("my_tensor_0", [32, 2], Q8_0, 0), tensor("my_tensor_1", [8, 2], F32, 96)]


def _with_tensors(**changes: object) -> bytes:
    base: dict[str, object] = {"entries": list(_KEYS), "tensors": list(_TENSORS), "data": bytes(160)}
    return bytes(GgufFile(**{**base, **changes}))  # type: ignore[arg-type]


def _alignment(value: int, kind: int = UINT32) -> bytes:
    return scalar("general.alignment", kind, value)


_LONG_NAME = "my_tensor_0_with_a_very_long_name_which_is_longer_than_what_is_allowed_for_ggml_tensors"
_BIG_ROW = 2**33 - 4

# name -> (file, whether it loads)
UPSTREAM: dict[str, tuple[bytes, bool]] = {
    "HEADER_BAD_MAGIC": (bytes(GgufFile(magic=b"FUGG")), False),
    "HEADER_BAD_VERSION_0": (bytes(GgufFile(version=0)), False),
    "HEADER_BAD_VERSION_1": (bytes(GgufFile(version=1)), False),
    "HEADER_BAD_VERSION_FUTURE": (bytes(GgufFile(version=4)), False),
    "HEADER_BAD_N_KV": (bytes(GgufFile(num_entries=_ALL_ONES)), False),
    "HEADER_BAD_N_TENSORS": (bytes(GgufFile(num_tensors=_ALL_ONES)), False),
    "HEADER_EMPTY": (bytes(GgufFile()), True),
    "KV_BAD_KEY_SIZE": (bytes(GgufFile([entry("my_key", UINT8, b"\1", key_length=_ALL_ONES)])), False),
    "KV_EMPTY_KEY": (bytes(GgufFile([scalar("", UINT8, 1), *_KEYS])), False),
    "KV_BAD_TYPE": (bytes(GgufFile([entry("my_key_0", 13, b"\1"), *_KEYS[1:]])), False),
    "KV_DUPLICATE_KEY": (bytes(GgufFile([*_KEYS, scalar("my_key_1", UINT8, 4)])), False),
    "KV_BAD_ALIGN": (bytes(GgufFile([*_KEYS, _alignment(13)])), False),
    "KV_WRONG_TYPE_ALIGN": (bytes(GgufFile([*_KEYS, _alignment(32, INT32)])), False),
    "KV_SUCCESS": (bytes(GgufFile(list(_KEYS))), True),
    "TENSORS_BAD_NAME_SIZE": (_with_tensors(tensors=[tensor(_LONG_NAME, [8], F32, 0)]), False),
    "TENSORS_BAD_N_DIMS": (_with_tensors(tensors=[tensor("my_tensor", [8, 1, 1, 1, 1], F32, 0)]), False),
    "TENSORS_BAD_SHAPE": (_with_tensors(tensors=[tensor("my_tensor", [-1, -1], F32, 0)]), False),
    "TENSORS_ZERO_DIM": (_with_tensors(tensors=[tensor("my_tensor", [8, 0], F32, 0)]), True),
    "TENSORS_NE_TOO_BIG": (_with_tensors(tensors=[tensor("my_tensor", [_BIG_ROW, _BIG_ROW], F32, 0)]), False),
    "TENSORS_NBYTES_TOO_BIG": (_with_tensors(tensors=[tensor("my_tensor", [1534000000] * 2, I64, 0)]), False),
    "TENSORS_BAD_TYPE": (_with_tensors(tensors=[tensor("my_tensor", [8], 42, 0)]), False),
    "TENSORS_BAD_OFFSET": (_with_tensors(tensors=[tensor("my_tensor", [8], F32, _ALL_ONES)]), False),
    "TENSORS_DUPLICATE_NAME": (
        _with_tensors(tensors=[tensor("my_tensor", [8], F32, 0), tensor("my_tensor", [8], F32, 32)]), False
    ),
    "TENSORS_BAD_ALIGN": (_with_tensors(entries=[_alignment(13)]), False),
    "TENSORS_INCONSISTENT_ALIGN": (
        _with_tensors(tensors=[tensor("my_tensor_0", [3], F32, 0), tensor("my_tensor_1", [8], F32, 12)]), False
    ),
    "TENSORS_SUCCESS": (_with_tensors(), True),
    "TENSORS_CUSTOM_ALIGN": (
        _with_tensors(
            entries=[_alignment(1)], alignment=1,
            tensors=[tensor("my_tensor_0", [3], F32, 0), tensor("my_tensor_1", [8], F32, 12)],
        ), True
    ),
    "DATA_NOT_ENOUGH_DATA": (_with_tensors(data=bytes(159)), False),
    "DATA_BAD_ALIGN": (_with_tensors(entries=[_alignment(13)], alignment=13), False),
    "DATA_INCONSISTENT_ALIGN": (
        _with_tensors(alignment=1, tensors=[tensor("a", [3], F32, 0), tensor("b", [8], F32, 12)]), False
    ),
    "DATA_MEM_SIZE_OVERFLOW": (
        _with_tensors(
            tensors=[tensor("a", [2**63 - 64], I8, 0), tensor("b", [2**63 - 64], I8, 2**63 - 64)], data=bytes(32)
        ), False
    ),
    "DATA_SUCCESS": (_with_tensors(data=bytes(i % 256 for i in range(160))), True),
    "DATA_CUSTOM_ALIGN": (
        _with_tensors(
            entries=[_alignment(1)], alignment=1, data=bytes(range(44)),
            tensors=[tensor("my_tensor_0", [3], F32, 0), tensor("my_tensor_1", [8], F32, 12)],
        ), True
    ),
}  # fmt: skip


def _one(dims: list[int], kind: int = F32, offset: int = 0, **changes: object) -> bytes:
    return _with_tensors(tensors=[tensor("t", dims, kind, offset)], **changes)


BROKEN: dict[str, bytes] = {
    "CVE-2024-21802 dims": _one([2**62, 2**62, 4, 4]),
    "CVE-2024-21825 array count times size": bytes(GgufFile([array("k", UINT64, [1], length=2**61)])),
    "CVE-2024-21825 string count times size": bytes(GgufFile([array("k", STRING, ["x"], length=2**61)])),
    "CVE-2024-21836 n_tensors": bytes(GgufFile(num_tensors=2**64 // 88 + 1)),
    "CVE-2024-23605 n_kv": bytes(GgufFile(num_entries=2**64 // 48 + 1)),
    "CVE-2024-23496 key length plus one": bytes(GgufFile([entry("k", UINT8, b"\1", key_length=_ALL_ONES)])),
    "CVE-2024-23496 string length plus one": bytes(GgufFile([entry("k", STRING, text(b"x", _ALL_ONES))])),
    "CVE-2024-23496 name length plus one": _with_tensors(tensors=[text(b"t", _ALL_ONES) + bytes(20)]),
    "CVE-2024-32878 broken second entry": bytes(GgufFile([_KEYS[0], entry("k", 99, b"")])),
    "CVE-2024-41130 no name": _with_tensors(tensors=[tensor("", [8], F32, 0)]),
    "CVE-2025-53630 size sum": _with_tensors(
        tensors=[tensor(f"t{i}", [2**62], I8, i * 2**62) for i in range(4)] + [tensor("last", [64], I8, 0)]
    ),
    "CVE-2026-27940 size sum plus overhead": _with_tensors(
        tensors=[tensor("a", [2**63 - 32], I8, 0), tensor("b", [2**63 - 1024], I8, 2**63 - 32)]
    ),
    **{
        f"CVE-2026-33298 bytes of type {kind}": _one([(2**63 // size + 1) * block, 2], kind)
        for kind, (block, size) in QUANTISED.items()
        if (2**63 // size + 1) * block < 2**64
    },
    "padding wraps to zero": _one([2**64 - 4], I8),
    "padding wraps below 2^63": _one([2**63 - 1], I8),
    "alignment 2^31": _with_tensors(entries=[_alignment(2**31)]),
    "alignment above 64 KiB": _one([8], entries=[_alignment(2**17)], alignment=2**17),
    "alignment 0": _with_tensors(entries=[_alignment(0)]),
    "alignment 24": _with_tensors(entries=[_alignment(24)]),
    "alignment uint64": _with_tensors(entries=[_alignment(32, UINT64)]),
    "alignment array": _with_tensors(entries=[array("general.alignment", UINT32, [32])]),
    "alignment string": _with_tensors(entries=[string("general.alignment", "\x20\0\0\0")]),
    "43-byte file, array of 2^63": bytes(GgufFile([array("k", UINT8, [], length=2**63)], alignment=1)),
    "array of arrays": bytes(
        GgufFile([entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQB", UINT8, 1, 7))])
    ),
    "deep arrays": bytes(GgufFile([entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 10_000)])),
    "array of unknown type": bytes(GgufFile([entry("k", ARRAY, struct.pack("<IQB", 13, 1, 7))])),
    "type 2^32 - 1": bytes(GgufFile([entry("k", 2**32 - 1, b"\1")])),
    "bool 2": bytes(GgufFile([entry("k", BOOL, b"\2")])),
    "bool array with 255": bytes(GgufFile([entry("k", ARRAY, struct.pack("<IQ", BOOL, 3) + b"\0\1\xff")])),
    "key with NUL": bytes(GgufFile([scalar("a\0b", UINT8, 1)])),
    "key of bytes": bytes(GgufFile([scalar(b"\xff", UINT8, 1)])),
    "key of 65536 bytes": bytes(GgufFile([scalar("k" * 65536, UINT8, 1)])),
    "text of bytes": bytes(GgufFile([string("general.name", b"a\xff")])),
    "text of half a character": bytes(GgufFile([string("general.name", "é".encode()[:1])])),
    "text of a surrogate": bytes(GgufFile([string("general.name", b"\xed\xa0\x80")])),
    "text overlong": bytes(GgufFile([string("general.name", b"\xc0\x80")])),
    "text beyond Unicode": bytes(GgufFile([string("general.name", b"\xf4\x90\x80\x80")])),
    "texts of bytes": bytes(GgufFile([array("general.tags", STRING, ["ok", b"\xff"])])),
    "name with NUL": _with_tensors(tensors=[tensor("a\0b", [8], F32, 0)]),
    "name of bytes": _with_tensors(tensors=[tensor(b"\xff", [8], F32, 0)]),
    "name of 64 bytes": _with_tensors(tensors=[tensor("n" * 64, [8], F32, 0)]),
    "n_dims 2^32 - 1": _with_tensors(tensors=[tensor("t", [8], F32, 0, num_dims=2**32 - 1)]),
    "zero hides a product": _one([2**62, 0, 2**62]),
    **{f"withdrawn type {kind}": _one([256], kind) for kind in (4, 5, 31, 32, 33, 36, 37, 38)},
    **{f"unknown type {kind}": _one([256], kind) for kind in (42, 255, 2**31, 2**32 - 1)},
    **{f"half a block of type {kind}": _one([block // 2 * 3, 2], kind) for kind, (block, _) in QUANTISED.items()},
    "scalar of a block type": _one([], Q4_0),
    "offset 2^64 - 32": _one([8], F32, 2**64 - 32),
    "offset into the header": _with_tensors(tensors=[tensor("t", [8], F32, 2**64 - 64)]),
    "first tensor not at 0": _one([8], F32, 32),
    "overlap": _with_tensors(tensors=[tensor("a", [8], F32, 0), tensor("b", [8], F32, 0)]),
    "hole": _with_tensors(tensors=[tensor("a", [8], F32, 0), tensor("b", [8], F32, 64)]),
    "swapped": _with_tensors(tensors=[tensor("a", [8], F32, 32), tensor("b", [8], F32, 0)]),
    "data of another size": _with_tensors(tensors=[tensor("a", [32, 2], Q4_1, 0)], data=bytes(39)),
    "no data": _with_tensors(data=b""),
    "no padding before the data": bytes(GgufFile(_KEYS, [tensor("t", [8, 0], F32, 0)], alignment=1)),
    "one tensor too many": _with_tensors(num_tensors=3),
    "one entry too many": _with_tensors(num_entries=4),
    "one entry too few": _with_tensors(num_entries=2),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "big-endian magic": b"FUGG" + struct.pack(">IQQ", 3, 0, 0),
    "version 2^32 - 1": bytes(GgufFile(version=2**32 - 1)),
    "only magic": b"GGUF",
    "text file": b"# a readme\n" * 20,
    "zeros": bytes(4096),
    "a zip": b"PK\3\4" + bytes(100),
}

LOADS: dict[str, bytes] = {
    "version 2": _with_tensors(version=2),
    "bytes after the data": _with_tensors(data=bytes(200)),
    "no padding after the last tensor": _with_tensors(tensors=[tensor("t", [3], F32, 0)], data=bytes(12)),
    "rank 0": _one([], F32),
    "key of 65535 bytes": bytes(GgufFile([scalar("k" * 65535, UINT8, 1)])),
    "name of 63 bytes": _with_tensors(tensors=[tensor("n" * 63, [8], F32, 0)]),
    "alignment 64 KiB": _with_tensors(entries=[_alignment(65536)], alignment=65536, tensors=[tensor("t", [8], F32, 0)]),
    "vocabulary of bytes": bytes(GgufFile([array("tokenizer.ggml.tokens", STRING, [b"\xff", "<0x-1>", b""])])),
    "scores of bytes": bytes(GgufFile([array("tokenizer.ggml.scores", UINT8, [1, 2, 3])])),
    "layer index beyond 32 bits": _with_tensors(tensors=[tensor("blk.99999999999.weight", [8], F32, 0)]),
    "text with NUL": bytes(GgufFile([string("general.name", "a\0b")])),
    "empty text": bytes(GgufFile([string("general.name", "")])),
    "empty arrays": bytes(GgufFile([array(f"k{kind}", kind, []) for kind in (*range(9), 10, 11, 12)])),
}

# The field that the error must name, by the beginning of the name of the case.
_FIELDS: dict[str, tuple[str, ...]] = {
    "magic": ("HEADER_BAD_MAGIC", "big-endian magic", "text file", "zeros", "a zip"),
    "version": ("HEADER_BAD_VERSION", "big-endian", "version 2^32", "only magic"),
    "n_tensors": ("HEADER_BAD_N_TENSORS", "CVE-2024-21836"),
    "n_kv": ("HEADER_BAD_N_KV", "CVE-2024-23605"),
    "metadata[0].key": ("KV_BAD_KEY_SIZE", "KV_EMPTY_KEY", "CVE-2024-23496 key", "key "),
    "metadata": ("KV_DUPLICATE_KEY",),
    "my_key_0.type": ("KV_BAD_TYPE",),
    "k.type": ("CVE-2024-32878", "type 2^32"),
    "k.element_type": ("array of unknown type",),
    "k.length": ("CVE-2024-21825", "43-byte file"),
    "k[0]": ("CVE-2024-23496 string",),
    "k": ("array of arrays", "deep arrays", "bool"),
    "general.alignment": ("KV_BAD_ALIGN", "KV_WRONG_TYPE_ALIGN", "TENSORS_BAD_ALIGN", "DATA_BAD_ALIGN", "alignment"),
    "general.name[0]": ("text ",),
    "general.tags[1]": ("texts of bytes",),
    "tensors[0].name": (
        "TENSORS_BAD_NAME_SIZE", "CVE-2024-23496 name", "CVE-2024-41130", "name ", "one entry too many",
    ),
    "tensors[2].name": ("one tensor too many",),
    "tensors": ("TENSORS_DUPLICATE_NAME",),
    "my_tensor.n_dims": ("TENSORS_BAD_N_DIMS",),
    "my_tensor.shape": ("TENSORS_BAD_SHAPE", "TENSORS_NE_TOO_BIG", "TENSORS_NBYTES_TOO_BIG"),
    "my_tensor.type": ("TENSORS_BAD_TYPE",),
    "my_tensor.offset": ("TENSORS_BAD_OFFSET",),
    "my_tensor_0.offset": ("no data",),
    "my_tensor_1.offset": ("TENSORS_INCONSISTENT_ALIGN", "DATA_NOT_ENOUGH_DATA"),
    "my_key_2.n_dims": ("one entry too few",),
    "t.n_dims": ("n_dims",),
    "t.shape": (
        "CVE-2024-21802", "CVE-2026-33298", "padding wraps to zero", "zero hides", "half a block", "scalar of a block",
    ),
    "t.type": ("withdrawn type", "unknown type"),
    "t.offset": ("padding wraps below", "offset", "first tensor", "no padding"),
    "t0.offset": ("CVE-2025-53630",),
    "a.offset": ("DATA_MEM_SIZE_OVERFLOW", "CVE-2026-27940", "swapped", "data of another size"),
    "b.offset": ("DATA_INCONSISTENT_ALIGN", "overlap", "hole"),
}  # fmt: skip


def field_of(name: str) -> str:
    """The field of the longest beginning that fits."""
    return max((len(begin), field) for field, begins in _FIELDS.items() for begin in begins if name.startswith(begin))[
        1
    ]
