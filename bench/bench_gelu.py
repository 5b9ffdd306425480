"""gelu against torch, at the shapes real models use. Run: dev/bench gelu"""

import pytest
import torch
from shapes import INTERMEDIATE, NUM_TOKENS

from pyengine.ops import gelu

PROVIDERS = {
    "pyengine": lambda x, form: gelu(x, approximate=form),
    "torch": lambda x, form: torch.nn.functional.gelu(x, approximate=form),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("model", INTERMEDIATE)
def bench_gelu_fwd(benchmark, provider, model, num_tokens, form, dtype):
    benchmark.group = f"gelu fwd {form} {model} {num_tokens} {dtype}"
    x = torch.randn(NUM_TOKENS[num_tokens], INTERMEDIATE[model]).to(dtype)
    # A wrong kernel has no speed.
    torch.testing.assert_close(PROVIDERS[provider](x, form), PROVIDERS["torch"](x, form))
    benchmark(PROVIDERS[provider], x, form)
    benchmark.extra_info |= {"num_bytes": 2 * x.numel() * x.element_size(), "dtype": str(dtype)}
