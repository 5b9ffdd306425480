"""Shared by tests and benchmarks: the accuracy rule, memory layouts, ISA forcing, guard pages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyengine import _C

# Ways a caller may hand over the same values. Every op test runs all of them, on inputs and on gradients.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "row_strided": lambda t: torch.stack([t, t], -2)[..., 0, :],
    "col_strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() > 1 and t.shape[0] else t,
}


def assert_accurate(got: Tensor, exact: Tensor, baseline: Tensor, factor: float = 2.0) -> None:
    """`got` may err at most `factor` times as much as torch at the same dtype (`baseline`), plus one rounding.

    exact: the same formula in float64. No tolerance is chosen by hand.
    """
    assert got.shape == exact.shape, f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == baseline.dtype, f"dtype {got.dtype}, expected {baseline.dtype}"
    if got.numel() == 0:
        return
    error = (got.double() - exact).abs().max().item()
    torch_error = (baseline.double() - exact).abs().max().item()
    limit = factor * torch_error + torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert error <= limit, f"max error {error:.3g} > {limit:.3g} (torch itself errs by {torch_error:.3g})"


@contextlib.contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Run the block at one ISA level."""
    previous = _C.set_active_isa(name)
    try:
        yield
    finally:
        _C.set_active_isa(previous)


@contextlib.contextmanager
def force_num_threads(count: int) -> Iterator[None]:
    """Run the block on `count` threads of the native pool."""
    previous = _C.num_threads()
    _C.set_num_threads(count)
    try:
        yield
    finally:
        _C.set_num_threads(previous)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    """Equal shape, dtype and bytes; NaN equals the same NaN."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    a, b = got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} bytes differ"
