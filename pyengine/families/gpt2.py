"""GPT-2: learned positions, layer norms, an MLP without a gate; matrices of a folder are [in, out]."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyengine.families.config_keys import plain_activation
from pyengine.families.family import Family
from pyengine.spec import ModelSpec


class Gpt2(Family):
    def _spec_from_config(self, config: Mapping[str, Any]) -> ModelSpec:
        width = config.get("hidden_size")
        if config.get("intermediate_size") is None and type(width) is int:
            config = dict(config) | {"intermediate_size": 4 * width}
        return super()._spec_from_config(config)

    def fields_from_config(self, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        activation = plain_activation(config, "activation_function", "gelu_new")
        return {"activation": activation, "nope_layers": tuple(range(sizes["num_layers"]))}

    def fields_to_config(self, spec: ModelSpec) -> dict[str, Any]:
        return {"activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[spec.activation]}

    def fields_from_gguf(
        self, metadata: Mapping[str, Any], sizes: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Any]:
        return {"activation": "gelu_tanh", "nope_layers": tuple(range(sizes["num_layers"]))}


_QKV = ("attn.c_attn", "attn_qkv")

FAMILY = Gpt2(
    name="gpt2",
    classes={"gpt2": "GPT2LMHeadModel"},
    gguf_architecture="gpt2",
    traits={
        "norm": "layer",
        "norm_bias": True,
        "gated_mlp": False,
        "learned_positions": True,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
    },
    default_norm_eps=1e-5,
    is_tied=True,
    stacks={"self_attn.q_proj": _QKV, "self_attn.k_proj": _QKV, "self_attn.v_proj": _QKV},
    folder_names={
        "model.embed_tokens": "transformer.wte",
        "model.embed_positions": "transformer.wpe",
        "input_layernorm": "ln_1",
        "self_attn.o_proj": "attn.c_proj",
        "post_attention_layernorm": "ln_2",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
        "model.norm": "transformer.ln_f",
    },
    folder_layers="transformer.h",
    folder_prefix="transformer.",
    folder_extra=(".attn.bias", ".attn.masked_bias"),
    folder_transposed=frozenset(
        {
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        }
    ),
    renamed_keys={
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "num_key_value_heads": "",
        "head_dim": "",
        "hidden_act": "",
        "rope_theta": "",
        "rope_scaling": "",
        "rope_parameters": "",
    },
    both_keys=frozenset({"hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"}),
    eps_key="layer_norm_epsilon",
)
