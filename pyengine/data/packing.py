"""Rows of fixed length for training, as a pure function of (data, seed, sample index).

Documents are laid end to end in an order that the seed and the epoch permute, the line is cut into rows, and the rows
are permuted again. No state is kept: sample i can be asked for first, last or twice, by any worker, and a resumed run
asks for the index it stopped at. A row is `(input_ids, targets, segment_ids, position_ids)`, each [seq_len] int32:

* `targets[t]` is the token after `input_ids[t]` in the same document, or `IGNORE` where there is none;
* `segment_ids[t]` counts documents within the row from 0; padding has `PADDING_SEGMENT`;
* `position_ids[t]` counts from 0 within the segment, also where a document goes on from an earlier row.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pyengine.data.permutation import KeyedPermutation
from pyengine.data.shards import Shard
from pyengine.errors import ArgumentError

IGNORE = -100
PADDING_SEGMENT = -1

Int32Array: TypeAlias = npt.NDArray[np.int32]


class Row(NamedTuple):
    """One training row; see the module."""

    input_ids: Int32Array
    targets: Int32Array
    segment_ids: Int32Array
    position_ids: Int32Array


class PackedDataset:
    """Rows of a shard for causal language modelling. Every pair of neighbouring tokens of a document is one target, in
    exactly one row per epoch; only the last row of an epoch has padding.

    Args:
        shard: tokens.
        seq_len: tokens of a row.
        seed: of the order.
        pad_id: fills `input_ids` of padding.
    """

    def __init__(self, shard: Shard, seq_len: int, seed: int, *, pad_id: int = 0) -> None:
        _check_seq_len(seq_len)
        if not 0 <= pad_id < shard.index.vocab_size:
            raise ArgumentError(f"pad_id: expected 0 to {shard.index.vocab_size - 1}, got {pad_id}")
        if not len(shard):
            raise ArgumentError("shard: expected at least one document, got none")
        self.shard = shard
        self.seq_len = seq_len
        self.seed = seed
        self.pad_id = pad_id
        self.rows_per_epoch = -(-shard.index.tokens // seq_len)
        self._lengths = np.diff(shard.ends, prepend=0)
        self._epoch: tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    def __getitem__(self, index: int) -> Row:
        """Row of sample `index`, from 0 without end; epoch e holds [e * rows_per_epoch, (e + 1) * rows_per_epoch)."""
        epoch, position = _epoch_and_position(index, self.rows_per_epoch)
        order, ends = self._order(epoch)
        start = KeyedPermutation(self.rows_per_epoch, self.seed, epoch, "rows")(position) * self.seq_len
        stop = min(start + self.seq_len, self.shard.index.tokens)
        row = _empty_row(self.seq_len, self.pad_id)
        at = segment = 0
        place = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            document, document_end = int(order[place]), int(ends[place])
            taken = min(stop, document_end) - start
            first = int(self.shard.ends[document]) - (document_end - start)
            goes_on = start + taken < document_end
            ids = np.asarray(self.shard.tokens[first : first + taken + goes_on]).astype(np.int32)
            _put(row, at, segment, ids[:taken], ids[1:])
            start += taken
            at += taken
            segment += 1
            place += 1
        return row

    def _order(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Documents in the order of an epoch, and where each ends in the line of all tokens."""
        known = self._epoch
        if known is None or known[0] != epoch:
            permutation = KeyedPermutation(len(self.shard), self.seed, epoch, "documents")
            order = permutation(np.arange(len(self.shard), dtype=np.int64))
            known = self._epoch = (epoch, order, np.cumsum(self._lengths[order]))
        return known[1], known[2]


class PackedConversations:
    """Rows of whole conversations, made by `pack_conversations`.

    Attributes:
        rows_per_epoch: number of rows.
        dropped: indices of conversations left out because they are longer than a row.
        tokens, targets: totals over one epoch, padding left out.
    """

    def __init__(self, rows: list[Row], seed: int, dropped: list[int]) -> None:
        self.rows_per_epoch = len(rows)
        self.dropped = dropped
        self.tokens = sum(int((row.segment_ids != PADDING_SEGMENT).sum()) for row in rows)
        self.targets = sum(int((row.targets != IGNORE).sum()) for row in rows)
        self._rows = rows
        self._seed = seed

    def __getitem__(self, index: int) -> Row:
        """Row of sample `index`, from 0 without end; each epoch holds every row once, in its own order."""
        epoch, position = _epoch_and_position(index, self.rows_per_epoch)
        row = self._rows[KeyedPermutation(self.rows_per_epoch, self._seed, epoch, "rows")(position)]
        return Row(*(array.copy() for array in row))


