"""Adapters that PEFT wrote, served as PEFT computes them."""

import functools

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from infer.transformers_peer import from_source, greedy, logits, to_exact  # noqa: E402

from pyengine import LLM, SamplingParams  # noqa: E402
from pyengine.adapters import linear_modules, read_adapter, write_adapter  # noqa: E402
from pyengine.errors import BackendUnavailable  # noqa: E402
from pyengine.infer.source import open_source  # noqa: E402
from pyengine.quant import quantize_to_gguf  # noqa: E402
from pyengine.testing import assert_accurate  # noqa: E402
from pyengine.testing.tiny import tiny_model  # noqa: E402

# peft asks transformers by an old name; it warns of an adapter as deep as a model, and of modules that no one has.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# Model and its overrides, and what the adapter's config says; every projection of every family in one case at least.
CASES = {
    "llama": ("llama", {}, {"target_modules": ATTENTION + MLP, "r": 8, "lora_alpha": 16}),
    "llama_qv": ("llama", {}, {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 7.5}),
    "llama_rslora": ("llama", {}, {"target_modules": "all-linear", "r": 17, "lora_alpha": 4, "use_rslora": True}),
    "llama_patterns": (
        "llama",
        {"num_hidden_layers": 3},
        {
            "target_modules": ATTENTION + MLP,
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"layers.1.self_attn.q_proj": 9, "down_proj": 2, "^model.layers.0.mlp.up_proj": 33},
            "alpha_pattern": {"v_proj": 1.5, r"layers\.2\.mlp\.up_proj": 40},
        },
    ),
    "llama_layers": (
        "llama",
        {"num_hidden_layers": 3},
        {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [0, 2], "r": 8, "lora_alpha": 32},
    ),
    "llama_regex": (
        "llama",
        {},
        {
            "target_modules": r".*\.(1\.self_attn\.[qo]|0\.mlp\.(up|gate))_proj",
            "exclude_modules": ["gate_proj"],
            "r": 5,
        },
    ),
    "llama_exclude": (
        "llama",
        {},
        {"target_modules": "all-linear", "exclude_modules": ["layers.1.mlp.down_proj", "k_proj"], "r": 5},
    ),
    "llama_rank_256": ("llama", {}, {"target_modules": ["o_proj", "gate_proj"], "r": 256, "lora_alpha": 512}),
    "mistral": ("mistral", {"sliding_window": 20}, {"target_modules": "all-linear", "r": 8}),
    "qwen2": ("qwen2", {}, {"target_modules": "all-linear", "r": 8}),
    "qwen3": ("qwen3", {"head_dim": 24}, {"target_modules": "all-linear", "r": 8}),
    "smollm3": ("smollm3", {}, {"target_modules": "all-linear", "r": 8}),
    "granite": ("granite", {"residual_multiplier": 0.3}, {"target_modules": "all-linear", "r": 8}),
    "phi3": ("phi3", {"head_dim": 16}, {"target_modules": "all-linear", "r": 8}),
    "phi3_names": ("phi3", {"head_dim": 16}, {"target_modules": ["qkv_proj", *ATTENTION, "down_proj"], "r": 8}),
    "olmo2": ("olmo2", {}, {"target_modules": "all-linear", "r": 8}),
    "stablelm": ("stablelm", {}, {"target_modules": "all-linear", "r": 8}),
    "stablelm_parallel": (
        "stablelm",
        {"use_parallel_residual": True, "use_qkv_bias": True},
        {"target_modules": "all-linear", "r": 8},
    ),
    "gemma": ("gemma", {"head_dim": 24}, {"target_modules": "all-linear", "r": 8}),
    "gemma3": (
        "gemma3_text",
        {
            "tie_word_embeddings": False,
            "num_hidden_layers": 7,
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "sliding_window": 19,
        },
        {"target_modules": "all-linear", "r": 8},
    ),
}
DTYPES = [torch.float32, torch.bfloat16]


