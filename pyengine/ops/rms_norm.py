"""RMSNorm over the last dimension, optionally of a sum. Contract: csrc/include/pe/rms_norm.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyengine import _C
from pyengine.ops._library import FLOATS, check, check_dtype, check_like, check_shape, empty_like, lib, rows

lib.define("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset) -> Tensor")
lib.define("rms_norm_fwd(Tensor x, Tensor weight, float eps, float weight_offset) -> (Tensor y, Tensor rstd)")
lib.define(
    "rms_norm_bwd(Tensor grad_y, Tensor x, Tensor weight, Tensor rstd, float weight_offset)"
    " -> (Tensor grad_x, Tensor grad_weight)"
)
lib.define(
    "rms_norm_residual_fwd(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset)"
    " -> (Tensor y, Tensor h, Tensor rstd)"
)
lib.define(
    "rms_norm_residual_bwd(Tensor grad_y, Tensor grad_h, Tensor h, Tensor weight, Tensor rstd, float weight_offset)"
    " -> (Tensor grad_x, Tensor grad_weight)"
)

OP = "rms_norm"


def _check(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    """One check for the real kernels and the fake ones, so the two cannot drift apart."""
    check(x.dim() >= 1, OP, "x", "at least 1 dimension", f"shape {tuple(x.shape)}")
    check_dtype(OP, "x", x, FLOATS)
    check_shape(OP, "weight", weight, (x.shape[-1],), "the last dimension of x")
    check_like(OP, "weight", weight, "x", x)
    if residual is not None:
        check_shape(OP, "residual", residual, tuple(x.shape), "the shape of x")
        check_like(OP, "residual", residual, "x", x)


def _empty_rstd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


def _empty_all(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return empty_like(x), empty_like(weight)


# --- CPU --------------------------------------------------------------------------------------------------------------


@torch.library.impl(lib, "rms_norm", "CPU")
def _(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    _check(x, weight)
    y = empty_like(x)
    _C.rms_norm_fwd_cpu(rows(x), None, weight.contiguous(), None, rows(y), None, eps, weight_offset)
    return y


@torch.library.impl(lib, "rms_norm_fwd", "CPU")
def _(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> tuple[Tensor, Tensor]:
    _check(x, weight)
    y, rstd = empty_like(x), _empty_rstd(x)
    _C.rms_norm_fwd_cpu(rows(x), None, weight.contiguous(), None, rows(y), rstd, eps, weight_offset)
    return y, rstd


@torch.library.impl(lib, "rms_norm_bwd", "CPU")
def _(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float) -> tuple[Tensor, Tensor]:
    _check(x, weight)
    grad_x, grad_weight = _empty_all(x, weight)
    _C.rms_norm_bwd_cpu(
        rows(grad_y), None, rows(x), weight.contiguous(), rstd, rows(grad_x), grad_weight, weight_offset
    )
    return grad_x, grad_weight


@torch.library.impl(lib, "rms_norm_residual_fwd", "CPU")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, residual)
    y, h, rstd = empty_like(x), empty_like(x), _empty_rstd(x)
    _C.rms_norm_fwd_cpu(rows(x), rows(residual), weight.contiguous(), rows(h), rows(y), rstd, eps, weight_offset)
    return y, h, rstd


@torch.library.impl(lib, "rms_norm_residual_bwd", "CPU")
def _(
    grad_y: Tensor, grad_h: Tensor, h: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float
) -> tuple[Tensor, Tensor]:
    _check(h, weight)
    grad_x, grad_weight = _empty_all(h, weight)
    _C.rms_norm_bwd_cpu(
        rows(grad_y), rows(grad_h), rows(h), weight.contiguous(), rstd, rows(grad_x), grad_weight, weight_offset
    )
    return grad_x, grad_weight


# --- fake: shapes and dtypes only, what torch.compile and meta tensors run --------------------------------------------


@torch.library.register_fake("pyengine::rms_norm", lib=lib)
def _(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    _check(x, weight)
    return empty_like(x)


@torch.library.register_fake("pyengine::rms_norm_fwd", lib=lib)
def _(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> tuple[Tensor, Tensor]:
    _check(x, weight)
    return empty_like(x), _empty_rstd(x)


@torch.library.register_fake("pyengine::rms_norm_bwd", lib=lib)
def _(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float) -> tuple[Tensor, Tensor]:
    _check(x, weight)
    return _empty_all(x, weight)


@torch.library.register_fake("pyengine::rms_norm_residual_fwd", lib=lib)
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, residual)
    return empty_like(x), empty_like(x), _empty_rstd(x)


@torch.library.register_fake("pyengine::rms_norm_residual_bwd", lib=lib)
def _(
    grad_y: Tensor, grad_h: Tensor, h: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float
) -> tuple[Tensor, Tensor]:
    _check(h, weight)
    return _empty_all(h, weight)


# --- autograd and the public functions --------------------------------------------------------------------------------


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
        y, rstd = torch.ops.pyengine.rms_norm_fwd(x, weight, eps, weight_offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.weight_offset = weight_offset
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = torch.ops.pyengine.rms_norm_bwd(grad_y, *ctx.saved_tensors, ctx.weight_offset)
        return grad_x, grad_weight, None, None


class _RmsNormResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float
    ) -> tuple[Tensor, Tensor]:
        y, h, rstd = torch.ops.pyengine.rms_norm_residual_fwd(x, residual, weight, eps, weight_offset)
        ctx.save_for_backward(h, weight, rstd)
        ctx.weight_offset = weight_offset
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = torch.ops.pyengine.rms_norm_residual_bwd(
            grad_y, grad_h, h, weight, rstd, ctx.weight_offset
        )
        return grad_x, grad_x, grad_weight, None, None


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, weight_offset: float = 0.0) -> Tensor:
    """x * rsqrt(mean(x**2, -1) + eps) * (weight + weight_offset).

    x [..., C] f32 or bf16, weight [C] of the same dtype; returns [..., C]. Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RmsNorm.apply(x, weight, eps, weight_offset)  # type: ignore[no-any-return]
    return torch.ops.pyengine.rms_norm(x, weight, eps, weight_offset)  # type: ignore[no-any-return]


def rms_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(rms_norm(h), h) with h = x + residual, in one pass. Shapes and dtypes as in rms_norm."""
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad):
        return _RmsNormResidual.apply(x, residual, weight, eps, weight_offset)  # type: ignore[no-any-return]
    return torch.ops.pyengine.rms_norm_residual_fwd(x, residual, weight, eps, weight_offset)[:2]  # type: ignore[no-any-return]
