"""The ledger: chain, damage, crashes, several writers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import blake3
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine import ledger as ledger_module
from pyengine.errors import ArgumentError
from pyengine.ledger import REPAIR, Ledger, LedgerError, content_id, read

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=12,
)


def write_some(folder: Path, count: int = 4) -> bytes:
    with Ledger(folder) as ledger:
        for index in range(count):
            ledger.record(
                "corpus", inputs={"in": content_id(b"%d" % index)}, outputs={}, facts={"index": index, "text": 'é"\n<'}
            )
    return (folder / "ledger.jsonl").read_bytes()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), JSON, max_size=4), max_size=4))
def test_facts_come_back_unchanged(tmp_path_factory: pytest.TempPathFactory, facts: list[dict[str, object]]) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    with Ledger(folder) as ledger:
        ids = [ledger.record("train", facts=item) for item in facts]
    entries = read(folder)
    assert [entry.facts for entry in entries] == facts
    assert [entry.id for entry in entries] == ids


def test_entry_holds_what_it_was_given_and_the_chain(tmp_path: Path) -> None:
    with Ledger(tmp_path / "run") as ledger:
        first = ledger.record("corpus", inputs={"a": content_id(b"a")}, outputs={"b": content_id(b"b")})
        second = ledger.record("train", inputs={"corpus": first}, facts={"loss": np.float32(1.5), "n": np.int64(3)})
        assert ledger.head == second
    entries = read(tmp_path / "run")
    assert [entry.previous for entry in entries] == ["blake3:" + "0" * 64, first]
    assert entries[0].inputs == {"a": "blake3:" + blake3.blake3(b"a").hexdigest()}
    assert entries[1].facts == {"loss": 1.5, "n": 3}
    assert all(entry.time.endswith("Z") and entry.version for entry in entries)


def test_id_is_the_hash_of_the_rest_of_the_line(tmp_path: Path) -> None:
    for line in write_some(tmp_path).splitlines():
        entry_id = json.loads(line)["id"]
        body = line.replace(b'"id":"' + entry_id.encode() + b'",', b"", 1)
        assert entry_id == "blake3:" + blake3.blake3(body).hexdigest()


def test_not_finite_numbers_are_kept_as_words(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.record("train", facts={"a": float("nan"), "b": float("inf"), "c": [-np.inf]})
    assert read(tmp_path)[0].facts == {"a": "NaN", "b": "Infinity", "c": ["-Infinity"]}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kind": "Not a kind"}, "kind"),
        ({"kind": ""}, "kind"),
        ({"kind": "train", "inputs": {"x": "sha256:12"}}, "inputs['x']"),
        ({"kind": "train", "outputs": {"x": "blake3:" + "0" * 63}}, "outputs['x']"),
        ({"kind": "train", "outputs": {"x": "blake3:" + "0" * 64 + "\n"}}, "outputs['x']"),
        ({"kind": "train", "facts": {"x": object()}}, "facts.x"),
        ({"kind": "train", "facts": {"x": {1: 2}}}, "facts.x"),
        ({"kind": "train", "facts": {"x": 1 << 64}}, "facts.x"),
        ({"kind": "train", "facts": {"x": "\ud800"}}, "facts.x"),
        ({"kind": "train", "facts": {"x": np.zeros(2)}}, "facts.x"),
    ],
)
def test_bad_arguments_are_named_and_write_nothing(tmp_path: Path, arguments: dict[str, object], named: str) -> None:
    with Ledger(tmp_path) as ledger, pytest.raises(ArgumentError) as error:
        ledger.record(**arguments)  # type: ignore[arg-type]
    assert str(error.value).startswith(named)
    assert (tmp_path / "ledger.jsonl").read_bytes() == b""


def test_depth_and_length_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep: list[object] = []
    deep.append(deep)
    with Ledger(tmp_path) as ledger:
        with pytest.raises(ArgumentError, match="levels"):
            ledger.record("train", facts={"x": deep})
        monkeypatch.setattr(ledger_module, "MAX_LINE_BYTES", 1000)
        ledger.record("train", facts={"x": "y" * 400})
        with pytest.raises(ArgumentError, match="1000 bytes"):
            ledger.record("train", facts={"x": "y" * 1000})
        ledger.record("train")
    assert len(read(tmp_path)) == 2
    with open(tmp_path / "ledger.jsonl", "ab") as file:
        file.write(b"{" + b" " * 2000 + b"}\n")
    with pytest.raises(LedgerError, match="at most 1000") as error:
        read(tmp_path)
    assert error.value.line == 3


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    whole = write_some(tmp_path, 3)
    path = tmp_path / "ledger.jsonl"
    starts = [0, *(index + 1 for index, byte in enumerate(whole) if byte == ord("\n"))]
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        with pytest.raises(LedgerError) as error:
            read(path)
        line = sum(start <= index for start in starts[:-1])
        assert error.value.line == line


@pytest.mark.parametrize("operation", ["remove", "swap", "repeat", "foreign", "blank"])
def test_lines_out_of_place_are_found(tmp_path: Path, operation: str) -> None:
    lines = write_some(tmp_path / "a", 4).splitlines(keepends=True)
    other = write_some(tmp_path / "b", 4).splitlines(keepends=True)
    changed = {
        "remove": [lines[0], *lines[2:]],
        "swap": [lines[0], lines[2], lines[1], lines[3]],
        "repeat": [lines[0], lines[0], *lines[1:]],
        "foreign": [lines[0], other[1], *lines[2:]],
        "blank": [lines[0], b"\n", *lines[1:]],
    }[operation]
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(changed))
    for action in (read, lambda path: Ledger(path.parent)):
        with pytest.raises(LedgerError) as error:
            action(path)
        assert error.value.line == 2
        assert error.value.path == path
        assert not error.value.torn
    assert path.read_bytes() == b"".join(changed)


def test_lines_cut_from_the_end_are_found_by_head(tmp_path: Path) -> None:
    lines = write_some(tmp_path, 4).splitlines(keepends=True)
    head = read(tmp_path)[-1].id
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(lines[:3]))
    assert len(read(tmp_path)) == 3
    with pytest.raises(LedgerError, match="cut at the end"):
        read(tmp_path, head=head)


def test_a_tail_torn_at_every_byte_loses_no_whole_line(tmp_path: Path) -> None:
    whole = write_some(tmp_path, 3)
    kept = read(tmp_path)
    path = tmp_path / "ledger.jsonl"
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        (tmp_path / "ledger.torn").unlink(missing_ok=True)
        if cut > last:
            with pytest.raises(LedgerError) as error:
                read(tmp_path)
            assert (error.value.line, error.value.torn) == (3, True)
        assert read(tmp_path, allow_torn=True) == kept[:2]
        with Ledger(tmp_path) as ledger:
            repaired = ledger.repaired_line
            ledger.record("train")
        entries = read(tmp_path)
        if cut == last:
            assert repaired is None
            assert entries[:-1] == kept[:2]
        elif cut == len(whole) - 1:
            assert repaired is None
            assert entries[:-1] == kept
        else:
            assert repaired == 3
            assert entries[:2] == kept[:2]
            assert [entry.kind for entry in entries[2:]] == [REPAIR, "train"]
            assert entries[2].facts == {"line": 3, "bytes": cut - last}
            assert (tmp_path / "ledger.torn").read_bytes() == whole[last:cut] + b"\n"


def test_a_failed_write_leaves_the_ledger_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_some(tmp_path, 2)
    real_write = os.write
    calls = []

    def full_disk(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real_write(descriptor, bytes(data)[:10])

    with Ledger(tmp_path) as ledger:
        monkeypatch.setattr(os, "write", full_disk)
        with pytest.raises(OSError, match="No space"):
            ledger.record("train")
        monkeypatch.undo()
        assert (tmp_path / "ledger.jsonl").read_bytes() == whole
        ledger.record("train", facts={"after": True})
    assert [entry.facts.get("after") for entry in read(tmp_path)] == [None, None, True]


def test_every_append_is_synced_before_it_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real_fsync = os.fsync
    with Ledger(tmp_path) as ledger:

        def fsync(descriptor: int) -> None:
            synced.append(os.fstat(descriptor).st_size)
            real_fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        for _ in range(3):
            ledger.record("train")
            assert synced[-1] == (tmp_path / "ledger.jsonl").stat().st_size
    assert len(synced) == 3


APPEND = """
import sys
from pyengine.ledger import Ledger
with Ledger(sys.argv[1]) as ledger:
    for index in range(15):
        ledger.record("train", facts={"name": sys.argv[2], "index": index})
