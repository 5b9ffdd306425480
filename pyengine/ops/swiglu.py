"""silu(gate) * up. Contract: csrc/include/pe/swiglu.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyengine import _C
from pyengine.ops._library import FLOATS, check, check_dtype, check_like, check_shape, empty_like, lib, rows

lib.define("swiglu(Tensor gate, Tensor up) -> Tensor")
lib.define("swiglu_bwd(Tensor grad_y, Tensor gate, Tensor up) -> (Tensor grad_gate, Tensor grad_up)")
lib.define("swiglu_gate_up(Tensor gate_up) -> Tensor")
lib.define("swiglu_gate_up_bwd(Tensor grad_y, Tensor gate_up) -> Tensor")

OP = "swiglu"


def _check(gate: Tensor, up: Tensor, grad_y: Tensor | None = None) -> None:
    check(gate.dim() >= 1, OP, "gate", "at least 1 dimension", f"shape {tuple(gate.shape)}")
    check_dtype(OP, "gate", gate, FLOATS)
    check_shape(OP, "up", up, tuple(gate.shape), "the shape of gate")
    check_like(OP, "up", up, "gate", gate)
    if grad_y is not None:
        check_shape(OP, "grad_y", grad_y, tuple(gate.shape), "the shape of gate")
        check_like(OP, "grad_y", grad_y, "gate", gate)


def _halves(gate_up: Tensor, grad_y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check(gate_up.dim() >= 1, OP, "gate_up", "at least 1 dimension", f"shape {tuple(gate_up.shape)}")
    check_dtype(OP, "gate_up", gate_up, FLOATS)
    check(gate_up.shape[-1] % 2 == 0, OP, "gate_up", "an even last dimension", gate_up.shape[-1])
    half = gate_up.shape[-1] // 2
    gate, up = gate_up.narrow(-1, 0, half), gate_up.narrow(-1, half, half)
    _check(gate, up, grad_y)
    return gate, up


# --- CPU --------------------------------------------------------------------------------------------------------------


@torch.library.impl(lib, "swiglu", "CPU")
def _(gate: Tensor, up: Tensor) -> Tensor:
    _check(gate, up)
    y = empty_like(gate)
    _C.swiglu_fwd_cpu(rows(gate), rows(up), rows(y))
    return y


@torch.library.impl(lib, "swiglu_bwd", "CPU")
def _(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    _check(gate, up, grad_y)
    grad_gate, grad_up = empty_like(gate), empty_like(up)
    _C.swiglu_bwd_cpu(rows(grad_y), rows(gate), rows(up), rows(grad_gate), rows(grad_up))
    return grad_gate, grad_up


@torch.library.impl(lib, "swiglu_gate_up", "CPU")
def _(gate_up: Tensor) -> Tensor:
    gate, up = _halves(gate_up)
    y = empty_like(gate)
    _C.swiglu_fwd_cpu(rows(gate), rows(up), rows(y))
    return y


@torch.library.impl(lib, "swiglu_gate_up_bwd", "CPU")
def _(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = _halves(gate_up, grad_y)
    grad_gate_up = empty_like(gate_up)
    grad_gate, grad_up = _halves(rows(grad_gate_up))
    _C.swiglu_bwd_cpu(rows(grad_y), rows(gate), rows(up), grad_gate, grad_up)
    return grad_gate_up


# --- fake -------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("pyengine::swiglu", lib=lib)
def _(gate: Tensor, up: Tensor) -> Tensor:
    _check(gate, up)
    return empty_like(gate)


@torch.library.register_fake("pyengine::swiglu_bwd", lib=lib)
def _(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    _check(gate, up, grad_y)
    return empty_like(gate), empty_like(up)


@torch.library.register_fake("pyengine::swiglu_gate_up", lib=lib)
def _(gate_up: Tensor) -> Tensor:
    return empty_like(_halves(gate_up)[0])


@torch.library.register_fake("pyengine::swiglu_gate_up_bwd", lib=lib)
def _(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    _halves(gate_up, grad_y)
    return empty_like(gate_up)


# --- autograd and the public functions --------------------------------------------------------------------------------


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.ops.pyengine.swiglu(gate, up)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.pyengine.swiglu_bwd(grad_y, *ctx.saved_tensors)  # type: ignore[no-any-return]


class _SwigluGateUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return torch.ops.pyengine.swiglu_gate_up(gate_up)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        return torch.ops.pyengine.swiglu_gate_up_bwd(grad_y, *ctx.saved_tensors)  # type: ignore[no-any-return]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up.

    gate, up [..., F] f32 or bf16 with any row strides; returns [..., F]. Shazeer 2020, arXiv:2002.05202.
    """
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Swiglu.apply(gate, up)  # type: ignore[no-any-return]
    return torch.ops.pyengine.swiglu(gate, up)  # type: ignore[no-any-return]


def swiglu_gate_up(gate_up: Tensor) -> Tensor:
    """swiglu of the halves of gate_up [..., 2F], gate first; returns [..., F].

    The gradient is one [..., 2F] tensor, written once: no concatenation.
    """
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return _SwigluGateUp.apply(gate_up)  # type: ignore[no-any-return]
    return torch.ops.pyengine.swiglu_gate_up(gate_up)  # type: ignore[no-any-return]
