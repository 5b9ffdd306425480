import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.ops.attention_decode import attention_decode, kv_append
from pyengine.reference.attention_decode import attention_decode as reference
from pyengine.reference.attention_decode import kv_append as reference_append
from pyengine.testing import LAYOUTS, assert_accurate, assert_same_bits, force_num_threads
from pyengine.testing.guard import guarded

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
NAN = float("nan")


def int32(values):
    return torch.as_tensor(values, dtype=torch.int32)


class Cache:
    """Pages full of NaN, handed out in random order to sequences of the given lengths."""

    def __init__(self, lengths, num_kv_heads, head_dim, page_size, dtype, guard=False):
        counts = [-(-length // page_size) for length in lengths]
        num_pages, width = sum(counts), max([1, *counts])
        nothing = 99 if dtype == INT8 else NAN
        self.k_pages = torch.full((num_pages, num_kv_heads, page_size // 16, head_dim, 16), nothing, dtype=dtype)
        self.v_pages = torch.full((num_pages, num_kv_heads, page_size, head_dim), nothing, dtype=dtype)
        self.scales = {}
        if dtype == INT8:
            self.scales = {name: torch.full(self.v_pages.shape[:3], NAN) for name in ("k_scales", "v_scales")}
        if guard:
            self.k_pages, self.v_pages = guarded(self.k_pages), guarded(self.v_pages)
            self.scales = {name: guarded(t) for name, t in self.scales.items()}
        # Entries that no row uses name no page at all.
        self.block_table = torch.full((len(lengths), width), -(2**31), dtype=torch.int32)
        pages = iter(torch.randperm(num_pages).tolist())
        for s, count in enumerate(counts):
            self.block_table[s, :count] = int32([next(pages) for _ in range(count)])
        self.page_size = page_size

    def append(self, k, v, seq, position):
        kv_append(k, v, *self.tensors, int32(seq), int32(position), **self.scales)

    def attend(self, q, seq, position, **options):
        return attention_decode(q, *self.tensors, int32(seq), int32(position), **self.scales, **options)

    @property
    def tensors(self):
        return self.k_pages, self.v_pages, self.block_table


def filled(lengths, num_kv_heads, head_dim, page_size, dtype, append=kv_append, guard=False):
    """A cache with random keys and values in every slot of every sequence, and those tensors, per sequence."""
    cache = Cache(lengths, num_kv_heads, head_dim, page_size, dtype, guard)
    kv = []
    for s, length in enumerate(lengths):
        k, v = (torch.randn(length, num_kv_heads, head_dim).to(F32 if dtype == INT8 else dtype) for _ in range(2))
        append(k, v, *cache.tensors, int32([s] * length), int32(range(length)), **cache.scales)
        kv.append((k, v))
    return cache, kv


WINDOWS = (None, 1, 15, 16, 64, 65, 2**63 - 1)


@functools.cache
def decode_case(head_dim, dtype, cache_dtype):
    """A batch, and per window its exact and its torch result."""
    torch.manual_seed(head_dim)
    cache, _ = filled([70, 1, 200], 2, head_dim, 32, cache_dtype, reference_append)
    rows = int32([2, 0, 0, 2, 1]), int32([199, 30, 31, 0, 0])
    q = torch.randn(5, 4, head_dim).to(dtype)
    exact, baseline = (
        [reference(x, *cache.tensors, *rows, sliding_window=w, **cache.scales) for w in WINDOWS]
        for x in (q.double(), q)
    )
    return cache, rows, q, exact, baseline


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("cache_dtype", [F32, BF16, INT8], ids=str)
@pytest.mark.parametrize("head_dim", [1, 15, 16, 17, 64, 80, 96, 128, 200, 256])
def test_matches_reference(isa, head_dim, dtype, cache_dtype):
    cache, rows, q, exact, baseline = decode_case(head_dim, dtype, cache_dtype)
    for window, *expected in zip(WINDOWS, exact, baseline, strict=True):
        assert_accurate(cache.attend(q, *rows, sliding_window=window), *expected)


@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (7, 1), (6, 6), (60, 1)], ids=str)
def test_head_groups_and_scale(isa, heads):
    torch.manual_seed(0)
    num_heads, num_kv_heads = heads
    cache, _ = filled([80], num_kv_heads, 24, 16, F32)
    q = torch.randn(20, num_heads, 24)
    seq, position = int32([0] * 20), torch.arange(60, 80, dtype=torch.int32)
    for scale in (0.3, -1.0):
        exact = reference(q.double(), *cache.tensors, seq, position, scale=scale)
        baseline = reference(q, *cache.tensors, seq, position, scale=scale)
        assert_accurate(cache.attend(q, seq, position, scale=scale), exact, baseline)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, layout):
    torch.manual_seed(0)
    q, k, v = (LAYOUTS[layout](torch.randn(20, n, 24)) for n in (6, 2, 2))
    cache, other = Cache([20], 2, 24, 16, F32), Cache([20], 2, 24, 16, F32)
    for c, (a, b) in ((cache, (k, v)), (other, (k.contiguous(), v.contiguous()))):
        c.append(a, b, [0] * 20, range(20))
    assert_same_bits(cache.attend(q, [0] * 20, range(20)), other.attend(q.contiguous(), [0] * 20, range(20)))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("cache_dtype", [F32, BF16, INT8], ids=str)
def test_append_writes_its_slots_alone(isa, dtype, cache_dtype):
    torch.manual_seed(0)
    k, v = (torch.randn(6, 3, 19).to(dtype) for _ in range(2))
    k[0, 0, 0], v[1, 1, 1] = NAN, float("inf")
    seq, position = int32([1, 0, 0, 1, 0, 1]), int32([0, 40, 7, 33, 31, 1])
    cache = Cache([64, 34], 3, 19, 32, cache_dtype)
    k[2, 0] = 0.0  # the scale of a head of zeros is zero
    expected = [cache.k_pages.clone(), cache.v_pages.clone()]
    scales = {name: t.clone() for name, t in cache.scales.items()}
    reference_append(k, v, *expected, cache.block_table, seq, position, **scales)
    cache.append(k, v, seq, position)
    for got, want in zip(
        (cache.k_pages, cache.v_pages, *cache.scales.values()), (*expected, *scales.values()), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "cache_dtype"), [(F32, F32), (BF16, BF16), (F32, INT8)], ids=str)
