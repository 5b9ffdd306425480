import pytest

torch = pytest.importorskip("torch")

from pyengine.errors import ArgumentError  # noqa: E402
from pyengine.optim import AdamW, clip_scale, grad_norm  # noqa: E402
from pyengine.testing import assert_accurate, assert_same_bits, force_num_threads  # noqa: E402

pytestmark = pytest.mark.train

OPTIONS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def parameters_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (37, 19), "vector": (19,), "scalar": (1,), "cube": (3, 5, 7)}
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()
    }


def gradients_of(parameters, step):
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in parameters.items()}


def torch_adamw(parameters):
    decayed = [p for p in parameters.values() if p.dim() >= 2]
    others = [p for p in parameters.values() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=OPTIONS["lr"], betas=(0.9, 0.95), eps=OPTIONS["eps"])


def run_peer(dtype, num_steps=20):
    parameters = {name: torch.nn.Parameter(p.detach().to(dtype)) for name, p in parameters_of().items()}
    optimiser = torch_adamw(parameters)
    for step in range(num_steps):
        for name, grad in gradients_of(parameters_of(), step).items():
            parameters[name].grad = grad.to(dtype)
        optimiser.step()
    return parameters


def test_float32_equals_torch():
    parameters = parameters_of()
    optimiser = AdamW(parameters.items(), **OPTIONS)
    for step in range(20):
        for name, grad in gradients_of(parameters, step).items():
            parameters[name].grad = grad
        optimiser.step()
    exact, peer = run_peer(torch.float64), run_peer(torch.float32)
    for name, parameter in parameters.items():
        assert_accurate(parameter.detach(), exact[name].detach(), peer[name].detach())


def test_bfloat16_is_the_rounding_of_the_float32_run():
    """The same bfloat16 gradients: the masters equal a float32 run bit for bit, the parameters are their rounding."""
    halves = parameters_of(torch.bfloat16)
    floats = {name: torch.nn.Parameter(p.detach().float()) for name, p in halves.items()}
    half, full = AdamW(halves.items(), **OPTIONS), AdamW(floats.items(), **OPTIONS)
    for step in range(20):
        grads = gradients_of(halves, step)
        half.step(grads=grads)
        full.step(grads={name: grad.float() for name, grad in grads.items()})
    for name in halves:
        assert_same_bits(half.state_dict()[f"master.{name}"], floats[name].data)
        assert_same_bits(halves[name].data, floats[name].data.bfloat16())


