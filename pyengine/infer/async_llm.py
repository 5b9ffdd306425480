"""`AsyncLLM`: the engine for asyncio. One thread runs the steps of all requests; each task waits for its own."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from collections.abc import Sequence as SequenceOf
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

from pyengine.errors import ArgumentError
from pyengine.infer.adapters import AdapterInfo
from pyengine.infer.engine_thread import EngineThread
from pyengine.infer.llm import LLM, best_of
from pyengine.infer.outputs import Classification, Completion, Score, TextPiece
from pyengine.infer.prompts import Prompt
from pyengine.infer.reading import Float32, PooledReading, Pooling, TargetReading
from pyengine.infer.sampling_params import SamplingParams
from pyengine.infer.scheduler import MAX_RUNNING
from pyengine.infer.sequence import Sequence
from pyengine.infer.text_reader import AdapterNames

DEFAULT_MAX_REQUESTS = 256

W = TypeVar("W", Sequence, TargetReading, PooledReading)


class AsyncLLM:
    """Many requests at a time on one model, from one or several event loops.

    Args:
        model: an LLM, or what LLM takes.
        max_requests: most requests that wait or run at a time; one more is refused with CapacityError.
        options: those of LLM, where `model` is not one.

    A request that is cancelled, or whose iterator is closed, frees its memory after the native step that is under way.
    Its `prompt_logprobs` are the exception: they are computed before it starts, and to the end in any case.
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
        self._engine = EngineThread(self.llm, max_requests)
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
        if params is not None and params.n != 1:
            raise ArgumentError(f"n: expected 1, got {params.n}; use generate_all")
        return (await self.generate_all(prompt, params, priority=priority, cache_salt=cache_salt, adapter=adapter))[0]

    async def generate_all(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        adapter: str | None = None,
    ) -> list[Completion]:
        """The n completions of one prompt."""

        def start() -> list[Sequence]:
            return self.llm._start(
                [prompt], params, stream=False, priority=priority, cache_salt=cache_salt, adapter=adapter
            )[0]

        return best_of(await self._run(start))

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        adapter: str | None = None,
    ) -> AsyncIterator[TextPiece]:
        """Complete one prompt piece by piece; the request starts with the first piece that is asked for.

        The pieces of n completions come mixed; `index` tells which one a piece belongs to.
        """
        return self._pieces(lambda: prompt, params, priority=priority, cache_salt=cache_salt, adapter=adapter)

    @overload
    def chat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        params: SamplingParams | None = ...,
        *,
        stream: Literal[False] = ...,
        adapter: str | None = ...,
        **variables: Any,
    ) -> Awaitable[Completion]: ...
    @overload
    def chat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        params: SamplingParams | None = ...,
        *,
        stream: Literal[True],
        adapter: str | None = ...,
        **variables: Any,
    ) -> AsyncIterator[TextPiece]: ...
    def chat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        adapter: str | None = None,
        **variables: Any,
    ) -> Awaitable[Completion] | AsyncIterator[TextPiece]:
        """Answer a conversation: await it, or iterate over its pieces with `stream`; see LLM.chat."""

        def prompt() -> list[int]:
            return self.llm.chat_prompt(messages, **variables)

        if stream:
            return self._pieces(prompt, params, priority=0, cache_salt="", adapter=adapter)

        def start() -> list[Sequence]:
            return self.llm._start([prompt()], params, stream=False, adapter=adapter)[0]

        async def answer() -> Completion:
            return best_of(await self._run(start))[0]

        return answer()

    async def score(
        self,
        prompts: SequenceOf[Prompt],
        completions: SequenceOf[Prompt],
        *,
        priority: int = 0,
        cache_salt: str = "",
        adapter: AdapterNames = None,
    ) -> list[Score]:
        """Log-probability of every token of each completion after its prompt; see LLM.score."""

        def start() -> list[TargetReading]:
            return self.llm._score_readings(
                prompts, completions, priority=priority, cache_salt=cache_salt, adapter=adapter
            )

        return [reading.score() for reading in await self._run(start)]

    async def embed(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        priority: int = 0,
        cache_salt: str = "",
        adapter: AdapterNames = None,
    ) -> Float32:
        """One vector for each text: float32 [len(prompts), hidden_size]; see LLM.embed."""

        def start() -> list[PooledReading]:
            return self.llm._embed_readings(
                prompts, pooling=pooling, priority=priority, cache_salt=cache_salt, adapter=adapter
            )

        return self.llm._embeddings(await self._run(start), normalize)

    async def classify(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        *,
        priority: int = 0,
        cache_salt: str = "",
        adapter: AdapterNames = None,
    ) -> list[Classification]:
        """What the classifier of the model says about each text; see LLM.classify."""

        def start() -> list[PooledReading]:
            return self.llm._classify_readings(prompts, priority=priority, cache_salt=cache_salt, adapter=adapter)

        return self.llm._classifications(await self._run(start))

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

    async def _run(self, start: Callable[[], list[W]]) -> list[W]:
        """Sequences or readings that have ended. `start` makes them, in a thread: encoding a text, compiling a grammar
        and scoring a prompt take a while."""
        with self._engine.place() as place:
            works = await asyncio.to_thread(start)
            # What the scheduler holds of one request stays bounded.
            for begin in range(0, len(works), MAX_RUNNING):
                place.works = works[begin : begin + MAX_RUNNING]
                self._engine.submit(place)
                item = await place.news.get()
                if isinstance(item, Exception):
                    raise item
            return works

    async def _pieces(
        self,
        prompt: Callable[[], Prompt],
        params: SamplingParams | None,
        *,
        priority: int,
        cache_salt: str,
        adapter: str | None,
    ) -> AsyncGenerator[TextPiece, None]:
        if params is not None and params.best_of is not None:
            raise ArgumentError(f"best_of: expected None for a stream, got {params.best_of}")

        def start() -> list[Sequence]:
            return self.llm._start(
                [prompt()], params, stream=True, priority=priority, cache_salt=cache_salt, adapter=adapter
            )[0]

        with self._engine.place() as place:
            place.works = await asyncio.to_thread(start)
            place.is_stream = True
            self._engine.submit(place)
            while True:
                item = await place.news.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    return
                yield item
