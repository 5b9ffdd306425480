import os
import subprocess
import sys

import pytest
import torch

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.ops.linear_cross_entropy import linear_cross_entropy
from pyengine.ops.matmul import matmul
from pyengine.reference.linear_cross_entropy import linear_cross_entropy as reference
from pyengine.testing import LAYOUTS, assert_accurate, assert_same_bits, force_num_threads
from pyengine.testing.guard import guarded

DTYPES = [torch.float32, torch.bfloat16]
# (T, C, V): one element; vocabularies below, at and above a vector, a panel and a block; several tiles of tokens.
# With a handful of tokens all errors hang on the roundings of so few lse that they compare luck, not accuracy.
SIZES = [(1, 1, 1), (9, 17, 33), (13, 64, 511), (50, 65, 512), (49, 40, 1100), (0, 4, 5)]


def _inputs(num_tokens, num_channels, vocab_size, dtype=torch.float32, num_ignored=2):
    torch.manual_seed(0)
    x, w = torch.randn(num_tokens, num_channels).to(dtype), torch.randn(vocab_size, num_channels).to(dtype)
    targets = torch.randint(vocab_size, (num_tokens,))
    targets[1 : 1 + num_ignored] = -100
    return x, w, targets


def _run(fn, dtype, x, w, targets, grad_nll, **options):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w)]
    nll = fn(*leaves, targets, **options)
    return nll, *torch.autograd.grad(nll, leaves, grad_nll.to(nll.dtype))


def _row_lse(logits):
    return torch.tensor([_C.row_lse_cpu(row) for row in logits.contiguous()])


