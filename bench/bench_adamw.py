"""adamw_ against the fused optimizer of torch, on one weight of real models. Run: dev/bench adamw"""

import pytest
import torch
from shapes import HIDDEN, INTERMEDIATE

from pyengine.ops.adamw import adamw_, sum_of_squares

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def _tensors(model):
    torch.manual_seed(0)
    shape = (INTERMEDIATE[model], HIDDEN[model])
    return torch.randn(shape), torch.randn(shape), torch.zeros(shape), torch.zeros(shape)


def pyengine_step(param, grad, exp_avg, exp_avg_sq, step):
    adamw_(param, grad, exp_avg, exp_avg_sq, **HYPER, step=1)


def torch_step(param, grad, exp_avg, exp_avg_sq, step):
    step.fill_(1)
    torch._fused_adamw_(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        amsgrad=False,
        maximize=False,
        **HYPER,
    )


PROVIDERS = {"pyengine": pyengine_step, "torch": torch_step}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("model", HIDDEN)
def bench_adamw(benchmark, provider, model):
    benchmark.group = f"adamw {model} f32"
    tensors, expected = _tensors(model), _tensors(model)
    # A wrong kernel has no speed.
    PROVIDERS[provider](*tensors, torch.ones(()))
    torch_step(*expected, torch.ones(()))
    torch.testing.assert_close(tensors[0], expected[0])
    benchmark(PROVIDERS[provider], *tensors, torch.ones(()))
    benchmark.extra_info |= {"num_bytes": 7 * tensors[0].numel() * 4}


@pytest.mark.parametrize("provider", ["pyengine", "torch"])
@pytest.mark.parametrize("model", HIDDEN)
def bench_sum_of_squares(benchmark, provider, model):
    benchmark.group = f"sum_of_squares {model} f32"
    grad = _tensors(model)[1]
    fn = sum_of_squares if provider == "pyengine" else lambda t: torch.linalg.vector_norm(t).square().item()
    benchmark(fn, grad)
    benchmark.extra_info |= {"num_bytes": grad.numel() * 4}
