"""Speculative decoding: whatever is proposed, tokens, text and log-probabilities are those without it."""

import asyncio
import itertools

import ml_dtypes
import numpy as np
import pytest
from infer.speculation_cases import (
    PAGE,
    SAMPLING,
    engine,
    free_pages,
    kinds_of_requests,
    prompts,
    run_random_events,
    scripted,
)

from pyengine import _C, LLM, SamplingParams
from pyengine.errors import ArgumentError
from pyengine.infer import AsyncLLM, DraftModel, PromptLookup, StructuredOutputs
from pyengine.infer.speculation import MAX_PROPOSED_TOKENS, MAX_SPECULATIVE_TOKENS
from pyengine.testing.random_model import make_spec, write_model

LOOKUP = PromptLookup(adaptive=False)
EAGER = PromptLookup(adaptive=False, prompt_lookup_min=1, num_speculative_tokens=5)


@pytest.mark.parametrize("name", SAMPLING)
def test_every_option_gives_what_it_gives_without(tiny, name):
    params = SamplingParams(**({"max_tokens": 30, "ignore_eos": True} | SAMPLING[name]))
    texts = prompts(5)
    plain = engine(tiny)
    expected = plain.generate(texts, params)
    # Those of best_of that were not returned are proposed for too.
    drawn = plain.generate(texts, params if params.best_of is None else _all_of(params))
    for share_right in (1.0, 0.7, 0.0):
        llm = engine(tiny, speculation=LOOKUP)
        scripted(llm, drawn, share_right)
        assert llm.generate(texts, params) == expected
        assert free_pages(llm) == free_pages(plain)
        stats = llm._speculator.stats
        assert (stats.num_proposed_tokens > 0) == (params.max_tokens > 1)
        if share_right == 1.0 and params.max_tokens > 1:
            assert stats.num_accepted_tokens > 0.6 * stats.num_proposed_tokens
    llm = engine(tiny, speculation=EAGER)
    assert llm.generate(texts, params) == expected


def _all_of(params):
    values = {name: getattr(params, name) for name in params.__dataclass_fields__}
    return SamplingParams(**(values | {"n": params.best_of, "best_of": None}))


@pytest.mark.parametrize("stop", [("e",), ("th", "qu"), ("zz",)])
@pytest.mark.parametrize("options", [{}, {"min_tokens": 6}, {"include_stop_str_in_output": True}])
def test_stop_strings_and_bad_words(tiny, stop, options):
    plain = engine(tiny)
    texts = prompts(4)
    base = SamplingParams(max_tokens=30, ignore_eos=True, temperature=1.0)
    # Words that do come, spelled by several tokens.
    words = tuple(c.text[k : k + 4].strip() or "x" for c in plain.generate(texts, base) for k in (0, 9))
    params = SamplingParams(max_tokens=30, temperature=1.0, stop=stop, bad_words=words, logprobs=0, **options)
    expected = plain.generate(texts, params)
    unstopped = SamplingParams(max_tokens=30, temperature=1.0, ignore_eos=True, bad_words=words)
    for share_right in (1.0, 0.5):
        llm = engine(tiny, speculation=LOOKUP)
        scripted(llm, plain.generate(texts, unstopped), share_right)
        assert llm.generate(texts, params) == expected
        assert llm._speculator.stats.num_accepted_tokens > 0
        streamed = [list(llm.stream(text, params)) for text in texts]
        assert [pieces[-1].completion for pieces in streamed] == expected
        assert streamed == [list(plain.stream(text, params)) for text in texts]


