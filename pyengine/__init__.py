"""pyengine: one native engine for the whole life of a language model.

Importing it loads neither numpy nor torch; each name below is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pyengine.infer import LLM, AsyncLLM, SamplingParams

# public name -> the module that defines it
_LAZY = {"LLM": "pyengine.infer", "AsyncLLM": "pyengine.infer", "SamplingParams": "pyengine.infer"}
_LAZY_MODULES = (
    "data",
    "evals",
    "families",
    "formats",
    "infer",
    "models",
    "nn",
    "ops",
    "optim",
    "recipes",
    "tokenizer",
)

__all__ = ["LLM", "AsyncLLM", "SamplingParams", "__version__", *_LAZY_MODULES]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"pyengine.{name}")
    raise AttributeError(f"module 'pyengine' has no attribute {name!r}")
