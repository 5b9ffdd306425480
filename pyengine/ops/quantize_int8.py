"""Rows to int8 with one scale each, and back. Contract: csrc/include/pe/quantize_int8.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyengine import _C
from pyengine.ops._library import FLOATS, check, check_dtype, check_shape, lib, rows

lib.define("quantize_int8(Tensor x) -> (Tensor q, Tensor scale)")
lib.define("dequantize_int8(Tensor q, Tensor scale, ScalarType dtype) -> Tensor")


def _check_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    op = "quantize_int8"
    check(x.dim() >= 1, op, "x", "at least 1 dimension", f"shape {tuple(x.shape)}")
    check_dtype(op, "x", x, FLOATS)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _check_dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    op = "dequantize_int8"
    check(q.dim() >= 1, op, "q", "at least 1 dimension", f"shape {tuple(q.shape)}")
    check_dtype(op, "q", q, (torch.int8,))
    check_dtype(op, "scale", scale, (torch.float32,))
    check_shape(op, "scale", scale, tuple(q.shape[:-1]), "the rows of q")
    check(dtype in FLOATS, op, "dtype", "torch.float32 or torch.bfloat16", dtype)
    return q.new_empty(q.shape, dtype=dtype)


@torch.library.impl(lib, "quantize_int8", "CPU")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = _check_quantize(x)
    _C.quantize_int8_cpu(rows(x), rows(q), scale.view(-1))
    return q, scale


@torch.library.impl(lib, "dequantize_int8", "CPU")
def _(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    x = _check_dequantize(q, scale, dtype)
    _C.dequantize_int8_cpu(rows(q), scale.reshape(-1).contiguous(), rows(x))
    return x


@torch.library.register_fake("pyengine::quantize_int8", lib=lib)
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return _check_quantize(x)


@torch.library.register_fake("pyengine::dequantize_int8", lib=lib)
def _(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _check_dequantize(q, scale, dtype)


def check_inference(op: str, name: str, t: Tensor) -> None:
    """Raise where autograd would have to go through an op that has no gradient."""
    needs_grad = torch.is_grad_enabled() and t.requires_grad
    check(not needs_grad, op, name, "a tensor without gradient (the op is for inference)", "one that requires grad")


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale): x [..., C] f32 or bf16 as int8 [..., C] times one f32 scale per row [...].

    scale = max|x| / 127 and q in [-127, 127], rounded half to even. A row below 2**-119 becomes zero with scale 0; a
    row with NaN or infinity gets scale NaN. For inference: raises where x requires grad.
    """
    check_inference("quantize_int8", "x", x)
    return torch.ops.pyengine.quantize_int8(x)  # type: ignore[no-any-return]


def dequantize_int8(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """q [..., C] int8 times scale [...] f32, rounded once to dtype (f32 or bf16). For inference, as quantize_int8."""
    check_inference("dequantize_int8", "scale", scale)
    return torch.ops.pyengine.dequantize_int8(q, scale, dtype)  # type: ignore[no-any-return]
