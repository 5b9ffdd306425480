"""Law 1 between training and serving: the model that trains and the engine that serves give the same bits."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pyengine import LLM  # noqa: E402
from pyengine.models import from_pretrained  # noqa: E402
from pyengine.spec import Llama3Scaling, RopeSpec  # noqa: E402
from pyengine.testing import assert_same_bits  # noqa: E402
from pyengine.testing.random_model import make_spec, write_model  # noqa: E402
from pyengine.testing.smollm2 import smollm2_gguf  # noqa: E402

pytestmark = pytest.mark.train

LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
SPECS = {
    "grouped": {},
    "no_groups": {"num_kv_heads": 4},
    "one_kv_head": {"num_kv_heads": 1, "tie_word_embeddings": False},
    "head_dim_64": {"head_dim": 64},
    "head_dim_80": {"head_dim": 80, "tie_word_embeddings": False},
    "head_dim_96": {"head_dim": 96},
    "odd_widths": {"hidden_size": 72, "intermediate_size": 97, "head_dim": 24},
    "sliding_window": {"sliding_window": 19},
    "llama3_rope": {"rope": RopeSpec(theta=5e5, scaling=LLAMA3)},
}
DTYPES = {"float32": np.float32, "bfloat16": "bfloat16"}
# One token, one tile, more than one KV block, more than one step of the engine.
LENGTHS = [1, 2, 33, 130, 600]


def documents(vocab_size=384, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def assert_parity(model, llm, batch):
    """Logits of each document, and nll of its tokens after the first, alone and packed with the others."""
    offsets = torch.tensor(np.cumsum([0, *map(len, batch)]), dtype=torch.int32)
    targets = torch.cat([torch.cat([ids[1:], torch.tensor([-100])]) for ids in batch])
    with torch.no_grad():
        packed_logits = model(torch.cat(batch), segment_offsets=offsets)
        packed_nll = model(torch.cat(batch), segment_offsets=offsets, targets=targets)
    served = [torch.from_numpy(llm.logits(ids.tolist())) for ids in batch]
    assert_same_bits(packed_logits, torch.cat(served))
    scores = llm.score([ids[:1].tolist() for ids in batch], [ids[1:].tolist() for ids in batch])
    for start, ids, score, logits in zip(offsets.tolist(), batch, scores, served, strict=False):
        assert_same_bits(packed_nll[start : start + len(ids) - 1], -torch.tensor(score.logprobs))
        with torch.no_grad():
            assert_same_bits(model(ids), logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_logits_and_nll(tmp_path, name, dtype):
    spec = make_spec(max_position_embeddings=1024, **SPECS[name])
    folder = write_model(tmp_path, spec, DTYPES[dtype])
    assert_parity(from_pretrained(folder, dtype=getattr(torch, dtype)), LLM(folder), documents())


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_every_isa_level(isa, tmp_path, dtype):
    folder = write_model(tmp_path, make_spec(), DTYPES[dtype])
    model = from_pretrained(folder, dtype=getattr(torch, dtype))
    assert_parity(model, LLM(folder), documents(lengths=[1, 2, 33, 130]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_smollm2(dtype):
    model = from_pretrained(smollm2_gguf(), dtype=getattr(torch, dtype))
    llm = LLM(smollm2_gguf(), weights=dtype, max_context=512)
    assert_parity(model, llm, documents(llm.spec.vocab_size, lengths=[2, 70, 5]))
