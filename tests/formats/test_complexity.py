"""The cost of a file, hostile or not, stays in proportion to its size: all files run in a child that may use 1 GB of
address space and 10 s of processor time, where a quadratic search would need minutes."""

import json
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.formats import hostile_gguf, hostile_safetensors
from tests.formats.gguf_builder import F32, STRING, UINT8, GgufFile, array, scalar, tensor

_MEMORY_BYTES = 1 << 30
_CPU_SECONDS = 10

# Prints, for each file: "ok", or the class and text of the exception.
_CHILD = """
import json, sys
from pyengine.formats import open_gguf, open_safetensors
results = []
for path in json.load(sys.stdin):
    try:
        reader = (open_gguf if path.endswith(".gguf") else open_safetensors)(path)
        results.append(["ok", len(reader)])
    except Exception as error:
        results.append([type(error).__name__, str(error)])
json.dump(results, sys.stdout)
"""


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))


def run_limited(paths: list[Path]) -> list[list[object]]:
    # The thread pools of numpy reserve address space for every core.
    environment = {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], input=json.dumps([str(path) for path in paths]), capture_output=True, text=True,
        check=False, preexec_fn=_limit, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def short_name(i: int) -> str:
    """One to three bytes: the shortest distinct names."""
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"
    text = alphabet[i % 64]
    while i >= 64:
        i = i // 64 - 1
        text = alphabet[i % 64] + text
    return text


def gguf_of_keys(count: int) -> bytes:
    return bytes(GgufFile([scalar(short_name(i), UINT8, i % 256) for i in range(count)]))


def gguf_of_tensors(count: int) -> bytes:
    return bytes(GgufFile([], [tensor(short_name(i), [0], F32, 0) for i in range(count)]))


def gguf_of_strings(count: int) -> bytes:
    return bytes(GgufFile([array("tokenizer.ggml.tokens", STRING, [short_name(i) for i in range(count)])]))


def safetensors_of_tensors(count: int) -> bytes:
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return hostile_safetensors.pack("{" + ",".join(f'"{short_name(i)}":{entry}' for i in range(count)) + "}")


def safetensors_of_metadata(count: int) -> bytes:
    return hostile_safetensors.pack(
        '{"__metadata__":{' + ",".join(f'"{short_name(i)}":""' for i in range(count)) + "}}"
    )


@pytest.mark.parametrize("size", [25_000, 50_000, 100_000])
def test_many_short_names(tmp_path, size):
    makers = {"k.gguf": gguf_of_keys, "t.gguf": gguf_of_tensors, "s.gguf": gguf_of_strings,
              "t.safetensors": safetensors_of_tensors}  # fmt: skip
    for name, make in makers.items():
        (tmp_path / name).write_bytes(make(size))
    results = run_limited([tmp_path / name for name in makers])
    assert results == [["ok", 0], ["ok", size], ["ok", 0], ["ok", size]]


def test_a_vocabulary_of_a_million(tmp_path):
    (tmp_path / "v.gguf").write_bytes(gguf_of_strings(1_000_000))
    assert run_limited([tmp_path / "v.gguf"]) == [["ok", 0]]


def test_metadata_entries_are_limited(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(safetensors_of_metadata(65_536))
    (tmp_path / "b.safetensors").write_bytes(safetensors_of_metadata(65_537))
    results = run_limited([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert [result[0] for result in results] == ["ok", "ModelFileError"]
    assert "at most 65536 entries" in results[1][1]


@pytest.mark.slow
def test_largest_header_stays_in_the_limits(tmp_path):
    """A header close to the 100 MB limit that asks for the most tensors, dimensions and offsets it can."""
    entry = '{"dtype":"U8","shape":[1,1,1,1,1,1,1,0],"data_offsets":[0,0]}'
    header = "{" + ",".join(f'"{short_name(i)}":{entry}' for i in range(2**20)) + "}"
    assert 60e6 < len(header) < 100e6
    (tmp_path / "a.safetensors").write_bytes(hostile_safetensors.pack(header))
    (tmp_path / "b.safetensors").write_bytes(hostile_safetensors.pack(header[:-1] + ',"last_tensor":' + entry + "}"))
    # The index takes most of the time and memory of a child, so each file has its own.
    assert run_limited([tmp_path / "a.safetensors"]) == [["ok", 2**20]]
    [[kind, message]] = run_limited([tmp_path / "b.safetensors"])
    assert kind == "ModelFileError"
    assert "at most 1048576 tensors" in message


def test_long_names_with_a_common_stem(tmp_path):
    """The worst input for comparing names: 2,000 keys of 50,000 bytes that differ at the end."""
    stem = "k" * 50_000
    keys = [scalar(stem + short_name(i), UINT8, 0) for i in range(2_000)]
    (tmp_path / "f.gguf").write_bytes(bytes(GgufFile(keys)))
    (tmp_path / "g.gguf").write_bytes(bytes(GgufFile([*keys, keys[7]])))
    first, second = run_limited([tmp_path / "f.gguf", tmp_path / "g.gguf"])
    assert first == ["ok", 0]
    assert second[0] == "ModelFileError"


def test_hostile_files_within_the_limits(tmp_path):
    files = {
        **{f"u{i}.gguf": content for i, (content, loads) in enumerate(hostile_gguf.UPSTREAM.values()) if not loads},
        **{f"b{i}.gguf": content for i, content in enumerate(hostile_gguf.BROKEN.values())},
        **{f"b{i}.safetensors": content for i, content in enumerate(hostile_safetensors.BROKEN.values())},
        "brackets.safetensors": hostile_safetensors.pack("[" * 50_000_000),
        "objects.safetensors": hostile_safetensors.pack('{"a":' * 10_000_000),
        "digits.safetensors": hostile_safetensors.pack('{"t":{"shape":[' + "9" * 50_000_000),
        "escapes.safetensors": hostile_safetensors.pack('{"' + "\\u0041" * 10_000_000),
        "array.gguf": bytes(GgufFile([array("k", UINT8, [], length=2**63)])),
        "strings.gguf": bytes(GgufFile([array("k", STRING, [], length=2**22 + 1)])) + bytes(8 << 22),
        "names.gguf": bytes(GgufFile(num_tensors=10**6)) + b"\xff" * (32 << 20),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    results = run_limited([tmp_path / name for name in files])
    assert {name: result for name, result in zip(files, results, strict=True) if result[0] != "ModelFileError"} == {}


def test_sparse_file_beyond_the_address_space(tmp_path):
    """Where the file cannot even be mapped the error is the typed one too."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with open(path, "r+b") as file:
        file.truncate(8 << 30)
    [[kind, message]] = run_limited([path])
    assert kind == "ModelFileError"
    assert "expected to map 8589934592 bytes" in message
