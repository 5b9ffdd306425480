"""Quantisation of rows to the blocks of ggml, in numpy.

Without `search` the result equals `quantize_row_*_ref` of https://github.com/ggml-org/ggml (ggml-quants.c) bit for bit.
The inverse is `pyengine._C.gguf_dequantize`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError

__all__ = [
    "BLOCK_BYTES",
    "BLOCK_ELEMENTS",
    "BlockGrid",
    "as_blocks",
    "as_half",
    "fit_grid",
    "half_bytes",
    "join_blocks",
    "quantize_iq4_nl",
    "quantize_q4_0",
    "quantize_q4_1",
    "quantize_q5_0",
    "quantize_q5_1",
    "quantize_q8_0",
    "reciprocal",
]

BLOCK_ELEMENTS = 32
BLOCK_BYTES = {"q4_0": 18, "q4_1": 20, "q8_0": 34}
"""Of the formats that `fit_grid` takes."""
BOOK = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32)
_HALF_MAX = 65504.0

_Float32 = npt.NDArray[np.float32]
_Uint8 = npt.NDArray[np.uint8]


def quantize_q4_0(weight: npt.NDArray[Any], search: bool = False) -> _Uint8:
    """w = d * (q - 8), q of 4 bits: 18 bytes for 32 weights.

    Args:
        weight: [..., in_features], finite, in_features a multiple of 32.
        search: choose d per block for the least squared error instead of from the largest magnitude; about 80 times the
            work.

    Returns:
        uint8 [..., in_features / 32 * 18].

    Raises:
        ArgumentError: a length that is no multiple of 32, or values whose scale a half cannot hold.
    """
    half, codes = _quantize_middle(weight, 4, search)
    return join_blocks(weight, half_bytes(half), _pack_nibbles(codes))


def quantize_q4_1(weight: npt.NDArray[Any], search: bool = False) -> _Uint8:
    """w = d * q + m, q of 4 bits: 20 bytes for 32 weights.

    Args:
        weight: [..., in_features], finite, in_features a multiple of 32.
        search: choose m and d per block for the least squared error instead of from the smallest and largest weight;
            about 80 times the work.

    Returns:
        uint8 [..., in_features / 32 * 20].

    Raises:
        ArgumentError: a length that is no multiple of 32, or values that a half cannot hold.
    """
    scale, minimum, codes = _quantize_range(weight, 4, search)
    return join_blocks(weight, half_bytes(scale), half_bytes(minimum), _pack_nibbles(codes))


def quantize_q5_0(weight: npt.NDArray[Any], search: bool = False) -> _Uint8:
    """As `quantize_q4_0`, w = d * (q - 16), q of 5 bits: 22 bytes for 32 weights."""
    half, codes = _quantize_middle(weight, 5, search)
    return join_blocks(weight, half_bytes(half), *_pack_five_bits(codes))


def quantize_q5_1(weight: npt.NDArray[Any], search: bool = False) -> _Uint8:
    """As `quantize_q4_1`, q of 5 bits: 24 bytes for 32 weights."""
    scale, minimum, codes = _quantize_range(weight, 5, search)
    return join_blocks(weight, half_bytes(scale), half_bytes(minimum), *_pack_five_bits(codes))


def quantize_iq4_nl(weight: npt.NDArray[Any], search: bool = False) -> _Uint8:
    """w = d * BOOK[q], q of 4 bits: 18 bytes for 32 weights. Large weights count for more.

    Args and errors are those of `quantize_q4_0`; d is fitted to the codes without `search` too.

    Returns:
        uint8 [..., in_features / 32 * 18].
    """
    blocks = as_blocks(weight)
    position = np.abs(blocks).argmax(axis=-1)[:, None]
    start = np.take_along_axis(blocks, position, axis=-1) / BOOK[0]
    importance = blocks**2
    best_half, best_codes = as_half(start), np.zeros(blocks.shape, np.uint8)
    best_error = np.full(len(blocks), np.inf, np.float32)
    for factor in np.linspace(0.8, 1.15, 29, dtype=np.float32) if search else np.ones(1, np.float32):
        codes = _nearest_in_book(blocks * reciprocal(start * factor))
        values = BOOK[codes]
        squares = (importance * values * values).sum(-1, keepdims=True)
        product = (importance * values * blocks).sum(-1, keepdims=True)
        half = as_half(np.divide(product, squares, out=np.zeros_like(squares), where=squares > 0))
        codes = _nearest_in_book(blocks * reciprocal(half.astype(np.float32)))
        error = (importance * (blocks - half.astype(np.float32) * BOOK[codes]) ** 2).sum(-1)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_half = np.where(better[:, None], half, best_half)
        best_codes = np.where(better[:, None], codes, best_codes)
    return join_blocks(weight, half_bytes(best_half), _pack_nibbles(best_codes))


def quantize_q8_0(weight: npt.NDArray[Any], search: bool = False) -> _Uint8:
    """w = d * q, q of 8 bits with sign: 34 bytes for 32 weights.

    Args:
        weight: [..., in_features], finite, in_features a multiple of 32.
        search: choose d per block for the least squared error instead of from the largest magnitude; about 80 times the
            work.

    Returns:
        uint8 [..., in_features / 32 * 34].

    Raises:
        ArgumentError: a length that is no multiple of 32, or values whose scale a half cannot hold.
    """
    blocks = as_blocks(weight)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    scaled = blocks * reciprocal(scale)
    # Halves round away from zero; adding 0.5 to the whole value could round up what lies just below a half.
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    codes = np.asarray(np.copysign(whole + (magnitude - whole >= 0.5), scaled), np.float32)
    half = as_half(scale)
    if search:
        candidates = np.linspace(0.97, 1.01, 29, dtype=np.float32)
        half, codes = _search_scale(blocks, scale, half, codes, candidates, low=-128, high=127, zero=0)
    return join_blocks(weight, half_bytes(half), codes.astype(np.int8).view(np.uint8))


def _quantize_middle(weight: npt.NDArray[Any], bits: int, search: bool) -> tuple[npt.NDArray[np.float16], _Float32]:
    """(scale, codes) of w = scale * (q - 2^(bits - 1))."""
    blocks = as_blocks(weight)
    zero = 2 ** (bits - 1)
    scale = _scale_to_lowest(blocks, zero)
    codes = _round_half_up(blocks * reciprocal(scale) + np.float32(zero + 0.5), 2 * zero - 1)
    half = as_half(scale)
    if search:
        candidates = np.linspace(0.75, 1.1, 29, dtype=np.float32)
        half, codes = _search_scale(blocks, scale, half, codes, candidates, low=0, high=2 * zero - 1, zero=zero)
    return half, codes


def _quantize_range(
    weight: npt.NDArray[Any], bits: int, search: bool
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16], _Float32]:
    """(scale, minimum, codes) of w = scale * q + minimum."""
    blocks = as_blocks(weight)
    top = 2**bits - 1
    minimum = blocks.min(axis=-1, keepdims=True)
    maximum = blocks.max(axis=-1, keepdims=True)
    scale = (maximum - minimum) / np.float32(top)
    codes = _round_half_up((blocks - minimum) * reciprocal(scale) + np.float32(0.5), top)
    half_scale, half_minimum = as_half(scale), as_half(minimum)
    if search:
        half_scale, half_minimum, codes = _search_range(
            blocks, minimum, maximum, half_scale, half_minimum, codes, top=top
        )
    return half_scale, half_minimum, codes


def _nearest_in_book(values: _Float32) -> _Uint8:
    return np.searchsorted((BOOK[1:] + BOOK[:-1]) / 2, values).astype(np.uint8)


def as_blocks(weight: npt.NDArray[Any], block_size: int = BLOCK_ELEMENTS) -> _Float32:
    """[..., in_features] as float32 [blocks, block_size]; ArgumentError for other lengths and values not finite."""
    if weight.ndim == 0 or weight.shape[-1] % block_size != 0:
        raise ArgumentError(f"weight: expected rows of a multiple of {block_size}, got shape {weight.shape}")
    blocks = np.ascontiguousarray(weight, np.float32).reshape(-1, block_size)
    if not np.isfinite(blocks).all():
        raise ArgumentError("weight: expected finite values, got infinity or NaN")
    return blocks


def as_half(values: _Float32) -> npt.NDArray[np.float16]:
    """Rounded; ArgumentError for values that a half cannot hold."""
    if values.size and np.abs(values).max() > _HALF_MAX:
        raise ArgumentError(f"weight: expected scales up to {_HALF_MAX}, got {np.abs(values).max()}")
    return values.astype(np.float16)


def reciprocal(scale: _Float32) -> _Float32:
    """1 / scale, and 0 where that is infinite: the scale is 0 then, or becomes 0 as a half."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _round_half_up(shifted: _Float32, high: int) -> _Float32:
    """The integer part of values that were shifted by a half, in [0, high]."""
    return np.asarray(np.clip(np.trunc(shifted), 0, high), np.float32)


