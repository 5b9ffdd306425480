import math

import pytest

pytest.importorskip("torch")

from pyengine.errors import ConfigError  # noqa: E402
from pyengine.train.schedule import ScheduleConfig, learning_rate  # noqa: E402

pytestmark = pytest.mark.train

PEAK, STEPS, WARMUP, FINAL = 3e-3, 100, 10, 0.1


def rates(**options):
    schedule = ScheduleConfig(**options)
    return [learning_rate(schedule, step, peak=PEAK, num_steps=STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_is_a_line_to_the_peak(shape):
    assert rates(shape=shape, warmup_steps=WARMUP)[:WARMUP] == pytest.approx(
        [PEAK * step / WARMUP for step in range(1, WARMUP + 1)]
    )
    assert rates(shape=shape)[0] == PEAK


def test_closed_forms():
    after = range(WARMUP, STEPS)
    share = [(step - WARMUP) / (STEPS - WARMUP) for step in after]
    options = {"warmup_steps": WARMUP, "final_ratio": FINAL}
    assert rates(shape="constant", **options)[WARMUP:] == [PEAK] * (STEPS - WARMUP)
    assert rates(shape="linear", **options)[WARMUP:] == pytest.approx([PEAK * (1 - 0.9 * s) for s in share])
    assert rates(shape="cosine", **options)[WARMUP:] == pytest.approx(
        [PEAK * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * s)) / 2) for s in share]
    )
    wsd = rates(shape="wsd", decay_steps=20, **options)
    assert wsd[WARMUP:81] == [PEAK] * 71
    assert wsd[80:] == pytest.approx([PEAK * (1 - 0.9 * math.sqrt(i / 20)) for i in range(20)])


def test_cosine_equals_torch():
    torch = pytest.importorskip("torch")
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS, eta_min=PEAK * FINAL)
    expected = []
    for _ in range(STEPS):
        expected.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        peer.step()
    assert rates(shape="cosine", final_ratio=FINAL) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", ["linear", "cosine", "wsd"])
def test_it_reaches_the_final_ratio_and_stays(shape):
    decay = {"decay_steps": 20} if shape == "wsd" else {}
    schedule = ScheduleConfig(shape=shape, final_ratio=FINAL, **decay)
    for step in (STEPS, STEPS + 1, 10 * STEPS):
        assert learning_rate(schedule, step, peak=PEAK, num_steps=STEPS) == pytest.approx(PEAK * FINAL)
    all_rates = rates(shape=shape, final_ratio=FINAL, **decay)
    assert all(a >= b > PEAK * FINAL for a, b in zip(all_rates, all_rates[1:], strict=False))


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "wsd"])
def test_a_warm_up_longer_than_the_run(shape):
    assert max(rates(shape=shape, warmup_steps=200)) == pytest.approx(PEAK / 2)
    assert all(math.isfinite(rate) for rate in rates(shape=shape, warmup_steps=STEPS))


def test_decay_steps_belong_to_wsd():
    with pytest.raises(ConfigError, match="decay_steps: expected 0 for shape 'cosine', got 3"):
        ScheduleConfig(shape="cosine", decay_steps=3)
