from decimal import Decimal, getcontext

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pyengine.errors import ArgumentError  # noqa: E402
from pyengine.evals import kl_divergence, measure_divergence  # noqa: E402

pytestmark = pytest.mark.train


def exact_kl(logits_p, logits_q):
    """With 60 digits."""
    getcontext().prec = 60

    def log_softmax(row):
        values = [Decimal(float(value)) for value in row]
        total = sum(value.exp() for value in values).ln()
        return [value - total for value in values]

    return float(sum(p.exp() * (p - q) for p, q in zip(log_softmax(logits_p), log_softmax(logits_q), strict=True)))


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_equals_torch(scale, dtype):
    rng = np.random.default_rng(0)
    p, q = ((rng.normal(size=(4, 3, 50)) * scale).astype(dtype) for _ in range(2))
    log_p, log_q = (torch.from_numpy(x).double().log_softmax(-1) for x in (p, q))
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(kl_divergence(p, q), expected.numpy(), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("shift", [1e-3, 1e-6, 1e-8])
def test_nearly_equal_rows_keep_their_digits(shift):
    """The divergence of a shift s is about s**2 / 2 * variance; the usual formula has nothing left of it."""
    rng = np.random.default_rng(1)
    p = rng.normal(size=40) * 3
    q = p + shift * rng.normal(size=40)
    got, expected = float(kl_divergence(p, q)), exact_kl(p, q)
    assert got == pytest.approx(expected, rel=1e-4)
    log_p, log_q = (torch.from_numpy(x).log_softmax(-1) for x in (p, q))
    naive = float((log_p.exp() * (log_p - log_q)).sum())
    if shift == 1e-8:
        assert abs(naive - expected) > 100 * abs(got - expected)


def test_never_negative_and_zero_for_equal_rows():
    rng = np.random.default_rng(2)
    p = rng.normal(size=(200, 1000)).astype(np.float32) * 5
    assert (kl_divergence(p, p) == 0.0).all()
    assert (kl_divergence(p, p + np.float32(0.5)) < 1e-12).all(), "a constant shift changes no probability"
    assert (kl_divergence(p, p + rng.normal(size=p.shape).astype(np.float32) * 1e-6) >= 0.0).all()


def test_tokens_without_probability():
    ninf = -np.inf
    assert kl_divergence(np.array([0.0, ninf]), np.array([0.0, ninf])) == 0.0
    assert kl_divergence(np.array([0.0, 0.0]), np.array([0.0, ninf])) == np.inf
    assert kl_divergence(np.array([0.0, ninf]), np.array([0.0, 0.0])) == pytest.approx(np.log(2.0))
    assert kl_divergence(np.array([0.0, -2000.0]), np.array([0.0, 0.0])) == pytest.approx(np.log(2.0))
    assert np.isnan(kl_divergence(np.array([0.0, np.nan]), np.array([0.0, 0.0])))


def test_measurement_over_pairs():
    rng = np.random.default_rng(3)
    p = rng.normal(size=(30, 9))
    q = p + rng.normal(size=(30, 9))
    whole = measure_divergence([(p, q)])
    parts = measure_divergence([(p[:7], q[:7]), (p[7:], q[7:])])
    assert parts == whole
    values = kl_divergence(p, q)
    assert (whole.num_tokens, whole.mean_kl, whole.max_kl) == (30, values.mean(), values.max())
    assert whole.same_top == np.mean(p.argmax(-1) == q.argmax(-1))
    assert 0.0 < whole.same_top < 1.0


def test_errors():
    with pytest.raises(ArgumentError, match=r"got \(3, 4\) and \(3, 5\)"):
        kl_divergence(np.zeros((3, 4)), np.zeros((3, 5)))
    with pytest.raises(ArgumentError, match="logits: expected two arrays"):
        kl_divergence(np.zeros((3, 0)), np.zeros((3, 0)))
    with pytest.raises(ArgumentError, match="pairs: expected at least one token, got none"):
        measure_divergence([])
