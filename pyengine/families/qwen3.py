"""Qwen 3: each head of q and k is normalised before it is rotated; config.json says the width of a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyengine.families.family import ATTENTION_BIAS
from pyengine.families.qwen2 import Qwen
from pyengine.spec import ModelSpec


class Qwen3(Qwen):
    def spec_from_config(self, config: Mapping[str, Any]) -> ModelSpec:
        return super().spec_from_config({"head_dim": 128} | dict(config))


FAMILY = Qwen3(
    name="qwen3",
    classes={"qwen3": "Qwen3ForCausalLM"},
    gguf_architecture="qwen3",
    traits={"qk_norm": "head"},
    options=(ATTENTION_BIAS,),
    default_num_kv_heads=32,
)