OUTPUTS = {
    "schema": StructuredOutputs(
        json={
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"type": "integer"}},
            "required": ["name", "n"],
            "additionalProperties": False,
        }
    ),
    "regex": StructuredOutputs(regex=r"(ab|cd){2,6}[0-9]{3}"),
    "choice": StructuredOutputs(choice=("yes indeed", "yes", "no")),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_grammars(tiny, name, temperature):
    pytest.importorskip("llguidance")
    params = SamplingParams(max_tokens=40, temperature=temperature, logprobs=1, structured_outputs=OUTPUTS[name])
    texts = prompts(3)
    plain = engine(tiny)
    expected = plain.generate(texts, params)
    for share_right in (1.0, 0.8, 0.0):
        llm = engine(tiny, speculation=LOOKUP)
        scripted(llm, expected, share_right)
        assert llm.generate(texts, params) == expected
        stats = llm._speculator.stats
        assert share_right < 1 or (stats.num_accepted_tokens == stats.num_proposed_tokens > 0)
        assert free_pages(llm) == free_pages(plain)


def test_a_grammar_that_comes_too_late_to_a_proposal(tiny):
    """Proposals that the grammar forbids are not computed, those behind an end neither."""
    pytest.importorskip("llguidance")
    outputs = StructuredOutputs(regex="aaaa")
    params = SamplingParams(max_tokens=20, structured_outputs=outputs)
    plain = engine(tiny)
    (sequence,) = plain._start([[5, 6, 7]], params, stream=False)[0]
    a, b = plain.tokenizer.encode("a", add_special_tokens=False)[-1], 200
    masks = sequence.grammar.masks([a, a, b, a])
    assert len(masks) == 3
    assert np.array_equal(masks[0], sequence.grammar.mask())
    assert len(sequence.grammar.masks([a] * 10)) == 4
    for _ in range(2):
        sequence.grammar.accept(a)
    assert np.array_equal(masks[2], sequence.grammar.mask())


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({}, {"page_size": 32}),
        ({}, {"page_size": 256}),
        ({}, {"kv_dtype": "int8"}),
        ({}, {"kv_dtype": "bfloat16"}),
        ({}, {"weights": "q4_0", "mode": "fast"}),
        ({}, {"weights": "q8_0", "mode": "exact"}),
        ({}, {"max_batch_tokens": 3}),
        ({}, {"max_batch_tokens": 16}),
        ({}, {"prefix_cache": False}),
        ({"num_layers": 3, "sliding_window": 24}, {}),
        ({"num_heads": 3, "num_kv_heads": 1, "head_dim": 32, "vocab_size": 390}, {"page_size": 64}),
    ],
)
def test_models_and_memory(tmp_path, change, options):
    """bfloat16 weights too."""
    spec = make_spec(**change)
    for dtype, seed in ((np.float32, 1), (ml_dtypes.bfloat16, 2)):
        path = write_model(tmp_path / f"{seed}", spec, dtype, seed=seed)
        texts = prompts(4, seed)
        params = [
            SamplingParams(max_tokens=25, ignore_eos=True, temperature=i % 2, seed=i, logprobs=0)
            for i in range(len(texts))
        ]
        expected = engine(path, **options).generate(texts, params)
        for share_right in (0.9, 0.3):
            llm = engine(path, speculation=LOOKUP, **options)
            scripted(llm, expected, share_right)
            assert llm.generate(texts, params) == expected
            assert llm._speculator.stats.num_accepted_tokens > 0
        assert engine(path, speculation=EAGER, **options).generate(texts, params) == expected


