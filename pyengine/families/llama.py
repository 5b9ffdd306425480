"""The Llama family: `model_type` llama (Llama 2 and 3, SmolLM2, ...) and mistral, which adds a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyengine.errors import ArgumentError
from pyengine.families.config_keys import windows_from_config
from pyengine.families.family import ATTENTION_BIAS, MLP_BIAS, Family
from pyengine.families.fields import get_bool, get_optional_int
from pyengine.spec import ModelSpec


class Llama(Family):
    def fields_from_config(self, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        window = get_optional_int(config, "sliding_window")
        if config["model_type"] == "mistral" and "sliding_window" not in config:
            window = 4096  # the default of transformers
        if config["model_type"] == "llama":
            if window is not None:
                raise ArgumentError(f"sliding_window: expected null for model_type llama, got {window}")
            return windows_from_config(config, None, ["full_attention"] * sizes["num_layers"])
        for key in ("attention_bias", "mlp_bias"):
            if get_bool(config, key, False):
                raise ArgumentError(f"{key}: expected false for model_type mistral, got true")
        if not get_bool(config, "use_sliding_window", True):
            window = None
        # Here the window is that of every layer.
        expected = ["full_attention" if window is None else "sliding_attention"] * sizes["num_layers"]
        if config.get("layer_types", expected) not in (None, expected):
            raise ArgumentError(
                f"layer_types: expected {expected[0]!r} for every layer, got {config['layer_types']!r:.80}"
            )
        num_kv_heads = sizes["num_kv_heads"] if config.get("num_key_value_heads") is not None else 8
        return {"num_kv_heads": num_kv_heads, "sliding_window": window}

    def fields_to_config(self, spec: ModelSpec) -> dict[str, Any]:
        return {} if spec.sliding_window is None else {"sliding_window": spec.sliding_window}

    def model_type_of(self, spec: ModelSpec) -> str:
        return "llama" if spec.sliding_window is None else "mistral"


FAMILY = Llama(
    name="llama",
    classes={"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"},
    gguf_architecture="llama",
    options=(ATTENTION_BIAS, MLP_BIAS),
    gguf_permuted=True,
    gguf_biases=("qkv_bias", "o_bias", "mlp_bias"),
)
