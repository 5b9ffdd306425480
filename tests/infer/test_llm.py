import gc
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from pyengine import LLM, SamplingParams
from pyengine.errors import ArgumentError, BackendUnavailable, CapacityError, ModelFileError

GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny):
    return LLM(tiny, cache_tokens=4096)


def free_pages(llm):
    return llm._runner.decoder.num_free_pages


def test_greedy_takes_the_largest_logit(llm):
    prompt = [5, 9, 200]
    completion = llm.generate([prompt], GREEDY)[0]
    ids = list(prompt)
    for token in completion.token_ids:
        assert token == int(llm.logits(ids)[-1].argmax())
        ids.append(token)
    assert completion.finish_reason == "length"
    assert completion.text == llm.tokenizer.decode(completion.token_ids)


def test_prompts_together_equal_prompts_alone(llm):
    prompts = [[i, 3 * i % 384, 7] for i in range(1, 20)]
    params = [SamplingParams(max_tokens=5 + i, temperature=i % 3, seed=i, ignore_eos=True) for i in range(19)]
    together = llm.generate(prompts, params)
    alone = [llm.generate([p], o)[0] for p, o in zip(prompts, params, strict=True)]
    assert together == alone
    assert free_pages(llm) == llm._runner.decoder.num_pages


def test_same_seed_same_text_and_other_seed_other_text(llm):
    def run(seed):
        return llm.generate("the quick", SamplingParams(max_tokens=24, temperature=1.0, seed=seed))[0].token_ids

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_stream_pieces_join_to_the_completion(llm):
    params = SamplingParams(max_tokens=40, temperature=1.2, seed=5, ignore_eos=True)
    pieces = list(llm.stream("naïve café", params))
    completion = pieces[-1].completion
    assert completion == llm.generate("naïve café", params)[0]
    assert "".join(p.text for p in pieces) == completion.text
    assert [t for p in pieces for t in p.token_ids] == completion.token_ids
    assert all(p.completion is None for p in pieces[:-1])


def test_stop_string_ends_the_text_before_it(llm):
    full = llm.generate("abc", SamplingParams(max_tokens=60, temperature=1.0, seed=9, ignore_eos=True))[0].text
    stop = full[25:29]
    cut = llm.generate("abc", SamplingParams(max_tokens=60, temperature=1.0, seed=9, ignore_eos=True, stop=(stop,)))[0]
    assert cut.finish_reason == "stop"
    assert cut.text == full[: full.index(stop)]


def test_end_token_ends_the_text_and_is_not_part_of_it(llm):
    first = llm.generate([[5, 9, 200]], GREEDY)[0].token_ids
    stopped = llm.generate([[5, 9, 200]], SamplingParams(max_tokens=20, stop_token_ids=(first[3],), ignore_eos=True))[0]
    assert stopped.token_ids == first[: first.index(first[3])]
    assert stopped.finish_reason == "stop"


def test_logprobs_are_the_raw_log_softmax(llm):
    prompt = [5, 9, 200]
    completion = llm.generate([prompt], SamplingParams(max_tokens=4, temperature=0.7, seed=1, logprobs=5))[0]
    ids = list(prompt)
    for entry in completion.logprobs:
        logits = llm.logits(ids)[-1].astype(np.float64)
        expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-5)
        assert list(entry.top) == np.argsort(-expected, kind="stable")[:5].tolist()
        assert list(entry.top.values()) == pytest.approx(np.sort(expected)[::-1][:5].tolist(), abs=1e-5)
        ids.append(entry.token_id)


def test_score_sums_the_chain(llm):
    score = llm.score([[4, 5]], [[6, 7, 8]])[0]
    logits = llm.logits([4, 5, 6, 7, 8]).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert score.logprobs == pytest.approx([logprobs[1, 6], logprobs[2, 7], logprobs[3, 8]], abs=1e-5)
    assert score.total == pytest.approx(sum(score.logprobs))


