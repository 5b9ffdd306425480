import itertools
import math

import numpy as np
import pytest
import torch

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.ops.adamw import adamw_, sum_of_squares
from pyengine.reference.adamw import adamw_ as reference_
from pyengine.testing import LAYOUTS, assert_accurate, assert_same_bits, force_isa, force_num_threads
from pyengine.testing.guard import guarded

F32, BF16 = torch.float32, torch.bfloat16
# (param, grad, state, master?)
DTYPES = [*((p, g, s, False) for p, g, s in itertools.product((F32, BF16), repeat=3))]
DTYPES += [(BF16, g, s, True) for g, s in itertools.product((F32, BF16), repeat=2)]
DTYPE_IDS = ["-".join(str(d).removeprefix("torch.") for d in case) for case in DTYPES]
SHAPES = [(1,), (7, 9), (16,), (17,), (3, 5, 67), (20_011,), (0, 4)]
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def _case(shape, dtypes=(F32, F32, F32, False), seed=0):
    """param, grad, exp_avg, exp_avg_sq, master of a run in its middle."""
    torch.manual_seed(seed)
    param_dtype, grad_dtype, state_dtype, has_master = dtypes
    value = torch.randn(shape)
    return [
        value.to(param_dtype),
        torch.randn(shape).to(grad_dtype),
        (0.1 * torch.randn(shape)).to(state_dtype),
        (0.1 * torch.rand(shape) + 1e-3).to(state_dtype),
        value.clone() if has_master else None,
    ]


def _copy(tensors):
    return [None if t is None else t.clone() for t in tensors]


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_step_matches_the_reference(isa, shape, dtypes):
    case = _case(shape, dtypes)
    got, exact, baseline = _copy(case), [None if t is None else t.double() for t in case], _copy(case)
    for fn, tensors in [(adamw_, got), (reference_, exact), (reference_, baseline)]:
        fn(*tensors, **HYPER, step=3, grad_scale=0.5)
    assert_same_bits(got[1], case[1])
    for g, e, b in zip(got, exact, baseline, strict=True):
        if g is not None:
            assert_accurate(g, e, b)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_fifty_steps_follow_torch_in_float64(isa, weight_decay, beta1):
    torch.manual_seed(0)
    start, grads = torch.randn(1000), torch.randn(50, 1000)
    exact, single = (start.to(d).requires_grad_() for d in (torch.float64, F32))
    options = {"lr": 1e-2, "betas": (beta1, 0.95), "eps": 1e-8, "weight_decay": weight_decay, "foreach": False}
    optimizers = [torch.optim.AdamW([p], **options) for p in (exact, single)]
    got, m, v = start.clone(), torch.zeros(1000), torch.zeros(1000)
    for step in range(1, 51):
        for p, optimizer in zip((exact, single), optimizers, strict=True):
            p.grad = grads[step - 1].to(p.dtype)
            optimizer.step()
        adamw_(got, grads[step - 1], m, v, **(HYPER | {"weight_decay": weight_decay, "beta1": beta1}), step=step)
    assert_accurate(got, exact.detach(), single.detach())
    for name, state in [("exp_avg", m), ("exp_avg_sq", v)]:
        assert_accurate(state, optimizers[0].state[exact][name], optimizers[1].state[single][name])


def test_master_keeps_what_bfloat16_drops(isa):
    param, master = torch.ones(40, dtype=BF16), torch.ones(40)
    alone = param.clone()
    state = [torch.zeros(40) for _ in range(4)]
    for step in range(1, 101):  # updates of 1e-4, far below the last bit of bf16 at 1
        grad = torch.ones(40, dtype=BF16)
        adamw_(param, grad, *state[:2], master, **(HYPER | {"lr": 1e-4, "weight_decay": 0.0}), step=step)
        adamw_(alone, grad, *state[2:], **(HYPER | {"lr": 1e-4, "weight_decay": 0.0}), step=step)
    torch.testing.assert_close(master, torch.full((40,), 0.99), rtol=1e-5, atol=0)
    assert_same_bits(param, master.to(BF16))
    assert (alone == 1).all()


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
def test_same_bits_on_every_isa_level_and_any_number_of_threads(dtypes):
    case = _case((20_011,), dtypes)
    expected = None
    for name in _C.available_isas():
        for count in (1, 2, 3):
            got = _copy(case)
            with force_isa(name), force_num_threads(count):
                adamw_(*got, **HYPER, step=2)
            expected = expected or got
            for a, b in zip(got, expected, strict=True):
                if a is not None:
                    assert_same_bits(a, b)


