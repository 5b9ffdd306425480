"""Shared by tests and benchmarks: the accuracy rule, memory layouts, ISA forcing, guard pages, tiny models.

What needs torch lies in `accuracy`, `guard` and `blocks`; its names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_ACCURACY = ("LAYOUTS", "assert_accurate", "assert_same_bits", "force_isa", "force_num_threads")


def __getattr__(name: str) -> Any:
    if name in _ACCURACY:
        return getattr(importlib.import_module("pyengine.testing.accuracy"), name)
    raise AttributeError(f"module 'pyengine.testing' has no attribute {name!r}")
