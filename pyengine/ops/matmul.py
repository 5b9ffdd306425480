"""Matrix product with transposed weights, the shape of every linear layer. Contract: csrc/include/pe/matmul.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyengine import _C
from pyengine.ops._library import FLOATS, check, check_dtype, check_like, lib

lib.define("matmul(Tensor x, Tensor w, ScalarType out_dtype) -> Tensor")

OP = "matmul"


def _check(x: Tensor, w: Tensor, out_dtype: torch.dtype) -> None:
    """One check for the real kernel and the fake one, so the two cannot drift apart."""
    check(x.dim() >= 1, OP, "x", "at least 1 dimension", f"shape {tuple(x.shape)}")
    check(w.dim() == 2, OP, "w", "2 dimensions", f"shape {tuple(w.shape)}")
    check_dtype(OP, "x", x, FLOATS)
    check_dtype(OP, "w", w, FLOATS)
    expected = f"shape (N, {x.shape[-1]}), the last dimension of x"
    check(w.shape[1] == x.shape[-1], OP, "w", expected, f"{tuple(w.shape)}")
    check(w.device == x.device, OP, "w", f"device {x.device}, the device of x", w.device)
    check(out_dtype in FLOATS, OP, "out_dtype", " or ".join(str(d) for d in FLOATS), out_dtype)


def _matrix(t: Tensor) -> Tensor:
    """View t as [R, C], with any strides; copies only when no such view exists."""
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


# The op itself takes any mixture of dtypes and any strides, so that it is its own backward.
@torch.library.impl(lib, "matmul", "CPU")
def _(x: Tensor, w: Tensor, out_dtype: torch.dtype) -> Tensor:
    _check(x, w, out_dtype)
    y = x.new_empty((*x.shape[:-1], w.shape[0]), dtype=out_dtype)
    _C.matmul_unpacked_cpu(_matrix(x), w, _matrix(y))
    return y


@torch.library.register_fake("pyengine::matmul", lib=lib)
def _(x: Tensor, w: Tensor, out_dtype: torch.dtype) -> Tensor:
    _check(x, w, out_dtype)
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=out_dtype)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, out_dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.ops.pyengine.matmul(x, w, out_dtype)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.pyengine.matmul(grad_y, w.t(), x.dtype)
        if ctx.needs_input_grad[1]:
            grad_w = torch.ops.pyengine.matmul(_matrix(grad_y).t(), _matrix(x).t(), w.dtype)
        return grad_x, grad_w, None


def matmul(x: Tensor, w: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """x @ w^T with f32 accumulation and one rounding.

    x [..., K] f32 or bf16, w [N, K] of the same dtype, any strides; returns [..., N] of out_dtype (of x.dtype where
    None). A row of the result has the same bits whatever the other rows are.
    """
    check_like(OP, "w", w, "x", x)
    dtype = x.dtype if out_dtype is None else out_dtype
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        return _Matmul.apply(x, w, dtype)  # type: ignore[no-any-return]
    return torch.ops.pyengine.matmul(x, w, dtype)  # type: ignore[no-any-return]
