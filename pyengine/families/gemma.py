"""Gemma 1: an MLP gated by gelu, norms whose weight has an offset of 1, embeddings times the root of their width."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from pyengine.errors import ArgumentError
from pyengine.families.family import ATTENTION_BIAS, Family
from pyengine.spec import ModelSpec

_ACTIVATION = "gelu_pytorch_tanh"
# The name in the first releases, which meant the same.
_OLD_ACTIVATION = "gelu"


class Gemma(Family):
    def _spec_from_config(self, config: Mapping[str, Any]) -> ModelSpec:
        return super()._spec_from_config({"head_dim": 256} | dict(config))

    def fields_from_config(self, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        for key in ("hidden_activation", "hidden_act"):
            if config.get(key) not in (None, _ACTIVATION, _OLD_ACTIVATION):
                raise ArgumentError(f"{key}: expected {_ACTIVATION!r}, got {config[key]!r:.80}")
        return {"embedding_multiplier": math.sqrt(sizes["hidden_size"])}

    def fields_to_config(self, spec: ModelSpec) -> dict[str, Any]:
        return {"hidden_act": _ACTIVATION, "hidden_activation": _ACTIVATION}

    def fields_from_gguf(
        self, metadata: Mapping[str, Any], sizes: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Any]:
        return {"embedding_multiplier": math.sqrt(sizes["hidden_size"]), "norm_weight_offset": 0.0}

    def fields_to_gguf(self, spec: ModelSpec) -> dict[str, Any]:
        if not spec.tie_word_embeddings:
            raise ArgumentError(
                "tie_word_embeddings: expected True, which a GGUF file of gemma can say, "
                f"got {spec.tie_word_embeddings}"
            )
        return {}


FAMILY = Gemma(
    name="gemma",
    classes={"gemma": "GemmaForCausalLM"},
    gguf_architecture="gemma",
    traits={"norm_weight_offset": 1.0, "activation": "gelu_tanh"},
    options=(ATTENTION_BIAS,),
    config_keys=frozenset({"hidden_act", "hidden_activation"}),
    default_num_kv_heads=16,
    is_tied=True,
)
