import numpy as np
import pytest
import torch

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.ops.matmul_w8a8 import matmul_w8a8, matmul_w8a8_pack
from pyengine.ops.quantize_int8 import quantize_int8
from pyengine.reference.matmul_w8a8 import matmul_w8a8 as reference
from pyengine.reference.matmul_w8a8 import matmul_w8a8_pack as reference_pack
from pyengine.testing import LAYOUTS, assert_same_bits, force_isa, force_num_threads
from pyengine.testing.guard import guarded

# [M, N, K]: one; every remainder of rows, panels and steps; several tasks; nothing in each dimension.
SHAPES = [(1, 1, 1), (2, 15, 3), (3, 16, 4), (4, 17, 5), (5, 33, 30), (6, 64, 63), (7, 80, 257), (13, 131, 66)]
SHAPES += [(199, 70, 37), (1, 600, 2048), (0, 5, 8), (3, 0, 8), (3, 5, 0)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def _case(m, n, k):
    torch.manual_seed(0)
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return x, torch.rand(m) + 0.01, w, torch.rand(n) + 0.01


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_integers_bit_for_bit(isa, shape, dtype):
    x, x_scale, w, w_scale = _case(*shape)
    packed = matmul_w8a8_pack(w)
    assert_same_bits(packed, reference_pack(w))
    assert_same_bits(matmul_w8a8(x, x_scale, packed, w_scale, dtype), reference(x, x_scale, w, w_scale, dtype))


@pytest.mark.parametrize(("x_value", "w_value"), [(-128, 127), (-128, -127), (127, 127), (127, -127)])
def test_the_largest_k_neither_saturates_nor_overflows(isa, x_value, w_value):
    k = 2**17
    x = torch.full((3, k), x_value, dtype=torch.int8)
    w = torch.full((17, k), w_value, dtype=torch.int8)
    x[1, ::2] = -x[1, ::2].clamp(min=-127)  # partial sums leave int32 on the way, the total does not
    y = matmul_w8a8(x, torch.ones(3), matmul_w8a8_pack(w), torch.ones(17))
    assert_same_bits(y, reference(x, torch.ones(3), w, torch.ones(17)))
    assert y[0, 16].item() == torch.tensor(float(k * x_value * w_value)).item()


def test_a_matrix_product_of_floats(isa):
    torch.manual_seed(0)
    a, b = torch.randn(20, 300), torch.randn(50, 300)
    (x, x_scale), (w, w_scale) = quantize_int8(a), quantize_int8(b)
    exact = a.double() @ b.double().t()
    got = matmul_w8a8(x, x_scale, matmul_w8a8_pack(w), w_scale).double()
    # |a - qa| <= sa/2, |b - qb| <= sb/2 for each of 300 products.
    limit = (x_scale[:, None] / 2 * b.abs().sum(1) + w_scale / 2 * a.abs().sum(1)[:, None]).double()
    limit += 300 / 4 * x_scale[:, None].double() * w_scale.double()
    assert ((got - exact).abs() <= 1.001 * limit).all()
    assert (got - exact).abs().mean() < 0.02 * exact.abs().mean()


@DTYPES
def test_same_bits_on_every_isa_level_and_any_number_of_threads(dtype):
    x, x_scale, w, w_scale = _case(150, 203, 119)
    packed, expected = matmul_w8a8_pack(w), reference(x, x_scale, w, w_scale, dtype)
    for name in _C.available_isas():
        for count in (1, 2, 3):
            with force_isa(name), force_num_threads(count):
                assert_same_bits(matmul_w8a8_pack(w), packed)
                assert_same_bits(matmul_w8a8(x, x_scale, packed, w_scale, dtype), expected)


def test_a_row_does_not_depend_on_the_others(isa):
    x, x_scale, w, w_scale = _case(14, 90, 66)
    packed = matmul_w8a8_pack(w)
    whole = matmul_w8a8(x, x_scale, packed, w_scale)
    for m in range(1, 14):
        assert_same_bits(matmul_w8a8(x[:m], x_scale[:m], packed, w_scale), whole[:m])
        assert_same_bits(matmul_w8a8(x[m], x_scale[m], packed, w_scale), whole[m])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(isa, layout):
    x, x_scale, w, w_scale = (LAYOUTS[layout](t) for t in _case(5, 40, 23))
    y = matmul_w8a8(x, x_scale, matmul_w8a8_pack(w), w_scale)
    assert_same_bits(y, reference(x, x_scale, w, w_scale))
    x3, s3 = x.reshape(5, 1, 23).expand(5, 2, 23), x_scale[:, None].expand(5, 2)
    assert_same_bits(matmul_w8a8(x3, s3, matmul_w8a8_pack(w), w_scale), y[:, None].expand(5, 2, 40).contiguous())


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (2, 15, 6), (7, 17, 7), (3, 70, 9)])
@pytest.mark.parametrize("at_end", [True, False])
@DTYPES
def test_touches_no_byte_outside_its_tensors(isa, m, n, k, at_end, dtype):
    x, x_scale, w, w_scale = (guarded(t, at_end=at_end) for t in _case(m, n, k))
    packed = guarded(torch.zeros_like(reference_pack(w)), at_end=at_end)
    y = guarded(torch.zeros(m, n, dtype=dtype), at_end=at_end)
    _C.matmul_w8a8_pack_cpu(w, packed)
    _C.matmul_w8a8_cpu(x, x_scale, packed, w_scale, y)
    assert_same_bits(y, reference(x, x_scale, w, w_scale, dtype))