def test_same_bits_in_any_chunk_page_batch_and_number_of_threads(isa, dtype, cache_dtype):
    torch.manual_seed(0)
    lengths, num_kv_heads, head_dim = [150, 97, 1], 2, 40
    kv = [[torch.randn(n, num_kv_heads, head_dim).to(dtype) for _ in range(2)] for n in lengths]
    q = [torch.randn(n, 6, head_dim).to(dtype) for n in lengths]
    for window in (None, 50):
        expected = None
        for page_size in (16, 32, 64, 256):
            cache = Cache(lengths, num_kv_heads, head_dim, page_size, cache_dtype)
            for s, (k, v) in enumerate(kv):
                cache.append(k, v, [s] * len(k), range(len(k)))

            def row(s, t, cache=cache, window=window):
                return cache.attend(q[s][t : t + 1], [s], [t], sliding_window=window)

            alone = [torch.cat([row(s, t) for t in range(n)]) for s, n in enumerate(lengths)]
            expected = expected or alone
            for chunk in (7, 64, 150):
                for s, n in enumerate(lengths):
                    parts = [
                        cache.attend(q[s][t : t + chunk], [s] * len(q[s][t : t + chunk]),
                                     range(t, min(t + chunk, n)), sliding_window=window)
                        for t in range(0, n, chunk)
                    ]  # fmt: skip
                    assert_same_bits(torch.cat(parts), expected[s])
            # All rows of all sequences in one call, shuffled.
            rows = [(s, t) for s, n in enumerate(lengths) for t in range(n)]
            rows = [rows[i] for i in torch.randperm(len(rows)).tolist()]
            for count in (1, 2, 3):
                with force_num_threads(count):
                    got = cache.attend(
                        torch.stack([q[s][t] for s, t in rows]), *zip(*rows, strict=True), sliding_window=window
                    )
                assert_same_bits(got, torch.stack([expected[s][t] for s, t in rows]))
            for a, b in zip(alone, expected, strict=True):
                assert_same_bits(a, b)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_batch_of_rows_matches_reference(data):
    lengths = data.draw(st.lists(st.integers(1, 140), min_size=1, max_size=4), "lengths")
    page_size = data.draw(st.sampled_from([16, 48, 64]), "page_size")
    window = data.draw(st.none() | st.integers(1, 150), "window")
    rows = data.draw(
        st.lists(
            st.integers(0, len(lengths) - 1).flatmap(lambda s: st.tuples(st.just(s), st.integers(0, lengths[s] - 1))),
            min_size=1,
            max_size=12,
        ),
        "rows",
    )
    torch.manual_seed(0)
    cache, _ = filled(lengths, 2, 20, page_size, F32)
    seq, position = (int32(x) for x in zip(*rows, strict=True))
    # Many queries of each row: the largest of eighty errors says little about the arithmetic.
    q = torch.randn(64, len(rows), 4, 20)
    many = q.flatten(0, 1), seq.repeat(64), position.repeat(64)
    exact, baseline = (
        reference(x, *cache.tensors, *many[1:], sliding_window=window) for x in (many[0].double(), many[0])
    )
    got = cache.attend(*many, sliding_window=window)
    assert_accurate(got, exact, baseline)
    assert_same_bits(cache.attend(q[0], seq, position, sliding_window=window), got[: len(rows)])


