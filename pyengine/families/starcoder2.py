"""StarCoder 2: layer norms and an MLP without a gate, with rotary attention, grouped kv heads and a sliding window."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyengine.families.config_keys import plain_activation, windows_from_config
from pyengine.families.family import Family, Option
from pyengine.families.fields import get_optional_int
from pyengine.spec import ModelSpec


class Starcoder2(Family):
    def fields_from_config(self, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        window = get_optional_int(config, "sliding_window")
        kind = "full_attention" if window is None else "sliding_attention"
        fields = windows_from_config(config, window, [kind] * sizes["num_layers"])
        return fields | {"activation": plain_activation(config, "hidden_act", "gelu_pytorch_tanh")}

    def fields_to_config(self, spec: ModelSpec) -> dict[str, Any]:
        activation = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[spec.activation]
        return {"sliding_window": spec.sliding_window, "hidden_act": activation}

    def fields_from_gguf(
        self, metadata: Mapping[str, Any], sizes: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Any]:
        # Readers of such a file expect every bias.
        return {"activation": "gelu_tanh"} | dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True)


FAMILY = Starcoder2(
    name="starcoder2",
    classes={"starcoder2": "Starcoder2ForCausalLM"},
    gguf_architecture="starcoder2",
    traits={"norm": "layer", "norm_bias": True, "gated_mlp": False},
    options=(Option(fields=("qkv_bias", "o_bias", "mlp_bias"), config_key="use_bias", default=True),),
    config_keys=frozenset({"hidden_act"}),
    default_norm_eps=1e-5,
    default_num_kv_heads=2,
    is_tied=True,
    gguf_biases=("qkv_bias", "o_bias", "mlp_bias"),
    folder_names={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
    eps_key="norm_epsilon",
)
