import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.ops.attention import attention
from pyengine.ops.attention_decode import attention_decode, kv_append
from pyengine.reference.attention import attention as reference
from pyengine.reference.attention import attention_with_lse as reference_with_lse
from pyengine.testing import LAYOUTS, assert_accurate, assert_same_bits, force_num_threads
from pyengine.testing.guard import guarded

F32, BF16 = torch.float32, torch.bfloat16
HEAD_DIMS = [1, 15, 16, 17, 64, 80, 96, 128, 200, 256]
NAN = float("nan")


def int32(values):
    return torch.as_tensor(values, dtype=torch.int32)


def random_case(num_tokens, num_heads, num_kv_heads, head_dim, dtype):
    """q, k, v and grad_y."""
    torch.manual_seed(num_tokens * 1000 + head_dim)
    sizes = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return [torch.randn(num_tokens, n, head_dim).to(dtype) for n in sizes]


def run(fn, dtype, case, **options):
    """y, grad_q, grad_k, grad_v."""
    *inputs, grad_y = case
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    y = fn(*leaves, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(dtype))


def assert_case(case, factor=2.0, **options):
    dtype = case[0].dtype
    runs = [
        run(fn, d, case, **options) for fn, d in [(attention, dtype), (reference, torch.float64), (reference, dtype)]
    ]
    for i, (got, exact, baseline) in enumerate(zip(*runs, strict=True)):
        assert_accurate(got, exact, baseline, factor=factor if i else 2.0)


# Lengths around a lane block, a tile and a block of keys; head groups of 1, 3, and more than a tile of rows.
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (15, 2, 2), (17, 3, 1), (64, 4, 4), (67, 9, 3), (130, 2, 1), (6, 50, 1)], ids=str
)
def test_matches_reference(isa, shape, causal, dtype):
    assert_case(random_case(*shape, 20, dtype), causal=causal)


@functools.cache
def head_dim_case(head_dim, dtype):
    case = random_case(70, 4, 2, head_dim, dtype)
    return case, run(reference, torch.float64, case), run(reference, dtype, case)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(isa, head_dim, dtype):
    case, exact, baseline = head_dim_case(head_dim, dtype)
    for got, *expected in zip(run(attention, dtype, case), exact, baseline, strict=True):
        assert_accurate(got, *expected)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_matches_torch_sdpa(isa, causal, dtype):
    """An oracle that is nobody's reimplementation: torch's own kernel, in float64."""
    q, k, v, grad_y = random_case(100, 6, 2, 32, dtype)

    def sdpa(q, k, v):
        rows = (t.transpose(0, 1)[None] for t in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=causal, enable_gqa=True)
        return y[0].transpose(0, 1)

    case = (q, k, v, grad_y)
    got, exact, baseline = (
        run(attention, dtype, case, causal=causal),
        run(sdpa, torch.float64, case),
        run(sdpa, dtype, case),
    )
    for triple in zip(got, exact, baseline, strict=True):
        assert_accurate(*triple)


@pytest.mark.parametrize("window", [1, 15, 16, 64, 65, 2**63 - 1])
def test_sliding_window(isa, window):
    assert_case(random_case(150, 3, 1, 16, F32), sliding_window=window)
    assert_case(
        random_case(150, 3, 1, 16, BF16), sliding_window=window, segment_offsets=int32([0, 20, 20, 150]), factor=3
    )


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_segments_match_reference(data):
    lengths = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=6), "lengths")
    causal = data.draw(st.booleans(), "causal")
    window = data.draw(st.none() | st.integers(1, 100), "window") if causal else None
    dtype = data.draw(st.sampled_from([F32, BF16]), "dtype")
    offsets = int32([0, *itertools.accumulate(lengths)])
    case = random_case(sum(lengths), 4, 2, 12, dtype)
    assert_case(case, factor=3, causal=causal, segment_offsets=offsets, sliding_window=window)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_layouts(isa, layout, grad_layout):
    q, k, v, grad_y = random_case(20, 4, 2, 24, F32)
    *inputs, grad = *(LAYOUTS[layout](t) for t in (q, k, v)), LAYOUTS[grad_layout](grad_y)
    before = grad.clone()
    got = run(attention, F32, (*inputs, grad))
    expected = run(attention, F32, [t.clone(memory_format=torch.contiguous_format) for t in (*inputs, grad)])
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)
    assert torch.equal(grad, before), "backward must not write into grad_y"


