"""`AsyncLLM`: the engine for asyncio. One thread runs the steps of all requests; each task waits for its own."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from pyengine.errors import ArgumentError, BackendUnavailable, CapacityError
from pyengine.infer.adapters import AdapterInfo
from pyengine.infer.engine_lock import EngineLock
from pyengine.infer.llm import LLM, Prompt
from pyengine.infer.outputs import Completion, TextPiece
from pyengine.infer.sampling_params import SamplingParams
from pyengine.infer.sequence import Sequence

DEFAULT_MAX_REQUESTS = 256

_Delivery = list[TextPiece | Exception]


class AsyncLLM:
    """Many requests at a time on one model, from one or several event loops.

    Args:
        model: an LLM, or what LLM takes.
        max_requests: most requests that wait or run at a time; one more is refused with CapacityError.
        options: those of LLM, where `model` is not one.

    A request that is cancelled, or whose iterator is closed, frees its memory after the native step that is under way.
    Nothing that other requests do changes a bit of a result. Use `async with`, or call `close`.
    """

    def __init__(
        self, model: str | os.PathLike[str] | LLM, *, max_requests: int = DEFAULT_MAX_REQUESTS, **options: Any
    ) -> None:
        if not isinstance(max_requests, int) or max_requests < 1:
            raise ArgumentError(f"max_requests: expected a whole number >= 1, got {max_requests!r}")
        if isinstance(model, LLM) and options:
            raise ArgumentError(f"{next(iter(options))}: expected no options beside a loaded LLM, got one")
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._engine = _EngineThread(self.llm, max_requests)
        weakref.finalize(self, self._engine.stop)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        adapter: str | None = None,
    ) -> Completion:
        """Complete one prompt; see LLM.generate."""
        options = _Options(priority, cache_salt, adapter)
        async with contextlib.aclosing(self._pieces(prompt, params, options, is_stream=False)) as pieces:
            async for piece in pieces:
                if piece.completion is not None:
                    return piece.completion
        raise AssertionError("a request ends with a completion or an exception")

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        adapter: str | None = None,
    ) -> AsyncIterator[TextPiece]:
        """Complete one prompt piece by piece; the request starts with the first piece that is asked for."""
        return self._pieces(prompt, params, _Options(priority, cache_salt, adapter), is_stream=True)

    async def load_adapter(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        """See LLM.load_adapter. Requests run on meanwhile."""
        return await asyncio.to_thread(self.llm.load_adapter, name, path)

    def drop_adapter(self, name: str) -> None:
        """See LLM.drop_adapter."""
        self.llm.drop_adapter(name)

    @property
    def num_requests(self) -> int:
        """Requests that wait or run."""
        return self._engine.num_requests

    async def close(self) -> None:
        """End the engine thread. Requests under way fail with BackendUnavailable."""
        self._engine.stop()
        await asyncio.to_thread(self._engine.join)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _pieces(
        self, prompt: Prompt, params: SamplingParams | None, options: _Options, *, is_stream: bool
    ) -> AsyncGenerator[TextPiece, None]:
        with self._engine.place() as place:
            if params is not None and params.num_drawn != 1:
                raise ArgumentError(
                    f"n: expected 1 of each request, got {params.num_drawn}; make several, with other seeds"
                )

            def start() -> Sequence:
                return self.llm._start([prompt], params, stream=is_stream, **asdict(options))[0][0]

            # Encoding a text, compiling a grammar and scoring a prompt take a while.
            place.sequence = await asyncio.to_thread(start)
            place.is_stream = is_stream
            self._engine.submit(place)
            while True:
                item = await place.pieces.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.completion is not None:
                    return


@dataclass(frozen=True)
class _Options:
    """What a request says beside its params."""

    priority: int
    cache_salt: str
    adapter: str | None


class _Place:
    """The place of one request in the engine."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[TextPiece | Exception] = asyncio.Queue()
        """At most one piece per token of the request."""
        self.sequence: Sequence | None = None
        self.is_stream = False

    def take(self, sequence: Sequence) -> _Delivery:
        """What it has to hear now."""
        items: _Delivery = list(sequence.inbox) if self.is_stream else []
        sequence.inbox.clear()
        if sequence.finish_reason is not None and not self.is_stream:
            items.append(TextPiece("", [], sequence.completion()))
        return items if sequence.failure is None else [*items, sequence.failure]


