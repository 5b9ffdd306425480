"""`LLM` on tiny random models against transformers: float64 is exact, transformers in the same dtype the baseline."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from infer.transformers_peer import greedy, logits, to_exact  # noqa: E402

from pyengine import LLM, SamplingParams  # noqa: E402
from pyengine.infer import BeamSearchParams  # noqa: E402
from pyengine.testing import assert_accurate  # noqa: E402
from pyengine.testing.tiny import tiny_llama, write_tiny_tokenizer  # noqa: E402

pytestmark = pytest.mark.train

# Weights this large give attention and text that depend on the whole context.
INITIALIZER_RANGE = 0.15
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "grouped": {},
    "no_groups": {"num_key_value_heads": 4},
    "one_kv_head": {"num_key_value_heads": 1},
    "nine_over_three": {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3},
    "untied": {"tie_word_embeddings": False},
    "head_dim_64": {"head_dim": 64},
    "head_dim_80": {"head_dim": 80, "tie_word_embeddings": False},
    "theta_100000": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "large_eps": {"rms_norm_eps": 1e-2},
    "sliding_window": {"sliding_window": 19},
    "odd_intermediate": {"intermediate_size": 97},
}


def make_folder(folder, overrides, dtype):
    overrides = {"initializer_range": INITIALIZER_RANGE, "max_position_embeddings": 256} | overrides
    if "sliding_window" in overrides:
        config = transformers.MistralConfig(
            vocab_size=384, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, eos_token_id=2, **overrides,
        )  # fmt: skip
        torch.manual_seed(0)
        transformers.MistralForCausalLM(config).to(dtype).save_pretrained(folder)
        write_tiny_tokenizer(folder)
    else:
        tiny_llama(folder, **overrides)
        if dtype != torch.float32:
            load(folder, dtype).save_pretrained(folder)
    return folder


def load(folder, dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def random_ids(count, seed):
    return torch.randint(384, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(tmp_path, variant, dtype):
    folder = make_folder(tmp_path, VARIANTS[variant], dtype)
    llm = LLM(folder)
    assert set(llm.explain().weight_formats) == {str(dtype).removeprefix("torch.")}
    peer = load(folder, dtype)
    exact = to_exact(load(folder, torch.float32), llm.spec)
    for length, seed in ((1, 1), (33, 2), (150, 3)):
        ids = random_ids(length, seed)
        assert_accurate(torch.from_numpy(llm.logits(ids)), logits(exact, ids), logits(peer, ids).float())


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text_is_the_same(tmp_path, variant):
    folder = make_folder(tmp_path, VARIANTS[variant], torch.float32)
    prompts = [random_ids(length, length) for length in (1, 5, 40)]
    expected = [greedy(load(folder, torch.float32), [prompt], 64)[0] for prompt in prompts]
    completions = LLM(folder, cache_tokens=1024).generate(prompts, SamplingParams(max_tokens=64, ignore_eos=True))
    assert [completion.token_ids for completion in completions] == expected
    assert len({token for ids in expected for token in ids}) > 8, "degenerate text tests nothing"


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beam_search_is_the_same(tmp_path, length_penalty):
    folder = make_folder(tmp_path, {}, torch.float32)
    peer = load(folder, torch.float32)
    for length, width in ((1, 2), (9, 4), (40, 6)):
        prompt = random_ids(length, length)
        expected = peer.generate(
            torch.tensor([prompt]), num_beams=width, num_return_sequences=width, max_new_tokens=12, do_sample=False,
            length_penalty=length_penalty, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        params = BeamSearchParams(beam_width=width, max_tokens=12, length_penalty=length_penalty, ignore_eos=True)
        beams = LLM(folder).beam_search([prompt], params)
        assert [beam.token_ids for beam in beams] == expected.sequences[:, length:].tolist()
        scores = [beam.cumulative_logprob / 12**length_penalty for beam in beams]
        assert scores == pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)
