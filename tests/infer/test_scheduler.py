"""The scheduler: what it does in which order, and that no order of events changes a token or loses a page."""

import gc
import os
import random
import signal
import threading
import time

import numpy as np
import pytest

from pyengine import LLM, SamplingParams
from pyengine.errors import ArgumentError, CapacityError
from pyengine.infer.engine_lock import EngineLock
from pyengine.infer.reading import TargetReading
from pyengine.infer.scheduler import MAX_RUNNING

PAGE = 16
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)


def engine(model, **options):
    return LLM(model, **({"page_size": PAGE, "cache_tokens": 4096} | options))


def add(llm, prompt, params=GREEDY, **options):
    sequence = llm._start([prompt], params, stream=True, **options)[0][0]
    llm._scheduler.add(sequence)
    return sequence


def run(llm):
    """Steps until nothing is left; how many."""
    num_steps = 0
    while not llm._scheduler.is_idle():
        llm._scheduler.step()
        num_steps += 1
        assert num_steps < 10_000
    return num_steps


def free_pages(llm):
    return llm._runner.decoder.num_free_pages


def spy(llm, monkeypatch, on_step):
    """Calls on_step(token_ids, slots, rows) before every native step."""
    step = llm._runner.step

    def wrapper(token_ids, slots, rows, *more):
        on_step(token_ids, slots, rows)
        return step(token_ids, slots, rows, *more)

    monkeypatch.setattr(llm._runner, "step", wrapper)


def test_decoding_goes_on_beside_a_long_prompt(tiny, monkeypatch):
    llm = engine(tiny, max_batch_tokens=16)
    sizes = []
    spy(llm, monkeypatch, lambda token_ids, slots, rows: sizes.append((len(token_ids), len(rows))))
    first = add(llm, [1, 2, 3])
    llm._scheduler.step()
    add(llm, list(range(3, 103)))
    llm._scheduler.step()
    while llm._scheduler._running[-1].num_cached < 100:
        before = len(first.token_ids)
        llm._scheduler.step()
        assert len(first.token_ids) == before + 1
    run(llm)
    # 100 tokens in chunks of 15 beside the one that decodes.
    assert sizes[:8] == [(3, 1)] + [(16, 1)] * 6 + [(11, 2)]


def test_higher_priority_goes_first(tiny):
    llm = engine(tiny, max_batch_tokens=16)
    low = [add(llm, [i] * 40, priority=-1) for i in range(3, 6)]
    llm._scheduler.step()
    high = add(llm, [9] * 48, priority=5)
    while not high.token_ids:
        llm._scheduler.step()
    # It overtook the prompt that was at work too.
    assert [s.num_cached for s in low] == [16, 0, 0]
    run(llm)
    assert all(s.finish_reason == "length" for s in [*low, high])


def test_higher_priority_takes_pages_from_lower(tiny):
    llm = engine(tiny, cache_tokens=8 * PAGE)
    alone = engine(tiny).generate([[3] * 60, [9] * 100], GREEDY)
    low = add(llm, [3] * 60)
    while len(low.token_ids) < 3:
        llm._scheduler.step()
    same = add(llm, [9] * 100)
    llm._scheduler.step()
    assert not same.token_ids
    assert low.slot is not None
    high = add(llm, [9] * 100, priority=1)
    llm._scheduler.step()
    assert len(high.token_ids) == 1
    assert low.slot is None
    run(llm)
    assert [low.completion(), high.completion(), same.completion()] == [*alone, alone[1]]
    assert llm._scheduler.stats.num_preemptions == 1
    assert free_pages(llm) == 8


def test_equal_priority_keeps_the_order_of_arrival(tiny):
    llm = engine(tiny, cache_tokens=4 * PAGE)
    sequences = [add(llm, [i] * 20) for i in range(3, 9)]
    ended = []
    while not llm._scheduler.is_idle():
        llm._scheduler.step()
        ended += [s for s in sequences if s.finish_reason and s not in ended]
    assert ended == sequences


@pytest.mark.parametrize("priority", [1.5, "high", 2**31 + 1, None])
def test_bad_priorities(tiny, priority):
    with pytest.raises(ArgumentError, match=r"^priority: expected a whole number"):
        engine(tiny).generate([[1]], priority=priority)


@pytest.mark.parametrize("waits", ["text", "reading"])
def test_who_waits_for_pages_is_not_overtaken_by_the_other_kind(tiny, waits):
    """A long prompt of one kind among short ones of the other, which always keep some pages."""
    llm = engine(tiny, cache_tokens=8 * PAGE, max_batch_tokens=32)
    num_short = 0

    def short():
        nonlocal num_short
        num_short += 1
        prompt = [num_short % 384] * 47
        if waits == "reading":
            return add(llm, prompt, SamplingParams(max_tokens=2 + num_short % 3, ignore_eos=True))
        reading = TargetReading(token_ids=prompt, first=0, targets=prompt)
        llm._scheduler.add(reading)
        return reading

    others = []

    def step():
        nonlocal others
        llm._scheduler.step()
        others = [work for work in others if not work.has_ended]
        others += [short() for _ in range(4 - len(others))]

    for _ in range(20):
        step()
    if waits == "text":
        long = add(llm, [7] * 120, SamplingParams(max_tokens=1, ignore_eos=True))
    else:
        long = TargetReading(token_ids=[7] * 120, first=0, targets=[7] * 120)
        llm._scheduler.add(long)
    num_before = num_short
    while not long.has_ended and num_short < 200:
        step()
    # Those that came before it end, and some start while it runs and has not asked for all its pages.
    assert num_short - num_before <= 12
    run(llm)
    assert free_pages(llm) == 8


