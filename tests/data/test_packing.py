"""Permutation and packing against brute force."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.data.baseline import unigram_bits_per_byte
from pyengine.data.packing import IGNORE, PADDING_SEGMENT, PackedDataset, Row, pack_conversations
from pyengine.data.permutation import MAX_SIZE, KeyedPermutation
from pyengine.data.shards import Shard, TokenisedDocument, write_shard
from pyengine.errors import ArgumentError
from pyengine.ledger import content_id

DOCUMENTS = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def make_shard(folder: Path, documents: list[list[int]], name: str = "s", text_bytes: int = 4) -> Shard:
    items = [TokenisedDocument(f"d{number}", ids, text_bytes) for number, ids in enumerate(documents)]
    write_shard(folder / name, items, vocab_size=5000, tokenizer=content_id(b"t"))
    return Shard(folder / name)


def distinct(lengths: list[int]) -> list[list[int]]:
    """Documents of the lengths given, no id twice, so that a token tells where it came from."""
    numbers = itertools.count(1)
    return [[next(numbers) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4095, 4097, 65537])
def test_permutation_is_a_bijection(size: int) -> None:
    permutation = KeyedPermutation(size, 7, "x")
    values = permutation(np.arange(size))
    assert sorted(values.tolist()) == list(range(size))
    for index in (0, size // 2, size - 1):
        assert permutation(index) == values[index]


@given(st.integers(1, MAX_SIZE), st.integers(0, MAX_SIZE - 1), st.integers(0, 1 << 64))
def test_permutation_of_any_size_stays_inside_and_keeps_indices_apart(size: int, index: int, seed: int) -> None:
    permutation = KeyedPermutation(size, seed)
    index %= size
    value = permutation(index)
    assert 0 <= value < size
    if size > 1:
        assert permutation((index + 1) % size) != value


def test_permutation_depends_on_every_part_of_the_key_and_is_fixed() -> None:
    keys: list[tuple[int | str, ...]] = [(0,), (1,), (0, 0), (0, "a"), (0, "b"), ("0",)]
    orders = {tuple(KeyedPermutation(50, *key)(np.arange(50)).tolist()) for key in keys}
    assert len(orders) == len(keys)
    assert KeyedPermutation(10, 1, 2, "rows")(np.arange(10)).tolist() == FIXED_ORDER


FIXED_ORDER = [7, 2, 4, 3, 1, 5, 8, 0, 9, 6]


def test_permutation_spreads_evenly() -> None:
    """Chi-square of where each of 7 elements lands over 7,000 keys; 36 degrees of freedom, 1 in a million is 90."""
    counts = np.zeros((7, 7))
    for seed in range(7000):
        counts[np.arange(7), KeyedPermutation(7, seed)(np.arange(7))] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 90


def test_permutation_bad_arguments() -> None:
    for size in (0, -1, MAX_SIZE + 1):
        with pytest.raises(ArgumentError, match="size"):
            KeyedPermutation(size, 0)
    for index in (-1, 5):
        with pytest.raises(ArgumentError, match="index"):
            KeyedPermutation(5, 0)(index)


def check_row(row: Row, seq_len: int) -> None:
    for array in row:
        assert (array.shape, array.dtype) == ((seq_len,), np.int32)
    inside = row.segment_ids != PADDING_SEGMENT
    used = int(inside.sum())
    assert inside[:used].all()
    segments = row.segment_ids[:used]
    assert set(np.diff(segments)) <= {0, 1}
    for segment in range(segments.max() + 1):
        where = np.flatnonzero(segments == segment)
        assert row.position_ids[where].tolist() == list(range(len(where)))
    assert (row.targets[used:] == IGNORE).all()


@settings(max_examples=80, deadline=None)
@given(DOCUMENTS, st.integers(1, 9), st.integers(0, 1000), st.integers(0, 3))
def test_an_epoch_predicts_every_neighbour_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, seed: int, epoch: int
) -> None:
    documents = distinct(lengths)
    dataset = PackedDataset(make_shard(tmp_path_factory.mktemp("s"), documents), seq_len, seed, pad_id=4999)
    owner = {token: number for number, ids in enumerate(documents) for token in ids}
    inputs: Counter[int] = Counter()
    pairs: Counter[tuple[int, int]] = Counter()
    assert dataset.rows_per_epoch == math.ceil(sum(lengths) / seq_len)
    for index in range(epoch * dataset.rows_per_epoch, (epoch + 1) * dataset.rows_per_epoch):
        row = dataset[index]
        check_row(row, seq_len)
        real = row.segment_ids != PADDING_SEGMENT
        inputs.update(row.input_ids[real].tolist())
        assert (row.input_ids[~real] == 4999).all()
        learned = row.targets != IGNORE
        pairs.update(zip(row.input_ids[learned].tolist(), row.targets[learned].tolist(), strict=True))
        owners = [owner[token] for token in row.input_ids[real].tolist()]
        for left in range(len(owners) - 1):
            assert (owners[left] == owners[left + 1]) == (row.segment_ids[left] == row.segment_ids[left + 1])
    assert inputs == Counter(token for ids in documents for token in ids)
    assert pairs == Counter(pair for ids in documents for pair in itertools.pairwise(ids))


def test_a_row_by_hand(tmp_path: Path) -> None:
    dataset = PackedDataset(make_shard(tmp_path, [[1, 2, 3, 4, 5]]), 3, 0)
    rows = sorted((dataset[0], dataset[1]), key=lambda row: int(row.input_ids[0]))
    assert [array.tolist() for array in rows[0]] == [[1, 2, 3], [2, 3, 4], [0, 0, 0], [0, 1, 2]]
    assert [array.tolist() for array in rows[1]] == [[4, 5, 0], [5, -100, -100], [0, 0, -1], [0, 1, 0]]


def test_order_is_a_pure_function_of_seed_and_index(tmp_path: Path) -> None:
    shard = make_shard(tmp_path, distinct([5, 9, 2, 14, 7, 3, 8, 11]))
    straight = PackedDataset(shard, 4, 3)
    count = 3 * straight.rows_per_epoch
    expected = [straight[index].input_ids.tolist() for index in range(count)]
    jumping = PackedDataset(shard, 4, 3)
    for index in reversed(range(count)):
        assert jumping[index].input_ids.tolist() == expected[index]
    epoch = straight.rows_per_epoch
    first, second = expected[:epoch], expected[epoch : 2 * epoch]
    assert first != second
    assert sorted(first) != sorted(second), "documents meet the same neighbours in every epoch"
    other = PackedDataset(shard, 4, 4)
    assert [other[index].input_ids.tolist() for index in range(count)] != expected


def test_packed_dataset_bad_arguments(tmp_path: Path) -> None:
    shard = make_shard(tmp_path, [[1, 2]])
    with pytest.raises(ArgumentError, match="seq_len"):
        PackedDataset(shard, 0, 0)
    with pytest.raises(ArgumentError, match="pad_id"):
        PackedDataset(shard, 4, 0, pad_id=5000)
    with pytest.raises(ArgumentError, match="index"):
        PackedDataset(shard, 4, 0)[-1]
    with pytest.raises(ArgumentError, match="shard"):
        PackedDataset(make_shard(tmp_path, [], "empty"), 4, 0)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=12), st.integers(0, 99))
def test_conversations_stay_whole_and_learn_masked_tokens(masks: list[list[bool]], seed: int) -> None:
    seq_len = 9
    conversations = list(zip(distinct([len(mask) for mask in masks]), masks, strict=True))
    packed = pack_conversations(conversations, seq_len, seed, pad_id=3)
    seen: list[tuple[list[int], list[int]]] = []
    for index in range(packed.rows_per_epoch):
        row = packed[index]
        check_row(row, seq_len)
        for segment in range(row.segment_ids.max() + 1):
            where = row.segment_ids == segment
            seen.append((row.input_ids[where].tolist(), row.targets[where].tolist()))
    expected = []
    for ids, mask in conversations:
        targets = [ids[t + 1] if t + 1 < len(ids) and mask[t + 1] else IGNORE for t in range(len(ids))]
        expected.append((ids, targets))
    assert sorted(seen) == sorted(expected)
    assert packed.tokens == sum(map(len, masks))
    assert packed.targets == sum(sum(mask[1:]) for mask in masks)
    again = [packed[packed.rows_per_epoch + index].input_ids.tolist() for index in range(packed.rows_per_epoch)]
    assert sorted(again) == sorted(packed[index].input_ids.tolist() for index in range(packed.rows_per_epoch))


def test_conversations_fill_rows() -> None:
    lengths = [6, 4, 5, 5, 3, 7, 8, 2]
    packed = pack_conversations([([1] * length, [1] * length) for length in lengths], 10, 0)
    assert packed.rows_per_epoch == 4


def test_rows_are_copies() -> None:
    packed = pack_conversations([([1, 2], [0, 1])], 4, 0)
    packed[0].input_ids[:] = 9
    assert packed[0].input_ids.tolist() == [1, 2, 0, 0]


@pytest.mark.parametrize(
    ("conversations", "named"),
    [
        ([([1], [1]), ([], [])], r"conversations\[1\]"),
        ([([1, 2], [1])], r"conversations\[0\]"),
        ([([1, 2, 3, 4, 5], [1] * 5)], r"conversations\[0\]: expected at most 4 tokens, got 5"),
        ([([-1, 2], [1, 1])], r"conversations\[0\]"),
        ([([1.5, 2], [1, 1])], r"conversations\[0\]"),
        ([], "conversations"),
    ],
)
def test_bad_conversations_are_named(conversations: list[tuple[list[int], list[int]]], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        pack_conversations(conversations, 4, 0)


def test_long_conversations_are_dropped_only_when_asked() -> None:
    packed = pack_conversations([([1] * 5, [1] * 5), ([1, 2], [0, 1])], 4, 0, drop_long=True)
    assert (packed.dropped, packed.rows_per_epoch) == ([0], 1)


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS, DOCUMENTS, st.integers(0, 9))
def test_unigram_baseline(
    tmp_path_factory: pytest.TempPathFactory, train: list[int], held_out: list[int], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    train_documents, held_out_documents = (
        [draw.integers(0, 50, length).tolist() for length in lengths] for lengths in (train, held_out)
    )
    folder = tmp_path_factory.mktemp("u")
    shards = [make_shard(folder, train_documents, "a"), make_shard(folder, held_out_documents, "b")]
    counts = Counter(token for ids in train_documents for token in ids[1:])
    total = sum(counts.values()) + 5000
    bits = -sum(math.log2((counts[token] + 1) / total) for ids in held_out_documents for token in ids[1:])
    assert unigram_bits_per_byte(*shards, 37) == pytest.approx(bits / 37, rel=1e-12)
    assert unigram_bits_per_byte(*shards) == pytest.approx(bits / (4 * len(held_out)), rel=1e-12)


def test_unigram_baseline_bad_arguments(tmp_path: Path) -> None:
    shard = make_shard(tmp_path, [[1, 2]])
    with pytest.raises(ArgumentError, match="held_out_bytes"):
        unigram_bits_per_byte(shard, shard, 0)
    items = [TokenisedDocument("d", [1, 2], 2)]
    write_shard(tmp_path / "other", items, vocab_size=5000, tokenizer=content_id(b"other"))
    with pytest.raises(ArgumentError, match="held_out"):
        unigram_bits_per_byte(shard, Shard(tmp_path / "other"))
