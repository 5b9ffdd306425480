import numpy as np
import pytest
import torch

from pyengine import _C
from pyengine.ops.lora import lora, lora_rows
from pyengine.reference.lora import lora as reference
from pyengine.reference.lora import lora_rows as reference_rows
from pyengine.testing import LAYOUTS, assert_accurate, assert_same_bits, force_num_threads
from pyengine.testing.guard import guarded

DTYPES = [torch.float32, torch.bfloat16]
# (K, N, rank): one element; below, at and above a vector, a panel and a K block; primes; the largest rank; no depth.
SHAPES = [(1, 1, 1), (15, 16, 7), (16, 17, 16), (33, 31, 17), (257, 100, 8), (601, 37, 33), (64, 130, 256), (0, 5, 4)]


def _integers(*shape, dtype=torch.float32, limit=3):
    """Whole numbers so small that every sum below is exact in f32."""
    return torch.randint(-limit, limit + 1, shape).to(dtype)


def _case(num_rows, shape, dtype, weight_dtype=torch.float32, num_adapters=3):
    depth, num_cols, rank = shape
    ranks = [max(rank - i, 1) for i in range(num_adapters)]
    y, x = torch.randn(num_rows, num_cols).to(dtype), torch.randn(num_rows, depth).to(dtype)
    a = [torch.randn(r, depth).to(weight_dtype) for r in ranks]
    b = [torch.randn(num_cols, r).to(weight_dtype) for r in ranks]
    scales = [0.5 + i for i in range(num_adapters)]
    adapter_of_row = torch.randint(-1, num_adapters, (num_rows,), dtype=torch.int32)
    return y, x, a, b, scales, adapter_of_row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_integers_are_exact(isa, shape, dtype, weight_dtype):
    torch.manual_seed(0)
    depth, num_cols, rank = shape
    for num_rows in (0, 1, 3, 4, 5, 33, 70):
        x, y = _integers(num_rows, depth, dtype=dtype, limit=1), _integers(num_rows, num_cols, dtype=dtype)
        a, b = _integers(rank, depth, dtype=weight_dtype, limit=1), _integers(num_cols, rank, dtype=weight_dtype)
        exact = y.long() + 2 * (x.long() @ a.long().t()) @ b.long().t()
        assert exact.numel() == 0 or exact.abs().max() < 2**24
        assert_same_bits(lora(y, x, a, b, 2.0), exact.float().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lead", [(7,), (2, 3), (0,), ()], ids=str)
# Where the rows of a weight are all alike, so are the sums, and the error of one sum against torch's is luck.
@pytest.mark.parametrize(
    ("layout", "weight_layout"),
    [(a, b) for a in LAYOUTS for b in LAYOUTS if "contiguous" in (a, b) and b != "expanded"],
)
def test_matches_reference(isa, lead, layout, weight_layout, dtype, weight_dtype):
    torch.manual_seed(0)
    x, y, grad_y = (LAYOUTS[layout](torch.randn(*lead, size).to(dtype)) for size in (65, 33, 33))
    a, b = (LAYOUTS[weight_layout](torch.randn(shape).to(weight_dtype)) for shape in ((8, 65), (33, 8)))
    grad_y_before = grad_y.clone()
    runs = []
    for fn, cast in [
        (lora, lambda t: t),
        (reference, lambda t: t.double()),
        (reference, lambda t: t),
    ]:
        leaves = [cast(t.detach()).requires_grad_() for t in (y, x, a, b)]
        out = fn(*leaves, 0.75)
        runs.append((out, *torch.autograd.grad(out, leaves, cast(grad_y))))
    for got, exact, baseline in zip(*runs, strict=True):
        assert_accurate(got, exact, baseline)
    assert torch.equal(grad_y, grad_y_before), "backward must not write into grad_y"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
# Not the gradient of a weight of one element, which is one sum; nor 256 terms, where the scalar level, which rounds
# each product, errs by more than twice what torch does.
@pytest.mark.parametrize("shape", [*SHAPES[1:6], (64, 130, 128), SHAPES[7]], ids=str)
def test_rows_of_several_adapters(isa, shape, dtype, weight_dtype):
    torch.manual_seed(0)
    case = _case(41, shape, dtype, weight_dtype)
    y, x, a, b, scales, adapter_of_row = case
    grad_y = torch.randn(y.shape).to(dtype)
    runs = []
    for fn, cast in [
        (lora_rows, lambda t: t),
        (reference_rows, lambda t: t.double()),
        (reference_rows, lambda t: t),
    ]:
        leaves = [cast(t).requires_grad_() for t in (y, x, *a, *b)]
        out = fn(leaves[0], leaves[1], leaves[2:5], leaves[5:], scales, adapter_of_row)
        runs.append((out, *torch.autograd.grad(out, leaves, cast(grad_y))))
    for got, exact, baseline in zip(*runs, strict=True):
        assert_accurate(got, exact, baseline)
    assert_same_bits(runs[0][0][adapter_of_row < 0], y[adapter_of_row < 0])


def test_a_row_without_an_adapter_keeps_its_bits(isa):
    y = torch.tensor([[-0.0, float("nan")], [-0.0, float("inf")], [1.0, -0.0]])
    x, a, b = torch.zeros(3, 5), torch.randn(2, 5), torch.zeros(2, 2)
    got = lora_rows(y, x, [a], [b], [1.0], torch.tensor([-1, 0, -1], dtype=torch.int32))
    assert_same_bits(got[[0, 2]], y[[0, 2]])
    assert_same_bits(got[1], torch.tensor([0.0, float("inf")]))  # it took part: -0 + 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_depends_on_itself_and_its_adapter(isa, dtype):
    torch.manual_seed(0)
    y, x, a, b, scales, _ = _case(75, (601, 150, 33), dtype)
    alone = [[lora(y[r], x[r], a[i], b[i], scales[i]) for r in range(75)] for i in range(3)]
    for seed in range(4):
        order = torch.randint(-1, 3, (75,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
        for count in (75, 34, 5, 1):
            got = lora_rows(y[:count], x[:count], a, b, scales, order[:count])
            for r in range(count):
                assert_same_bits(got[r], y[r] if order[r] < 0 else alone[order[r]][r])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(isa, dtype):
    torch.manual_seed(0)
    y, x, a, b, scales, adapter_of_row = _case(150, (300, 500, 40), dtype)
    grad_y = torch.randn(y.shape).to(dtype)
    results = []
    for count in (1, 2, 3):
        with force_num_threads(count):
            leaves = [t.clone().requires_grad_() for t in (y, x, *a, *b)]
            out = lora_rows(leaves[0], leaves[1], leaves[2:5], leaves[5:], scales, adapter_of_row)
            results.append((out, *torch.autograd.grad(out, leaves, grad_y)))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert_same_bits(second, first)


def _fma(x, y, acc):
    """Of bf16 values in x: the product with an f32 is exact in f64, and so nearly always is the sum."""
    return (np.float64(x) * np.float64(y) + np.float64(acc)).astype(np.float32)


def test_adds_in_the_order_of_the_contract(isa):
    if isa == "scalar":
        pytest.skip("rounds the product before the addition")
    torch.manual_seed(0)
    # bf16 weights and activations: every product is exact in f32, so a chain in f64 rounds as the kernel does.
    y, x = torch.randn(3, 37), torch.randn(3, 601).bfloat16().float()
    a, b, scale = torch.randn(18, 601).bfloat16(), torch.randn(37, 18).bfloat16(), 0.3
    u = np.zeros((3, 18), np.float32)
    for begin in range(0, 601, 256):
        chains = []
        for c in range(4):
            acc = np.zeros((3, 18), np.float32)
            for k in range(begin + c, min(begin + 256, 601), 4):
                acc = _fma(x.numpy()[:, k, None], a.float().numpy()[None, :, k], acc)
            chains.append(acc)
        u += (chains[0] + chains[1]) + (chains[2] + chains[3])
    u *= np.float32(scale)
    total = np.zeros((3, 37), np.float32)
    for j in range(18):
        total = _fma(u[:, j, None], b.float().numpy()[None, :, j], total)
    assert_same_bits(lora(y, x, a, b, scale), torch.from_numpy(y.numpy() + total))


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (15, 17, 3), (16, 16, 16), (257, 33, 17)], ids=str)
def test_touches_no_byte_outside_its_tensors(isa, shape, dtype, at_end):
    depth, num_cols, rank = shape
    sizes = [(6, num_cols), (6, depth), (rank, depth), (num_cols, rank)]
    y, x, a, b = (guarded(_integers(*size, dtype=dtype, limit=1), at_end=at_end) for size in sizes)
    exact = y.long() + (x.long() @ a.long().t()) @ b.long().t()
    numbers = guarded(torch.zeros(6, dtype=torch.int32), at_end=at_end)
    _C.lora_cpu(y, x, [a], [b], [1.0], numbers)
    assert_same_bits(y, exact.to(dtype))


def test_writes_only_its_columns_of_y(isa):
    canvas, x, a, b = torch.full((5, 40), 99.0), _integers(5, 30), _integers(4, 30), _integers(21, 4)
    _C.lora_cpu(canvas[:, 10:31], x, [a], [b], [1.0])
    assert_same_bits(canvas[:, 10:31].clone(), 99 + (x @ a.t()) @ b.t())
    assert (canvas[:, :10] == 99).all()
    assert (canvas[:, 31:] == 99).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_stay_in_their_row_and_adapter(isa, dtype):
    x, y = torch.ones(9, 21).to(dtype), torch.zeros(9, 37).to(dtype)
    a, b = [torch.ones(3, 21), torch.ones(3, 21)], [torch.ones(37, 3), torch.ones(37, 3)]
    x[1, 7], x[4, 0] = float("nan"), float("inf")
    b[1][20, 2] = float("nan")
    numbers = torch.tensor([0, 0, 1, 0, 0, 1, -1, 0, 0], dtype=torch.int32)
    got = lora_rows(y, x, a, b, [1.0, 1.0], numbers)
    expected = torch.full((9, 37), 63.0)
    expected[1], expected[4], expected[6] = float("nan"), float("inf"), 0.0
    expected[[2, 5], 20] = float("nan")
    torch.testing.assert_close(got.float(), expected, equal_nan=True, rtol=0, atol=0)


def test_no_adapters_at_all(isa):
    y, x = torch.randn(3, 5), torch.randn(3, 4)
    assert_same_bits(lora_rows(y, x, [], [], [], torch.full((3,), -1, dtype=torch.int32)), y)


def test_gradcheck_of_the_reference():
    leaves = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((3, 4), (3, 5), (2, 5), (4, 2))]
    assert torch.autograd.gradcheck(lambda *t: reference(*t, 0.7), leaves)


