import pytest
import torch

from pyengine.ops import rms_norm, rms_norm_residual
from pyengine.reference.rms_norm import rms_norm as reference
from pyengine.reference.rms_norm import rms_norm_residual as reference_residual
from pyengine.testing import LAYOUTS, assert_accurate, assert_same_bits, force_num_threads
from pyengine.testing.guard import guarded

# One element; one below, at and above a vector; a prime past one block; 1-D and 3-D; no rows at all.
SHAPES = [(1, 1), (3, 15), (3, 16), (3, 17), (5, 257), (7,), (2, 3, 64), (0, 8)]


def _run(fn, dtype, tensors, grads, **options):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    outputs = fn(*leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *outputs, *torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in grads])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "grad_layout"), [(a, b) for a in LAYOUTS for b in LAYOUTS if "contiguous" in (a, b) or a == b]
)
def test_matches_reference(isa, shape, layout, grad_layout, dtype):
    torch.manual_seed(0)
    x, weight = LAYOUTS[layout](torch.randn(shape).to(dtype)), torch.randn(shape[-1]).to(dtype)
    grad_y = LAYOUTS[grad_layout](torch.randn(shape).to(dtype))
    grad_y_before = grad_y.clone()
    # A row of one element is y = sign(x) but for eps: with a tiny one its gradient is nothing but cancellation.
    eps = 0.1 if shape[-1] == 1 else 1e-6
    runs = [
        _run(fn, d, (x, weight), (grad_y,), eps=eps, weight_offset=1.0)
        for fn, d in [(rms_norm, dtype), (reference, torch.float64), (reference, dtype)]
    ]
    for got, exact, baseline in zip(*runs, strict=True):
        assert_accurate(got, exact, baseline)
    assert torch.equal(grad_y, grad_y_before), "backward must not write into grad_y"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_residual_matches_reference(isa, shape, layout, dtype):
    torch.manual_seed(0)
    x, residual = (LAYOUTS[layout](torch.randn(shape).to(dtype)) for _ in range(2))
    weight = torch.randn(shape[-1]).to(dtype)
    grads = [LAYOUTS[layout](torch.randn(shape).to(dtype)) for _ in range(2)]
    eps = 0.1 if shape[-1] == 1 else 1e-6
    runs = [
        _run(fn, d, (x, residual, weight), grads, eps=eps)
        for fn, d in [
            (rms_norm_residual, dtype),
            (reference_residual, torch.float64),
            (reference_residual, dtype),
        ]
    ]
    for got, exact, baseline in zip(*runs, strict=True):
        assert_accurate(got, exact, baseline)


def test_residual_equals_the_unfused_pair(isa):
    x, residual, weight = torch.randn(5, 37), torch.randn(5, 37), torch.randn(37)
    y, h = rms_norm_residual(x, residual, weight)
    assert_same_bits(h, x + residual)
    assert_same_bits(y, rms_norm(h, weight))


@pytest.mark.parametrize("num_cols", [1, 7, 16, 33])
def test_touches_no_byte_outside_its_tensors(isa, num_cols):
    for at_end in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            x = guarded(torch.randn(3, num_cols, dtype=dtype), at_end=at_end).requires_grad_()
            weight = guarded(torch.randn(num_cols, dtype=dtype), at_end=at_end).requires_grad_()
            grad = guarded(torch.randn(3, num_cols, dtype=dtype), at_end=at_end)
            grads = torch.autograd.grad(rms_norm(x, weight), (x, weight), grad)
            assert all(g.isfinite().all() for g in grads)


def test_same_bits_for_any_number_of_threads(isa):
    x, weight, grad = torch.randn(300, 129), torch.randn(129), torch.randn(300, 129)
    results = []
    for count in (1, 2, 3):
        with force_num_threads(count):
            results.append(_run(rms_norm, torch.float32, (x, weight), (grad,)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(b, a)


def test_a_row_does_not_depend_on_the_others(isa):
    x, weight = torch.randn(33, 65), torch.randn(65)
    whole = rms_norm(x, weight)
    for r in range(33):
        assert_same_bits(rms_norm(x[r], weight), whole[r])


def test_nan_and_inf_stay_in_their_row(isa):
    x = torch.ones(3, 20)
    x[1, 7] = float("nan")
    y = rms_norm(x, torch.ones(20))
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_gradcheck_of_the_reference():
    x, weight = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(reference, (x.requires_grad_(), weight.requires_grad_()))


def test_opcheck():
    x, weight, grad_y = torch.randn(4, 16), torch.randn(16), torch.randn(4, 16)
    ops = torch.ops.pyengine
    rstd = ops.rms_norm_fwd(x, weight, 1e-6, 0.0)[1]
    for op, args in [
        (ops.rms_norm, (x, weight, 1e-6, 0.0)),
        (ops.rms_norm_fwd, (x, weight, 1e-6, 0.0)),
        (ops.rms_norm_bwd, (grad_y, x, weight, rstd, 0.0)),
        (ops.rms_norm_residual_fwd, (x, x + 1, weight, 1e-6, 0.0)),
        (ops.rms_norm_residual_bwd, (grad_y, grad_y + 1, x, weight, rstd, 0.0)),
    ]:
        result = torch.library.opcheck(op.default, args)
        assert set(result.values()) == {"SUCCESS"}


def test_compiles_without_graph_break():
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(16, requires_grad=True)

    def fn(x, weight):
        y, h = rms_norm_residual(x * 2, x, weight)
        return (rms_norm(y, weight) + h).sum()

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, weight), (x, weight))
    torch.testing.assert_close(got, torch.autograd.grad(fn(x, weight), (x, weight)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_names_the_op_the_argument_and_both_shapes(device):
    x = torch.randn(4, 16, device=device)
    with pytest.raises(RuntimeError, match=r"\[rms_norm\] weight: expected shape \(16,\).* got \(15,\)"):
        rms_norm(x, torch.randn(15, device=device))
    with pytest.raises(RuntimeError, match=r"\[rms_norm\] weight: expected torch.float32.* got torch.bfloat16"):
        rms_norm(x, torch.randn(16, device=device, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"\[rms_norm\] x: expected torch.float32 or .* got torch.int32"):
        rms_norm(x.to(torch.int32), torch.ones(16, device=device, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"\[rms_norm\] residual: expected shape \(4, 16\).* got \(4, 15\)"):
        rms_norm_residual(x, torch.randn(4, 15, device=device), torch.randn(16, device=device))
