"""matmul_w8a8 against torch: its integer product, and the bfloat16 product it replaces. Run: dev/bench matmul_w8a8"""

import pytest
import torch
from shapes import HIDDEN, INTERMEDIATE, NUM_TOKENS

from pyengine.ops.matmul_w8a8 import matmul_w8a8, matmul_w8a8_pack
from pyengine.reference.matmul_w8a8 import matmul_w8a8 as reference


def torch_int_mm(x, x_scale, w, w_scale):
    return x_scale[:, None] * (w_scale * torch._int_mm(x, w).float())


def torch_bf16(x, x_scale, w, w_scale):
    return torch.nn.functional.linear(x, w)


PROVIDERS = {"pyengine": matmul_w8a8, "torch-int8": torch_int_mm, "torch-bf16": torch_bf16}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("model", HIDDEN)
def bench_matmul_w8a8(benchmark, provider, model, num_tokens):
    benchmark.group = f"matmul_w8a8 {model} {num_tokens}"
    m, n, k = NUM_TOKENS[num_tokens], INTERMEDIATE[model], HIDDEN[model]
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    x_scale, w_scale = torch.rand(m), torch.rand(n)
    args = {
        "pyengine": (x, x_scale, matmul_w8a8_pack(w), w_scale),
        "torch-int8": (x, x_scale, w.t(), w_scale),
        "torch-bf16": (x.bfloat16(), x_scale, w.bfloat16(), w_scale),
    }[provider]
    # A wrong kernel has no speed.
    if provider != "torch-bf16":
        expected = reference(x[:2], x_scale[:2], w, w_scale)
        torch.testing.assert_close(PROVIDERS[provider](*args)[:2], expected)
    benchmark(PROVIDERS[provider], *args)
    benchmark.extra_info |= {"num_flops": 2 * m * n * k, "num_bytes": n * k * (2 if provider == "torch-bf16" else 1)}