def test_small_steps_are_not_lost_in_bfloat16():
    parameter = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimiser = AdamW([("p", parameter)], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        optimiser.step(grads={"p": torch.ones(8, dtype=torch.bfloat16)})
    assert parameter.detach().float() == pytest.approx(0.99, abs=4e-3)
    assert (parameter != 1).all()


def test_vectors_do_not_decay():
    parameters = parameters_of()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimiser = AdamW(parameters.items(), **(OPTIONS | {"weight_decay": 1.0, "lr": 0.1}))
    assert optimiser.decayed == {"matrix", "cube"}
    optimiser.step(grads={name: torch.zeros_like(p) for name, p in parameters.items()})
    for name, parameter in parameters.items():
        expected = before[name] * 0.9 if name in ("matrix", "cube") else before[name]
        torch.testing.assert_close(parameter.detach(), expected)


def test_tied_and_frozen_parameters():
    shared = torch.nn.Parameter(torch.ones(2, 2))
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    optimiser = AdamW([("a", shared), ("b", shared), ("c", frozen)], **OPTIONS)
    assert list(optimiser.parameters) == ["a"]
    assert set(optimiser.state_dict()) == {"exp_avg.a", "exp_avg_sq.a"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_round_trip_goes_on_with_the_same_bits(dtype):
    first = parameters_of(dtype)
    optimiser = AdamW(first.items(), **OPTIONS)
    for step in range(3):
        optimiser.step(grads=gradients_of(first, step))
    second = {name: torch.nn.Parameter(p.detach().clone()) for name, p in reversed(first.items())}
    resumed = AdamW(second.items(), **OPTIONS)
    state = {name: value.clone() for name, value in optimiser.state_dict().items()}
    resumed.load_state_dict(state, num_steps=optimiser.num_steps)
    for step in range(3, 6):
        optimiser.step(grads=gradients_of(first, step))
        resumed.step(grads=gradients_of(first, step))
    for name in first:
        assert_same_bits(second[name].data, first[name].data)
    for name, value in optimiser.state_dict().items():
        assert_same_bits(resumed.state_dict()[name], value)


def test_state_errors_change_nothing():
    parameters = parameters_of()
    optimiser = AdamW(parameters.items(), **OPTIONS)
    optimiser.step(grads=gradients_of(parameters, 0))
    good = {name: torch.zeros_like(value) for name, value in optimiser.state_dict().items()}
    before = {name: value.clone() for name, value in optimiser.state_dict().items()}
    for broken, message in [
        ({k: v for k, v in good.items() if k != "exp_avg.vector"}, "expected 'exp_avg.vector', got none"),
        (good | {"exp_avg.other": torch.zeros(1)}, "got 'exp_avg.other'"),
        (good | {"exp_avg.vector": torch.zeros(18)}, r"expected torch.float32 \(19,\), got torch.float32 \(18,\)"),
        (good | {"exp_avg.vector": torch.zeros(19).double()}, "got torch.float64"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            optimiser.load_state_dict(broken, num_steps=5)
    assert optimiser.num_steps == 1
    for name, value in optimiser.state_dict().items():
        assert_same_bits(value, before[name])


@pytest.mark.parametrize(
    "option", [{"lr": -1.0}, {"beta1": 1.0}, {"beta2": -0.1}, {"eps": 0.0}, {"weight_decay": -1.0}], ids=str
)
def test_options_out_of_range(option):
    with pytest.raises(ArgumentError, match=next(iter(option))):
        AdamW(parameters_of().items(), **option)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grad_norm_equals_torch(dtype):
    torch.manual_seed(0)
    grads = [torch.randn(shape).to(dtype) * 3 for shape in [(1,), (0,), (7, 11), (4096,), (4097,), (130, 257)]]
    exact = torch.linalg.vector_norm(torch.cat([grad.double().flatten() for grad in grads]))
    assert grad_norm(grads) == pytest.approx(float(exact), rel=1e-6)
    assert grad_norm([]) == 0.0


def test_grad_norm_has_the_same_bits_for_any_number_of_threads():
    grads = [torch.randn(1000, 1000), torch.randn(50_001)[1:], torch.randn(300, 7).t()]
    threads = torch.get_num_threads()
    norms = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with force_num_threads(count):
                norms.add(grad_norm(grads))
    finally:
        torch.set_num_threads(threads)
    assert len(norms) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_grad_norm_shows_what_is_not_finite(value):
    grads = [torch.ones(5000), torch.ones(3)]
    for tensor, index in ((0, 17), (0, 4999), (1, 2)):
        grads[tensor][index] = value
        assert not torch.isfinite(torch.tensor(grad_norm(grads)))
        grads[tensor][index] = 1.0


@pytest.mark.parametrize("norm", [0.0, 0.5, 0.999, 1.0, 1.5, 1e9])
def test_clipping_equals_torch(norm):
    direction = torch.randn(4, 5)
    grad = direction / direction.norm() * norm
    parameter = torch.nn.Parameter(torch.zeros(4, 5))
    parameter.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    torch.testing.assert_close(grad * clip_scale(grad_norm([grad]), 1.0), parameter.grad)


def test_grad_scale_scales_the_gradient():
    first, second = parameters_of(), parameters_of()
    one, two = AdamW(first.items(), **OPTIONS), AdamW(second.items(), **OPTIONS)
    for step in range(3):
        grads = gradients_of(first, step)
        one.step(grads=grads, grad_scale=0.25, lr=1e-2)
        two.step(grads={name: grad * 0.25 for name, grad in grads.items()}, lr=1e-2)
    for name in first:
        assert_same_bits(first[name].data, second[name].data)
