"""rms_norm against torch, at the shapes real models use. Run: dev/bench rms_norm"""

import pytest
import torch
from shapes import HIDDEN, NUM_TOKENS

from pyengine.ops import rms_norm

PROVIDERS = {
    "pyengine": lambda x, weight: rms_norm(x, weight),
    "torch": lambda x, weight: torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("model", HIDDEN)
def bench_rms_norm_fwd(benchmark, provider, model, num_tokens, dtype):
    benchmark.group = f"rms_norm fwd {model} {num_tokens} {dtype}"
    x = torch.randn(NUM_TOKENS[num_tokens], HIDDEN[model]).to(dtype)
    weight = torch.randn(HIDDEN[model]).to(dtype)
    # A wrong kernel has no speed.
    torch.testing.assert_close(PROVIDERS[provider](x, weight), PROVIDERS["torch"](x, weight))
    benchmark(PROVIDERS[provider], x, weight)
    benchmark.extra_info |= {"num_bytes": (2 * x.numel() + weight.numel()) * x.element_size(), "dtype": str(dtype)}
