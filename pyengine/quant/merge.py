"""A model with an adapter folded into its weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pyengine.adapters import AdapterModule, read_adapter
from pyengine.errors import ArgumentError, ModelFileError
from pyengine.families import family_of, stacked_weights
from pyengine.formats import write_safetensors
from pyengine.infer.source import FolderSource

_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# What a folder holds beside its weights.
_KEPT = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)

Array = npt.NDArray[Any]


def merge_adapter(
    model: str | os.PathLike[str], adapter: str | os.PathLike[str], folder: str | os.PathLike[str]
) -> None:
    """Writes `folder`: the Hugging Face folder `model` with weight + scale * b @ a where `adapter` has a module,
    computed in float32 and rounded once to the dtype of the weight.

    Rounding costs what serving the adapter beside its model does not. config.json comes last: without it, the folder is
    no model.

    Raises:
        ArgumentError: a model that is no folder, or has no head for text; a `folder` that has a model.
        ModelFileError: files that are broken or do not fit each other, such as a sum that overflows float16.
    """
    source_path, out = Path(model), Path(folder)
    if not source_path.is_dir():
        raise ArgumentError(f"model: expected a Hugging Face folder, got {str(model)!r:.200}")
    if (out / "config.json").exists():
        raise ArgumentError(f"folder: expected one without a config.json, got {str(folder)!r:.200}")
    source = FolderSource(source_path)
    if not source.has_lm_head:
        raise ArgumentError(f"model: expected a language model, got {source.path}, which has no head for text")
    modules = {f"{m.module.name}.weight": m for m in read_adapter(adapter, source.spec).modules}
    tensors = {}
    for stored, weights in stacked_weights(family_of(source.spec).folder_tensor_names(source.spec)).items():
        dtype = _DTYPES[source.stored_format(weights[0])]
        parts = [source.raw(weight)[0].reshape(-1).view(dtype) for weight in weights]
        shapes = [source.spec.tensor_shapes()[weight] for weight in weights]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        value = (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(shape)
        if stored in modules:
            value = _merged(value, modules[stored])
            if not np.isfinite(value).all():
                message = f"expected sums with the adapter that {dtype.name} holds, got inf or nan"
                raise ModelFileError(source.path, None, stored, message)
        tensors[stored] = value
    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(out / "model.safetensors", tensors, {"format": "pt"})
    for name in reversed(_KEPT):
        if (source_path / name).is_file():
            shutil.copyfile(source_path / name, out / name)


def _merged(weight: Array, module: AdapterModule) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        delta = np.float32(module.scale) * (module.b.astype(np.float32) @ module.a.astype(np.float32))
        return (weight.astype(np.float32) + delta).astype(weight.dtype)
