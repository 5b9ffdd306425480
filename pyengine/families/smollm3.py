"""SmolLM3: every fourth layer, unless said otherwise, has no rotary embedding (NoPE)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyengine.errors import ArgumentError
from pyengine.families.config_keys import layer_types, windows_from_config
from pyengine.families.family import ATTENTION_BIAS, MLP_BIAS, Family
from pyengine.families.fields import get_bool, get_int, get_optional_int
from pyengine.spec import ModelSpec

_INTERVAL = 4


def _every(interval: int, num_layers: int) -> tuple[int, ...]:
    return tuple(range(interval - 1, num_layers, interval))


class SmolLM3(Family):
    def fields_from_config(self, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        num_layers = sizes["num_layers"]
        nope_layers = _nope_layers(config, num_layers)
        window = None
        if get_bool(config, "use_sliding_window", False):
            window = get_optional_int(config, "sliding_window")
        windowed = () if window is None else nope_layers
        types = ["sliding_attention" if layer in windowed else "full_attention" for layer in range(num_layers)]
        return {"nope_layers": nope_layers} | windows_from_config(config, window, types)

    def fields_to_config(self, spec: ModelSpec) -> dict[str, Any]:
        return {
            "no_rope_layers": [int(spec.has_rope(layer)) for layer in range(spec.num_layers)],
            "use_sliding_window": spec.sliding_window is not None,
            "sliding_window": spec.sliding_window,
            "layer_types": layer_types(spec),
        }

    def fields_from_gguf(
        self, metadata: Mapping[str, Any], sizes: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Any]:
        return {"nope_layers": _every(_INTERVAL, sizes["num_layers"])}


def _nope_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    uses_rope = config.get("no_rope_layers")
    if uses_rope is None:
        interval = get_int({"no_rope_layer_interval": _INTERVAL} | dict(config), "no_rope_layer_interval")
        if interval < 1:
            raise ArgumentError(f"no_rope_layer_interval: expected at least 1, got {interval}")
        return _every(interval, num_layers)
    is_list = isinstance(uses_rope, list) and all(flag in (0, 1) for flag in uses_rope)
    if not is_list or len(uses_rope) < num_layers:
        raise ArgumentError(f"no_rope_layers: expected 0 or 1 for each of {num_layers} layers, got {uses_rope!r:.80}")
    return tuple(layer for layer in range(num_layers) if not uses_rope[layer])


FAMILY = SmolLM3(
    name="smollm3",
    classes={"smollm3": "SmolLM3ForCausalLM"},
    gguf_architecture="smollm3",
    options=(ATTENTION_BIAS, MLP_BIAS),
    config_keys=frozenset({"no_rope_layers"}),
    default_theta=2e6,
    default_num_kv_heads=4,
    is_tied=True,
    gguf_permuted=True,
)
