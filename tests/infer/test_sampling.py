"""The native sampler of sequences against the numpy reference, and each option of SamplingParams through `LLM`."""

import numpy as np
import pytest

from pyengine import _C, LLM, SamplingParams
from pyengine.errors import ArgumentError
from pyengine.reference import sample as reference


def draw_one(logits, state):
    return _C.draw(np.asarray(logits, np.float32)[None], [state], -1).token_ids[0]


def bits(allowed):
    """A boolean mask as the native side takes it: bit i % 32 of word i / 32."""
    padded = np.zeros(-(-len(allowed) // 32) * 32, bool)
    padded[: len(allowed)] = allowed
    return np.packbits(padded, bitorder="little").view(np.int32)


# --- against the reference --------------------------------------------------------------------------------------------


def random_options(rng, vocab_size):
    def some(chance, most):
        return rng.integers(0, vocab_size, rng.integers(1, most)).tolist() if rng.random() < chance else []

    bias_ids = sorted(set(some(0.4, 6)))
    return {
        "temperature": float(rng.choice([0.0, 0.7, 1.5])),
        "top_k": int(rng.choice([0, 0, 5])),
        "top_p": float(np.float32(rng.choice([1.0, 0.8]))),
        "min_p": float(np.float32(rng.choice([0.0, 0.0, 0.05]))),
        "repetition_penalty": float(np.float32(rng.choice([1.0, 1.0, 1.4, 0.8]))),
        "frequency_penalty": float(np.float32(rng.choice([0.0, 0.0, 0.9, -0.6]))),
        "presence_penalty": float(np.float32(rng.choice([0.0, 0.0, 1.7, -2.0]))),
        "seed": int(rng.integers(0, 2**63)),
        "sequence": int(rng.integers(0, 9)),
        "prompt_ids": rng.integers(0, vocab_size, rng.integers(1, 20)).tolist(),
        "bias_ids": bias_ids,
        "biases": rng.normal(0, 4, len(bias_ids)).astype(np.float32).tolist(),
        "allowed_ids": some(0.3, vocab_size) and rng.permutation(vocab_size)[: vocab_size * 2 // 3].tolist(),
        "end_ids": some(0.5, 4),
        "min_tokens": int(rng.integers(0, 15)),
        "bad_words": [rng.integers(0, 4, rng.integers(1, 4)).tolist() for _ in range(rng.integers(0, 6))],
    }


def expected_draw(logits, options, output, grammar):
    banned = reference.banned_by_words(output, options["bad_words"])
    if len(output) < options["min_tokens"]:
        banned |= set(options["end_ids"])
    allowed = np.ones(len(logits), bool)
    if options["allowed_ids"]:
        allowed = np.isin(np.arange(len(logits)), options["allowed_ids"])
    if grammar is not None:
        allowed &= grammar
    adjusted = reference.adjust(
        logits,
        allowed=allowed,
        banned_ids=banned,
        biases=dict(zip(options["bias_ids"], options["biases"], strict=True)),
        previous_ids=options["prompt_ids"] + output,
        num_prompt_ids=len(options["prompt_ids"]),
        **{name: options[name] for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")},
    )
    if adjusted.max() == -np.inf:
        return None
    filters = {name: options[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed", "sequence")}
    return reference.sample_row(adjusted, position=len(options["prompt_ids"]) + len(output), **filters)


@pytest.mark.parametrize("vocab_size", [7, 33, 150])
def test_equals_the_reference_step_by_step(isa, vocab_size):
    rng = np.random.default_rng(vocab_size)
    options = [random_options(rng, vocab_size) for _ in range(40)]
    states = [_C.SampleState(vocab_size, **o) for o in options]
    outputs = [[] for _ in options]
    num_checked = num_masked = 0
    for _ in range(25):
        # Half of the logits lie low, so that few tokens repeat often and biases and penalties decide.
        logits = 2 * rng.standard_normal((len(states), vocab_size)).astype(np.float32)
        logits[:, vocab_size // 2 :] -= 4
        grammars = [rng.random(vocab_size) < 0.7 if rng.random() < 0.3 else None for _ in states]
        for state, grammar in zip(states, grammars, strict=True):
            if grammar is not None:
                state.set_mask(bits(grammar))
        drawn = _C.draw(logits, states, 0)
        for i, token in enumerate(drawn.token_ids):
            expected = expected_draw(logits[i], options[i], outputs[i], grammars[i])
            if expected is None:
                assert token == -2
                continue
            # Where rounding cannot move the draw; the bound is that of tests/ops/test_sample.py.
            if expected.margin > 2**-22 + (vocab_size / 8 + 4) * 2**-24:
                assert token == expected.token, (i, options[i], outputs[i])
                num_checked += 1
                num_masked += grammars[i] is not None
            assert drawn.logprobs[i] == pytest.approx(reference.log_softmax(logits[i])[token], abs=1e-4)
            outputs[i].append(token)
    assert [state.num_output_ids for state in states] == [len(output) for output in outputs]
    assert num_checked > 700
    assert num_masked > 150


def test_a_row_is_the_same_alone_and_in_a_batch(isa):
    rng = np.random.default_rng(1)
    options = [random_options(rng, 90) for _ in range(30)]
    together, alone = ([_C.SampleState(90, **o) for o in options] for _ in range(2))
    for _ in range(10):
        logits = rng.standard_normal((30, 90)).astype(np.float32)
        batch = _C.draw(logits, together, 3)
        for i, state in enumerate(alone):
            row = _C.draw(logits[i : i + 1], [state], 3)
            assert row.token_ids[0] == batch.token_ids[i]
            if row.token_ids[0] >= 0:
                assert row.logprobs[0] == batch.logprobs[i]
                assert row.top_ids == batch.top_ids[3 * i : 3 * i + 3]


def test_a_mask_reaches_the_last_token_and_holds_for_one_draw(isa):
    for vocab_size in (1, 31, 32, 33, 100):
        state = _C.SampleState(vocab_size)
        logits = np.arange(vocab_size, 0, -1)
        for token in range(vocab_size):
            state.set_mask(bits(np.arange(vocab_size) == token))
            assert draw_one(logits, state) == token
        assert draw_one(logits, state) == 0


def test_a_row_that_cannot_be_drawn_does_not_touch_the_others(isa):
    logits = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    logits[1, 7] = np.nan
    logits[2] = -np.inf
    states = [_C.SampleState(50) for _ in range(4)]
    assert _C.draw(logits, states, -1).token_ids == [int(logits[0].argmax()), -1, -2, int(logits[3].argmax())]
    assert [state.num_output_ids for state in states] == [1, 0, 0, 1]


def test_nan_under_a_mask_is_still_an_error(isa):
    logits = np.zeros(64, np.float32)
    logits[40] = np.nan
    for allowed in (np.arange(64) < 32, np.arange(64) != 40):
        state = _C.SampleState(64)
        state.set_mask(bits(allowed))
        assert draw_one(logits, state) == -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_ids": [50]}, "prompt_ids: expected token ids below 50, got 50"),
        ({"bias_ids": [-1], "biases": [1.0]}, "bias_ids: expected token ids below 50, got -1"),
        ({"bias_ids": [1], "biases": []}, "biases: expected 1, one per id, got 0"),
        ({"allowed_ids": [2**31 - 1]}, "allowed_ids: expected token ids below 50"),
        ({"end_ids": [50]}, "end_ids: expected token ids below 50, got 50"),
        ({"bad_words": [[1], [3, 50]]}, "bad_words: expected token ids below 50, got 50"),
        ({"bad_words": [[]]}, "bad_words: expected at least one token, got none"),
    ],
)
def test_a_bad_state_is_named(options, message):
    with pytest.raises(ArgumentError, match=message):
        _C.SampleState(50, **options)


def test_bad_calls_are_named():
    state = _C.SampleState(50)
    for mask in (np.zeros(1, np.int32), np.zeros(3, np.int32)):
        with pytest.raises(ArgumentError, match="mask: expected 2 words"):
            state.set_mask(mask)
    logits = np.zeros((2, 50), np.float32)
    with pytest.raises(ArgumentError, match=r"logits: expected shape \(1, any\)|logits: expected shape"):
        _C.draw(logits, [state], -1)
    with pytest.raises(ArgumentError, match="states: expected each once, got row 1 again"):
        _C.draw(logits, [state, state], -1)
    with pytest.raises(ArgumentError, match="states: expected vocabularies of 50, got 49 at row 1"):
        _C.draw(logits, [state, _C.SampleState(49)], -1)
    with pytest.raises(ArgumentError, match="num_logprobs: expected at most 50, got 51"):
        _C.draw(logits, [state, _C.SampleState(50)], 51)


# --- through LLM ------------------------------------------------------------------------------------------------------

PROMPT = [5, 9, 200]
BASE = {"max_tokens": 40, "temperature": 1.0, "seed": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(tiny):
    return LLM(tiny, cache_tokens=4096)


def complete(llm, prompt=PROMPT, **options):
    return llm.generate([prompt], SamplingParams(**(BASE | options)))[0]


def chain(llm, **options):
    """The greedy tokens of `complete`, each recomputed from the logits of the whole text by the reference."""
    ids, settings = list(PROMPT), {name: options[name] for name in options if name.endswith("penalty")}
    for _ in range(BASE["max_tokens"]):
        logits = llm.logits(ids)[-1]
        ids.append(int(reference.adjust(logits, previous_ids=ids, num_prompt_ids=len(PROMPT), **settings).argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"frequency_penalty": 1.25},
        {"presence_penalty": 2.0},
        {"repetition_penalty": 1.1, "frequency_penalty": 0.75, "presence_penalty": -0.5},
    ],
    ids=str,
)
def test_penalties_read_the_text_so_far(llm, options):
    greedy = complete(llm, temperature=0.0).token_ids
    tokens = complete(llm, temperature=0.0, **options).token_ids
    assert tokens == chain(llm, **options)
    assert tokens != greedy


def test_logit_bias_forces_and_forbids(llm):
    assert set(complete(llm, logit_bias={17: 100.0}).token_ids) == {17}
    plain = complete(llm).token_ids
    banned = complete(llm, logit_bias=dict.fromkeys(plain, -100.0)).token_ids
    assert not set(plain) & set(banned)


def test_allowed_token_ids_hold_whatever_the_bias(llm):
    allowed = (4, 8, 15, 383)
    tokens = complete(llm, allowed_token_ids=allowed, logit_bias={16: 100.0}).token_ids
    assert set(tokens) <= set(allowed)
    assert len(set(tokens)) > 1


def test_bad_words_do_not_appear(llm):
    plain = complete(llm, temperature=0.0)
    single, pair = plain.token_ids[20], plain.token_ids[10:12]
    words = [llm.tokenizer.decode([single]), llm.tokenizer.decode(pair)]
    encoded = [llm.tokenizer.encode(prefix + word, add_special_tokens=False) for word in words for prefix in ("", " ")]
    assert [single] in encoded
    assert pair in encoded
    tokens = complete(llm, temperature=0.0, bad_words=tuple(words)).token_ids

    def first_end(ids):
        ends = [i + len(w) - 1 for w in encoded for i in range(len(ids)) if ids[i : i + len(w)] == w]
        return min(ends, default=None)

    assert first_end(plain.token_ids) is not None
    assert first_end(tokens) is None
    end = first_end(plain.token_ids)
    assert tokens[:end] == plain.token_ids[:end]
    assert tokens[end] != plain.token_ids[end]


def test_min_tokens_puts_the_end_off(llm):
    ends = SamplingParams(max_tokens=40, temperature=1.0, seed=3, logit_bias={2: 100.0})
    assert llm.generate([PROMPT], ends)[0].token_ids == []
    late = llm.generate(
        [PROMPT], SamplingParams(**(BASE | {"ignore_eos": False, "min_tokens": 6}), logit_bias={2: 100})
    )
    assert len(late[0].token_ids) == 6
    assert late[0].finish_reason == "stop"
    other = complete(llm, min_tokens=3, stop_token_ids=(30,), logit_bias={30: 100.0})
    assert len(other.token_ids) == 3
    assert other.stop_reason == 30


def test_bad_words_are_encoded_once_for_all_completions(llm, monkeypatch):
    calls = []
    encode = type(llm.tokenizer).encode

    def count(self, text, **options):
        calls.append(text)
        return encode(self, text, **options)

    monkeypatch.setattr(type(llm.tokenizer), "encode", count)
    complete_all(llm, n=5, max_tokens=2, bad_words=("ab", " cd"))
    assert sorted(calls) == [" ab", " cd", "ab", "cd"]


def test_bad_words_begin_in_the_output(isa):
    """The penalty makes the native side keep the prompt too."""
    state = _C.SampleState(9, prompt_ids=[1, 2], bad_words=[[2, 3], [3, 4]], repetition_penalty=1.5)
    assert draw_one([0, 0, 0, 5, 4, 0, 0, 0, 0], state) == 3
    assert draw_one([0, 0, 0, 0, 5, 4, 0, 0, 0], state) == 5


def test_min_tokens_counts_tokens(llm):
    plain = complete(llm)
    texts = [llm.tokenizer.decode([token]) for token in plain.token_ids]
    index, stop = next((i, t) for i, t in enumerate(texts) if i > 5 and t.isascii() and plain.text.count(t) == 1)
    assert complete(llm, stop=(stop,), min_tokens=index).stop_reason == stop
    assert complete(llm, stop=(stop,), min_tokens=index + 1).stop_reason is None


def test_min_tokens_puts_stop_strings_off(llm):
    plain = complete(llm)
    stop = plain.text[3:5]
    first = complete(llm, stop=(stop,))
    assert first.text == plain.text[: plain.text.index(stop)]
    late = complete(llm, stop=(stop,), min_tokens=20)
    assert late.token_ids[:20] == plain.token_ids[:20]
    assert late.text.startswith(llm.tokenizer.decode(plain.token_ids[:18]))


def test_stop_strings_and_end_tokens_can_be_kept(llm):
    plain = complete(llm)
    stop = plain.text[12:15]
    cut, kept = (complete(llm, stop=(stop,), include_stop_str_in_output=keep) for keep in (False, True))
    assert kept.text == cut.text + stop
    assert kept.stop_reason == cut.stop_reason == stop
    end = plain.token_ids[9]
    cut, kept = (complete(llm, stop_token_ids=(end,), include_stop_str_in_output=keep) for keep in (False, True))
    assert kept.token_ids == [*cut.token_ids, end]
    assert kept.text == llm.tokenizer.decode(kept.token_ids)
    assert kept.stop_reason == cut.stop_reason == end
    assert kept.finish_reason == "stop"
    own = llm.generate([PROMPT], SamplingParams(logit_bias={2: 100.0}, include_stop_str_in_output=True))[0]
    assert (own.token_ids, own.stop_reason) == ([2], None)


def test_special_tokens_stay_where_asked_for(llm):
    options = {"allowed_token_ids": (1, 2, 70, 71)}
    hidden = complete(llm, **options)
    shown = complete(llm, skip_special_tokens=False, **options)
    assert hidden.token_ids == shown.token_ids
    assert {1, 2} & set(shown.token_ids)
    assert shown.text == llm.tokenizer.decode(shown.token_ids, skip_special_tokens=False)
    assert hidden.text == llm.tokenizer.decode(shown.token_ids, skip_special_tokens=True)
    assert hidden.text != shown.text


MIXED = [
    {},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"frequency_penalty": 1.0, "presence_penalty": 0.5, "logprobs": 2},
    {"logit_bias": {7: 3.0, 9: -5.0}, "min_tokens": 8, "ignore_eos": False},
    {"allowed_token_ids": tuple(range(40, 200)), "bad_words": ("e", "th")},
    {"logprobs": 4, "top_k": 30},
    {"stop": ("e",), "include_stop_str_in_output": True, "min_tokens": 5},
]


def test_every_option_gives_the_same_alone_in_a_batch_and_after_preemption(tiny, llm):
    params = [SamplingParams(**(BASE | options | {"seed": i})) for i, options in enumerate(2 * MIXED)]
    prompts = [[i + 3, 50 + i] for i in range(len(params))]
    together = llm.generate(prompts, params)
    assert together == [llm.generate([p], o)[0] for p, o in zip(prompts, params, strict=True)]
    assert together == LLM(tiny, cache_tokens=96, page_size=16).generate(prompts, params)
    for prompt, option, completion in zip(prompts, params, together, strict=True):
        pieces = list(llm.stream(prompt, option))
        assert pieces[-1].completion == completion
        assert "".join(piece.text for piece in pieces) == completion.text


def test_nothing_to_draw_is_a_typed_error_and_harms_nobody(llm):
    word = llm.tokenizer.decode([70])
    dead = SamplingParams(**BASE, allowed_token_ids=(70,), bad_words=(word,))
    with pytest.raises(ArgumentError, match="logits: expected a token that may be drawn, got none"):
        llm.generate([PROMPT], dead)
    other = llm.stream(PROMPT, SamplingParams(**BASE))
    pieces = [next(other)]
    with pytest.raises(ArgumentError, match="expected a token that may be drawn"):
        list(llm.stream(PROMPT, dead))
    pieces += list(other)
    assert pieces[-1].completion == complete(llm)
    assert llm._runner.decoder.num_free_pages == llm._runner.decoder.num_pages


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_ids_are_checked_against_the_width_of_the_logits(llm, name):
    for token in (384, 2**31 - 1):
        value = {token: 1.0} if name == "logit_bias" else (token,)
        with pytest.raises(ArgumentError, match=f"^{name}: expected ids below 384, got {token}"):
            complete(llm, **{name: value})
    complete(llm, **{name: {383: 1.0} if name == "logit_bias" else (383,)})


@pytest.mark.parametrize(
    "options",
    [
        {"min_tokens": -1},
        {"min_tokens": 129},
        {"min_tokens": 1.0},
        {"frequency_penalty": 2.01},
        {"frequency_penalty": float("nan")},
        {"presence_penalty": -2.01},
        {"presence_penalty": "1"},
        {"logit_bias": {1: 100.5}},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"1": 1.0}},
        {"logit_bias": (3,)},
        {"logit_bias": dict.fromkeys(range(4097), 1.0)},
        {"allowed_token_ids": ()},
        {"allowed_token_ids": (-1,)},
        {"allowed_token_ids": (True,)},
        {"stop_token_ids": (2**31,)},
        {"bad_words": ("",)},
        {"bad_words": ("a" * 257,)},
        {"bad_words": ("a",) * 257},
        {"bad_words": (7,)},
    ],
    ids=lambda options: str(options)[:40],
)
def test_bad_options_are_named(options):
    (name,) = options
    with pytest.raises(ArgumentError, match=rf"^{name}: expected .*, got "):
        SamplingParams(**options)


# --- several completions ----------------------------------------------------------------------------------------------


def complete_all(llm, prompts=(PROMPT,), **options):
    return llm.generate(list(prompts), SamplingParams(**(BASE | options)))


def test_the_first_of_n_is_the_only_one_of_one(llm):
    four = complete_all(llm, n=4)
    assert [c.index for c in four] == [0, 1, 2, 3]
    assert four[:1] == complete_all(llm)
    assert four[:3] == complete_all(llm, n=3)
    assert len({tuple(c.token_ids) for c in four}) == 4


def test_completion_i_draws_from_counter_i(llm):
    for completion in complete_all(llm, n=3, max_tokens=5):
        ids = list(PROMPT)
        for token in completion.token_ids:
            draw = reference.sample_row(
                llm.logits(ids)[-1], seed=BASE["seed"], sequence=completion.index, position=len(ids)
            )
            assert draw.margin > 1e-5
            assert token == draw.token
            ids.append(token)


def test_n_of_several_prompts_stand_side_by_side(tiny, llm):
    prompts = [PROMPT, [7, 8], [300]]
    params = [SamplingParams(**(BASE | {"n": n, "max_tokens": 12})) for n in (2, 1, 3)]
    got = llm.generate(prompts, params)
    assert [(c.prompt_token_ids, c.index) for c in got] == [
        (PROMPT, 0), (PROMPT, 1), ([7, 8], 0), ([300], 0), ([300], 1), ([300], 2)
    ]  # fmt: skip
    alone = [c for prompt, option in zip(prompts, params, strict=True) for c in llm.generate([prompt], option)]
    assert got == alone
    assert got == LLM(tiny, cache_tokens=64, page_size=16).generate(prompts, params)


def test_a_stream_of_n_mixes_pieces_by_index(llm):
    params = SamplingParams(**(BASE | {"n": 3}))
    pieces = list(llm.stream(PROMPT, params))
    expected = llm.generate([PROMPT], params)
    for completion in expected:
        mine = [piece for piece in pieces if piece.index == completion.index]
        assert mine[-1].completion == completion
        assert "".join(piece.text for piece in mine) == completion.text
    with pytest.raises(ArgumentError, match="best_of: expected None for a stream, got 2"):
        llm.stream(PROMPT, SamplingParams(temperature=1.0, best_of=2))


def score_with_end(llm, completion):
    """Log-probability of every token that was drawn, the end token included."""
    ids = completion.token_ids + [2] * (completion.finish_reason == "stop")
    return llm.score([completion.prompt_token_ids], [ids])[0].logprobs


def test_best_of_keeps_the_likeliest(llm):
    options = {"ignore_eos": False, "logit_bias": {2: 5.0}, "temperature": 1.5}
    drawn = complete_all(llm, n=12, **options)
    assert {c.finish_reason for c in drawn} == {"stop", "length"}
    scores = {c.index: score_with_end(llm, c) for c in drawn}
    for by, key in (("total", sum), ("mean", lambda values: sum(values) / len(values))):
        best = complete_all(llm, n=5, best_of=12, best_of_by=by, **options)
        assert [c.index for c in best] == sorted(scores, key=lambda i: -key(scores[i]))[:5]
        for completion in best:
            assert completion.cumulative_logprob == pytest.approx(sum(scores[completion.index]), abs=1e-3)
            assert completion.logprobs is None
            assert completion.token_ids == drawn[completion.index].token_ids


def test_cumulative_logprob_is_the_sum(llm):
    completion = complete(llm, logprobs=0)
    assert completion.cumulative_logprob == pytest.approx(sum(t.logprob for t in completion.logprobs))
    assert complete(llm).cumulative_logprob is None


@pytest.mark.parametrize("num_tokens", [1, 2, 70])
def test_prompt_logprobs_are_those_of_score(tiny, num_tokens):
    llm = LLM(tiny, max_batch_tokens=16)
    prompt = np.random.default_rng(num_tokens).integers(3, 384, num_tokens).tolist()
    for count in (0, 3):
        first, *rest = complete(llm, prompt, prompt_logprobs=count, max_tokens=1).prompt_logprobs
        assert first is None
        assert [entry.token_id for entry in rest] == prompt[1:]
        assert [entry.logprob for entry in rest] == llm.score([prompt[:1]], [prompt[1:]])[0].logprobs
        for entry, logits in zip(rest, llm.logits(prompt), strict=False):
            logprobs = reference.log_softmax(logits)
            order = np.argsort(-logits, kind="stable")[:count]
            assert list(entry.top) == order.tolist()
            assert list(entry.top.values()) == pytest.approx(logprobs[order].tolist(), abs=1e-5)
    assert complete(llm, prompt, max_tokens=1).prompt_logprobs is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n: expected a whole number from 1 to 256, got 0"),
        ({"n": 257}, "n: expected a whole number from 1 to 256, got 257"),
        ({"n": 2}, "n: expected 1 with temperature 0, got 2"),
        (
            {"n": 3, "best_of": 2, "temperature": 1.0},
            "best_of: expected None or a whole number from n, 3, to 256, got 2",
        ),
        ({"best_of": 2}, "best_of: expected 1 with temperature 0, got 2"),
        ({"best_of_by": "length"}, "best_of_by: expected 'total' or 'mean', got 'length'"),
        ({"prompt_logprobs": 21}, "prompt_logprobs: expected None or 0 to 20, got 21"),
    ],
)
def test_bad_counts_are_named(options, message):
    with pytest.raises(ArgumentError, match=f"^{message}$"):
        SamplingParams(**options)
