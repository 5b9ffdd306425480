"""Products with low-bit block weights and int8 activations. Contract: csrc/include/pe/matmul_w4a8.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyengine import _C
from pyengine.ops._library import lib, rows
from pyengine.ops.matmul_w4a16 import check_no_grad, check_operands, empty_output

lib.define("matmul_w4a8(Tensor x, Tensor packed, int num_rows, str block_format, ScalarType? out_dtype) -> Tensor")

OP = "matmul_w4a8"


@torch.library.impl(lib, "matmul_w4a8", "CPU")
def _(x: Tensor, packed: Tensor, num_rows: int, block_format: str, out_dtype: torch.dtype | None) -> Tensor:
    check_operands(OP, x, packed, num_rows, block_format)
    y = empty_output(OP, x, num_rows, out_dtype)
    _C.matmul_w4a8_cpu(rows(x), packed.contiguous(), block_format, rows(y))
    return y


@torch.library.register_fake("pyengine::matmul_w4a8", lib=lib)
def _(x: Tensor, packed: Tensor, num_rows: int, block_format: str, out_dtype: torch.dtype | None) -> Tensor:
    check_operands(OP, x, packed, num_rows, block_format)
    return empty_output(OP, x, num_rows, out_dtype)


def matmul_w4a8(
    x: Tensor, packed: Tensor, *, num_rows: int, block_format: str, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x @ w^T with the exact values of block weights and x rounded to int8 in groups of 32 columns.

    x [..., K] f32 or bf16, K a multiple of the format's block (32 or 256); packed: pack_blocks (ops/matmul_w4a16.py)
    of w [num_rows, K] in block_format, one of BLOCK_FORMATS. Returns [..., num_rows] in out_dtype (f32, bf16; default:
    that of x). Each element of x moves by at most 1/254 of the largest one of its group. Inference only: no gradient.
    """
    check_no_grad(OP, x)
    return torch.ops.pyengine.matmul_w4a8(x, packed, num_rows, block_format, out_dtype)  # type: ignore[no-any-return]