def load(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def make_adapter(base, folder, *, seed=1, dtype=torch.float32, **config):
    """Writes an adapter of random weights as PEFT does. Both halves: PEFT starts B at 0, where nothing shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {"task_type": "CAUSAL_LM", "init_lora_weights": False} | config
        model = peft.get_peft_model(load(base), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    @functools.cache
    def make(name, dtype=torch.float32):
        model_type, overrides, config = CASES[name]
        folder = tmp_path_factory.mktemp(name)
        base = tiny_model(folder / "base", model_type, dtype=dtype, **overrides)
        return base, make_adapter(base, folder / "adapter", **config)

    return make


def with_adapter(model, folder):
    return peft.PeftModel.from_pretrained(model, folder).eval()


def random_ids(count, seed):
    return torch.randint(384, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


TEXTS = [random_ids(length, seed) for length, seed in ((1, 1), (33, 2), (150, 3))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_peft(case, name, dtype):
    base, folder = case(name, dtype)
    llm = LLM(base)
    llm.load_adapter("a", folder)
    peer = with_adapter(load(base, dtype), folder)
    exact = with_adapter(to_exact(load(base), llm.spec), folder).double()
    got = torch.cat([torch.from_numpy(llm.logits(ids, adapter="a")) for ids in TEXTS])
    expected = torch.cat([logits(exact, ids) for ids in TEXTS])
    assert_accurate(got, expected, torch.cat([logits(peer, ids).float() for ids in TEXTS]))
    plain = torch.cat([torch.from_numpy(llm.logits(ids)) for ids in TEXTS])
    assert (expected - plain).abs().max() > 0.05 * expected.abs().max(), "the adapter must matter"


@pytest.mark.parametrize("name", CASES)
def test_greedy_text_is_that_of_peft(case, name):
    base, folder = case(name)
    prompts = [random_ids(length, length) for length in (1, 5, 40)]
    expected = greedy(with_adapter(load(base), folder), prompts, 64)
    llm = LLM(base, cache_tokens=1024)
    llm.load_adapter("a", folder)
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    completions = llm.generate(prompts, params, adapter="a")
    assert [completion.token_ids for completion in completions] == expected
    assert len({token for ids in expected for token in ids}) > 8, "degenerate text tests nothing"
    assert [completion.token_ids for completion in llm.generate(prompts, params)] == greedy(load(base), prompts, 64)


@pytest.mark.parametrize("weights", ["q8_0", "q4_1"])
def test_over_quantised_weights(case, tmp_path, weights):
    """A GGUF file holds the rows of q and k of a Llama in another order than PEFT's B."""
    base, folder = case("llama")
    quantize_to_gguf(base, tmp_path / "model.gguf", weights=weights, embedding=weights)
    llm = LLM(tmp_path / "model.gguf")
    llm.load_adapter("a", folder)
    source = open_source(tmp_path / "model.gguf")
    peer = with_adapter(from_source(source), folder)
    exact = with_adapter(to_exact(from_source(source), llm.spec), folder).double()
    got = torch.cat([torch.from_numpy(llm.logits(ids, adapter="a")) for ids in TEXTS])
    expected = torch.cat([logits(exact, ids) for ids in TEXTS])
    assert_accurate(got, expected, torch.cat([logits(peer, ids) for ids in TEXTS]))


def test_bfloat16_and_float16_weights_keep_their_values(case, tmp_path):
    base, _ = case("llama")
    llm = LLM(base)
    for dtype in (torch.bfloat16, torch.float16):
        folder = make_adapter(base, tmp_path / str(dtype), dtype=dtype, target_modules="all-linear", r=8)
        peer = with_adapter(load(base), folder)
        exact = with_adapter(to_exact(load(base), llm.spec), folder).double()
        llm.load_adapter(str(dtype), folder)
        got = torch.from_numpy(llm.logits(TEXTS[2], adapter=str(dtype)))
        assert_accurate(got, logits(exact, TEXTS[2]), logits(peer, TEXTS[2]))
    small, large = llm.adapters["torch.bfloat16"], llm.adapters["torch.float16"]
    assert 2 * small.num_bytes == large.num_bytes


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_we_write(case, tmp_path, name):
    base, folder = case(name)
    spec = LLM(base).spec
    read = read_adapter(folder, spec)
    write_adapter(tmp_path, spec, read.config, {m.module.name: (m.a, m.b) for m in read.modules})
    theirs, ours = (with_adapter(load(base), place).state_dict() for place in (folder, tmp_path))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    ids = TEXTS[1]
    assert torch.equal(*(logits(with_adapter(load(base), place), ids) for place in (folder, tmp_path)))
    again = read_adapter(tmp_path, spec)
    assert [m.scale for m in again.modules] == [m.scale for m in read.modules]


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3"])
def test_modules_are_those_of_transformers(case, name):
    base, _ = case(name)
    expected = {
        key: (module.out_features, module.in_features)
        for key, module in load(base).named_modules()
        if isinstance(module, torch.nn.Linear) and key != "lm_head"
    }
    modules = linear_modules(LLM(base).spec)
    assert {name: (m.num_outputs, m.num_inputs) for name, m in modules.items()} == expected


@pytest.mark.parametrize("model_type", ["gpt2", "falcon", "starcoder2", "cohere", "gpt_neox"])
def test_families_whose_files_hold_other_rows_are_refused(tmp_path, model_type):
    spec = open_source(tiny_model(tmp_path / "base", model_type)).spec
    with pytest.raises(BackendUnavailable, match="adapter"):
        linear_modules(spec)
