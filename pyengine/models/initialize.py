"""Initial weights as a pure function of (seed, parameter name, shape)."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

STD = 0.02

# They write into the residual stream, 2 * num_layers times: their variance is divided by that. Radford et al. 2019.
_RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")


@torch.no_grad()
def initialize(model: nn.Module, *, seed: int, num_layers: int, std: float = STD) -> None:
    """Matrices normal with deviation `std`, biases 0. Norms stay as they are made: they scale by 1.

    Each parameter has a generator of its own, so its values do not depend on which others exist, nor on the dtype
    beyond rounding.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            if name.endswith(".bias"):
                parameter.fill_(0.0)
            continue
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8, person=b"pyengine init").digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        scale = std / (2 * num_layers) ** 0.5 if name.endswith(_RESIDUAL_PROJECTIONS) else std
        values = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, scale, generator=generator)
        parameter.copy_(values)