def test_a_right_proposal_saves_steps(tiny):
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    expected = engine(tiny).generate([[5, 6, 7]], params)
    for k, num_steps in ((1, 20), (4, 8), (9, 4)):
        llm = engine(tiny, speculation=PromptLookup(adaptive=False, num_speculative_tokens=k))
        scripted(llm, expected, 1.0)
        assert llm.generate([[5, 6, 7]], params) == expected
        # One for the prompt and its first token.
        profile = llm.explain().profile
        assert profile["num_steps"] == 1 + -(-39 // (k + 1)) <= 1 + num_steps
    llm = engine(tiny, speculation=LOOKUP)
    scripted(llm, expected, 0.0)
    assert llm.generate([[5, 6, 7]], params) == expected
    assert llm.explain().profile["num_steps"] == 40
    assert llm.explain().speculation["num_accepted_tokens"] == 0


def test_what_the_cache_lists_is_what_was_accepted(tiny):
    """A page that was full of rejected proposals is no page of the index."""
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    plain = engine(tiny)
    expected = plain.generate([[5] * 10], params)
    for share_right in (0.0, 0.5, 1.0):
        llm = engine(tiny, speculation=PromptLookup(adaptive=False, num_speculative_tokens=32))
        scripted(llm, expected, share_right)
        assert llm.generate([[5] * 10], params) == expected
        ours, theirs = llm._runner.decoder.cache_stats(), plain._runner.decoder.cache_stats()
        assert ours["num_indexed_pages"] == theirs["num_indexed_pages"] == 49 // PAGE
        assert ours["num_merged_pages"] == theirs["num_merged_pages"] == 0


def test_proposals_take_no_page_from_anybody(tiny):
    """On a full cache they shrink, and nothing is preempted for them."""
    params = SamplingParams(max_tokens=33, ignore_eos=True)
    texts = [[5] * 15, [6] * 15]
    expected = engine(tiny).generate(texts, params)
    llm = engine(tiny, cache_tokens=6 * PAGE, speculation=PromptLookup(adaptive=False, num_speculative_tokens=20))
    scripted(llm, expected, 0.0)
    assert llm.generate(texts, params) == expected
    assert llm._scheduler.stats.num_preemptions == 0
    assert free_pages(llm) == 6


def test_a_limit_per_request(tiny):
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    expected = engine(tiny).generate([[5, 6, 7]], params)
    for number, most in ((0, 0), (1, 1), (3, 3), (None, 8), (32, 32)):
        llm = engine(tiny, speculation=LOOKUP)
        scripted(llm, expected, 1.0)
        step, widths = llm._runner.step, []

        def spy(token_ids, *more, step=step, widths=widths):
            widths.append(len(token_ids))
            return step(token_ids, *more)

        llm._runner.step = spy
        values = {"max_tokens": 30, "ignore_eos": True, "num_speculative_tokens": number}
        assert llm.generate([[5, 6, 7]], SamplingParams(**values)) == expected
        assert max(widths[1:]) == 1 + min(most, 28)


def test_one_step_proposes_a_bounded_number(tiny):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    texts = [[3 + i] * 4 for i in range(40)]
    expected = engine(tiny, cache_tokens=8192).generate(texts, params)
    llm = engine(tiny, cache_tokens=8192, speculation=LOOKUP)
    scripted(llm, expected, 1.0)
    step, widths = llm._runner.step, []

    def spy(token_ids, slots, rows, sequences, num_proposals):
        widths.append(sum(num_proposals))
        return step(token_ids, slots, rows, sequences, num_proposals)

    llm._runner.step = spy
    assert llm.generate(texts, params) == expected
    assert max(widths) == MAX_PROPOSED_TOKENS


@pytest.mark.parametrize("value", ["ngram", 3, True, {"method": "prompt_lookup"}])
def test_bad_methods(tiny, value):
    with pytest.raises(ArgumentError, match=r"^speculation: expected None, 'prompt_lookup'"):
        LLM(tiny, speculation=value)


def test_bad_numbers():
    for make, name, value in (
        (PromptLookup, "num_speculative_tokens", 0),
        (PromptLookup, "num_speculative_tokens", MAX_SPECULATIVE_TOKENS + 1),
        (PromptLookup, "prompt_lookup_min", 0),
        (PromptLookup, "prompt_lookup_max", 1),
        (PromptLookup, "prompt_lookup_max", 65),
        (lambda **k: DraftModel(model="x", **k), "num_speculative_tokens", 2.0),
        (SamplingParams, "num_speculative_tokens", -1),
        (SamplingParams, "num_speculative_tokens", 33),
        (SamplingParams, "num_speculative_tokens", True),
    ):
        with pytest.raises(ArgumentError, match=f"^{name}: expected a whole number from"):
            make(**{name: value})


def test_bad_calls_of_the_native_sampler_are_named(tiny):
    llm = engine(tiny)
    decoder = llm._runner.decoder
    sampler, state = _C.Sampler(decoder), _C.SampleState(384)
    a, b = decoder.add_sequence(), decoder.add_sequence()
    decoder.grow(a, 3)
    decoder.grow(b, 1)
    step = ([5, 6, 7], [a, a, b], [0], [state], -1)
    for bad in ([2], [-1], [99], [2**31 - 1]):
        with pytest.raises(ArgumentError, match="num_proposals: expected tokens of one sequence behind their row"):
            sampler.step(*step, bad)
    with pytest.raises(ArgumentError, match="num_proposals: expected 1, one per row, got 2"):
        sampler.step(*step, [0, 0])
    state.set_mask(np.full((3, 12), -1, np.int32))
    with pytest.raises(ArgumentError, match="mask: expected 2 rows, one per draw, got 3"):
        sampler.step(*step, [1])
    for limits, message in (([0], "at least 1"), ([1, 1], "1, one per row")):
        with pytest.raises(ArgumentError, match=f"limits: expected {message}"):
            sampler.propose([5], [b], [0], [_C.SampleState(384)], limits)
    # What they had claimed is still there to be used.
    assert len(sampler.step([5, 6, 7], [a, a, b], [0], [_C.SampleState(384)], -1, [1]).counts) == 1


# --- events -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_random_events(tiny, prefix_cache):
    """Thousands of events on a cache that is too small."""
    kinds = kinds_of_requests()
    alone = engine(tiny, prefix_cache=False)
    expected = [alone.generate([prompt], params)[0] for prompt, params in kinds]
    llm = engine(tiny, cache_tokens=14 * PAGE, max_batch_tokens=48, prefix_cache=prefix_cache, speculation=LOOKUP)
    proposer = scripted(llm, expected, 0.8, seed=1)
    num_finished, num_cancelled = run_random_events(llm, kinds, expected, 3000, 7)
    stats = llm._speculator.stats
    assert free_pages(llm) == 14
    assert num_finished > 200
    assert num_cancelled > 50
    assert llm._scheduler.stats.num_preemptions > 50
    assert stats.num_accepted_tokens > 500
    assert stats.num_proposed_tokens - stats.num_accepted_tokens > 500
    assert len(proposer.forgotten) >= num_finished + num_cancelled
    assert not llm._speculator._acceptances
    assert not llm._speculator._expected


@pytest.mark.parametrize("adaptive", [True, False])
def test_random_events_with_lookup(tiny, adaptive):
    """The real thing, on and off as the clock of this machine has it."""
    kinds = [(prompt * 2, params) for prompt, params in kinds_of_requests(9) if len(prompt) < 80]
    alone = engine(tiny, prefix_cache=False)
    expected = [alone.generate([prompt], params)[0] for prompt, params in kinds]
    options = PromptLookup(adaptive=adaptive, prompt_lookup_min=1)
    llm = engine(tiny, cache_tokens=20 * PAGE, max_batch_tokens=48, speculation=options)
    run_random_events(llm, kinds, expected, 1500, 9)
    assert free_pages(llm) == 20
    assert llm._speculator.stats.num_proposed_tokens > (0 if adaptive else 100)
    assert not llm._speculator._proposer._lookups


def test_an_error_of_a_step_loses_no_page(tiny):
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    expected = engine(tiny).generate([[5, 6, 7]], params)
    for number in range(2, 5):
        llm = engine(tiny, speculation=LOOKUP)
        scripted(llm, expected, 0.5)
        step, calls = llm._runner.step, itertools.count()

        def broken(*arguments, step=step, calls=calls, number=number):
            result = step(*arguments)
            if next(calls) == number:
                raise MemoryError("planted")
            return result

        llm._runner.step = broken
        with pytest.raises(MemoryError, match="planted"):
            llm.generate([[5, 6, 7]], params)
        assert free_pages(llm) == llm._runner.decoder.num_pages
        assert llm.generate([[5, 6, 7]], params) == expected


def test_an_error_of_a_proposer_fails_the_request(tiny):
    llm = engine(tiny, speculation=LOOKUP)
    proposer = scripted(llm, [], 1.0)
    with pytest.raises(KeyError):
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=5, ignore_eos=True))
    assert len(proposer.forgotten) == 1
    assert free_pages(llm) == llm._runner.decoder.num_pages


