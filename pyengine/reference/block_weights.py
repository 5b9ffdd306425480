"""The specification of GGUF's block formats. Contract: csrc/include/pe/block_weights.h."""

from collections.abc import Callable

import torch
from torch import Tensor

GROUP_SIZE = 32  # of activations that share a scale, and what a row is a multiple of in every format
BLOCK_SIZE = dict.fromkeys(("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"), 32) | dict.fromkeys(
    ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"), 256
)
BLOCK_BYTES = {
    "q4_0": 18,
    "q4_1": 20,
    "q5_0": 22,
    "q5_1": 24,
    "q8_0": 34,
    "iq4_nl": 18,
    "q2_k": 84,
    "q3_k": 110,
    "q4_k": 144,
    "q5_k": 176,
    "q6_k": 210,
    "iq4_xs": 136,
}
BOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def dequantize(raw: Tensor, block_format: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K] of raw GGUF rows, uint8 [N, K / BLOCK_SIZE * BLOCK_BYTES]; exact in float64."""
    codes, d, m = parts(raw, block_format, dtype)
    return (d * codes if m is None else d * codes + m).flatten(1)


_Parts = tuple[Tensor, Tensor, Tensor | None]


def parts(raw: Tensor, block_format: str, dtype: torch.dtype = torch.float32) -> _Parts:
    """Codes [N, G, k of a scale group], unsigned where there is a minimum; d and that minimum, or None, [N, G, 1]."""
    blocks = raw.reshape(raw.shape[0], -1, BLOCK_BYTES[block_format])
    codes, d, m = _FORMATS[block_format](blocks, dtype)
    groups = codes.to(dtype).reshape(*d.flatten(1).shape, -1)
    return groups, d.flatten(1)[..., None], None if m is None else m.flatten(1)[..., None]


# Each takes blocks uint8 [N, B, bytes] and gives codes [N, B, block size], and d and m [N, B, scale groups of a block].


def _half(blocks: Tensor, at: int, dtype: torch.dtype) -> Tensor:
    return blocks[..., at : at + 2].contiguous().view(torch.float16).to(dtype)


def _unpack(plane: Tensor, width: int, run: int) -> Tensor:
    """Codes of `width` bits: the lowest ones of `run` bytes, then the next ones of the same bytes, and so on."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)[:, None]
    runs = plane.reshape(*plane.shape[:-1], -1, 1, run)
    codes: Tensor = runs.bitwise_right_shift(shifts) & (2**width - 1)
    return codes.flatten(-3).to(torch.int16)


def _q4_0(blocks: Tensor, dtype: torch.dtype) -> _Parts:
    return _unpack(blocks[..., 2:], 4, 16) - 8, _half(blocks, 0, dtype), None


def _q4_1(blocks: Tensor, dtype: torch.dtype) -> _Parts:
    return _unpack(blocks[..., 4:], 4, 16), _half(blocks, 0, dtype), _half(blocks, 2, dtype)


def _q5_0(blocks: Tensor, dtype: torch.dtype) -> _Parts:
    codes = _unpack(blocks[..., 6:], 4, 16) + 16 * _unpack(blocks[..., 2:6], 1, 1)
    return codes - 16, _half(blocks, 0, dtype), None


def _q5_1(blocks: Tensor, dtype: torch.dtype) -> _Parts:
    codes = _unpack(blocks[..., 8:], 4, 16) + 16 * _unpack(blocks[..., 4:8], 1, 1)
    return codes, _half(blocks, 0, dtype), _half(blocks, 2, dtype)


def _q8_0(blocks: Tensor, dtype: torch.dtype) -> _Parts:
    return blocks[..., 2:].contiguous().view(torch.int8), _half(blocks, 0, dtype), None


def _iq4_nl(blocks: Tensor, dtype: torch.dtype) -> _Parts:
    return _book(_unpack(blocks[..., 2:], 4, 16)), _half(blocks, 0, dtype), None


def _book(index: Tensor) -> Tensor:
    return torch.tensor(BOOK, dtype=torch.int16, device=index.device)[index.long()]


def _q2_k(blocks: Tensor, dtype: torch.dtype) -> _Parts:
    scales = blocks[..., :16]
    d = _half(blocks, 80, dtype) * (scales & 15).to(dtype)
    m = _half(blocks, 82, dtype) * scales.bitwise_right_shift(4).to(dtype)
    return _unpack(blocks[..., 16:80], 2, 32), d, -m


def _q3_k(blocks: Tensor, dtype: torch.dtype) -> _Parts:
    codes = _unpack(blocks[..., 32:96], 2, 32) + 4 * _unpack(blocks[..., :32], 1, 32)
    scales = _unpack(blocks[..., 96:104], 4, 8) + 16 * _unpack(blocks[..., 104:108], 2, 4)
    return codes - 4, _half(blocks, 108, dtype) * (scales - 32).to(dtype), None


def _scales_and_mins(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Eight of six bits each in bytes 4 ... 15: whole ones of the first four, whose upper bits belong to the others."""
    low, high, rest = (blocks[..., at : at + 4].to(torch.int16) for at in (4, 8, 12))
    scales = torch.cat([low & 63, rest & 15 | (low >> 6) << 4], -1)
    mins = torch.cat([high & 63, rest >> 4 | (high >> 6) << 4], -1)
    return _half(blocks, 0, dtype) * scales.to(dtype), -(_half(blocks, 2, dtype) * mins.to(dtype))


def _q4_k(blocks: Tensor, dtype: torch.dtype) -> _Parts:
    return _unpack(blocks[..., 16:], 4, 32), *_scales_and_mins(blocks, dtype)


def _q5_k(blocks: Tensor, dtype: torch.dtype) -> _Parts:
    codes = _unpack(blocks[..., 48:], 4, 32) + 16 * _unpack(blocks[..., 16:48], 1, 32)
    return codes, *_scales_and_mins(blocks, dtype)


def _q6_k(blocks: Tensor, dtype: torch.dtype) -> _Parts:
    codes = _unpack(blocks[..., :128], 4, 64) + 16 * _unpack(blocks[..., 128:192], 2, 32)
    scales = blocks[..., 192:208].contiguous().view(torch.int8)
    return codes - 32, _half(blocks, 208, dtype) * scales.to(dtype), None


def _iq4_xs(blocks: Tensor, dtype: torch.dtype) -> _Parts:
    scales = _unpack(blocks[..., 4:8], 4, 1) + 16 * _unpack(blocks[..., 2:4], 2, 1)
    return _book(_unpack(blocks[..., 8:], 4, 16)), _half(blocks, 0, dtype) * (scales - 32).to(dtype), None


_FORMATS: dict[str, Callable[[Tensor, torch.dtype], _Parts]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "iq4_nl": _iq4_nl,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_xs": _iq4_xs,
}