@pytest.mark.parametrize(("dtype", "cache_dtype"), [(F32, F32), (BF16, BF16), (F32, INT8)], ids=str)
@pytest.mark.parametrize("head_dim", [7, 16, 33])
def test_touches_no_byte_outside_its_tensors(isa, head_dim, dtype, cache_dtype):
    for at_end in (True, False):
        cache, _ = filled([33], 2, head_dim, 16, cache_dtype, guard=True)
        q = guarded(torch.randn(3, 4, head_dim).to(dtype), at_end=at_end)
        y = guarded(torch.zeros(3, 4, head_dim).to(dtype), at_end=at_end)
        table, seq, position = (
            guarded(t, at_end=at_end) for t in (cache.block_table, int32([0] * 3), int32([0, 15, 32]))
        )
        _C.attention_decode_cpu(q, cache.k_pages, cache.v_pages, table, seq, position, y, 1.0, None, **cache.scales)
        assert y.isfinite().all()
        k = guarded(torch.randn(3, 2, head_dim).to(dtype), at_end=at_end)
        _C.kv_append_cpu(k, k, cache.k_pages, cache.v_pages, table, seq, position, **cache.scales)


@pytest.mark.parametrize("cache_dtype", [F32, BF16, INT8], ids=str)
def test_what_a_row_does_not_see_does_not_reach_it(isa, cache_dtype):
    torch.manual_seed(0)
    cache, _ = filled([100], 2, 24, 32, cache_dtype)
    rows = list(range(40, 60))
    q = torch.randn(len(rows), 4, 24).to(BF16 if cache_dtype == BF16 else F32)
    expected = cache.attend(q, [0] * len(rows), rows, sliding_window=20)
    nothing = torch.full((1, 2, 24), NAN)
    for t in [*range(21), *range(60, 100)]:
        cache.append(nothing, nothing, [0], [t])
    assert_same_bits(cache.attend(q, [0] * len(rows), rows, sliding_window=20), expected)
    # Key 50 reaches the rows that see it and no other.
    cache.append(nothing, nothing, [0], [50])
    got = cache.attend(q, [0] * len(rows), rows, sliding_window=20)
    assert_same_bits(got[:10], expected[:10])
    assert got[10:].isnan().all()


@pytest.mark.parametrize("cache_dtype", [F32, BF16, INT8], ids=str)
def test_rounding_q_gives_the_bits_of_bf16_q(isa, cache_dtype):
    torch.manual_seed(0)
    cache, _ = filled([70, 1, 201], 2, 40, 32, cache_dtype)
    q, rows = torch.randn(5, 4, 40), (int32([2, 0, 0, 2, 1]), int32([200, 30, 31, 0, 0]))
    y = torch.empty(5, 4, 40)
    pages = cache.k_pages, cache.v_pages, cache.block_table
    _C.attention_decode_cpu(q, *pages, *rows, y, 0.2, None, **cache.scales, round_q=True)
    assert_same_bits(y.to(BF16), cache.attend(q.to(BF16), *rows, scale=0.2))
    with pytest.raises(ArgumentError, match="q: expected float32, got bfloat16"):
        _C.attention_decode_cpu(q.to(BF16), *pages, *rows, y.to(BF16), 0.2, None, **cache.scales, round_q=True)


