"""int8 activations times int8 weights, exact up to the scales. Contract: csrc/include/pe/matmul_w8a8.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyengine import _C
from pyengine.ops._library import FLOATS, check, check_dtype, check_shape, lib, rows
from pyengine.ops.quantize_int8 import check_inference

lib.define("matmul_w8a8_pack(Tensor w) -> Tensor")
lib.define("matmul_w8a8(Tensor x, Tensor x_scale, Tensor packed, Tensor w_scale, ScalarType dtype) -> Tensor")

OP = "matmul_w8a8"
MAX_K = 1 << 17


def _packed_shape(n: int, k: int) -> tuple[int, int, int, int]:
    return (n + 15) // 16, (k + 3) // 4, 16, 4


def _check_pack(w: Tensor) -> Tensor:
    check(w.dim() == 2, OP, "w", "2 dimensions [N, K]", f"shape {tuple(w.shape)}")
    check_dtype(OP, "w", w, (torch.int8,))
    check(w.shape[1] <= MAX_K, OP, "w", f"at most {MAX_K} columns", w.shape[1])
    return w.new_empty(_packed_shape(w.shape[0], w.shape[1]), dtype=torch.uint8)


def _check(x: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    check(x.dim() >= 1, OP, "x", "at least 1 dimension", f"shape {tuple(x.shape)}")
    check_dtype(OP, "x", x, (torch.int8,))
    check(x.shape[-1] <= MAX_K, OP, "x", f"at most {MAX_K} columns", x.shape[-1])
    check_dtype(OP, "x_scale", x_scale, (torch.float32,))
    check_shape(OP, "x_scale", x_scale, tuple(x.shape[:-1]), "the rows of x")
    check_dtype(OP, "w_scale", w_scale, (torch.float32,))
    check(w_scale.dim() == 1, OP, "w_scale", "1 dimension [N]", f"shape {tuple(w_scale.shape)}")
    check_dtype(OP, "packed", packed, (torch.uint8,))
    expected = _packed_shape(w_scale.shape[0], x.shape[-1])
    check_shape(OP, "packed", packed, expected, "from N of w_scale and K of x")
    check(dtype in FLOATS, OP, "dtype", "torch.float32 or torch.bfloat16", dtype)
    return x.new_empty((*x.shape[:-1], w_scale.shape[0]), dtype=dtype)


@torch.library.impl(lib, "matmul_w8a8_pack", "CPU")
def _(w: Tensor) -> Tensor:
    packed = _check_pack(w)
    _C.matmul_w8a8_pack_cpu(w.contiguous(), packed)
    return packed


@torch.library.impl(lib, "matmul_w8a8", "CPU")
def _(x: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    y = _check(x, x_scale, packed, w_scale, dtype)
    x_scale = x_scale.reshape(-1).contiguous()
    _C.matmul_w8a8_cpu(rows(x), x_scale, packed.contiguous(), w_scale.contiguous(), rows(y))
    return y


@torch.library.register_fake("pyengine::matmul_w8a8_pack", lib=lib)
def _(w: Tensor) -> Tensor:
    return _check_pack(w)


@torch.library.register_fake("pyengine::matmul_w8a8", lib=lib)
def _(x: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _check(x, x_scale, packed, w_scale, dtype)


def matmul_w8a8_pack(w: Tensor) -> Tensor:
    """w [N, K] int8 in the order that matmul_w8a8 reads: [ceil(N/16), ceil(K/4), 16, 4] u8.

    Raises ArgumentError where w holds -128, which quantize_int8 never makes.
    """
    return torch.ops.pyengine.matmul_w8a8_pack(w)  # type: ignore[no-any-return]


def matmul_w8a8(
    x: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """y [..., N] = x_scale * w_scale * (x @ w.T), the integer product exact over all of K.

    x [..., K] int8 and x_scale [...] f32 from quantize_int8, packed from matmul_w8a8_pack of w [N, K], w_scale [N] f32;
    K <= 2**17; dtype f32 or bf16. The same bits for any number of rows, threads and on every ISA level. For inference:
    raises where a scale requires grad.
    """
    check_inference(OP, "x_scale", x_scale)
    check_inference(OP, "w_scale", w_scale)
    return torch.ops.pyengine.matmul_w8a8(x, x_scale, packed, w_scale, dtype)  # type: ignore[no-any-return]