def test_chat_uses_the_template(llm):
    messages = [{"role": "user", "content": "hi"}]
    ids = llm.chat_prompt(messages)
    assert (
        llm.tokenizer.decode(ids, skip_special_tokens=False)
        == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    completion = llm.chat(messages, GREEDY)
    assert completion.prompt_token_ids == ids
    assert "".join(p.text for p in llm.chat(messages, GREEDY, stream=True)) == completion.text


def test_preemption_changes_no_bit(tiny):
    """A cache for little more than one sequence: the others wait, give their pages back, and are computed again."""
    prompts = [[i + 1, 2 * i, 3] for i in range(6)]
    params = SamplingParams(max_tokens=60, temperature=0.8, seed=4, ignore_eos=True)
    plenty = LLM(tiny, cache_tokens=4096).generate(prompts, params)
    scarce = LLM(tiny, cache_tokens=96, page_size=16)
    assert scarce.generate(prompts, params) == plenty
    assert free_pages(scarce) == scarce._runner.decoder.num_pages


def test_a_sequence_too_long_for_the_cache_fails_alone(tiny):
    llm = LLM(tiny, cache_tokens=64, page_size=16)
    with pytest.raises(CapacityError, match="cache_tokens"):
        llm.generate([[1] * 100], GREEDY)
    with pytest.raises(CapacityError, match="cache_tokens"):
        llm.generate([[1] * 50], SamplingParams(max_tokens=40, ignore_eos=True))
    assert free_pages(llm) == 4
    assert len(llm.generate([[1] * 10], GREEDY)[0].token_ids) == 20


def test_closing_a_stream_frees_its_pages(llm):
    stream = llm.stream("the", SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    assert free_pages(llm) < llm._runner.decoder.num_pages
    stream.close()
    assert free_pages(llm) == llm._runner.decoder.num_pages


def test_interleaved_streams_share_the_engine(llm):
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=2, ignore_eos=True)
    pairs = list(zip(llm.stream("one", params), llm.stream("two", params), strict=True))
    assert "".join(a.text for a, _ in pairs) == llm.generate("one", params)[0].text
    assert "".join(b.text for _, b in pairs) == llm.generate("two", params)[0].text


def test_threads_get_what_they_asked_for(llm):
    expected = [llm.generate([[i, i + 1]], GREEDY)[0] for i in range(8)]
    got = [None] * 8

    def work(i):
        got[i] = llm.generate([[i, i + 1]], GREEDY)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_two_engines_in_one_process(tiny, tiny_bf16):
    a, b = LLM(tiny), LLM(tiny_bf16)
    pairs = list(zip(a.stream("x", GREEDY), b.stream("x", GREEDY), strict=True))
    assert "".join(p.text for p, _ in pairs) == a.generate("x", GREEDY)[0].text


def test_empty_prompt_starts_from_bos(llm):
    assert llm.generate("", GREEDY)[0].prompt_token_ids == [1]


def test_max_tokens_is_cut_at_the_context(llm):
    completion = llm.generate([[3] * 250], SamplingParams(max_tokens=1000, ignore_eos=True))[0]
    assert len(completion.token_ids) == 6
    assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([384], r"prompts\[0\]: expected token ids from 0 to 383, got 384 at 0"),
        ([1, -1], r"prompts\[0\]: expected token ids from 0 to 383, got -1 at 1"),
        ([1] * 256, r"prompts\[0\]: expected at most 256 tokens with the answer, got 257"),
    ],
)
def test_bad_prompts(llm, prompt, message):
    with pytest.raises(ArgumentError, match=message):
        llm.generate([prompt], GREEDY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ("",)}, "stop"),
        ({"stop": tuple("abcdefghijklmnopq")}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": True}, "max_tokens"),
    ],
)
def test_bad_sampling_params(options, message):
    with pytest.raises(ArgumentError, match=rf"^{message}: expected .*, got "):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int3"}, "weights: expected one of"),
        ({"mode": "fast"}, "mode: 'fast' needs weights in blocks"),
        ({"kv_dtype": "int4"}, "kv_dtype"),
        ({"page_size": 17}, "page_size"),
        ({"threads": 0}, "num_threads: expected 1 to 256, got 0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
    ],
)
def test_bad_engine_options(tiny, options, message):
    with pytest.raises(ArgumentError, match=message):
        LLM(tiny, **options)


def test_mismatched_lists(llm):
    with pytest.raises(ArgumentError, match="params: expected one, or 2"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(ArgumentError, match="completions: expected 2"):
        llm.score(["a", "b"], ["c"])


def test_bad_files(tmp_path, tiny):
    with pytest.raises(ModelFileError):
        LLM(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError, match=r"config\.json"):
        LLM(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelFileError, match="magic"):
        LLM(tmp_path / "x.gguf")


def test_nan_weights_are_a_typed_error(tmp_path, tiny):
    from pyengine.formats import open_safetensors, write_safetensors

    folder = shutil.copytree(tiny, tmp_path / "nan")
    tensors = {name: np.array(tensor) for name, tensor in open_safetensors(folder / "model.safetensors").items()}
    tensors["model.norm.weight"][3] = np.nan
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(ArgumentError, match="logits"):
        LLM(folder).generate("a", GREEDY)


def test_no_template_is_a_typed_error(tmp_path, tiny):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(BackendUnavailable, match="chat template"):
        LLM(folder).chat([{"role": "user", "content": "hi"}])


@pytest.mark.slow
def test_create_and_destroy_many(tiny):
    """Nothing that a process holds grows: threads, open files, mapped regions (a few come and go with the heap)."""
    gc.collect()  # what earlier tests left would go in between
    held = []
    for _ in range(100):
        completion = LLM(tiny, cache_tokens=64).generate([[1]], SamplingParams(max_tokens=1, ignore_eos=True))[0]
        assert len(completion.token_ids) == 1
        maps = len(Path("/proc/self/maps").read_text().splitlines())
        held.append((len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), maps))
    # One lost by each of ninety engines would be ninety.
    for last, early in zip(held[-1], held[9], strict=True):
        assert last < early + 50


def test_explain_states_what_was_chosen(llm):
    llm.generate([[1]], GREEDY)
    page = str(llm.explain())
    assert "15 x float32" in page
    assert llm.explain().profile["num_steps"] > 0