def pack_conversations(
    conversations: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]],
    seq_len: int,
    seed: int,
    *,
    pad_id: int = 0,
    drop_long: bool = False,
) -> PackedConversations:
    """Pack tokenised conversations, each whole in one row, longest first into the fullest row that has room.

    Args:
        conversations: (ids, mask) of equal length; mask is true where the assistant speaks. `targets[t]` is
            `ids[t + 1]` if `mask[t + 1]`, else `IGNORE`: the mask is of the token to learn, not of its predictor.
        seq_len: tokens of a row.
        seed: of the order of rows.
        pad_id: fills `input_ids` of padding.
        drop_long: leave out conversations longer than a row, and list them, instead of raising.

    Raises:
        ArgumentError: a conversation is empty, too long, or its mask does not fit; it is named by index.
    """
    _check_seq_len(seq_len)
    checked: list[tuple[Int32Array, npt.NDArray[np.bool_]]] = []
    dropped: list[int] = []
    for number, (ids, mask) in enumerate(conversations):
        id_array, mask_array = np.asarray(ids), np.asarray(mask).astype(np.bool_)
        if id_array.ndim != 1 or id_array.size == 0 or id_array.dtype.kind not in "iu" or id_array.min() < 0:
            raise ArgumentError(f"conversations[{number}]: expected a list of at least one id, got {ids!r:.80}")
        if mask_array.shape != id_array.shape:
            raise ArgumentError(f"conversations[{number}]: expected a mask of {id_array.shape}, got {mask_array.shape}")
        if id_array.size > seq_len:
            if not drop_long:
                raise ArgumentError(f"conversations[{number}]: expected at most {seq_len} tokens, got {id_array.size}")
            dropped.append(number)
            continue
        checked.append((id_array.astype(np.int32), mask_array))
    if not checked:
        raise ArgumentError(f"conversations: expected at least one that fits in {seq_len} tokens, got none")
    rows = []
    for members in _best_fit([ids.size for ids, _ in checked], seq_len):
        row = _empty_row(seq_len, pad_id)
        at = 0
        for segment, member in enumerate(members):
            ids, mask = checked[member]
            _put(row, at, segment, ids, np.where(mask[1:], ids[1:], IGNORE).astype(np.int32))
            at += ids.size
        rows.append(row)
    return PackedConversations(rows, seed, dropped)


def _best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of the members of each bin, bins in order of their first member."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        found = bisect.bisect_left(rooms, (lengths[index], -1))
        if found == len(rooms):
            room, place = capacity, len(bins)
            bins.append([])
        else:
            room, place = rooms.pop(found)
        bins[place].append(index)
        bisect.insort(rooms, (room - lengths[index], place))
    return bins


def _empty_row(seq_len: int, pad_id: int) -> Row:
    return Row(
        np.full(seq_len, pad_id, np.int32),
        np.full(seq_len, IGNORE, np.int32),
        np.full(seq_len, PADDING_SEGMENT, np.int32),
        np.zeros(seq_len, np.int32),
    )


def _put(row: Row, at: int, segment: int, ids: Int32Array, targets: Int32Array) -> None:
    """Write one segment at position `at`; `targets` may be shorter than `ids`."""
    stop = at + ids.size
    row.input_ids[at:stop] = ids
    row.targets[at : at + targets.size] = targets
    row.segment_ids[at:stop] = segment
    row.position_ids[at:stop] = np.arange(ids.size, dtype=np.int32)


def _epoch_and_position(index: int, rows_per_epoch: int) -> tuple[int, int]:
    if index < 0:
        raise ArgumentError(f"index: expected a sample index from 0, got {index}")
    return divmod(int(index), rows_per_epoch)


def _check_seq_len(seq_len: int) -> None:
    if seq_len < 1:
        raise ArgumentError(f"seq_len: expected at least 1, got {seq_len}")
