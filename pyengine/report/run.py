"""What a run left behind: its verified ledger and the metrics files that the ledger names."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import msgspec

from pyengine import ledger
from pyengine.ledger import Entry
from pyengine.report import facts

MAX_METRICS_BYTES = 1 << 30
MAX_LINE_BYTES = 1 << 20
MAX_CURVES = 64

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Metrics(msgspec.Struct):
    """Curves of one training stage. `curves[name]` is a list of (step, value); a value may be not finite.

    `state` says how the file compares with the hash in the ledger: "verified", "not verified" (no hash is there),
    "changed" or "missing". `notes` tell what could not be read.
    """

    state: str
    curves: dict[str, list[tuple[float, float]]] = {}
    notes: list[str] = []


class Run(msgspec.Struct):
    """Entries in ledger order. `torn` is True if an unfinished last line was left out."""

    folder: Path
    entries: list[Entry]
    torn: bool

    def of(self, kind: str) -> list[Entry]:
        """Entries of a kind, in order."""
        return [entry for entry in self.entries if entry.kind == kind]

    def metrics(self, entry: Entry) -> Metrics:
        """Curves of a training entry, from the file that its fact `metrics` names inside the run folder."""
        name = entry.facts.get("metrics")
        if not isinstance(name, str) or not name or "\0" in name:
            return Metrics("missing")
        path = self.folder / name
        try:
            inside = path.resolve().is_relative_to(self.folder.resolve())
            if not inside or not path.is_file():
                return Metrics("missing", notes=[] if inside else ["The metrics file is outside the run folder."])
            if path.stat().st_size > MAX_METRICS_BYTES:
                return Metrics("missing", notes=[f"The metrics file is over {MAX_METRICS_BYTES} bytes."])
            expected = entry.outputs.get("metrics")
            state = "not verified"
            if expected is not None:
                state = "verified" if ledger.content_id(path) == expected else "changed"
            return _read_metrics(path, state)
        except (OSError, RuntimeError) as error:
            return Metrics("missing", notes=[f"The metrics file cannot be read: {type(error).__name__}."])


def load_run(folder: str | os.PathLike[str]) -> Run:
    """The run of a folder.

    Raises:
        LedgerError: the ledger does not verify. An unfinished last line is left out.
    """
    folder = Path(folder)
    entries = ledger.read(folder / ledger.FILE_NAME, allow_torn=True)
    torn = False
    try:
        entries = ledger.read(folder / ledger.FILE_NAME)
    except ledger.LedgerError as error:
        if not error.torn:
            raise
        torn = True
    return Run(folder, entries, torn)


def made_by(entries: list[Entry]) -> dict[str, int]:
    """For each entry id and output, the index of the first entry that it came from."""
    made: dict[str, int] = {}
    for index, entry in enumerate(entries):
        for made_id in (entry.id, *entry.outputs.values()):
            made.setdefault(made_id, index)
    return made


def title(entry: Entry) -> str:
    """A short name of what an entry made."""
    names = {
        facts.CORPUS: ("corpus", "name"),
        facts.TOKENIZER: ("tokenizer", "algorithm"),
        facts.SHARDS: ("shards", "split"),
        facts.TRAIN: ("train", "stage"),
        facts.CHECKPOINT: ("checkpoint", "stage"),
        facts.QUANTIZE: ("quantize", "format"),
        facts.EVALUATE: ("evaluate", "name"),
        facts.GENERATE: ("generate", "model"),
    }
    word, fact = names.get(entry.kind, (entry.kind, ""))
    value = entry.facts.get(fact)
    return f"{word}: {value}" if isinstance(value, str) and value else word


def _read_metrics(path: Path, state: str) -> Metrics:
    curves: dict[str, list[tuple[float, float]]] = {}
    unread = 0
    torn = False
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            record = _decode(line)
            if record is None:
                torn = not line.endswith(b"\n")
                unread += not torn
                continue
            step = record["step"]
            for name, value in record.items():
                value = _NOT_FINITE.get(value, value) if isinstance(value, str) else value
                if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                    continue
                if isinstance(value, int) and abs(value) >= 1 << 64:
                    continue
                if name in curves or len(curves) < MAX_CURVES:
                    curves.setdefault(name, []).append((float(step), float(value)))
    notes = [f"{unread} lines of the metrics file could not be read."] if unread else []
    if torn:
        notes.append("The last line of the metrics file is unfinished.")
    return Metrics(state, curves, notes)


def _decode(line: bytes) -> dict[str, Any] | None:
    if line.isspace():
        return {"step": 0}
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    if isinstance(step, bool) or not isinstance(step, int | float) or not 0 <= step < 1e15:
        return None
    return record  # type: ignore[no-any-return]
