"""Engines, proposals and requests that the tests of speculative decoding share."""

import random

import numpy as np

from pyengine import LLM, SamplingParams

PAGE = 16


def engine(model, **options):
    return LLM(model, **({"page_size": PAGE, "cache_tokens": 2048, "max_context": 256} | options))


class Scripted:
    """Proposes from known answers: right, wrong, or each at random."""

    def __init__(self, answers, share_right, seed=0):
        self._answers = answers  # (prompt, completion) -> token ids
        self._share_right = share_right
        self._rng = random.Random(seed)
        self.forgotten = set()

    def available(self, sequences, limits):
        return list(limits)

    def propose(self, sequences, counts, times):
        return [self._guess(sequence, count) for sequence, count in zip(sequences, counts, strict=True)]

    def _guess(self, sequence, count):
        answer = self._answers[tuple(sequence.prompt_token_ids), sequence.index]
        begin = len(sequence.token_ids)
        right = answer[begin : begin + count]
        right += [7] * (count - len(right))
        return [t if self._rng.random() < self._share_right else (t + 1) % 384 for t in right]

    def expected(self, sequence):
        return []

    def forget(self, sequence):
        self.forgotten.add(sequence)


def scripted(llm, completions, share_right, seed=0):
    """Makes an engine with speculation propose from `completions`."""
    # An end token is drawn, but not part of the answer.
    answers = {(tuple(c.prompt_token_ids), c.index): [*c.token_ids, 2] for c in completions}
    proposer = Scripted(answers, share_right, seed)
    llm._speculator._proposer = proposer
    return proposer


def prompts(num, seed=0, vocab_size=384):
    """Some repeat themselves."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(num):
        part = rng.integers(3, vocab_size, int(rng.integers(2, 40))).tolist()
        out.append(part * 3 if i % 2 else part)
    return out


def free_pages(llm):
    return llm._runner.decoder.num_free_pages


SAMPLING = {
    "greedy": {},
    "logprobs": {"logprobs": 3},
    "logprobs of the token": {"logprobs": 0, "temperature": 0.7},
    "temperature": {"temperature": 1.0, "seed": 5},
    "filters": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "logprobs": 1},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.4},
    "drawn penalties": {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "logprobs": 2},
    "bias": {"logit_bias": {5: 3.0, 9: -2.0}, "temperature": 0.6},
    "allowed": {"allowed_token_ids": tuple(range(3, 40)), "temperature": 1.0},
    "allowed few": {"allowed_token_ids": (5, 6), "temperature": 2.0},
    "min tokens": {"min_tokens": 9, "temperature": 1.5, "ignore_eos": False, "logit_bias": {2: 4.0}},
    "stop token": {"stop_token_ids": tuple(range(3, 60)), "temperature": 1.0, "include_stop_str_in_output": True},
    "best of": {"n": 2, "best_of": 4, "temperature": 1.0, "best_of_by": "mean"},
    "several": {"n": 3, "temperature": 1.0, "logprobs": 0},
    "prompt logprobs": {"prompt_logprobs": 2, "logprobs": 2},
    "one token": {"max_tokens": 1},
}


def kinds_of_requests(num=18):
    rng = np.random.default_rng(3)
    stems = [rng.integers(3, 384, n).tolist() for n in (5, 33, 70)]
    kinds = []
    for i in range(num):
        prompt = stems[i % 3] + rng.integers(3, 384, int(rng.integers(1, 40))).tolist()
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 40)),
            temperature=float(i % 2),
            seed=i,
            ignore_eos=i % 4 > 0,
            presence_penalty=0.5 * (i % 3),
            logprobs=i % 3 if i % 3 else None,
            num_speculative_tokens=(None, 0, 11)[i % 3] if i % 5 == 0 else None,
        )
        kinds.append((prompt, params))
    return kinds


def run_random_events(llm, kinds, expected, num_events, seed):
    """Arrivals, cancellations, preemptions and steps; returns how many finished and were cancelled."""
    scheduler, rng = llm._scheduler, random.Random(seed)
    live, num_finished, num_cancelled = [], 0, 0
    for _ in range(num_events):
        event = rng.random()
        if event < 0.3 and len(live) < 20:
            kind = rng.randrange(len(kinds))
            sequence = llm._start([kinds[kind][0]], kinds[kind][1], stream=True, cache_salt=rng.choice(["", "", "t"]))
            sequence = sequence[0][0]
            sequence.priority = rng.choice([0, 0, 0, 1])
            scheduler.add(sequence)
            live.append((kind, sequence))
        elif event < 0.35 and live:
            scheduler.cancel(live.pop(rng.randrange(len(live)))[1])
            num_cancelled += 1
        elif event < 0.37 and scheduler._running:
            scheduler._preempt(rng.choice(scheduler._running))
        else:
            scheduler.step()
        for sequence in scheduler._running:
            # The cache holds what the scheduler thinks it does, and no proposal beyond.
            assert llm._runner.decoder.length(sequence.slot) == sequence.num_cached <= sequence.num_tokens - 1
        for kind, sequence in [item for item in live if item[1].finish_reason]:
            assert sequence.completion() == expected[kind]
            live.remove((kind, sequence))
            num_finished += 1
    while not scheduler.is_idle():
        scheduler.step()
    for kind, sequence in live:
        assert sequence.completion() == expected[kind]
    return num_finished, num_cancelled
