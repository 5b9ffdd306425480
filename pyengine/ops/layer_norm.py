"""LayerNorm over the last dimension, optionally of a sum. Contract: csrc/include/pe/layer_norm.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyengine import _C
from pyengine.ops._library import FLOATS, check, check_dtype, check_like, check_shape, empty_like, lib, rows

lib.define("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor")
lib.define("layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)")
lib.define(
    "layer_norm_bwd(Tensor grad_y, Tensor? grad_h, Tensor h, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
)
lib.define(
    "layer_norm_residual_fwd(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)"
)

OP = "layer_norm"


def _check(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
    """One check for the real kernels and the fake ones, so the two cannot drift apart."""
    check(x.dim() >= 1, OP, "x", "at least 1 dimension", f"shape {tuple(x.shape)}")
    check_dtype(OP, "x", x, FLOATS)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_shape(OP, name, vector, (x.shape[-1],), "the last dimension of x")
            check_like(OP, name, vector, "x", x)
    if residual is not None:
        check_shape(OP, "residual", residual, tuple(x.shape), "the shape of x")
        check_like(OP, "residual", residual, "x", x)


def _empty_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    num_rows = x.shape[:-1].numel()
    return x.new_empty(num_rows, dtype=torch.float32), x.new_empty(num_rows, dtype=torch.float32)


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


# --- CPU --------------------------------------------------------------------------------------------------------------


@torch.library.impl(lib, "layer_norm", "CPU")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    _check(x, weight, bias)
    y = empty_like(x)
    _C.layer_norm_fwd_cpu(rows(x), None, weight.contiguous(), _contiguous(bias), None, rows(y), None, None, eps)
    return y


@torch.library.impl(lib, "layer_norm_fwd", "CPU")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, bias)
    y, (mean, rstd) = empty_like(x), _empty_statistics(x)
    _C.layer_norm_fwd_cpu(rows(x), None, weight.contiguous(), _contiguous(bias), None, rows(y), mean, rstd, eps)
    return y, mean, rstd


@torch.library.impl(lib, "layer_norm_bwd", "CPU")
def _(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check(h, weight)
    grad_x, grad_weight, grad_bias = empty_like(h), empty_like(weight), empty_like(weight)
    _C.layer_norm_bwd_cpu(
        rows(grad_y),
        None if grad_h is None else rows(grad_h),
        rows(h),
        weight.contiguous(),
        mean,
        rstd,
        rows(grad_x),
        grad_weight,
        grad_bias,
    )
    return grad_x, grad_weight, grad_bias


@torch.library.impl(lib, "layer_norm_residual_fwd", "CPU")
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, weight, bias, residual)
    y, h, (mean, rstd) = empty_like(x), empty_like(x), _empty_statistics(x)
    _C.layer_norm_fwd_cpu(
        rows(x), rows(residual), weight.contiguous(), _contiguous(bias), rows(h), rows(y), mean, rstd, eps
    )
    return y, h, mean, rstd


# --- fake: shapes and dtypes only, what torch.compile and meta tensors run --------------------------------------------


@torch.library.register_fake("pyengine::layer_norm", lib=lib)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    _check(x, weight, bias)
    return empty_like(x)


@torch.library.register_fake("pyengine::layer_norm_fwd", lib=lib)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, bias)
    return empty_like(x), *_empty_statistics(x)


@torch.library.register_fake("pyengine::layer_norm_bwd", lib=lib)
def _(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check(h, weight)
    return empty_like(h), empty_like(weight), empty_like(weight)


@torch.library.register_fake("pyengine::layer_norm_residual_fwd", lib=lib)
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, weight, bias, residual)
    return empty_like(x), empty_like(x), *_empty_statistics(x)


# --- autograd and the public functions --------------------------------------------------------------------------------


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = torch.ops.pyengine.layer_norm_fwd(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.has_bias = bias is not None
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grads = torch.ops.pyengine.layer_norm_bwd(grad_y, None, *ctx.saved_tensors)
        return grads[0], grads[1], grads[2] if ctx.has_bias else None, None


class _LayerNormResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, h, mean, rstd = torch.ops.pyengine.layer_norm_residual_fwd(x, residual, weight, bias, eps)
        ctx.save_for_backward(h, weight, mean, rstd)
        ctx.has_bias = bias is not None
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        grads = torch.ops.pyengine.layer_norm_bwd(grad_y, grad_h, *ctx.saved_tensors)
        return grads[0], grads[0], grads[1], grads[2] if ctx.has_bias else None, None


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """(x - mean(x, -1)) * rsqrt(var(x, -1) + eps) * weight + bias, with the biased variance.

    x [..., C] f32 or bf16, weight and bias [C] of the same dtype; returns [..., C]. Ba et al. 2016, arXiv:1607.06450.
    """
    if _wants_grad(x, weight, bias):
        return _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return]
    return torch.ops.pyengine.layer_norm(x, weight, bias, eps)  # type: ignore[no-any-return]


def layer_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(layer_norm(h), h) with h = x + residual, in one pass. Shapes and dtypes as in layer_norm."""
    if _wants_grad(x, residual, weight, bias):
        return _LayerNormResidual.apply(x, residual, weight, bias, eps)  # type: ignore[no-any-return]
    return torch.ops.pyengine.layer_norm_residual_fwd(x, residual, weight, bias, eps)[:2]  # type: ignore[no-any-return]
