import numpy as np
import pytest
import torch

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.ops.swiglu import swiglu, swiglu_gate_up
from pyengine.reference.swiglu import swiglu as reference
from pyengine.reference.swiglu import swiglu_gate_up as reference_gate_up
from pyengine.testing import LAYOUTS, assert_accurate, assert_same_bits, force_num_threads
from pyengine.testing.guard import guarded

# One element; one below, at and above a vector; a prime past one block; 1-D and 3-D; several tasks; no rows at all.
SHAPES = [(1, 1), (3, 15), (3, 16), (3, 17), (5, 257), (7,), (2, 3, 64), (40, 513), (0, 8)]
# Every layout of the input with a plain gradient, and every layout of the gradient with a plain input.
LAYOUT_PAIRS = sorted({(name, "contiguous") for name in LAYOUTS} | {("contiguous", name) for name in LAYOUTS})
ACTIVATIONS = pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def _run(fn, dtype, tensors, grad_y, activation="silu"):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    y = fn(*leaves, activation=activation)
    return y, *torch.autograd.grad(y, leaves, grad_y.to(dtype))


@DTYPES
@ACTIVATIONS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
def test_matches_reference(isa, shape, layout, grad_layout, activation, dtype):
    torch.manual_seed(0)
    gate, up = (LAYOUTS[layout](4 * torch.randn(shape).to(dtype)) for _ in range(2))
    grad_y = LAYOUTS[grad_layout](torch.randn(shape).to(dtype))
    grad_y_before = grad_y.clone()
    runs = [
        _run(fn, d, (gate, up), grad_y, activation)
        for fn, d in [(swiglu, dtype), (reference, torch.float64), (reference, dtype)]
    ]
    for got, exact, baseline in zip(*runs, strict=True):
        assert_accurate(got, exact, baseline)
    assert torch.equal(grad_y, grad_y_before), "backward must not write into grad_y"


@DTYPES
@ACTIVATIONS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 2), (5, 34), (2, 3, 64), (0, 8)], ids=str)
def test_halves_of_one_product(isa, shape, layout, activation, dtype):
    torch.manual_seed(0)
    gate_up = LAYOUTS[layout](torch.randn(shape).to(dtype))
    grad_y = torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    got = _run(swiglu_gate_up, dtype, (gate_up,), grad_y, activation)
    gate, up = gate_up.chunk(2, -1)
    y, grad_gate, grad_up = _run(swiglu, dtype, (gate, up), grad_y, activation)
    assert_same_bits(got[0], y)
    assert_same_bits(got[1], torch.cat([grad_gate, grad_up], -1))


def test_the_halves_are_read_and_written_in_place(isa):
    gate_up, grad_y = torch.randn(6, 40), torch.randn(6, 20)
    y = torch.full((6, 30), 3.0)
    _C.swiglu_fwd_cpu(gate_up[:, :20], gate_up[:, 20:], y[:, 5:25])
    assert_same_bits(y[:, 5:25], swiglu_gate_up(gate_up))
    assert (y[:, :5] == 3.0).all()
    assert (y[:, 25:] == 3.0).all()
    expected = torch.ops.pyengine.swiglu_gate_up_bwd(grad_y, gate_up, "silu")
    _C.swiglu_bwd_cpu(grad_y, gate_up[:, :20], gate_up[:, 20:], gate_up[:, :20], gate_up[:, 20:])
    assert_same_bits(gate_up, expected)


def test_works_on_numpy_arrays(isa):
    gate, up = torch.randn(3, 9), torch.randn(3, 9)
    y = np.empty((3, 9), np.float32)
    _C.swiglu_fwd_cpu(gate.numpy(), up.numpy(), y)
    assert_same_bits(torch.from_numpy(y), swiglu(gate, up))


@ACTIVATIONS
def test_extreme_gates(isa, activation):
    gate = torch.tensor([-float("inf"), -1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e30, float("inf")])
    y, grad_gate, grad_up = _run(swiglu, torch.float32, (gate, torch.ones(10)), torch.ones(10), activation)
    exact = _run(reference, torch.float64, (gate, torch.ones(10)), torch.ones(10), activation)
    finite = gate.isfinite()
    for got, expected in zip((y, grad_gate, grad_up), exact, strict=True):
        torch.testing.assert_close(got[finite].double(), expected[finite], rtol=1e-6, atol=1e-36)
    assert y[0].isnan()  # -inf * 0, as in torch
    assert y[-1] == float("inf")


