import pytest
import torch

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.ops import layer_norm, layer_norm_residual
from pyengine.reference.layer_norm import layer_norm as reference
from pyengine.reference.layer_norm import layer_norm_residual as reference_residual
from pyengine.testing import LAYOUTS, assert_accurate, assert_same_bits, force_num_threads
from pyengine.testing.guard import guarded

# One below, at and above a vector; a prime past one block; 1-D and 3-D; several tasks; no rows at all.
SHAPES = [(3, 15), (3, 16), (3, 17), (5, 257), (7,), (2, 3, 64), (150, 33), (0, 8)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Every layout of the input with a plain gradient, every layout of the gradient with a plain input, and no bias.
LAYOUT_PAIRS = sorted({(name, "contiguous") for name in LAYOUTS} | {("contiguous", name) for name in LAYOUTS})
CASES = [*((*pair, True) for pair in LAYOUT_PAIRS), ("contiguous", "contiguous", False)]


def _run(fn, dtype, tensors, grads, **options):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    outputs = fn(*leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *outputs, *torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in grads])


def _vectors(num_cols, has_bias, dtype):
    return [torch.randn(num_cols).to(dtype) for _ in range(1 + has_bias)]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("layout", "grad_layout", "has_bias"), CASES)
def test_matches_reference(isa, shape, layout, grad_layout, has_bias, dtype):
    torch.manual_seed(0)
    x = LAYOUTS[layout]((torch.randn(shape) + 2.0).to(dtype))
    grad_y = LAYOUTS[grad_layout](torch.randn(shape).to(dtype))
    grad_y_before = grad_y.clone()
    vectors = _vectors(shape[-1], has_bias, dtype)
    runs = [
        _run(fn, d, (x, *vectors), (grad_y,), eps=1e-3)
        for fn, d in [(layer_norm, dtype), (reference, torch.float64), (reference, dtype)]
    ]
    for got, exact, baseline in zip(*runs, strict=True):
        assert_accurate(got, exact, baseline)
    assert torch.equal(grad_y, grad_y_before), "backward must not write into grad_y"


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("layout", "has_bias"), [*((layout, True) for layout in LAYOUTS), ("contiguous", False)])
def test_residual_matches_reference(isa, shape, layout, has_bias, dtype):
    torch.manual_seed(0)
    x, residual = (LAYOUTS[layout](torch.randn(shape).to(dtype)) for _ in range(2))
    vectors = _vectors(shape[-1], has_bias, dtype)
    grads = [LAYOUTS[layout](torch.randn(shape).to(dtype)) for _ in range(2)]
    runs = [
        _run(fn, d, (x, residual, *vectors), grads)
        for fn, d in [
            (layer_norm_residual, dtype),
            (reference_residual, torch.float64),
            (reference_residual, dtype),
        ]
    ]
    for got, exact, baseline in zip(*runs, strict=True):
        assert_accurate(got, exact, baseline)


def test_reference_is_that_of_torch():
    x, weight, bias = torch.randn(5, 37), torch.randn(37), torch.randn(37)
    for b in (bias, None):
        torch.testing.assert_close(
            reference(x.double(), weight.double(), None if b is None else b.double(), eps=1e-3),
            torch.nn.functional.layer_norm(
                x.double(), (37,), weight.double(), None if b is None else b.double(), eps=1e-3
            ),
        )


def test_a_row_of_equal_values_gives_the_bias(isa):
    """Its variance is exactly 0, however large the values are and wherever the row ends."""
    for num_cols in (1, 2, 16, 64):
        x, weight, bias = torch.full((2, num_cols), 4096.0), torch.randn(num_cols), torch.randn(num_cols)
        assert_same_bits(layer_norm(x, weight, bias), bias.expand(2, num_cols))


def test_the_mean_costs_no_digits(isa):
    """A large mean does not drown the variance: differences to it are exact here."""
    x = torch.tensor([[4096.0 - 1, 4096.0 + 1] * 20])
    expected = torch.tensor([[-1.0, 1.0] * 20])
    torch.testing.assert_close(layer_norm(x, torch.ones(40), eps=0.0), expected, rtol=2**-22, atol=0)


def test_residual_equals_the_unfused_pair(isa):
    x, residual, weight, bias = torch.randn(5, 37), torch.randn(5, 37), torch.randn(37), torch.randn(37)
    y, h = layer_norm_residual(x, residual, weight, bias)
    assert_same_bits(h, x + residual)
    assert_same_bits(y, layer_norm(h, weight, bias))


@pytest.mark.parametrize("num_cols", [1, 7, 16, 33])
def test_touches_no_byte_outside_its_tensors(isa, num_cols):
    for at_end in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            x = guarded(torch.randn(3, num_cols, dtype=dtype), at_end=at_end).requires_grad_()
            weight, bias = (
                guarded(torch.randn(num_cols, dtype=dtype), at_end=at_end).requires_grad_() for _ in range(2)
            )
            grad = guarded(torch.randn(3, num_cols, dtype=dtype), at_end=at_end)
            grads = torch.autograd.grad(layer_norm(x, weight, bias), (x, weight, bias), grad)
            assert all(g.isfinite().all() for g in grads)


