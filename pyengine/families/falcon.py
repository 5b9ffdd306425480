"""Falcon: attention and MLP side by side, with one or two layer norms before them; q, k and v are one matrix."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError
from pyengine.families.config_keys import plain_activation
from pyengine.families.family import Family, Option
from pyengine.families.fields import get_bool, get_optional_int
from pyengine.families.rows import grouped_rows
from pyengine.spec import ModelSpec


class Falcon(Family):
    def _spec_from_config(self, config: Mapping[str, Any]) -> ModelSpec:
        config = {"max_position_embeddings": 2048} | dict(config)
        width, num_heads = config.get("hidden_size"), config.get("num_attention_heads")
        if config.get("intermediate_size") is None and type(width) is int:
            config["intermediate_size"] = 4 * width
        if not get_bool(config, "new_decoder_architecture", False):
            config["num_key_value_heads"] = 1 if get_bool(config, "multi_query", True) else num_heads
        return super()._spec_from_config(config)

    def fields_from_config(self, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        is_new = get_bool(config, "new_decoder_architecture", False)
        is_parallel = get_bool(config, "parallel_attn", True)
        if is_new and not is_parallel:
            raise ArgumentError("parallel_attn: expected true beside new_decoder_architecture, got false")
        num_norms = get_optional_int(config, "num_ln_in_parallel_attn")
        num_norms = (2 if is_new else 1) if num_norms is None else num_norms
        if num_norms not in ((1, 2) if is_new else (1,)):
            raise ArgumentError(f"num_ln_in_parallel_attn: expected {'1 or 2' if is_new else 1}, got {num_norms}")
        return {
            "parallel_blocks": is_parallel,
            "norm_placement": "pre" if num_norms == 2 or not is_parallel else "shared",
            "activation": plain_activation(config, "activation", "gelu"),
        }

    def fields_to_config(self, spec: ModelSpec) -> dict[str, Any]:
        is_new = spec.parallel_blocks and (spec.norm_placement == "pre" or spec.num_kv_heads != 1)
        return {
            "new_decoder_architecture": is_new,
            "multi_query": spec.num_kv_heads == 1,
            "parallel_attn": spec.parallel_blocks,
            "num_ln_in_parallel_attn": (2 if spec.norm_placement == "pre" else 1) if spec.parallel_blocks else None,
            "activation": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[spec.activation],
            "alibi": False,
        }

    def fields_from_gguf(
        self, metadata: Mapping[str, Any], sizes: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Any]:
        placement = "pre" if "blk.0.attn_norm_2.weight" in tensor_names else "shared"
        return {"parallel_blocks": True, "norm_placement": placement, "activation": "gelu"}

    def folder_part(self, spec: ModelSpec, part: str, default: str) -> str:
        if spec.parallel_blocks and spec.norm_placement == "pre":
            default = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}.get(part, default)
        return super().folder_part(spec, part, default)

    def folder_row_order(self, spec: ModelSpec, name: str) -> npt.NDArray[np.int64] | None:
        part = name.rpartition(".")[0].rpartition(".")[2]
        if part not in ("q_proj", "k_proj", "v_proj"):
            return None
        return grouped_rows(spec.num_heads, spec.num_kv_heads, spec.head_dim, part)

    def gguf_tensor_names(self, spec: ModelSpec) -> dict[str, str]:
        names = super().gguf_tensor_names(spec)
        if spec.norm_placement == "shared":
            return names
        # With two norms, that of attention is the second.
        swap = {"attn_norm": "attn_norm_2", "ffn_norm": "attn_norm"}
        parts = {name: stored.split(".") for name, stored in names.items()}
        return {name: ".".join(swap.get(part, part) for part in stored) for name, stored in parts.items()}


_QKV = ("self_attention.query_key_value", "attn_qkv")

FAMILY = Falcon(
    name="falcon",
    classes={"falcon": "FalconForCausalLM"},
    gguf_architecture="falcon",
    traits={"norm": "layer", "norm_bias": True, "gated_mlp": False},
    options=(Option(fields=("qkv_bias", "o_bias", "mlp_bias"), config_key="bias", default=False),),
    config_keys=frozenset({"hidden_act"}),
    default_norm_eps=1e-5,
    is_tied=True,
    stacks={"self_attn.q_proj": _QKV, "self_attn.k_proj": _QKV, "self_attn.v_proj": _QKV},
    folder_names={
        "model.embed_tokens": "transformer.word_embeddings",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
        "model.norm": "transformer.ln_f",
    },
    folder_layers="transformer.h",
    renamed_keys={
        "intermediate_size": "ffn_hidden_size",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "",
        "hidden_act": "",
    },
    eps_key="layer_norm_epsilon",
)
