"""The specification of attention_decode and kv_append. Contract: csrc/include/pe/attention_decode.h."""

import torch
from torch import Tensor

from pyengine.reference.attention import attend
from pyengine.reference.quantize_int8 import quantize_int8


def attention_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq: Tensor,
    position: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """One row after the other: gather what it sees, attend."""
    y = torch.empty_like(q)
    for t in range(q.shape[0]):
        last = int(position[t])
        first = 0 if sliding_window is None else max(0, last + 1 - sliding_window)
        page, slot = slots(
            v_pages.shape[2], block_table, seq[t].expand(last + 1 - first), torch.arange(first, last + 1)
        )
        k = k_pages[page, :, slot // 16, :, slot % 16]
        v = v_pages[page, :, slot]
        acc = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
        if k_scales is not None and v_scales is not None:
            k = k.to(acc) * k_scales[page, :, slot, None].to(acc)
            v = v.to(acc) * v_scales[page, :, slot, None].to(acc)
        visible = torch.ones(1, len(page), dtype=torch.bool)
        y[t] = attend(q[t : t + 1].to(acc), k.to(acc), v.to(acc), visible, scale)[0][0].to(q.dtype)
    return y


def kv_append(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq: Tensor,
    position: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Writes row t of k and v to the place of (seq[t], position[t])."""
    page, slot = slots(v_pages.shape[2], block_table, seq, position)
    if k_scales is not None and v_scales is not None:
        k, k_scales[page, :, slot] = _quantize(k)
        v, v_scales[page, :, slot] = _quantize(v)
    k_pages[page, :, slot // 16, :, slot % 16] = k.to(k_pages.dtype)
    v_pages[page, :, slot] = v.to(v_pages.dtype)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Heads [T, K, D] as int8, and their scales [T, K]."""
    q, scale = quantize_int8(x.reshape(-1, x.shape[-1]))
    return q.reshape(x.shape), scale.reshape(x.shape[:-1])


def slots(page_size: int, block_table: Tensor, seq: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The page of each (sequence, position), and the place in that page."""
    position = position.long()
    return block_table[seq.long(), position // page_size].long(), position % page_size
