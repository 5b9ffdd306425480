"""layer_norm against torch, at the shapes real models use. Run: dev/bench layer_norm"""

import pytest
import torch
from shapes import HIDDEN, NUM_TOKENS

from pyengine.ops import layer_norm

PROVIDERS = {
    "pyengine": lambda x, weight, bias: layer_norm(x, weight, bias),
    "torch": lambda x, weight, bias: torch.nn.functional.layer_norm(x, weight.shape, weight, bias),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("model", HIDDEN)
def bench_layer_norm_fwd(benchmark, provider, model, num_tokens, dtype):
    benchmark.group = f"layer_norm fwd {model} {num_tokens} {dtype}"
    x = torch.randn(NUM_TOKENS[num_tokens], HIDDEN[model]).to(dtype)
    weight, bias = torch.randn(HIDDEN[model]).to(dtype), torch.randn(HIDDEN[model]).to(dtype)
    # A wrong kernel has no speed.
    torch.testing.assert_close(PROVIDERS[provider](x, weight, bias), PROVIDERS["torch"](x, weight, bias))
    benchmark(PROVIDERS[provider], x, weight, bias)
    benchmark.extra_info |= {"num_bytes": (2 * x.numel() + 2 * weight.numel()) * x.element_size(), "dtype": str(dtype)}