def test_scores_of_minus_infinity_weigh_nothing(isa):
    cache = Cache([80], 1, 8, 16, F32)
    k, v = torch.zeros(80, 1, 8), torch.ones(80, 1, 8)
    k[:70] = float("-inf")  # the whole first block, and more
    v[:70] = 7
    cache.append(k, v, [0] * 80, range(80))
    assert torch.equal(cache.attend(torch.ones(1, 2, 8), [0], [79]), torch.ones(1, 2, 8))
    assert cache.attend(torch.ones(1, 2, 8), [0], [66]).isnan().all()


def test_no_rows(isa):
    cache, _ = filled([5], 1, 8, 16, F32)
    assert cache.attend(torch.zeros(0, 2, 8), [], []).shape == (0, 2, 8)
    cache.append(torch.zeros(0, 1, 8), torch.zeros(0, 1, 8), [], [])


@pytest.mark.parametrize("cache_dtype", [F32, INT8], ids=str)
def test_opcheck(cache_dtype):
    cache, _ = filled([20], 2, 8, 16, cache_dtype)
    seq, position = int32([0, 0]), int32([3, 19])
    ops = torch.ops.pyengine
    for op, args in [
        (ops.attention_decode, (torch.randn(2, 4, 8), *cache.tensors, seq, position, 0.5, 7, *cache.scales.values())),
        (
            ops.kv_append,
            (torch.randn(2, 2, 8), torch.randn(2, 2, 8), *cache.tensors, seq, position, *cache.scales.values()),
        ),
    ]:
        assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


