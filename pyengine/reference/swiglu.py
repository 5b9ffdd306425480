"""The specification of swiglu. Contract: csrc/include/pe/swiglu.h."""

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """activation(gate) * up, computed in at least float32."""
    acc = torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(acc)
    activated = g * torch.sigmoid(g) if activation == "silu" else torch.nn.functional.gelu(g, approximate="tanh")
    return (activated * up.to(acc)).to(gate.dtype)


def swiglu_gate_up(gate_up: Tensor, *, activation: str = "silu") -> Tensor:
    """swiglu of the two halves of the last dimension."""
    return swiglu(*gate_up.chunk(2, -1), activation=activation)
