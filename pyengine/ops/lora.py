"""Low-rank adapters of linear layers, another one per row. Contract: csrc/include/pe/lora.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyengine import _C
from pyengine.ops._library import FLOATS, check, check_dtype, check_like, check_shape, lib, rows

lib.define("lora(Tensor y, Tensor x, Tensor[] a, Tensor[] b, float[] scales, Tensor? adapter_of_row) -> Tensor")
lib.define(
    "lora_fwd(Tensor y, Tensor x, Tensor[] a, Tensor[] b, float[] scales, Tensor? adapter_of_row)"
    " -> (Tensor out, Tensor u)"
)

OP = "lora"
MAX_RANK = 256


def _check(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], adapter: Tensor | None
) -> None:
    """One check for the real kernel and the fake one, so the two cannot drift apart."""
    check(x.dim() >= 1, OP, "x", "at least 1 dimension", f"shape {tuple(x.shape)}")
    check_dtype(OP, "x", x, FLOATS)
    check_like(OP, "y", y, "x", x)
    check(y.dim() == x.dim(), OP, "y", f"{x.dim()} dimensions, those of x", f"shape {tuple(y.shape)}")
    check_shape(OP, "y", y, (*x.shape[:-1], y.shape[-1]), "the rows of x")
    check(len(b) == len(a), OP, "b", f"{len(a)}, one per adapter", len(b))
    check(len(scales) == len(a), OP, "scales", f"{len(a)}, one per adapter", len(scales))
    for a_i, b_i in zip(a, b, strict=True):
        for name, t in (("a", a_i), ("b", b_i)):
            check_dtype(OP, name, t, FLOATS)
            check(t.dim() == 2, OP, name, "2 dimensions", f"shape {tuple(t.shape)}")
            check(t.device == x.device, OP, name, f"device {x.device}, the device of x", t.device)
        expected = f"shape (1 to {MAX_RANK}, {x.shape[-1]}), the rank and the last dimension of x"
        check(a_i.shape[1] == x.shape[-1] and 1 <= a_i.shape[0] <= MAX_RANK, OP, "a", expected, f"{tuple(a_i.shape)}")
        check_shape(OP, "b", b_i, (y.shape[-1], a_i.shape[0]), "the last dimension of y and the rank")
    if adapter is None:
        check(len(a) == 1, OP, "adapter_of_row", "a number per row beside several adapters", "None")
        return
    check_dtype(OP, "adapter_of_row", adapter, (torch.int32,))
    check_shape(OP, "adapter_of_row", adapter, tuple(x.shape[:-1]), "one per row of x")
    check(adapter.device == x.device, OP, "adapter_of_row", f"device {x.device}, the device of x", adapter.device)


def _empty_u(x: Tensor, a: list[Tensor]) -> Tensor:
    """Products of the rows with a, times scale: [M, the largest rank in whole panels]; 0 where a row has no adapter."""
    width = -(-max((t.shape[0] for t in a), default=0) // _C.MATMUL_PANEL) * _C.MATMUL_PANEL
    return x.new_zeros((x.shape[:-1].numel(), width), dtype=torch.float32)


def _add(
    y: Tensor,
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    adapter_of_row: Tensor | None,
    u: Tensor | None,
) -> Tensor:
    _check(y, x, a, b, scales, adapter_of_row)
    out = y.clone(memory_format=torch.contiguous_format)
    numbers = None if adapter_of_row is None else adapter_of_row.reshape(-1).contiguous()
    _C.lora_cpu(rows(out), rows(x), a, b, scales, numbers, u)
    return out


@torch.library.impl(lib, "lora", "CPU")
def _(
    y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scales: list[float], adapter_of_row: Tensor | None
) -> Tensor:
    return _add(y, x, a, b, scales, adapter_of_row, None)


@torch.library.impl(lib, "lora_fwd", "CPU")
def _(
    y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scales: list[float], adapter_of_row: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check(y, x, a, b, scales, adapter_of_row)
    u = _empty_u(x, a)
    return _add(y, x, a, b, scales, adapter_of_row, u), u


@torch.library.register_fake("pyengine::lora", lib=lib)
def _(
    y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scales: list[float], adapter_of_row: Tensor | None
) -> Tensor:
    _check(y, x, a, b, scales, adapter_of_row)
    return y.new_empty(y.shape)


@torch.library.register_fake("pyengine::lora_fwd", lib=lib)
def _(
    y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scales: list[float], adapter_of_row: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check(y, x, a, b, scales, adapter_of_row)
    return y.new_empty(y.shape), _empty_u(x, a)


def _product(x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.pyengine.matmul(x, w, dtype)  # type: ignore[no-any-return]


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, scales: list[float], adapter_of_row: Tensor | None, *weights: Tensor
    ) -> Tensor:
        a, b = list(weights[: len(scales)]), list(weights[len(scales) :])
        out, u = torch.ops.pyengine.lora_fwd(y, x, a, b, scales, adapter_of_row)
        ctx.save_for_backward(x, u, adapter_of_row, *weights)
        ctx.scales = scales
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, u, adapter_of_row, *weights = ctx.saved_tensors
        num = len(ctx.scales)
        _, wants_x, _, _, *wants_weights = ctx.needs_input_grad
        x_rows, g_rows = rows(x), rows(grad_y)
        grad_x = x_rows.new_zeros(x_rows.shape) if wants_x else None
        grads: list[Tensor | None] = [None] * (2 * num)
        for i, scale in enumerate(ctx.scales):
            a, b = weights[i], weights[num + i]
            chosen = slice(None) if adapter_of_row is None else (adapter_of_row.reshape(-1) == i).nonzero()[:, 0]
            x_i, g_i = x_rows[chosen], g_rows[chosen]
            grad_u = scale * _product(g_i, b.t(), torch.float32)
            if grad_x is not None:
                grad_x[chosen] = _product(grad_u, a.t(), x.dtype)
            if wants_weights[i]:
                grads[i] = _product(grad_u.t(), x_i.t(), a.dtype)
            if wants_weights[num + i]:
                u_i = u[chosen, : a.shape[0]]
                grads[num + i] = _product(g_i.t(), u_i.t(), b.dtype)
        return grad_y, None if grad_x is None else grad_x.view(x.shape), None, None, *grads


def lora_rows(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    adapter_of_row: Tensor | None = None,
) -> Tensor:
    """y + scale * (x @ a^T) @ b^T with the a, b and scale of each row's adapter; f32 arithmetic, one rounding.

    y [..., N] and x [..., K] f32 or bf16, of one dtype; a[i] [rank, K] and b[i] [N, rank] f32 or bf16, rank up to 256;
    adapter_of_row [...] int32: an index into a, or -1 for none; None: the one adapter for all. Returns a new tensor
    like y. A row has the same bits whatever the other rows are. Hu et al. 2021, arXiv:2106.09685.
    """
    tensors = [y, x, *a, *b]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Lora.apply(y, x, list(scales), adapter_of_row, *a, *b)  # type: ignore[no-any-return]
    return torch.ops.pyengine.lora(y, x, list(a), list(b), list(scales), adapter_of_row)  # type: ignore[no-any-return]


def lora(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The same with one adapter for all rows: a [rank, K], b [N, rank]."""
    return lora_rows(y, x, [a], [b], [scale])
