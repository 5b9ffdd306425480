"""Rows of a learned table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, input_ids: Tensor) -> Tensor:
        ctx.save_for_backward(input_ids)
        ctx.num_embeddings = weight.shape[0]
        return nn.functional.embedding(input_ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        # A frequent token adds up many rows: in float32 and rounded once, not at every row.
        grad_weight = torch.ops.aten.embedding_dense_backward(
            grad_y.float(), ctx.saved_tensors[0], ctx.num_embeddings, -1, False
        )
        return grad_weight.to(grad_y.dtype), None


class Embedding(nn.Module):
    """weight[input_ids]. weight [num_embeddings, embedding_dim] is not initialised: the model does that."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, dtype=dtype, device=device))

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [...] int32 or int64 -> [..., embedding_dim]. Raises IndexError for an id outside the table."""
        return _Lookup.apply(self.weight, input_ids)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}"
