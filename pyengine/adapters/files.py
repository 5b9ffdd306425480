"""A folder with adapter_config.json and adapter_model.safetensors, checked against the description of a model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pyengine.adapters.config import AdapterConfig
from pyengine.errors import ArgumentError, BackendUnavailable
from pyengine.families import family_of, stored_rows
from pyengine.formats import SafetensorsReader, open_safetensors, write_safetensors
from pyengine.formats.atomic import atomic_write
from pyengine.jsonfile import file_error, read_json_object
from pyengine.ledger import content_id
from pyengine.spec import ModelSpec

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 4 << 20

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class LinearModule:
    """A linear layer of the model in transformers: y [num_outputs] = weight @ x [num_inputs]."""

    name: str
    layer: int
    weights: tuple[str, ...]
    """The weights of `ModelSpec.tensor_shapes` that it holds, stacked in this order."""
    num_outputs: int
    num_inputs: int


@dataclass(frozen=True, eq=False)
class AdapterModule:
    """The adapter of one linear layer: adds scale * b @ (a @ x)."""

    module: LinearModule
    a: Array
    """[rank, num_inputs] float32 or bfloat16."""
    b: Array
    """[num_outputs, rank]."""
    scale: float


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """An adapter, checked against the model that it is for."""

    path: str
    content_id: str
    """Of the two files, one after the other."""
    config: AdapterConfig
    modules: tuple[AdapterModule, ...]

    @property
    def rank(self) -> int:
        """The largest of its modules."""
        return max(len(module.a) for module in self.modules)

    @property
    def num_parameters(self) -> int:
        return sum(module.a.size + module.b.size for module in self.modules)


def linear_modules(spec: ModelSpec) -> dict[str, LinearModule]:
    """The linear layers inside the decoder's layers, by their name in transformers.

    Raises BackendUnavailable for an MLP without a gate, and for a family whose files hold weights transposed or with
    their rows in another order.
    """
    if not spec.gated_mlp:
        raise BackendUnavailable(f"adapter: expected a model whose MLP has a gate, got one of {spec.family} without")
    tensors = family_of(spec).folder_tensors(spec).values()
    if any(t.is_transposed or not all(isinstance(rows, slice) for rows in t.weights.values()) for t in tensors):
        raise BackendUnavailable(
            "adapter: expected a model whose files hold weights [out, in] with rows in order, "
            f"got one of {spec.family}, where they are transposed or in another order"
        )
    shapes = spec.tensor_shapes()
    parts: dict[str, list[str]] = {}
    for weight, place in stored_rows(spec, family_of(spec).folder_tensor_names(spec)).items():
        if len(shapes[weight]) == 2 and _LAYER.match(weight):
            parts.setdefault(place.name.removesuffix(".weight"), []).append(weight)
    modules = {}
    for name, weights in parts.items():
        match = _LAYER.match(name)
        assert match is not None
        num_outputs = sum(shapes[weight][0] for weight in weights)
        modules[name] = LinearModule(name, int(match[1]), tuple(weights), num_outputs, shapes[weights[0]][1])
    return modules


def read_adapter(folder: str | os.PathLike[str], spec: ModelSpec) -> AdapterWeights:
    """The adapter in `folder`, for a model of `spec`.

    Raises:
        ModelFileError: a file is missing, breaks its format, or does not fit the model; `field` is the key of the
            config or the name of the tensor.
        BackendUnavailable: a family whose adapters are not computed; see `linear_modules`.
    """
    config_path, path = Path(folder) / CONFIG_NAME, Path(folder) / WEIGHTS_NAME
    try:
        config = AdapterConfig.from_dict(read_json_object(config_path, max_bytes=MAX_CONFIG_BYTES))
    except ArgumentError as error:
        field, _, message = str(error).partition(": ")
        raise file_error(config_path, message, field=field) from error
    if not path.exists() and (Path(folder) / "adapter_model.bin").exists():
        raise file_error(path, "expected this file, got adapter_model.bin: pickles are not read")
    file = open_safetensors(path)
    modules = linear_modules(spec)
    halves = _halves(file, config, modules)
    expected = config.targets(modules)
    for name in halves.keys() if expected is None else sorted({*expected, *halves}):
        if name not in halves or (expected is not None and name not in expected):
            got = "one" if name in halves else "none"
            message = f"expected adapters of the modules it names, got {got} of {name}"
            raise file_error(config_path, message, field="target_modules")
        if len(halves[name]) != 2:
            missing = "B" if "A" in halves[name] else "A"
            raise file_error(path, "expected this tensor, got none of that name", field=_tensor(name, missing))
    if not halves:
        raise file_error(path, "expected the adapter of at least one module, got none")
    adapters = tuple(
        AdapterModule(
            modules[name],
            _values(file, _tensor(name, "A"), halves[name]["A"]),
            _values(file, _tensor(name, "B"), halves[name]["B"]),
            config.scale_of(name),
        )
        for name in modules
        if name in halves
    )
    ids = content_id(config_path) + content_id(path)
    return AdapterWeights(os.fspath(folder), content_id(ids.encode()), config, adapters)


def write_adapter(
    folder: str | os.PathLike[str],
    spec: ModelSpec,
    config: AdapterConfig,
    weights: Mapping[str, tuple[Array, Array]],
) -> None:
    """Writes the two files into `folder`, each whole or not at all; PEFT and `read_adapter` read them.

    Args:
        weights: name of a linear module -> (a [rank, num_inputs], b [num_outputs, rank]), float32 or bfloat16.

    Raises:
        ArgumentError: modules that are not those of the model and of `config`, or shapes that do not fit.
        BackendUnavailable: a family whose adapters are not computed; see `linear_modules`.
    """
    modules = linear_modules(spec)
    expected = config.targets(modules)
    if not weights or (expected is not None and set(expected) != set(weights)):
        raise ArgumentError(f"weights: expected those of {expected!r:.200}, got {sorted(weights)!r:.200}")
    tensors = {}
    for name, pair in weights.items():
        if name not in modules:
            raise ArgumentError(f"weights: expected linear modules of the model, got {name!r:.80}")
        for half, shape, value in zip("AB", _shapes(modules[name], config), pair, strict=True):
            if value.shape != shape or value.dtype not in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
                raise ArgumentError(
                    f"weights: expected {_tensor(name, half)} of shape {shape} in float32 or bfloat16, "
                    f"got {value.shape} in {value.dtype}"
                )
            tensors[_tensor(name, half)] = value
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    write_safetensors(place / WEIGHTS_NAME, tensors, {"format": "pt"})
    with atomic_write(place / CONFIG_NAME) as out:
        out.write(json.dumps(config.to_dict(), indent=2).encode())


def _tensor(module: str, half: str) -> str:
    return f"{_PREFIX}{module}.lora_{half}.weight"


def _shapes(module: LinearModule, config: AdapterConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    rank = config.rank_of(module.name)
    return (rank, module.num_inputs), (module.num_outputs, rank)


def _halves(
    file: SafetensorsReader, config: AdapterConfig, modules: Mapping[str, LinearModule]
) -> dict[str, dict[str, str]]:
    """Module -> half -> dtype, of all tensors of the file, whose shapes are right."""
    halves: dict[str, dict[str, str]] = {}
    for tensor in file:
        match = _TENSOR.fullmatch(tensor)
        if match is None or match[1] not in modules:
            raise file_error(file.path, "expected lora_A and lora_B of linear modules of the model only", field=tensor)
        name, half = match.groups()
        info = file.info(tensor)
        shape = _shapes(modules[name], config)[half == "B"]
        if info.shape != shape:
            raise file_error(file.path, f"expected shape {shape}, got {info.shape}", field=tensor)
        if info.dtype not in ("F32", "BF16", "F16"):
            raise file_error(file.path, f"expected F32, BF16 or F16, got {info.dtype}", field=tensor)
        halves.setdefault(name, {})[half] = info.dtype
    return halves


def _values(file: SafetensorsReader, tensor: str, dtype: str) -> Array:
    # A copy: the file may change, and its tensors need not be aligned.
    values = np.array(file[tensor], np.float32 if dtype == "F16" else None)
    if not np.isfinite(values.astype(np.float32)).all():
        raise file_error(file.path, "expected finite values, got NaN or infinity", field=tensor)
    return values
