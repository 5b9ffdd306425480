"""A prompt that starts behind cached pages has the bits of one that is computed whole."""

import os
from dataclasses import replace

import numpy as np
import pytest

from pyengine import _C, LLM, SamplingParams
from pyengine.errors import ArgumentError, CapacityError

FORMATS = ["float32", "bfloat16", "q8_0", "q4_1", "q4_0"]
CASES = [
    *((weights, "exact") for weights in FORMATS),
    *((weights, mode) for weights in FORMATS if weights[0] == "q" for mode in ("bf16", "fast")),
]
PAGE = 16
PARAMS = SamplingParams(max_tokens=24, temperature=0.9, seed=11, ignore_eos=True, logprobs=2)


def engine(model, **options):
    return LLM(model, **({"page_size": PAGE, "cache_tokens": 1024} | options))


def stats(llm):
    return llm.explain().prefix_cache


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(3, 384, count).astype(np.int32)


def run(decoder, ids, *, salt=None, chunk=512, seq=None):
    """Logits of the tokens that the cache does not give, and how many it gives."""
    own = seq is None
    if own:
        seq = decoder.add_sequence(salt)
    begin = decoder.length(seq)
    hit = decoder.adopt_prefix(seq, ids[begin:])
    logits = np.empty((len(ids) - begin - hit, 384), np.float32)
    for first in range(begin + hit, len(ids), chunk):
        part = ids[first : first + chunk]
        decoder.grow(seq, len(part))
        rows = np.arange(len(part), dtype=np.int32)
        out = logits[first - begin - hit : first - begin - hit + len(part)]
        decoder.step(part, np.full(len(part), seq, np.int32), rows, logits=out)
    if own:
        decoder.free_sequence(seq)
    return logits, hit


@pytest.mark.parametrize(
    ("weights", "mode", "kv_dtype"), [*((*case, "auto") for case in CASES), ("float32", "exact", "int8")]
)
def test_hot_logits_equal_cold_logits(tiny, weights, mode, kv_dtype):
    decoder = engine(tiny, weights=weights, mode=mode, kv_dtype=kv_dtype)._runner.decoder
    ids = tokens(150)
    cold, hit = run(decoder, ids)
    assert hit == 0
    assert run(decoder, ids[:100], salt="", chunk=7)[1] == 0
    for chunk in (1, 7, 512):
        hot, hit = run(decoder, ids, salt="", chunk=chunk)
        assert hit == (96 if chunk == 1 else 144)
        assert hot.tobytes() == cold[hit:].tobytes()


def test_hot_logits_after_eviction_in_between(tiny):
    decoder = engine(tiny, cache_tokens=12 * PAGE)._runner.decoder
    ids = tokens(10 * PAGE + 5)
    cold, _ = run(decoder, ids)
    run(decoder, ids, salt="")
    hits = set()
    for length in (0, 3, 5, 9, 12):
        run(decoder, tokens(length * PAGE, seed=length + 1), salt="")
        hot, hit = run(decoder, ids, salt="")
        assert hot.tobytes() == cold[hit:].tobytes()
        hits.add(hit)
    assert len(hits) > 2
    assert decoder.cache_stats()["num_evicted_pages"] > 0
    assert decoder.num_free_pages == decoder.num_pages


def test_pages_of_another_isa_level_are_not_taken(tiny):
    decoder = engine(tiny)._runner.decoder
    ids = tokens(64)
    before = _C.active_isa()
    try:
        for level in _C.available_isas():
            _C.set_active_isa(level)
            assert run(decoder, ids, salt="")[1] == 0
            assert run(decoder, ids, salt="")[1] == 64
    finally:
        _C.set_active_isa(before)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_fork_goes_its_own_way(tiny, kv_dtype):
    decoder = engine(tiny, kv_dtype=kv_dtype)._runner.decoder
    common, left, right = tokens(3 * PAGE + 5), tokens(40, seed=1), tokens(40, seed=2)
    expected = [run(decoder, np.concatenate([common, tail]))[0][len(common) :] for tail in (left, right, left)]
    parent = decoder.add_sequence()
    run(decoder, common, seq=parent)
    used = decoder.num_pages - decoder.num_free_pages
    child, grandchild = decoder.fork_sequence(parent), decoder.fork_sequence(parent)
    assert decoder.num_pages - decoder.num_free_pages == used
    # In turns of one token, so that each would see what another wrote into the page that they share at first.
    logits = [np.empty((40, 384), np.float32) for _ in range(3)]
    for i in range(40):
        for seq, tail, out in zip((parent, child, grandchild), (left, right, left), logits, strict=True):
            out[i] = run(decoder, np.concatenate([common, tail[: i + 1]]), seq=seq)[0]
    for got, want in zip(logits, expected, strict=True):
        assert got.tobytes() == want.tobytes()
    assert decoder.cache_stats()["num_copied_pages"] == 2
    for seq in (grandchild, parent, child):
        decoder.free_sequence(seq)
    assert decoder.num_free_pages == decoder.num_pages


