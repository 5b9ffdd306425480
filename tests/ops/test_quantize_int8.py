import numpy as np
import pytest
import torch

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.ops.quantize_int8 import dequantize_int8, quantize_int8
from pyengine.reference.quantize_int8 import dequantize_int8 as reference_dequantize
from pyengine.reference.quantize_int8 import quantize_int8 as reference_quantize
from pyengine.testing import LAYOUTS, assert_same_bits, force_isa, force_num_threads
from pyengine.testing.guard import guarded

# One element; one below, at and above a vector; a prime past one block; 1-D and 3-D; several tasks; nothing.
SHAPES = [(1, 1), (3, 15), (3, 16), (3, 17), (5, 257), (7,), (2, 3, 64), (50, 1031), (0, 8), (3, 0)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_reference_bit_for_bit(isa, shape, layout, dtype):
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.randn(shape) * 10.0 ** torch.randint(-20, 20, (*shape[:-1], 1))).to(dtype)
    before = x.clone()
    q, scale = quantize_int8(x)
    expected_q, expected_scale = reference_quantize(x)
    assert_same_bits(q, expected_q)
    assert_same_bits(scale.reshape(-1), expected_scale.reshape(-1))
    for out in (torch.float32, torch.bfloat16):
        again = LAYOUTS[layout](q), LAYOUTS[layout](scale) if scale.dim() else scale
        assert_same_bits(dequantize_int8(*again, out), reference_dequantize(*again, out))
    assert torch.equal(x, before)


@DTYPES
def test_error_is_half_a_step(isa, dtype):
    torch.manual_seed(0)
    x = torch.randn(40, 333).to(dtype)
    q, scale = quantize_int8(x)
    assert q.abs().amax(1).eq(127).all()
    error = (x.double() - q.double() * scale.double()[:, None]).abs()
    # Half a step, and the roundings of scale and of the quotient: 127 * 2^-24 of a step each.
    assert (error / scale.double()[:, None]).max() <= 0.5 + 2 * 127 * 2**-24


def test_halves_round_to_even(isa):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 3.4999998]])
    q, scale = quantize_int8(x)
    assert scale.item() == 1.0
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126, 3]]


@pytest.mark.parametrize("num_cols", [1, 8, 20])
def test_rows_that_have_no_scale(isa, num_cols):
    x = torch.ones(7, num_cols)
    x[1] = 0
    x[2] = 2.0**-119
    x[3] = 2.0**-120
    x[4, num_cols // 2], x[5, -1], x[6, 0] = float("nan"), float("inf"), -float("inf")
    q, scale = quantize_int8(x)
    assert (q[[0, 2]] == 127).all()
    assert not q[[1, 3, 4, 5, 6]].any()
    assert scale[[1, 3]].tolist() == [0, 0]
    assert scale[4:].isnan().all()
    assert dequantize_int8(q, scale)[4:].isnan().all()
    assert dequantize_int8(q, scale)[:4].isfinite().all()
    huge = torch.full((1, num_cols), torch.finfo(torch.float32).max)
    assert (quantize_int8(-huge)[0] == -127).all()


@DTYPES
def test_same_bits_everywhere(dtype):
    """On every ISA level, for any number of threads, for a row alone."""
    x = torch.randn(70, 519).to(dtype)
    expected_q, expected_scale = reference_quantize(x)
    for name in _C.available_isas():
        for count in (1, 2, 3):
            with force_isa(name), force_num_threads(count):
                q, scale = quantize_int8(x)
                assert_same_bits(q, expected_q)
                assert_same_bits(scale, expected_scale)
                assert_same_bits(quantize_int8(x[5])[0], expected_q[5])


@pytest.mark.parametrize("num_cols", [1, 7, 8, 16, 33])
@pytest.mark.parametrize("at_end", [True, False])
@DTYPES
def test_touches_no_byte_outside_its_tensors(isa, num_cols, at_end, dtype):
    x = guarded(torch.randn(3, num_cols).to(dtype), at_end=at_end)
    q = guarded(torch.zeros(3, num_cols, dtype=torch.int8), at_end=at_end)
    scale = guarded(torch.zeros(3), at_end=at_end)
    _C.quantize_int8_cpu(x, q, scale)
    expected = reference_quantize(x)
    assert_same_bits(q, expected[0])
    _C.dequantize_int8_cpu(q, scale, x)
    assert_same_bits(x, reference_dequantize(*expected, dtype))


def test_writes_rows_of_a_wider_buffer(isa):
    x, wide = torch.randn(4, 19), torch.full((4, 40), 99, dtype=torch.int8)
    _C.quantize_int8_cpu(x, wide[:, 5:24], torch.empty(4))
    assert_same_bits(wide[:, 5:24], reference_quantize(x)[0])
    assert (wide[:, :5] == 99).all()
    assert (wide[:, 24:] == 99).all()


def test_works_on_numpy_arrays(isa):
    x = torch.randn(3, 20)
    q, scale, back = np.empty((3, 20), np.int8), np.empty(3, np.float32), np.empty((3, 20), np.float32)
    _C.quantize_int8_cpu(x.numpy(), q, scale)
    _C.dequantize_int8_cpu(q, scale, back)
    np.testing.assert_array_equal(back, reference_dequantize(*reference_quantize(x)).numpy())


def test_opcheck():
    x = torch.randn(4, 16)
    ops = torch.ops.pyengine
    for op, args in [(ops.quantize_int8, (x,)), (ops.dequantize_int8, (*quantize_int8(x), torch.bfloat16))]:
        assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


def test_compiles_without_graph_break():
    x = torch.randn(4, 16)

    def fn(x):
        return dequantize_int8(*quantize_int8(x * 2)) + 1

    assert_same_bits(torch.compile(fn, fullgraph=True, backend="aot_eager")(x), fn(x))


def test_has_no_gradient():
    x = torch.randn(4, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"\[quantize_int8\] x: expected a tensor without gradient .* requires grad"):
        quantize_int8(x)
    with torch.no_grad():
        q, scale = quantize_int8(x)
    with pytest.raises(RuntimeError, match=r"\[dequantize_int8\] scale: expected a tensor without gradient"):
        dequantize_int8(q, scale.requires_grad_())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_names_the_argument_and_what_came(device):
    x = torch.randn(4, 16, device=device)
    q, scale = quantize_int8(x)
    with pytest.raises(RuntimeError, match=r"\[quantize_int8\] x: expected torch.float32 or .* got torch.float64"):
        quantize_int8(x.double())
    with pytest.raises(RuntimeError, match=r"\[dequantize_int8\] q: expected torch.int8, got torch.uint8"):
        dequantize_int8(q.to(torch.uint8), scale)
    with pytest.raises(RuntimeError, match=r"\[dequantize_int8\] scale: expected shape \(4,\), .* got \(3,\)"):
        dequantize_int8(q, scale[:3])
    with pytest.raises(RuntimeError, match=r"\[dequantize_int8\] dtype: expected torch.float32 or .* torch.float16"):
        dequantize_int8(q, scale, torch.float16)


def test_binding_names_the_argument():
    with pytest.raises(ArgumentError, match=r"\[quantize_int8\] q: expected int8, got uint8"):
        _C.quantize_int8_cpu(torch.ones(2, 3), torch.empty(2, 3, dtype=torch.uint8), torch.empty(2))
