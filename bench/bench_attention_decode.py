"""One decode step over a paged cache against torch on contiguous keys and values. Run: dev/bench attention_decode"""

import pytest
import torch
from shapes import HEADS

from pyengine.ops.attention_decode import attention_decode, kv_append
from pyengine.testing import assert_accurate

PAGE_SIZE = 64


def _inputs(model, batch, context, dtype):
    """q [B, H, D]; k, v [B, context, K, D]; the cache that holds them; the row of each sequence."""
    num_heads, num_kv_heads, head_dim = HEADS[model]
    q = torch.randn(batch, num_heads, head_dim).to(dtype)
    k, v = (torch.randn(batch, context, num_kv_heads, head_dim).to(dtype) for _ in range(2))
    num_pages = batch * context // PAGE_SIZE
    k_pages = torch.empty(num_pages, num_kv_heads, PAGE_SIZE // 16, head_dim, 16, dtype=dtype)
    v_pages = torch.empty(num_pages, num_kv_heads, PAGE_SIZE, head_dim, dtype=dtype)
    block_table = torch.randperm(num_pages, dtype=torch.int32).view(batch, -1)
    seq = torch.arange(batch, dtype=torch.int32)
    every = torch.arange(context, dtype=torch.int32)
    for s in range(batch):
        kv_append(k[s], v[s], k_pages, v_pages, block_table, seq[s].expand(context), every)
    position = torch.full((batch,), context - 1, dtype=torch.int32)
    return q, k, v, (k_pages, v_pages, block_table, seq, position)


def sdpa(q, k, v):
    rows = q[:, :, None], k.transpose(1, 2), v.transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(*rows, enable_gqa=True)[:, :, 0]


@pytest.mark.parametrize("provider", ["pyengine", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("context", [128, 2048])
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("model", HEADS)
def bench_attention_decode(benchmark, provider, model, batch, context, dtype):
    benchmark.group = f"attention_decode {model} batch {batch} context {context} {dtype}"
    q, k, v, cache = _inputs(model, batch, context, dtype)
    # A wrong kernel has no speed.
    assert_accurate(attention_decode(q, *cache), sdpa(q.double(), k.double(), v.double()), sdpa(q, k, v))
    if provider == "pyengine":
        benchmark(attention_decode, q, *cache)
    else:
        # Contiguous per head, as torch reads it best.
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
        benchmark(sdpa, q, k, v)
    benchmark.extra_info |= {"num_bytes": 2 * k.numel() * k.element_size(), "dtype": str(dtype)}
