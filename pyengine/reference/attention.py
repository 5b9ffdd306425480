"""The specification of attention. Contract: csrc/include/pe/attention.h."""

import itertools
import math

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    segment_offsets: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v per segment, computed in at least float32."""
    return attention_with_lse(
        q, k, v, scale=scale, causal=causal, segment_offsets=segment_offsets, sliding_window=sliding_window
    )[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    segment_offsets: Tensor | None = None,
    sliding_window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [T, H, D], lse [T, H]), lse the log of the sum of exp of the scores, in the type of the sums."""
    offsets = [0, q.shape[0]] if segment_offsets is None else segment_offsets.tolist()
    parts = []
    for begin, end in itertools.pairwise(offsets):
        position = torch.arange(end - begin)
        distance = position[:, None] - position
        visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if sliding_window is not None:
            visible = visible & (distance < sliding_window)
        parts.append(attend(q[begin:end], k[begin:end], v[begin:end], visible, scale))
    y = torch.cat([part[0] for part in parts]) if parts else q[:0]
    lse = torch.cat([part[1] for part in parts]) if parts else q[:0, :, 0]
    return y, lse


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Of q [T, H, D] over k, v [S, K, D]; row t sees key j where visible [T, S] says so."""
    acc = torch.promote_types(q.dtype, torch.float32)
    group_size = q.shape[1] // k.shape[1]
    keys, values = (t.to(acc).repeat_interleave(group_size, 1) for t in (k, v))
    scores = torch.einsum("thd,jhd->htj", q.to(acc), keys) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    y = torch.einsum("htj,jhd->thd", torch.exp(scores - lse[..., None]), values)
    return y.to(q.dtype), lse.T