def test_an_element_does_not_depend_on_the_others(isa):
    case = _case((100,))
    whole = _copy(case)
    adamw_(*whole, **HYPER, step=5)
    for begin, end in [(0, 1), (3, 20), (50, 67), (99, 100)]:
        part = [None if t is None else t[begin:end].clone() for t in case]
        adamw_(*part, **HYPER, step=5)
        assert_same_bits(part[0], whole[0][begin:end])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_may_have_any_layout(isa, layout):
    case = _case((6, 10))
    case[1] = LAYOUTS[layout](case[1])
    plain = _copy(case)
    plain[1] = case[1].contiguous()
    before = case[1].clone()
    adamw_(*case, **HYPER, step=1)
    adamw_(*plain, **HYPER, step=1)
    assert_same_bits(case[0], plain[0])
    assert torch.equal(case[1], before)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("n", [1, 7, 16, 33])
def test_touches_no_byte_outside_its_tensors(isa, n, dtypes, at_end):
    case = _case((n,), dtypes)
    got = [None if t is None else guarded(t, at_end=at_end) for t in case]
    adamw_(*got, **HYPER, step=1)
    adamw_(*case, **HYPER, step=1)
    assert_same_bits(got[0], case[0])


def test_works_on_numpy_arrays(isa):
    case = _case((37,))[:4]
    arrays = [t.numpy().copy() for t in case]
    _C.adamw_cpu(*arrays, None, **HYPER, step=1, grad_scale=1.0)
    adamw_(*case, **HYPER, step=1)
    for a, t in zip(arrays, case, strict=True):
        np.testing.assert_array_equal(a, t.numpy())


def test_nan_and_inf_stay_in_their_element(isa):
    case = _case((50,))
    case[1][7], case[1][20] = float("nan"), float("inf")
    adamw_(*case, **HYPER, step=1)
    assert case[0].isnan().nonzero().flatten().tolist() == [7, 20]
    assert case[0].isfinite().sum() == 48


