from pathlib import Path

import pytest
import torch

from pyengine.ops.op_name import op_name
from pyengine.reference.op_name import op_name as reference
from pyengine.testing import LAYOUTS, assert_accurate, assert_same_bits, force_num_threads
from pyengine.testing.guard import guarded

# One element; one below, at and above a vector; a prime past one block; 1-D and 3-D; several tasks; no rows at all.
SHAPES = [(1, 1), (3, 15), (3, 16), (3, 17), (5, 257), (7,), (2, 3, 64), (40, 513), (0, 8)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
OPS = torch.ops.pyengine
FILLED = [
    "csrc/include/pe/op_name.h",
    "pyengine/ops/op_name.py",
    "pyengine/reference/op_name.py",
]


def _run(fn, dtype, x, grad_y):
    x = x.detach().to(dtype).requires_grad_()
    y = fn(x)
    return y, *torch.autograd.grad(y, x, grad_y.to(dtype))


def test_nothing_is_left_to_fill():
    root = Path(__file__).parents[2]
    for file in FILLED:
        assert "FILL" not in (root / file).read_text(), f"{file}: fill what is marked"


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_matches_reference(isa, shape, layout, grad_layout, dtype):
    torch.manual_seed(0)
    x, grad_y = LAYOUTS[layout](torch.randn(shape).to(dtype)), LAYOUTS[grad_layout](torch.randn(shape).to(dtype))
    grad_y_before = grad_y.clone()
    cases = [(op_name, dtype), (reference, torch.float64), (reference, dtype)]
    for got, exact, baseline in zip(*[_run(fn, d, x, grad_y) for fn, d in cases], strict=True):
        assert_accurate(got, exact, baseline)
    assert torch.equal(grad_y, grad_y_before), "backward must not write into grad_y"


@DTYPES
@pytest.mark.parametrize("num_cols", [1, 7, 16, 33])
@pytest.mark.parametrize("at_end", [True, False])
def test_touches_no_byte_outside_its_tensors(isa, num_cols, at_end, dtype):
    x, grad_y = (guarded(torch.randn(3, num_cols).to(dtype), at_end=at_end) for _ in range(2))
    y, grad_x = _run(op_name, dtype, x, grad_y)
    assert y.isfinite().all()
    assert grad_x.isfinite().all()


def test_same_bits_for_any_number_of_threads_and_for_a_row_alone(isa):
    x, grad_y = torch.randn(100, 301), torch.randn(100, 301)
    results = []
    for count in (1, 2, 3):
        with force_num_threads(count):
            results.append(_run(op_name, torch.float32, x, grad_y))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(b, a)
    for r in range(0, 100, 9):
        alone = _run(op_name, torch.float32, x[r], grad_y[r])
        for a, b in zip(results[0], alone, strict=True):
            assert_same_bits(b, a[r])


def test_nan_stays_in_its_row(isa):
    x = torch.ones(3, 20)
    x[1, 7] = float("nan")
    y = op_name(x)
    assert y[1].isnan().any()
    assert y[[0, 2]].isfinite().all()


def test_gradcheck_of_the_reference():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference, (x,))


def test_opcheck():
    for op in (OPS.op_name, OPS.op_name_bwd):
        assert set(torch.library.opcheck(op.default, (torch.randn(4, 16),)).values()) == {"SUCCESS"}


def test_compiles_without_graph_break():
    x = torch.randn(4, 16, requires_grad=True)

    def fn(x):
        return op_name(x * 2).sum()

    got = torch.autograd.grad(torch.compile(fn, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, torch.autograd.grad(fn(x), x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_names_the_op_the_argument_and_both_dtypes(device):
    message = r"\[op_name\] x: expected torch.float32 or .* got torch.int32"
    with pytest.raises(RuntimeError, match=message):
        op_name(torch.ones(4, 16, dtype=torch.int32, device=device))
