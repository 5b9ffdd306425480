"""Continuous batching: which tokens of which sequences the next native step computes.

Every running sequence gets its next token in every step; what is left of the token budget goes to prompts, in chunks,
those of a higher priority first, then in order of arrival. A prompt starts behind the full pages that the cache already
holds of it. When the cache is full, the last sequence in that order gives its pages back and is computed again later,
from what is left of them. Because a token's bits depend on its own sequence only, none of this changes a result.

Readings (`pyengine.infer.reading`) share queues and pages with sequences that draw, and take turns with them.
"""

from __future__ import annotations

import heapq
import itertools
import time
from bisect import insort
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pyengine.errors import ArgumentError, CapacityError
from pyengine.infer.reading import LogitsReading, Reading, RowReading
from pyengine.infer.runner import MOST_LOGITS_ROWS, Runner
from pyengine.infer.sequence import KeptPages, Sequence
from pyengine.infer.speculator import Speculator

Work = Sequence | Reading
W = TypeVar("W", Sequence, RowReading, LogitsReading)

MAX_RUNNING = 256
MAX_PRIORITY = 2**31
MAX_CACHE_SALT_BYTES = 256

# Salt, adapter and tokens of a page that others can start behind.
FirstPage = tuple[str, int, tuple[int, ...]]


def check_priority(priority: int) -> int:
    """Raises ArgumentError unless it is a whole number from -2^31 to 2^31."""
    if not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
        raise ArgumentError(f"priority: expected a whole number from -2^31 to 2^31, got {priority!r}")
    return priority


def check_salt(cache_salt: str) -> str:
    """Raises ArgumentError unless it is a string of at most 256 bytes of UTF-8."""
    expected = f"cache_salt: expected a string of at most {MAX_CACHE_SALT_BYTES} bytes of UTF-8, got "
    try:
        num_bytes = len(cache_salt.encode())
    except (AttributeError, UnicodeEncodeError):
        raise ArgumentError(expected + repr(cache_salt)) from None
    if num_bytes > MAX_CACHE_SALT_BYTES:
        raise ArgumentError(f"{expected}{num_bytes} bytes")
    return cache_salt


_Plan = list[tuple[Sequence, int, list[int]]]
"""Sequences, their native numbers and the tokens that each feeds."""


@dataclass
class SchedulerStats:
    """Counts since the model was loaded."""

    num_started_tokens: int = 0
    """Tokens of sequences when they started to run, or started again."""
    num_hit_tokens: int = 0
    """Those of them that the cache held already."""
    num_preemptions: int = 0


