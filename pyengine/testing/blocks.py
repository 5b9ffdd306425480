"""Random rows of GGUF blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from pyengine.reference.block_weights import BLOCK_BYTES, BLOCK_SIZE, dequantize, parts

FORMATS = list(BLOCK_BYTES)
# Scale bytes in front of the codes: d, or d and m.
SCALE_BYTES = {"q4_0": 2, "q4_1": 4, "q5_0": 2, "q5_1": 4, "q8_0": 2, "iq4_nl": 2}
# Where the f16 of a block of 256 lie: d, or d and m.
SUPER_SCALES = {"q2_k": [80, 82], "q3_k": [108], "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208], "iq4_xs": [0]}
# What makes the weights of random blocks about one: the typical code times the typical sub-scale.
_SIZES = {"q4_0": 4.6, "q4_1": 4.6, "q5_0": 9.2, "q5_1": 9.2, "q8_0": 74.0, "iq4_nl": 74.0}
_SUPER_SIZES = {"q2_k": 15.0, "q3_k": 40.0, "q4_k": 300.0, "q5_k": 600.0, "q6_k": 1400.0, "iq4_xs": 1400.0}
_CENTRES = {"q4_1": 7.5, "q5_1": 15.5}


def scale_offsets(block_format: str) -> list[int]:
    """Where the f16 d, and m where there is one, lie in a block."""
    return SUPER_SCALES.get(block_format) or list(range(0, SCALE_BYTES[block_format], 2))


def columns(block_format: str, num_groups: int) -> int:
    """A length of `num_groups` times the smallest that the format takes."""
    return num_groups * BLOCK_SIZE[block_format]


def blocks(block_format: str, scales: Tensor, codes: Tensor) -> Tensor:
    """Raw rows uint8 [N, G * bytes per block]; scales f16 [N, G, 1 or 2] (d, m), codes uint8 [N, G, other bytes]."""
    scale_bytes = scales.contiguous().view(torch.uint8).reshape(*scales.shape[:2], -1)
    if block_format in SCALE_BYTES:
        return torch.cat([scale_bytes, codes], -1).flatten(1)
    at = SUPER_SCALES[block_format][0]
    return torch.cat([codes[..., :at], scale_bytes, codes[..., at:]], -1).flatten(1)


def random_codes(block_format: str, num_rows: int, num_cols: int) -> Tensor:
    """Every byte is a legal code or sub-scale, so all of them are drawn."""
    num_bytes = BLOCK_BYTES[block_format] - 2 * len(scale_offsets(block_format))
    return torch.randint(0, 256, (num_rows, num_cols // BLOCK_SIZE[block_format], num_bytes), dtype=torch.uint8)


def random_blocks(block_format: str, num_rows: int, num_cols: int) -> Tensor:
    """Raw rows whose weights are about one in size; scales of both signs."""
    num_scales = len(scale_offsets(block_format))
    size = (_SIZES | _SUPER_SIZES)[block_format]
    scales = torch.randn(num_rows, num_cols // BLOCK_SIZE[block_format], num_scales) / size
    if block_format in _CENTRES:
        scales[..., 1] -= _CENTRES[block_format] * scales[..., 0]
    return blocks(block_format, scales.half(), random_codes(block_format, num_rows, num_cols))


def integer_blocks(block_format: str, num_rows: int, num_cols: int) -> Tensor:
    """Raw rows whose weights are integers of at most 500."""
    codes = random_codes(block_format, num_rows, num_cols)
    num_blocks = num_cols // BLOCK_SIZE[block_format]
    largest = 1 if block_format in ("q5_k", "iq4_xs") else 2
    scales = torch.randint(1, largest + 1, (num_rows, num_blocks, len(scale_offsets(block_format))))
    if block_format in _CENTRES:
        scales[..., 1] = torch.randint(-100, 101, scales.shape[:2])
    if block_format in ("q4_k", "q5_k"):
        codes[..., :8] &= 15  # sub-scales and minima below 16
    elif block_format == "q6_k":
        codes[..., 192:208] = (torch.randint(-7, 8, (num_rows, num_blocks, 16))).to(torch.int8).view(torch.uint8)
    elif block_format == "iq4_xs":
        codes[..., :2] = 0xAA  # sub-scales 32 ... 35, less 32
        codes[..., 2:6] &= 0x33
    return blocks(block_format, scales.half(), codes)


def term_sizes(raw: Tensor, block_format: str, middle: bool) -> Tensor:
    """|d * code| + |m| of each weight [N, K] in f64, the terms that a product sums; `middle`: of codes less half their
    range."""
    codes, d, m = parts(raw, block_format, torch.float64)
    if m is None:
        return dequantize(raw, block_format, torch.float64).abs()
    if middle:
        half = 2.0 ** int(block_format[1]) / 2
        codes, m = codes - half, m + half * d
    return ((d * codes).abs() + m.abs()).flatten(1)