def _check(x, w, targets, grad_nll, dtype, **options):
    got = _run(linear_cross_entropy, dtype, x, w, targets, grad_nll, **options)
    exact = _run(reference, torch.float64, x, w, targets, grad_nll, **options)
    baseline = _run(reference, dtype, x, w, targets, grad_nll, **options)
    for g, e, b in zip(got, exact, baseline, strict=True):
        assert_accurate(g, e, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_reference(isa, size, dtype):
    x, w, targets = _inputs(*size, dtype)
    _check(x, w, targets, torch.randn(size[0]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_takes_any_layout(isa, layout, dtype):
    x, w, targets = _inputs(15, 40, 70, dtype)
    change = LAYOUTS[layout]
    _check(change(x), change(w), change(targets), change(torch.randn(15)), dtype)


def test_takes_leading_dimensions_and_both_integer_types(isa):
    x, w, targets = _inputs(24, 20, 50)
    flat = linear_cross_entropy(x, w, targets)
    shaped = linear_cross_entropy(x.view(2, 3, 4, 20), w, targets.int().view(2, 3, 4))
    assert_same_bits(shaped, flat.view(2, 3, 4))
    single = linear_cross_entropy(x[3], w, targets[3])
    assert single.shape == ()
    assert_same_bits(single[None], flat[3:4])


def test_other_ignore_index(isa):
    x, w, targets = _inputs(9, 20, 50)
    targets[targets == -100] = 7
    _check(x, w, targets, torch.randn(9), torch.float32, ignore_index=7)


def test_nll_has_the_bits_of_matmul_and_row_lse(isa):
    # 1100 channels in f32: the vocabulary is worked on in more than one part.
    for size, dtype in [((50, 65, 1100), torch.bfloat16), ((13, 1100, 1300), torch.float32)]:
        x, w, targets = _inputs(*size, dtype, num_ignored=0)
        logits = matmul(x, w, out_dtype=torch.float32)
        expected = _row_lse(logits) - logits.gather(1, targets[:, None])[:, 0]
        assert_same_bits(linear_cross_entropy(x, w, targets), expected)


def test_vocabulary_in_parts(isa):
    x, w, targets = _inputs(5, 1100, 1300)
    _check(x / 30, w, targets, torch.randn(5), torch.float32)


def test_gradients_have_the_bits_of_matmul(isa):
    # With w = identity the logits are x and grad_x is grad_logits itself.
    x, eye, targets = _inputs(300, 600, 600)
    eye = torch.eye(600)
    grad_nll = torch.randn(300)
    _, grad_logits, grad_w = _run(linear_cross_entropy, torch.float32, x, eye, targets, grad_nll)
    assert_same_bits(grad_w, matmul(grad_logits.t(), x.t()))


def test_ignored_tokens_have_no_gradient(isa):
    x, w, targets = _inputs(9, 20, 50)
    nll, grad_x, _ = _run(linear_cross_entropy, torch.float32, x, w, targets, torch.ones(9))
    ignored = targets == -100
    assert ignored.sum() == 2
    assert (nll[ignored] == 0).all()
    assert (grad_x[ignored] == 0).all()
    assert (grad_x[~ignored] != 0).any(1).all()


def test_a_token_does_not_depend_on_the_others(isa):
    x, w, targets = _inputs(61, 40, 1030)
    nll, grad_x, _ = _run(linear_cross_entropy, torch.float32, x, w, targets, torch.ones(61))
    for t in (0, 2, 11, 12, 47, 48, 60):
        alone = _run(linear_cross_entropy, torch.float32, x[t : t + 1], w, targets[t : t + 1], torch.ones(1))
        assert_same_bits(alone[0], nll[t : t + 1])
        assert_same_bits(alone[1], grad_x[t : t + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(isa, dtype):
    x, w, targets = _inputs(130, 40, 1500, dtype)
    results = []
    for count in (1, 2, 3):
        with force_num_threads(count):
            results.append(_run(linear_cross_entropy, dtype, x, w, targets, torch.ones(130)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(b, a)


def test_needs_no_gradient_that_is_not_asked_for(isa):
    x, w, targets = _inputs(9, 20, 50)
    _, grad_x, grad_w = _run(linear_cross_entropy, torch.float32, x, w, targets, torch.ones(9))
    leaf = x.clone().requires_grad_()
    linear_cross_entropy(leaf, w, targets).sum().backward()
    assert_same_bits(leaf.grad, grad_x)
    leaf = w.clone().requires_grad_()
    linear_cross_entropy(x, leaf, targets).sum().backward()
    assert_same_bits(leaf.grad, grad_w)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("size", [(3, 7, 19), (5, 17, 530)], ids=str)
def test_touches_no_byte_outside_its_tensors(isa, size, at_end):
    for dtype in DTYPES:
        x, w, targets = (guarded(t, at_end=at_end) for t in _inputs(*size, dtype))
        nll, lse, grad_nll = (guarded(torch.ones(size[0]), at_end=at_end) for _ in range(3))
        grad_x, grad_w = (guarded(torch.zeros_like(t), at_end=at_end) for t in (x, w))
        _C.linear_cross_entropy_fwd_cpu(x, w, targets, nll, lse, -100)
        _C.linear_cross_entropy_bwd_cpu(grad_nll, x, w, targets, lse, grad_x, grad_w, -100)
        assert grad_x.isfinite().all()
        assert grad_w.isfinite().all()
        row = guarded(torch.randn(size[2]), at_end=at_end)
        torch.testing.assert_close(_C.row_lse_cpu(row), row.logsumexp(0).item())


@pytest.mark.parametrize("num_logits", [1, 7, 16, 511, 512, 513, 1025, 5000])
def test_row_lse(isa, num_logits):
    torch.manual_seed(0)
    logits = torch.randn(8, num_logits) * 5
    logits[1] += 1e4
    logits[2] -= 1e4
    logits[3, 1::2] = float("-inf")
    logits[4] *= 1000
    assert_accurate(_row_lse(logits), logits.double().logsumexp(1), logits.logsumexp(1))


def test_row_lse_of_infinities_and_nan(isa):
    inf, nan = float("inf"), float("nan")
    for values in ([-inf], [inf], [nan], [inf, -inf, 1.0], [nan, -inf], [nan, inf], [-inf, -200.0]):
        for where in (0, 700, 1300):
            for fill in (-300.0, -inf):
                row = torch.full((1400,), fill)
                row[where : where + len(values)] = torch.tensor(values)
                torch.testing.assert_close(_row_lse(row[None]), row.logsumexp(0)[None], equal_nan=True)
    assert _C.row_lse_cpu(torch.empty(0)) == -inf


def test_nan_stays_in_its_token(isa):
    x, w, targets = _inputs(5, 20, 50, num_ignored=0)
    x[2, 3] = float("nan")
    nll = linear_cross_entropy(x, w, targets)
    assert nll[2].isnan()
    assert nll[[0, 1, 3, 4]].isfinite().all()


MEMORY_CHILD = """
import resource, torch
from pyengine.ops.linear_cross_entropy import linear_cross_entropy
def step(num_tokens, vocab_size):
    x = torch.randn(num_tokens, 16, requires_grad=True)
    w = torch.randn(vocab_size, 16, requires_grad=True)
    linear_cross_entropy(x, w, torch.randint(vocab_size, (num_tokens,))).sum().backward()
    return float(w.grad.abs().sum())
step(64, 1024)
with open("/proc/self/statm") as file:
    in_use = int(file.read().split()[0]) * resource.getpagesize()
limit = in_use + 200 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    torch.empty(4096, 49152)
except RuntimeError:
    print("logits do not fit")
assert step(4096, 49152) > 0
print("done")
"""


@pytest.mark.slow
def test_never_holds_all_logits():
    # All logits take 768 MiB, this child may have 200 MiB more than it starts with.
    child = subprocess.run(
        [sys.executable, "-c", MEMORY_CHILD],
        capture_output=True,
        text=True,
        env={**os.environ, "PYENGINE_NUM_THREADS": "2"},
        check=False,
    )
    assert child.stdout.split("\n")[:2] == ["logits do not fit", "done"], child.stderr


def test_the_reference_is_cross_entropy():
    x, w, targets = _inputs(9, 20, 50, torch.float64)
    expected = torch.nn.functional.cross_entropy(x @ w.t(), targets, reduction="none")
    torch.testing.assert_close(reference(x, w, targets), expected)


def test_gradcheck_of_the_reference():
    x, w = torch.randn(4, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    targets = torch.tensor([0, -100, 5, 2])
    assert torch.autograd.gradcheck(lambda x, w: reference(x, w, targets), (x.requires_grad_(), w.requires_grad_()))


def test_opcheck():
    x, w, targets = _inputs(6, 8, 20)
    ops = torch.ops.pyengine
    nll, lse = ops.linear_cross_entropy(x, w, targets, -100)
    for op, args in [
        (ops.linear_cross_entropy, (x, w, targets, -100)),
        (ops.linear_cross_entropy, (x.view(2, 3, 8), w, targets.view(2, 3).int(), -100)),
        (ops.linear_cross_entropy_bwd, (torch.ones_like(nll), x, w, targets, lse, -100, True, True)),
        (ops.linear_cross_entropy_bwd, (torch.ones_like(nll), x, w, targets, lse, -100, True, False)),
    ]:
        assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


def test_compiles_without_graph_break():
    x, w, targets = _inputs(6, 8, 20)
    x.requires_grad_()
    w.requires_grad_()

    def fn(x, w):
        return linear_cross_entropy(x * 2, w, targets).sum()

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, w), (x, w))
    torch.testing.assert_close(got, torch.autograd.grad(fn(x, w), (x, w)))


@pytest.mark.parametrize("bad", [-1, 50, 2**40, -101])
def test_error_names_the_first_target_out_of_range(bad):
    x, w, targets = _inputs(9, 20, 50)
    targets[[4, 7]] = bad
    expected = rf"\[linear_cross_entropy\] targets: expected 0 <= target < 50 .*, got {bad} at index 4"
    with pytest.raises(ArgumentError, match=expected):
        linear_cross_entropy(x, w, targets)
    with pytest.raises(ArgumentError, match=expected):
        torch.ops.pyengine.linear_cross_entropy_bwd(torch.ones(9), x, w, targets, torch.ones(9), -100, True, True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_names_the_op_the_argument_and_both_shapes(device):
    x, w, targets = (t.to(device) for t in _inputs(9, 20, 50))
    with pytest.raises(RuntimeError, match=r"\[linear_cross_entropy\] w: expected shape \(V, 20\).* got \(50, 19\)"):
        linear_cross_entropy(x, w[:, :19], targets)
    with pytest.raises(RuntimeError, match=r"\[linear_cross_entropy\] w: expected 2 dimensions, got shape \(20,\)"):
        linear_cross_entropy(x, w[0], targets)
    with pytest.raises(RuntimeError, match=r"\[linear_cross_entropy\] w: expected torch.float32.* got torch.bfloat16"):
        linear_cross_entropy(x, w.bfloat16(), targets)
    with pytest.raises(RuntimeError, match=r"\[linear_cross_entropy\] targets: expected shape \(9,\).* got \(8,\)"):
        linear_cross_entropy(x, w, targets[:8])
    with pytest.raises(RuntimeError, match=r"\[linear_cross_entropy\] targets: expected torch.int64 .* torch.float32"):
        linear_cross_entropy(x, w, targets.float())
