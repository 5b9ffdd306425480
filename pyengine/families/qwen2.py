"""Qwen 2 and 2.5: q, k and v have a bias; layers from `max_window_layers` on may have a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyengine.families.config_keys import layer_types, windows_from_config
from pyengine.families.family import Family
from pyengine.families.fields import get_bool, get_int
from pyengine.spec import ModelSpec


class Qwen(Family):
    def fields_from_config(self, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        num_layers = sizes["num_layers"]
        window, first = None, num_layers
        if get_bool(config, "use_sliding_window", False):
            # The defaults are those of transformers.
            window = get_int({"sliding_window": 4096} | dict(config), "sliding_window")
            first = get_int({"max_window_layers": 28} | dict(config), "max_window_layers")
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
        return windows_from_config(config, window, types)

    def fields_to_config(self, spec: ModelSpec) -> dict[str, Any]:
        types = layer_types(spec)
        return {
            "use_sliding_window": spec.sliding_window is not None,
            "sliding_window": spec.sliding_window,
            "max_window_layers": types.index("sliding_attention") if spec.sliding_window else spec.num_layers,
            "layer_types": types,
        }


FAMILY = Qwen(
    name="qwen2",
    classes={"qwen2": "Qwen2ForCausalLM"},
    gguf_architecture="qwen2",
    traits={"qkv_bias": True},
    default_num_kv_heads=32,
)
