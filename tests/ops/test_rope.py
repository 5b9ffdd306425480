import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.ops.rope import rope, rope_table
from pyengine.reference.rope import rope as reference
from pyengine.reference.rope import rope_table as reference_table
from pyengine.testing import LAYOUTS, assert_accurate, assert_same_bits, force_isa, force_num_threads
from pyengine.testing.guard import guarded

# [T, H, D]: the smallest pair; halves one below, at and above a vector; a prime half; several tasks; nothing.
SHAPES = [(1, 1, 2), (3, 2, 30), (3, 2, 32), (3, 2, 34), (5, 3, 74), (31, 9, 64), (0, 2, 8), (2, 0, 8)]
NUM_POSITIONS = 100
# A gradient passes through the same kernel, so two layouts of it are enough.
LAYOUT_PAIRS = [*((name, "contiguous") for name in LAYOUTS), ("contiguous", "transposed"), ("contiguous", "expanded")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def _inv_freq(head_dim):
    return 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def _case(shape, dtype=torch.float32, layout="contiguous"):
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.randn(shape).to(dtype))
    positions = torch.randint(0, NUM_POSITIONS, shape[:1], dtype=torch.int32)
    return x, *rope_table(_inv_freq(shape[2]), NUM_POSITIONS), positions


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
def test_matches_reference(isa, shape, layout, grad_layout, dtype):
    x, cos, sin, positions = _case(shape, dtype, layout)
    grad_y = LAYOUTS[grad_layout](torch.randn(shape).to(dtype))
    grad_y_before = grad_y.clone()
    runs = []
    for fn, d in [(rope, dtype), (reference, torch.float64), (reference, dtype)]:
        leaf = x.detach().to(d).requires_grad_()
        y = fn(leaf, cos, sin, positions)
        runs.append((y, *torch.autograd.grad(y, leaf, grad_y.to(d))))
    for got, exact, baseline in zip(*runs, strict=True):
        assert_accurate(got, exact, baseline)
    assert torch.equal(grad_y, grad_y_before), "backward must not write into grad_y"


def test_equals_transformers_bit_for_bit_in_f32(isa):
    x, cos, sin, positions = _case((17, 5, 64))
    c, s = (torch.cat([t[positions.long()]] * 2, -1)[None] for t in (cos, sin))  # [1, T, D]
    q, k = apply_rotary_pos_emb(x.transpose(0, 1)[None], 2 * x.transpose(0, 1)[None], c, s)  # [1, H, T, D]
    assert_same_bits(rope(x, cos, sin, positions), q[0].transpose(0, 1))
    assert_same_bits(rope(2 * x, cos, sin, positions), k[0].transpose(0, 1))


@DTYPES
def test_same_bits_on_every_isa_level(dtype):
    case = _case((11, 3, 70), dtype)
    with force_isa("scalar"):
        expected = rope(*case)
    for name in _C.available_isas():
        with force_isa(name):
            assert_same_bits(rope(*case), expected)


@DTYPES
def test_in_place_and_between_strides(isa, dtype):
    x, cos, sin, positions = _case((9, 4, 34), dtype)
    expected = rope(x, cos, sin, positions)
    packed = torch.full((9, 7, 50), 3.0, dtype=dtype)  # heads inside a wider buffer, as in a packed q, k, v product
    view = packed[:, 1:5, 8:42]
    view.copy_(x)
    _C.rope_cpu(view, cos, sin, positions, view)
    assert_same_bits(view, expected)
    view.fill_(3.0)
    assert (packed == 3.0).all(), "only the view may be written"
    _C.rope_cpu(x, cos, sin, positions, view)
    assert_same_bits(view, expected)


def test_works_on_numpy_arrays(isa):
    x, cos, sin, positions = _case((5, 2, 16))
    y = np.empty(x.shape, np.float32)
    _C.rope_cpu(x.numpy(), cos.numpy(), sin.numpy(), positions.numpy(), y)
    assert_same_bits(torch.from_numpy(y), rope(x, cos, sin, positions))


def test_inverse_undoes_the_rotation(isa):
    x, cos, sin, positions = _case((20, 3, 64))
    back = rope(rope(x, cos, sin, positions), cos, sin, positions, inverse=True)
    torch.testing.assert_close(back, x, rtol=0, atol=4 * torch.finfo(torch.float32).eps * x.abs().max().item())


def test_second_derivative_is_the_rotation_again(isa):
    x, cos, sin, positions = _case((4, 2, 8))
    x.requires_grad_()
    y = rope(x, cos, sin, positions)
    (grad,) = torch.autograd.grad(y.square().sum() / 2, x, create_graph=True)  # = x, as the map is orthogonal
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, torch.ones_like(second))


def test_table_is_float64_rounded_once():
    inv_freq = _inv_freq(64)
    cos, sin = rope_table(inv_freq, 3000)
    expected_cos, expected_sin = reference_table(inv_freq, 3000)
    # Two libraries' double cosines may differ in their last bit, so that a rounding to f32 can fall to either side.
    for got, expected in [(cos, expected_cos), (sin, expected_sin)]:
        assert (got != expected).double().mean() < 1e-4
        torch.testing.assert_close(got, expected, rtol=2**-23, atol=2**-50)


