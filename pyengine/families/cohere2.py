"""Command R7B and A: as Command R, with a sliding window in all layers but every fourth, which have no rotation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyengine.errors import ArgumentError
from pyengine.families.cohere import Cohere
from pyengine.families.config_keys import layer_types, windows_from_config
from pyengine.families.family import ATTENTION_BIAS
from pyengine.families.fields import get_int
from pyengine.spec import ModelSpec

# Of this many layers, the last sees everything.
_PATTERN = 4
_WINDOW = "cohere2.attention.sliding_window"


class Cohere2(Cohere):
    def fields_from_config(self, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        pattern = get_int({"sliding_window_pattern": _PATTERN} | dict(config), "sliding_window_pattern")
        if pattern < 1:
            raise ArgumentError(f"sliding_window_pattern: expected at least 1, got {pattern}")
        num_layers = sizes["num_layers"]
        types = ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(num_layers)]
        window = get_int({"sliding_window": 4096} | dict(config), "sliding_window")
        fields = windows_from_config(config, window, types)
        full = tuple(range(num_layers)) if fields["sliding_window"] is None else fields["full_attention_layers"]
        return super().fields_from_config(config, sizes) | fields | {"nope_layers": full}

    def fields_to_config(self, spec: ModelSpec) -> dict[str, Any]:
        window = {"sliding_window": spec.sliding_window or 4096, "layer_types": layer_types(spec)}
        return super().fields_to_config(spec) | window

    def fields_from_gguf(
        self, metadata: Mapping[str, Any], sizes: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Any]:
        full = tuple(range(_PATTERN - 1, sizes["num_layers"], _PATTERN))
        window = {"sliding_window": get_int(metadata, _WINDOW), "full_attention_layers": full, "nope_layers": full}
        return super().fields_from_gguf(metadata, sizes, tensor_names) | window

    def fields_to_gguf(self, spec: ModelSpec) -> dict[str, Any]:
        return super().fields_to_gguf(spec) | {_WINDOW: spec.sliding_window or 0}


FAMILY = Cohere2(
    name="cohere2",
    classes={"cohere2": "Cohere2ForCausalLM"},
    gguf_architecture="cohere2",
    traits={"norm": "layer", "norm_placement": "shared", "parallel_blocks": True},
    options=(ATTENTION_BIAS,),
    config_keys=frozenset({"logit_scale"}),
    default_norm_eps=1e-5,
    is_tied=True,
    gguf_permuted=True,
    gguf_keys=frozenset({"logit_scale", "attention.sliding_window"}),
    eps_key="layer_norm_eps",
)
