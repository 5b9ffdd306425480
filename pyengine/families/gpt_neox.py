"""GPT-NeoX and Pythia: attention and MLP side by side, each behind a layer norm; a part of each head turns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.families.config_keys import plain_activation
from pyengine.families.family import Family, Option
from pyengine.families.fields import get_bool
from pyengine.families.rope_config import rope_to_config, with_default_factor, with_factor
from pyengine.families.rows import grouped_rows
from pyengine.spec import ModelSpec

_FACTOR = 0.25
_PARALLEL = "gptneox.use_parallel_residual"


class GptNeoX(Family):
    def _spec_from_config(self, config: Mapping[str, Any]) -> ModelSpec:
        old = config.get("rotary_pct")
        return super()._spec_from_config(with_default_factor(config, _FACTOR if old is None else old))

    def fields_from_config(self, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "parallel_blocks": get_bool(config, "use_parallel_residual", True),
            "activation": plain_activation(config, "hidden_act", "gelu"),
        }

    def fields_to_config(self, spec: ModelSpec) -> dict[str, Any]:
        rope = rope_to_config(spec.rope, rotary_dim=spec.rotary_dim, head_dim=spec.head_dim)
        factor = with_factor(rope, spec.rotary_dim)
        return factor | {
            "rotary_pct": factor["partial_rotary_factor"],
            "use_parallel_residual": spec.parallel_blocks,
            "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[spec.activation],
        }

    def fields_from_gguf(
        self, metadata: Mapping[str, Any], sizes: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Any]:
        # Readers of such a file expect every bias.
        biases = dict.fromkeys(("qkv_bias", "o_bias"), True)
        return biases | {"parallel_blocks": get_bool(metadata, _PARALLEL, True), "activation": "gelu"}

    def fields_to_gguf(self, spec: ModelSpec) -> dict[str, Any]:
        return {_PARALLEL: spec.parallel_blocks}

    def folder_row_order(self, spec: ModelSpec, name: str) -> npt.NDArray[np.int64] | None:
        part = name.rpartition(".")[0].rpartition(".")[2]
        if part not in ("q_proj", "k_proj", "v_proj"):
            return None
        return grouped_rows(spec.num_heads, spec.num_kv_heads, spec.head_dim, part)


_QKV = ("attention.query_key_value", "attn_qkv")

FAMILY = GptNeoX(
    name="gpt_neox",
    classes={"gpt_neox": "GPTNeoXForCausalLM"},
    gguf_architecture="gptneox",
    traits={"norm": "layer", "norm_bias": True, "gated_mlp": False, "mlp_bias": True},
    options=(Option(fields=("qkv_bias", "o_bias"), config_key="attention_bias", default=True),),
    config_keys=frozenset({"hidden_act"}),
    default_norm_eps=1e-5,
    partial_rotary=True,
    gguf_biases=("qkv_bias", "o_bias"),
    gguf_tied=False,
    stacks={"self_attn.q_proj": _QKV, "self_attn.k_proj": _QKV, "self_attn.v_proj": _QKV},
    folder_names={
        "model.embed_tokens": "gpt_neox.embed_in",
        "self_attn.o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
        "model.norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
    },
    folder_layers="gpt_neox.layers",
    folder_extra=(".attention.bias", ".attention.masked_bias"),
    renamed_keys={"rope_theta": "rotary_emb_base", "num_key_value_heads": "", "head_dim": ""},
    both_keys=frozenset({"rope_theta"}),
    eps_key="layer_norm_eps",
)
