"""Batches of packed rows as torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IGNORE = -100


class PackedRow(Protocol):
    """A row as `pyengine.data.packing` makes it: four int32 arrays [seq_len]; padding has segment -1 and stands last."""

    @property
    def input_ids(self) -> npt.NDArray[np.int32]: ...
    @property
    def targets(self) -> npt.NDArray[np.int32]: ...
    @property
    def segment_ids(self) -> npt.NDArray[np.int32]: ...
    @property
    def position_ids(self) -> npt.NDArray[np.int32]: ...


class RowSource(Protocol):
    """Rows by sample index, from 0 without end: a pure function, so the index is the whole cursor."""

    def __getitem__(self, index: int, /) -> PackedRow: ...


@dataclass(frozen=True)
class Batch:
    """Tokens of several rows laid end to end, padding left out.

    Attributes:
        input_ids, position_ids: [num_tokens] int32.
        targets: [num_tokens] int32, `IGNORE` where nothing is to be predicted.
        segment_offsets: [num_segments + 1] int32.
        num_targets: targets that are not `IGNORE`.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor
    segment_offsets: Tensor
    num_targets: int

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of `CausalLM.forward`."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "segment_offsets": self.segment_offsets,
            "targets": self.targets,
        }


def collate(rows: Sequence[PackedRow]) -> Batch:
    """One batch of at least one row. Padding costs nothing: it is cut off, and no other token can see it."""
    parts: dict[str, list[npt.NDArray[np.int32]]] = {"input_ids": [], "targets": [], "position_ids": []}
    starts: list[npt.NDArray[np.int64]] = []
    num_tokens = 0
    for row in rows:
        length = int((row.segment_ids >= 0).sum())
        for name, part in parts.items():
            part.append(getattr(row, name)[:length])
        segments = row.segment_ids[:length]
        starts.append(np.flatnonzero(np.diff(segments, prepend=-1)) + num_tokens)
        num_tokens += length
    arrays = {name: np.concatenate(part) for name, part in parts.items()}
    offsets = np.append(np.concatenate(starts), num_tokens).astype(np.int32)
    return Batch(
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        segment_offsets=torch.from_numpy(offsets),
        num_targets=int((arrays["targets"] != IGNORE).sum()),
    )


def batches_of(source: RowSource, first: int, num_rows: int, rows_per_batch: int) -> list[Batch]:
    """Rows [first, first + num_rows) of `source` as batches of at most `rows_per_batch`."""
    rows = [source[index] for index in range(first, first + num_rows)]
    return [collate(rows[start : start + rows_per_batch]) for start in range(0, num_rows, rows_per_batch)]
