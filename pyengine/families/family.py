"""What a family of models provides: mappings between `ModelSpec` and the descriptions other systems write."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family. `model_types` are values of `model_type` in config.json, `gguf_architectures` of
    `general.architecture` in a GGUF file."""

    name: str
    model_types: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    spec_from_config: Callable[[Mapping[str, Any]], ModelSpec]
    config_from_spec: Callable[[ModelSpec], dict[str, Any]]
    spec_from_gguf: Callable[[Mapping[str, Any], Collection[str], npt.NDArray[np.floating[Any]] | None], ModelSpec]
    gguf_metadata_from_spec: Callable[[ModelSpec], dict[str, Any]]
    gguf_rope_freqs: Callable[[ModelSpec], npt.NDArray[np.float32] | None]
    """The tensor rope_freqs.weight [D/2] that a GGUF file of the model needs, or None."""
    gguf_tensor_names: Callable[[ModelSpec], dict[str, str]]
    """Hugging Face name -> GGUF name of every weight."""
    gguf_row_order: Callable[[ModelSpec, str], npt.NDArray[np.int64] | None]
    """Index array i of a weight's Hugging Face name, so that hf = gguf[i]; None where the rows agree."""
