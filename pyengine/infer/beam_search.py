"""Beam search: the likeliest completions that a search of bounded width finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pyengine.errors import ArgumentError

MAX_BEAM_WIDTH = 64

NextLogprobs = Callable[[list[list[int]]], list[dict[int, float]]]


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Options of a beam search; names as in vLLM.

    The score of a completion is its log-probability under the raw softmax over its length to the power of
    length_penalty; the token that ends it counts in both. A beam goes on by, and may end with, its `num_candidates`
    likeliest tokens.
    """

    beam_width: int = 4
    """How many completions to keep at a time, and to return."""
    max_tokens: int = 128
    """Most new tokens of a completion."""
    length_penalty: float = 1.0
    """0 compares log-probabilities, 1 their mean over the tokens; more prefers longer completions."""
    ignore_eos: bool = False
    """Go on past the model's end tokens."""

    def num_candidates(self, num_end_tokens: int) -> int:
        """Of each beam. Enough to go on even where all end tokens are among them."""
        return self.beam_width * max(2, 1 + num_end_tokens)

    def __post_init__(self) -> None:
        for name, most in (("beam_width", MAX_BEAM_WIDTH), ("max_tokens", None)):
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not ok or (most is not None and value > most):
                expected = "a whole number >= 1" if most is None else f"a whole number from 1 to {most}"
                raise ArgumentError(f"{name}: expected {expected}, got {value!r:.60}")
        penalty = self.length_penalty
        if not isinstance(penalty, (int, float)) or isinstance(penalty, bool) or not -10.0 <= penalty <= 10.0:
            raise ArgumentError(f"length_penalty: expected a number from -10 to 10, got {penalty!r:.60}")


@dataclass(frozen=True)
class Beam:
    """A completion, and the token that ended it."""

    token_ids: list[int]
    logprob: float = 0.0
    end_token_id: int | None = None

    def score(self, length_penalty: float) -> float:
        length = len(self.token_ids) + (self.end_token_id is not None)
        return self.logprob / math.pow(max(length, 1), length_penalty)


def beam_search(next_logprobs: NextLogprobs, end_token_ids: Iterable[int], params: BeamSearchParams) -> list[Beam]:
    """The best `beam_width` completions, best first; fewer if there are no more.

    `next_logprobs` tells for each of several completions the log-probabilities of its likeliest next tokens,
    `params.num_candidates` of them. Of equal ones the earlier beam, then the likelier token comes first.
    """
    end, width, penalty = frozenset(end_token_ids), params.beam_width, params.length_penalty
    live, done = [Beam([])], list[Beam]()
    for length in range(1, params.max_tokens + 1):
        grown = []
        for beam, logprobs in zip(live, next_logprobs([beam.token_ids for beam in live]), strict=True):
            for token, logprob in logprobs.items():
                total = beam.logprob + logprob
                if token in end:
                    done.append(Beam(beam.token_ids, total, token))
                else:
                    grown.append(Beam([*beam.token_ids, token], total))
        live = sorted(grown, key=lambda beam: -beam.logprob)[:width]
        done = sorted(done, key=lambda beam: -beam.score(penalty))[:width]
        if not live or (len(done) == width and done[-1].score(penalty) >= _bound(live[0], length, params)):
            return done
    return sorted(done + live, key=lambda beam: -beam.score(penalty))[:width]


def _bound(beam: Beam, length: int, params: BeamSearchParams) -> float:
    """No continuation of a beam of `length` tokens scores more: its log-probability can only fall."""
    if params.length_penalty > 0:
        return beam.logprob / math.pow(params.max_tokens, params.length_penalty)
    return beam.logprob / math.pow(length, params.length_penalty)
