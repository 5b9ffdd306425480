"""What every op shares: the torch library handle, the checks, and the 2-D row view."""

from __future__ import annotations

import torch
from torch import Tensor

lib = torch.library.Library("pyengine", "DEF")

FLOATS = (torch.float32, torch.bfloat16)


def check(condition: bool, op: str, name: str, expected: str, got: object) -> None:
    """Raise "[op] name: expected ..., got ..."; usable under torch.compile and on meta tensors."""
    torch._check(condition, lambda: f"[{op}] {name}: expected {expected}, got {got}")


def check_dtype(op: str, name: str, t: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    check(t.dtype in allowed, op, name, " or ".join(str(d) for d in allowed), t.dtype)


def check_like(op: str, name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """`t` must have the dtype and the device of `other`."""
    check(t.dtype == other.dtype, op, name, f"{other.dtype}, the dtype of {other_name}", t.dtype)
    check(t.device == other.device, op, name, f"device {other.device}, the device of {other_name}", t.device)


def check_shape(op: str, name: str, t: Tensor, shape: tuple[int, ...], why: str = "") -> None:
    expected = f"shape {tuple(shape)}{', ' + why if why else ''}"
    check(tuple(t.shape) == tuple(shape), op, name, expected, f"{tuple(t.shape)}")


def rows(t: Tensor) -> Tensor:
    """View t as [R, C] with unit column stride; copies only when no such view exists."""
    t = t.reshape(-1, t.shape[-1]) if t.shape[-1] else t.reshape(t.shape[:-1].numel(), 0)
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def empty_like(t: Tensor) -> Tensor:
    """A new contiguous tensor with the shape, dtype and device of t, whatever its strides."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def heads(t: Tensor) -> Tensor:
    """View t [T, H, D] with unit stride in D; copies only when it has none."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()
