import numpy as np
import pytest
import torch

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.ops.matmul_w4a16 import matmul_w4a16, pack_blocks
from pyengine.reference.block_weights import dequantize
from pyengine.reference.matmul_w4a16 import matmul_w4a16 as reference
from pyengine.testing import LAYOUTS, assert_same_bits, force_isa, force_num_threads
from pyengine.testing.blocks import blocks, integer_blocks, random_blocks
from pyengine.testing.guard import guarded

FORMATS = ["q4_0", "q4_1", "q8_0"]
FLOATS = [torch.float32, torch.bfloat16]
# (M, N, K): one row and one panel; partial panels; every register tile and its remainders; several row blocks.
SHAPES = [(1, 1, 32), (1, 80, 64), (2, 17, 96), (3, 15, 64), (4, 50, 32), (7, 33, 64), (31, 35, 32), (101, 16, 32)]


def run(x, raw, block_format, **options):
    packed = pack_blocks(raw, block_format)
    return matmul_w4a16(x, packed, num_rows=raw.shape[0], block_format=block_format, **options)


def assert_within_rounding(got, x, raw, block_format):
    """|got - exact| <= 8 u sum |x| |w| with u = 2^-24, plus one rounding to the dtype of the result."""
    weight = dequantize(raw, block_format, torch.float64)
    exact = x.double() @ weight.T
    limit = 8 * 2.0**-24 * (x.double().abs() @ weight.abs().T) + torch.finfo(got.dtype).eps / 2 * exact.abs()
    error = (got.double() - exact).abs()
    assert (error <= limit).all(), f"error {(error / limit).max():.3g} times the limit"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_format", FORMATS)
def test_accuracy(isa, block_format, shape, dtype):
    torch.manual_seed(0)
    m, n, k = shape
    x, raw = torch.randn(m, k).to(dtype), random_blocks(block_format, n, k)
    for out_dtype in FLOATS:
        got = run(x, raw, block_format, out_dtype=out_dtype)
        assert got.dtype == out_dtype
        assert_within_rounding(got, x, raw, block_format)


@pytest.mark.parametrize("block_format", FORMATS)
def test_accuracy_of_a_long_sum(isa, block_format):
    x, raw = torch.randn(6, 2048), random_blocks(block_format, 33, 2048)
    assert_within_rounding(run(x, raw, block_format), x, raw, block_format)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_format", FORMATS)
def test_integers_are_exact(isa, block_format, shape):
    m, n, k = shape
    x, raw = torch.randint(-20, 21, (m, k)), integer_blocks(block_format, n, k)
    exact = x @ dequantize(raw, block_format).long().T
    got = run(x.float(), raw, block_format)
    assert torch.equal(got.long(), exact)
    assert torch.equal(run(x.bfloat16(), raw, block_format, out_dtype=torch.float32), got)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_layouts(isa, layout, dtype):
    x, raw = LAYOUTS[layout](torch.randn(5, 64).to(dtype)), random_blocks("q4_1", 18, 64)
    assert_same_bits(run(x, raw, "q4_1"), run(x.contiguous(), raw, "q4_1"))


def test_leading_dimensions_and_empty_operands():
    x, raw = torch.randn(2, 3, 32), random_blocks("q4_0", 17, 32)
    assert_same_bits(run(x, raw, "q4_0"), run(x.reshape(6, 32), raw, "q4_0").reshape(2, 3, 17))
    assert_same_bits(run(x[0, 0], raw, "q4_0"), run(x, raw, "q4_0")[0, 0])
    assert run(x[:0], raw, "q4_0").shape == (0, 3, 17)
    assert run(x, raw[:0], "q4_0").shape == (2, 3, 0)
    assert_same_bits(run(x[..., :0], raw[:, :0], "q4_1"), torch.zeros(2, 3, 17))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block_format", FORMATS)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(isa, block_format, dtype):
    x, raw = torch.randn(101, 96).to(dtype), random_blocks(block_format, 85, 96)
    whole = run(x, raw, block_format)
    for m in (1, 2, 3, 7, 12, 13, 16, 33):
        assert_same_bits(run(x[:m], raw, block_format), whole[:m])
        assert_same_bits(run(x[-m:], raw, block_format), whole[-m:])


@pytest.mark.parametrize("block_format", FORMATS)
def test_a_column_does_not_depend_on_its_panel(isa, block_format):
    x, raw = torch.randn(2, 64), random_blocks(block_format, 100, 64)
    whole = run(x, raw, block_format)
    for first in (1, 16, 50, 99):
        assert_same_bits(run(x, raw[first:], block_format), whole[:, first:])


