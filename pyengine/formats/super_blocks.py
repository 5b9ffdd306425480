"""Quantisation of rows to ggml's blocks of 256, in numpy: q4_k, q5_k and q6_k.

The scales of a block are integers times one half, so each group is fitted on its own first, then the block's half is
chosen for the largest of its scales, and the codes are rounded to what is stored. The inverse is
`pyengine._C.gguf_dequantize`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.formats.blocks import as_blocks, as_half, half_bytes, join_blocks, reciprocal

__all__ = ["SUPER_BLOCK_ELEMENTS", "quantize_q4_k", "quantize_q5_k", "quantize_q6_k"]

SUPER_BLOCK_ELEMENTS = 256

_Float32 = npt.NDArray[np.float32]
_Uint8 = npt.NDArray[np.uint8]


def quantize_q4_k(weight: npt.NDArray[Any], search: bool = False) -> _Uint8:
    """w = d * s * q - m * t, q of 4 bits, s and t of 6 bits for each 32 weights: 144 bytes for 256 weights.

    Args:
        weight: [..., in_features], finite, in_features a multiple of 256.
        search: try 21 ranges for each 32 weights instead of theirs from end to end; about 15 times the work.

    Returns:
        uint8 [..., in_features / 256 * 144].

    Raises:
        ArgumentError: a length that is no multiple of 256, or values whose scale a half cannot hold.
    """
    scales, codes = _quantize_ranges(weight, 4, search)
    return join_blocks(weight, scales, _pack_runs(codes, 4, 32), block_size=SUPER_BLOCK_ELEMENTS)


def quantize_q5_k(weight: npt.NDArray[Any], search: bool = False) -> _Uint8:
    """As `quantize_q4_k`, q of 5 bits: 176 bytes for 256 weights."""
    scales, codes = _quantize_ranges(weight, 5, search)
    high, low = _pack_runs(codes >> np.uint8(4), 1, 32), _pack_runs(codes & np.uint8(15), 4, 32)
    return join_blocks(weight, scales, high, low, block_size=SUPER_BLOCK_ELEMENTS)


def quantize_q6_k(weight: npt.NDArray[Any], search: bool = False) -> _Uint8:
    """w = d * s * (q - 32), q of 6 bits, s of 8 with sign for each 16 weights: 210 bytes for 256 weights.

    Args and errors are those of `quantize_q4_k`.

    Returns:
        uint8 [..., in_features / 256 * 210].
    """
    groups = as_blocks(weight, SUPER_BLOCK_ELEMENTS).reshape(-1, 16, 16)
    unit = _largest(groups)
    scale = _fit_scales(groups / unit, search) * unit[..., 0]
    largest = np.take_along_axis(scale, np.abs(scale).argmax(-1)[:, None], -1)
    half = as_half(largest / np.float32(-128))
    d = half.astype(np.float32)
    steps = np.clip(np.rint(scale * reciprocal(d)), -128, 127).astype(np.float32)
    codes = np.clip(np.rint(groups * reciprocal(d * steps)[..., None]), -32, 31) + np.float32(32)
    q = codes.astype(np.uint8).reshape(-1, SUPER_BLOCK_ELEMENTS)
    low, high = _pack_runs(q & np.uint8(15), 4, 64), _pack_runs(q >> np.uint8(4), 2, 32)
    scales = steps.astype(np.int8).view(np.uint8)
    return join_blocks(weight, low, high, scales, half_bytes(half), block_size=SUPER_BLOCK_ELEMENTS)


def _quantize_ranges(weight: npt.NDArray[Any], bits: int, search: bool) -> tuple[_Uint8, _Uint8]:
    """(16 bytes of scales and minima [B, 16], codes [B, 256]) with a scale and a minimum for each 32 weights."""
    groups = as_blocks(weight, SUPER_BLOCK_ELEMENTS).reshape(-1, 8, 32)
    unit = _largest(groups)
    halves, steps = [], []
    for in_units in _fit_ranges(groups / unit, bits, search):
        values = in_units * unit[..., 0]
        half = as_half(values.max(-1, keepdims=True) / np.float32(63))
        halves.append(half)
        steps.append(np.clip(np.rint(values * reciprocal(half.astype(np.float32))), 0, 63).astype(np.uint8))
    d, m = (half.astype(np.float32) * step for half, step in zip(halves, steps, strict=True))
    codes = np.clip(np.rint((groups + m[..., None]) * reciprocal(d)[..., None]), 0, 2**bits - 1).astype(np.uint8)
    packed = np.concatenate([*map(half_bytes, halves), _pack_six_bits(*steps)], -1)
    return packed, codes.reshape(-1, SUPER_BLOCK_ELEMENTS)


def _largest(groups: _Float32) -> _Float32:
    """[B, 1, 1]: the largest magnitude of a block, 1 where that is 0."""
    largest = np.abs(groups).max((1, 2), keepdims=True)
    return np.where(largest > 0, largest, np.float32(1))


def _fit_ranges(groups: _Float32, bits: int, search: bool) -> tuple[_Float32, _Float32]:
    """(scale, minimum), both >= 0, of w = scale * q - minimum for each group [B, G, n], its largest weight at most 1.

    Large weights count for more.
    """
    top = np.float32(2**bits - 1)
    # Where all are zero any will do that can be divided by.
    importance = np.sqrt(np.mean(groups**2, -1, keepdims=True)) + np.abs(groups) + np.float32(1e-12)
    low, high = np.minimum(groups.min(-1), 0), groups.max(-1)
    best_scale, best_low = np.maximum(high - low, 0) / top, low
    best_error = _range_error(groups, importance, best_scale, best_low, top)
    for shift in np.linspace(-1.0, 1.0, 21, dtype=np.float32) if search else np.zeros(1, np.float32):
        q = np.clip(np.rint((groups - low[..., None]) * reciprocal((high - low) / (top + shift))[..., None]), 0, top)
        scale, fitted_low = _weighted_line(groups, importance, q)
        error = _range_error(groups, importance, scale, fitted_low, top)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale, best_low = np.where(better, scale, best_scale), np.where(better, fitted_low, best_low)
    return best_scale, -best_low


def _weighted_line(groups: _Float32, importance: _Float32, q: _Float32) -> tuple[_Float32, _Float32]:
    """The scale >= 0 and low <= 0 with the least weighted error of scale * q + low."""
    total = importance.sum(-1)
    mean_q, mean_w = (importance * q).sum(-1) / total, (importance * groups).sum(-1) / total
    variance = (importance * (q - mean_q[..., None]) ** 2).sum(-1)
    product = (importance * (q - mean_q[..., None]) * (groups - mean_w[..., None])).sum(-1)
    scale = np.divide(product, variance, out=np.zeros_like(product), where=variance > 0)
    low = mean_w - scale * mean_q
    # Where the line would start above zero, one through zero.
    squares = (importance * q * q).sum(-1)
    through_zero = np.divide((importance * q * groups).sum(-1), squares, out=np.zeros_like(squares), where=squares > 0)
    return np.maximum(np.where(low > 0, through_zero, scale), 0), np.minimum(low, 0)


def _range_error(groups: _Float32, importance: _Float32, scale: _Float32, low: _Float32, top: np.float32) -> _Float32:
    q = np.clip(np.rint((groups - low[..., None]) * reciprocal(scale)[..., None]), 0, top)
    error: _Float32 = (importance * (groups - scale[..., None] * q - low[..., None]) ** 2).sum(-1)
    return error


def _fit_scales(groups: _Float32, search: bool) -> _Float32:
    """The scale, of either sign, of w = scale * (q - 32) for each group [B, G, n], its largest weight at most 1.

    Large weights count for more.
    """
    position = np.abs(groups).argmax(-1)[..., None]
    start = np.take_along_axis(groups, position, -1)[..., 0] / np.float32(-32)
    importance = groups**2
    best, best_error = start, np.full(start.shape, np.inf, np.float32)
    for factor in np.linspace(0.85, 1.05, 21, dtype=np.float32) if search else np.ones(1, np.float32):
        q = np.clip(np.rint(groups * reciprocal(start * factor)[..., None]), -32, 31)
        squares = (importance * q * q).sum(-1)
        scale = np.divide((importance * q * groups).sum(-1), squares, out=np.zeros_like(squares), where=squares > 0)
        q = np.clip(np.rint(groups * reciprocal(scale)[..., None]), -32, 31)
        error = (importance * (groups - scale[..., None] * q) ** 2).sum(-1)
        better = error < best_error
        best, best_error = np.where(better, scale, best), np.where(better, error, best_error)
    return best


def _pack_runs(codes: _Uint8, width: int, run: int) -> _Uint8:
    """[B, 256] codes of `width` bits: `run` bytes hold the first run of codes in their lowest bits, then the next."""
    num_bytes = SUPER_BLOCK_ELEMENTS * width // 8
    runs = codes.reshape(len(codes), num_bytes // run, 8 // width, run)
    packed: _Uint8 = np.bitwise_or.reduce(runs << np.arange(0, 8, width, dtype=np.uint8)[:, None], axis=2)
    return packed.reshape(len(codes), num_bytes)


def _pack_six_bits(scales: _Uint8, minima: _Uint8) -> _Uint8:
    """[B, 8] and [B, 8] of 6 bits in 12 bytes: the upper bits of the last four lie above the first four."""
    first = [values[:, :4] | (values[:, 4:] >> 4 << 6) for values in (scales, minima)]
    return np.concatenate([*first, (scales[:, 4:] & 15) | (minima[:, 4:] << 4)], -1)