def test_a_failing_draw_behind_proposals(tiny):
    """The tokens before it come out in a stream, then the same error."""
    params = SamplingParams(max_tokens=30, ignore_eos=True, bad_words=("zz",))
    plain = engine(tiny)
    expected = plain.generate([[5, 6, 7]], params)[0].token_ids
    # Only these tokens may come, and each once only.
    outcomes = []
    for speculation in (None, LOOKUP):
        llm = engine(tiny, speculation=speculation)
        if speculation is not None:
            scripted(llm, plain.generate([[5, 6, 7]], params), 1.0)
        (sequence,) = llm._start([[5, 6, 7]], params, stream=True)[0]
        # After three tokens each further one is impossible.
        sequence.sample_state = _state_that_fails(expected, 3)
        llm._scheduler.add(sequence)
        while not llm._scheduler.is_idle():
            llm._scheduler.step()
        outcomes.append((sequence.token_ids, str(sequence.failure)))
        assert free_pages(llm) == llm._runner.decoder.num_pages
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == expected[:3]
    assert outcomes[0][1].startswith("logits: expected a token that may be drawn")


def _state_that_fails(tokens, after):
    """Draws the first tokens, then none: every way on is a bad word."""
    allowed = sorted(set(tokens))
    words = [[*tokens[:after], token] for token in allowed]
    return _C.SampleState(384, allowed_ids=allowed, bad_words=words, prompt_ids=[5, 6, 7])


