"""Cross entropy of a linear head without its logits. Contract: csrc/include/pe/linear_cross_entropy.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyengine import _C
from pyengine.ops._library import FLOATS, check, check_dtype, check_like, check_shape, empty_like, lib, rows

lib.define("linear_cross_entropy(Tensor x, Tensor w, Tensor targets, int ignore_index) -> (Tensor nll, Tensor lse)")
lib.define(
    "linear_cross_entropy_bwd(Tensor grad_nll, Tensor x, Tensor w, Tensor targets, Tensor lse, int ignore_index,"
    " bool need_grad_x, bool need_grad_w) -> (Tensor grad_x, Tensor grad_w)"
)

OP = "linear_cross_entropy"
INTEGERS = (torch.int64, torch.int32)


def _check(x: Tensor, w: Tensor, targets: Tensor) -> None:
    """One check for the real kernels and the fake ones, so the two cannot drift apart."""
    check(x.dim() >= 1, OP, "x", "at least 1 dimension", f"shape {tuple(x.shape)}")
    check(w.dim() == 2, OP, "w", "2 dimensions", f"shape {tuple(w.shape)}")
    check_dtype(OP, "x", x, FLOATS)
    check_like(OP, "w", w, "x", x)
    expected = f"shape (V, {x.shape[-1]}), the last dimension of x"
    check(w.shape[1] == x.shape[-1], OP, "w", expected, f"{tuple(w.shape)}")
    check_dtype(OP, "targets", targets, INTEGERS)
    check_shape(OP, "targets", targets, tuple(x.shape[:-1]), "the leading dimensions of x")
    check(targets.device == x.device, OP, "targets", f"device {x.device}, the device of x", targets.device)


def _empty_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    nll = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return nll, torch.empty_like(nll)


def _empty_grads(x: Tensor, w: Tensor, need_grad_x: bool, need_grad_w: bool) -> tuple[Tensor, Tensor]:
    """A gradient that is not needed has no elements."""
    return empty_like(x) if need_grad_x else x.new_empty(0), empty_like(w) if need_grad_w else w.new_empty(0)


def _flat_targets(targets: Tensor) -> Tensor:
    return targets.reshape(-1).to(torch.int64).contiguous()


@torch.library.impl(lib, "linear_cross_entropy", "CPU")
def _(x: Tensor, w: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    _check(x, w, targets)
    nll, lse = _empty_outputs(x)
    _C.linear_cross_entropy_fwd_cpu(rows(x), rows(w), _flat_targets(targets), nll.view(-1), lse.view(-1), ignore_index)
    return nll, lse


@torch.library.impl(lib, "linear_cross_entropy_bwd", "CPU")
def _(
    grad_nll: Tensor,
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    need_grad_x: bool,
    need_grad_w: bool,
) -> tuple[Tensor, Tensor]:
    _check(x, w, targets)
    grad_x, grad_w = _empty_grads(x, w, need_grad_x, need_grad_w)
    _C.linear_cross_entropy_bwd_cpu(
        grad_nll.reshape(-1).contiguous(),
        rows(x),
        rows(w),
        _flat_targets(targets),
        lse.reshape(-1),
        rows(grad_x) if need_grad_x else None,
        grad_w if need_grad_w else None,
        ignore_index,
    )
    return grad_x, grad_w


@torch.library.register_fake("pyengine::linear_cross_entropy", lib=lib)
def _(x: Tensor, w: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    _check(x, w, targets)
    return _empty_outputs(x)


@torch.library.register_fake("pyengine::linear_cross_entropy_bwd", lib=lib)
def _(
    grad_nll: Tensor,
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    need_grad_x: bool,
    need_grad_w: bool,
) -> tuple[Tensor, Tensor]:
    _check(x, w, targets)
    return _empty_grads(x, w, need_grad_x, need_grad_w)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        nll, lse = torch.ops.pyengine.linear_cross_entropy(x, w, targets, ignore_index)
        ctx.save_for_backward(x, w, targets, lse)
        ctx.ignore_index = ignore_index
        return nll  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        need_grad_x, need_grad_w = ctx.needs_input_grad[:2]
        grad_x, grad_w = torch.ops.pyengine.linear_cross_entropy_bwd(
            grad_nll, *ctx.saved_tensors, ctx.ignore_index, need_grad_x, need_grad_w
        )
        return grad_x if need_grad_x else None, grad_w if need_grad_w else None, None, None


def linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """-log softmax(x @ w^T)[targets] for every token, without storing the logits.

    x [..., C] f32 or bf16, w [V, C] of the same dtype, targets [...] int32 or int64 in [0, V) or ignore_index;
    returns [...] f32 in nats, 0 where ignored. Raises ArgumentError at the first target out of range.
    The bits are those of matmul with out_dtype float32 and a log-softmax over fixed blocks.
    """
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        return _LinearCrossEntropy.apply(x, w, targets, ignore_index)  # type: ignore[no-any-return]
    return torch.ops.pyengine.linear_cross_entropy(x, w, targets, ignore_index)[0]  # type: ignore[no-any-return]