def test_more_sequences_than_run_at_once(tiny, monkeypatch):
    llm = engine(tiny, cache_tokens=8192, max_batch_tokens=1024)
    most = []
    spy(llm, monkeypatch, lambda token_ids, slots, rows: most.append(len(rows)))
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    completions = llm.generate([[3 + i % 300] for i in range(MAX_RUNNING + 30)], params)
    assert max(most) == MAX_RUNNING
    assert all(len(c.token_ids) == 2 for c in completions)


@pytest.mark.parametrize("num_steps", range(5))
def test_cancel_at_any_point(tiny, num_steps):
    """Waiting, in its prompt, decoding, finished, and twice."""
    llm = engine(tiny, max_batch_tokens=16)
    other = add(llm, [5, 6, 7])
    victim = add(llm, [8] * 30, SamplingParams(max_tokens=2, ignore_eos=True))
    for _ in range(num_steps):
        llm._scheduler.step()
    llm._scheduler.cancel(victim)
    llm._scheduler.cancel(victim)
    assert victim.slot is None
    run(llm)
    assert other.completion() == engine(tiny).generate([[5, 6, 7]], GREEDY)[0]
    assert free_pages(llm) == llm._runner.decoder.num_pages


def test_an_error_of_a_step_fails_the_sequences_in_it(tiny, monkeypatch):
    llm = engine(tiny, max_batch_tokens=4)
    inside = [add(llm, [3, 4]), add(llm, [5, 6])]
    outside = add(llm, [7, 8])
    step = llm._runner.step

    def broken(*arguments):
        monkeypatch.setattr(llm._runner, "step", step)
        raise MemoryError("planted")

    monkeypatch.setattr(llm._runner, "step", broken)
    llm._scheduler.step()
    assert [str(s.failure) for s in inside] == ["planted"] * 2
    run(llm)
    assert outside.completion() == engine(tiny).generate([[7, 8]], GREEDY)[0]
    assert free_pages(llm) == llm._runner.decoder.num_pages


def test_an_interrupt_in_a_step_loses_no_page(tiny, monkeypatch):
    llm = engine(tiny)
    step = llm._runner.step

    def broken(*arguments):
        monkeypatch.setattr(llm._runner, "step", step)
        step(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm._runner, "step", broken)
    bystander = add(llm, [3, 4])
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2]], GREEDY)
    assert str(bystander.failure) == "step: interrupted"
    assert free_pages(llm) == llm._runner.decoder.num_pages
    assert len(llm.generate([[1, 2]], GREEDY)[0].token_ids) == 20


def test_a_fork_of_the_process_goes_on_with_the_same_bits(tiny):
    llm = engine(tiny)
    expected = llm.generate([[1, 2, 3]], GREEDY)[0].token_ids
    stream = llm.stream([1, 2, 3], GREEDY)
    got = [t for _ in range(5) for t in next(stream).token_ids]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            rest = [t for piece in stream for t in piece.token_ids]
            again = llm.generate([[1, 2, 3]], GREEDY)[0].token_ids
            code = 0 if got + rest == expected == again else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert got + [t for piece in stream for t in piece.token_ids] == expected


def test_a_fork_waits_for_the_step_of_another_thread(tiny):
    llm = engine(tiny)
    expected = llm.generate([[1, 2, 3]], GREEDY)
    stop = threading.Event()

    def work():
        while not stop.is_set():
            llm.generate([[4, 5, 6]], GREEDY)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(5):
            time.sleep(0.02)
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # a child that hangs dies of it
                code = 1
                try:
                    code = 0 if llm.generate([[1, 2, 3]], GREEDY) == expected else 2
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("kind", ["stream", "score_stream"])
def test_what_garbage_collection_cancels_inside_a_step(tiny, monkeypatch, kind):
    """The thread that collects an abandoned iterator may be the one that holds the lock."""
    llm = engine(tiny, max_batch_tokens=32)
    expected = engine(tiny).generate([[1, 2]], GREEDY)
    iterator = llm.stream([8] * 30, GREEDY) if kind == "stream" else llm.score_stream([([8] * 40, [9] * 40)] * 9)
    next(iterator)
    assert free_pages(llm) < llm._runner.decoder.num_pages
    got = []
    gc.disable()
    try:
        cycle = [iterator]
        cycle.append(cycle)
        del cycle, iterator
        steps = iter([gc.collect])
        spy(llm, monkeypatch, lambda *_: next(steps, int)())
        thread = threading.Thread(target=lambda: got.extend(llm.generate([[1, 2]], GREEDY)), daemon=True)
        thread.start()
        thread.join(60)
    finally:
        gc.enable()
    assert got == expected
    assert llm._scheduler.is_idle()
    assert free_pages(llm) == llm._runner.decoder.num_pages


