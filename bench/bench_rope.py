"""rope against torch, at the shapes real models use. Run: dev/bench rope"""

import pytest
import torch
from shapes import HEADS, NUM_TOKENS

from pyengine.ops.rope import rope, rope_table


def torch_rope(x, cos, sin, positions):
    """The formula of transformers' apply_rotary_pos_emb, with tables in the dtype of x."""
    c, s = (torch.cat([t[positions]] * 2, -1)[:, None].to(x.dtype) for t in (cos, sin))
    low, high = x.chunk(2, -1)
    return x * c + torch.cat([-high, low], -1) * s


PROVIDERS = {"pyengine": rope, "torch": torch_rope}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("model", HEADS)
def bench_rope_fwd(benchmark, provider, model, num_tokens, dtype):
    benchmark.group = f"rope fwd {model} {num_tokens} {dtype}"
    num_heads, _, head_dim = HEADS[model]
    tokens = NUM_TOKENS[num_tokens]
    x = torch.randn(tokens, num_heads, head_dim).to(dtype)
    inv_freq = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    cos, sin = rope_table(inv_freq, tokens)
    positions = torch.arange(tokens, dtype=torch.int32)
    # A wrong kernel has no speed.
    expected = torch_rope(x.double(), cos, sin, positions).to(dtype)
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(PROVIDERS[provider](x, cos, sin, positions), expected, rtol=0, atol=tolerance)
    benchmark(PROVIDERS[provider], x, cos, sin, positions)
    benchmark.extra_info |= {"num_bytes": 2 * x.numel() * x.element_size(), "dtype": str(dtype)}
