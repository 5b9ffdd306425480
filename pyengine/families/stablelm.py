"""StableLM: layer norms and a gated MLP; a part of each head turns; blocks may stand side by side behind one norm."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyengine.families.family import Family, Option
from pyengine.families.fields import get_bool
from pyengine.families.rope_config import rope_to_config, with_default_factor, with_factor
from pyengine.spec import ModelSpec

_FACTOR = 0.25


def _blocks(are_parallel: bool) -> dict[str, Any]:
    return {"parallel_blocks": are_parallel, "norm_placement": "shared" if are_parallel else "pre"}


class StableLm(Family):
    def _spec_from_config(self, config: Mapping[str, Any]) -> ModelSpec:
        return super()._spec_from_config(with_default_factor(config, _FACTOR))

    def fields_from_config(self, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        return _blocks(get_bool(config, "use_parallel_residual", False))

    def fields_to_config(self, spec: ModelSpec) -> dict[str, Any]:
        rope = rope_to_config(spec.rope, rotary_dim=spec.rotary_dim, head_dim=spec.head_dim)
        return with_factor(rope, spec.rotary_dim) | {"use_parallel_residual": spec.parallel_blocks}

    def fields_from_gguf(
        self, metadata: Mapping[str, Any], sizes: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Any]:
        return _blocks("blk.0.ffn_norm.weight" not in tensor_names)

    def fields_to_gguf(self, spec: ModelSpec) -> dict[str, Any]:
        return {"stablelm.use_parallel_residual": spec.parallel_blocks}


FAMILY = StableLm(
    name="stablelm",
    classes={"stablelm": "StableLmForCausalLM"},
    gguf_architecture="stablelm",
    traits={"norm": "layer", "norm_bias": True},
    options=(Option(fields=("qkv_bias",), config_key="use_qkv_bias", default=False),),
    default_norm_eps=1e-5,
    default_num_kv_heads=32,
    partial_rotary=True,
    gguf_biases=("qkv_bias",),
    gguf_tied=False,
    renamed_keys={"head_dim": ""},
    eps_key="layer_norm_eps",
)