def test_views_of_one_projection_need_no_copy(isa):
    """q, k and v as slices of a fused projection: row strides of their own."""
    qkv = torch.randn(30, 8, 16)
    got = attention(qkv[:, :4], qkv[:, 4:6], qkv[:, 6:])
    assert_same_bits(got, attention(*(t.contiguous() for t in (qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]))))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_lse(isa, dtype):
    q, k, v, _ = random_case(150, 4, 2, 24, dtype)
    for options in [(0.2, True, int32([0, 70, 70, 150]), 40), (-1.0, False, None, None), (0.2, True, None, None)]:
        _, lse = torch.ops.pyengine.attention_fwd(q, k, v, *options)
        named = dict(zip(("scale", "causal", "segment_offsets", "sliding_window"), options, strict=True))
        exact = reference_with_lse(q.double(), k.double(), v.double(), **named)[1]
        assert_accurate(lse, exact, reference_with_lse(q, k, v, **named)[1])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("cache_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("page_size", [16, 32, 64, 256])
def test_decode_gives_the_bits_of_the_training_forward(isa, page_size, cache_dtype, dtype):
    lengths = [150, 0, 97]
    q, k, v, _ = random_case(sum(lengths), 6, 2, 40, dtype)
    offsets = int32([0, *itertools.accumulate(lengths)])
    seq = torch.cat([int32([s] * n) for s, n in enumerate(lengths)])
    position = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    num_pages = [-(-n // page_size) for n in lengths]
    table = torch.zeros(len(lengths), max(num_pages), dtype=torch.int32)
    pages = torch.randperm(sum(num_pages), dtype=torch.int32).split(num_pages)
    for s, row in enumerate(pages):
        table[s, : len(row)] = row
    k_pages = torch.full((sum(num_pages), 2, page_size // 16, 40, 16), NAN, dtype=cache_dtype)
    v_pages = torch.full((sum(num_pages), 2, page_size, 40), NAN, dtype=cache_dtype)
    kv_append(k, v, k_pages, v_pages, table, seq, position)
    stored = (k.to(cache_dtype), v.to(cache_dtype))
    # bf16 that is kept as f32 is multiplied as f32.
    common = torch.promote_types(dtype, cache_dtype)
    for window in (None, 50):
        wide = attention(q.to(common), *(t.to(common) for t in stored), segment_offsets=offsets, sliding_window=window)
        expected = wide.to(dtype)
        for chunk in (1, 7, 64, len(q)):
            parts = [
                attention_decode(x, k_pages, v_pages, table, s, p, sliding_window=window)
                for x, s, p in zip(q.split(chunk), seq.split(chunk), position.split(chunk), strict=True)
            ]
            assert_same_bits(torch.cat(parts), expected)


def test_a_segment_does_not_depend_on_the_others(isa):
    lengths = [33, 1, 80, 16]
    case = random_case(sum(lengths), 4, 2, 24, F32)
    whole = run(attention, F32, case, segment_offsets=int32([0, *itertools.accumulate(lengths)]))
    for segment, parts in enumerate(zip(*(t.split(lengths) for t in whole), strict=True)):
        alone = run(attention, F32, [t.split(lengths)[segment] for t in case])
        for a, b in zip(alone, parts, strict=True):
            assert_same_bits(a, b)


def test_same_bits_for_any_number_of_threads(isa):
    case = random_case(200, 6, 2, 24, F32)
    results = []
    for count in (1, 2, 3):
        with force_num_threads(count):
            results.append(run(attention, F32, case, segment_offsets=int32([0, 30, 200])))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(b, a)


def test_what_a_row_does_not_see_does_not_reach_it(isa):
    q, k, v, grad_y = random_case(100, 4, 2, 24, F32)
    options = {"segment_offsets": int32([0, 80, 100]), "sliding_window": 30}
    clean = run(attention, F32, (q, k, v, grad_y), **options)
    k[50, 1], v[50, 1] = NAN, NAN
    got = run(attention, F32, (q, k, v, grad_y), **options)
    seen = torch.zeros(100, 4, dtype=torch.bool)
    seen[50:80, 2:] = True  # the window that begins at key 50, in the query heads of kv head 1
    for a, b in zip(got[:2], clean[:2], strict=True):  # y, grad_q
        assert a[seen].isnan().all()
        assert_same_bits(a[~seen], b[~seen])
    for a, b in zip(got[2:], clean[2:], strict=True):  # grad_k, grad_v: of the keys that such a row sees
        assert_same_bits(a[:, 0], b[:, 0])
        assert_same_bits(torch.cat([a[:21, 1], a[80:, 1]]), torch.cat([b[:21, 1], b[80:, 1]]))


def test_infinite_scores_as_in_softmax(isa):
    q, k, v = torch.ones(70, 1, 8), torch.ones(70, 1, 8), torch.randn(70, 1, 8)
    k[:66] = float("-inf")
    y = attention(q, k, v)
    assert y[:66].isnan().all()
    torch.testing.assert_close(y[66:], reference(q, k, v)[66:])


@pytest.mark.parametrize("head_dim", [1, 7, 16, 33])
def test_touches_no_byte_outside_its_tensors(isa, head_dim):
    for at_end in (True, False):
        for dtype in (F32, BF16):
            q, k, v, grad_y = (guarded(t, at_end=at_end) for t in random_case(19, 4, 2, head_dim, dtype))
            y, *grads = (guarded(torch.zeros_like(t), at_end=at_end) for t in (q, q, k, v))
            lse = guarded(torch.zeros(19, 4), at_end=at_end)
            options = (1.0, True, guarded(int32([0, 2, 19]), at_end=at_end), None)
            _C.attention_fwd_cpu(q, k, v, y, lse, *options)
            _C.attention_bwd_cpu(grad_y, q, k, v, y, lse, *grads, *options)
            assert all(t.isfinite().all() for t in (y, lse, *grads))


@pytest.mark.parametrize("offsets", [None, [0], [0, 0, 0]], ids=str)
def test_no_tokens(isa, offsets):
    case = random_case(0, 4, 2, 8, F32)
    for t, like in zip(run(attention, F32, case, segment_offsets=None if offsets is None else int32(offsets)),
                       (case[0], *case[:3]), strict=True):  # fmt: skip
        assert t.shape == like.shape


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck_of_the_reference(causal):
    leaves = [t.double().requires_grad_() for t in random_case(6, 4, 2, 3, F32)[:3]]
    window = 2 if causal else None

    def fn(q, k, v):
        return reference(q, k, v, causal=causal, segment_offsets=int32([0, 2, 6]), sliding_window=window)

    assert torch.autograd.gradcheck(fn, leaves)


def test_opcheck():
    q, k, v, grad_y = random_case(9, 4, 2, 8, F32)
    ops, options = torch.ops.pyengine, (0.3, True, int32([0, 4, 9]), 3)
    y, lse = ops.attention_fwd(q, k, v, *options)
    for op, args in [
        (ops.attention, (q, k, v, *options)),
        (ops.attention_fwd, (q, k, v, 0.3, False, None, None)),
        (ops.attention_bwd, (grad_y, q, k, v, y, lse, *options)),
    ]:
        assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


def test_compiles_without_graph_break():
    leaves = [t.requires_grad_() for t in random_case(9, 4, 2, 8, F32)[:3]]
    offsets = int32([0, 4, 9])

    def fn(q, k, v):
        return (
            attention(q * 2, k, v, segment_offsets=offsets, sliding_window=3) + attention(q, k, v, causal=False)
        ).sum()

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(fn(*leaves), leaves))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_names_the_op_the_argument_and_both_sides(device):
    def call(q=(5, 4, 8), k=(5, 2, 8), v=(5, 2, 8), dtype=F32, k_dtype=F32, offsets=None, **options):
        q, v = (torch.zeros(s, device=device, dtype=dtype) for s in (q, v))
        k = torch.zeros(k, device=device, dtype=k_dtype)
        offsets = None if offsets is None else offsets.to(device)
        return attention(q, k, v, segment_offsets=offsets, **options)

    for change, message in [
        ({"q": (4, 8)}, r"q: expected \[T, H, D\], got shape \(4, 8\)"),
        ({"q": (5, 3, 8)}, r"k: expected a number of heads that divides 3, got 2"),
        ({"k": (5, 0, 8)}, r"k: expected a number of heads that divides 4, got 0"),
        ({"k": (6, 2, 8)}, r"k: expected shape \(5, 2, 8\), the tokens and head_dim of q, got \(6, 2, 8\)"),
        ({"v": (5, 2, 9)}, r"v: expected shape \(5, 2, 8\), the shape of k, got \(5, 2, 9\)"),
        ({"q": (5, 4, 257)}, r"q: expected a head_dim from 1 to 256, got 257"),
        ({"dtype": torch.float64}, r"q: expected torch.float32 or torch.bfloat16, got torch.float64"),
        ({"k_dtype": BF16}, r"k: expected torch.float32, the dtype of q, got torch.bfloat16"),
        ({"offsets": torch.tensor([0, 5])}, r"segment_offsets: expected torch.int32, got torch.int64"),
        ({"offsets": int32([[0, 5]])}, r"segment_offsets: expected \[num_segments \+ 1\], got shape \(1, 2\)"),
        ({"causal": False, "sliding_window": 2}, r"sliding_window: expected None where attention is not causal, got 2"),
        ({"sliding_window": 0}, r"sliding_window: expected at least 1 or None, got 0"),
    ]:
        with pytest.raises(RuntimeError, match=r"\[attention\] " + message):
            call(**change)
    assert call().shape == (5, 4, 8)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 5], "expected 0 first, got 1"),
        ([0, 3, 2, 5], "expected ascending values, got 2 after 3 at 2"),
        ([0, 3], "expected 5 last, the number of tokens, got 3"),
        ([0, 6], "expected 5 last, the number of tokens, got 6"),
        ([0], "expected 5 last, the number of tokens, got 0"),
        ([0, 2**31 - 1, 5], "expected ascending values"),
        ([0, -1, 5], "expected ascending values"),
    ],
)
def test_offsets_must_ascend_from_0_to_the_number_of_tokens(offsets, message):
    q, k, v, _ = random_case(5, 4, 2, 8, F32)
    with pytest.raises(ArgumentError, match=r"\[attention\] segment_offsets: " + message):
        attention(q, k, v, segment_offsets=int32(offsets))
