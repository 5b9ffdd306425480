"""Beam search against a dense one in numpy, on the logits of the engine."""

import numpy as np
import pytest

from pyengine import LLM
from pyengine.errors import ArgumentError
from pyengine.infer import BeamSearchParams
from pyengine.infer.beam_search import beam_search
from pyengine.reference.sample import log_softmax

PROMPTS = [[5, 9, 200], [7], [300, 4, 4, 17]]


@pytest.fixture(scope="module")
def llm(tiny):
    return LLM(tiny, cache_tokens=4096)


def dense_search(logprobs_of, end, width, max_tokens, penalty):
    """[(tokens, ended, log-probability)], best first; over the whole vocabulary at once, without an early end."""
    num_candidates = width * max(2, 1 + len(end))
    score = lambda tokens, ended, total: total / (len(tokens) + ended) ** penalty  # noqa: E731
    live, done = [((), 0.0)], []
    for _ in range(max_tokens):
        table = np.array([total + logprobs_of(list(tokens)) for tokens, total in live])
        ranks = np.argsort(np.argsort(-table, axis=1, kind="stable"), axis=1)
        done += [
            (tokens, True, table[i, e])
            for i, (tokens, _) in enumerate(live)
            for e in end
            if ranks[i, e] < num_candidates
        ]
        table[:, list(end)] = -np.inf
        order = np.argsort(-table, axis=None, kind="stable")[:width]
        rows, tokens = np.unravel_index(order, table.shape)
        live = [((*live[i][0], int(t)), table[i, t]) for i, t in zip(rows, tokens, strict=True)]
    done += [(tokens, False, total) for tokens, total in live]
    return sorted(done, key=lambda entry: -score(*entry))[:width]


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.5, -1.0])
@pytest.mark.parametrize(("width", "max_tokens"), [(1, 6), (3, 8), (7, 4)])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_equals_a_dense_search(llm, width, max_tokens, penalty, ignore_eos):
    params = BeamSearchParams(beam_width=width, max_tokens=max_tokens, length_penalty=penalty, ignore_eos=ignore_eos)
    got = llm.beam_search(PROMPTS, params)
    assert len(got) == width * len(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        expected = dense_search(
            lambda ids, prompt=prompt: log_softmax(llm.logits(prompt + ids)[-1]),
            () if ignore_eos else (2,), width, max_tokens, penalty,
        )  # fmt: skip
        mine = got[i * width : (i + 1) * width]
        assert [(tuple(c.token_ids), c.finish_reason == "stop") for c in mine] == [e[:2] for e in expected]
        for rank, (completion, (tokens, ended, total)) in enumerate(zip(mine, expected, strict=True)):
            assert completion.index == rank
            assert completion.prompt_token_ids == prompt
            assert completion.cumulative_logprob == pytest.approx(total, abs=1e-4)
            assert completion.text == llm.tokenizer.decode(list(tokens))
            ids = [*tokens, 2] if ended else list(tokens)
            assert completion.cumulative_logprob == pytest.approx(llm.score([prompt], [ids])[0].total, abs=1e-4)


def random_language(seed, vocab_size):
    """Log-probabilities of a next token that depend on all tokens before it."""

    def logprobs_of(ids):
        rng = np.random.default_rng([seed, *ids])
        return log_softmax((2 * rng.standard_normal(vocab_size)).astype(np.float32))

    return logprobs_of


@pytest.mark.parametrize("penalty", [-2.0, 0.0, 1.0, 3.0])
def test_ends_early_only_when_nothing_better_can_come(penalty):
    """Many short languages in which texts end often."""
    num_steps = 0
    for seed in range(40):
        logprobs_of = random_language(seed, 9)

        def top(beams, logprobs_of=logprobs_of):
            nonlocal num_steps
            num_steps += 1
            tables = [logprobs_of(ids) for ids in beams]
            return [{int(t): table[t] for t in np.argsort(-table, kind="stable")[:9]} for table in tables]

        params = BeamSearchParams(beam_width=3, max_tokens=7, length_penalty=penalty)
        got = beam_search(top, (0, 4), params)
        expected = dense_search(logprobs_of, (0, 4), 3, 7, penalty)
        assert [(tuple(b.token_ids), b.end_token_id is not None) for b in got] == [e[:2] for e in expected]
        assert [b.logprob for b in got] == pytest.approx([e[2] for e in expected])
    assert num_steps <= 40 * 7
    if penalty <= 0:
        assert num_steps < 40 * 6


def test_a_width_of_one_is_greedy(llm):
    from pyengine import SamplingParams

    beam = llm.beam_search([PROMPTS[0]], BeamSearchParams(beam_width=1, max_tokens=20, ignore_eos=True))[0]
    greedy = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=20, ignore_eos=True))[0]
    assert beam.token_ids == greedy.token_ids


def test_stops_at_the_context(llm):
    got = llm.beam_search([[3] * 253], BeamSearchParams(beam_width=2, ignore_eos=True))
    assert [len(c.token_ids) for c in got] == [3, 3]
    assert llm._runner.decoder.num_free_pages == llm._runner.decoder.num_pages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_width": 0}, "beam_width: expected a whole number from 1 to 64, got 0"),
        ({"beam_width": 65}, "beam_width: expected a whole number from 1 to 64, got 65"),
        ({"max_tokens": 0}, "max_tokens: expected a whole number >= 1, got 0"),
        ({"length_penalty": float("nan")}, "length_penalty: expected a number from -10 to 10, got nan"),
        ({"length_penalty": 11}, "length_penalty: expected a number from -10 to 10, got 11"),
    ],
)
def test_bad_params(options, message):
    with pytest.raises(ArgumentError, match=f"^{message}$"):
        BeamSearchParams(**options)


@pytest.mark.parametrize(("num_end_tokens", "expected"), [(0, 6), (1, 6), (4, 15)])
def test_number_of_candidates_is_that_of_transformers(num_end_tokens, expected):
    """max(2, 1 + end tokens) times the number of beams; vLLM's 2 times where there is one."""
    assert BeamSearchParams(beam_width=3).num_candidates(num_end_tokens) == expected
