"""Guard pages: tensors that end exactly where unreadable memory begins, or begin exactly where it ends."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_PROT_NONE, _PROT_READ_WRITE = 0, 3
_KEEP: dict[int, mmap.mmap] = {}


def guarded(t: Tensor, *, at_end: bool = True) -> Tensor:
    """A copy of contiguous `t` between two unreadable pages, touching the last one (or the first one).

    An access one byte past the end (or before the start) kills the process with SIGSEGV, which a test cannot miss.
    """
    page = mmap.PAGESIZE
    num_bytes = t.numel() * t.element_size()
    body = max(1, -(-num_bytes // page)) * page
    region = mmap.mmap(-1, body + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    offset = page + (body - num_bytes if at_end else 0)
    out = torch.frombuffer(region, dtype=t.dtype, count=t.numel(), offset=offset) if num_bytes else t.clone()
    if num_bytes:
        out = out.reshape(t.shape)
        out.copy_(t)
        _KEEP[out.data_ptr()] = region
    for address in (start, start + page + body):
        if _LIBC.mprotect(ctypes.c_void_p(address), page, _PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    return out
