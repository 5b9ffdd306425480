"""matmul_w4a16 against torch with the dequantised weight, at the shapes real models use. Run: dev/bench matmul_w4a16"""

import pytest
import torch
from shapes import HIDDEN, INTERMEDIATE, NUM_TOKENS

from pyengine.ops.matmul_w4a16 import matmul_w4a16, pack_blocks
from pyengine.reference.block_weights import dequantize
from pyengine.testing.blocks import random_blocks

MODEL = "smollm2-135m"
# (N, K) of attention output, gate or up, down.
SHAPES = [
    (HIDDEN[MODEL], HIDDEN[MODEL]),
    (INTERMEDIATE[MODEL], HIDDEN[MODEL]),
    (HIDDEN[MODEL], INTERMEDIATE[MODEL]),
]
# More than any L2: each call meets weights that the last calls have pushed out.
WORKING_SET_BYTES = 16 << 20


def providers(block_format, num_rows):
    """name -> (weights from raw rows, product)."""
    return {
        "pyengine": (
            lambda raw: pack_blocks(raw, block_format),
            lambda x, w: matmul_w4a16(x, w, num_rows=num_rows, block_format=block_format),
        ),
        "torch-f32": (lambda raw: dequantize(raw, block_format), lambda x, w: x @ w.T),
        "torch-bf16": (lambda raw: dequantize(raw, block_format).bfloat16(), lambda x, w: x.bfloat16() @ w.T),
    }


@pytest.mark.parametrize("provider", providers("q4_0", 0))
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_format", ["q4_0", "q4_1", "q8_0"])
def bench_matmul_w4a16(benchmark, provider, block_format, shape, num_tokens):
    benchmark.group = f"matmul_w4a16 {block_format} {shape} {num_tokens}"
    num_rows, num_cols = shape
    raw = random_blocks(block_format, num_rows, num_cols)
    x = torch.randn(NUM_TOKENS[num_tokens], num_cols)
    prepare, product = providers(block_format, num_rows)[provider]
    weight = prepare(raw)
    # A wrong kernel has no speed.
    exact = x.double() @ dequantize(raw, block_format, torch.float64).T
    assert ((product(x, weight).double() - exact).abs() <= 0.02 * exact.abs().max()).all()
    weight_bytes = weight.numel() * weight.element_size()
    weights = [weight.clone() for _ in range(1 + WORKING_SET_BYTES // weight_bytes)]

    def cycle():
        for each in weights:
            product(x, each)

    benchmark(cycle)
    benchmark.extra_info |= {
        "num_calls": len(weights),
        "num_bytes": len(weights) * weight_bytes,
        "num_flops": len(weights) * 2 * x.shape[0] * num_rows * num_cols,
    }
