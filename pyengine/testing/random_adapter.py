"""Random low-rank adapters on disk, made without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.adapters import AdapterConfig, linear_modules, write_adapter
from pyengine.spec import ModelSpec


def write_random_adapter(
    folder: Path, spec: ModelSpec, dtype: npt.DTypeLike = np.float32, *, seed: int = 0, std: float = 0.1, **config: Any
) -> Path:
    """Writes an adapter for a model of `spec` in the format of PEFT; both halves random, so that it matters.

    `config` are fields of AdapterConfig; target_modules has to be names. Returns `folder`.
    """
    rng = np.random.default_rng(seed)
    settings = AdapterConfig(**config)
    modules = linear_modules(spec)
    weights = {}
    for name in settings.targets(modules) or ():
        module, rank = modules[name], settings.rank_of(name)
        shapes = (rank, module.num_inputs), (module.num_outputs, rank)
        a, b = ((rng.standard_normal(shape) * std).astype(dtype) for shape in shapes)
        weights[name] = a, b
    write_adapter(folder, spec, settings, weights)
    return folder
