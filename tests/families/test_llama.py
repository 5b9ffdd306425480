"""The Llama family against transformers, gguf and a real GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyengine.errors import ArgumentError, ModelFileError
from pyengine.families import (
    config_from_spec,
    gguf_metadata_from_spec,
    load_config,
    load_spec,
    permute_rows,
    spec_from_config,
    spec_from_gguf,
    unpermute_rows,
)
from pyengine.families.llama import FAMILY
from pyengine.spec import FactorScaling, LinearScaling, Llama3Scaling, ModelSpec, RopeSpec
from pyengine.testing.smollm2 import open_smollm2

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def gguf_names(spec: ModelSpec) -> set[str]:
    return set(FAMILY.gguf_tensor_names(spec).values())


@pytest.mark.parametrize(
    ("extra", "rope"),
    [
        ({}, RopeSpec(theta=10000.0)),
        ({"rope_theta": 5e5}, RopeSpec(theta=5e5)),
        ({"rope_theta": 500000}, RopeSpec(theta=5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeSpec(theta=1e4, scaling=LinearScaling(factor=2.0))),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3_SCALING},
            RopeSpec(theta=5e5, scaling=Llama3Scaling(**LLAMA3_SCALING)),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3_SCALING},
            RopeSpec(theta=5e5, scaling=Llama3Scaling(**LLAMA3_SCALING)),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, RopeSpec(theta=1e5)),
        ({"rope_theta": 1e5, "rope_scaling": None, "rope_parameters": {"rope_theta": 1e5}}, RopeSpec(theta=1e5)),
    ],
)
def test_rope_dialects_agree_with_transformers(extra: dict[str, Any], rope: RopeSpec) -> None:
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    spec = spec_from_config(CONFIG | extra)
    assert spec.rope == rope
    oracle = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(CONFIG | extra)))).inv_freq.numpy()
    np.testing.assert_allclose(spec.inv_freq(), oracle, rtol=20 * 2.0**-24)


@pytest.mark.parametrize(
    ("key", "extra"),
    [
        ("attention_bias", {"attention_bias": 1}),
        ("mlp_bias", {"mlp_bias": True, "model_type": "mistral"}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("rope_interleaved", {"rope_interleaved": True}),
        ("quantization_config", {"quantization_config": {"quant_method": "gptq"}}),
        ("auto_map", {"auto_map": {"AutoModel": "code.Model"}}),
        ("num_local_experts", {"num_local_experts": 8}),
        ("sliding_window", {"sliding_window": 128}),
        ("layer_types", {"layer_types": ["sliding_attention"] * 3}),
        ("model_type", {"model_type": "mamba"}),
        ("model_type", {"model_type": ["llama"]}),
        ("vocab_size", {"vocab_size": "512"}),
        ("vocab_size", {"vocab_size": None}),
        ("hidden_size", {"hidden_size": 65}),
        ("num_kv_heads", {"num_key_value_heads": 3}),
        ("rms_norm_eps", {"rms_norm_eps": "small"}),
        ("eos_token_id", {"eos_token_id": "2"}),
        ("eos_token_ids[0]", {"eos_token_id": 512}),
        ("tie_word_embeddings", {"tie_word_embeddings": 1}),
        ("rope_scaling.rope_type", {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}),
        ("rope.scaling.beta_fast", {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0.5}}),
        ("rope.scaling.attention_factor", {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": -1.0}}),
        ("rope.scaling.factor", {"rope_scaling": {"type": "yarn", "factor": 0.5}}),
        ("rope.scaling.factor", {"rope_scaling": {"type": "yarn", "factor": float("inf")}}),
        ("rope.theta", {"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 2.0}}),
        ("rope_scaling.truncate", {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}),
        ("rope_scaling.mscale", {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": -10.0}}),
        (
            "rope.scaling.original_max_position_embeddings",
            {"original_max_position_embeddings": 10**400, "rope_scaling": {"type": "yarn", "factor": 2.0}},
        ),
        ("rope_scaling.short_factor", {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}),
        ("rope_scaling.long_factor", {"rope_scaling": {"type": "su", "short_factor": [1], "long_factor": [True]}}),
        (
            "rope.scaling.long_factors",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 9}},
        ),
        (
            "rope.scaling.short_factors",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 7, "long_factor": [1.0] * 7}},
        ),
        (
            "rope.scaling.short_factors[1]",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 0] * 4, "long_factor": [1.0] * 8}},
        ),
        ("rope_scaling.rope_type", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("rope_scaling.factor", {"rope_scaling": {"type": "linear"}}),
        ("rope_scaling.factor", {"rope_scaling": {"type": "default", "factor": 2.0}}),
        ("rope_scaling.mscale", {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}),
        ("rope_parameters.short_factor", {"rope_parameters": {"rope_type": "longrope"}}),
        ("rope_parameters.full_attention", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
        ("rope_parameters.partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ("rope_theta", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}}),
        ("rope_scaling", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}}),
        ("rope_theta", {"rope_theta": "1e4"}),
    ],
)
def test_unsupported_key_is_named(key: str, extra: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError) as caught:
        spec_from_config(CONFIG | extra)
    assert str(caught.value).startswith(f"{key}: expected ")


def test_explicit_neutral_values_are_accepted() -> None:
    neutral = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "quantization_config": None}
    assert spec_from_config(CONFIG | neutral | {"layer_types": ["full_attention"] * 3}) == spec_from_config(CONFIG)


def test_mistral_window_and_default_kv_heads() -> None:
    config = {k: v for k, v in CONFIG.items() if k != "num_key_value_heads"} | {
        "model_type": "mistral",
        "num_attention_heads": 16,
        "sliding_window": 32,
    }
    spec = spec_from_config(config)
    assert (spec.sliding_window, spec.num_kv_heads) == (32, 8)
    assert spec_from_config(config_from_spec(spec)) == spec


@pytest.mark.parametrize("seed", range(4))
def test_config_round_trip_through_transformers(seed: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    extra = [
        {},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3_SCALING},
        {"eos_token_id": [2, 3], "tie_word_embeddings": False},
        {"head_dim": 32, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ][seed]
    spec = spec_from_config(CONFIG | extra)
    transformers.LlamaConfig(**config_from_spec(spec)).save_pretrained(tmp_path)
    assert load_spec(tmp_path) == spec


def test_generation_config_wins_for_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert load_spec(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "pad_token_id": None}))
    assert load_spec(tmp_path).eos_token_ids == (7, 8)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (b"", None),
        (b"{", None),
        (b"[1]", None),
        (b'{"a": NaN}', None),
        (b'{"a": 1, "a": 2}', "a"),
        (b"\xff{}", None),
        (b"[" * 100_000, None),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", None),
        (b" " * (4 << 20) + b"{}", None),
        (json.dumps(CONFIG | {"vocab_size": 1 << 60}).encode(), "vocab_size"),
        (json.dumps(CONFIG | {"mlp_bias": 1}).encode(), "mlp_bias"),
    ],
)
def test_hostile_config_file(content: bytes, field: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        load_spec(tmp_path)
    assert caught.value.field == field
    assert Path(caught.value.path) == tmp_path / "config.json"


def test_missing_config_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 2), (3, 4), (9, 64), (4, 16)])
def test_row_order_undoes_the_gguf_permutation(num_heads: int, head_dim: int) -> None:
    rows = num_heads * head_dim
    weight = np.random.default_rng(0).standard_normal((rows, 5))
    # The permutation that llama.cpp's converter applies to q_proj and k_proj.
    gguf = weight.reshape(num_heads, 2, head_dim // 2, 5).swapaxes(1, 2).reshape(rows, 5)
    np.testing.assert_array_equal(gguf[unpermute_rows(num_heads, head_dim)], weight)
    np.testing.assert_array_equal(weight[permute_rows(num_heads, head_dim)], gguf)


@pytest.mark.parametrize("part", ["q", "k"])
def test_rows_of_a_real_file_move_as_in_transformers(part: str) -> None:
    """Moving quantised rows, then dequantising, gives what transformers gets in the other order."""
    quants = pytest.importorskip("gguf.quants")
    processors = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    reader = open_smollm2()
    spec = spec_from_gguf(reader.metadata, list(reader))
    order = FAMILY.gguf_row_order(spec, f"model.layers.0.self_attn.{part}_proj.weight")
    assert order is not None
    name = f"blk.0.attn_{part}.weight"
    kind = quants.GGMLQuantizationType[reader.info(name).type]
    got = quants.dequantize(reader[name][order], kind)
    expected = processors.LlamaTensorProcessor()._reverse_permute_weights(
        quants.dequantize(reader[name], kind), spec.num_heads, spec.num_heads if part == "q" else spec.num_kv_heads
    )
    np.testing.assert_array_equal(got, expected)


def test_row_order_only_for_rotated_projections() -> None:
    spec = spec_from_config(CONFIG)
    for name in spec.tensor_shapes():
        order = FAMILY.gguf_row_order(spec, name)
        assert (order is not None) == (".q_proj." in name or ".k_proj." in name)
        if order is not None:
            assert sorted(order) == list(range(spec.tensor_shapes()[name][0]))


@pytest.mark.parametrize("tied", [True, False])
def test_tensor_names_are_those_of_gguf(tied: bool) -> None:
    gguf = pytest.importorskip("gguf")
    spec = spec_from_config(CONFIG | {"tie_word_embeddings": tied})
    oracle = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, spec.num_layers)
    names = FAMILY.gguf_tensor_names(spec)
    assert list(names) == list(spec.tensor_shapes())
    for hf_name, gguf_name in names.items():
        assert gguf_name == oracle.get_name(hf_name.removesuffix(".weight")) + ".weight"


def test_real_file(smollm2_metadata: dict[str, Any], smollm2_tensors: dict[str, tuple[int, ...]]) -> None:
    spec = spec_from_gguf(smollm2_metadata, smollm2_tensors.keys())
    shapes = spec.tensor_shapes()
    names = FAMILY.gguf_tensor_names(spec)
    assert {gguf_name: shapes[hf_name] for hf_name, gguf_name in names.items()} == smollm2_tensors
    assert spec.num_parameters() == 134_515_008
    assert (spec.rope, spec.norm_eps) == (RopeSpec(theta=100000.0), 1e-5)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (1, (2,), 2)
    assert spec_from_config(config_from_spec(spec)) == spec


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "original_max_position_embeddings": 32,
    "short_factor": [1.0 + 0.5 * i for i in range(16)],
    "long_factor": [2 * i + 1 for i in range(16)],
    "attention_factor": 1.25,
}


@pytest.mark.parametrize("rope_type", ["default", "linear", "llama3", "yarn", "longrope"])
def test_gguf_metadata_round_trip(rope_type: str) -> None:
    scaling = {"linear": {"factor": 4.0}, "llama3": LLAMA3_SCALING, "default": {}, "yarn": YARN, "longrope": LONGROPE}[
        rope_type
    ]
    parameters = {"rope_type": rope_type, "rope_theta": 5e5} | scaling
    config = CONFIG | {"rope_parameters": parameters, "head_dim": 32, "eos_token_id": [2, 5], "pad_token_id": 9}
    spec = spec_from_config(config)
    factors = FAMILY.gguf_rope_factors(spec)
    back = spec_from_gguf(gguf_metadata_from_spec(spec), gguf_names(spec) | set(factors), rope_factors=factors)
    if rope_type == "llama3":
        assert isinstance(back.rope.scaling, FactorScaling)
        # The factors pass through float32.
        np.testing.assert_allclose(back.inv_freq(), spec.inv_freq(), rtol=2.0**-24)
    else:
        assert len(factors) == (2 if rope_type == "longrope" else 0)
        assert back == spec


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.architecture", "mamba"),
        ("llama.expert_count", 8),
        ("llama.rope.dimension_count", 8),
        ("llama.attention.value_length", 8),
        ("llama.rope.scaling.type", "dynamic"),
        ("llama.rope.scaling.type", "longrope"),
        ("llama.rope.scaling.attn_factor", 1.5),
        ("llama.block_count", -1),
        ("llama.block_count", 1 << 31),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", [4, 4, 4]),
        ("llama.vocab_size", None),
    ],
)
def test_hostile_gguf_metadata(key: str, value: Any) -> None:
    spec = spec_from_config(CONFIG)
    with pytest.raises(ArgumentError, match=r"expected .*, got"):
        spec_from_gguf(gguf_metadata_from_spec(spec) | {key: value}, gguf_names(spec))
