"""lora against torch, at the linear layers of real models. Run: dev/bench lora"""

import pytest
import torch
from shapes import HIDDEN, INTERMEDIATE, NUM_TOKENS

from pyengine.ops.lora import lora
from pyengine.reference.lora import lora as reference

RANK = 16
LAYERS = {
    (model, layer): shape
    for model in HIDDEN
    for layer, shape in {
        "o": (HIDDEN[model], HIDDEN[model]),
        "up": (INTERMEDIATE[model], HIDDEN[model]),
        "down": (HIDDEN[model], INTERMEDIATE[model]),
    }.items()
}
PROVIDERS = {
    "pyengine": lora,
    "torch": lambda y, x, a, b, scale: y + scale * ((x @ a.t()) @ b.t()),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize(("model", "layer"), LAYERS)
def bench_lora_fwd(benchmark, provider, model, layer, num_tokens, dtype):
    benchmark.group = f"lora fwd {model} {layer} {num_tokens} {dtype}"
    num_cols, depth = LAYERS[model, layer]
    num_rows = NUM_TOKENS[num_tokens]
    y, x = torch.randn(num_rows, num_cols).to(dtype), torch.randn(num_rows, depth).to(dtype)
    a, b = torch.randn(RANK, depth).to(dtype), torch.randn(num_cols, RANK).to(dtype)
    run = PROVIDERS[provider]
    # A wrong kernel has no speed.
    exact = reference(*(t.double() for t in (y, x, a, b)), 2.0)
    assert ((run(y, x, a, b, 2.0).double() - exact).abs().max() <= 2**-6 * exact.abs().max()).item()
    benchmark(run, y, x, a, b, 2.0)
    benchmark.extra_info |= {
        "num_flops": 2 * num_rows * RANK * (num_cols + depth),
        "num_bytes": (x.numel() + 2 * y.numel() + a.numel() + b.numel()) * x.element_size(),
        "dtype": str(dtype),
    }
