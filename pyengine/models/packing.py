"""Positions and segments of a packed batch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyengine.errors import ArgumentError


def pack_positions(
    shape: torch.Size,
    position_ids: Tensor | None,
    segment_offsets: Tensor | None,
    max_positions: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """(position_ids [num_tokens], segment_offsets [num_segments + 1]), both int32, with what is missing filled in.

    Raises ArgumentError where the offsets do not cut the tokens into segments, or a position is out of range.
    """
    num_tokens = shape.numel()
    if segment_offsets is None:
        num_rows, row = (1, num_tokens) if len(shape) == 1 else (shape[0], shape[1])
        segment_offsets = torch.arange(num_rows + 1, dtype=torch.int32, device=device) * row
    else:
        _check_offsets(segment_offsets, num_tokens)
        segment_offsets = segment_offsets.to(torch.int32)
    if position_ids is None:
        lengths = segment_offsets.diff()
        starts = torch.repeat_interleave(segment_offsets[:-1], lengths, output_size=num_tokens)
        position_ids = torch.arange(num_tokens, dtype=torch.int32, device=device) - starts
    elif position_ids.shape != shape:
        raise ArgumentError(f"position_ids: expected shape {tuple(shape)}, got {tuple(position_ids.shape)}")
    positions = position_ids.reshape(-1).to(torch.int32)
    if num_tokens:
        low, high = (int(value) for value in torch.aminmax(positions))
        if low < 0 or high >= max_positions:
            raise ArgumentError(f"position_ids: expected 0 to {max_positions - 1}, got {low if low < 0 else high}")
    return positions, segment_offsets


def _check_offsets(segment_offsets: Tensor, num_tokens: int) -> None:
    if segment_offsets.dim() != 1 or len(segment_offsets) < 1 or segment_offsets.is_floating_point():
        raise ArgumentError(
            f"segment_offsets: expected integers [num_segments + 1], got {segment_offsets.dtype} "
            f"{tuple(segment_offsets.shape)}"
        )
    first, last = int(segment_offsets[0]), int(segment_offsets[-1])
    if first != 0 or last != num_tokens or bool((segment_offsets.diff() < 0).any()):
        raise ArgumentError(
            f"segment_offsets: expected to rise from 0 to {num_tokens}, the number of tokens, got {first} to {last}"
        )
