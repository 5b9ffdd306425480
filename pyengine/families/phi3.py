"""Phi-3 and Phi-4: files hold q, k and v as one matrix, gate and up as another; a part of each head may turn."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyengine.errors import ArgumentError
from pyengine.families.config_keys import windows_from_config
from pyengine.families.family import Family
from pyengine.families.fields import get_optional_int
from pyengine.spec import ModelSpec, RopeSpec, YarnScaling

_WINDOW = "phi3.attention.sliding_window"


class Phi3(Family):
    def rope_from_config(self, config: Mapping[str, Any]) -> RopeSpec:
        rope = super().rope_from_config({"original_max_position_embeddings": 4096} | dict(config))
        if isinstance(rope.scaling, YarnScaling):
            # Readers take this name to mean LongRoPE here.
            raise ArgumentError("rope_scaling.rope_type: expected 'default' or 'longrope' for Phi-3, got 'yarn'")
        return rope

    def fields_from_config(self, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        window = get_optional_int(config, "sliding_window")
        kind = "full_attention" if window is None else "sliding_attention"
        return windows_from_config(config, window, [kind] * sizes["num_layers"])

    def fields_to_config(self, spec: ModelSpec) -> dict[str, Any]:
        return {"sliding_window": spec.sliding_window}

    def fields_from_gguf(
        self, metadata: Mapping[str, Any], sizes: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Any]:
        return {"sliding_window": get_optional_int(metadata, _WINDOW) or None}

    def fields_to_gguf(self, spec: ModelSpec) -> dict[str, Any]:
        return {} if spec.sliding_window is None else {_WINDOW: spec.sliding_window}


_QKV = ("self_attn.qkv_proj", "attn_qkv")
_GATE_UP = ("mlp.gate_up_proj", "ffn_up")

FAMILY = Phi3(
    name="phi3",
    classes={"phi3": "Phi3ForCausalLM"},
    gguf_architecture="phi3",
    default_norm_eps=1e-5,
    partial_rotary=True,
    gguf_keys=frozenset({"attention.sliding_window"}),
    stacks={
        "self_attn.q_proj": _QKV,
        "self_attn.k_proj": _QKV,
        "self_attn.v_proj": _QKV,
        "mlp.gate_proj": _GATE_UP,
        "mlp.up_proj": _GATE_UP,
    },
)
