"""Continuous batching: which tokens of which sequences the next native step computes.

Every running sequence gets its next token in every step; what is left of the token budget goes to prompts, in order of
arrival, in chunks. When the cache is full, the youngest sequence gives its pages back and is computed again later.
Because a token's bits depend on its own sequence only, none of this changes a result.
"""

from __future__ import annotations

from collections import deque

from pyengine.errors import CapacityError
from pyengine.infer.runner import Runner
from pyengine.infer.sequence import Sequence


class Scheduler:
    """Runs sequences on one native decoder. Not thread-safe: its owner holds a lock."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._decoder = runner.decoder
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence and free its pages; does nothing if it has finished."""
        if sequence in self._running:
            self._running.remove(sequence)
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._release(sequence)

    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def step(self) -> None:
        """One native step. Each sequence that got a token accepts it."""
        plan = self._plan()
        if not plan:
            return
        token_ids: list[int] = []
        slots: list[int] = []
        sampled: list[Sequence] = []
        rows: list[int] = []
        for sequence, slot, chunk in plan:
            token_ids += chunk
            slots += [slot] * len(chunk)
            sequence.num_cached += len(chunk)
            if sequence.num_cached == sequence.num_tokens:
                sampled.append(sequence)
                rows.append(len(token_ids) - 1)
        tokens, logprobs = self._runner.step(token_ids, slots, rows, sampled)
        for sequence, token, logprob in zip(sampled, tokens, logprobs, strict=True):
            if sequence.accept(token, logprob):
                self._running.remove(sequence)
                self._release(sequence)

    def _plan(self) -> list[tuple[Sequence, int, list[int]]]:
        """Sequences, their native numbers and the tokens that each feeds, with pages claimed for all of them."""
        budget = self._runner.max_tokens
        plan: dict[Sequence, list[int]] = {}
        # One token for each that decodes, then chunks for those still in their prompt; both in order of arrival.
        for sequence in sorted(self._running, key=lambda s: s.num_tokens - s.num_cached > 1):
            if budget == 0:
                break
            if sequence not in self._running:  # gave its pages to an older one
                continue
            chunk = sequence.pending_token_ids(budget)
            if self._claim(sequence, len(chunk), plan):
                plan[sequence] = chunk
                budget -= len(chunk)
        while self._waiting and budget > 0:
            sequence = self._waiting[0]
            chunk = sequence.pending_token_ids(budget)
            if self._pages_for(sequence, len(chunk)) > self._decoder.num_free_pages:
                if not self._running:
                    self._fail(sequence)
                    continue
                break
            self._waiting.popleft()
            sequence.slot = self._decoder.add_sequence()
            self._decoder.grow(sequence.slot, len(chunk))
            self._running.append(sequence)
            plan[sequence] = chunk
            budget -= len(chunk)
        return [(sequence, sequence.slot, chunk) for sequence, chunk in plan.items() if sequence.slot is not None]

    def _pages_for(self, sequence: Sequence, num_tokens: int) -> int:
        size = int(self._decoder.page_size)
        return -(-(sequence.num_cached + num_tokens) // size) - -(-sequence.num_cached // size)

    def _claim(self, sequence: Sequence, num_tokens: int, plan: dict[Sequence, list[int]]) -> bool:
        """Claim pages, taking them (and its place in the plan) from the youngest sequence for as long as it needs.

        False if `sequence` itself was the youngest.
        """
        assert sequence.slot is not None
        while self._pages_for(sequence, num_tokens) > self._decoder.num_free_pages:
            victim = self._running[-1]
            if victim is sequence and len(self._running) == 1:
                self._fail(sequence)
                return False
            self._running.pop()
            plan.pop(victim, None)
            self._release(victim)
            self._waiting.appendleft(victim)
            if victim is sequence:
                return False
        self._decoder.grow(sequence.slot, num_tokens)
        return True

    def _fail(self, sequence: Sequence) -> None:
        sequence.failure = CapacityError(
            f"key/value cache: a sequence of {sequence.num_tokens} tokens does not fit into {self._decoder.num_pages} "
            f"pages of {self._decoder.page_size} tokens; raise cache_tokens"
        )
        self.cancel(sequence)

    def _release(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._decoder.free_sequence(sequence.slot)
            sequence.slot = None
            sequence.num_cached = 0
