"""The asyncio front: the same bits beside anybody, bounded, nothing lost when requests, loops or the engine go away."""

import asyncio
import contextlib
import gc
import itertools
import os
import random
import threading

import pytest

from pyengine import LLM, AsyncLLM, SamplingParams
from pyengine.errors import ArgumentError, BackendUnavailable, CapacityError
from pyengine.infer.sequence import Sequence

GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=60, temperature=0.9, seed=3, ignore_eos=True, logprobs=1)
LONG = SamplingParams(max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny):
    return LLM(tiny, cache_tokens=1024, page_size=16)


@contextlib.asynccontextmanager
async def engine(llm, **options):
    """An engine; at the end nothing of its requests is left."""
    async with AsyncLLM(llm, **options) as it:
        yield it
    assert it.num_requests == 0
    assert llm._scheduler.is_idle()
    assert llm._runner.decoder.num_free_pages == llm._runner.decoder.num_pages


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


class Gate:
    """Lets the engine thread do some steps and stops it in the next one until it is opened."""

    def __init__(self, llm, monkeypatch, num_steps=0):
        self.is_reached, self._is_open = threading.Event(), threading.Event()
        step, counter = llm._runner.step, itertools.count()

        def wrapper(*arguments):
            if next(counter) >= num_steps:
                self.is_reached.set()
                self._is_open.wait(60)
            return step(*arguments)

        monkeypatch.setattr(llm._runner, "step", wrapper)

    def open(self):
        self._is_open.set()


def test_generate_and_stream_equal_the_synchronous_engine(llm):
    async def main():
        async with engine(llm) as it:
            pieces = [piece async for piece in it.stream("naïve café", SAMPLED)]
            return pieces, await asyncio.gather(*(it.generate([i, 2 * i, 7], SAMPLED) for i in range(1, 20)))

    pieces, completions = asyncio.run(main())
    expected = llm.generate("naïve café", SAMPLED)[0]
    assert pieces[-1].completion == expected
    assert "".join(p.text for p in pieces) == expected.text
    assert len(pieces) == 60
    assert completions == llm.generate([[i, 2 * i, 7] for i in range(1, 20)], SAMPLED)


def test_a_victim_keeps_its_bytes_beside_forty_hostile_requests(tiny):
    """Prompts as long as the context, cancellations, closed iterators, bad ids, the victim's prefix and priority."""
    prompt = [5, 9, 200] * 20
    expected = LLM(tiny).generate([prompt], SAMPLED)[0]
    llm = LLM(tiny, cache_tokens=512, page_size=16, max_batch_tokens=64)
    rng = random.Random(1)

    async def hostile(it, i):
        await asyncio.sleep(rng.random() * 0.05)
        kind = i % 5
        if kind == 0:
            await it.generate([rng.randrange(384)] * 250, LONG)
        elif kind == 1:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.random() * 0.1):
                    await it.generate(prompt[: rng.randrange(1, 60)] * 2, LONG, priority=1)
        elif kind == 2:
            async with contextlib.aclosing(it.stream("the quick " * 20, LONG)) as stream:
                async for _ in stream:
                    break
        elif kind == 3:
            with pytest.raises(ArgumentError):
                await it.generate([384], LONG)
        else:
            await it.generate(prompt, SamplingParams(max_tokens=30, temperature=2.0, seed=i), cache_salt=str(i % 2))

    async def victim(it):
        return [piece async for piece in it.stream(prompt, SAMPLED)]

    async def main():
        async with engine(llm) as it:
            for _ in range(2):
                pieces, *_ = await asyncio.gather(victim(it), *(hostile(it, i) for i in range(40)))
                assert pieces[-1].completion == expected
                assert "".join(p.text for p in pieces) == expected.text
        assert llm._scheduler.stats.num_preemptions > 0

    asyncio.run(main())


def test_cancelling_a_task_frees_its_request(llm, monkeypatch):
    async def main():
        gate = Gate(llm, monkeypatch, num_steps=3)
        async with engine(llm) as it:
            task = asyncio.create_task(it.generate([1, 2], LONG))
            await until(gate.is_reached.is_set)
            (sequence,) = llm._scheduler._running
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert it.num_requests == 0
            gate.open()
            await until(llm._scheduler.is_idle)
            assert sequence.finish_reason is None

    asyncio.run(main())


