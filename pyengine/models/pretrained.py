"""Models from and to disk: Hugging Face folders in and out, GGUF files in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyengine.errors import ArgumentError, ModelFileError
from pyengine.families import (
    config_from_spec,
    family_of,
    load_spec,
    read_rope_factors,
    spec_from_gguf,
    stored_rows,
    stored_shapes,
)
from pyengine.formats import GgufReader, SafetensorsReader, open_gguf, open_safetensors, write_safetensors
from pyengine.formats.atomic import atomic_write
from pyengine.jsonfile import read_json_object
from pyengine.models.causal_lm import CausalLM
from pyengine.models.tensors import from_numpy, to_numpy
from pyengine.spec import ModelSpec

SAFETENSORS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_LM_HEAD = "lm_head.weight"


def from_pretrained(
    path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, max_context: int | None = None
) -> CausalLM:
    """The model in a Hugging Face folder (config.json and safetensors) or in a GGUF file, then dequantised.

    Args:
        path: the folder or file.
        dtype: of the parameters, float32 or bfloat16; weights stored otherwise are rounded once.
        max_context: see `CausalLM`.

    Raises:
        ModelFileError: a file is missing or damaged, or its tensors are not those of the model.
    """
    path = Path(path)
    if path.is_dir():
        spec = load_spec(path)
        tensors = _read_folder(path, spec, dtype)
    else:
        reader = open_gguf(path)
        spec = _gguf_spec(reader)
        tensors = _read_gguf(reader, spec, dtype)
    model = CausalLM(spec, dtype=dtype, device="meta", max_context=max_context)
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    return model.requires_grad_()


def save_pretrained(model: CausalLM, folder: str | os.PathLike[str]) -> None:
    """Write config.json and model.safetensors, which transformers and `from_pretrained` load to the same logits.

    Each file appears whole or not at all; weights keep their dtype.

    Raises:
        ArgumentError: a model that config.json cannot describe, such as one of Gemma from a GGUF file, whose norms hold
            the sum of weight and offset.
    """
    folder, config = Path(folder), config_json(model)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: to_numpy(tensor) for name, tensor in model.state_dict().items()}
    tensors = {
        stored: tensor.join({name: weights[name] for name in tensor.weights})
        for stored, tensor in family_of(model.spec).folder_tensors(model.spec).items()
    }
    write_safetensors(folder / SAFETENSORS_NAME, tensors, metadata={"format": "pt"})
    with atomic_write(folder / "config.json") as file:
        file.write(config)


def config_json(model: CausalLM) -> bytes:
    """The content of a config.json for `model`."""
    import json

    dtype = _DTYPE_NAMES[model.output_weight.dtype]
    # Older readers know only torch_dtype.
    config = config_from_spec(model.spec) | {"dtype": dtype, "torch_dtype": dtype}
    return json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"


def _read_folder(folder: Path, spec: ModelSpec, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    files = _open_files(folder)
    where = {name: file for file in files for name in file}
    family = family_of(spec)
    tensors = family.folder_tensors(spec)
    # Older folders leave a part of every name away.
    prefix = "" if next(iter(tensors)) in where else family.folder_prefix
    for full_name, tensor in tensors.items():
        stored = full_name.removeprefix(prefix)
        if stored not in where:
            raise ModelFileError(str(folder), None, stored, "expected this tensor, got none")
        array = where[stored][stored]
        if array.shape != tensor.shape:
            raise ModelFileError(where[stored].path, None, stored, f"expected shape {tensor.shape}, got {array.shape}")
        rows = tensor.upright(array)
        for name, index in tensor.weights.items():
            yield name, _as_parameter(where[stored].path, stored, rows[index], dtype)
    embedding = next(iter(tensors)).removeprefix(prefix)
    for name in sorted(where.keys() - {stored.removeprefix(prefix) for stored in tensors}):
        if name.endswith(("rotary_emb.inv_freq", *family.folder_extra)):
            continue
        if name == _LM_HEAD and _same_bytes(where, _LM_HEAD, embedding):
            continue
        raise ModelFileError(where[name].path, None, name, "expected only tensors of the model, got this one")


def _open_files(folder: Path) -> list[SafetensorsReader]:
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        return [open_safetensors(folder / SAFETENSORS_NAME)]
    weight_map = read_json_object(index_path, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelFileError(str(index_path), None, "weight_map", "expected an object of tensor names and file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            message = f"expected file names in the folder, got {name!r}"
            raise ModelFileError(str(index_path), None, "weight_map", message)
    return [open_safetensors(folder / name) for name in names]


def _same_bytes(where: Mapping[str, SafetensorsReader], name: str, other: str) -> bool:
    return name in where and other in where and where[name].data(name) == where[other].data(other)


def _gguf_spec(reader: GgufReader) -> ModelSpec:
    try:
        return spec_from_gguf(reader.metadata, set(reader), rope_factors=read_rope_factors(reader))
    except ArgumentError as error:
        field, _, message = str(error).partition(": ")
        raise ModelFileError(reader.path, None, field, message) from error


def _read_gguf(reader: GgufReader, spec: ModelSpec, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    family = family_of(spec)
    names = family.gguf_tensor_names(spec)
    shapes = stored_shapes(spec, names)
    for name, place in stored_rows(spec, names).items():
        gguf_name, shape = place.name, shapes[place.name]
        if gguf_name not in reader:
            raise ModelFileError(reader.path, None, gguf_name, "expected this tensor, got none")
        if reader.info(gguf_name).shape != shape:
            got = reader.info(gguf_name).shape
            raise ModelFileError(reader.path, None, gguf_name, f"expected shape {shape}, got {got}")
        values = reader.dequantize(gguf_name)[place.start : place.stop]
        rows = family.gguf_row_order(spec, name)
        yield name, from_numpy(values if rows is None else values[rows], dtype)


def _as_parameter(path: str, name: str, array: np.ndarray, dtype: torch.dtype) -> Tensor:
    if array.dtype.name not in ("float32", "float16", "bfloat16", "float64"):
        raise ModelFileError(path, None, name, f"expected a float dtype, got {array.dtype}")
    return from_numpy(array, dtype)
