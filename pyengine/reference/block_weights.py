"""The specification of GGUF's 32-element block formats. Contract: csrc/include/pe/block_weights.h."""

import torch
from torch import Tensor

BLOCK_SIZE = 32
BLOCK_BYTES = {"q4_0": 18, "q4_1": 20, "q8_0": 34}


def dequantize(raw: Tensor, block_format: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K] of raw GGUF rows, uint8 [N, K / 32 * BLOCK_BYTES[block_format]]; exact in float64."""
    blocks = raw.reshape(raw.shape[0], -1, BLOCK_BYTES[block_format])
    d = blocks[..., 0:2].contiguous().view(torch.float16).to(dtype)
    if block_format == "q8_0":
        return (d * blocks[..., 2:].contiguous().view(torch.int8)).flatten(1)
    codes = blocks[..., -16:]
    q = torch.cat([codes & 15, codes >> 4], -1).to(dtype)
    if block_format == "q4_0":
        return (d * (q - 8)).flatten(1)
    m = blocks[..., 2:4].contiguous().view(torch.float16).to(dtype)
    return (d * q + m).flatten(1)