def kinds_of_requests():
    """Prompts that share beginnings, with options; the same few kinds again and again."""
    rng = np.random.default_rng(3)
    stems = [rng.integers(3, 384, n).tolist() for n in (5, 33, 70)]
    kinds = []
    for i in range(18):
        prompt = stems[i % 3] + rng.integers(3, 384, int(rng.integers(1, 40))).tolist()
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 30)), temperature=float(i % 2), seed=i, ignore_eos=i % 4 > 0
        )
        kinds.append((prompt, params))
    return kinds


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_random_events(tiny, prefix_cache, monkeypatch):
    """Thousands of arrivals, cancellations, preemptions and steps on a cache that is too small for them."""
    kinds = kinds_of_requests()
    alone = engine(tiny, prefix_cache=False)
    expected = [alone.generate([prompt], params)[0] for prompt, params in kinds]
    llm = engine(tiny, cache_tokens=14 * PAGE, max_batch_tokens=48, prefix_cache=prefix_cache)
    scheduler = llm._scheduler
    rng = random.Random(5)
    budgets = []
    spy(llm, monkeypatch, lambda token_ids, slots, rows: budgets.append(len(token_ids)))
    live, num_finished, num_cancelled = [], 0, 0
    for _ in range(4000):
        event = rng.random()
        if event < 0.2 and len(live) < 30:
            kind = rng.randrange(len(kinds))
            salt = rng.choice(["", "", "tenant"])
            live.append((kind, add(llm, *kinds[kind], priority=rng.choice([0, 0, 0, 1]), cache_salt=salt)))
        elif event < 0.25 and live:
            scheduler.cancel(live.pop(rng.randrange(len(live)))[1])
            num_cancelled += 1
        elif event < 0.27 and scheduler._running:
            scheduler._preempt(rng.choice(scheduler._running))
        else:
            scheduler.step()
        held = [s for _, s in live if s.slot is not None]
        assert set(scheduler._running) == set(held)
        assert len({s.slot for s in held}) == len(held)
        for kind, sequence in [item for item in live if item[1].finish_reason]:
            assert sequence.completion() == expected[kind]
            live.remove((kind, sequence))
            num_finished += 1
    run(llm)
    for kind, sequence in live:
        assert sequence.completion() == expected[kind]
    assert free_pages(llm) == 14
    assert max(budgets) == 48
    assert num_finished > 200
    assert num_cancelled > 50
    assert scheduler.stats.num_preemptions > 100
    hits, evicted = scheduler.stats.num_hit_tokens, llm._runner.decoder.cache_stats()["num_evicted_pages"]
    assert (hits > 1000 and evicted > 100) if prefix_cache else (hits == 0 and evicted == 0)


def test_a_prompt_too_long_for_the_cache_does_not_stop_the_others(tiny):
    llm = engine(tiny, cache_tokens=4 * PAGE)
    first, bad, last = add(llm, [3] * 30), add(llm, [4] * 100), add(llm, [5] * 30)
    run(llm)
    assert isinstance(bad.failure, CapacityError)
    assert first.finish_reason == last.finish_reason == "length"
    assert free_pages(llm) == 4


def test_who_waits_for_the_engine_comes_next():
    """A thread that takes the lock again at once does not keep another one from it."""
    lock = EngineLock()
    stop = threading.Event()
    num_turns = 0

    def work():
        nonlocal num_turns
        while not stop.is_set():
            with lock:
                num_turns += 1
                time.sleep(0.001)

    thread = threading.Thread(target=work)
    thread.start()
    waits = []
    try:
        for _ in range(50):
            time.sleep(0.003)
            before = num_turns
            with lock:
                waits.append(num_turns - before)
    finally:
        stop.set()
        thread.join()
    # No turn begins while this thread waits; a few may where the machine stops it before it does.
    assert sorted(waits)[25] == 0


def test_a_call_for_a_held_lock_runs_when_it_is_let_go():
    lock = EngineLock()
    calls = []

    def call(number):
        # Two are never at work at a time, and one may ask for another.
        assert not lock._lock.acquire(blocking=False)
        calls.append(number)
        if number == 1:
            lock.run_soon(lambda: call(3))

    with lock:
        thread = threading.Thread(target=lambda: lock.run_soon(lambda: call(1)))
        thread.start()
        thread.join(60)
        lock.run_soon(lambda: call(2))
        assert calls == []
    assert calls == [1, 2, 3]
    lock.run_soon(lambda: call(4))
    assert calls == [1, 2, 3, 4]
    lock.hold()
    lock.run_soon(lambda: call(5))
    assert calls == [1, 2, 3, 4]
    lock.let_go()
    assert calls == [1, 2, 3, 4, 5]