def _scale_to_lowest(blocks: _Float32, zero: int) -> _Float32:
    """The weight of the largest magnitude, the first of several, becomes code 0."""
    position = np.abs(blocks).argmax(axis=-1)[:, None]
    return np.take_along_axis(blocks, position, axis=-1) / np.float32(-zero)


def half_bytes(half: npt.NDArray[np.float16]) -> _Uint8:
    """uint8 [n, 2] of n halves."""
    return half.reshape(-1, 1).view(np.uint8)


def _pack_nibbles(codes: npt.NDArray[Any]) -> _Uint8:
    """Elements 0..15 of a block go to the low halves of its 16 bytes, 16..31 to the high halves."""
    narrow = codes.astype(np.uint8)
    middle = BLOCK_ELEMENTS // 2
    return narrow[:, :middle] | (narrow[:, middle:] << np.uint8(4))


def _pack_five_bits(codes: npt.NDArray[Any]) -> tuple[_Uint8, _Uint8]:
    """The fifth bits of a block's codes as bits 0..31 of 4 bytes; the others as `_pack_nibbles` has them."""
    narrow = codes.astype(np.uint8)
    return np.packbits(narrow >> 4, axis=-1, bitorder="little"), _pack_nibbles(narrow & 15)


def join_blocks(weight: npt.NDArray[Any], *parts: _Uint8, block_size: int = BLOCK_ELEMENTS) -> _Uint8:
    """The parts of each block [blocks, bytes] one after another, as rows of the shape of `weight`."""
    blocks = np.concatenate(parts, axis=-1)
    row_bytes = weight.shape[-1] // block_size * blocks.shape[-1]
    return blocks.reshape(*weight.shape[:-1], row_bytes)


