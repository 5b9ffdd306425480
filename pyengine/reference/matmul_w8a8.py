"""The specification of matmul_w8a8. Contract: csrc/include/pe/matmul_w8a8.h."""

import torch
from torch import Tensor


def matmul_w8a8_pack(w: Tensor) -> Tensor:
    """w [N, K] int8 as packed [ceil(N/16), ceil(K/4), 16, 4] u8, offset by 128."""
    n, k = w.shape
    num_panels, num_steps = -(-n // 16), -(-k // 4)
    padded = torch.full((16 * num_panels, 4 * num_steps), 128, dtype=torch.uint8)
    padded[:n, :k] = (w.int() + 128).to(torch.uint8)
    return padded.view(num_panels, 16, num_steps, 4).transpose(1, 2).contiguous()


def matmul_w8a8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """x_scale * (w_scale * (x @ w.T)): x [M, K], w [N, K] int8; the product in integers, the rest in float32."""
    exact = x.long() @ w.long().t()
    return (x_scale[:, None] * (w_scale * exact.float())).to(dtype)
