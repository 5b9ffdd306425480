"""silu(gate) * up, or gelu(gate) * up. Contract: csrc/include/pe/swiglu.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyengine import _C
from pyengine.ops._library import FLOATS, check, check_dtype, check_like, check_shape, empty_like, lib, rows

lib.define("swiglu(Tensor gate, Tensor up, str activation) -> Tensor")
lib.define("swiglu_bwd(Tensor grad_y, Tensor gate, Tensor up, str activation) -> (Tensor grad_gate, Tensor grad_up)")
lib.define("swiglu_gate_up(Tensor gate_up, str activation) -> Tensor")
lib.define("swiglu_gate_up_bwd(Tensor grad_y, Tensor gate_up, str activation) -> Tensor")

OP = "swiglu"
ACTIVATIONS = ("silu", "gelu_tanh")


def _check(gate: Tensor, up: Tensor, activation: str, grad_y: Tensor | None = None) -> None:
    check(activation in ACTIVATIONS, OP, "activation", "'silu' or 'gelu_tanh'", repr(activation))
    check(gate.dim() >= 1, OP, "gate", "at least 1 dimension", f"shape {tuple(gate.shape)}")
    check_dtype(OP, "gate", gate, FLOATS)
    check_shape(OP, "up", up, tuple(gate.shape), "the shape of gate")
    check_like(OP, "up", up, "gate", gate)
    if grad_y is not None:
        check_shape(OP, "grad_y", grad_y, tuple(gate.shape), "the shape of gate")
        check_like(OP, "grad_y", grad_y, "gate", gate)


def _halves(gate_up: Tensor, activation: str, grad_y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check(gate_up.dim() >= 1, OP, "gate_up", "at least 1 dimension", f"shape {tuple(gate_up.shape)}")
    check_dtype(OP, "gate_up", gate_up, FLOATS)
    check(gate_up.shape[-1] % 2 == 0, OP, "gate_up", "an even last dimension", gate_up.shape[-1])
    half = gate_up.shape[-1] // 2
    gate, up = gate_up.narrow(-1, 0, half), gate_up.narrow(-1, half, half)
    _check(gate, up, activation, grad_y)
    return gate, up


# --- CPU --------------------------------------------------------------------------------------------------------------


@torch.library.impl(lib, "swiglu", "CPU")
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    _check(gate, up, activation)
    y = empty_like(gate)
    _C.swiglu_fwd_cpu(rows(gate), rows(up), rows(y), activation)
    return y


@torch.library.impl(lib, "swiglu_bwd", "CPU")
def _(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    _check(gate, up, activation, grad_y)
    grad_gate, grad_up = empty_like(gate), empty_like(up)
    _C.swiglu_bwd_cpu(rows(grad_y), rows(gate), rows(up), rows(grad_gate), rows(grad_up), activation)
    return grad_gate, grad_up


@torch.library.impl(lib, "swiglu_gate_up", "CPU")
def _(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = _halves(gate_up, activation)
    y = empty_like(gate)
    _C.swiglu_fwd_cpu(rows(gate), rows(up), rows(y), activation)
    return y


@torch.library.impl(lib, "swiglu_gate_up_bwd", "CPU")
def _(grad_y: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    gate, up = _halves(gate_up, activation, grad_y)
    grad_gate_up = empty_like(gate_up)
    grad_gate, grad_up = _halves(rows(grad_gate_up), activation)
    _C.swiglu_bwd_cpu(rows(grad_y), rows(gate), rows(up), grad_gate, grad_up, activation)
    return grad_gate_up


# --- fake -------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("pyengine::swiglu", lib=lib)
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    _check(gate, up, activation)
    return empty_like(gate)


@torch.library.register_fake("pyengine::swiglu_bwd", lib=lib)
def _(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    _check(gate, up, activation, grad_y)
    return empty_like(gate), empty_like(up)


@torch.library.register_fake("pyengine::swiglu_gate_up", lib=lib)
def _(gate_up: Tensor, activation: str) -> Tensor:
    return empty_like(_halves(gate_up, activation)[0])


@torch.library.register_fake("pyengine::swiglu_gate_up_bwd", lib=lib)
def _(grad_y: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    _halves(gate_up, activation, grad_y)
    return empty_like(gate_up)


# --- autograd and the public functions --------------------------------------------------------------------------------


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return torch.ops.pyengine.swiglu(gate, up, activation)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_gate, grad_up = torch.ops.pyengine.swiglu_bwd(grad_y, *ctx.saved_tensors, ctx.activation)
        return grad_gate, grad_up, None


class _SwigluGateUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return torch.ops.pyengine.swiglu_gate_up(gate_up, activation)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return torch.ops.pyengine.swiglu_gate_up_bwd(grad_y, *ctx.saved_tensors, ctx.activation), None


def swiglu(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """activation(gate) * up.

    gate, up [..., F] f32 or bf16 with any row strides; returns [..., F]. activation: "silu", or "gelu_tanh", the tanh
    form of gelu. Shazeer 2020, arXiv:2002.05202.
    """
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Swiglu.apply(gate, up, activation)  # type: ignore[no-any-return]
    return torch.ops.pyengine.swiglu(gate, up, activation)  # type: ignore[no-any-return]


def swiglu_gate_up(gate_up: Tensor, *, activation: str = "silu") -> Tensor:
    """swiglu of the halves of gate_up [..., 2F], gate first; returns [..., F].

    The gradient is one [..., 2F] tensor, written once: no concatenation.
    """
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return _SwigluGateUp.apply(gate_up, activation)  # type: ignore[no-any-return]
    return torch.ops.pyengine.swiglu_gate_up(gate_up, activation)  # type: ignore[no-any-return]
