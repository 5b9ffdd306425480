"""The specification of matmul_w4a16. Contract: csrc/include/pe/matmul_w4a16.h."""

import torch
from torch import Tensor

from pyengine.reference.block_weights import dequantize


def matmul_w4a16(x: Tensor, raw: Tensor, block_format: str, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """x [..., K] @ w [N, K]^T with w from raw GGUF rows, computed in at least float32."""
    acc = torch.promote_types(x.dtype, torch.float32)
    return (x.to(acc) @ dequantize(raw, block_format, acc).T).to(out_dtype or x.dtype)
