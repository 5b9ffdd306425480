"""FILL: one line. Contract: csrc/include/pe/op_name.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyengine import _C
from pyengine.ops._library import FLOATS, check, check_dtype, empty_like, lib, rows

lib.define("op_name(Tensor x) -> Tensor")
lib.define("op_name_bwd(Tensor grad_y) -> Tensor")

OP = "op_name"


def _check(name: str, t: Tensor) -> None:
    """One check for the real kernels and the fake ones, so the two cannot drift apart."""
    check(t.dim() >= 1, OP, name, "at least 1 dimension", f"shape {tuple(t.shape)}")
    check_dtype(OP, name, t, FLOATS)


# --- CPU --------------------------------------------------------------------------------------------------------------


@torch.library.impl(lib, "op_name", "CPU")
def _(x: Tensor) -> Tensor:
    _check("x", x)
    y = empty_like(x)
    _C.op_name_fwd_cpu(rows(x), rows(y))
    return y


@torch.library.impl(lib, "op_name_bwd", "CPU")
def _(grad_y: Tensor) -> Tensor:
    _check("grad_y", grad_y)
    grad_x = empty_like(grad_y)
    _C.op_name_bwd_cpu(rows(grad_y), rows(grad_x))
    return grad_x


# --- fake: shapes and dtypes only, what torch.compile and meta tensors run --------------------------------------------


@torch.library.register_fake("pyengine::op_name", lib=lib)
def _(x: Tensor) -> Tensor:
    _check("x", x)
    return empty_like(x)


@torch.library.register_fake("pyengine::op_name_bwd", lib=lib)
def _(grad_y: Tensor) -> Tensor:
    _check("grad_y", grad_y)
    return empty_like(grad_y)


# --- autograd and the public function ---------------------------------------------------------------------------------


class _OpName(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ops.pyengine.op_name(x)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        return torch.ops.pyengine.op_name_bwd(grad_y)  # type: ignore[no-any-return]


def op_name(x: Tensor) -> Tensor:
    """FILL: the formula, shapes, dtypes, source."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _OpName.apply(x)  # type: ignore[no-any-return]
    return torch.ops.pyengine.op_name(x)  # type: ignore[no-any-return]
