"""matmul against torch, at the linear layers of real models. Run: dev/bench matmul"""

import pytest
import torch
from shapes import HEADS, HIDDEN, INTERMEDIATE, NUM_TOKENS

from pyengine import _C
from pyengine.ops.matmul import matmul


def _layers(model):
    """(N, K) of the weights of one layer."""
    hidden, intermediate = HIDDEN[model], INTERMEDIATE[model]
    num_heads, num_kv_heads, head_dim = HEADS[model]
    return {
        "qkv": ((num_heads + 2 * num_kv_heads) * head_dim, hidden),
        "o": (hidden, num_heads * head_dim),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
    }


LAYERS = [(model, layer) for model in HIDDEN for layer in _layers(model)]


def _packed(x, w):
    """The product that the decoder runs: weights packed once, when the model is loaded."""
    packed = torch.empty(-(-w.shape[0] // _C.MATMUL_PANEL), w.shape[1], _C.MATMUL_PANEL, dtype=w.dtype)
    _C.matmul_pack_cpu(w, packed)
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype)

    def run():
        _C.matmul_cpu(x, packed, y)
        return y

    return run


PROVIDERS = {
    "pyengine": lambda x, w: lambda: matmul(x, w),
    "pyengine-packed": _packed,
    "torch": lambda x, w: lambda: torch.nn.functional.linear(x, w),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize(("model", "layer"), LAYERS)
def bench_matmul_fwd(benchmark, provider, model, layer, num_tokens, dtype):
    benchmark.group = f"matmul fwd {model} {layer} {num_tokens} {dtype}"
    num_cols, depth = _layers(model)[layer]
    num_rows = NUM_TOKENS[num_tokens]
    x, w = torch.randn(num_rows, depth).to(dtype), torch.randn(num_cols, depth).to(dtype)
    run = PROVIDERS[provider](x, w)
    # A wrong kernel has no speed.
    exact = x.double() @ w.double().t()
    assert ((run().double() - exact).abs().max() <= 2**-7 * exact.abs().max()).item()
    benchmark(run)
    benchmark.extra_info |= {
        "num_flops": 2 * num_rows * num_cols * depth,
        "num_bytes": (x.numel() + w.numel() + num_rows * num_cols) * x.element_size(),
        "dtype": str(dtype),
    }
