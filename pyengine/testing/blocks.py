"""Random rows of GGUF blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from pyengine.reference.block_weights import BLOCK_BYTES, BLOCK_SIZE

# Scale bytes in front of the codes: d, or d and m.
SCALE_BYTES = {"q4_0": 2, "q4_1": 4, "q8_0": 2}


def blocks(block_format: str, scales: Tensor, codes: Tensor) -> Tensor:
    """Raw rows uint8 [N, G * bytes per block]; scales f16 [N, G, 1 or 2] (d, m), codes uint8 [N, G, 16 or 32]."""
    scale_bytes = scales.contiguous().view(torch.uint8).reshape(*scales.shape[:2], SCALE_BYTES[block_format])
    return torch.cat([scale_bytes, codes], -1).flatten(1)


def random_codes(block_format: str, num_rows: int, num_cols: int) -> Tensor:
    """Every byte is a legal code, so all of them are drawn."""
    num_bytes = BLOCK_BYTES[block_format] - SCALE_BYTES[block_format]
    return torch.randint(0, 256, (num_rows, num_cols // BLOCK_SIZE, num_bytes), dtype=torch.uint8)


def random_blocks(block_format: str, num_rows: int, num_cols: int) -> Tensor:
    """Raw rows whose weights have about unit variance; scales of both signs."""
    code_range = 74.0 if block_format == "q8_0" else 4.6
    scales = torch.randn(num_rows, num_cols // BLOCK_SIZE, SCALE_BYTES[block_format] // 2) / code_range
    if block_format == "q4_1":
        scales[..., 1] -= 7.5 * scales[..., 0]
    return blocks(block_format, scales.half(), random_codes(block_format, num_rows, num_cols))


def integer_blocks(block_format: str, num_rows: int, num_cols: int) -> Tensor:
    """Raw rows whose weights are integers of at most 2 * 128 + 100."""
    scales = torch.randint(1, 3, (num_rows, num_cols // BLOCK_SIZE, SCALE_BYTES[block_format] // 2))
    if block_format == "q4_1":
        scales[..., 1] = torch.randint(-100, 101, scales.shape[:2])
    return blocks(block_format, scales.half(), random_codes(block_format, num_rows, num_cols))
