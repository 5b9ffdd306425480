"""Proposals for the sequences of a step."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

from pyengine import _C
from pyengine.infer.sequence import Sequence
from pyengine.infer.speculation import MAX_PROPOSED_TOKENS, PromptLookup, Speculation, SpeculationStats
from pyengine.infer.speculation_control import Acceptance, SpeculationControl, StepTimes, spread


class Proposer(Protocol):
    """Where proposals come from."""

    def available(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[int]:
        """How many tokens it can propose for each, at most `limits`. Called before propose()."""

    def propose(self, sequences: SequenceOf[Sequence], counts: SequenceOf[int], times: StepTimes) -> list[list[int]]:
        """Tokens that may follow each sequence, about `counts`; adds the time that it took to `times`."""

    def expected(self, sequence: Sequence) -> list[int]:
        """Tokens that it would have proposed where it was not asked to, if that is known for nothing."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""


class LookupProposer:
    """Proposals from a sequence's own prompt and answer."""

    def __init__(self, options: PromptLookup) -> None:
        self._options = options
        self._lookups: dict[Sequence, _C.PromptLookup] = {}
        self._found: dict[Sequence, list[int]] = {}

    def available(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[int]:
        self._found = {
            sequence: self._look_up(sequence, limit) for sequence, limit in zip(sequences, limits, strict=True)
        }
        return [len(tokens) for tokens in self._found.values()]

    def propose(self, sequences: SequenceOf[Sequence], counts: SequenceOf[int], times: StepTimes) -> list[list[int]]:
        return [self._found[sequence][:count] for sequence, count in zip(sequences, counts, strict=True)]

    def expected(self, sequence: Sequence) -> list[int]:
        return self._found[sequence]

    def forget(self, sequence: Sequence) -> None:
        self._lookups.pop(sequence, None)
        self._found.pop(sequence, None)

    def _look_up(self, sequence: Sequence, limit: int) -> list[int]:
        lookup = self._lookups.get(sequence)
        if lookup is None:
            options = self._options
            lookup = _C.PromptLookup(min_match=options.prompt_lookup_min, max_match=options.prompt_lookup_max)
            self._lookups[sequence] = lookup
        lookup.extend(sequence.tokens(lookup.num_tokens, sequence.num_tokens))
        return lookup.propose(limit)


class Speculator:
    """Chooses, collects and judges proposals."""

    def __init__(self, options: Speculation, proposer: Proposer, control: SpeculationControl) -> None:
        self.options = options
        self.stats = SpeculationStats()
        self.control = control
        self._proposer = proposer
        self._acceptances: dict[Sequence, Acceptance] = {}
        # Of the step under way.
        self._expected: dict[Sequence, list[int]] = {}

    def propose(self, sequences: SequenceOf[Sequence], num_rows: int) -> dict[Sequence, list[int]]:
        """Proposals for some of the sequences of a step, which has room for `num_rows` of them."""
        limits = [self._limit(sequence) for sequence in sequences]
        candidates = [sequence for sequence, limit in zip(sequences, limits, strict=True) if limit > 0]
        self._expected = {}
        if not candidates:
            return {}
        available = self._proposer.available(candidates, [limit for limit in limits if limit > 0])
        most = min(num_rows, MAX_PROPOSED_TOKENS)
        if self.options.adaptive:
            rates = [self._acceptance(sequence).rate for sequence in candidates]
            counts = self.control.choose(rates, available, len(sequences), most)
        else:
            counts = spread(available, most)
        self.stats.num_declined_steps = self.control.num_declined
        chosen = [(sequence, count) for sequence, count in zip(candidates, counts, strict=True) if count]
        proposals: dict[Sequence, list[int]] = {}
        if chosen:
            asked = [sequence for sequence, _ in chosen]
            found = self._proposer.propose(asked, [count for _, count in chosen], self.control.times)
            proposals = dict(zip(asked, found, strict=True))
        for sequence in candidates:
            self._expected[sequence] = proposals.get(sequence) or self._proposer.expected(sequence)
        return proposals

    def judge(
        self,
        sequences: SequenceOf[Sequence],
        token_ids: SequenceOf[int],
        counts: SequenceOf[int],
        num_proposals: SequenceOf[int],
        seconds: float | None,
    ) -> None:
        """A step drew counts[i] of the tokens for sequences[i], with num_proposals[i] proposals, in `seconds`; None if
        these say nothing about the next steps."""
        num_proposed = sum(num_proposals)
        if seconds is not None:
            self.control.times.add(len(sequences), num_proposed, seconds)
        self.stats.num_verify_steps += num_proposed > 0
        self.stats.num_proposed_tokens += num_proposed
        self.stats.num_accepted_tokens += len(token_ids) - len(sequences)
        begin = 0
        for sequence, count in zip(sequences, counts, strict=True):
            drawn = token_ids[begin : begin + count]
            begin += count
            # With fewer drawn than expected, all but the last are as expected.
            for expected, token in zip(self._expected.get(sequence, ()), drawn, strict=False):
                self._acceptance(sequence).add(expected == token)
                self.control.mean_acceptance.add(expected == token)

    def forget(self, sequence: Sequence) -> None:
        self._proposer.forget(sequence)
        self._acceptances.pop(sequence, None)
        self._expected.pop(sequence, None)

    def _limit(self, sequence: Sequence) -> int:
        """A step draws one token more than was proposed."""
        wanted = sequence.params.num_speculative_tokens
        limit = self.options.num_speculative_tokens if wanted is None else wanted
        return min(limit, sequence.params.max_tokens - len(sequence.token_ids) - 1)

    def _acceptance(self, sequence: Sequence) -> Acceptance:
        return self._acceptances.setdefault(sequence, Acceptance(self.control.mean_acceptance.rate))