def _squared_error(blocks: _Float32, approximation: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    difference = blocks.astype(np.float64) - approximation
    return np.asarray(np.einsum("bi,bi->b", difference, difference))


def _fit_codes(blocks: _Float32, half: npt.NDArray[np.float16], low: int, high: int, zero: int) -> _Float32:
    """The best codes for the scale as it is stored."""
    inverse = reciprocal(half.astype(np.float32))
    return np.asarray(np.clip(np.rint(blocks * inverse) + zero, low, high), np.float32)


def _search_scale(
    blocks: _Float32,
    scale: _Float32,
    best_half: npt.NDArray[np.float16],
    best_codes: _Float32,
    candidates: _Float32,
    low: int,
    high: int,
    zero: int,
) -> tuple[npt.NDArray[np.float16], _Float32]:
    """Tries scale * candidates, each followed by the least-squares scale for its codes; keeps the best per block."""
    best_error = _squared_error(blocks, best_half.astype(np.float64) * (best_codes - zero))
    for candidate in candidates:
        half = (scale * candidate).astype(np.float16)
        for _ in range(2):
            codes = _fit_codes(blocks, half, low, high, zero)
            error = _squared_error(blocks, half.astype(np.float64) * (codes - zero))
            better = (error < best_error) & np.isfinite(half[:, 0])
            best_error = np.where(better, error, best_error)
            best_half = np.where(better[:, None], half, best_half)
            best_codes = np.where(better[:, None], codes, best_codes)
            centred = codes.astype(np.float64) - zero
            weight_sum = np.einsum("bi,bi->b", centred, centred)
            product = np.einsum("bi,bi->b", centred, blocks.astype(np.float64))
            fitted = np.divide(product, weight_sum, out=np.zeros_like(product), where=weight_sum > 0)
            half = np.clip(fitted, -_HALF_MAX, _HALF_MAX).astype(np.float16)[:, None]
    return best_half, best_codes


def _search_range(
    blocks: _Float32,
    minimum: _Float32,
    maximum: _Float32,
    best_scale: npt.NDArray[np.float16],
    best_minimum: npt.NDArray[np.float16],
    best_codes: _Float32,
    top: int,
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16], _Float32]:
    """Tries ranges drawn in from both ends, each followed by the least-squares line for its codes; keeps the best."""
    span = maximum - minimum
    best_error = _squared_error(blocks, best_scale.astype(np.float64) * best_codes + best_minimum.astype(np.float64))
    exact = blocks.astype(np.float64)
    mean = exact.mean(axis=-1)
    for cut_low in (0.0, 0.03, 0.06, 0.1, 0.15):
        for cut_high in (0.0, 0.03, 0.06, 0.1, 0.15):
            low = (minimum + np.float32(cut_low) * span).astype(np.float16)
            half = (span * np.float32((1 - cut_low - cut_high) / top)).astype(np.float16)
            for _ in range(2):
                inverse = reciprocal(half.astype(np.float32))
                codes = np.clip(np.rint((blocks - low.astype(np.float32)) * inverse), 0, top)
                error = _squared_error(blocks, half.astype(np.float64) * codes + low.astype(np.float64))
                better = error < best_error
                best_error = np.where(better, error, best_error)
                best_scale = np.where(better[:, None], half, best_scale)
                best_minimum = np.where(better[:, None], low, best_minimum)
                best_codes = np.where(better[:, None], codes, best_codes)
                centred = codes - codes.mean(axis=-1, keepdims=True)
                variance = np.einsum("bi,bi->b", centred, centred)
                product = np.einsum("bi,bi->b", centred, exact)
                slope = np.divide(product, variance, out=np.zeros_like(product), where=variance > 0)
                intercept = mean - slope * codes.mean(axis=-1)
                half = np.clip(slope, -_HALF_MAX, _HALF_MAX).astype(np.float16)[:, None]
                low = np.clip(intercept, -_HALF_MAX, _HALF_MAX).astype(np.float16)[:, None]
    return best_scale, best_minimum, best_codes