def test_table_on_numpy_arrays_and_any_number_of_threads():
    inv_freq = _inv_freq(10).numpy()
    tables = []
    for count in (1, 2, 3):
        cos, sin = np.empty((700, 5), np.float32), np.empty((700, 5), np.float32)
        with force_num_threads(count):
            _C.rope_table(inv_freq, cos, sin)
        tables.append((cos, sin))
    np.testing.assert_array_equal(np.array(tables[1:]), np.array(tables[:1] * 2))
    np.testing.assert_array_equal(tables[0][0], np.cos(np.arange(700.0)[:, None] * inv_freq).astype(np.float32))


@pytest.mark.parametrize("head_dim", [2, 14, 32, 66])
@pytest.mark.parametrize("at_end", [True, False])
@DTYPES
def test_touches_no_byte_outside_its_tensors(isa, head_dim, at_end, dtype):
    x, cos, sin, positions = (guarded(t, at_end=at_end) for t in _case((3, 2, head_dim), dtype))
    y = guarded(torch.zeros_like(x), at_end=at_end)
    _C.rope_cpu(x, cos, sin, positions, y)
    assert_same_bits(y, rope(x, cos, sin, positions))


def test_same_bits_for_any_number_of_threads_and_for_a_token_alone(isa):
    x, cos, sin, positions = _case((100, 9, 64))
    results = []
    for count in (1, 2, 3):
        with force_num_threads(count):
            results.append(rope(x, cos, sin, positions))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])
    for t in range(0, 100, 7):
        assert_same_bits(rope(x[t : t + 1], cos, sin, positions[t : t + 1]), results[0][t : t + 1])


def test_nan_stays_in_its_pair(isa):
    x, cos, sin, positions = _case((3, 2, 40))
    x[1, 0, 5] = float("nan")
    bad = rope(x, cos, sin, positions).isnan().nonzero().tolist()
    assert bad == [[1, 0, 5], [1, 0, 25]]


def test_gradcheck_of_the_reference():
    x, cos, sin, positions = _case((3, 2, 6))
    assert torch.autograd.gradcheck(
        lambda x: reference(x, cos.double(), sin.double(), positions), x.double().requires_grad_()
    )


def test_opcheck():
    for inverse in (False, True):
        result = torch.library.opcheck(torch.ops.pyengine.rope.default, (*_case((4, 2, 16)), inverse))
        assert set(result.values()) == {"SUCCESS"}


def test_compiles_without_graph_break():
    x, cos, sin, positions = _case((4, 2, 16))
    x.requires_grad_()

    def fn(x):
        return (rope(x * 2, cos, sin, positions) * x).sum()

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(fn(x), x))


@pytest.mark.parametrize("bad", [-1, NUM_POSITIONS, 2**31 - 1])
def test_a_position_outside_the_tables_is_named_and_nothing_is_written(bad):
    x, cos, sin, positions = _case((6, 2, 8))
    positions[3:5] = bad
    y = torch.full_like(x, 7.0)
    with pytest.raises(ArgumentError, match=rf"\[rope\] positions: expected 0 to 99 .* got {bad} at index 3$"):
        _C.rope_cpu(x, cos, sin, positions, y)
    assert (y == 7.0).all()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_names_the_op_the_argument_and_what_came(device):
    x, cos, sin, positions = (t.to(device) for t in _case((4, 2, 16)))
    for args, match in [
        ((x[0], cos, sin, positions), r"x: expected 3 dimensions .* got shape \(2, 16\)"),
        ((x[..., :15], cos, sin, positions), r"x: expected an even last dimension, got 15"),
        ((x.half(), cos, sin, positions), r"x: expected torch.float32 or torch.bfloat16, got torch.float16"),
        ((x, cos[:, :7], sin, positions), r"cos: expected shape \(100, 8\), half .* got \(100, 7\)"),
        ((x, cos, sin[:99], positions), r"sin: expected shape \(100, 8\), .* got \(99, 8\)"),
        ((x, cos.bfloat16(), sin, positions), r"cos: expected torch.float32, got torch.bfloat16"),
        ((x, cos, sin, positions.long()), r"positions: expected torch.int32, got torch.int64"),
        ((x, cos, sin, positions[:3]), r"positions: expected shape \(4,\), .* got \(3,\)"),
    ]:
        with pytest.raises(RuntimeError, match=r"\[rope\] " + match):
            rope(*args)


def test_binding_rejects_what_it_cannot_rotate():
    x, cos, sin, positions = _case((4, 4, 16))
    read_only = np.zeros((4, 4, 16), np.float32)
    read_only.flags.writeable = False
    for args, match in [
        ((x, cos, sin, positions, x.transpose(0, 1)), r"y: expected x itself or other memory"),
        ((x, cos, sin, positions, read_only), r"y: expected writable memory"),
        ((x, cos.t().contiguous().t(), sin, positions, x), r"cos: expected a contiguous tensor"),
        ((x[..., ::2], cos[:, :4].contiguous(), sin[:, :4].contiguous(), positions, x), r"x: expected unit stride"),
    ]:
        with pytest.raises(ArgumentError, match=r"\[rope\] " + match):
            _C.rope_cpu(*args)
    with pytest.raises(ArgumentError, match=r"\[rope_table\] inv_freq: expected float64, got float32"):
        _C.rope_table(np.ones(4, np.float32), np.empty((3, 4), np.float32), np.empty((3, 4), np.float32))
