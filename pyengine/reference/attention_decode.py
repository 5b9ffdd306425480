"""The specification of attention_decode and kv_append. Contract: csrc/include/pe/attention_decode.h."""

import torch
from torch import Tensor

from pyengine.reference.attention import attend


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
) -> None:
    """Writes row t of k and v to the place of (seq[t], position[t])."""
    page, slot = slots(v_pages.shape[2], block_table, seq, position)
    k_pages[page, :, slot // 16, :, slot % 16] = k.to(k_pages.dtype)
    v_pages[page, :, slot] = v.to(v_pages.dtype)


def slots(page_size: int, block_table: Tensor, seq: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The page of each (sequence, position), and the place in that page."""
    position = position.long()
    return block_table[seq.long(), position // page_size].long(), position % page_size