class Scheduler:
    """Runs sequences on one native decoder. Not thread-safe: its owner holds a lock."""

    def __init__(self, runner: Runner, *, prefix_cache: bool = True, speculator: Speculator | None = None) -> None:
        self.stats = SchedulerStats()
        self._runner = runner
        self._decoder = runner.decoder
        self._prefix_cache = prefix_cache
        self._speculator = speculator
        self._num_arrivals = itertools.count()
        # Both in order of service.
        self._waiting: list[Work] = []
        self._running: list[Work] = []
        # Those of both that are readings, and whether the next turn is theirs.
        self._readings: set[Reading] = set()
        self._reading_is_next = False
        # Pages of sequences that have ended; given back when there are too few.
        self._kept: set[KeptPages] = set()
        # The first that waits, and the free pages that were too few for it.
        self._blocked: tuple[Work | None, int] = (None, 0)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, sequence: Work) -> None:
        """Queue a sequence."""
        if isinstance(sequence, Reading):
            self._readings.add(sequence)
        sequence.order = (-sequence.priority, next(self._num_arrivals))
        insort(self._waiting, sequence, key=_order)

    def cancel(self, sequence: Work) -> None:
        """Forget a sequence and free its pages; does nothing if it has finished."""
        if isinstance(sequence, Reading):
            self._readings.discard(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._release(sequence)
        if self._speculator is not None and isinstance(sequence, Sequence):
            self._speculator.forget(sequence)

    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def step(self) -> None:
        """One native step. Each sequence that got tokens accepts them.

        An error of the step becomes the failure of the sequences in it, and of no other.
        """
        if self._reading_is_next and self._read():
            return
        self._reading_is_next = True
        plan = self._plan(Sequence, self._runner.max_tokens)
        if not plan:
            self._read()
            return
        try:
            # Beside prompts nothing is proposed: they use a wide step better.
            decodes = all(s.num_tokens - s.num_cached == 1 for s, _, _ in plan)
            self._run(plan, self._propose(plan) if decodes else {}, is_timed=decodes)
        except BaseException as error:
            # Tokens may be computed and not accepted: none of these can go on.
            for sequence, _, _ in plan:
                if not sequence.has_ended:
                    self._fail(sequence, error if isinstance(error, Exception) else RuntimeError("step: interrupted"))
            if not isinstance(error, Exception):
                raise

    def _run(self, plan: _Plan, proposals: dict[Sequence, list[int]], *, is_timed: bool) -> None:
        token_ids: list[int] = []
        slots: list[int] = []
        sampled: list[Sequence] = []
        rows: list[int] = []
        num_proposals: list[int] = []
        for sequence, slot, chunk in plan:
            guesses = proposals.get(sequence, [])
            token_ids += chunk + guesses
            slots += [slot] * (len(chunk) + len(guesses))
            sequence.num_cached += len(chunk)
            if sequence.num_cached == sequence.num_tokens:
                sampled.append(sequence)
                rows.append(len(token_ids) - len(guesses) - 1)
                num_proposals.append(len(guesses))
        start = time.perf_counter()
        tokens, logprobs, counts = self._runner.step(token_ids, slots, rows, sampled, num_proposals)
        if self._speculator is not None:
            seconds = time.perf_counter() - start
            self._speculator.judge(sampled, tokens, counts, num_proposals, seconds if is_timed else None)
        drawn = zip(tokens, logprobs, strict=True)
        for sequence, count in zip(sampled, counts, strict=True):
            # Of the proposals, the cache keeps those that were drawn.
            sequence.num_cached += count - 1
            has_ended = False
            for token, logprob in itertools.islice(drawn, count):
                has_ended = has_ended or sequence.accept(token, logprob)
            if has_ended:
                self.cancel(sequence)

    def _propose(self, plan: _Plan) -> dict[Sequence, list[int]]:
        """Tokens to verify behind the last one of some sequences, with pages claimed for them, of those left over."""
        if self._speculator is None:
            return {}
        proposals = self._speculator.propose([sequence for sequence, _, _ in plan], self._runner.max_tokens - len(plan))
        for sequence, guesses in proposals.items():
            slot = sequence.slot
            assert slot is not None
            num_kept = len(guesses)
            while self._decoder.pages_needed(slot, num_kept) > self._decoder.num_free_pages:
                num_kept -= 1
            guesses = sequence.restrict(guesses[:num_kept])
            self._decoder.grow(slot, len(guesses))
            proposals[sequence] = guesses
        return proposals

    def drop(self, pages: KeptPages) -> None:
        """Give back the pages that a sequence left behind; does nothing if they are gone."""
        if pages.slot is not None:
            self._kept.remove(pages)
            self._decoder.free_sequence(pages.slot)
            pages.slot = None

    def _read(self) -> bool:
        """One native step of readings, those of a kind; False if there is none that can go on."""
        self._reading_is_next = False
        if not self._readings:
            return False
        plan: list[tuple[RowReading, int, list[int]]] | list[tuple[LogitsReading, int, list[int]]]
        rows_first = isinstance(min(self._readings, key=_order), RowReading)
        for is_turn_of_rows in (rows_first, not rows_first):
            if is_turn_of_rows:
                plan = self._plan(RowReading, self._runner.max_tokens)
            else:
                plan = self._plan(LogitsReading, min(self._runner.max_tokens, MOST_LOGITS_ROWS))
            if plan:
                break
        else:
            return False
        try:
            self._runner.read(plan)
        except BaseException as error:
            for reading, _, _ in plan:
                self._fail(reading, error if isinstance(error, Exception) else RuntimeError("step: interrupted"))
            if not isinstance(error, Exception):
                raise
        for reading, _, _ in plan:
            if reading.has_ended:
                self.cancel(reading)
        return True

    def _plan(self, kind: type[W], budget: int) -> list[tuple[W, int, list[int]]]:
        """Sequences, their native numbers and the tokens that each feeds, with pages claimed for all of them."""
        plan: dict[W, list[int]] = {}
        num_preemptions = self.stats.num_preemptions
        can_start = True
        blocked, _ = self._blocked
        first_pages: set[FirstPage] = set()
        # One token for each that decodes, then chunks of prompts, of those that run and those that can start.
        decoding = [s for s in self._running if s.num_tokens - s.num_cached == 1]
        prompts = heapq.merge(
            [s for s in self._running if s.num_tokens - s.num_cached > 1], list(self._waiting), key=_order
        )
        for sequence in itertools.chain(decoding, prompts):
            if budget == 0:
                break
            if not isinstance(sequence, kind):
                # Pages that come free are for the first that waits for them, in whoever's turn.
                can_start = can_start and (sequence.slot is not None or sequence is not blocked)
                continue
            if sequence.slot is None:
                # One that has just given its pages back would take them again.
                can_start = can_start and self.stats.num_preemptions == num_preemptions
                if not can_start or (first_pages and self._first_page(sequence) in first_pages):
                    continue
                if not self._start(sequence):
                    can_start = sequence.failure is not None
                    continue
            chunk = sequence.pending_token_ids(budget)
            if self._claim(sequence, len(chunk)):
                plan[sequence] = chunk
                budget -= len(chunk)
                if sequence.num_cached == 0 and (first_page := self._first_page(sequence)) is not None:
                    first_pages.add(first_page)
        # Those that gave their pages back after they had been planned are left out.
        return [(sequence, sequence.slot, chunk) for sequence, chunk in plan.items() if sequence.slot is not None]

    def _first_page(self, sequence: Work) -> FirstPage | None:
        """What a page that others can start behind holds. One that begins alike waits a step until it is computed."""
        size = int(self._decoder.page_size)
        if not self._prefix_cache or len(sequence.prompt_token_ids) <= size:
            return None
        adapter_id = 0 if sequence.adapter is None else sequence.adapter.id
        return sequence.cache_salt, adapter_id, tuple(sequence.prompt_token_ids[:size])

    def _start(self, sequence: Work) -> bool:
        """Let a waiting sequence run, if all its tokens fit; those of lower priority give their pages back for it."""
        while len(self._running) == MAX_RUNNING or not self._fits(sequence):
            if not self._running:
                self._fail_too_long(sequence)
                return False
            if self._running[-1].priority >= sequence.priority:
                return False
            self._preempt(self._running[-1])
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=_order)
        self.stats.num_started_tokens += sequence.num_tokens
        self.stats.num_hit_tokens += sequence.num_cached
        return True

    def _fits(self, sequence: Work) -> bool:
        """Give it a native sequence with what the cache holds of it, if there are pages for the rest of its tokens."""
        num_free = self._decoder.num_free_pages
        blocked, num_pages = self._blocked
        if self._running and sequence is blocked and num_free <= num_pages:
            return False
        origin = sequence.origin.slot if isinstance(sequence, Sequence) and sequence.origin else None
        if origin is not None:
            slot = self._decoder.fork_sequence(origin)
            num_hit = self._decoder.length(slot)
        else:
            slot = self._decoder.add_sequence(sequence.cache_salt if self._prefix_cache else None, sequence.adapter)
            num_hit = 0
            if self._prefix_cache:
                ids = sequence.pending_token_ids(sequence.num_adoptable)
                num_hit = self._decoder.adopt_prefix(slot, np.array(ids, np.int32))
        if self._decoder.pages_needed(slot, sequence.num_tokens - num_hit) > self._decoder.num_free_pages:
            self._decoder.free_sequence(slot)
            if self._drop_kept():
                return self._fits(sequence)
            self._blocked = (sequence, num_free)
            return False
        self._blocked = (None, 0)
        sequence.slot, sequence.num_cached = slot, num_hit
        return True

    def _claim(self, sequence: Work, num_tokens: int) -> bool:
        """Claim pages, taking them from the last sequence for as long as it needs.

        False if `sequence` itself was the last.
        """
        assert sequence.slot is not None
        while self._decoder.pages_needed(sequence.slot, num_tokens) > self._decoder.num_free_pages:
            if self._drop_kept():
                continue
            victim = self._running[-1]
            if victim is sequence and len(self._running) == 1:
                self._fail_too_long(sequence)
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        self._decoder.grow(sequence.slot, num_tokens)
        return True

    def _drop_kept(self) -> bool:
        """Give back all pages that sequences left behind; whether there were any."""
        kept = list(self._kept)
        for pages in kept:
            self.drop(pages)
        return bool(kept)

    def _preempt(self, victim: Work) -> None:
        self._running.remove(victim)
        self._release(victim)
        insort(self._waiting, victim, key=_order)
        self.stats.num_preemptions += 1

    def _fail_too_long(self, sequence: Work) -> None:
        self._fail(
            sequence,
            CapacityError(
                f"key/value cache: a sequence of {sequence.num_tokens} tokens does not fit into "
                f"{self._decoder.num_pages} pages of {self._decoder.page_size} tokens; raise cache_tokens"
            ),
        )

    def _fail(self, sequence: Work, error: Exception) -> None:
        sequence.failure = error
        self.cancel(sequence)

    def _release(self, sequence: Work) -> None:
        if sequence.slot is not None:
            if isinstance(sequence, Sequence) and sequence.kept is not None and sequence.finish_reason is not None:
                sequence.kept.slot = sequence.slot
                self._kept.add(sequence.kept)
            else:
                self._decoder.free_sequence(sequence.slot)
            sequence.slot = None
            sequence.num_cached = 0


def _order(sequence: Work) -> tuple[int, int]:
    return sequence.order