def test_compiles_without_graph_break():
    torch.manual_seed(0)
    cache, other = Cache([20], 2, 8, 16, F32), Cache([20], 2, 8, 16, F32)
    other.block_table = cache.block_table
    q, k, seq, position = torch.randn(4, 4, 8), torch.randn(4, 2, 8), int32([0] * 4), torch.arange(4, dtype=torch.int32)

    def step(q, k, k_pages, v_pages, block_table):
        kv_append(k, k * 2, k_pages, v_pages, block_table, seq, position)
        return attention_decode(q, k_pages, v_pages, block_table, seq, position)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(q, k, *other.tensors), step(q, k, *cache.tensors))
    assert_same_bits(other.v_pages.nan_to_num(), cache.v_pages.nan_to_num())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_names_the_op_the_argument_and_both_sides(device):
    def decode(
        q=(2, 4, 8), k=(3, 2, 1, 8, 16), v=(3, 2, 16, 8), table=(1, 3), seq=2, position=2, dtype=F32, index=torch.int32
    ):
        attention_decode(
            torch.zeros(q, device=device, dtype=dtype),
            torch.zeros(k, device=device),
            torch.zeros(v, device=device),
            torch.zeros(table, device=device, dtype=index),
            torch.zeros(seq, device=device, dtype=torch.int32),
            torch.zeros(position, device=device, dtype=torch.int32),
        )

    for change, message in [
        ({"q": (2, 3, 8)}, r"\[attention_decode\] q: expected a number of heads that is a multiple of 2 .*got 3"),
        ({"q": (2, 4, 9)}, r"\[attention_decode\] q: expected head_dim 8, that of v_pages, got 9"),
        ({"q": (4, 8)}, r"\[attention_decode\] q: expected \[T, H, D\], got shape \(4, 8\)"),
        ({"dtype": torch.int32}, r"\[attention_decode\] q: expected torch.float32 or .* got torch.int32"),
        ({"v": (3, 2, 24, 8)}, r"\[attention_decode\] v_pages: expected a page size .* multiple of 16, got 24"),
        ({"k": (3, 2, 2, 8, 16)}, r"\[attention_decode\] k_pages: expected shape \(3, 2, 1, 8, 16\).* got"),
        ({"index": torch.int64}, r"\[attention_decode\] block_table: expected torch.int32, got torch.int64"),
        ({"seq": 3}, r"\[attention_decode\] seq: expected shape \(2,\).* got \(3,\)"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            decode(**change)
    decode()
    pages = torch.zeros(3, 2, 1, 8, 16, device=device), torch.zeros(3, 2, 16, 8, device=device)
    rows = torch.zeros(1, 2, 8, device=device)
    index = [torch.zeros(n, dtype=torch.int32, device=device) for n in ((1, 1), 1, 1)]
    with pytest.raises(
        RuntimeError, match=r"\[kv_append\] v: expected shape \(1, 2, 8\), the shape of k, got \(1, 1, 8\)"
    ):
        kv_append(rows, rows[:, :1], *pages, *index)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_int8_pages_come_with_scales_and_no_others_do(device):
    q, index = torch.zeros(1, 2, 8, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    table, scales = index[None], torch.zeros(3, 2, 16, device=device)

    def decode(dtype, k_scales, v_scales):
        k_pages = torch.zeros(3, 2, 1, 8, 16, dtype=dtype, device=device)
        v_pages = torch.zeros(3, 2, 16, 8, dtype=dtype, device=device)
        kv_append(q, q, k_pages, v_pages, table, index, index, k_scales=k_scales, v_scales=v_scales)
        attention_decode(q, k_pages, v_pages, table, index, index, k_scales=k_scales, v_scales=v_scales)

    for arguments, message in [
        ((INT8, None, scales), r"k_scales: expected a tensor, for int8 pages, got None"),
        ((INT8, scales, None), r"v_scales: expected a tensor, for int8 pages, got None"),
        ((F32, scales, None), r"k_scales: expected None, for pages that are not int8"),
        ((INT8, scales, scales.double()), r"v_scales: expected torch.float32, got torch.float64"),
        ((INT8, scales[:2], scales), r"k_scales: expected shape \(3, 2, 16\).* got \(2, 2, 16\)"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            decode(*arguments)
    decode(INT8, scales, scales.clone())
    decode(F32, None, None)


def test_native_checks_of_scales():
    cache, _ = filled([20], 2, 8, 16, INT8)
    q, index, y = torch.zeros(1, 2, 8), int32([0]), torch.zeros(1, 2, 8)
    good = cache.scales["k_scales"]
    for bad, message in [(None, "k_scales: expected a tensor"), (good.double(), "k_scales: expected float32"),
                         (good[:1], "k_scales"), (good.transpose(1, 2), "k_scales")]:  # fmt: skip
        with pytest.raises(ArgumentError, match=message):
            _C.attention_decode_cpu(q, *cache.tensors, index, index, y, 1.0, None, k_scales=bad, v_scales=good)
    cache, _ = filled([20], 2, 8, 16, F32)
    with pytest.raises(ArgumentError, match="v_scales: expected None"):
        _C.kv_append_cpu(q, q, *cache.tensors, index, index, v_scales=good)


def test_what_the_data_names_must_exist():
    cache, _ = filled([40], 1, 8, 16, F32)
    q = torch.zeros(1, 1, 8)
    for seq, position, message in [
        (1, 0, r"\[attention_decode\] seq: expected 0 to 0 .*got 1 at row 0"),
        (-1, 0, r"\[attention_decode\] seq: .*got -1"),
        (0, 48, r"\[attention_decode\] position: expected 0 to 47 .*got 48 at row 0"),
        (0, -1, r"\[attention_decode\] position: .*got -1"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            cache.attend(q, [seq], [position])
    cache.block_table[0, 1] = 3
    with pytest.raises(ArgumentError, match=r"block_table: expected 0 to 2 \(number of pages\), got 3 at \[0, 1\]"):
        cache.attend(q, [0], [39])
    cache.attend(q, [0], [39], sliding_window=8)  # does not see that page
    with pytest.raises(ArgumentError, match=r"\[attention_decode\] sliding_window: expected at least 1 or None, got 0"):
        cache.attend(q, [0], [3], sliding_window=0)
    with pytest.raises(ArgumentError, match=r"\[kv_append\] position: expected rows that name different slots"):
        cache.append(torch.zeros(2, 1, 8), torch.zeros(2, 1, 8), [0, 0], [5, 5])
    with pytest.raises(ArgumentError, match=r"\[kv_append\] block_table: .*got 3"):
        cache.append(q, q, [0], [20])
