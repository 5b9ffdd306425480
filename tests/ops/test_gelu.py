import numpy as np
import pytest
import torch

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.ops import gelu
from pyengine.reference.gelu import gelu as reference
from pyengine.testing import LAYOUTS, assert_accurate, assert_same_bits, force_num_threads
from pyengine.testing.guard import guarded

# One element; one below, at and above a vector; a prime past one block; 1-D and 3-D; several tasks; no rows at all.
SHAPES = [(1, 1), (3, 15), (3, 16), (3, 17), (5, 257), (7,), (2, 3, 64), (40, 513), (0, 8)]
# Every layout of the input with a plain gradient, and every layout of the gradient with a plain input.
LAYOUT_PAIRS = sorted({(name, "contiguous") for name in LAYOUTS} | {("contiguous", name) for name in LAYOUTS})
FORMS = pytest.mark.parametrize("form", ["none", "tanh"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def _run(fn, dtype, x, grad_y, form):
    leaf = x.detach().to(dtype).requires_grad_()
    y = fn(leaf, approximate=form)
    return y, *torch.autograd.grad(y, leaf, grad_y.to(dtype))


@DTYPES
@FORMS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
def test_matches_reference(isa, shape, layout, grad_layout, form, dtype):
    torch.manual_seed(0)
    x = LAYOUTS[layout](4 * torch.randn(shape).to(dtype))
    grad_y = LAYOUTS[grad_layout](torch.randn(shape).to(dtype))
    grad_y_before = grad_y.clone()
    runs = [_run(fn, d, x, grad_y, form) for fn, d in [(gelu, dtype), (reference, torch.float64), (reference, dtype)]]
    for got, exact, baseline in zip(*runs, strict=True):
        assert_accurate(got, exact, baseline)
    assert torch.equal(grad_y, grad_y_before), "backward must not write into grad_y"


def test_every_digit_of_the_contract(isa):
    """Over the whole range, left of 0 too, where 1 + erf cancels."""
    x = torch.linspace(-12, 12, 200_001)
    exact = torch.special.erfc(-x.double() * 0.5**0.5) / 2
    cumulative = gelu(x).double() / x.double()
    smaller = torch.minimum(exact, exact.flip(0))
    keep = (x != 0) & (smaller > 1e-30)
    # The quotient and the product round too, in units of the larger part.
    limit = (8 + x.double() ** 2) * 2.0**-24 * smaller + 2.0**-23 * exact
    assert ((cumulative - exact).abs() <= limit)[keep].all()


@FORMS
def test_extreme_values(isa, form):
    x = torch.tensor([-float("inf"), -1e30, -200.0, -88.0, -14.5, -0.0, 0.0, 14.5, 88.0, 200.0, 1e30, float("inf")])
    y, grad_x = _run(gelu, torch.float32, x, torch.ones(12), form)
    exact = _run(reference, torch.float64, x, torch.ones(12), form)
    finite = x.isfinite()
    for got, expected in zip((y, grad_x), exact, strict=True):
        torch.testing.assert_close(got[finite].double(), expected[finite], rtol=1e-6, atol=1e-30)
    assert y[0].isnan()  # -inf * 0, as in torch
    assert y[-1] == float("inf")
    assert grad_x[[0, -1]].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("num_cols", [1, 7, 16, 33])
@pytest.mark.parametrize("at_end", [True, False])
@DTYPES
@FORMS
def test_touches_no_byte_outside_its_tensors(isa, num_cols, at_end, form, dtype):
    x, grad_y, y, grad_x = (guarded(torch.randn(3, num_cols).to(dtype), at_end=at_end) for _ in range(4))
    _C.gelu_fwd_cpu(x, y, form)
    _C.gelu_bwd_cpu(grad_y, x, grad_x, form)
    for got, expected in zip((y, grad_x), _run(gelu, dtype, x, grad_y, form), strict=True):
        assert_same_bits(got, expected)


@FORMS
def test_outputs_may_be_inputs(isa, form):
    x, grad_y = torch.randn(5, 37), torch.randn(5, 37)
    y, grad_x = _run(gelu, torch.float32, x, grad_y, form)
    for target in (x.clone(), grad_y):
        _C.gelu_bwd_cpu(grad_y, x if target is grad_y else target, target, form)
        assert_same_bits(target, grad_x)
    _C.gelu_fwd_cpu(x, x, form)
    assert_same_bits(x, y)


def test_works_on_numpy_arrays(isa):
    x = torch.randn(3, 9)
    y = np.empty((3, 9), np.float32)
    _C.gelu_fwd_cpu(x.numpy(), y)
    assert_same_bits(torch.from_numpy(y), gelu(x))


@FORMS
def test_same_bits_for_any_number_of_threads_and_for_a_row_alone(isa, form):
    x, grad_y = torch.randn(100, 301), torch.randn(100, 301)
    results = []
    for count in (1, 2, 3):
        with force_num_threads(count):
            results.append(_run(gelu, torch.float32, x, grad_y, form))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(b, a)
    for r in range(0, 100, 9):
        for a, b in zip(results[0], _run(gelu, torch.float32, x[r], grad_y[r], form), strict=True):
            assert_same_bits(b, a[r])


@FORMS
def test_nan_stays_in_its_element(isa, form):
    x = torch.ones(3, 20)
    x[1, 7] = float("nan")
    for got in _run(gelu, torch.float32, x, torch.ones(3, 20), form):
        assert got.isnan().nonzero().tolist() == [[1, 7]]


def test_gradcheck_of_the_reference():
    assert torch.autograd.gradcheck(reference, torch.randn(3, 5, dtype=torch.float64).requires_grad_())


def test_opcheck():
    x, grad_y = torch.randn(4, 16), torch.randn(4, 16)
    ops = torch.ops.pyengine
    for op, args in [(ops.gelu, (x, "none")), (ops.gelu_bwd, (grad_y, x, "tanh"))]:
        assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


def test_compiles_without_graph_break():
    x = torch.randn(4, 16, requires_grad=True)

    def fn(x):
        return (gelu(x * 2) + gelu(x, approximate="tanh")).sum()

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(fn(x), x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_names_the_op_the_argument_and_what_came(device):
    x = torch.randn(4, 16, device=device)
    with pytest.raises(RuntimeError, match=r"\[gelu\] x: expected torch.float32 or .* got torch.float64"):
        gelu(x.double())
    with pytest.raises(RuntimeError, match=r"\[gelu\] approximate: expected 'none' or 'tanh', got 'erf'"):
        gelu(x, approximate="erf")
    with pytest.raises(RuntimeError, match=r"\[gelu\] grad_y: expected shape \(4, 16\), .* got \(4, 15\)"):
        torch.ops.pyengine.gelu_bwd(x[:, :15], x, "none")


def test_binding_names_the_argument():
    x = torch.randn(4, 16)
    with pytest.raises(ArgumentError, match=r"\[gelu\] x: expected unit stride"):
        _C.gelu_fwd_cpu(torch.randn(16, 4).t(), torch.empty(4, 16))
    with pytest.raises(ArgumentError, match=r"\[gelu\] approximate: expected 'none' or 'tanh', got 'erf'"):
        _C.gelu_fwd_cpu(x, torch.empty(4, 16), "erf")
