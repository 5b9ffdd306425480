"""Rotary position embedding, half-split pairs. Contract: csrc/include/pe/rope.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyengine import _C
from pyengine.ops._library import FLOATS, check, check_dtype, check_shape, empty_like, lib

lib.define("rope(Tensor x, Tensor cos, Tensor sin, Tensor positions, bool inverse) -> Tensor")

OP = "rope"


def _check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    check(x.dim() == 3, OP, "x", "3 dimensions [T, H, D]", f"shape {tuple(x.shape)}")
    check_dtype(OP, "x", x, FLOATS)
    check(x.shape[2] % 2 == 0, OP, "x", "an even last dimension", x.shape[2])
    check_dtype(OP, "cos", cos, (torch.float32,))
    check(cos.dim() == 2, OP, "cos", "2 dimensions [P, D/2]", f"shape {tuple(cos.shape)}")
    check_shape(OP, "cos", cos, (cos.shape[0], x.shape[2] // 2), "half the last dimension of x")
    check_dtype(OP, "sin", sin, (torch.float32,))
    check_shape(OP, "sin", sin, tuple(cos.shape), "the shape of cos")
    check_dtype(OP, "positions", positions, (torch.int32,))
    check_shape(OP, "positions", positions, (x.shape[0],), "the first dimension of x")
    for name, t in (("cos", cos), ("sin", sin), ("positions", positions)):
        check(t.device == x.device, OP, name, f"device {x.device}, the device of x", t.device)


@torch.library.impl(lib, "rope", "CPU")
def _(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool) -> Tensor:
    _check(x, cos, sin, positions)
    y = empty_like(x)
    x = x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
    _C.rope_cpu(x, cos.contiguous(), sin.contiguous(), positions.contiguous(), y, inverse)
    return y


@torch.library.register_fake("pyengine::rope", lib=lib)
def _(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool) -> Tensor:
    _check(x, cos, sin, positions)
    return empty_like(x)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool) -> Tensor:
        ctx.save_for_backward(cos, sin, positions)
        ctx.inverse = inverse
        return torch.ops.pyengine.rope(x, cos, sin, positions, inverse)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        # The map is linear and orthogonal, so its gradient is the opposite rotation and is itself differentiable.
        return rope(grad_y, *ctx.saved_tensors, inverse=not ctx.inverse), None, None, None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate element i of every head with element i + D/2 by the angle of its token's position.

    x [T, H, D] f32 or bf16, any token and head strides; cos, sin [P, D/2] f32; positions [T] int32 in [0, P); returns
    [T, H, D]. `inverse` rotates the other way. Differentiable in x alone. Su et al. 2021, arXiv:2104.09864.

    Raises ArgumentError for a position outside the tables.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rope.apply(x, cos, sin, positions, inverse)  # type: ignore[no-any-return]
    return torch.ops.pyengine.rope(x, cos, sin, positions, inverse)  # type: ignore[no-any-return]


def rope_table(inv_freq: Tensor, num_positions: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """scale * (cos, sin) [num_positions, D/2] f32 of position * inv_freq [D/2], computed in double, rounded once."""
    inv_freq = inv_freq.detach().to("cpu", torch.float64).contiguous()
    cos = torch.empty(num_positions, inv_freq.shape[0])
    sin = torch.empty_like(cos)
    _C.rope_table(inv_freq, cos, sin, scale)
    return cos, sin