"""


def test_several_processes_share_one_ledger(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", APPEND, str(tmp_path), name]) for name in "abc"]
    for writer in writers:
        assert writer.wait() == 0
    entries = read(tmp_path)
    for name in "abc":
        assert [entry.facts["index"] for entry in entries if entry.facts["name"] == name] == list(range(15))


def test_cut_while_open_is_found(tmp_path: Path) -> None:
    whole = write_some(tmp_path, 2)
    with Ledger(tmp_path) as ledger:
        (tmp_path / "ledger.jsonl").write_bytes(whole[:50])
        with pytest.raises(LedgerError, match="cut while open"):
            ledger.record("train")


def test_closed_ledger_refuses(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.close()
    with pytest.raises(ArgumentError, match="close"):
        ledger.record("train")


def test_content_id_of_bytes_file_and_folder(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_bytes(data)
    assert content_id(tmp_path / "x" / "a") == content_id(data) == "blake3:" + blake3.blake3(data).hexdigest()
    seen = {content_id(tmp_path / "x")}
    (tmp_path / "x" / "b").write_bytes(b"")
    seen.add(content_id(tmp_path / "x"))
    (tmp_path / "x" / "b").rename(tmp_path / "x" / "c")
    seen.add(content_id(tmp_path / "x"))
    (tmp_path / "x" / "d").mkdir()
    assert content_id(tmp_path / "x") in seen
    (tmp_path / "x" / "c").rename(tmp_path / "x" / "d" / "c")
    seen.add(content_id(tmp_path / "x"))
    assert len(seen) == 4
    with pytest.raises(ArgumentError, match="source"):
        content_id(tmp_path / "absent")
    os.mkfifo(tmp_path / "x" / "pipe")
    with pytest.raises(ArgumentError, match="pipe"):
        content_id(tmp_path / "x")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_give_a_ledger_error_or_nothing(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    path.write_bytes(data)
    if data:
        with pytest.raises(LedgerError):
            read(path)
    else:
        assert read(path) == []


def test_nesting_bomb_is_a_ledger_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"facts":' + b"[" * 5_000_000 + b"\n")
    with pytest.raises(LedgerError):
        read(path)


def test_imports_are_light() -> None:
    code = "import sys, pyengine.ledger; print(sorted({'numpy', 'torch', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
