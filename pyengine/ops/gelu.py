"""The Gaussian error linear unit. Contract: csrc/include/pe/gelu.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyengine import _C
from pyengine.ops._library import FLOATS, check, check_dtype, check_like, check_shape, empty_like, lib, rows

lib.define("gelu(Tensor x, str approximate) -> Tensor")
lib.define("gelu_bwd(Tensor grad_y, Tensor x, str approximate) -> Tensor")

OP = "gelu"
FORMS = ("none", "tanh")


def _check(x: Tensor, approximate: str, grad_y: Tensor | None = None) -> None:
    check(approximate in FORMS, OP, "approximate", "'none' or 'tanh'", repr(approximate))
    check(x.dim() >= 1, OP, "x", "at least 1 dimension", f"shape {tuple(x.shape)}")
    check_dtype(OP, "x", x, FLOATS)
    if grad_y is not None:
        check_shape(OP, "grad_y", grad_y, tuple(x.shape), "the shape of x")
        check_like(OP, "grad_y", grad_y, "x", x)


@torch.library.impl(lib, "gelu", "CPU")
def _(x: Tensor, approximate: str) -> Tensor:
    _check(x, approximate)
    y = empty_like(x)
    _C.gelu_fwd_cpu(rows(x), rows(y), approximate)
    return y


@torch.library.impl(lib, "gelu_bwd", "CPU")
def _(grad_y: Tensor, x: Tensor, approximate: str) -> Tensor:
    _check(x, approximate, grad_y)
    grad_x = empty_like(x)
    _C.gelu_bwd_cpu(rows(grad_y), rows(x), rows(grad_x), approximate)
    return grad_x


@torch.library.register_fake("pyengine::gelu", lib=lib)
def _(x: Tensor, approximate: str) -> Tensor:
    _check(x, approximate)
    return empty_like(x)


@torch.library.register_fake("pyengine::gelu_bwd", lib=lib)
def _(grad_y: Tensor, x: Tensor, approximate: str) -> Tensor:
    _check(x, approximate, grad_y)
    return empty_like(x)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        return torch.ops.pyengine.gelu(x, approximate)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return torch.ops.pyengine.gelu_bwd(grad_y, *ctx.saved_tensors, ctx.approximate), None


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """x * P(x), P the cumulative normal distribution: exact for "none", by its tanh form for "tanh".

    x [..., C] f32 or bf16 with any row strides; returns [..., C]. Hendrycks & Gimpel 2016, arXiv:1606.08415.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Gelu.apply(x, approximate)  # type: ignore[no-any-return]
    return torch.ops.pyengine.gelu(x, approximate)  # type: ignore[no-any-return]
