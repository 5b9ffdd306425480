"""Scores of a corpus: packed into full steps, with the bits of each pair alone, beside whatever else runs."""

import itertools
import threading

import numpy as np
import pytest

from pyengine import LLM, SamplingParams
from pyengine.errors import ArgumentError, CapacityError
from pyengine.formats import open_safetensors, write_safetensors
from pyengine.infer import BeamSearchParams
from pyengine.infer.reading import RankReading
from pyengine.infer.score import prompt_logprobs
from pyengine.testing.random_model import make_spec, write_model

PAGE = 16
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)


def ids_of(rng, length):
    return rng.integers(0, 384, length).tolist()


def corpus(count, seed=0):
    """Prompts of 1 to 100 tokens, some of them several times in a row, with completions of 0 to 120."""
    rng = np.random.default_rng(seed)
    pairs = []
    while len(pairs) < count:
        prompt = ids_of(rng, int(rng.choice([1, 2, 15, 16, 17, 33, 100])))
        for _ in range(rng.integers(1, 4)):
            pairs.append((prompt, ids_of(rng, int(rng.choice([0, 1, 3, 31, 120])))))
    return pairs[:count]


def alone(llm, prompt, completion):
    """The pair as a native sequence of its own, one step, or as many as it takes."""
    if not completion:
        return []
    decoder = llm._runner.decoder
    inputs = np.array((prompt + completion)[:-1], np.int32)
    targets = np.array([0] * (len(prompt) - 1) + completion, np.int32)
    out = np.empty(len(inputs), np.float32)
    seq = decoder.add_sequence()
    for begin in range(0, len(inputs), decoder.max_tokens):
        part = slice(begin, begin + decoder.max_tokens)
        count = len(inputs[part])
        decoder.grow(seq, count)
        decoder.step(
            inputs[part], np.full(count, seq, np.int32), np.arange(count, dtype=np.int32),
            targets=targets[part], target_logprobs=out[part],
        )  # fmt: skip
    decoder.free_sequence(seq)
    return out[len(prompt) - 1 :].tolist()


def num_tokens(llm):
    return llm.explain().profile["num_tokens"]


def assert_idle(llm):
    assert llm._scheduler.is_idle()
    assert not llm._scheduler._readings
    assert not llm._scheduler._kept
    assert llm._runner.decoder.num_free_pages == llm._runner.decoder.num_pages


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": "bfloat16"},
        {"weights": "q4_1", "mode": "fast"},
        {"kv_dtype": "int8"},
        {"max_batch_tokens": 1},
        {"max_batch_tokens": 50},
        {"prefix_cache": False},
        {"cache_tokens": 256},
    ],
    ids=str,
)
def test_packing_changes_no_bit(tiny, options):
    options = {"page_size": PAGE, "cache_tokens": 2048, "max_batch_tokens": 256} | options
    llm = LLM(tiny, **options)
    pairs = corpus(20 if options["max_batch_tokens"] == 1 else 60)
    expected = [alone(llm, *pair) for pair in pairs]
    scores = llm.score(*zip(*pairs, strict=True))
    assert [score.logprobs for score in scores] == expected
    assert [score.token_ids for score in scores] == [completion for _, completion in pairs]
    assert list(llm.score_stream(iter(pairs))) == scores
    assert_idle(llm)


def test_on_every_isa_level(isa, tiny):
    llm = LLM(tiny, page_size=PAGE, cache_tokens=1024)
    pairs = corpus(15)
    assert [s.logprobs for s in llm.score(*zip(*pairs, strict=True))] == [alone(llm, *pair) for pair in pairs]


