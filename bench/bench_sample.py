"""sample against the usual chain of torch calls, one row of a real vocabulary. Run: dev/bench sample"""

import pytest
import torch
from shapes import VOCAB

from pyengine.ops.sample import sample

SETTINGS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 0.8, "top_k": 50},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
}


def pyengine_sample(logits, settings):
    return sample(logits, seed=0, sequence=0, position=0, **settings).token_ids


def torch_probs(logits, settings):
    logits = logits / settings["temperature"]
    if "top_k" in settings:
        kth = torch.topk(logits, settings["top_k"]).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if "top_p" in settings:
        values, order = torch.sort(logits, descending=True)
        probs = torch.softmax(values, -1)
        values = values.masked_fill(probs.cumsum(-1) - probs >= settings["top_p"], -torch.inf)
        logits = torch.empty_like(logits).scatter_(1, order, values)
    probs = torch.softmax(logits, -1)
    if "min_p" in settings:
        probs = torch.where(probs < settings["min_p"] * probs.max(-1, keepdim=True).values, 0, probs)
    return probs


def torch_sample(logits, settings):
    if settings["temperature"] == 0:
        return logits.argmax(-1)
    return torch.multinomial(torch_probs(logits, settings), 1)


PROVIDERS = {"pyengine": pyengine_sample, "torch": torch_sample}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("model", VOCAB)
def bench_sample(benchmark, provider, model, settings):
    benchmark.group = f"sample {model} {settings}"
    logits = 3 * torch.randn(1, VOCAB[model])
    # A wrong kernel has no speed.
    token = PROVIDERS[provider](logits, SETTINGS[settings]).item()
    if settings == "greedy":
        assert token == logits.argmax()
    else:
        assert torch_probs(logits, SETTINGS[settings])[0, token] > 0
    benchmark(PROVIDERS[provider], logits, SETTINGS[settings])