def test_truncate_and_go_on_otherwise(tiny):
    decoder = engine(tiny)._runner.decoder
    ids, other = tokens(60), tokens(30, seed=1)
    expected, _ = run(decoder, np.concatenate([ids[:37], other]))
    seq = decoder.add_sequence("")
    run(decoder, ids, seq=seq)
    decoder.truncate(seq, 37)
    got, _ = run(decoder, np.concatenate([ids[:37], other]), seq=seq)
    assert got.tobytes() == expected[37:].tobytes()
    decoder.free_sequence(seq)
    cold, _ = run(decoder, ids)
    hot, hit = run(decoder, ids, salt="")
    assert hit == 48
    assert hot.tobytes() == cold[48:].tobytes()


def test_native_errors(tiny):
    decoder = engine(tiny, cache_tokens=2 * PAGE)._runner.decoder
    seq = decoder.add_sequence()
    with pytest.raises(ArgumentError, match="seqs: sequence 0 has 0 tokens claimed"):
        decoder.step(tokens(1), np.zeros(1, np.int32), np.empty(0, np.int32))
    decoder.grow(seq, 1)
    with pytest.raises(ArgumentError, match="all computed, got 0 of 1"):
        decoder.fork_sequence(seq)
    with pytest.raises(ArgumentError, match="next_token_ids"):
        decoder.adopt_prefix(seq, np.zeros(3, np.int64))
    with pytest.raises(CapacityError, match="40 more tokens need 2 pages"):
        decoder.grow(seq, 40)
    decoder.free_sequence(seq)


def test_a_conversation_is_computed_once(tiny):
    hot, cold = engine(tiny), engine(tiny, prefix_cache=False)
    prompt = tokens(50).tolist()
    for turn in range(3):
        completion = hot.generate([prompt], PARAMS)[0]
        assert completion == cold.generate([prompt], PARAMS)[0]
        prompt = prompt + completion.token_ids + tokens(9, seed=turn).tolist()
    assert stats(cold) is None
    # The pages full of the first turn's 50 + 23 tokens, of the second's 83 + 23.
    assert stats(hot)["num_hit_tokens"] == 64 + 96
    assert stats(hot)["num_started_tokens"] == 50 + 83 + 116
    assert "160 of 249 tokens found in the cache" in str(hot.explain())
    assert hot.explain().profile["num_tokens"] == cold.explain().profile["num_tokens"] - 160


def test_common_prefixes_with_preemption_and_eviction(tiny):
    """More work than the cache holds: pages are shared, evicted, given back and found again."""
    prompts = [np.concatenate([tokens(40, seed=i % 3), tokens(i, seed=9 + i)]).tolist() for i in range(18)]
    params = [SamplingParams(max_tokens=20 + i, temperature=0.8, seed=i, ignore_eos=True) for i in range(18)]
    expected = engine(tiny, cache_tokens=8192, prefix_cache=False).generate(prompts, params)
    llm = engine(tiny, cache_tokens=16 * PAGE)
    for _ in range(2):
        assert llm.generate(prompts, params) == expected
    seen = stats(llm)
    assert all(seen[f"num_{what}"] > 0 for what in ("hit_tokens", "preemptions", "evicted_pages"))
    assert llm._runner.decoder.num_free_pages == 16


def test_equal_sequences_keep_one_page_of_two(tiny):
    llm = engine(tiny)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    first, second = llm.generate([[5, 9, 200]] * 2, params)
    assert first == second == engine(tiny, prefix_cache=False).generate([[5, 9, 200]], params)[0]
    # 42 of the 43 tokens were fed: two full pages.
    assert stats(llm)["num_merged_pages"] == 2