def test_writes_columns_of_a_wider_buffer(isa):
    x, x_scale, w, w_scale = _case(7, 21, 10)
    wide = torch.full((7, 40), 9.0)
    _C.matmul_w8a8_cpu(x, x_scale, matmul_w8a8_pack(w), w_scale, wide[:, 5:26])
    assert_same_bits(wide[:, 5:26], reference(x, x_scale, w, w_scale))
    assert (wide[:, :5] == 9).all()
    assert (wide[:, 26:] == 9).all()


def test_works_on_numpy_arrays(isa):
    x, x_scale, w, w_scale = _case(3, 20, 10)
    packed, y = np.empty((2, 3, 16, 4), np.uint8), np.empty((3, 20), np.float32)
    _C.matmul_w8a8_pack_cpu(w.numpy(), packed)
    _C.matmul_w8a8_cpu(x.numpy(), x_scale.numpy(), packed, w_scale.numpy(), y)
    np.testing.assert_array_equal(y, reference(x, x_scale, w, w_scale).numpy())


def test_nan_scales_stay_in_their_row_and_column(isa):
    x, x_scale, w, w_scale = _case(4, 20, 8)
    x_scale[1] = w_scale[18] = float("nan")
    bad = matmul_w8a8(x, x_scale, matmul_w8a8_pack(w), w_scale).isnan()
    expected = torch.zeros(4, 20, dtype=torch.bool)
    expected[1] = expected[:, 18] = True
    assert torch.equal(bad, expected)


def test_tiny_scales_do_not_underflow_between(isa):
    x, _, w, _ = _case(2, 16, 64)
    y = matmul_w8a8(x, torch.full((2,), 1e-25), matmul_w8a8_pack(w), torch.full((16,), 1e-16))
    exact = 1e-41 * (x.double() @ w.double().t())
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=2**-149)


def test_opcheck():
    x, x_scale, w, w_scale = _case(3, 20, 10)
    ops = torch.ops.pyengine
    for op, args in [
        (ops.matmul_w8a8_pack, (w,)),
        (ops.matmul_w8a8, (x, x_scale, matmul_w8a8_pack(w), w_scale, torch.bfloat16)),
    ]:
        assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


def test_compiles_without_graph_break():
    _, _, w, w_scale = _case(3, 20, 10)
    a = torch.randn(3, 10)

    def fn(a, w):
        return matmul_w8a8(*quantize_int8(a * 2), matmul_w8a8_pack(w), w_scale) + 1

    assert_same_bits(torch.compile(fn, fullgraph=True, backend="aot_eager")(a, w), fn(a, w))


def test_has_no_gradient():
    x, x_scale, w, w_scale = _case(3, 20, 10)
    packed = matmul_w8a8_pack(w)
    for a, b, name in [
        (x_scale.clone().requires_grad_(), w_scale, "x"),
        (x_scale, w_scale.clone().requires_grad_(), "w"),
    ]:
        with pytest.raises(RuntimeError, match=rf"\[matmul_w8a8\] {name}_scale: expected a tensor without gradient"):
            matmul_w8a8(x, a, packed, b)


def test_minus_128_in_the_weights_is_rejected():
    w = torch.zeros(40, 9, dtype=torch.int8)
    w[33, 8] = -128
    with pytest.raises(ArgumentError, match=r"\[matmul_w8a8\] w: expected values from -127 to 127, got -128 in row 33"):
        matmul_w8a8_pack(w)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_names_the_argument_and_what_came(device):
    x, x_scale, w, w_scale = (t.to(device) for t in _case(3, 20, 10))
    packed = matmul_w8a8_pack(w)
    for args, match in [
        ((x.to(torch.uint8), x_scale, packed, w_scale), "x: expected torch.int8, got torch.uint8"),
        ((x[:, :5], x_scale, packed, w_scale), r"packed: expected shape \(2, 2, 16, 4\), .* got \(2, 3, 16, 4\)"),
        ((x, x_scale[:2], packed, w_scale), r"x_scale: expected shape \(3,\), .* got \(2,\)"),
        ((x, x_scale, packed, w_scale[:16]), r"packed: expected shape \(1, 3, 16, 4\), .* got \(2, 3, 16, 4\)"),
        ((x, x_scale, packed, w_scale.double()), "w_scale: expected torch.float32, got torch.float64"),
        ((x, x_scale, packed, w_scale, torch.float16), "dtype: expected torch.float32 or .*, got torch.float16"),
        ((x[:, :1].expand(3, 2**17 + 1), x_scale, packed, w_scale), "x: expected at most 131072 columns, got 131073"),
    ]:
        with pytest.raises(RuntimeError, match=r"\[matmul_w8a8\] " + match):
            matmul_w8a8(*args)
    with pytest.raises(RuntimeError, match=r"\[matmul_w8a8\] w: expected at most 131072 columns, got 131073"):
        matmul_w8a8_pack(w[:, :1].expand(20, 2**17 + 1))


def test_binding_names_the_argument():
    x, x_scale, _, w_scale = _case(3, 20, 10)
    with pytest.raises(ArgumentError, match=r"\[matmul_w8a8\] packed: expected shape \(2, 3, 16, 4\), got shape"):
        _C.matmul_w8a8_cpu(x, x_scale, torch.empty(2, 4, 16, 4, dtype=torch.uint8), w_scale, torch.empty(3, 20))
