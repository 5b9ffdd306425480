"""Low-rank adapters of a model that trains, from and to PEFT's files."""

from __future__ import annotations

import hashlib
import math
import os

import torch
from torch import nn

from pyengine.adapters import AdapterConfig, linear_modules, read_adapter, write_adapter
from pyengine.adapters.files import LinearModule
from pyengine.errors import ArgumentError
from pyengine.models.causal_lm import CausalLM
from pyengine.models.tensors import from_numpy, to_numpy
from pyengine.nn import Linear, LoraLinear


def add_adapter(
    model: CausalLM, config: AdapterConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    """Give the modules that `config` names an adapter that does nothing yet, and freeze all else.

    lora_A is uniform in +-1 / sqrt(in_features), as PEFT has it, from a generator per module; lora_B is 0.

    Returns:
        What there is to train, float32 unless `dtype` says otherwise.

    Raises:
        ArgumentError: a regular expression, no module at all, or a model that has an adapter.
        BackendUnavailable: a family whose adapters are not computed; see `linear_modules`.
    """
    modules = linear_modules(model.spec)
    targets = config.targets(modules)
    if not targets:
        raise ArgumentError(f"target_modules: expected names of linear modules, got {config.target_modules!r:.80}")
    values = {}
    for name in targets:
        module, rank = modules[name], config.rank_of(name)
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8, person=b"pyengine lora").digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        bound = 1.0 / math.sqrt(module.num_inputs)
        a = torch.empty(rank, module.num_inputs).uniform_(-bound, bound, generator=generator)
        values[name] = a.to(dtype), torch.zeros(module.num_outputs, rank, dtype=dtype)
    return _attach(model, config, values)


def load_adapter(model: CausalLM, folder: str | os.PathLike[str]) -> list[nn.Parameter]:
    """Give the model the adapter in `folder`, to train it further, and freeze all else. Weights keep their dtype.

    Raises ModelFileError where the files do not fit the model, ArgumentError for a model that has an adapter,
    BackendUnavailable as `add_adapter` does.
    """
    read = read_adapter(folder, model.spec)
    values = {m.module.name: (from_numpy(m.a), from_numpy(m.b)) for m in read.modules}
    return _attach(model, read.config, values)


def save_adapter(model: CausalLM, folder: str | os.PathLike[str]) -> None:
    """Write the adapter of the model for `LLM.load_adapter`, PEFT and `load_adapter`."""
    weights = {}
    for name, module in linear_modules(model.spec).items():
        parts = [model.get_submodule(weight.removesuffix(".weight")) for weight in module.weights]
        adapted = [part for part in parts if isinstance(part, LoraLinear)]
        if adapted:
            b = torch.cat([part.lora_B.detach() for part in adapted])
            weights[name] = to_numpy(adapted[0].lora_A), to_numpy(b)
    if model.adapter_config is None:
        raise ArgumentError("model: expected one with an adapter, got one without")
    write_adapter(folder, model.spec, model.adapter_config, weights)


def merge_adapter(model: CausalLM) -> None:
    """Fold the adapter of the model into its weights, rounded once to their dtype, and take it off."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            linear = Linear(module.in_features, module.out_features, device="meta")
            linear.weight, linear.bias = nn.Parameter(module.merged_weight()), module.bias
            model.set_submodule(name, linear)
    model.adapter_config = None
    model.requires_grad_()


def _attach(
    model: CausalLM, config: AdapterConfig, values: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> list[nn.Parameter]:
    if model.adapter_config is not None:
        raise ArgumentError("model: expected one without an adapter, got one that has one")
    model.requires_grad_(False)
    modules = linear_modules(model.spec)
    trained = []
    for name, (a, b) in values.items():
        shared = nn.Parameter(a)
        trained.append(shared)
        for weight, rows in zip(modules[name].weights, _split(model, modules[name], b), strict=True):
            path = weight.removesuffix(".weight")
            linear = model.get_submodule(path)
            assert isinstance(linear, Linear)
            half = nn.Parameter(rows.clone())
            scale = config.scale_of(name)
            model.set_submodule(path, LoraLinear(linear, shared, half, scale=scale, dropout=config.dropout))
            trained.append(half)
    model.adapter_config = config
    return trained


def _split(model: CausalLM, module: LinearModule, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows of b for each weight that the module holds stacked."""
    shapes = model.spec.tensor_shapes()
    return torch.split(b, [shapes[weight][0] for weight in module.weights])
