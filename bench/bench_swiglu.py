"""swiglu against torch, at the shapes real models use. Run: dev/bench swiglu"""

import pytest
import torch
from shapes import INTERMEDIATE, NUM_TOKENS

from pyengine.ops.swiglu import swiglu_gate_up


def torch_swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


PROVIDERS = {"pyengine": swiglu_gate_up, "torch": torch_swiglu}


def _case(provider, model, num_tokens, dtype):
    gate_up = torch.randn(NUM_TOKENS[num_tokens], 2 * INTERMEDIATE[model]).to(dtype)
    # A wrong kernel has no speed.
    torch.testing.assert_close(PROVIDERS[provider](gate_up), torch_swiglu(gate_up))
    return gate_up


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("model", INTERMEDIATE)
def bench_swiglu_fwd(benchmark, provider, model, num_tokens, dtype):
    benchmark.group = f"swiglu fwd {model} {num_tokens} {dtype}"
    gate_up = _case(provider, model, num_tokens, dtype)
    benchmark(PROVIDERS[provider], gate_up)
    benchmark.extra_info |= {"num_bytes": gate_up.numel() // 2 * 3 * gate_up.element_size(), "dtype": str(dtype)}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", INTERMEDIATE)
def bench_swiglu_bwd(benchmark, provider, model, dtype):
    benchmark.group = f"swiglu bwd {model} prefill-512 {dtype}"
    gate_up = _case(provider, model, "prefill-512", dtype).requires_grad_()
    y = PROVIDERS[provider](gate_up)
    grad_y = torch.randn_like(y)
    benchmark(torch.autograd.grad, y, gate_up, grad_y, retain_graph=True)
    benchmark.extra_info |= {"num_bytes": y.numel() * 5 * y.element_size(), "dtype": str(dtype)}
