"""One fused AdamW step, in place; and the sum of squares for clipping. Contract: csrc/include/pe/adamw.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyengine import _C
from pyengine.ops._library import FLOATS, check, check_dtype, check_shape, lib

lib.define(
    "adamw_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? master, float lr,"
    " float beta1, float beta2, float eps, float weight_decay, int step, float grad_scale) -> ()"
)
lib.define("sum_of_squares(Tensor x) -> Tensor")

OP = "adamw"


def _check(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor | None) -> None:
    check_dtype(OP, "param", param, FLOATS)
    check_dtype(OP, "grad", grad, FLOATS)
    check_dtype(OP, "exp_avg", exp_avg, FLOATS)
    check_dtype(OP, "exp_avg_sq", exp_avg_sq, (exp_avg.dtype,))
    others = [("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)]
    if master is not None:
        check(param.dtype == torch.bfloat16, OP, "master", "none for a float32 param", "a tensor")
        check_dtype(OP, "master", master, (torch.float32,))
        others.append(("master", master))
    for name, t in others:
        check_shape(OP, name, t, tuple(param.shape), "the shape of param")
        check(t.device == param.device, OP, name, f"device {param.device}, the device of param", t.device)
    for name, t in [("param", param), *others]:
        if t is not grad:
            check(t.is_contiguous(), OP, name, "a contiguous tensor", f"strides {t.stride()}")


@torch.library.impl(lib, "adamw_", "CPU")
def _(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    _check(param, grad, exp_avg, exp_avg_sq, master)
    _C.adamw_cpu(
        param.detach(),
        grad.detach().contiguous(),
        exp_avg,
        exp_avg_sq,
        master,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        grad_scale,
    )


@torch.library.register_fake("pyengine::adamw_", lib=lib)
def _(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    _check(param, grad, exp_avg, exp_avg_sq, master)


@torch.library.impl(lib, "sum_of_squares", "CPU")
def _(x: Tensor) -> Tensor:
    check_dtype("sum_of_squares", "x", x, FLOATS)
    return torch.tensor(_C.sum_of_squares_cpu(x.detach().contiguous()), dtype=torch.float64)


@torch.library.register_fake("pyengine::sum_of_squares", lib=lib)
def _(x: Tensor) -> Tensor:
    check_dtype("sum_of_squares", "x", x, FLOATS)
    return x.new_empty((), dtype=torch.float64)


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """One AdamW step in place: param, exp_avg, exp_avg_sq and master are overwritten. Loshchilov & Hutter 2019.

    param f32 or bf16, grad f32 or bf16, exp_avg and exp_avg_sq both f32 or both bf16, all of one shape; all but grad
    contiguous. With a bf16 param, `master` f32 holds what param rounds. `step` counts from 1. `grad_scale` multiplies
    the gradient first (clipping, loss scaling). Not recorded by autograd.

    Raises ArgumentError for a scalar out of its range and where two arguments overlap in memory.
    """
    with torch.no_grad():
        torch.ops.pyengine.adamw_(
            param, grad, exp_avg, exp_avg_sq, master, lr, beta1, beta2, eps, weight_decay, step, grad_scale
        )
        written = [t for t in (param, exp_avg, exp_avg_sq, master) if t is not None]
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(written)


def sum_of_squares(t: Tensor) -> float:
    """The sum of the squares of all elements of t (f32 or bf16), for the norm of a gradient.

    The same bits for any number of threads; infinite where an element exceeds 1.8e19.
    """
    return float(torch.ops.pyengine.sum_of_squares(t).item())