def test_a_preempted_sequence_starts_from_its_own_pages(tiny):
    llm = engine(tiny, cache_tokens=8 * PAGE)
    alone = [llm.generate([[i] * 20], PARAMS, cache_salt="alone")[0] for i in (5, 6)]
    low = llm._start([[5] * 20], PARAMS, stream=True)[0][0]
    llm._scheduler.add(low)
    while low.num_cached < 40:
        llm._scheduler.step()
    llm._scheduler._preempt(low)
    assert low.slot is None
    started = stats(llm)["num_hit_tokens"]
    llm._scheduler.step()
    assert stats(llm)["num_hit_tokens"] == started + 32
    while low.finish_reason is None:
        llm._scheduler.step()
    assert low.completion() == alone[0]


def test_tenants_share_nothing(tiny):
    llm = engine(tiny)
    prompt = tokens(100).tolist()
    first = llm.generate([prompt], PARAMS, cache_salt="alice")
    for salt in ("bob", "", "alic", "alice\0"):
        assert llm.generate([prompt], PARAMS, cache_salt=salt) == first
    assert stats(llm)["num_hit_tokens"] == 0
    assert stats(llm)["num_merged_pages"] == 0
    assert llm.generate([prompt], PARAMS, cache_salt="alice") == first
    assert stats(llm)["num_hit_tokens"] == 96
    list(llm.stream(prompt, PARAMS, cache_salt="bob"))
    assert stats(llm)["num_hit_tokens"] == 192


@pytest.mark.parametrize("salt", ["x" * 257, "é" * 129, "\ud800", 7, None])
def test_bad_salts(tiny, salt):
    llm = engine(tiny)
    with pytest.raises(ArgumentError, match=r"^cache_salt: expected"):
        llm.generate([[1]], cache_salt=salt)
    with pytest.raises(ArgumentError, match=r"^cache_salt: expected"):
        llm.score([[1]], [[2]], cache_salt=salt)
    assert len(llm.generate([[1]], PARAMS, cache_salt="x" * 256)[0].token_ids) == 24


@pytest.mark.parametrize(("length", "num_shared"), [(100, 96), (17, 16), (16, 0)])
def test_completions_of_one_prompt_compute_it_once(tiny, length, num_shared):
    """They start together: the others wait until the first has computed what they share."""
    hot, cold = engine(tiny), engine(tiny, prefix_cache=False)
    params = replace(PARAMS, n=6, max_tokens=8)
    prompt = tokens(length).tolist()
    assert hot.generate([prompt], params) == cold.generate([prompt], params)
    saved = cold.explain().profile["num_tokens"] - hot.explain().profile["num_tokens"]
    assert saved == 5 * num_shared
    salted = [(prompt, "a"), (prompt, "b")]
    before = hot.explain().profile["num_tokens"]
    for ids, salt in salted:
        hot._scheduler.add(hot._start([ids], replace(PARAMS, max_tokens=1), stream=True, cache_salt=salt)[0][0])
    hot._scheduler.step()
    assert hot._scheduler.is_idle()
    assert hot.explain().profile["num_tokens"] == before + 2 * length


@pytest.mark.parametrize(("length", "num_hit"), [(100, 96), (97, 96), (96, 80)])
def test_scores_of_one_prompt_compute_it_once(tiny, length, num_hit):
    """The row of the prompt's last token is computed in any case."""
    hot, cold = engine(tiny), engine(tiny, prefix_cache=False)
    prompt = tokens(length).tolist()
    answers = [tokens(n, seed=n).tolist() for n in (1, 7, 30)]
    assert hot.score([prompt] * 3, answers) == cold.score([prompt] * 3, answers)
    assert hot.explain().profile["num_tokens"] == cold.explain().profile["num_tokens"] - 2 * num_hit
    before = hot.explain().profile["num_tokens"]
    hot.score([prompt], answers[:1], cache_salt="other")
    assert hot.explain().profile["num_tokens"] == before + length


@pytest.mark.slow
def test_memory_does_not_grow(tiny):
    """A thousand engines come and go; histories that differ pass through one of them."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def create(count):
        for _ in range(count):
            engine(tiny, cache_tokens=64).generate([[1]], SamplingParams(max_tokens=1, ignore_eos=True))

    create(50)
    before = resident()
    create(1000)
    # A leak of one engine's weights, 0.5 MB, would be 500 MB.
    assert resident() - before < 32 << 20
