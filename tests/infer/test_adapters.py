"""Adapters of a running engine: another one per sequence, each with the bits that it has alone."""

import asyncio
import gc
import json
import os
import threading

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from infer.batches import assert_same, options, run_batch, sequences

from pyengine import _C, LLM, AsyncLLM, SamplingParams
from pyengine.cli import chat, generate, score
from pyengine.errors import ArgumentError, CapacityError, ModelFileError
from pyengine.infer import BeamSearchParams
from pyengine.infer import adapters as module
from pyengine.testing.random_adapter import write_random_adapter

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=24, temperature=0.9, seed=5, ignore_eos=True, logprobs=1)
CASES = [("float32", "exact"), ("bfloat16", "exact"), ("q8_0", "exact")]
CASES += [("q4_1", mode) for mode in ("exact", "bf16", "fast")]
NAMES = [None, "all", "qv", "wide"]
PAGE = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory, spec):
    """Three adapters of other modules, ranks, dtypes and scales."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "all": write_random_adapter(root / "all", spec, seed=1, rank=8, alpha=16),
        "qv": write_random_adapter(
            root / "qv", spec, ml_dtypes.bfloat16, seed=2, target_modules=("q_proj", "v_proj"), rank=3, std=0.3
        ),
        "wide": write_random_adapter(
            root / "wide", spec, seed=3, rank=40, use_rslora=True, rank_pattern={"up_proj": 1}
        ),
    }


@pytest.fixture
def engine(tiny, folders):
    def make(model=tiny, **overrides):
        llm = LLM(model, **({"page_size": PAGE, "cache_tokens": 4096} | overrides))
        for name, folder in folders.items():
            llm.load_adapter(name, folder)
        return llm

    return make


@pytest.fixture(autouse=True)
def _restore():
    threads, isa = _C.num_threads(), _C.active_isa()
    yield
    _C.set_num_threads(threads)
    _C.set_active_isa(isa)


def prompts(count, length=40):
    rng = np.random.default_rng(3)
    return [rng.integers(3, 384, length + i).tolist() for i in range(count)]


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "mode"), CASES)
def test_mixed_batches_chunks_and_threads_change_no_bit(engine, weights, mode):
    llm = engine(threads=1, **options(weights, mode))
    batch = sequences(17)
    names = [NAMES[(i + i // 4) % 4] for i in range(17)]
    alone = [run_batch(llm, [ids], 512, [name])[0] for ids, name in zip(batch, names, strict=True)]
    for count in (2, 3, 7, 17):
        assert_same(run_batch(llm, batch[:count], 64, names[:count]), alone[:count])
    for chunk in (1, 7, 64):
        assert_same(run_batch(llm, batch[:6], chunk, names[:6]), alone[:6])
    for threads in (2, 3):
        _C.set_num_threads(threads)
        assert_same(run_batch(llm, batch[:7], 64, names[:7]), alone[:7])
    backwards = run_batch(llm, batch[6::-1], 64, names[6::-1])
    assert_same(backwards, alone[6::-1])


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "q4_1"])
def test_every_isa_level(engine, weights):
    batch, names = sequences(6), [NAMES[i % 4] for i in range(6)]
    first = None
    for level in _C.available_isas():
        _C.set_active_isa(level)
        llm = engine(**options(weights, "exact"))
        alone = [run_batch(llm, [ids], 512, [name])[0] for ids, name in zip(batch, names, strict=True)]
        assert_same(run_batch(llm, batch, 7, names), alone)
        first = first or alone
        error = max(np.abs(a - b).max() for a, b in zip(alone, first, strict=True))
        assert error <= (0.1 if weights == "bfloat16" else 1e-4) * max(np.abs(a).max() for a in first)


def test_a_sequence_without_an_adapter_has_the_bits_of_an_engine_without_adapters(engine, tiny):
    batch = sequences(8)
    plain = LLM(tiny, cache_tokens=4096)
    names = [NAMES[i % 4] for i in range(8)]
    got = run_batch(engine(), batch, 64, names)
    for ids, name, logits in zip(batch, names, got, strict=True):
        assert (logits.tobytes() == plain.logits(ids.tolist()).tobytes()) == (name is None)


def test_equal_rows_of_the_same_text_tell_the_adapters_apart(engine):
    """Neighbours that differ in nothing but the adapter."""
    llm, ids = engine(), sequences(6)[5]
    alone = {name: llm.logits(ids.tolist(), adapter=name) for name in NAMES}
    assert len({logits.tobytes() for logits in alone.values()}) == len(NAMES)
    names = [NAMES[i % 4] for i in range(12)]
    assert_same(run_batch(llm, [ids] * 12, 16, names), [alone[name] for name in names])


def test_the_scale_is_part_of_the_adapter(tiny, spec, tmp_path):
    llm = LLM(tiny)
    for name, alpha in (("one", 8), ("two", 16), ("none", 0)):
        write_random_adapter(tmp_path / name, spec, seed=1, rank=8, alpha=alpha)
        llm.load_adapter(name, tmp_path / name)
    ids = prompts(1)[0]
    one, two, none = (llm.logits(ids, adapter=name) for name in ("one", "two", "none"))
    assert np.abs(one - two).max() > 0.01 * np.abs(one).max()
    assert np.array_equal(none, llm.logits(ids))


# --- every way to ask -------------------------------------------------------------------------------------------------


def test_generate_takes_one_for_all_or_one_per_prompt(engine):
    llm = engine()
    texts = prompts(5)
    names = ["all", None, "qv", "all", "wide"]
    together = llm.generate(texts, SAMPLED, adapter=names)
    for text, name, completion in zip(texts, names, together, strict=True):
        assert engine(prefix_cache=False).generate([text], SAMPLED, adapter=name) == [completion]
    assert llm.generate(texts, SAMPLED, adapter="qv") == [
        llm.generate([text], SAMPLED, adapter="qv")[0] for text in texts
    ]
    assert len({tuple(llm.generate(texts[0], SAMPLED, adapter=name)[0].token_ids) for name in NAMES}) == len(NAMES)


def test_stream_chat_score_logits_and_beams(engine):
    llm = engine()
    text = prompts(1)[0]
    for name in NAMES:
        completion = llm.generate([text], SAMPLED, adapter=name)[0]
        *_, last = llm.stream(text, SAMPLED, adapter=name)
        assert last.completion.token_ids == completion.token_ids
        scored = llm.score([text], [completion.token_ids], adapter=name)[0]
        assert scored.logprobs == [entry.logprob for entry in completion.logprobs]
        logits = llm.logits(text + completion.token_ids, adapter=name)[len(text) - 1 : -1].astype(np.float64)
        chosen = logits[range(len(completion.token_ids)), completion.token_ids]
        np.testing.assert_allclose(chosen - np.log(np.exp(logits).sum(-1)), scored.logprobs, atol=1e-4)
        params = SamplingParams(max_tokens=1, prompt_logprobs=1)
        seen = llm.generate([text], params, adapter=name)[0].prompt_logprobs
        assert [entry.logprob for entry in seen[1:]] == llm.score([text[:1]], [text[1:]], adapter=name)[0].logprobs
        beam = llm.beam_search([text], BeamSearchParams(beam_width=1, max_tokens=8, ignore_eos=True), adapter=name)[0]
        greedy = SamplingParams(max_tokens=8, ignore_eos=True)
        assert beam.token_ids == llm.generate([text], greedy, adapter=name)[0].token_ids
        messages = [{"role": "user", "content": "hi"}]
        answer = llm.chat(messages, GREEDY, adapter=name)
        assert answer == llm.generate([llm.chat_prompt(messages)], GREEDY, adapter=name)[0]
        *_, last = llm.chat(messages, GREEDY, stream=True, adapter=name)
        assert last.completion.token_ids == answer.token_ids
    names = ["qv", None]
    both = llm.score([text] * 2, [text[:5]] * 2, adapter=names)
    assert both == [llm.score([text], [text[:5]], adapter=name)[0] for name in names]


def test_several_completions_of_a_prompt(engine):
    llm, text = engine(), prompts(1)[0]
    params = SamplingParams(max_tokens=10, temperature=1.0, n=3, seed=2, ignore_eos=True)
    together = llm.generate([text, text], params, adapter=["all", None])
    assert together[:3] == engine(prefix_cache=False).generate([text], params, adapter="all")
    assert together[3:] == engine(prefix_cache=False).generate([text], params)


def test_async(engine):
    llm = engine()
    texts = prompts(8)
    names = [NAMES[i % 4] for i in range(8)]
    expected = llm.generate(texts, SAMPLED, adapter=names)

    async def main():
        async with AsyncLLM(llm) as front:
            got = await asyncio.gather(
                *(front.generate(t, SAMPLED, adapter=n) for t, n in zip(texts, names, strict=True))
            )
            pieces = [piece async for piece in front.stream(texts[1], SAMPLED, adapter="all")]
            info = await front.load_adapter("again", llm.adapters["qv"].path)
            again = await front.generate(texts[2], SAMPLED, adapter="again")
            front.drop_adapter("again")
            with pytest.raises(ArgumentError, match="adapter: expected the name of a loaded adapter"):
                await front.generate(texts[2], SAMPLED, adapter="again")
        return got, pieces, info, again

    got, pieces, info, again = asyncio.run(main())
    assert got == expected
    assert pieces[-1].completion.token_ids == expected[1].token_ids
    assert (info.name, info.content_id) == ("again", llm.adapters["qv"].content_id)
    assert again.token_ids == expected[2].token_ids


def test_commands(tiny, folders):
    llm = LLM(tiny)
    llm.load_adapter("a", folders["all"])

    def run(command, *arguments):
        arguments = [str(a) for a in (*arguments, "--adapter", folders["all"])]
        result = CliRunner().invoke(command, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    params = SamplingParams(max_tokens=6)
    line = json.loads(run(generate.command, tiny, "ab", "--json", "--max-tokens", 6))
    assert line["token_ids"] == llm.generate("ab", params, adapter="a")[0].token_ids
    assert (
        run(generate.command, tiny, "ab", "--max-tokens", 6) == llm.generate("ab", params, adapter="a")[0].text + "\n"
    )
    line = json.loads(run(score.command, tiny, "ab", "cd", "--json"))
    assert line["logprobs"] == llm.score(["ab"], ["cd"], adapter="a")[0].logprobs
    out = run(chat.command, tiny, "-m", "hi", "--max-tokens", 6)
    assert out == llm.chat([{"role": "user", "content": "hi"}], params, adapter="a").text + "\n"
    missing = CliRunner().invoke(generate.command, [str(tiny), "ab", "--adapter", str(tiny)])
    assert isinstance(missing.exception, ModelFileError)


def test_explain_tells_the_adapters(engine, folders):
    llm = engine()
    infos = llm.explain().adapters
    assert infos == list(llm.adapters.values())
    assert [info.name for info in infos] == ["all", "qv", "wide"]
    info = llm.adapters["qv"]
    assert (info.rank, info.num_modules, info.num_parameters) == (3, 4, 2 * 3 * (64 + 64 + 64 + 32))
    assert info.path == str(folders["qv"])
    assert f"adapter   qv: {info.path}, {info.content_id}, rank 3, 4 modules" in str(llm.explain())
    llm.generate(prompts(1), GREEDY, adapter="qv")
    assert llm.explain().profile["seconds"]["lora"] > 0


# --- the prefix cache -------------------------------------------------------------------------------------------------


def hits(llm):
    return llm.explain().prefix_cache["num_hit_tokens"]


def test_adapters_share_no_pages(engine):
    llm, text = engine(), prompts(1, 100)[0]
    for name in NAMES:
        cold = engine(prefix_cache=False).generate([text], SAMPLED, adapter=name)
        before = hits(llm)
        assert llm.generate([text], SAMPLED, adapter=name) == cold
        assert hits(llm) == before
        assert llm.generate([text], SAMPLED, adapter=name) == cold
        assert hits(llm) == before + 96


def test_scores_share_pages_with_the_generation_of_their_adapter_only(engine):
    llm, text = engine(), prompts(1, 100)[0]
    llm.generate([text], GREEDY, adapter="all")
    for name in NAMES:
        expected = engine(prefix_cache=False).score([text], [[5, 6, 7]], adapter=name)
        assert llm.score([text], [[5, 6, 7]], adapter=name) == expected


def test_another_adapter_of_the_same_name_finds_no_stale_pages(engine, folders):
    llm, text = engine(), prompts(1, 100)[0]
    first = llm.generate([text], SAMPLED, adapter="all")
    llm.drop_adapter("all")
    llm.load_adapter("all", folders["wide"])
    before = hits(llm)
    assert llm.generate([text], SAMPLED, adapter="all") == llm.generate([text], SAMPLED, adapter="wide")
    assert hits(llm) == before
    llm.drop_adapter("all")
    llm.load_adapter("all", folders["all"])
    assert llm.generate([text], SAMPLED, adapter="all") == first


def test_preemption_and_eviction_keep_the_adapter(engine):
    llm = engine(cache_tokens=16 * PAGE)
    texts = prompts(12)
    names = [NAMES[i % 4] for i in range(12)]
    expected = engine(prefix_cache=False, cache_tokens=8192).generate(texts, SAMPLED, adapter=names)
    assert llm.generate(texts, SAMPLED, adapter=names) == expected
    assert llm.explain().prefix_cache["num_preemptions"] > 0


def test_a_fork_keeps_the_adapter(engine):
    llm = engine()
    decoder, ids = llm._runner.decoder, np.array(prompts(1)[0], np.int32)
    parent = decoder.add_sequence(adapter=llm._adapters.get("all"))
    decoder.grow(parent, len(ids) - 1)
    decoder.step(ids[:-1], np.full(len(ids) - 1, parent, np.int32), np.empty(0, np.int32))
    child = decoder.fork_sequence(parent)
    decoder.free_sequence(parent)
    decoder.grow(child, 1)
    logits = np.empty((1, 384), np.float32)
    decoder.step(ids[-1:], np.array([child], np.int32), np.zeros(1, np.int32), logits=logits)
    decoder.free_sequence(child)
    assert logits.tobytes() == llm.logits(ids.tolist(), adapter="all")[-1:].tobytes()


def test_a_native_sequence_holds_its_adapter_until_it_is_freed(engine):
    llm = engine()
    decoder, native = llm._runner.decoder, llm._adapters.get("all")
    before = native.num_holders
    parents = [decoder.add_sequence(adapter=native) for _ in range(3)]
    child = decoder.fork_sequence(parents[0])
    assert native.num_holders == before + 4
    for seq in [*parents, child]:
        decoder.free_sequence(seq)
    assert native.num_holders == before
    llm.generate(prompts(5), GREEDY, adapter="all")
    assert native.num_holders == before


# --- loading and dropping ---------------------------------------------------------------------------------------------


def test_a_dropped_adapter_serves_who_began_with_it(engine):
    llm, text = engine(), prompts(1)[0]
    expected = llm.generate([text], SAMPLED, adapter="all")[0]
    stream = llm.stream(text, SAMPLED, adapter="all")
    pieces = [next(stream)]
    native = llm._adapters.get("all")
    llm.drop_adapter("all")
    assert native in llm._adapters._alive
    del native
    with pytest.raises(
        ArgumentError, match=r"^adapter: expected the name of a loaded adapter \('qv', 'wide'\), got 'all'"
    ):
        llm.generate([text], adapter="all")
    pieces += stream
    assert pieces[-1].completion.token_ids == expected.token_ids
    del stream
    gc.collect()
    assert len(llm._adapters._alive) == 2


def test_a_thousand_loads_and_drops_leave_nothing(engine, folders):
    llm, text = engine(), prompts(1)[0]
    expected = {name: llm.generate([text], GREEDY, adapter=name) for name in folders}

    def turn(i):
        name = list(folders)[i % 3]
        llm.load_adapter("turn", folders[name])
        if i % 50 == 0:
            assert llm.generate([text], GREEDY, adapter="turn") == expected[name]
        llm.drop_adapter("turn")

    def resident():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for i in range(100):
        turn(i)
    before = resident()
    for i in range(1000):
        turn(i)
    grown = resident() - before
    # One adapter is 0.3 MB: a thousand that stay would be 300.
    assert grown < 20e6
    assert len(llm._adapters._alive) == 3
    assert llm._runner.decoder.num_free_pages == llm._runner.decoder.num_pages


def test_threads_generate_while_others_load_and_drop(engine, folders):
    llm = engine()
    texts = prompts(4)
    expected = {name: llm.generate(texts, SAMPLED, adapter=name) for name in NAMES}
    failures, is_done = [], threading.Event()

    def serve(name):
        try:
            for _ in range(6):
                assert llm.generate(texts, SAMPLED, adapter=name) == expected[name]
        except BaseException as error:
            failures.append(error)

    def change(number):
        try:
            for i in range(10**6):
                if is_done.is_set():
                    return
                source = list(folders)[i % 3]
                llm.load_adapter(f"mine-{number}", folders[source])
                completion = llm.generate(texts[:1], SAMPLED, adapter=f"mine-{number}")
                llm.drop_adapter(f"mine-{number}")
                assert completion == expected[source][:1]
        except BaseException as error:
            failures.append(error)

    servers = [threading.Thread(target=serve, args=(name,)) for name in NAMES]
    changers = [threading.Thread(target=change, args=(number,)) for number in range(2)]
    for thread in servers + changers:
        thread.start()
    for thread in servers:
        thread.join()
    is_done.set()
    for thread in changers:
        thread.join()
    assert not failures, failures
    assert sorted(llm.adapters) == ["all", "qv", "wide"]


def test_names(engine, folders):
    llm = engine()
    for name in ("", "x" * 257, "a\nb", 3, None):
        with pytest.raises(ArgumentError, match=r"^name: expected 1 to 256 printable characters"):
            llm.load_adapter(name, folders["all"])
    with pytest.raises(ArgumentError, match=r"^name: expected one that is not in use, got 'all'; drop it first"):
        llm.load_adapter("all", folders["qv"])
    with pytest.raises(ArgumentError, match=r"^name: expected the name of .*'all', 'qv', 'wide'.*, got 'nobody'"):
        llm.drop_adapter("nobody")
    text = prompts(1)[0]
    for call in (
        lambda name: llm.generate([text], adapter=name),
        lambda name: llm.stream(text, adapter=name),
        lambda name: llm.chat([{"role": "user", "content": "hi"}], adapter=name),
        lambda name: llm.score([text], [text], adapter=name),
        lambda name: llm.logits(text, adapter=name),
        lambda name: llm.beam_search([text], adapter=name),
    ):
        for name in ("nobody", 7):
            with pytest.raises(
                ArgumentError, match=r"^adapter: expected the name of a loaded adapter \('all', 'qv', 'wide'\)"
            ):
                call(name)
    with pytest.raises(ArgumentError, match=r"^adapter\[1\]: expected the name of a loaded adapter"):
        llm.generate([text, text], adapter=["all", "nobody"])
    with pytest.raises(ArgumentError, match=r"^adapter: expected one, or 2, one per prompt, got 3"):
        llm.generate([text, text], adapter=["all", "all", "all"])
    for name in list(llm.adapters):
        llm.drop_adapter(name)
    with pytest.raises(ArgumentError, match=r"\(none is loaded\), got 'all'"):
        llm.generate([text], adapter="all")


def test_limits(engine, folders, monkeypatch):
    llm = engine()
    monkeypatch.setattr(module, "MAX_ADAPTERS", 4)
    llm.load_adapter("fourth", folders["qv"])
    with pytest.raises(CapacityError, match=r"^adapters: at most 4 are loaded at a time"):
        llm.load_adapter("fifth", folders["qv"])
    llm.drop_adapter("fourth")
    used = sum(info.num_bytes for info in llm.adapters.values())
    gc.collect()
    monkeypatch.setattr(module, "MAX_ADAPTER_BYTES", used + llm.adapters["qv"].num_bytes - 1)
    stream = llm.stream(prompts(1)[0], GREEDY, adapter="all")
    next(stream)
    with pytest.raises(CapacityError, match=r"^adapters: .* over the limit"):
        llm.load_adapter("fourth", folders["qv"])
    llm.drop_adapter("all")  # its request still holds the memory
    with pytest.raises(CapacityError, match=r"^adapters: .* over the limit"):
        llm.load_adapter("fourth", folders["qv"])
    list(stream)
    del stream
    gc.collect()
    llm.load_adapter("fourth", folders["qv"])


def test_loads_at_the_same_time_share_room_and_names(engine, folders, monkeypatch, tmp_path):
    """Another load comes while the first one packs its matrices."""
    llm = engine()
    used = sum(info.num_bytes for info in llm.adapters.values())
    native = module._native
    monkeypatch.setattr(module, "MAX_ADAPTER_BYTES", used + llm.adapters["qv"].num_bytes)
    monkeypatch.setattr(module, "MAX_ADAPTERS", 5)

    def beside(*arguments):
        monkeypatch.setattr(module, "_native", native)
        with pytest.raises(CapacityError, match=r"^adapters: .* over the limit"):
            llm.load_adapter("second", folders["qv"])
        with pytest.raises(ArgumentError, match=r"^name: expected one that is not in use, got 'first'"):
            llm.load_adapter("first", folders["qv"])
        monkeypatch.setattr(module, "MAX_ADAPTERS", 4)
        with pytest.raises(CapacityError, match=r"^adapters: at most 4 are loaded at a time"):
            llm.load_adapter("second", folders["qv"])
        return native(*arguments)

    monkeypatch.setattr(module, "_native", beside)
    llm.load_adapter("first", folders["qv"])
    assert sorted(llm.adapters) == ["all", "first", "qv", "wide"]
    llm.drop_adapter("first")
    gc.collect()
    for _ in range(2):  # what failed keeps no name and no room
        with pytest.raises(ModelFileError):
            llm.load_adapter("first", tmp_path)
    llm.load_adapter("first", folders["qv"])


def test_an_adapter_of_another_model_is_refused(engine, tmp_path, spec):
    from dataclasses import replace

    llm = engine()
    other = replace(spec, hidden_size=32)
    with pytest.raises(ModelFileError, match=r"expected shape \(64, 8\), got \(32, 8\)"):
        llm.load_adapter("other", write_random_adapter(tmp_path / "narrow", other, rank=8))
    other = replace(spec, num_layers=3)
    with pytest.raises(
        ModelFileError, match=r"layers.2.*expected lora_A and lora_B of linear modules of the model only"
    ):
        llm.load_adapter("other", write_random_adapter(tmp_path / "deep", other, rank=8))
    assert sorted(llm.adapters) == ["all", "qv", "wide"]


def test_native_errors(tiny):
    llm = LLM(tiny)
    a, b = np.zeros((4, 64), np.float32), np.zeros((32, 4), np.float32)
    for arguments, message in [
        ((2, "qkv", 0, a, b, 1.0), "layer: expected 0 to 1, got 2"),
        ((-1, "qkv", 0, a, b, 1.0), "layer: expected 0 to 1, got -1"),
        ((0, "head", 0, a, b, 1.0), "slot: expected qkv, o, gate_up or down, got 'head'"),
        ((0, "qkv", 97, a, b, 1.0), "offset: expected 0 to 96, got 97"),
        ((0, "qkv", -1, a, b, 1.0), "offset: expected 0 to 96, got -1"),
        ((0, "down", 0, a, b, 1.0), "a: expected 160 columns, got 64"),
        ((0, "o", 0, a, np.zeros((65, 4), np.float32), 1.0), "b: expected 1 to 64 rows, got 65"),
        ((0, "o", 0, a, np.zeros((64, 3), np.float32), 1.0), "b: expected 4 columns, the rank, got 3"),
        ((0, "o", 0, a[:0], b[:, :0], 1.0), "a: expected 1 to 256 rows, got 0"),
        ((0, "o", 0, a.astype(np.float64), b, 1.0), "a: expected"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            _C.Adapter(llm._loaded.model).add(*arguments)
    native = _C.Adapter(llm._loaded.model)
    native.add(0, "qkv", 32, a, b, 1.0)
    for offset in (1, 32, 63):
        with pytest.raises(ArgumentError, match=f"offset: expected columns that no other part adds to, got {offset}"):
            native.add(0, "qkv", offset, a, b, 1.0)
    native.add(0, "qkv", 64, a, b, 1.0)
    native.add(0, "qkv", 0, a, b, 1.0)
    seq = llm._runner.decoder.add_sequence(adapter=native)
    llm._runner.decoder.free_sequence(seq)
    with pytest.raises(ArgumentError, match="adapter: expected one that no sequence has been computed with"):
        native.add(1, "qkv", 0, a, b, 1.0)