class _EngineThread:
    """The thread that steps, and what the event loops tell it: who comes and who goes."""

    def __init__(self, llm: LLM, max_requests: int) -> None:
        self._llm = llm
        self._max_requests = max_requests
        self._pid = os.getpid()
        self._lock = EngineLock()
        self._places: set[_Place] = set()
        # (place, whether it comes or goes), or None to wake up. Its put() may be called by garbage collection.
        self._messages: queue.SimpleQueue[tuple[_Place, bool] | None] = queue.SimpleQueue()
        self._stopped: Exception | None = None
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="pyengine", daemon=True)
        self._thread.start()
        _engines.add(self)

    @property
    def num_requests(self) -> int:
        return len(self._places)

    @contextlib.contextmanager
    def place(self) -> Iterator[_Place]:
        """A place for a request, given back at the end whatever happens."""
        if os.getpid() != self._pid:
            raise BackendUnavailable("AsyncLLM: the engine thread did not survive the fork; make an engine after it")
        if self._stopped is not None:
            raise self._stopped
        place = _Place()
        with self._lock:
            if len(self._places) >= self._max_requests:
                raise CapacityError(f"max_requests: {self._max_requests} requests wait or run; try again later")
            self._places.add(place)
        try:
            yield place
        finally:
            with self._lock:
                self._places.discard(place)
            self._messages.put((place, False))

    def submit(self, place: _Place) -> None:
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
        active: dict[_Place, Sequence] = {}
        try:
            while self._stopped is None:
                self._turn(active)
        except BaseException as error:
            self._stopped = BackendUnavailable(f"AsyncLLM: the engine thread ended with {error!r}")
            self._stopped.__cause__ = error
        with self._llm._lock:
            for sequence in active.values():
                self._llm._scheduler.cancel(sequence)
        self._has_ended = True
        arrivals, _ = self._read_messages(wait=False)
        _deliver({place: [self._stopped] for place in [*active, *arrivals]})

    def _turn(self, active: dict[_Place, Sequence]) -> None:
        """Take in what the loops said, step, hand out."""
        arrivals, departures = self._read_messages(wait=not active)
        scheduler = self._llm._scheduler
        with self._llm._lock:
            for place in arrivals:
                assert place.sequence is not None
                active[place] = place.sequence
                scheduler.add(place.sequence)
            for place in departures:
                if place in active:
                    scheduler.cancel(active.pop(place))
            # Steps of callers of the LLM itself serve these requests too.
            if active and not any(sequence.inbox or sequence.has_ended for sequence in active.values()):
                scheduler.step()
            news = {place: items for place, sequence in active.items() if (items := place.take(sequence))}
        lost = _deliver(news)
        for place, sequence in list(active.items()):
            if sequence.has_ended:
                del active[place]
            elif place in lost:
                with self._llm._lock:
                    scheduler.cancel(active.pop(place))

    def _read_messages(self, *, wait: bool) -> tuple[list[_Place], list[_Place]]:
        """Who came and who went since the last call; `wait` for a message if there is none."""
        arrivals: list[_Place] = []
        departures: list[_Place] = []
        with contextlib.suppress(queue.Empty):
            message = self._messages.get(block=wait)
            while True:
                if message is not None:
                    (arrivals if message[1] else departures).append(message[0])
                message = self._messages.get_nowait()
        return arrivals, departures


def _deliver(items: dict[_Place, _Delivery]) -> list[_Place]:
    """Wakes the tasks that wait; returns the places whose event loop is closed."""
    by_loop: dict[asyncio.AbstractEventLoop, dict[_Place, _Delivery]] = {}
    for place, pieces in items.items():
        by_loop.setdefault(place.loop, {})[place] = pieces
    lost: list[_Place] = []
    for loop, part in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, part)
        except RuntimeError:
            lost += part
    return lost


def _put(items: dict[_Place, _Delivery]) -> None:
    for place, pieces in items.items():
        for piece in pieces:
            place.pieces.put_nowait(piece)


_engines: weakref.WeakSet[_EngineThread] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """A thread must not be in native code while the interpreter goes away."""
    for engine in list(_engines):
        engine.stop()
        engine.join()
