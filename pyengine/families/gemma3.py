"""Gemma 3, its text model: norms on both sides of each block and of q and k; layers with a window have a rotary
embedding of their own."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from pyengine.errors import ArgumentError
from pyengine.families.config_keys import layer_types, windows_from_config
from pyengine.families.family import ATTENTION_BIAS, Family
from pyengine.families.fields import get_float, get_int, get_mapping
from pyengine.families.gguf_keys import shortest
from pyengine.families.rope_config import rope_from_config, rope_to_config
from pyengine.spec import ModelSpec, RopeSpec

_ACTIVATION = "gelu_pytorch_tanh"
# Of this many layers, the last sees everything.
_PATTERN = 6
_GLOBAL_THETA, _LOCAL_THETA = 1e6, 1e4
_WINDOW = "gemma3.attention.sliding_window"
_LOCAL_BASE = "gemma3.rope.freq_base_swa"
# GGUF does not say the scale of attention; the model of 27e9 parameters, which is known by its layers, has another.
_NUM_LAYERS_27B = 62


def _types(num_layers: int, pattern: int) -> list[str]:
    return ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(num_layers)]


class Gemma3(Family):
    def spec_from_config(self, config: Mapping[str, Any]) -> ModelSpec:
        return super().spec_from_config({"head_dim": 256} | dict(config))

    def rope_from_config(self, config: Mapping[str, Any]) -> RopeSpec:
        flat = {key: config[key] for key in ("rope_theta", "rope_scaling") if key in config}
        return self._rope(config, "full_attention", flat, _GLOBAL_THETA)

    @staticmethod
    def _rope(config: Mapping[str, Any], kind: str, flat: Mapping[str, Any], default_theta: float) -> RopeSpec:
        """Newer files have rotary parameters for each kind of layer."""
        nested = get_mapping(config, "rope_parameters")
        if unknown := sorted(str(key) for key in nested if key not in ("full_attention", "sliding_attention")):
            raise ArgumentError(f"rope_parameters.{unknown[0]}: expected only kinds of layers, got {unknown[0]!r:.80}")
        parameters = get_mapping(nested, kind)
        both = dict(flat) | ({"rope_parameters": parameters} if parameters else {})
        return rope_from_config(both, default_theta=default_theta)

    def fields_from_config(self, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        for key in ("hidden_activation", "hidden_act"):
            if config.get(key, _ACTIVATION) not in (None, _ACTIVATION):
                raise ArgumentError(f"{key}: expected {_ACTIVATION!r}, got {config[key]!r:.80}")
        scalar = get_float(config, "query_pre_attn_scalar", 256.0)
        if scalar <= 0.0:
            raise ArgumentError(f"query_pre_attn_scalar: expected more than 0, got {scalar}")
        pattern = get_int({"sliding_window_pattern": _PATTERN} | dict(config), "sliding_window_pattern")
        if pattern < 1:
            raise ArgumentError(f"sliding_window_pattern: expected at least 1, got {pattern}")
        window = get_int({"sliding_window": 4096} | dict(config), "sliding_window")
        fields = windows_from_config(config, window, _types(sizes["num_layers"], pattern))
        if fields["sliding_window"] is not None:
            base = {"rope_theta": config["rope_local_base_freq"]} if "rope_local_base_freq" in config else {}
            fields["local_rope"] = self._rope(config, "sliding_attention", base, _LOCAL_THETA)
        return fields | {"attention_scale": scalar**-0.5, "embedding_multiplier": math.sqrt(sizes["hidden_size"])}

    def fields_to_config(self, spec: ModelSpec) -> dict[str, Any]:
        full = rope_to_config(spec.rope, rotary_dim=None, head_dim=spec.head_dim)
        local_rope = spec.local_rope or RopeSpec(theta=_LOCAL_THETA)
        local = rope_to_config(local_rope, rotary_dim=None, head_dim=spec.head_dim)
        return {
            "hidden_act": _ACTIVATION,
            "hidden_activation": _ACTIVATION,
            "query_pre_attn_scalar": round(spec.softmax_scale**-2),
            "sliding_window": spec.sliding_window or 4096,
            "layer_types": layer_types(spec),
            "rope_local_base_freq": local["rope_theta"],
            "rope_parameters": {
                "full_attention": full["rope_parameters"],
                "sliding_attention": local["rope_parameters"],
            },
        }

    def fields_from_gguf(
        self, metadata: Mapping[str, Any], sizes: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Any]:
        num_layers = sizes["num_layers"]
        width = sizes["head_dim"] if num_layers != _NUM_LAYERS_27B else sizes["hidden_size"] // sizes["num_heads"]
        types = _types(num_layers, _PATTERN)
        return {
            "sliding_window": get_int(metadata, _WINDOW),
            "full_attention_layers": tuple(range(_PATTERN - 1, len(types), _PATTERN)),
            "local_rope": RopeSpec(theta=shortest(get_float(metadata, _LOCAL_BASE, _LOCAL_THETA))),
            "attention_scale": width**-0.5,
            "embedding_multiplier": math.sqrt(sizes["hidden_size"]),
            "norm_weight_offset": 0.0,
        }

    def fields_to_gguf(self, spec: ModelSpec) -> dict[str, Any]:
        local = {} if spec.local_rope is None else {_LOCAL_BASE: spec.local_rope.theta}
        return local | {_WINDOW: spec.sliding_window or 0}


FAMILY = Gemma3(
    name="gemma3",
    classes={"gemma3_text": "Gemma3ForCausalLM"},
    gguf_architecture="gemma3",
    traits={
        "norm_placement": "both",
        "norm_weight_offset": 1.0,
        "qk_norm": "head",
        "activation": "gelu_tanh",
    },
    options=(ATTENTION_BIAS,),
    config_keys=frozenset({"hidden_act", "hidden_activation", "query_pre_attn_scalar"}),
    default_theta=_GLOBAL_THETA,
    default_num_kv_heads=4,
    is_tied=True,
    gguf_keys=frozenset({"attention.sliding_window"}),
)
