"""Every block format that weights can be converted to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine import _C
from pyengine.formats.blocks import (
    quantize_iq4_nl,
    quantize_q4_0,
    quantize_q4_1,
    quantize_q5_0,
    quantize_q5_1,
    quantize_q8_0,
)
from pyengine.formats.super_blocks import quantize_q4_k, quantize_q5_k, quantize_q6_k

__all__ = ["QUANTIZERS", "block_geometry"]

QUANTIZERS: dict[str, Callable[[npt.NDArray[Any], bool], npt.NDArray[np.uint8]]] = {
    "q8_0": quantize_q8_0,
    "q6_k": quantize_q6_k,
    "q5_1": quantize_q5_1,
    "q5_k": quantize_q5_k,
    "q5_0": quantize_q5_0,
    "q4_1": quantize_q4_1,
    "q4_k": quantize_q4_k,
    "q4_0": quantize_q4_0,
    "iq4_nl": quantize_iq4_nl,
}
"""Format -> (weight [..., in_features], whether to search for better scales) -> uint8 [..., bytes of a row]."""


def block_geometry(block_format: str) -> tuple[int, int]:
    """(values of a block, bytes of a block)."""
    block_size, block_bytes, _ = _C.block_formats()[block_format]
    return block_size, block_bytes