def test_same_bits_for_any_number_of_threads(isa):
    tensors, grad = (torch.randn(300, 129), torch.randn(129), torch.randn(129)), torch.randn(300, 129)
    results = []
    for count in (1, 2, 3):
        with force_num_threads(count):
            results.append(_run(layer_norm, torch.float32, tensors, (grad,)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(b, a)


def test_a_row_does_not_depend_on_the_others(isa):
    x, weight, bias = torch.randn(33, 65), torch.randn(65), torch.randn(65)
    whole = layer_norm(x, weight, bias)
    for r in range(33):
        assert_same_bits(layer_norm(x[r], weight, bias), whole[r])


def test_nan_and_inf_stay_in_their_row(isa):
    x = torch.ones(4, 20)
    x[1, 7], x[2, 19] = float("nan"), float("inf")
    y = layer_norm(x, torch.ones(20))
    assert y[1:3].isnan().all()
    assert y[[0, 3]].isfinite().all()


def test_gradcheck_of_the_reference():
    x, weight, bias = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((3, 5), (5,), (5,)))
    assert torch.autograd.gradcheck(reference, (x, weight, bias))


def test_opcheck():
    x, weight, bias, grad_y = torch.randn(4, 16), torch.randn(16), torch.randn(16), torch.randn(4, 16)
    ops = torch.ops.pyengine
    _, mean, rstd = ops.layer_norm_fwd(x, weight, bias, 1e-5)
    for op, args in [
        (ops.layer_norm, (x, weight, None, 1e-5)),
        (ops.layer_norm_fwd, (x, weight, bias, 1e-5)),
        (ops.layer_norm_bwd, (grad_y, None, x, weight, mean, rstd)),
        (ops.layer_norm_residual_fwd, (x, x + 1, weight, bias, 1e-5)),
        (ops.layer_norm_bwd, (grad_y, grad_y + 1, x, weight, mean, rstd)),
    ]:
        result = torch.library.opcheck(op.default, args)
        assert set(result.values()) == {"SUCCESS"}


def test_compiles_without_graph_break():
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((4, 16), (16,), (16,)))

    def fn(x, weight, bias):
        y, h = layer_norm_residual(x * 2, x, weight, bias)
        return (layer_norm(y, weight) + h).sum()

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias))
    torch.testing.assert_close(got, torch.autograd.grad(fn(x, weight, bias), (x, weight, bias)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_names_the_op_the_argument_and_both_shapes(device):
    x, weight = torch.randn(4, 16, device=device), torch.randn(16, device=device)
    with pytest.raises(RuntimeError, match=r"\[layer_norm\] weight: expected shape \(16,\).* got \(15,\)"):
        layer_norm(x, torch.randn(15, device=device))
    with pytest.raises(RuntimeError, match=r"\[layer_norm\] bias: expected shape \(16,\).* got \(15,\)"):
        layer_norm(x, weight, torch.randn(15, device=device))
    with pytest.raises(RuntimeError, match=r"\[layer_norm\] bias: expected torch.float32.* got torch.bfloat16"):
        layer_norm(x, weight, weight.bfloat16())
    with pytest.raises(RuntimeError, match=r"\[layer_norm\] x: expected torch.float32 or .* got torch.int32"):
        layer_norm(x.to(torch.int32), torch.ones(16, device=device, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"\[layer_norm\] residual: expected shape \(4, 16\).* got \(4, 15\)"):
        layer_norm_residual(x, torch.randn(4, 15, device=device), weight)


def test_binding_names_the_argument():
    x, weight = torch.randn(4, 16), torch.randn(16)
    with pytest.raises(ArgumentError, match=r"\[layer_norm\] bias: expected shape \(16,\)"):
        _C.layer_norm_fwd_cpu(x, None, weight, weight[:15], None, torch.empty(4, 16), None, None, 1e-5)
    with pytest.raises(ArgumentError, match=r"\[layer_norm\] h: expected an output exactly when there is a residual"):
        _C.layer_norm_fwd_cpu(x, x, weight, None, None, torch.empty(4, 16), None, None, 1e-5)


@DTYPES
@pytest.mark.parametrize("num_cols", [1, 15, 16, 17, 257])
def test_y_may_be_x(isa, num_cols, dtype):
    x, weight, bias = torch.randn(3, num_cols).to(dtype), *_vectors(num_cols, True, dtype)
    expected = layer_norm(x, weight, bias)
    _C.layer_norm_fwd_cpu(x, None, weight, bias, None, x, None, None, 1e-5)
    assert_same_bits(x, expected)
