import numpy as np
import pytest
import torch

from pyengine import _C
from pyengine.ops.matmul import matmul
from pyengine.reference.matmul import matmul as reference
from pyengine.testing import LAYOUTS, assert_accurate, assert_same_bits, force_num_threads
from pyengine.testing.guard import guarded

DTYPES = [torch.float32, torch.bfloat16]
# Every height of a register tile, one row more and one less; several tiles.
NUM_ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 17, 33, 64, 129]
# (N, K): below, at and above a panel and a K block; primes; no depth; no columns.
WEIGHT_SHAPES = [(1, 1), (16, 16), (17, 255), (31, 256), (33, 257), (100, 601), (64, 0), (0, 5)]
PANEL = _C.MATMUL_PANEL


def _integers(*shape, dtype=torch.float32, limit=8):
    """Whole numbers so small that every sum below is exact in f32."""
    return torch.randint(-limit, limit + 1, shape).to(dtype)


def _exact(x, w):
    return (x.long() @ w.long().t()).to(torch.float32)


def _pack(w, dtype=None):
    packed = torch.full((-(-w.shape[0] // PANEL), w.shape[1], PANEL), float("nan"), dtype=dtype or w.dtype)
    _C.matmul_pack_cpu(w, packed)
    return packed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_shape", WEIGHT_SHAPES, ids=str)
def test_products_of_integers_are_exact(isa, weight_shape, dtype):
    torch.manual_seed(0)
    w = _integers(*weight_shape, dtype=dtype)
    for num_rows in NUM_ROWS:
        x = _integers(num_rows, weight_shape[1], dtype=dtype)
        assert_same_bits(matmul(x, w, out_dtype=torch.float32), _exact(x, w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_integers_are_exact(isa, dtype):
    torch.manual_seed(0)
    for num_rows, num_cols, depth in [(1, 1, 1), (7, 33, 20), (300, 17, 31), (13, 5, 300)]:
        x, w = _integers(num_rows, depth, dtype=dtype, limit=2), _integers(num_cols, depth, dtype=dtype, limit=2)
        grad_y = _integers(num_rows, num_cols, limit=2)
        y = matmul(x.requires_grad_(), w.requires_grad_(), out_dtype=torch.float32)
        grad_x, grad_w = torch.autograd.grad(y, (x, w), grad_y)
        assert_same_bits(grad_x, _exact(grad_y, w.detach().t()).to(dtype))
        assert_same_bits(grad_w, _exact(grad_y.t(), x.detach().t()).to(dtype))


def test_needs_no_gradient_that_is_not_asked_for(isa):
    x, w = torch.randn(5, 7), torch.randn(3, 7)
    for frozen, trained in [(x, w), (w, x)]:
        leaf = trained.clone().requires_grad_()
        args = (frozen, leaf) if frozen is x else (leaf, frozen)
        matmul(*args).sum().backward()
        assert leaf.grad is not None
        assert frozen.grad is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (5, 257), (2, 3, 64), (0, 8)], ids=str)
# Where both are expanded all sums of y are one sum, whose error against torch's is luck: test_both_expanded.
@pytest.mark.parametrize(
    ("layout", "weight_layout"),
    [(a, b) for a in LAYOUTS for b in LAYOUTS if "contiguous" in (a, b) or a == b != "expanded"],
)
def test_matches_reference(isa, shape, layout, weight_layout, dtype):
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.randn(shape).to(dtype))
    w = LAYOUTS[weight_layout](torch.randn(19, shape[-1]).to(dtype))
    grad_y = LAYOUTS[layout](torch.randn(*shape[:-1], 19).to(dtype))
    runs = []
    for fn, d in [(matmul, dtype), (reference, torch.float64), (reference, dtype)]:
        leaves = [t.detach().to(d).requires_grad_() for t in (x, w)]
        y = fn(*leaves)
        runs.append((y, *torch.autograd.grad(y, leaves, grad_y.to(d))))
    for got, exact, baseline in zip(*runs, strict=True):
        assert_accurate(got, exact, baseline)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_expanded(isa, dtype):
    x, w = _integers(1, 257, dtype=dtype).expand(5, 257), _integers(1, 257, dtype=dtype).expand(19, 257)
    assert_same_bits(matmul(x, w, out_dtype=torch.float32), _exact(x, w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_rounds_once_to_the_output_dtype(isa, dtype, out_dtype):
    torch.manual_seed(0)
    x, w = torch.randn(9, 300).to(dtype), torch.randn(21, 300).to(dtype)
    y = matmul(x, w, out_dtype=out_dtype)
    assert_same_bits(y, matmul(x, w, out_dtype=torch.float32).to(out_dtype))
    assert matmul(x, w).dtype == dtype


def _chain(left, right, columns):
    """Fused multiply-adds from 0: a product of two bf16 has 16 bits, so each is an exact f64 sum rounded to f32."""
    total = np.zeros((len(left), len(right)), np.float32)
    for k in columns:
        total = (total.astype(np.float64) + np.outer(left[:, k], right[:, k])).astype(np.float32)
    return total


def test_adds_in_the_order_of_the_contract(isa):
    torch.manual_seed(0)
    x, w = torch.randn(14, 601).bfloat16(), torch.randn(37, 601).bfloat16()
    left, right = x.double().numpy(), w.double().numpy()
    vectors, tiles = np.zeros((14, 37), np.float32), np.zeros((14, 37), np.float32)
    for begin in range(0, 601, 256):
        vectors += _chain(left, right, range(begin, min(begin + 256, 601)))
    for begin in range(0, 601, 32):
        end = min(begin + 32, 601)
        tiles += _chain(left, right, range(begin, end, 2)) + _chain(left, right, range(begin + 1, end, 2))
    assert (tiles != vectors).any()
    pairs = np.zeros((14, 37), np.float32)
    for begin in range(0, 601, 256):
        end = min(begin + 256, 601)
        pairs += _chain(left, right, [k for i in range(begin, end, 2) for k in (i + 1, i) if k < end])
    for dtype in DTYPES:
        of_bf16 = {"amx": tiles, "avx512_bf16": pairs}.get(isa, vectors)
        expected = of_bf16 if dtype == torch.bfloat16 else vectors
        got = matmul(x.to(dtype), w.to(dtype), out_dtype=torch.float32)
        assert_same_bits(got, torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(isa, dtype):
    torch.manual_seed(0)
    x, w = torch.randn(45, 601).to(dtype), torch.randn(83, 601).to(dtype)
    whole = matmul(x, w, out_dtype=torch.float32)
    for count in range(1, 46):
        assert_same_bits(matmul(x[45 - count :], w, out_dtype=torch.float32), whole[45 - count :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_column_does_not_depend_on_the_others(isa, dtype):
    torch.manual_seed(0)
    x, w = torch.randn(13, 300).to(dtype), torch.randn(83, 300).to(dtype)
    whole = matmul(x, w)
    for count in (1, 15, 16, 17, 48, 80):
        assert_same_bits(matmul(x, w[:count]), whole[:, :count])
        assert_same_bits(matmul(x, w[83 - count :]), whole[:, 83 - count :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(isa, dtype):
    torch.manual_seed(0)
    x, w, grad_y = (torch.randn(shape).to(dtype) for shape in [(401, 300), (500, 300), (401, 500)])
    results = []
    for count in (1, 2, 3):
        with force_num_threads(count):
            leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
            y = matmul(*leaves)
            results.append((y, *torch.autograd.grad(y, leaves, grad_y)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(b, a)


def test_weights_larger_than_the_scratch_memory(isa):
    torch.manual_seed(0)
    x, w = _integers(3, 3000), _integers(1100, 3000)
    assert_same_bits(matmul(x, w), _exact(x, w))


@pytest.mark.parametrize("depth", [1, 7, 16, 33, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at_end", [True, False])
def test_touches_no_byte_outside_its_tensors(isa, at_end, dtype, depth):
    def guard(*shape):
        return guarded(_integers(*shape, dtype=dtype, limit=2), at_end=at_end)

    x, w, y = guard(5, depth), guard(19, depth), guard(5, 19)
    _C.matmul_unpacked_cpu(x, w, y)
    assert_same_bits(y, _exact(x, w).to(dtype))
    packed = guard(2, depth, PANEL)
    _C.matmul_pack_cpu(w, packed)
    _C.matmul_cpu(x, packed, y.zero_())
    assert_same_bits(y, _exact(x, w).to(dtype))
    # Transposed operands take the other paths of both copies.
    x, w = guard(depth, 5).t(), guard(depth, 19).t()
    _C.matmul_unpacked_cpu(x, w, y)
    assert_same_bits(y, _exact(x, w).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed_dtype", DTYPES, ids=str)
def test_packs_panels_of_sixteen_rows(isa, dtype, packed_dtype):
    torch.manual_seed(0)
    for num_rows, num_cols in [(1, 1), (16, 17), (37, 33), (3, 0)]:
        w = torch.randn(num_rows, num_cols).to(dtype)
        num_panels = -(-num_rows // PANEL)
        padded = torch.zeros(num_panels * PANEL, num_cols, dtype=packed_dtype)
        padded[:num_rows] = w
        expected = padded.view(num_panels, PANEL, num_cols).transpose(1, 2).contiguous()
        for layout in ("contiguous", "row_strided", "col_strided", "transposed"):
            assert_same_bits(_pack(LAYOUTS[layout](w), packed_dtype), expected)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("y_dtype", DTYPES, ids=str)
def test_packed_product_mixes_dtypes(isa, x_dtype, w_dtype, y_dtype):
    torch.manual_seed(0)
    x, w = torch.randn(9, 300).to(x_dtype), torch.randn(100, 300).to(w_dtype)
    y = torch.empty(9, 100, dtype=y_dtype)
    _C.matmul_cpu(x, _pack(w), y)
    has_own_order = isa in ("avx512_bf16", "amx") and x_dtype == w_dtype == torch.bfloat16
    expected = matmul(x, w, out_dtype=torch.float32) if has_own_order else matmul(x.float(), w.float())
    assert_same_bits(y, expected.to(y_dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulates_from_what_y_holds(isa, dtype):
    x, w, y = _integers(14, 300, dtype=dtype), _integers(37, 300, dtype=dtype), _integers(14, 37)
    expected = y + _exact(x, w)
    _C.matmul_cpu(x, _pack(w), y, accumulate=True)
    assert_same_bits(y, expected)
    # Two halves of whole K blocks add up to the bits of one product.
    x, w = torch.randn(14, 700).to(dtype), torch.randn(37, 700).to(dtype)
    y = matmul(x[:, :512], w[:, :512], out_dtype=torch.float32)
    _C.matmul_cpu(x[:, 512:], _pack(w[:, 512:]), y, accumulate=True)
    assert_same_bits(y, matmul(x, w, out_dtype=torch.float32))


def test_writes_only_its_columns_of_y(isa):
    x, w, canvas = _integers(13, 30), _integers(21, 30), torch.full((13, 40), 99.0)
    _C.matmul_cpu(x, _pack(w), canvas[:, 10:31])
    assert_same_bits(canvas[:, 10:31].clone(), _exact(x, w))
    assert (canvas[:, :10] == 99).all()
    assert (canvas[:, 31:] == 99).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_stay_in_their_row_and_column(isa, dtype):
    # 17 rows and 21 columns leave most of a second tile to padding.
    x, w = torch.ones(17, 21), torch.ones(37, 21)
    x[1, 7], x[4, 0] = float("nan"), float("inf")
    w[17, 3], w[20, 2] = float("nan"), float("-inf")
    y = matmul(x.to(dtype), w.to(dtype), out_dtype=torch.float32)
    expected = torch.full((17, 37), 21.0)
    expected[4], expected[:, 20] = float("inf"), float("-inf")
    expected[4, 20] = float("-inf") + float("inf")
    expected[1], expected[:, 17] = float("nan"), float("nan")
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=0)


def test_gradcheck_of_the_reference():
    x, w = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(reference, (x.requires_grad_(), w.requires_grad_()))


def test_opcheck():
    op = torch.ops.pyengine.matmul.default
    for args in [
        (torch.randn(4, 16), torch.randn(5, 16), torch.float32),
        (torch.randn(2, 3, 16).bfloat16(), torch.randn(16, 5).bfloat16().t(), torch.float32),
    ]:
        assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


def test_compiles_without_graph_break():
    x, w = torch.randn(2, 4, 16, requires_grad=True), torch.randn(5, 16, requires_grad=True)

    def fn(x, w):
        return (matmul(x * 2, w) ** 2).sum()

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, w), (x, w))
    torch.testing.assert_close(got, torch.autograd.grad(fn(x, w), (x, w)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_names_the_op_the_argument_and_both_shapes(device):
    x, w = torch.randn(4, 16, device=device), torch.randn(5, 16, device=device)
    with pytest.raises(RuntimeError, match=r"\[matmul\] w: expected shape \(N, 16\).* got \(5, 15\)"):
        matmul(x, w[:, :15])
    with pytest.raises(RuntimeError, match=r"\[matmul\] w: expected 2 dimensions, got shape \(16,\)"):
        matmul(x, w[0])
    with pytest.raises(RuntimeError, match=r"\[matmul\] w: expected torch.float32.* got torch.bfloat16"):
        matmul(x, w.bfloat16())
    with pytest.raises(RuntimeError, match=r"\[matmul\] x: expected torch.float32 or .* got torch.int32"):
        matmul(x.int(), w.int())
    with pytest.raises(RuntimeError, match=r"\[matmul\] out_dtype: expected .* got torch.float16"):
        matmul(x, w, out_dtype=torch.float16)


def test_native_entry_checks_what_it_is_given():
    x, w, y = torch.ones(4, 16), torch.ones(5, 16), torch.ones(4, 5)
    packed = _pack(w)
    for call, name in [
        (lambda: _C.matmul_unpacked_cpu(x, w[:, :15], y), "w"),
        (lambda: _C.matmul_unpacked_cpu(x, w, y.t()), "y"),
        (lambda: _C.matmul_cpu(x, packed[:, :15], y), "packed"),
        (lambda: _C.matmul_cpu(x, packed, torch.ones(4, 17)), "packed"),
        (lambda: _C.matmul_cpu(x, packed, y.bfloat16(), accumulate=True), "y"),
        (lambda: _C.matmul_pack_cpu(w, torch.ones(2, 16, PANEL)), "packed"),
    ]:
        with pytest.raises(ValueError, match=rf"\[matmul\] {name}: expected"):
            call()
