"""linear_cross_entropy against torch, at the heads of real models. Run: dev/bench linear_cross_entropy"""

import pytest
import torch
from shapes import HIDDEN, VOCAB

from pyengine.ops.linear_cross_entropy import linear_cross_entropy


def _torch(x, w, targets):
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w).float(), targets, reduction="none")


PROVIDERS = {"pyengine": linear_cross_entropy, "torch": _torch}
NUM_TOKENS = 512
# The head of an 8B model and its gradient take 4 GB.
MODELS = ["smollm2-135m"]


def _inputs(model, dtype):
    hidden, vocab_size = HIDDEN[model], VOCAB[model]
    x = torch.randn(NUM_TOKENS, hidden).to(dtype).requires_grad_()
    w = (torch.randn(vocab_size, hidden) / hidden**0.5).to(dtype).requires_grad_()
    return x, w, torch.randint(vocab_size, (NUM_TOKENS,))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("model", MODELS)
def bench_linear_cross_entropy(benchmark, provider, model, direction, dtype):
    benchmark.group = f"linear_cross_entropy {direction} {model} {NUM_TOKENS} {dtype}"
    x, w, targets = _inputs(model, dtype)
    with torch.no_grad():
        exact = _torch(x.float(), w.float(), targets)
        torch.testing.assert_close(PROVIDERS[provider](x, w, targets), exact, rtol=2**-6, atol=2**-6)

    def fwd():
        with torch.no_grad():
            return PROVIDERS[provider](x, w, targets)

    def fwd_bwd():
        return torch.autograd.grad(PROVIDERS[provider](x, w, targets).mean(), (x, w))

    benchmark(fwd if direction == "fwd" else fwd_bwd)
    products = 1 if direction == "fwd" else 3  # what the mathematics needs; a recomputation counts as time only
    benchmark.extra_info |= {"num_flops": products * 2 * x.numel() * w.shape[0], "dtype": str(dtype)}