def test_steps_are_full(tiny):
    llm = LLM(tiny, page_size=PAGE, cache_tokens=4096, max_batch_tokens=128)
    rng = np.random.default_rng(3)
    pairs = [(ids_of(rng, 20), ids_of(rng, int(rng.integers(1, 40)))) for _ in range(300)]
    llm.score(*zip(*pairs, strict=True))
    profile = llm.explain().profile
    assert profile["num_tokens"] == sum(len(prompt) + len(completion) - 1 for prompt, completion in pairs)
    assert profile["num_steps"] == -(-profile["num_tokens"] // 128)


def test_a_prompt_is_computed_once_for_its_completions(tiny):
    llm = LLM(tiny, page_size=PAGE, cache_tokens=4096, max_batch_tokens=256)
    rng = np.random.default_rng(4)
    prompts = [ids_of(rng, length) for length in (17, 48, 100, 33)] * 3
    pairs = [(prompt, ids_of(rng, 5)) for prompt in prompts for _ in range(4)]
    llm.score(*zip(*pairs, strict=True))
    whole = sum(len(prompt) + 4 for prompt, _ in pairs)
    shared = 11 * sum((length - 1) // PAGE * PAGE for length in (17, 48, 100, 33))
    assert num_tokens(llm) == whole - shared
    llm.score([prompts[0]], [[1, 2]], cache_salt="another")
    assert num_tokens(llm) == whole - shared + 18


def test_a_stream_reads_a_little_ahead(tiny):
    """Memory does not grow with the corpus."""
    llm = LLM(tiny, page_size=PAGE, cache_tokens=1024, max_batch_tokens=64)
    num_taken = 0

    def pairs():
        nonlocal num_taken
        for num_taken in range(1, 3001):
            yield [num_taken % 384], [1, 2, 3]

    most = max(num_taken - done for done, _ in enumerate(llm.score_stream(pairs()), 1))
    assert num_taken == 3000
    assert 64 // 3 <= most <= 5 * 64 // 3
    assert_idle(llm)


def test_an_error_of_a_pair_comes_in_its_turn(tiny):
    llm = LLM(tiny, page_size=PAGE, cache_tokens=1024)
    for bad, message in [
        (([1], [384]), r"^completions\[2\]: expected token ids from 0 to 383, got 384 at 0$"),
        (([-1], [3]), r"^prompts\[2\]: expected token ids from 0 to 383, got -1 at 0$"),
        (([1] * 200, [3] * 60), r"^prompts\[2\]: expected at most 256 tokens with the answer, got 260$"),
        ([[1]], r"^pairs\[2\]: expected a prompt and a completion, got \[\[1\]\]$"),
        ("ab", r"^pairs\[2\]: expected a prompt and a completion, got 'ab'$"),
        (7, r"^pairs\[2\]: expected a prompt and a completion, got 7$"),
    ]:
        stream = llm.score_stream([([5], [6]), ([7], [8]), bad, ([9], [1])])
        assert [next(stream).token_ids, next(stream).token_ids] == [[6], [8]]
        with pytest.raises(ArgumentError, match=message):
            next(stream)
        assert list(stream) == []
        assert_idle(llm)
    assert llm.score([], []) == []
    assert list(llm.score_stream([])) == []
    with pytest.raises(ArgumentError, match=r"^cache_salt: "):
        llm.score_stream([], cache_salt="é" * 200)
    with pytest.raises(ArgumentError, match=r"^priority: "):
        llm.score_stream([], priority=2**40)


def test_closing_a_stream_frees_its_pages(tiny):
    llm = LLM(tiny, page_size=PAGE, cache_tokens=1024, max_batch_tokens=32)
    stream = llm.score_stream(itertools.repeat(([1] * 40, [2] * 40)))
    next(stream)
    assert not llm._scheduler.is_idle()
    stream.close()
    assert_idle(llm)


def test_a_pair_that_does_not_fit_the_cache(tiny):
    llm = LLM(tiny, page_size=PAGE, cache_tokens=64)
    stream = llm.score_stream([([1], [2]), ([1] * 80, [2]), ([1], [2])])
    next(stream)
    with pytest.raises(CapacityError, match=r"^key/value cache: a sequence of 80 tokens does not fit into 4 pages"):
        next(stream)
    assert_idle(llm)


def test_beside_generation_in_other_threads(tiny):
    """They share a cache that is too small for all, and keep their bits."""
    llm = LLM(tiny, page_size=PAGE, cache_tokens=512, max_batch_tokens=64)
    pairs = corpus(40, seed=5)
    expected = [alone(llm, *pair) for pair in pairs]
    prompts = [[i, 7, i] * 20 for i in range(1, 8)]
    texts = llm.generate(prompts, GREEDY)
    params = SamplingParams(max_tokens=5, prompt_logprobs=2, ignore_eos=True)
    ranked = llm.generate(prompts, params)
    logits = llm.logits(prompts[3]).tobytes()
    beams = llm.beam_search([prompts[0]], BeamSearchParams(beam_width=3, max_tokens=12))
    errors = []

    def check(function):
        def body():
            try:
                assert function()
            except BaseException as error:
                errors.append(error)

        return threading.Thread(target=body)

    threads = [
        check(lambda: [s.logprobs for s in llm.score_stream(pairs)] == expected),
        check(lambda: [s.logprobs for s in llm.score_stream(pairs, priority=1)] == expected),
        check(lambda: llm.generate(prompts, GREEDY) == texts),
        check(lambda: llm.generate(prompts, params) == ranked),
        check(lambda: llm.logits(prompts[3]).tobytes() == logits),
        check(lambda: llm.beam_search([prompts[0]], BeamSearchParams(beam_width=3, max_tokens=12)) == beams),
        check(lambda: list(llm.stream(prompts[0], GREEDY))[-1].completion == texts[0]),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not errors
    assert llm._scheduler.stats.num_preemptions > 0
    assert_idle(llm)


def test_a_reading_that_gives_its_pages_back_hands_out_each_row_once(tiny):
    """Half of its rows are out when a text of higher priority takes its memory."""
    ids = ids_of(np.random.default_rng(6), 180)
    for prefix_cache in (True, False):
        llm = LLM(tiny, page_size=PAGE, cache_tokens=256, max_batch_tokens=32, prefix_cache=prefix_cache)

        def ranks(llm=llm):
            return prompt_logprobs(llm._driver, ids, 2, priority=0, cache_salt="", adapter=None)

        expected = [alone(llm, ids[:1], ids[1:]), llm.embed([ids], pooling="mean").tobytes()]
        expected += [llm.logits(ids).tobytes(), ranks()]
        for i, read in enumerate(
            [
                lambda llm=llm: llm.score([ids[:1]], [ids[1:]])[0].logprobs,
                lambda llm=llm: llm.embed([ids], pooling="mean").tobytes(),
                lambda llm=llm: llm.logits(ids).tobytes(),
                ranks,
            ]
        ):
            results, num_preemptions = [], llm._scheduler.stats.num_preemptions
            original = llm._runner.read
            num_reads = itertools.count()

            def wrapper(plan, llm=llm, original=original, num_reads=num_reads):
                if next(num_reads) == 3:
                    (text,) = llm._start([[7, i, 7] * 60], GREEDY, stream=False, priority=1)  # noqa: B023
                    llm._scheduler.add(text[0])
                original(plan)

            llm._runner.read = wrapper
            results.append(read())
            llm._runner.read = original
            assert results == [expected[i]]
            assert llm._scheduler.stats.num_preemptions > num_preemptions
            while not llm._scheduler.is_idle():
                llm._scheduler.step()
        assert_idle(llm)


def test_turns_alternate(tiny, monkeypatch):
    """A corpus does not keep a text from going on, nor a text a corpus."""
    llm = LLM(tiny, page_size=PAGE, cache_tokens=2048, max_batch_tokens=32)
    turns = []
    for name in ("step", "read"):
        original = getattr(llm._runner, name)
        monkeypatch.setattr(
            llm._runner, name, lambda *a, name=name, original=original: turns.append(name) or original(*a)
        )
    text = llm.stream([1, 2], GREEDY)
    next(text)
    for reading in llm._score_readings(
        [[i] * 20 for i in range(40)], [[2] * 20] * 40, priority=0, cache_salt="", adapter=None
    ):
        llm._scheduler.add(reading)
    turns.clear()
    assert len(list(text)) == 39
    assert turns[:-1] == ["read", "step"] * 38 or turns == ["read", "step"] * 39
    while not llm._scheduler.is_idle():
        llm._scheduler.step()
    assert_idle(llm)


def test_a_failed_step_fails_its_readings_only(tiny, monkeypatch):
    llm = LLM(tiny, page_size=PAGE, cache_tokens=2048, max_batch_tokens=64)
    text = llm.stream([1, 2], GREEDY)
    next(text)
    read = llm._runner.read

    def broken(plan):
        monkeypatch.setattr(llm._runner, "read", read)
        raise MemoryError("planted")

    monkeypatch.setattr(llm._runner, "read", broken)
    with pytest.raises(MemoryError, match="planted"):
        llm.score([[1]], [[2]])
    assert len([*text][-1].completion.token_ids) == 40
    assert_idle(llm)


# --- what else reads prompts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_top", [0, 3])
def test_prompt_logprobs_leave_the_prompt_in_the_cache(tiny, num_top):
    prompt = ids_of(np.random.default_rng(1), 150)
    params = SamplingParams(max_tokens=1, prompt_logprobs=num_top, ignore_eos=True, n=3, temperature=1.0)
    llm = LLM(tiny, page_size=PAGE, cache_tokens=1024, max_batch_tokens=100)
    entries = llm.generate([prompt], params)[0].prompt_logprobs
    assert num_tokens(llm) == 149 + 3 * (150 - 144)
    assert entries[0] is None
    assert [entry.logprob for entry in entries[1:]] == alone(llm, prompt[:1], prompt[1:])
    assert all(len(entry.top) == num_top for entry in entries[1:])
    cold = LLM(tiny, page_size=64, cache_tokens=1024, prefix_cache=False)
    assert cold.generate([prompt], params)[0].prompt_logprobs == entries
    assert num_tokens(cold) == 149 + 3 * 150


def test_logits_that_are_no_numbers_fail_their_reading_alone(tmp_path):
    folder = write_model(tmp_path / "model", make_spec(tie_word_embeddings=False))
    tensors = {name: np.array(tensor) for name, tensor in open_safetensors(folder / "model.safetensors").items()}
    tensors["model.embed_tokens.weight"][9] = np.nan
    write_safetensors(folder / "model.safetensors", tensors)
    llm = LLM(folder, page_size=PAGE, cache_tokens=1024)
    readings = [RankReading(token_ids=ids, first=0, targets=[1, 2, 3], num_top=2) for ids in ([8, 9, 10], [5, 1, 2])]
    for reading in readings:
        llm._scheduler.add(reading)
    llm._scheduler.step()
    assert str(readings[0].failure) == "logits: expected numbers or -inf, got nan or inf"
    assert readings[1].failure is None
    assert [entry.logprob for entry in readings[1].entries] == alone(llm, [5], [1, 2, 3])
    assert llm.explain().profile["num_steps"] == 2
    with pytest.raises(ArgumentError, match=r"^logits: expected numbers"):
        llm.generate([[8, 9, 10, 11]], SamplingParams(max_tokens=1, prompt_logprobs=2))
    assert_idle(llm)


def test_one_token_has_no_logprobs(tiny):
    llm = LLM(tiny)
    (completion,) = llm.generate([[5]], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert completion.prompt_logprobs == [None]


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_beams_go_on_from_the_pages_of_their_parents(tiny, prefix_cache):
    """One token of each live beam a step."""
    llm = LLM(tiny, page_size=64, cache_tokens=4096, prefix_cache=prefix_cache)
    prompt = ids_of(np.random.default_rng(2), 60)
    params = BeamSearchParams(beam_width=4, max_tokens=30, ignore_eos=True)
    beams = llm.beam_search([prompt], params)
    assert num_tokens(llm) == 60 + 29 * 4
    assert_idle(llm)
    for beam in beams:
        assert beam.cumulative_logprob == pytest.approx(sum(alone(llm, prompt, beam.token_ids)), abs=1e-9)


def test_beams_give_their_pages_to_others(tiny):
    """In a cache with room for little more than one beam each step takes the pages of the last one back."""
    prompt = ids_of(np.random.default_rng(2), 60)
    params = BeamSearchParams(beam_width=5, max_tokens=30)
    expected = LLM(tiny, page_size=PAGE, cache_tokens=4096).beam_search([prompt], params)
    llm = LLM(tiny, page_size=PAGE, cache_tokens=112)
    assert llm.beam_search([prompt], params) == expected
    assert_idle(llm)
