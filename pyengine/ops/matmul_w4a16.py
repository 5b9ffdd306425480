"""Products with low-bit block weights and float activations. Contract: csrc/include/pe/matmul_w4a16.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyengine import _C
from pyengine.ops._library import FLOATS, check, check_dtype, lib, rows

lib.define("matmul_w4a16(Tensor x, Tensor packed, int num_rows, str block_format, ScalarType? out_dtype) -> Tensor")

OP = "matmul_w4a16"
PANEL_ROWS = 16
# name -> (k of a block, bytes of a GGUF block of one row, bytes of a packed block of one panel)
BLOCK_FORMATS = _C.block_formats()


def pack_blocks(raw: Tensor, block_format: str, row_order: Tensor | None = None) -> Tensor:
    """Reorder raw GGUF rows for the kernels, losing nothing.

    raw: uint8 [R, bytes of a row] of a format in BLOCK_FORMATS. row_order: int32 [N], the raw row of each packed row;
    None keeps all rows in order. Returns uint8 [packed bytes]; layout: csrc/include/pe/block_weights.h.
    Raises ArgumentError for partial blocks and for rows outside of raw.
    """
    # Sizes that do not fit are the binding's to refuse.
    block_size, block_bytes, _ = BLOCK_FORMATS.get(block_format, (1, 1, 1))
    num_cols = raw.shape[-1] // block_bytes * block_size
    num_rows = raw.shape[0] if row_order is None else row_order.shape[0]
    packed = torch.empty(_C.block_weights_packed_bytes(block_format, num_rows, num_cols), dtype=torch.uint8)
    _C.block_weights_pack(block_format, raw, row_order, packed)
    return packed


def check_operands(op: str, x: Tensor, packed: Tensor, num_rows: int, block_format: str) -> None:
    """One check for the real kernels and the fake ones of every op over packed block weights."""
    check(x.dim() >= 1, op, "x", "at least 1 dimension", f"shape {tuple(x.shape)}")
    check_dtype(op, "x", x, FLOATS)
    check(block_format in BLOCK_FORMATS, op, "block_format", f"one of {', '.join(BLOCK_FORMATS)}", repr(block_format))
    block_size, _, packed_block_bytes = BLOCK_FORMATS[block_format]
    check(x.shape[-1] % block_size == 0, op, "x", f"a last dimension that is a multiple of {block_size}", x.shape[-1])
    check(num_rows >= 0, op, "num_rows", "a count", num_rows)
    check_dtype(op, "packed", packed, (torch.uint8,))
    check(packed.device == x.device, op, "packed", f"device {x.device}, the device of x", packed.device)
    panels = (num_rows + PANEL_ROWS - 1) // PANEL_ROWS
    num_bytes = panels * (x.shape[-1] // block_size) * packed_block_bytes
    expected = f"shape ({num_bytes},), {block_format} of {num_rows} rows of {x.shape[-1]}"
    check(packed.dim() == 1 and packed.shape[0] == num_bytes, op, "packed", expected, f"{tuple(packed.shape)}")


def empty_output(op: str, x: Tensor, num_rows: int, out_dtype: torch.dtype | None) -> Tensor:
    dtype = out_dtype or x.dtype
    check(dtype in FLOATS, op, "out_dtype", " or ".join(str(d) for d in FLOATS), dtype)
    return x.new_empty((*x.shape[:-1], num_rows), dtype=dtype)


def check_no_grad(op: str, x: Tensor) -> None:
    wanted = torch.is_grad_enabled() and x.requires_grad
    check(not wanted, op, "x", "a tensor without requires_grad (this op has no gradient)", "requires_grad=True")


@torch.library.impl(lib, "matmul_w4a16", "CPU")
def _(x: Tensor, packed: Tensor, num_rows: int, block_format: str, out_dtype: torch.dtype | None) -> Tensor:
    check_operands(OP, x, packed, num_rows, block_format)
    y = empty_output(OP, x, num_rows, out_dtype)
    _C.matmul_w4a16_cpu(rows(x), packed.contiguous(), block_format, rows(y))
    return y


@torch.library.register_fake("pyengine::matmul_w4a16", lib=lib)
def _(x: Tensor, packed: Tensor, num_rows: int, block_format: str, out_dtype: torch.dtype | None) -> Tensor:
    check_operands(OP, x, packed, num_rows, block_format)
    return empty_output(OP, x, num_rows, out_dtype)


def matmul_w4a16(
    x: Tensor, packed: Tensor, *, num_rows: int, block_format: str, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x @ w^T with the exact values of block weights.

    x [..., K] f32 or bf16, K a multiple of the format's block (32 or 256); packed: pack_blocks of w [num_rows, K] in
    block_format, one of BLOCK_FORMATS. Returns [..., num_rows] in out_dtype (f32, bf16; default: that of x). Inference
    only: no gradient.
    """
    check_no_grad(OP, x)
    return torch.ops.pyengine.matmul_w4a16(x, packed, num_rows, block_format, out_dtype)  # type: ignore[no-any-return]
