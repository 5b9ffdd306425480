"""What each family refuses, by the key or field that says it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pyengine.errors import ArgumentError
from pyengine.families import (
    FAMILIES,
    config_from_spec,
    family_of,
    gguf_metadata_from_spec,
    spec_from_config,
    spec_from_gguf,
    stacked_weights,
    stored_rows,
    stored_shapes,
)
from pyengine.testing.random_model import make_spec

CONFIG: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("model_type", "key", "extra"),
    [
        ("qwen2", "attention_bias", {"attention_bias": True}),
        ("qwen2", "sliding_window", {"use_sliding_window": True, "sliding_window": "4096", "max_window_layers": 1}),
        ("qwen2", "max_window_layers", {"use_sliding_window": True, "max_window_layers": 1.5}),
        ("qwen2", "layer_types", {"layer_types": ["full_attention"] * 2}),
        ("qwen2", "layer_types", {"layer_types": ["sliding_attention"] * 3}),  # without use_sliding_window
        ("qwen2", "layer_types", {"layer_types": ["linear_attention"] * 3}),
        ("qwen2", "use_sliding_window", {"use_sliding_window": 1}),
        ("qwen2", "partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("qwen3", "mlp_bias", {"mlp_bias": True}),
        ("qwen3", "num_experts", {"num_experts": 64}),
        ("smollm3", "no_rope_layers", {"no_rope_layers": [1, 0]}),
        ("smollm3", "no_rope_layers", {"no_rope_layers": [1, 0, 2]}),
        ("smollm3", "no_rope_layers", {"no_rope_layers": "none"}),
        ("smollm3", "no_rope_layer_interval", {"no_rope_layer_interval": 0}),
        ("granite", "attention_multiplier", {"attention_multiplier": "0.5"}),
        ("granite", "residual_multiplier", {"residual_multiplier": float("nan")}),
        ("granite", "logits_divisor", {"logits_scaling": 0.0}),
        ("phi3", "rope_scaling.short_factor", {"rope_scaling": {"type": "longrope"}}),
        ("phi3", "rope_scaling.rope_type", {"rope_scaling": {"type": "yarn", "factor": 2.0}}),
        ("phi3", "partial_rotary_factor", {"partial_rotary_factor": 1.5}),
        ("phi3", "rope_parameters.partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": -0.5}}),
        (
            "phi3",
            "rope_parameters.partial_rotary_factor",
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}},
        ),
        ("phi3", "rotary_dim", {"partial_rotary_factor": 0.2}),
        ("gemma", "hidden_activation", {"hidden_activation": "silu"}),
        ("gemma", "hidden_act", {"hidden_act": ["gelu"]}),
        ("gemma3_text", "attn_logit_softcapping", {"attn_logit_softcapping": 50.0}),
        ("gemma3_text", "final_logit_softcapping", {"final_logit_softcapping": 30.0}),
        ("gemma3_text", "use_bidirectional_attention", {"use_bidirectional_attention": True}),
        ("gemma3_text", "hidden_activation", {"hidden_activation": "silu"}),
        ("gemma3_text", "query_pre_attn_scalar", {"query_pre_attn_scalar": 0}),
        ("gemma3_text", "sliding_window_pattern", {"sliding_window_pattern": 0}),
        ("gemma3_text", "rope_parameters.rope_theta", {"rope_parameters": {"rope_theta": 1e4}}),
        ("gpt2", "n_embd", {"n_embd": "64"}),
        ("gpt2", "n_inner", {"n_inner": 2.5}),
        ("gpt2", "activation_function", {"activation_function": "relu"}),
        ("gpt2", "activation_function", {"activation_function": ["gelu"]}),
        ("gpt2", "scale_attn_by_inverse_layer_idx", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", "scale_attn_weights", {"scale_attn_weights": False}),
        ("gpt2", "add_cross_attention", {"add_cross_attention": True}),
        ("starcoder2", "hidden_act", {"hidden_act": "silu"}),
        ("starcoder2", "use_bias", {"use_bias": 1}),
        ("starcoder2", "sliding_window", {"sliding_window": 0}),
        ("gpt_neox", "use_parallel_residual", {"use_parallel_residual": 1}),
        ("gpt_neox", "rotary_emb_base", {"rotary_emb_base": "1e4"}),
        ("gpt_neox", "partial_rotary_factor", {"rotary_pct": 2.0}),
        ("gpt_neox", "hidden_act", {"hidden_act": "relu"}),
        ("stablelm", "qk_layernorm", {"qk_layernorm": True}),
        ("stablelm", "use_qkv_bias", {"use_qkv_bias": "yes"}),
        ("stablelm", "partial_rotary_factor", {"partial_rotary_factor": -0.5}),
        ("falcon", "alibi", {"alibi": True}),
        ("falcon", "parallel_attn", {"parallel_attn": False, "new_decoder_architecture": True}),
        ("falcon", "num_ln_in_parallel_attn", {"num_ln_in_parallel_attn": 2}),
        ("falcon", "num_ln_in_parallel_attn", {"num_ln_in_parallel_attn": 3, "new_decoder_architecture": True}),
        ("falcon", "num_kv_heads", {"num_kv_heads": 3, "new_decoder_architecture": True}),
        ("falcon", "num_kv_heads", {"num_kv_heads": "2", "new_decoder_architecture": True}),
        ("falcon", "multi_query", {"multi_query": "yes"}),
        ("falcon", "ffn_hidden_size", {"ffn_hidden_size": "wide"}),
        ("falcon", "activation", {"activation": "silu"}),
        ("cohere", "use_qk_norm", {"use_qk_norm": True}),
        ("cohere", "logit_scale", {"logit_scale": 0.0}),
        ("cohere", "logit_scale", {"logit_scale": float("nan")}),
        ("cohere", "hidden_act", {"hidden_act": "gelu"}),
        ("cohere2", "sliding_window_pattern", {"sliding_window_pattern": 0}),
        ("cohere2", "sliding_window", {"sliding_window": "4096"}),
        ("cohere2", "layer_types", {"layer_types": ["full_attention"]}),
        ("olmo2", "clip_qkv", {"clip_qkv": 8.0}),
        ("olmo2", "hidden_act", {"hidden_act": "gelu"}),
    ],
)
def test_a_bad_key_is_named(model_type: str, key: str, extra: dict[str, Any]) -> None:
    spec_from_config(CONFIG | {"model_type": model_type})
    with pytest.raises(ArgumentError) as caught:
        spec_from_config(CONFIG | {"model_type": model_type} | extra)
    assert str(caught.value).startswith(f"{key}: expected ")


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "head_dim", "num_attention_heads"])
@pytest.mark.parametrize("value", [0, -1, 10**12, 10**400], ids=["zero", "negative", "trillion", "endless"])
@pytest.mark.parametrize("model_type", [model_type for family in FAMILIES for model_type in family.model_types])
def test_sizes_are_checked_before_they_are_used(model_type: str, value: int, key: str) -> None:
    """A list per layer, a root or a product of such a number would take all memory or raise something else."""
    config = CONFIG | {"model_type": model_type, "head_dim": 16, key: value}
    if model_type == "gemma3_text":
        config["query_pre_attn_scalar"] = 16
    if model_type in ("gpt_neox", "stablelm"):
        config["partial_rotary_factor"] = 0.5
    if model_type in ("gemma", "cohere", "cohere2"):
        config["tie_word_embeddings"] = True
    family = next(family for family in FAMILIES if model_type in family.model_types)
    if family.renamed_keys.get(key) != "":
        with pytest.raises(ArgumentError, match=r"expected .*, got"):
            spec_from_config(config)
    spec = spec_from_config(config | {key: 16} | ({"num_key_value_heads": 1} if "heads" in key else {}))
    if family.name == "llama":
        spec = replace(spec, sliding_window=None)
    names = {"num_hidden_layers": "block_count", "hidden_size": "embedding_length"}
    names |= {"head_dim": "attention.key_length", "num_attention_heads": "attention.head_count"}
    prefix = f"{family.gguf_architecture}."
    metadata = gguf_metadata_from_spec(spec) | {prefix + names[key]: value, prefix + "attention.value_length": None}
    with pytest.raises(ArgumentError, match=r"expected .*, got"):
        spec_from_gguf(metadata, family.gguf_tensor_names(spec).values())


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        *((model_type, {}) for family in FAMILIES for model_type in family.model_types),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 5, "head_dim": 16}),
        ("smollm3", {"num_hidden_layers": 9}),
        ("smollm3", {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5}),
        ("phi3", {"partial_rotary_factor": 0.5}),
        ("gemma3_text", {"num_hidden_layers": 13, "rope_theta": 5e5, "rope_local_base_freq": 2e4}),
        ("gemma3_text", {"num_hidden_layers": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 168}),
        ("gemma3_text", {"num_hidden_layers": 6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 3}),
        ("gemma", {"hidden_act": "gelu"}),
        ("gpt2", {"n_inner": 96, "activation_function": "gelu"}),
        (
            "llama",
            {
                "original_max_position_embeddings": 64,
                "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
            },
        ),
        ("starcoder2", {"use_bias": False, "sliding_window": 5}),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 5e4, "use_parallel_residual": False}),
        ("stablelm", {"partial_rotary_factor": 0.5, "rope_theta": 5e4, "use_qkv_bias": True}),
        ("falcon", {"new_decoder_architecture": True}),
        ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "num_kv_heads": 2}),
        ("falcon", {"parallel_attn": False, "multi_query": False, "bias": True, "ffn_hidden_size": 96}),
        ("cohere", {"logit_scale": 0.3}),
        ("cohere2", {"num_hidden_layers": 9, "sliding_window": 5}),
        ("cohere2", {"sliding_window_pattern": 2}),
    ],
)
def test_a_config_that_says_little_means_what_it_means_to_transformers(model_type: str, extra: dict[str, Any]) -> None:
    """Defaults, and lists with an entry per layer that older files leave out."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = CONFIG | {"model_type": model_type} | extra
    for key in ("num_key_value_heads", "tie_word_embeddings"):
        full = transformers.AutoConfig.for_model(**config, **tokens).to_dict()
        assert spec_from_config(config) == spec_from_config(full)
        del config[key]
        config |= {"num_attention_heads": 32, "hidden_size": 1024}
    assert spec_from_config(config) == spec_from_config(transformers.AutoConfig.for_model(**config, **tokens).to_dict())