class BlockGrid:
    """The values that one block of each of N rows can take: d * (q - zero) + m, with d and m as they are stored.

    Args:
        block_format: "q4_0", "q4_1" or "q8_0".
        scale, minimum: float16 [N, 1]; minimum is read for q4_1 only.
    """

    def __init__(
        self, block_format: str, scale: npt.NDArray[np.float16], minimum: npt.NDArray[np.float16] | None = None
    ) -> None:
        self.block_format = block_format
        self._scale = scale
        self._minimum = minimum
        self._inverse = reciprocal(scale.astype(np.float32))
        self._low, self._high, self._zero = {"q4_0": (0, 15, 8), "q4_1": (0, 15, 0), "q8_0": (-127, 127, 0)}[
            block_format
        ]

    def codes(self, weight: _Float32) -> _Float32:
        """The nearest codes of [N, n] weights."""
        shifted = weight if self._minimum is None else weight - self._minimum.astype(np.float32)
        steps = np.rint(shifted * self._inverse) + np.float32(self._zero)
        return np.asarray(np.clip(steps, self._low, self._high), np.float32)

    def values(self, codes: _Float32) -> _Float32:
        """What [N, n] codes stand for, rounded as the kernels and ggml round it."""
        values = self._scale.astype(np.float32) * (codes - np.float32(self._zero))
        return values if self._minimum is None else values + self._minimum.astype(np.float32)

    def blocks(self, codes: _Float32) -> _Uint8:
        """uint8 [N, bytes of a block] of [N, 32] codes."""
        if self.block_format == "q8_0":
            return np.concatenate([half_bytes(self._scale), codes.astype(np.int8).view(np.uint8)], axis=-1)
        scales = [half for half in (self._scale, self._minimum) if half is not None]
        return np.concatenate([*map(half_bytes, scales), _pack_nibbles(codes)], axis=-1)


def fit_grid(block: _Float32, block_format: str, importance: npt.NDArray[np.float64]) -> BlockGrid:
    """The grid of [N, 32] weights, of some tried, with the least squared error weighted by `importance` [32].

    Raises ArgumentError for values that are not finite, or whose scale a half cannot hold.
    """
    block = as_blocks(block)
    best_error, best = np.full(len(block), np.inf), [np.zeros((len(block), 1), np.float16) for _ in range(2)]
    for scale, minimum in _candidates(block, block_format):
        grid = BlockGrid(block_format, scale, minimum)
        error = (block.astype(np.float64) - grid.values(grid.codes(block))) ** 2 @ importance
        better = error < best_error
        best_error = np.where(better, error, best_error)
        for kept, tried in zip(best, (scale, minimum), strict=True):
            if tried is not None:
                kept[better] = tried[better]
    return BlockGrid(block_format, best[0], best[1] if block_format == "q4_1" else None)


def _candidates(
    block: _Float32, block_format: str
) -> Iterator[tuple[npt.NDArray[np.float16], npt.NDArray[np.float16] | None]]:
    if block_format == "q4_1":
        minimum = block.min(axis=-1, keepdims=True)
        span = block.max(axis=-1, keepdims=True) - minimum
        for cut_low in (0.0, 0.04, 0.08, 0.12):
            for cut_high in (0.0, 0.04, 0.08, 0.12):
                share = np.float32((1 - cut_low - cut_high) / 15)
                yield as_half(span * share), as_half(minimum + np.float32(cut_low) * span)
    elif block_format == "q4_0":
        scale = _scale_to_lowest(block, 8)
        for factor in np.linspace(0.8, 1.1, 13, dtype=np.float32):
            yield as_half(scale * factor), None
    else:
        yield as_half(np.abs(block).max(axis=-1, keepdims=True) / np.float32(127)), None