def test_needs_no_gradient_that_is_not_asked_for(isa):
    y, x, a, b = torch.randn(3, 4), torch.randn(3, 5), torch.randn(2, 5), torch.randn(4, 2)
    for i in range(4):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate((y, x, a, b))]
        lora(*leaves, 0.7).sum().backward()
        assert [t.grad is not None for t in leaves] == [i == j for j in range(4)]


def test_opcheck():
    ops = torch.ops.pyengine
    y, x, a, b, scales, numbers = _case(6, (16, 12, 4), torch.float32)
    for args in [(y, x, a, b, scales, numbers), (y.view(2, 3, 12), x.view(2, 3, 16), a[:1], b[:1], [1.0], None)]:
        for op in (ops.lora.default, ops.lora_fwd.default):
            assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


def test_compiles_without_graph_break():
    leaves = [torch.randn(s, requires_grad=True) for s in ((3, 4), (3, 5), (2, 5), (4, 2))]

    def fn(y, x, a, b):
        return (lora(y * 2, x, a, b, 0.7) ** 2).sum()

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(fn(*leaves), leaves))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_names_the_op_the_argument_and_both_shapes(device):
    y, x, a, b = (torch.randn(s, device=device) for s in ((4, 5), (4, 16), (3, 16), (5, 3)))
    numbers = torch.zeros(4, dtype=torch.int32, device=device)
    for call, message in [
        (lambda: lora(y, x, a[:, :15], b, 1.0), r"a: expected shape \(1 to 256, 16\).* got \(3, 15\)"),
        (lambda: lora(y, x, a.repeat(100, 1), b, 1.0), r"a: expected shape \(1 to 256, 16\).* got \(300, 16\)"),
        (lambda: lora(y, x, a, b[:, :2], 1.0), r"b: expected shape \(5, 3\).* got \(5, 2\)"),
        (lambda: lora(y[:3], x, a, b, 1.0), r"y: expected shape \(4, 5\), the rows of x, got \(3, 5\)"),
        (lambda: lora(y.bfloat16(), x, a, b, 1.0), r"y: expected torch.float32.* got torch.bfloat16"),
        (lambda: lora(y, x, a.double(), b, 1.0), r"a: expected torch.float32 or .* got torch.float64"),
        (lambda: lora(y.int(), x.int(), a, b, 1.0), r"x: expected torch.float32 or .* got torch.int32"),
        (lambda: lora_rows(y, x, [a, a], [b], [1.0]), r"b: expected 2, one per adapter, got 1"),
        (lambda: lora_rows(y, x, [a], [b], []), r"scales: expected 1, one per adapter, got 0"),
        (lambda: lora_rows(y, x, [a, a], [b, b], [1.0, 1.0]), r"adapter_of_row: expected a number .* got None"),
        (lambda: lora_rows(y, x, [a], [b], [1.0], numbers[:3]), r"adapter_of_row: expected shape \(4,\).* got \(3,\)"),
        (lambda: lora_rows(y, x, [a], [b], [1.0], numbers.long()), r"adapter_of_row: expected torch.int32, got"),
    ]:
        with pytest.raises(RuntimeError, match=rf"\[lora\] {message}"):
            call()


def test_native_entry_checks_what_it_is_given():
    y, x, a, b = torch.ones(4, 5), torch.ones(4, 16), torch.ones(3, 16), torch.ones(5, 3)
    for call, name in [
        (lambda: _C.lora_cpu(y, x, [a[:, :15]], [b], [1.0]), "a"),
        (lambda: _C.lora_cpu(y, x, [a[:0]], [b[:, :0]], [1.0]), "a"),
        (lambda: _C.lora_cpu(y, x, [a], [b[:4]], [1.0]), "b"),
        (lambda: _C.lora_cpu(y.t(), x, [a], [b], [1.0]), "y"),
        (lambda: _C.lora_cpu(y, x, [a], [b], [1.0], torch.ones(4, dtype=torch.int32)), "adapter_of_row"),
        (lambda: _C.lora_cpu(y, x, [a], [b], [1.0], torch.full((4,), -2, dtype=torch.int32)), "adapter_of_row"),
    ]:
        with pytest.raises(ValueError, match=rf"\[lora\] {name}: expected"):
            call()
