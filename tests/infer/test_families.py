"""Every family against transformers, in both directions, and between training, serving and GGUF.

float64 is exact, transformers in the same dtype the baseline.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from infer.batches import assert_same, options, run_batch, sequences  # noqa: E402
from infer.test_training_parity import assert_parity, documents  # noqa: E402
from infer.transformers_peer import greedy, logits, to_exact  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from pyengine import LLM, SamplingParams  # noqa: E402
from pyengine.calibrate import round_to_calibration  # noqa: E402
from pyengine.errors import ArgumentError, ModelFileError  # noqa: E402
from pyengine.families import FAMILIES, config_from_spec, family_of, gguf_metadata_from_spec, load_spec  # noqa: E402
from pyengine.formats import open_gguf  # noqa: E402
from pyengine.models import from_pretrained, save_pretrained  # noqa: E402
from pyengine.quant import quantize_to_gguf  # noqa: E402
from pyengine.testing import assert_accurate, assert_same_bits  # noqa: E402
from pyengine.testing.tiny import tiny_model  # noqa: E402

pytestmark = pytest.mark.train

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 64}
HALF = {"partial_rotary_factor": 0.5}
TIED = {"tie_word_embeddings": True}
MODELS = {
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", TIED),
    "qwen2_windows": (
        "qwen2",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", TIED | {"head_dim": 24}),
    "qwen3_biases": ("qwen3", {"head_dim": 32, "attention_bias": True, "num_key_value_heads": 4}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "smollm3_windows": (
        "smollm3",
        {"num_hidden_layers": 3, "no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 19},
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.4,
            "logits_scaling": 8.0,
        },
    ),
    "granite_biases": (
        "granite",
        TIED | {"residual_multiplier": 0.7, "attention_bias": True, "mlp_bias": True, "logits_scaling": 3.0},
    ),
    "phi3": ("phi3", TIED | {"head_dim": 16}),
    "phi3_partial": (
        "phi3",
        {"head_dim": 16, "num_key_value_heads": 4, "partial_rotary_factor": 0.75, "sliding_window": 150},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2_biases": ("olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
    "gemma": ("gemma", {"head_dim": 24, "seed": 1}),
    "gemma_biases": ("gemma", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": False}),
    "gemma3": (
        "gemma3_text",
        {
            "tie_word_embeddings": False,
            "num_hidden_layers": 7,
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "sliding_window": 19,
        },
    ),
    "gemma3_scaled": (
        "gemma3_text",
        {
            "tie_word_embeddings": False,
            "head_dim": 16,
            "query_pre_attn_scalar": 50,
            "sliding_window": 19,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
    ),
    "llama_yarn": ("llama", {"rope_parameters": YARN | {"factor": 4.0}}),
    "qwen3_yarn": (
        "qwen3",
        {"head_dim": 32, "rope_parameters": YARN | {"factor": 3.0, "attention_factor": 0.7}},
    ),
    "llama_yarn_untruncated": (
        "llama",
        {
            "rope_parameters": YARN
            | {"factor": 6.0, "truncate": False, "beta_fast": 8.0, "beta_slow": 0.5}
            | {"mscale": 0.7, "mscale_all_dim": 1.3}
        },
    ),
    "phi3_longrope": (
        "phi3",
        {
            "head_dim": 16,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "attention_factor": 1.25,
                "short_factor": [1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 5.0, 7.0],
                "long_factor": [1.0, 2.25, 3.5, 4.0, 9.5, 13.0, 25.0, 37.0],
            },
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt2_wide": (
        "gpt2",
        {"n_inner": 96, "activation_function": "gelu", "tie_word_embeddings": False, "initializer_range": 0.3},
    ),
    "starcoder2": ("starcoder2", {}),
    "starcoder2_windows": (
        "starcoder2",
        {"use_bias": False, "sliding_window": 19, "hidden_act": "gelu", "tie_word_embeddings": False},
    ),
    "gpt_neox": ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **HALF}}),
    "gpt_neox_serial": (
        "gpt_neox",
        {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_pytorch_tanh", **TIED},
    ),
    "stablelm": ("stablelm", {"num_hidden_layers": 3}),
    "stablelm_parallel": (
        "stablelm",
        {
            "use_parallel_residual": True,
            "use_qkv_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 1.0},
        },
    ),
    "falcon": ("falcon", {}),
    "falcon_serial": (
        "falcon",
        {"parallel_attn": False, "multi_query": False, "bias": True, "ffn_hidden_size": 96},
    ),
    "falcon_two_norms": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False, "num_hidden_layers": 3},
    ),
    "falcon_groups": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True},
    ),
    "cohere": ("cohere", {"logit_scale": 0.375}),
    "cohere_biases": (
        "cohere",
        {"attention_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": False, "head_dim": 24},
    ),
    "cohere2": ("cohere2", {"num_hidden_layers": 5, "sliding_window": 19, "logit_scale": 0.25}),
    "cohere2_types": (
        "cohere2",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 33,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
        },
    ),
    "olmo2_tied": ("olmo2", TIED | {"num_hidden_layers": 3}),
}
DTYPES = [torch.float32, torch.bfloat16]


def make(folder, name, dtype=torch.float32):
    model_type, overrides = MODELS[name]
    return tiny_model(folder, model_type, dtype=dtype, **overrides)


def load(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def random_ids(count, seed):
    return torch.randint(384, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_every_family_is_here():
    assert {MODELS[name][0] for name in MODELS} == {next(iter(family.classes)) for family in FAMILIES}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path, name, dtype):
    folder = make(tmp_path, name, dtype)
    llm = LLM(folder)
    assert set(llm.explain().weight_formats) == {str(dtype).removeprefix("torch.")}
    peer, exact = load(folder, dtype), to_exact(load(folder), llm.spec)
    texts = [random_ids(length, seed) for length, seed in ((1, 1), (33, 2), (150, 3))]
    got = torch.cat([torch.from_numpy(llm.logits(ids)) for ids in texts])
    expected = torch.cat([logits(exact, ids) for ids in texts])
    assert_accurate(got, expected, torch.cat([logits(peer, ids).float() for ids in texts]))


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_transformers(tmp_path, name):
    folder = make(tmp_path, name)
    prompts = [random_ids(length, length) for length in (1, 5, 40)]
    expected = greedy(load(folder), prompts, 64)
    completions = LLM(folder, cache_tokens=1024).generate(prompts, SamplingParams(max_tokens=64, ignore_eos=True))
    assert [completion.token_ids for completion in completions] == expected
    assert len({token for ids in expected for token in ids}) > 8, "degenerate text tests nothing"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_we_save(tmp_path, name, dtype):
    """The same tensors and the same logits, bit for bit, as the folder that transformers wrote itself."""
    folder = make(tmp_path / "theirs", name, dtype)
    save_pretrained(from_pretrained(folder, dtype=dtype), tmp_path / "ours")
    ours, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    theirs = load(folder, dtype)
    assert type(ours) is type(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert_same_bits(ours.state_dict()[key], value)
    ids = random_ids(60, 4)
    assert_same_bits(logits(ours.eval(), ids), logits(theirs, ids))
    assert load_spec(tmp_path / "ours") == load_spec(folder)


@pytest.mark.parametrize("max_context", [None, 64])
def test_the_context_of_a_model_chooses_the_factors_of_longrope(tmp_path, max_context):
    """Transformers chooses by the length of the sequence: the same where that and the context lie on one side."""
    model_type, overrides = MODELS["phi3_longrope"]
    folder = tiny_model(tmp_path, model_type, **overrides | {"original_max_position_embeddings": 64})
    llm, model = LLM(folder, max_context=max_context), from_pretrained(folder, max_context=max_context)
    ids = random_ids(max_context or 150, 7)
    exact = to_exact(load(folder), llm.spec, max_context)
    got = torch.from_numpy(llm.logits(ids))
    assert_accurate(got, logits(exact, ids), logits(load(folder), ids))
    with torch.no_grad():
        assert_same_bits(model(torch.tensor(ids)), got)
    quantize_to_gguf(folder, tmp_path / "model.gguf", weights="float32", embedding="float32")
    assert LLM(tmp_path / "model.gguf", max_context=max_context).logits(ids).tobytes() == got.numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_training_gives_the_bits_of_serving(tmp_path, name, dtype):
    folder = make(tmp_path, name, dtype)
    batch = documents(lengths=[1, 2, 33, 130])
    assert_parity(from_pretrained(folder, dtype=dtype), LLM(folder), batch)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "q4_1"])
@pytest.mark.parametrize("name", MODELS)
def test_batch_and_chunks_change_no_bit(tmp_path, name, weights):
    llm = LLM(make(tmp_path, name), **options(weights, "auto"))
    batch = sequences(6)
    alone = [run_batch(llm, [ids], chunk=512)[0] for ids in batch]
    for chunk in (1, 7, 64):
        assert_same(run_batch(llm, batch, chunk=chunk), alone)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_transformers(tmp_path, name):
    """float64 by transformers is exact, transformers in float32 the baseline."""
    folder = make(tmp_path, name)
    model = from_pretrained(folder)
    ids = torch.tensor([random_ids(31, 5)])
    exact_model, peer = to_exact(load(folder), model.spec), load(folder)
    for other in (exact_model, peer):
        out = other(ids).logits[0, :-1]
        torch.nn.functional.cross_entropy(out, ids[0, 1:], reduction="sum").backward()
    targets = torch.cat([ids[:, 1:], torch.tensor([[-100]])], 1)
    model(ids, targets=targets).sum().backward()
    own = {key: parameter.grad.numpy() for key, parameter in model.named_parameters()}
    # Transformers renames this one between file and module.
    renamed = {"embed_out.weight": "lm_head.weight"}
    grads = {
        renamed.get(stored, stored): torch.from_numpy(tensor.join({key: own[key] for key in tensor.weights}))
        for stored, tensor in family_of(model.spec).folder_tensors(model.spec).items()
    }
    exact_grads, peer_grads = (
        {key: parameter.grad for key, parameter in other.named_parameters()} for other in (exact_model, peer)
    )
    assert grads.keys() == exact_grads.keys() == peer_grads.keys()
    # One comparison, each gradient in units of its largest value: a bias alone has too few values for its largest error
    # to mean much.
    scale = {key: grad.abs().max() for key, grad in exact_grads.items()}

    def pooled(values):
        return torch.cat([(values[key].double() / scale[key]).flatten() for key in scale])

    got = pooled(grads)
    assert_accurate(got.float(), pooled(exact_grads), pooled(peer_grads).float())


GGUF_CANNOT_SAY = {
    "gemma_biases": "tie_word_embeddings",
    "llama_yarn_untruncated": "rope",
    "gpt2_wide": "activation",
    "starcoder2_windows": "sliding_window",
    "gpt_neox_serial": "tie_word_embeddings",
    "falcon_serial": "qkv_bias",
    "falcon_groups": "qkv_bias",
    "cohere_biases": "tie_word_embeddings",
    "cohere2_types": "qkv_bias",
    "gemma3_scaled": "full_attention_layers",
    "qwen2_windows": "sliding_window",
    "qwen3_biases": "qkv_bias",
    "smollm3_windows": "sliding_window",
    "olmo2_biases": "qkv_bias",
    "olmo2_tied": "tie_word_embeddings",
}
GGUF_MODELS = [name for name in MODELS if name not in GGUF_CANNOT_SAY]


@pytest.mark.parametrize("weights", ["float32", "q8_0", "q4_1"])
@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf_holds_the_model(tmp_path, name, weights):
    folder = make(tmp_path / "model", name)
    out = tmp_path / "model.gguf"
    quantize_to_gguf(folder, out, weights=weights, embedding=weights)
    from_folder, from_gguf = LLM(folder, weights=weights), LLM(out)
    # The padding token is that of the tokenizer. Norms in the file hold the sum of weight and offset.
    offset = from_folder.spec.norm_weight_offset
    same = replace(from_gguf.spec, pad_token_id=from_folder.spec.pad_token_id, norm_weight_offset=offset)
    assert same == from_folder.spec
    ids = random_ids(100, 6)
    assert from_gguf.logits(ids).tobytes() == from_folder.logits(ids).tobytes()
    if weights == "float32":
        model = from_pretrained(folder)
        for key, value in from_pretrained(out).state_dict().items():
            expected = model.state_dict()[key]
            assert_same_bits(value, expected + offset if key.endswith("norm.weight") else expected)


@pytest.mark.parametrize("weights", ["q8_0", "q4_1"])
@pytest.mark.parametrize("name", ["gpt2", "falcon", "falcon_two_norms", "cohere", "stablelm"])
def test_blocks_are_multiplied_at_their_values(tmp_path, name, weights):
    """The products of blocks prepare their input beside it: transformers has the same values in plain matrices."""
    out = tmp_path / "model.gguf"
    quantize_to_gguf(make(tmp_path / "model", name), out, weights=weights, embedding=weights)
    save_pretrained(from_pretrained(out), tmp_path / "values")
    llm, ids = LLM(out), random_ids(70, 6)
    got = torch.from_numpy(llm.logits(ids))
    exact = to_exact(load(tmp_path / "values"), llm.spec)
    assert_accurate(got, logits(exact, ids), logits(load(tmp_path / "values"), ids))


@pytest.mark.parametrize("name", ["granite", "phi3", "olmo2", "gemma3"])
def test_rounding_to_calibration_reaches_the_file(tmp_path, name):
    """The file computes what the rounded model computes, and other than rounding to nearest does."""
    folder = make(tmp_path / "model", name)
    model = from_pretrained(folder)
    nearest, calibrated = tmp_path / "nearest.gguf", tmp_path / "calibrated.gguf"
    quantize_to_gguf(folder, nearest, weights="q4_1", embedding="float32")
    rounded = round_to_calibration(model, [random_ids(200, 8)], "q4_1")
    quantize_to_gguf(folder, calibrated, weights="q4_1", embedding="float32", rounded=rounded)
    ids = torch.tensor(random_ids(40, 9))
    with torch.no_grad():
        logits = model(ids)
        assert_same_bits(from_pretrained(calibrated)(ids), logits)
        assert not torch.equal(from_pretrained(nearest)(ids), logits)


@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf_names_are_those_of_the_gguf_package(tmp_path, name):
    gguf = pytest.importorskip("gguf")
    spec = load_spec(make(tmp_path, name))
    family = family_of(spec)
    architecture = gguf.MODEL_ARCH[family.gguf_architecture.upper().replace("-", "_")]
    oracle = gguf.get_tensor_name_map(architecture, spec.num_layers)
    names, folder_names = family.gguf_tensor_names(spec), family.folder_tensor_names(spec)
    for key in spec.tensor_shapes():
        stem, _, kind = folder_names[key].rpartition(".")
        assert names[key] == f"{oracle.get_name(stem)}.{kind}"


# llama.cpp rounds gelu to 11 bits, so logits of Gemma differ by a thousandth; no choice of these texts is closer.
@pytest.mark.parametrize("name", GGUF_MODELS)
def test_llama_cpp_writes_the_same_greedy_text(tmp_path, name):
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = make(tmp_path / "model", name)
    out = tmp_path / "model.gguf"
    quantize_to_gguf(folder, out, weights="float32", embedding="float32")
    float32 = llama_cpp.GGML_TYPE_F32
    peer = llama_cpp.Llama(
        str(out), n_ctx=256, n_threads=1, logits_all=True, type_k=float32, type_v=float32, verbose=False
    )
    llm = LLM(out, cache_tokens=1024)
    for length in (1, 5, 40):
        prompt = random_ids(length, length)
        (completion,) = llm.generate([prompt], SamplingParams(max_tokens=64, ignore_eos=True))
        peer.reset()
        peer.eval(prompt)
        answer = []
        for _ in range(64):
            answer.append(int(np.argmax(peer.scores[peer.n_tokens - 1])))
            peer.eval(answer[-1:])
        assert completion.token_ids == answer


@pytest.mark.parametrize("name", MODELS)
def test_config_passes_through_transformers(tmp_path, name):
    spec = load_spec(make(tmp_path / "model", name))
    config = json.loads(json.dumps(config_from_spec(spec)))
    transformers.AutoConfig.for_model(**config).save_pretrained(tmp_path / "config")
    assert load_spec(tmp_path / "config") == spec


@pytest.mark.parametrize(("name", "field"), GGUF_CANNOT_SAY.items())
def test_what_gguf_cannot_say_is_an_error(tmp_path, name, field):
    with pytest.raises(ArgumentError, match=f"^{field}: expected"):
        gguf_metadata_from_spec(load_spec(make(tmp_path, name)))


def test_older_folders_of_gpt2_leave_a_prefix_away_and_hold_masks(tmp_path):
    folder = make(tmp_path / "new", "gpt2")
    tensors = load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 256, 256).tril() for layer in range(2)}
    shutil.copytree(folder, tmp_path / "old")
    save_file(old | masks, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    ids = random_ids(40, 8)
    expected = LLM(folder).logits(ids)
    assert LLM(tmp_path / "old").logits(ids).tobytes() == expected.tobytes()
    with torch.no_grad():
        assert_same_bits(from_pretrained(tmp_path / "old")(torch.tensor(ids)), torch.from_numpy(expected))
    del old["h.1.ln_2.bias"]
    save_file(old, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    for read in (LLM, from_pretrained):
        with pytest.raises(ModelFileError, match=r"h\.1\.ln_2\.bias"):
            read(tmp_path / "old")


def test_a_context_shorter_than_the_model_reads_the_positions_it_needs(tmp_path):
    folder = make(tmp_path, "gpt2")
    ids = random_ids(20, 8)
    assert LLM(folder, max_context=20).logits(ids).tobytes() == LLM(folder).logits(ids).tobytes()


def test_what_config_json_cannot_say_leaves_no_file(tmp_path):
    quantize_to_gguf(make(tmp_path / "model", "gemma3"), tmp_path / "model.gguf", weights="q8_0")
    with pytest.raises(
        ArgumentError, match=r"^norm_weight_offset: expected 1\.0, which config\.json can say, got 0\.0"
    ):
        save_pretrained(from_pretrained(tmp_path / "model.gguf"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra", ["blk.0.attn_q.bias", "blk.1.attn_sinks.weight", "position_embd.weight"])
def test_a_tensor_that_is_not_computed_is_an_error(tmp_path, extra):
    folder = make(tmp_path / "model", "qwen3")
    quantize_to_gguf(folder, tmp_path / "model.gguf", weights="float32", embedding="float32")
    reader = open_gguf(tmp_path / "model.gguf")
    with pytest.raises(ArgumentError, match=rf"^tensor_names: expected no .*, got '{extra}'"):
        family_of(load_spec(folder)).spec_from_gguf(reader.metadata, {*reader, extra}, {})