def test_async_requests(tiny):
    texts = prompts(6)
    params = [SamplingParams(max_tokens=20, temperature=i % 2, seed=i, ignore_eos=True) for i in range(6)]
    expected = engine(tiny).generate(texts, params)

    async def go():
        async with AsyncLLM(engine(tiny, speculation=EAGER)) as llm:
            results = await asyncio.gather(*(llm.generate(t, p) for t, p in zip(texts, params, strict=True)))
            pieces = [piece async for piece in llm.stream(texts[1], params[1])]
            stream = llm.stream(texts[3], params[3])
            async for _ in stream:
                break
            await stream.aclose()
            return results, pieces, llm.llm

    results, pieces, llm = asyncio.run(go())
    assert results == expected
    assert [t for piece in pieces for t in piece.token_ids] == expected[1].token_ids
    assert free_pages(llm) == llm._runner.decoder.num_pages
    assert llm._speculator.stats.num_proposed_tokens > 0
    assert not llm._speculator._proposer._lookups


def test_scores_and_beams_go_without(tiny):
    plain, llm = engine(tiny), engine(tiny, speculation=LOOKUP)
    texts = prompts(3)
    assert llm.score(texts, texts) == plain.score(texts, texts)
    assert llm.beam_search(texts) == plain.beam_search(texts)
    assert llm._speculator.stats.num_proposed_tokens == 0


def test_explain_says_what_happened(tiny):
    llm = engine(tiny, speculation=LOOKUP)
    assert "guesses   prompt_lookup: 0 of 0" in str(llm.explain())
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    expected = engine(tiny).generate([[5, 6, 7]], params)
    scripted(llm, expected, 1.0)
    llm.generate([[5, 6, 7]], params)
    counts = llm.explain().speculation
    assert counts["method"] == "prompt_lookup"
    assert counts["num_proposed_tokens"] == counts["num_accepted_tokens"] == 39 - counts["num_verify_steps"]
    assert engine(tiny).explain().speculation is None
    assert "guesses" not in str(engine(tiny).explain())
