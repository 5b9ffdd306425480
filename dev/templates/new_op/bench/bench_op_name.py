"""op_name against torch. Run: dev/bench op_name"""

import pytest
import torch
from shapes import HIDDEN, NUM_TOKENS

from pyengine.ops.op_name import op_name

PROVIDERS = {"pyengine": op_name, "torch": lambda x: x.clone()}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("model", HIDDEN)
def bench_op_name_fwd(benchmark, provider, model, num_tokens, dtype):
    benchmark.group = f"op_name fwd {model} {num_tokens} {dtype}"
    x = torch.randn(NUM_TOKENS[num_tokens], HIDDEN[model]).to(dtype)
    # A wrong kernel has no speed.
    torch.testing.assert_close(PROVIDERS[provider](x), PROVIDERS["torch"](x))
    benchmark(PROVIDERS[provider], x)
    benchmark.extra_info |= {"num_bytes": 2 * x.numel() * x.element_size(), "dtype": str(dtype)}
