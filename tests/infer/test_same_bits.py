"""Law 1: the logits of a token depend on the model and the tokens before it in its own sequence, on nothing else."""

import numpy as np
import pytest
from infer.batches import assert_same, options, run_batch, sequences

from pyengine import _C, LLM

FORMATS = ["float32", "bfloat16", "q8_0", "q4_1", "q4_0"]


@pytest.fixture(autouse=True)
def _restore_threads():
    before = _C.num_threads()
    yield
    _C.set_num_threads(before)


CASES = [(weights, "exact") for weights in FORMATS]
CASES += [(weights, mode) for weights in FORMATS if weights[0] == "q" for mode in ("bf16", "fast")]


@pytest.mark.parametrize(("weights", "mode"), CASES)
def test_batch_chunk_page_and_threads_change_no_bit(tiny, weights, mode):
    llm = LLM(tiny, threads=1, **options(weights, mode))
    batch = sequences(33)
    alone = [run_batch(llm, [ids], chunk=512)[0] for ids in batch]
    for count in (2, 3, 7, 16, 33):
        assert_same(run_batch(llm, batch[:count], chunk=64), alone[:count])
    for chunk in (1, 7, 64):
        assert_same(run_batch(llm, batch[:6], chunk=chunk), alone[:6])
    for threads in (2, 3):
        _C.set_num_threads(threads)
        assert_same(run_batch(llm, batch[:7], chunk=64), alone[:7])
    for page_size in (16, 64, 256):
        other = LLM(tiny, page_size=page_size, **options(weights, mode))
        assert_same(run_batch(other, batch[:6], chunk=7), alone[:6])


@pytest.mark.parametrize(
    ("weights", "mode"), [("float32", "exact"), ("bfloat16", "exact"), ("q4_1", "exact"), ("q4_1", "bf16")]
)
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_on_every_isa_level(isa, tiny, weights, mode, kv_dtype):
    llm = LLM(tiny, kv_dtype=kv_dtype, **options(weights, mode))
    batch = sequences(6)
    alone = [run_batch(llm, [ids], chunk=512)[0] for ids in batch]
    assert_same(run_batch(llm, batch, chunk=7), alone)


@pytest.mark.parametrize("weights", ["q8_0", "q4_1", "q4_0"])
def test_isa_levels_agree_within_rounding(tiny, weights):
    ids = sequences(6)[5]
    results = []
    before = _C.active_isa()
    for level in _C.available_isas():
        _C.set_active_isa(level)
        results.append(LLM(tiny, **options(weights, "exact")).logits(ids))
    _C.set_active_isa(before)
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=0, atol=1e-4 * np.abs(results[0]).max())


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_int8_keys_and_values_in_any_page_chunk_and_batch(tiny, weights):
    batch = sequences(6)
    llm = LLM(tiny, kv_dtype="int8", **options(weights, "exact"))
    alone = [run_batch(llm, [ids], chunk=512)[0] for ids in batch]
    rounded = LLM(tiny, kv_dtype="bfloat16", **options(weights, "exact"))
    assert run_batch(rounded, batch[3:4], chunk=512)[0].tobytes() != alone[3].tobytes()
    for page_size in (16, 64, 256):
        other = LLM(tiny, page_size=page_size, kv_dtype="int8", **options(weights, "exact"))
        for chunk in (1, 7, 64):
            assert_same(run_batch(other, batch, chunk=chunk), alone)


@pytest.mark.parametrize(("weights", "mode"), CASES)
def test_score_gives_the_bits_of_generation(tiny, weights, mode):
    from pyengine import SamplingParams

    llm = LLM(tiny, **options(weights, mode))
    prompts = [ids.tolist() for ids in sequences(5)]
    params = SamplingParams(max_tokens=12, temperature=0.9, seed=3, ignore_eos=True, logprobs=0)
    completions = llm.generate(prompts, params)
    scores = llm.score(prompts, [c.token_ids for c in completions])
    for completion, score in zip(completions, scores, strict=True):
        assert [t.logprob for t in completion.logprobs] == score.logprobs


def test_a_step_with_other_sequences_leaves_no_trace(tiny):
    """Pages that another sequence filled and freed, NaN included, do not reach a later one."""
    llm = LLM(tiny, weights="float32", cache_tokens=256)
    ids = sequences(5)[4]
    first = llm.logits(ids)
    for other in sequences(4):
        llm.logits(other)
    assert llm.logits(ids).tobytes() == first.tobytes()