@pytest.mark.parametrize(
    ("family", "field", "overrides"),
    [
        ("llama", "qk_norm", {"qk_norm": "head"}),
        ("llama", "nope_layers", {"nope_layers": (1,)}),
        ("llama", "o_bias", {"qkv_bias": True}),  # its key is that of all four
        ("llama", "rotary_dim", {"rotary_dim": 8}),
        ("qwen2", "qkv_bias", {}),
        ("qwen2", "residual_multiplier", {"qkv_bias": True, "residual_multiplier": 0.5}),
        ("qwen3", "norm_placement", {"qk_norm": "head", "norm_placement": "both"}),
        ("granite", "attention_scale", {}),  # None: Granite always says it
        ("olmo2", "qk_norm", {"qk_norm": None, "norm_placement": "post"}),
        ("phi3", "full_attention_layers", {"sliding_window": 8, "full_attention_layers": (0,)}),
    ],
)
def test_a_field_that_config_json_cannot_say_is_named(family: str, field: str, overrides: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=rf"^{field}: expected .*, which config\.json can say, got"):
        config_from_spec(make_spec(family=family, **overrides))


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("qwen2", "attention.sliding_window", 8),
        ("qwen3", "rope.dimension_count", 8),
        ("granite", "attention.scale", "0.5"),
        ("granite", "attn_logit_softcapping", 30.0),
        ("phi3", "attention.sliding_window", "8"),
        ("phi3", "rope.scaling.type", "longrope"),
        ("olmo2", "attention.clamp_kqv", 8.0),
        ("smollm3", "residual_scale", 0.5),
        ("gemma3", "attention.sliding_window", None),
        ("gemma3", "final_logit_softcapping", 30.0),
        ("starcoder2", "attention.sliding_window", 8),
        ("gpt2", "attention.layer_norm_epsilon", None),
        ("falcon", "attention.layer_norm_epsilon", "1e-5"),
        ("command-r", "logit_scale", 0.0),
        ("cohere2", "attention.sliding_window", None),
    ],
)
def test_a_bad_gguf_key_is_named(family: str, key: str, value: Any) -> None:
    model_type = {"gemma3": "gemma3_text", "command-r": "cohere"}.get(family, family)
    tied = {"tie_word_embeddings": True} if "cohere" in model_type else {}
    spec = spec_from_config(CONFIG | {"model_type": model_type, "no_rope_layer_interval": 4, "use_bias": True} | tied)
    metadata = gguf_metadata_from_spec(spec)
    names = family_of(spec).gguf_tensor_names(spec).values()
    # Norms in a GGUF file hold the sum of weight and offset.
    assert replace(spec_from_gguf(metadata, names), norm_weight_offset=spec.norm_weight_offset) == spec
    with pytest.raises(ArgumentError, match=rf"^{family}\.{key}: expected "):
        spec_from_gguf(metadata | {f"{family}.{key}": value}, names)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_weight_lies_in_one_place(family: Any) -> None:
    spec = spec_from_config(CONFIG | {"model_type": family.model_types[0]})
    for names in (family.folder_tensor_names(spec), family.gguf_tensor_names(spec)):
        shapes, places = stored_shapes(spec, names), stored_rows(spec, names)
        assert list(names) == list(places) == list(spec.tensor_shapes())
        for stored, weights in stacked_weights(names).items():
            ends = [0, *(places[weight].stop for weight in weights)]
            assert [places[weight].start for weight in weights] == ends[:-1]
            assert shapes[stored][0] == ends[-1]
            for weight in weights:
                shape = spec.tensor_shapes()[weight]
                assert (places[weight].stop - places[weight].start, *shapes[stored][1:]) == shape


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_row_of_a_folder_is_in_one_weight(family: Any) -> None:
    spec = spec_from_config(CONFIG | {"model_type": family.model_types[0]})
    shapes, tensors = spec.tensor_shapes(), family.folder_tensors(spec)
    assert sorted(name for tensor in tensors.values() for name in tensor.weights) == sorted(shapes)
    orders = {name: rows for tensor in tensors.values() for name, rows in tensor.weights.items()}
    first, second = (orders[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (0, 1))
    assert first is second or isinstance(first, slice), "layers share an order, however many there are"
    for tensor in tensors.values():
        upright = tensor.upright(np.arange(np.prod(tensor.shape)).reshape(tensor.shape))
        parts = {name: upright[rows] for name, rows in tensor.weights.items()}
        assert {name: part.shape for name, part in parts.items()} == {name: shapes[name] for name in parts}
        np.testing.assert_array_equal(tensor.join(parts), np.arange(np.prod(tensor.shape)).reshape(tensor.shape))
