"""quantize_int8 against the same steps in torch. Run: dev/bench quantize_int8"""

import pytest
import torch
from shapes import HIDDEN, NUM_TOKENS

from pyengine.ops.quantize_int8 import quantize_int8


def torch_quantize(x):
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale).to(torch.int8), scale[:, 0]


PROVIDERS = {"pyengine": quantize_int8, "torch": torch_quantize}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("model", HIDDEN)
def bench_quantize_int8(benchmark, provider, model, num_tokens, dtype):
    benchmark.group = f"quantize_int8 {model} {num_tokens} {dtype}"
    x = torch.randn(NUM_TOKENS[num_tokens], HIDDEN[model]).to(dtype)
    # A wrong kernel has no speed.
    q, scale = PROVIDERS[provider](x)
    assert (q.float() * scale[:, None] - x.float()).abs().max() <= 0.501 * scale.max()
    benchmark(PROVIDERS[provider], x)
    benchmark.extra_info |= {"num_bytes": x.numel() * (x.element_size() + 1), "dtype": str(dtype)}