@pytest.mark.parametrize("block_format", FORMATS)
def test_same_bits_on_every_isa_level(block_format):
    for m, n, k in [(1, 70, 96), (17, 35, 64)]:
        x, raw = torch.randn(m, k), random_blocks(block_format, n, k)
        expected = run(x, raw, block_format)
        for name in _C.available_isas():
            with force_isa(name):
                assert_same_bits(run(x, raw, block_format), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block_format", ["q4_0", "q8_0"])
def test_adds_in_the_order_of_the_contract(isa, block_format, dtype):
    """With a power of two for d, every fused multiply-add is an exact f64 sum rounded to f32."""
    torch.manual_seed(0)
    raw = random_blocks(block_format, 21, 96).reshape(21, 3, -1)
    raw[:, :, :2] = torch.tensor([0.125], dtype=torch.float16).view(torch.uint8)
    raw = raw.flatten(1)
    x = torch.randn(18, 96).bfloat16()
    left, codes = x.double().numpy(), (dequantize(raw, block_format, torch.float64) * 8).numpy()

    def chain(columns):
        s = np.zeros((18, 21), np.float32)
        for k in columns:
            s = (s.astype(np.float64) + np.outer(left[:, k], codes[:, k])).astype(np.float32)
        return s

    def group(k):
        if dtype == torch.bfloat16 and isa == "amx":
            return chain(range(k, k + 32, 2)) + chain(range(k + 1, k + 32, 2))
        if dtype == torch.bfloat16 and isa == "avx512_bf16":
            pairs = [k + i for i in (2, 0, 3, 1, 6, 4, 7, 5, 10, 8, 11, 9, 14, 12, 15, 13)]
            return chain(pairs) + chain([i + 16 for i in pairs])
        return chain(range(k, k + 32))

    total = np.zeros((18, 21), np.float32)
    for k in range(0, 96, 32):
        s = group(k)
        total = (total.astype(np.float64) + 0.125 * s.astype(np.float64)).astype(np.float32)
    got = run(x.to(dtype), raw, block_format, out_dtype=torch.float32)
    assert_same_bits(got, torch.from_numpy(total))


def test_same_bits_for_any_number_of_threads(isa):
    for m, n in [(1, 600), (200, 70)]:
        x, raw = torch.randn(m, 64), random_blocks("q4_1", n, 64)
        results = []
        for count in (1, 2, 3):
            with force_num_threads(count):
                results.append(run(x, raw, "q4_1"))
        assert_same_bits(results[1], results[0])
        assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("num_rows", [1, 2, 7, 17])
@pytest.mark.parametrize("block_format", FORMATS)
def test_rounding_x_gives_the_bits_of_bf16_x(isa, block_format, num_rows):
    x, raw = torch.randn(num_rows, 96), random_blocks(block_format, 37, 96)
    x[0, :4] = torch.tensor([torch.inf, 1e-40, 3e38, -1e-39])
    packed, y = pack_blocks(raw, block_format), torch.empty(num_rows, 37)
    _C.matmul_w4a16_cpu(x, packed, block_format, y, round_x=True)
    assert_same_bits(y, run(x.bfloat16(), raw, block_format, out_dtype=torch.float32))


def test_refuses_to_round_what_is_bf16():
    x, packed = torch.randn(2, 32).bfloat16(), pack_blocks(random_blocks("q4_0", 5, 32), "q4_0")
    with pytest.raises(ArgumentError, match="x: expected float32, got bfloat16"):
        _C.matmul_w4a16_cpu(x, packed, "q4_0", torch.empty(2, 5), round_x=True)


@pytest.mark.parametrize("block_format", FORMATS)
def test_subnormal_activations_count_as_zero_where_the_contract_says_so(isa, block_format):
    x, raw = torch.full((2, 32), 1e-39).bfloat16(), random_blocks(block_format, 20, 32)
    flushed = isa in ("avx512_bf16", "amx") and block_format != "q4_1"
    assert (run(x, raw, block_format, out_dtype=torch.float32) == 0).all() == flushed


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block_format", FORMATS)
def test_touches_no_byte_outside_its_buffers(isa, block_format, dtype, at_end):
    raw = random_blocks(block_format, 41, 64)
    packed = guarded(pack_blocks(raw, block_format), at_end=at_end)
    for m in (1, 2, 3, 5, 19):
        x = guarded(torch.randn(m, 64).to(dtype), at_end=at_end)
        y = guarded(torch.zeros(m, 41, dtype=dtype), at_end=at_end)
        _C.matmul_w4a16_cpu(x, packed, block_format, y)
        assert_within_rounding(y, x, raw, block_format)


def test_writes_only_its_columns(isa):
    y = torch.full((3, 40), 7.0)
    raw = random_blocks("q4_0", 17, 32)
    _C.matmul_w4a16_cpu(torch.randn(3, 32), pack_blocks(raw, "q4_0"), "q4_0", y[:, 5:22])
    assert (y[:, :5] == 7).all()
    assert (y[:, 22:] == 7).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("num_rows", [1, 9, 17])
@pytest.mark.parametrize("block_format", FORMATS)
def test_nan_and_inf_of_an_activation_stay_in_their_row(isa, block_format, num_rows, dtype):
    x, raw = torch.randn(num_rows + 1, 64).to(dtype), random_blocks(block_format, 20, 64)
    for bad in (torch.nan, torch.inf):
        x[0, 40] = bad
        y = run(x, raw, block_format)
        weight = dequantize(raw, block_format)[:, 40]
        assert not y[0][weight != 0].isfinite().any()
        assert y[1:].isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("block_format", FORMATS)
def test_nan_and_inf_of_a_scale_stay_in_their_column(isa, block_format, bad):
    raw = random_blocks(block_format, 20, 64).reshape(20, 2, -1)
    raw[3, 1, :2] = torch.tensor([bad], dtype=torch.float16).view(torch.uint8)
    for m in (1, 9):
        y = run(torch.randn(m, 64), raw.flatten(1), block_format)
        assert not y[:, 3].isfinite().any()
        assert y[:, [c for c in range(20) if c != 3]].isfinite().all()


def test_every_finite_f16_scale(isa):
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    every = every[every.isfinite()][:: 1 if isa != "scalar" else 7].reshape(-1, 1, 1)
    codes = torch.full((every.shape[0], 1, 16), 0x99, dtype=torch.uint8)  # q - 8 = 1 everywhere
    x = torch.zeros(1, 32)
    x[0, 5] = 1.0
    assert torch.equal(run(x, blocks("q4_0", every, codes), "q4_0")[0], every.flatten().float())


def test_opcheck():
    raw = random_blocks("q4_1", 20, 64)
    args = (torch.randn(3, 64), pack_blocks(raw, "q4_1"), 20, "q4_1", None)
    result = torch.library.opcheck(torch.ops.pyengine.matmul_w4a16.default, args)
    assert set(result.values()) == {"SUCCESS"}


def test_compiles_without_graph_break():
    raw = random_blocks("q8_0", 20, 64)
    x, packed = torch.randn(3, 64), pack_blocks(raw, "q8_0")

    def fn(x, packed):
        return matmul_w4a16(x * 2, packed, num_rows=20, block_format="q8_0") + 1

    assert_same_bits(torch.compile(fn, fullgraph=True, backend="aot_eager")(x, packed), fn(x, packed))


def test_agrees_with_the_reference():
    x, raw = torch.randn(4, 96), random_blocks("q4_0", 24, 96)
    torch.testing.assert_close(run(x, raw, "q4_0"), reference(x, raw, "q4_0"))


def test_refuses_a_gradient():
    x, raw = torch.randn(2, 32, requires_grad=True), random_blocks("q4_0", 4, 32)
    with pytest.raises(RuntimeError, match=r"\[matmul_w4a16\] x: expected a tensor without requires_grad"):
        run(x, raw, "q4_0")
    with torch.no_grad():
        run(x, raw, "q4_0")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_names_the_op_the_argument_and_both_values(device):
    x = torch.randn(4, 64, device=device)
    packed = torch.zeros(2 * 2 * 288, dtype=torch.uint8, device=device)

    def call(x=x, packed=packed, num_rows=20, block_format="q4_0", **options):
        return matmul_w4a16(x, packed, num_rows=num_rows, block_format=block_format, **options)

    assert call().shape == (4, 20)
    for change, text in [
        ({"x": x[:, :63]}, r"x: expected a last dimension that is a multiple of 32, got 63"),
        ({"x": x.double()}, r"x: expected torch.float32 or torch.bfloat16, got torch.float64"),
        ({"packed": packed[1:]}, r"packed: expected shape \(1152,\), q4_0 of 20 rows of 64, got \(1151,\)"),
        ({"num_rows": 33}, r"packed: expected shape \(1728,\)"),
        ({"num_rows": -1}, r"num_rows: expected a count, got -1"),
        ({"packed": packed.to(torch.int8)}, r"packed: expected torch.uint8, got torch.int8"),
        ({"block_format": "q5_0"}, r"block_format: expected q4_0 or q4_1 or q8_0, got 'q5_0'"),
        ({"block_format": "q4_1"}, r"packed: expected shape \(1280,\), q4_1"),
        ({"out_dtype": torch.float16}, r"out_dtype: expected torch.float32 or torch.bfloat16, got torch.float16"),
    ]:
        with pytest.raises(RuntimeError, match=r"\[matmul_w4a16\] " + text):
            call(**change)


def test_binding_checks_for_itself():
    x, y, packed = torch.randn(2, 32), torch.empty(2, 4), torch.zeros(288, dtype=torch.uint8)
    for arguments, text in [
        ((x[:, :31], packed, "q4_0", y), r"num_cols: expected a multiple of 32, got 31"),
        ((x, packed[1:], "q4_0", y), r"packed: expected 288 bytes \(q4_0, 4 rows of 32\), got 287"),
        ((x, packed, "q4_0", y[:1]), r"y: expected shape \(2, \*\), got shape \(1, 4\)"),
        ((x, packed, "q4_0", y.double()), r"y: expected float32 or bfloat16, got float64"),
        ((x, packed, "f16", y), r"block_format: expected q4_0, q4_1 or q8_0, got 'f16'"),
    ]:
        with pytest.raises(ArgumentError, match=r"\[matmul_w4a16\] " + text):
            _C.matmul_w4a16_cpu(*arguments)
