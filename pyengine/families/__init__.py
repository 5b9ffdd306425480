"""Families of models: each maps config.json and GGUF metadata to `ModelSpec` and back. Add a family to `FAMILIES`."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError
from pyengine.families import (
    cohere,
    cohere2,
    falcon,
    gemma,
    gemma3,
    gpt2,
    gpt_neox,
    granite,
    llama,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    smollm3,
    stablelm,
    starcoder2,
)
from pyengine.families.family import Family
from pyengine.families.gguf_keys import read_rope_factors
from pyengine.families.rows import permute_rows, unpermute_rows
from pyengine.families.stacking import StoredRows, StoredTensor, stacked_weights, stored_rows, stored_shapes
from pyengine.jsonfile import file_error, read_json_object
from pyengine.spec import ModelSpec

__all__ = [
    "FAMILIES",
    "Family",
    "StoredRows",
    "StoredTensor",
    "config_from_spec",
    "family_of",
    "gguf_metadata_from_spec",
    "load_config",
    "load_generation_config",
    "load_spec",
    "permute_rows",
    "read_rope_factors",
    "spec_from_config",
    "spec_from_gguf",
    "stacked_weights",
    "stored_rows",
    "stored_shapes",
    "unpermute_rows",
]

FAMILIES: tuple[Family, ...] = tuple(
    module.FAMILY
    for module in (
        llama,
        qwen2,
        qwen3,
        smollm3,
        granite,
        phi3,
        olmo2,
        gemma,
        gemma3,
        gpt2,
        starcoder2,
        gpt_neox,
        stablelm,
        falcon,
        cohere,
        cohere2,
    )
)

MAX_CONFIG_BYTES = 4 << 20


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json's content. Raises ArgumentError with the key for whatever no family computes."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family.spec_from_config(config)
    known = sorted(name for family in FAMILIES for name in family.model_types)
    raise ArgumentError(f"model_type: expected one of {known}, got {model_type!r:.80}")


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The content of a config.json for `spec`, which `spec_from_config` and transformers read."""
    return family_of(spec).config_from_spec(spec)


def spec_from_gguf(
    metadata: Mapping[str, Any],
    tensor_names: Collection[str],
    *,
    rope_factors: Mapping[str, npt.NDArray[np.floating[Any]]] | None = None,
) -> ModelSpec:
    """The spec of a GGUF file: its metadata, the names of its tensors, and its `read_rope_factors`."""
    architecture = metadata.get("general.architecture")
    for family in FAMILIES:
        if architecture == family.gguf_architecture:
            return family.spec_from_gguf(metadata, tensor_names, rope_factors or {})
    known = sorted(family.gguf_architecture for family in FAMILIES)
    raise ArgumentError(f"general.architecture: expected one of {known}, got {architecture!r:.80}")


def gguf_metadata_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """Architecture metadata of a GGUF file for `spec`."""
    return family_of(spec).gguf_metadata_from_spec(spec)


def family_of(spec: ModelSpec) -> Family:
    """The family that `spec.family` names."""
    for family in FAMILIES:
        if family.name == spec.family:
            return family
    raise ArgumentError(f"family: expected one of {[family.name for family in FAMILIES]}, got {spec.family!r:.80}")


def load_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in `folder`/config.json, at most 4 MiB. Raises ModelFileError."""
    return read_json_object(Path(folder) / "config.json", max_bytes=MAX_CONFIG_BYTES)


def load_generation_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in `folder`/generation_config.json, or an empty one where there is no such file."""
    path = Path(folder) / "generation_config.json"
    return read_json_object(path, max_bytes=MAX_CONFIG_BYTES) if path.exists() else {}


def load_spec(folder: str | os.PathLike[str]) -> ModelSpec:
    """The spec of a Hugging Face folder. Special token ids of generation_config.json win over those of config.json.

    Raises ModelFileError with the key in `field`.
    """
    config = load_config(folder)
    generation = load_generation_config(folder)
    special = {key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in generation}
    try:
        return spec_from_config(config | {key: value for key, value in special.items() if value is not None})
    except ArgumentError as error:
        field, _, message = str(error).partition(": ")
        raise file_error(Path(folder) / "config.json", message, field=field) from error
