"""Command R: attention and MLP side by side behind one layer norm without bias; files hold a rotary pair together."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError
from pyengine.families.family import ATTENTION_BIAS, Family
from pyengine.families.fields import get_float
from pyengine.families.gguf_keys import shortest
from pyengine.spec import ModelSpec


def divisor_of(scale: float, key: str) -> float:
    if not 1e-6 <= scale <= 1e6:
        raise ArgumentError(f"{key}: expected a number in [1e-06, 1e+06], got {scale}")
    return 1.0 / scale


def scale_of(divisor: float) -> float:
    """A float whose reciprocal is `divisor`, where there is one."""
    scale = 1.0 / divisor
    near = (scale, math.nextafter(scale, 0.0), math.nextafter(scale, math.inf))
    return next((value for value in near if 1.0 / value == divisor), scale)


class Cohere(Family):
    def fields_from_config(self, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {"logits_divisor": divisor_of(get_float(config, "logit_scale", 0.0625), "logit_scale")}

    def fields_to_config(self, spec: ModelSpec) -> dict[str, Any]:
        return {"logit_scale": scale_of(spec.logits_divisor)}

    def fields_from_gguf(
        self, metadata: Mapping[str, Any], sizes: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Any]:
        key = f"{self.gguf_architecture}.logit_scale"
        return {"logits_divisor": divisor_of(shortest(get_float(metadata, key, 1.0)), key)}

    def fields_to_gguf(self, spec: ModelSpec) -> dict[str, Any]:
        if not spec.tie_word_embeddings:
            raise ArgumentError(
                "tie_word_embeddings: expected True, which a GGUF file of "
                f"{self.gguf_architecture} can say, got {spec.tie_word_embeddings}"
            )
        return {f"{self.gguf_architecture}.logit_scale": scale_of(spec.logits_divisor)}

    def folder_row_order(self, spec: ModelSpec, name: str) -> npt.NDArray[np.int64] | None:
        # Folders and GGUF files agree here.
        return self.gguf_row_order(spec, name)


FAMILY = Cohere(
    name="cohere",
    classes={"cohere": "CohereForCausalLM"},
    gguf_architecture="command-r",
    traits={"norm": "layer", "norm_placement": "shared", "parallel_blocks": True},
    options=(ATTENTION_BIAS,),
    config_keys=frozenset({"logit_scale"}),
    default_theta=5e5,
    default_norm_eps=1e-5,
    is_tied=True,
    gguf_permuted=True,
    gguf_keys=frozenset({"logit_scale"}),
    eps_key="layer_norm_eps",
)
