"""Causal attention against torch, forward and backward, at the heads real models have. Run: dev/bench attention"""

import pytest
import torch
from shapes import HEADS

from pyengine.ops.attention import attention
from pyengine.testing import assert_accurate


def sdpa(q, k, v):
    rows = (t.transpose(0, 1)[None] for t in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
    return y[0].transpose(0, 1)


PROVIDERS = {"pyengine": attention, "torch": sdpa}
NUM_TOKENS = [512, 2048]


def _setup(benchmark, direction, provider, model, num_tokens, dtype):
    benchmark.group = f"attention {direction} {model} {num_tokens} {dtype}"
    num_heads, num_kv_heads, head_dim = HEADS[model]
    q, k, v, grad_y = (
        torch.randn(num_tokens, n, head_dim).to(dtype) for n in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    )
    # A wrong kernel has no speed.
    assert_accurate(PROVIDERS[provider](q, k, v), sdpa(q.double(), k.double(), v.double()), sdpa(q, k, v))
    num_pairs = num_heads * num_tokens * (num_tokens + 1) // 2
    # The five products that a backward needs, whatever a kernel computes twice.
    num_flops = (4 if direction == "fwd" else 10) * head_dim * num_pairs
    benchmark.extra_info |= {"num_flops": num_flops, "dtype": str(dtype)}
    return q, k, v, grad_y


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("model", HEADS)
def bench_attention_fwd(benchmark, provider, model, num_tokens, dtype):
    q, k, v, _ = _setup(benchmark, "fwd", provider, model, num_tokens, dtype)
    benchmark(PROVIDERS[provider], q, k, v)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("model", HEADS)
def bench_attention_bwd(benchmark, provider, model, num_tokens, dtype):
    *inputs, grad_y = _setup(benchmark, "bwd", provider, model, num_tokens, dtype)
    leaves = [t.requires_grad_() for t in inputs]
    y = PROVIDERS[provider](*leaves)
    benchmark(torch.autograd.grad, y, leaves, grad_y, retain_graph=True)