@pytest.mark.parametrize("num_cols", [1, 7, 16, 33])
@pytest.mark.parametrize("at_end", [True, False])
@DTYPES
@ACTIVATIONS
def test_touches_no_byte_outside_its_tensors(isa, num_cols, at_end, activation, dtype):
    gate, up, grad_y, y, grad_gate, grad_up = (
        guarded(torch.randn(3, num_cols).to(dtype), at_end=at_end) for _ in range(6)
    )
    _C.swiglu_fwd_cpu(gate, up, y, activation)
    _C.swiglu_bwd_cpu(grad_y, gate, up, grad_gate, grad_up, activation)
    expected_all = _run(swiglu, dtype, (gate, up), grad_y, activation)
    for got, expected in zip((y, grad_gate, grad_up), expected_all, strict=True):
        assert_same_bits(got, expected)


@ACTIVATIONS
def test_same_bits_for_any_number_of_threads_and_for_a_row_alone(isa, activation):
    gate, up, grad_y = (torch.randn(100, 301) for _ in range(3))
    results = []
    for count in (1, 2, 3):
        with force_num_threads(count):
            results.append(_run(swiglu, torch.float32, (gate, up), grad_y, activation))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(b, a)
    for r in range(0, 100, 9):
        alone = _run(swiglu, torch.float32, (gate[r], up[r]), grad_y[r], activation)
        for a, b in zip(results[0], alone, strict=True):
            assert_same_bits(b, a[r])


@ACTIVATIONS
def test_nan_stays_in_its_element(isa, activation):
    gate, up = torch.ones(3, 20), torch.ones(3, 20)
    gate[1, 7] = up[2, 19] = float("nan")
    y, grad_gate, grad_up = _run(swiglu, torch.float32, (gate, up), torch.ones(3, 20), activation)
    assert y.isnan().nonzero().tolist() == [[1, 7], [2, 19]]
    assert grad_gate.isnan().nonzero().tolist() == [[1, 7], [2, 19]]
    assert grad_up.isnan().nonzero().tolist() == [[1, 7]]


def test_gradcheck_of_the_reference():
    gate, up = (torch.randn(3, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(reference, (gate, up))
    assert torch.autograd.gradcheck(reference_gate_up, torch.randn(3, 6, dtype=torch.float64).requires_grad_())


def test_opcheck():
    gate, up, grad_y = (torch.randn(4, 16) for _ in range(3))
    ops = torch.ops.pyengine
    for op, args in [
        (ops.swiglu, (gate, up, "gelu_tanh")),
        (ops.swiglu_bwd, (grad_y, gate, up, "gelu_tanh")),
        (ops.swiglu_gate_up, (torch.cat([gate, up], -1), "silu")),
        (ops.swiglu_gate_up_bwd, (grad_y, torch.cat([gate, up], -1), "silu")),
    ]:
        assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


def test_compiles_without_graph_break():
    gate, up = (torch.randn(4, 16, requires_grad=True) for _ in range(2))

    def fn(gate, up):
        return (swiglu(gate * 2, up) + swiglu_gate_up(torch.cat([up, gate], -1))).sum()

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(gate, up), (gate, up))
    torch.testing.assert_close(got, torch.autograd.grad(fn(gate, up), (gate, up)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_names_the_op_the_argument_and_what_came(device):
    gate = torch.randn(4, 16, device=device)
    with pytest.raises(RuntimeError, match=r"\[swiglu\] up: expected shape \(4, 16\), .* got \(4, 15\)"):
        swiglu(gate, gate[:, :15])
    with pytest.raises(RuntimeError, match=r"\[swiglu\] up: expected torch.float32, .* got torch.bfloat16"):
        swiglu(gate, gate.bfloat16())
    with pytest.raises(RuntimeError, match=r"\[swiglu\] gate: expected torch.float32 or .* got torch.float64"):
        swiglu(gate.double(), gate.double())
    with pytest.raises(RuntimeError, match=r"\[swiglu\] activation: expected 'silu' or 'gelu_tanh', got 'relu'"):
        swiglu(gate, gate, activation="relu")
    with pytest.raises(RuntimeError, match=r"\[swiglu\] gate_up: expected an even last dimension, got 15"):
        swiglu_gate_up(gate[:, :15])


def test_binding_names_the_argument():
    gate = torch.randn(4, 16)
    with pytest.raises(ArgumentError, match=r"\[swiglu\] up: expected unit stride"):
        _C.swiglu_fwd_cpu(gate, torch.randn(16, 4).t(), torch.empty(4, 16))
    with pytest.raises(ArgumentError, match=r"\[swiglu\] activation: expected 'silu' or 'gelu_tanh', got 'relu'"):
        _C.swiglu_fwd_cpu(gate, gate, torch.empty(4, 16), "relu")