def test_a_write_is_seen_by_autograd():
    param = torch.randn(5, requires_grad=True)
    y = (param * param).sum()
    adamw_(param, torch.ones(5), torch.zeros(5), torch.zeros(5), **HYPER, step=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_opcheck():
    for dtypes in [(F32, F32, F32, False), (BF16, F32, F32, True)]:
        args = (*_case((4, 5), dtypes), 1e-2, 0.9, 0.95, 1e-8, 0.1, 1, 1.0)
        assert set(torch.library.opcheck(torch.ops.pyengine.adamw_.default, args).values()) == {"SUCCESS"}
    result = torch.library.opcheck(torch.ops.pyengine.sum_of_squares.default, (torch.randn(4, 5),))
    assert set(result.values()) == {"SUCCESS"}


def test_compiles_without_graph_break():
    case = _case((4, 5))
    plain = _copy(case)

    def fn(param, grad, exp_avg, exp_avg_sq, master):
        adamw_(param, grad * 2, exp_avg, exp_avg_sq, master, **HYPER, step=1)

    torch.compile(fn, fullgraph=True, backend="aot_eager")(*case)
    fn(*plain)
    for a, b in zip(case[:4], plain[:4], strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("shared", [*itertools.combinations(range(5), 2)], ids=str)
@pytest.mark.parametrize(("first_at", "second_at"), [(0, 0), (0, 4), (9, 0), (0, 9)])
def test_overlapping_arguments_are_rejected(shared, first_at, second_at):
    names = ["param", "grad", "exp_avg", "exp_avg_sq", "master"]
    memory = torch.zeros(1000)
    args = [torch.zeros(10, dtype=BF16), *(torch.zeros(10) for _ in range(4))]
    first, second = shared
    args[first] = memory[first_at : first_at + 10]
    if first == 0:  # half as wide, and at its end so that it meets all three neighbours
        args[0] = args[0].view(BF16)[10:] if second_at > first_at else args[0].view(BF16)[:10]
    args[second] = memory[second_at : second_at + 10]
    with pytest.raises(ArgumentError, match=rf"\[adamw\] {names[second]}: .* an overlap with {names[first]}$"):
        adamw_(*args, **HYPER, step=1)
    assert not memory.any()


def test_neighbours_in_one_buffer_do_not_overlap():
    memory = torch.randn(40).abs()
    parts = [memory[10 * i : 10 * i + 10] for i in (3, 0, 2, 1)]
    expected = _copy(parts)
    adamw_(*parts, **HYPER, step=1)
    adamw_(*expected, **HYPER, step=1)
    assert_same_bits(parts[0], expected[0])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_names_the_argument_and_what_came(device):
    case = [t.to(device) for t in _case((4, 6))[:4]]
    for index, value, match in [
        (0, case[0].double(), r"param: expected torch.float32 or torch.bfloat16, got torch.float64"),
        (0, case[0].t().contiguous().t(), r"param: expected a contiguous tensor, got strides"),
        (1, case[1][:3], r"grad: expected shape \(4, 6\), the shape of param, got \(3, 6\)"),
        (3, case[3].bfloat16(), r"exp_avg_sq: expected torch.float32, got torch.bfloat16"),
        (4, case[0].clone(), r"master: expected none for a float32 param, got a tensor"),
    ]:
        args = [*case, None]
        args[index] = value
        with pytest.raises(RuntimeError, match=r"\[adamw\] " + match):
            adamw_(*args, **HYPER, step=1)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr", -1.0, "a number >= 0"),
        ("lr", math.nan, "a number >= 0"),
        ("beta1", 1.0, r"a number in \[0, 1\)"),
        ("beta2", -0.1, r"a number in \[0, 1\)"),
        ("eps", -1e-8, "a number >= 0"),
        ("weight_decay", -0.5, "a number >= 0"),
        ("step", 0, "a whole number >= 1"),
    ],
)
def test_scalars_out_of_range_are_named(name, value, expected):
    with pytest.raises(ArgumentError, match=rf"\[adamw\] {name}: expected {expected}, got {value}"):
        adamw_(*_case((3,)), **(HYPER | {"step": 1} | {name: value}))


# --- sum_of_squares ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (15,), (17,), (4095,), (4096,), (4097,), (3, 5, 6007)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sum_of_squares(isa, shape, layout, dtype):
    torch.manual_seed(0)
    t = LAYOUTS[layout](torch.randn(shape).to(dtype))
    exact = t.double().square().sum().item()
    # A lane adds 4096 / lanes positive terms in f32, and a tree adds the lanes: at most 512 + 3 roundings.
    assert abs(sum_of_squares(t) - exact) <= 515 * 2**-24 * exact


def test_sum_of_squares_has_the_same_bits_for_any_number_of_threads(isa):
    t, results = torch.randn(300_007), set()
    for count in (1, 2, 3):
        with force_num_threads(count):
            results.add(sum_of_squares(t))
    assert len(results) == 1


@pytest.mark.parametrize("n", [1, 7, 16, 33])
@pytest.mark.parametrize("at_end", [True, False])
def test_sum_of_squares_touches_no_byte_outside(isa, n, at_end):
    for dtype in (F32, BF16):
        assert sum_of_squares(guarded(torch.ones(n, dtype=dtype), at_end=at_end)) == n


def test_sum_of_squares_keeps_nan_and_adds_blocks_in_double(isa):
    t = torch.zeros(20_000)
    t[::4096] = torch.tensor([1.0, 2**-13, 2**-13, 2**-13, 2**-13])
    assert sum_of_squares(t) == 1 + 4 * 2**-26
    t[9999] = float("nan")
    assert math.isnan(sum_of_squares(t))