@pytest.mark.parametrize("num_pieces", [1, 5])
def test_closing_an_iterator_frees_its_request(llm, monkeypatch, num_pieces):
    async def main():
        gate = Gate(llm, monkeypatch, num_steps=num_pieces)
        async with engine(llm) as it:
            stream = it.stream([1, 2], LONG)
            for _ in range(num_pieces):
                await anext(stream)
            await until(gate.is_reached.is_set)
            (sequence,) = llm._scheduler._running
            await stream.aclose()
            gate.open()
            await until(llm._scheduler.is_idle)
            assert sequence.finish_reason is None

    asyncio.run(main())


def test_an_iterator_that_nobody_asks_has_no_request(llm):
    async def main():
        async with engine(llm) as it:
            stream = it.stream([1, 2], LONG)
            assert it.num_requests == 0
            await stream.aclose()

    asyncio.run(main())


def test_a_request_that_goes_before_it_was_seen(llm, monkeypatch):
    async def main():
        gate = Gate(llm, monkeypatch)
        async with engine(llm) as it:
            first = asyncio.create_task(it.generate([5, 9], GREEDY))
            await until(gate.is_reached.is_set)
            task = asyncio.create_task(it.generate([1, 2], LONG))
            await until(lambda: it.num_requests == 2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert it.num_requests == 1
            gate.open()
            assert len((await first).token_ids) == 20

    asyncio.run(main())


def test_one_request_too_many_is_refused_at_once(llm, monkeypatch):
    async def main():
        gate = Gate(llm, monkeypatch)
        async with engine(llm, max_requests=3) as it:
            tasks = [asyncio.create_task(it.generate([i], LONG)) for i in range(1, 4)]
            await until(lambda: it.num_requests == 3)
            with pytest.raises(CapacityError, match="max_requests: 3 requests"):
                await it.generate([9], GREEDY)
            with pytest.raises(CapacityError):
                await anext(it.stream([9], GREEDY))
            gate.open()
            assert [len(c.token_ids) for c in await asyncio.gather(*tasks)] == [200] * 3
            assert len((await it.generate([9], GREEDY)).token_ids) == 20

    asyncio.run(main())


def test_a_bad_request_fails_alone(llm):
    async def main():
        async with engine(llm) as it:
            good = asyncio.create_task(it.generate([1, 2], GREEDY))
            for prompt, options in [([384], {}), ([1] * 300, {}), ([1], {"cache_salt": 3}), ([1], {"priority": "x"})]:
                with pytest.raises(ArgumentError):
                    await it.generate(prompt, GREEDY, **options)
            assert len((await good).token_ids) == 20

    asyncio.run(main())


def test_an_error_of_a_step_reaches_every_request_in_it(llm, monkeypatch):
    step = llm._runner.step

    def broken(*arguments):
        raise MemoryError("planted")

    async def main():
        gate = Gate(llm, monkeypatch)
        async with engine(llm) as it:
            first = asyncio.create_task(it.generate([1], LONG))
            await until(gate.is_reached.is_set)
            # These arrive together, and fail together in the step after the one under way.
            tasks = [asyncio.create_task(it.generate([i], LONG)) for i in range(2, 6)]
            tasks += [asyncio.create_task(anext(it.stream([i], LONG))) for i in range(6, 9)]
            await until(lambda: it.num_requests == 8)
            monkeypatch.setattr(llm._runner, "step", broken)
            gate.open()
            errors = await asyncio.gather(first, *tasks, return_exceptions=True)
            assert [repr(error) for error in errors] == ["MemoryError('planted')"] * 8
            monkeypatch.setattr(llm._runner, "step", step)
            assert len((await it.generate([1], GREEDY)).token_ids) == 20

    asyncio.run(main())


def test_the_end_of_the_engine_thread_reaches_everybody(llm, monkeypatch):
    async def main():
        gate = Gate(llm, monkeypatch)
        async with engine(llm) as it:
            tasks = [asyncio.create_task(it.generate([i], LONG)) for i in range(1, 6)]
            await until(lambda: it.num_requests == 5 and gate.is_reached.is_set())
            monkeypatch.setattr(llm._scheduler, "step", lambda: 1 // 0)
            gate.open()
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(error, BackendUnavailable)
                assert isinstance(error.__cause__, ZeroDivisionError)
            with pytest.raises(BackendUnavailable, match="ZeroDivisionError"):
                await it.generate([1], GREEDY)

    asyncio.run(main())


def test_close_fails_what_is_under_way_and_what_comes_later(llm, monkeypatch):
    async def main():
        gate = Gate(llm, monkeypatch)
        async with engine(llm) as it:
            task = asyncio.create_task(it.generate([1], LONG))
            await until(gate.is_reached.is_set)
            late = asyncio.create_task(it.generate([2], LONG))
            await until(lambda: it.num_requests == 2)
            closing = asyncio.create_task(it.close())
            await asyncio.sleep(0)
            gate.open()
            for waiter in (task, late):
                with pytest.raises(BackendUnavailable, match="closed"):
                    await waiter
            await closing
            with pytest.raises(BackendUnavailable, match="closed"):
                await it.generate([1], GREEDY)
            await it.close()

    asyncio.run(main())
    assert len(llm.generate([[1]], GREEDY)[0].token_ids) == 20


def engine_threads():
    return sum(thread.name == "pyengine" for thread in threading.enumerate())


def test_an_engine_that_nobody_holds_ends_its_thread(llm):
    async def main():
        before = engine_threads()
        it = AsyncLLM(llm)
        await it.generate([1], GREEDY)
        assert engine_threads() == before + 1
        del it
        gc.collect()
        await until(lambda: engine_threads() == before)

    asyncio.run(main())


def test_an_event_loop_that_ends_in_the_middle(llm, monkeypatch):
    gate = Gate(llm, monkeypatch, num_steps=1)
    it = AsyncLLM(llm)
    loop = asyncio.new_event_loop()
    stream = it.stream([1], LONG)
    loop.run_until_complete(anext(stream))
    assert gate.is_reached.wait(60)
    (sequence,) = llm._scheduler._running
    loop.close()
    gate.open()

    async def main():
        assert len((await it.generate([1], GREEDY)).token_ids) == 20
        await until(llm._scheduler.is_idle)
        await it.close()

    asyncio.run(main())
    assert sequence.finish_reason is None
    with contextlib.suppress(StopIteration):  # what an event loop would do
        stream.aclose().send(None)


def test_two_event_loops_and_synchronous_callers_share_the_engine(llm):
    expected = llm.generate([[i, i + 1] for i in range(1, 7)], GREEDY)
    it = AsyncLLM(llm)
    got = [None] * 6

    def asynchronous(i):
        got[i] = asyncio.run(it.generate([i + 1, i + 2], GREEDY))

    def synchronous(i):
        got[i] = llm.generate([[i + 1, i + 2]], GREEDY)[0]

    threads = [threading.Thread(target=synchronous if i % 3 == 0 else asynchronous, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected
    asyncio.run(it.close())


def test_a_fork_has_no_engine_thread_and_says_so(llm):
    it = AsyncLLM(llm)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            asyncio.run(it.generate([1], GREEDY))
        except BackendUnavailable as error:
            code = 0 if "fork" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    asyncio.run(it.close())


def test_bad_options(llm, tiny):
    for value in (0, 1.5, "many"):
        with pytest.raises(ArgumentError, match=r"^max_requests: expected"):
            AsyncLLM(llm, max_requests=value)
    with pytest.raises(ArgumentError, match=r"^page_size: "):
        AsyncLLM(llm, page_size=16)
    with pytest.raises(ArgumentError, match=r"^page_size: "):
        AsyncLLM(tiny, page_size=17)


# --- beyond one completion ------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "naïve café"}]


def test_several_completions(llm):
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, n=3, ignore_eos=True)
    best = SamplingParams(max_tokens=12, temperature=1.0, seed=5, n=2, best_of=5, ignore_eos=True)

    async def main():
        async with engine(llm) as it:
            pieces = [piece async for piece in it.stream([7, 8], params)]
            one = it.generate([7, 8], SamplingParams(max_tokens=12, temperature=1.0, seed=5, best_of=5))
            results = await asyncio.gather(it.generate_all([7, 8], params), it.generate_all([7, 8], best), one)
            for bad, call in (
                (r"^n: expected 1, got 3; use generate_all$", it.generate([1], params)),
                (r"^best_of: expected None for a stream, got 5$", anext(it.stream([1], best))),
            ):
                with pytest.raises(ArgumentError, match=bad):
                    await call
            return pieces, *results

    pieces, several, likeliest, single = asyncio.run(main())
    assert several == llm.generate([[7, 8]], params)
    assert likeliest == llm.generate([[7, 8]], best)
    assert single.index in range(5)
    assert sorted(p.completion.index for p in pieces if p.completion) == [0, 1, 2]
    for i, expected in enumerate(several):
        mine = [piece for piece in pieces if piece.index == i]
        assert "".join(piece.text for piece in mine) == expected.text
        assert mine[-1].completion == expected


def test_chat(llm):
    async def main():
        async with engine(llm) as it:
            pieces = [piece async for piece in it.chat(MESSAGES, SAMPLED, stream=True)]
            return pieces, await it.chat(MESSAGES, SAMPLED), await it.chat(MESSAGES, GREEDY, add_nothing=1)

    pieces, answer, greedy = asyncio.run(main())
    assert answer == llm.chat(MESSAGES, SAMPLED) == pieces[-1].completion
    assert "".join(piece.text for piece in pieces) == answer.text
    assert greedy == llm.chat(MESSAGES, GREEDY)


def test_scores_and_embeddings_beside_texts(llm):
    rng = random.Random(3)
    texts = [[rng.randrange(384) for _ in range(rng.randrange(1, 90))] for _ in range(300)]
    answers = [text[: i % 4] for i, text in enumerate(texts)]
    scores, vectors = llm.score(texts, answers), llm.embed(texts, pooling="mean")
    completion = llm.generate([[5, 9]], LONG)[0]

    async def main():
        async with engine(llm) as it:
            results = await asyncio.gather(
                it.score(texts, answers),
                it.embed(texts, pooling="mean"),
                it.generate([5, 9], LONG),
                it.score([], []),
                it.embed([]),
                it.embed("ab"),
            )
            for call, message in (
                (it.score([[1]], []), "^completions: expected 1, one per prompt, got 0$"),
                (it.score([[1], [2]], [[384], [1]]), r"^completions\[0\]: expected token ids from 0 to 383"),
                (it.embed([[-1]]), r"^prompts\[0\]: expected token ids from 0 to 383"),
                (it.embed([[1]], pooling="cls"), "^pooling: "),
                (it.embed([[1] * 257]), r"^prompts\[0\]: expected at most 256 tokens"),
            ):
                with pytest.raises(ArgumentError, match=message):
                    await call
            with pytest.raises(BackendUnavailable, match="has no classifier"):
                await it.classify("ab")
            return results

    got = asyncio.run(main())
    assert got[0] == scores
    assert got[1].tobytes() == vectors.tobytes()
    assert got[2] == completion
    assert got[3] == []
    assert got[4].shape == (0, 64)
    assert got[5].tobytes() == llm.embed("ab").tobytes()


def test_cancelling_a_long_score_frees_it(llm, monkeypatch):
    async def main():
        read, reached, opened = llm._runner.read, threading.Event(), threading.Event()

        def wrapper(plan):
            reached.set()
            opened.wait(60)
            return read(plan)

        monkeypatch.setattr(llm._runner, "read", wrapper)
        async with engine(llm) as it:
            task = asyncio.create_task(it.score([[i % 384] * 99 for i in range(500)], [[1, 2]] * 500))
            await until(reached.is_set)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert it.num_requests == 0
            opened.set()
            await until(llm._scheduler.is_idle)

    asyncio.run(main())


def test_one_failed_completion_ends_all_of_its_request(llm, monkeypatch):
    step, counter = llm._runner.step, itertools.count()

    def broken(*arguments):
        if next(counter) == 3:
            raise MemoryError("planted")
        return step(*arguments)

    monkeypatch.setattr(llm._runner, "step", broken)

    async def main():
        async with engine(llm) as it:
            with pytest.raises(MemoryError, match="planted"):
                await it.generate_all([1, 2], SamplingParams(max_tokens=50, n=4, temperature=1.0, ignore_eos=True))
            assert len((await it.generate([1], GREEDY)).token_ids) == 20

    asyncio.run(main())


def test_the_others_of_a_request_go_with_the_one_that_fails(llm, monkeypatch):
    accept = Sequence.accept

    def broken(sequence, *arguments):
        if sequence.index == 1 and len(sequence.token_ids) == 3:
            sequence.failure = MemoryError("planted")
            return True
        return accept(sequence, *arguments)

    monkeypatch.setattr(Sequence, "accept", broken)

    async def main():
        async with engine(llm) as it:
            with pytest.raises(MemoryError, match="planted"):
                await it.generate_all([1, 2], SamplingParams(max_tokens=200, n=4, temperature=1.0, ignore_eos=True))
            await until(llm._scheduler.is_idle)
            assert llm.explain().profile["num_steps"] < before + 100

    before = llm.explain().profile["num_steps"]
    asyncio.run(main())
