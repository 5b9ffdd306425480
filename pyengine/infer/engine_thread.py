"""The thread that steps for the requests of event loops."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

from pyengine.errors import BackendUnavailable, CapacityError
from pyengine.infer.engine_lock import EngineLock
from pyengine.infer.llm import LLM
from pyengine.infer.outputs import TextPiece
from pyengine.infer.scheduler import Work
from pyengine.infer.sequence import Sequence

_Delivery = list[TextPiece | Exception | None]
"""Pieces of a stream, and at the end a failure or None."""


class Place:
    """The place of one request in the engine."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.news: asyncio.Queue[TextPiece | Exception | None] = asyncio.Queue()
        """At most one piece per token of the request; None when it has ended."""
        self.works: SequenceOf[Work] = []
        self.is_stream = False

    @property
    def failure(self) -> Exception | None:
        return next((work.failure for work in self.works if work.failure is not None), None)

    @property
    def has_ended(self) -> bool:
        return self.failure is not None or all(work.has_ended for work in self.works)

    @property
    def has_news(self) -> bool:
        return self.has_ended or (self.is_stream and any(work.inbox for work in self._sequences()))

    def take(self) -> _Delivery:
        """What it has to hear now."""
        items: _Delivery = []
        for sequence in self._sequences():
            if self.is_stream:
                items += sequence.inbox
            sequence.inbox.clear()
        return [*items, self.failure] if self.has_ended else items

    def _sequences(self) -> list[Sequence]:
        return [work for work in self.works if isinstance(work, Sequence)]


class EngineThread:
    """The thread that steps, and what the event loops tell it: who comes and who goes."""

    def __init__(self, llm: LLM, max_requests: int) -> None:
        self._llm = llm
        self._max_requests = max_requests
        self._pid = os.getpid()
        self._lock = EngineLock()
        self._places: set[Place] = set()
        # (place, whether it comes or goes), or None to wake up. Its put() may be called by garbage collection.
        self._messages: queue.SimpleQueue[tuple[Place, bool] | None] = queue.SimpleQueue()
        self._stopped: Exception | None = None
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="pyengine", daemon=True)
        self._thread.start()
        _engines.add(self)

    @property
    def num_requests(self) -> int:
        return len(self._places)

    @contextlib.contextmanager
    def place(self) -> Iterator[Place]:
        """A place for a request, given back at the end whatever happens."""
        if os.getpid() != self._pid:
            raise BackendUnavailable("AsyncLLM: the engine thread did not survive the fork; make an engine after it")
        if self._stopped is not None:
            raise self._stopped
        place = Place()
        with self._lock:
            if len(self._places) >= self._max_requests:
                raise CapacityError(f"max_requests: {self._max_requests} requests wait or run; try again later")
            self._places.add(place)
        try:
            yield place
        finally:
            self._lock.run_soon(lambda: self._places.discard(place))
            self._messages.put((place, False))

    def submit(self, place: Place) -> None:
        self._messages.put((place, True))
        if self._has_ended:  # perhaps before it saw the message
            assert self._stopped is not None
            raise self._stopped

    def stop(self) -> None:
        if self._stopped is None:
            self._stopped = BackendUnavailable("AsyncLLM: the engine is closed")
        self._messages.put(None)

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        active: set[Place] = set()
        try:
            while self._stopped is None:
                self._turn(active)
        except BaseException as error:
            self._stopped = BackendUnavailable(f"AsyncLLM: the engine thread ended with {error!r}")
            self._stopped.__cause__ = error
        with self._llm._lock:
            for place in active:
                self._cancel(place)
        self._has_ended = True
        arrivals, _ = self._read_messages(wait=False)
        _deliver({place: [self._stopped] for place in [*active, *arrivals]})

    def _turn(self, active: set[Place]) -> None:
        """Take in what the loops said, step, hand out."""
        arrivals, departures = self._read_messages(wait=not active)
        scheduler = self._llm._scheduler
        with self._llm._lock:
            for place in arrivals:
                active.add(place)
                for work in place.works:
                    if not work.has_ended:
                        scheduler.add(work)
            for place in departures:
                if place in active:
                    active.remove(place)
                    self._cancel(place)
            # Steps of callers of the LLM itself serve these requests too.
            if active and not any(place.has_news for place in active):
                scheduler.step()
            news = {place: items for place in active if (items := place.take())}
            ended = [place for place in active if place.has_ended]
            for place in ended:
                active.remove(place)
                self._cancel(place)
        for place in _deliver(news):
            if place in active:
                active.remove(place)
                with self._llm._lock:
                    self._cancel(place)

    def _cancel(self, place: Place) -> None:
        for work in place.works:
            self._llm._scheduler.cancel(work)

    def _read_messages(self, *, wait: bool) -> tuple[list[Place], list[Place]]:
        """Who came and who went since the last call; `wait` for a message if there is none."""
        arrivals: list[Place] = []
        departures: list[Place] = []
        with contextlib.suppress(queue.Empty):
            message = self._messages.get(block=wait)
            while True:
                if message is not None:
                    (arrivals if message[1] else departures).append(message[0])
                message = self._messages.get_nowait()
        return arrivals, departures


def _deliver(items: dict[Place, _Delivery]) -> list[Place]:
    """Wakes the tasks that wait; returns the places whose event loop is closed."""
    by_loop: dict[asyncio.AbstractEventLoop, dict[Place, _Delivery]] = {}
    for place, pieces in items.items():
        by_loop.setdefault(place.loop, {})[place] = pieces
    lost: list[Place] = []
    for loop, part in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, part)
        except RuntimeError:
            lost += part
    return lost


def _put(items: dict[Place, _Delivery]) -> None:
    for place, pieces in items.items():
        for piece in pieces:
            place.news.put_nowait(piece)


_engines: weakref.WeakSet[EngineThread] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """A thread must not be in native code while the interpreter goes away."""
    for engine in list(_engines):
        engine.stop()
        engine.join()
