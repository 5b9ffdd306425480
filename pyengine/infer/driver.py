"""`Driver`: steps of the engine for callers in threads of their own. What several callers run shares the steps."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

from pyengine.infer.engine_lock import EngineLock
from pyengine.infer.outputs import TextPiece
from pyengine.infer.reading import Reading
from pyengine.infer.scheduler import MAX_RUNNING, Scheduler, Work
from pyengine.infer.sequence import KeptPages, Sequence

R = TypeVar("R", bound=Reading)

# Tokens of readings that wait, in steps: enough to fill one where some wait for others that begin alike.
_NUM_STEPS_AHEAD = 4


class Driver:
    def __init__(self, scheduler: Scheduler, lock: EngineLock, step_tokens: int) -> None:
        """`step_tokens`: most tokens of a step; `lock`: of the scheduler."""
        self._scheduler = scheduler
        self._lock = lock
        self._most_tokens = _NUM_STEPS_AHEAD * step_tokens

    def run(self, sequences: list[Sequence]) -> None:
        """Steps until all of these sequences have finished. Others that run meanwhile share the steps."""
        with self._submitted(sequences):
            running = sequences
            while running:
                with self._lock:
                    # Another caller's step may have ended the last of them.
                    running = [sequence for sequence in running if not sequence.has_ended]
                    if running:
                        self._scheduler.step()
                for sequence in running:
                    if sequence.failure is not None:
                        raise sequence.failure
            for sequence in sequences:
                if sequence.failure is not None:
                    raise sequence.failure

    def stream(self, sequences: list[Sequence]) -> Iterator[TextPiece]:
        """The same, piece by piece."""
        with self._submitted(sequences):
            running = sequences
            while running:
                with self._lock:
                    if not any(sequence.inbox or sequence.failure for sequence in running):
                        self._scheduler.step()
                    pieces = [piece for sequence in running for piece in sequence.inbox]
                    for sequence in running:
                        sequence.inbox.clear()
                yield from pieces
                for sequence in running:
                    if sequence.failure is not None:
                        raise sequence.failure
                # Another caller's step may have finished a sequence whose last pieces are still to be taken.
                running = [sequence for sequence in running if sequence.finish_reason is None or sequence.inbox]

    @contextlib.contextmanager
    def _submitted(self, sequences: list[Sequence]) -> Iterator[None]:
        """Queues sequences; takes back what is left of them at the end, which garbage collection may bring about."""
        with self._lock:
            for sequence in sequences:
                self._scheduler.add(sequence)
        try:
            yield
        finally:
            self._cancel(sequences)

    def read(self, readings: Iterable[R]) -> Iterator[R]:
        """The readings in their order, each when it has ended; `readings` is asked for more as they leave.

        Raises the failure of a reading, or an error of `readings`, behind those that came before it. Closing the
        iterator cancels the rest.
        """
        source = iter(readings)
        window: deque[R] = deque()
        end: Exception | None = None
        try:
            while end is None or window:
                arrivals: list[R] = []
                num_tokens = sum(r.num_tokens - r.num_cached for r in window if not r.has_ended)
                try:
                    while end is None and num_tokens < self._most_tokens and len(window) < MAX_RUNNING:
                        arrivals.append(next(source))
                        window.append(arrivals[-1])
                        num_tokens += arrivals[-1].num_tokens
                except Exception as error:  # StopIteration as a rule
                    end = error
                with self._lock:
                    for reading in arrivals:
                        if not reading.has_ended:
                            self._scheduler.add(reading)
                    if window and not window[0].has_ended:
                        self._scheduler.step()
                while window and window[0].has_ended:
                    reading = window.popleft()
                    if reading.failure is not None:
                        raise reading.failure
                    yield reading
            if not isinstance(end, StopIteration):
                raise end
        finally:
            self._cancel(window)

    def _cancel(self, works: Iterable[Work]) -> None:
        def cancel() -> None:
            for work in works:
                self._scheduler.cancel(work)

        self._lock.run_soon(cancel)

    def drop(self, pages: Iterable[KeptPages]) -> None:
        """Give back pages that sequences left behind."""
        with self._lock:
            for each in pages:
                self._scheduler.drop(each)
