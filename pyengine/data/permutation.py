"""A permutation of 0 .. size-1 given by a key: any position can be asked for alone, and nothing is stored.

A balanced Feistel network over the next even number of bits, walked until it lands inside (at most four steps are
expected).
"""

from __future__ import annotations

import hashlib
from typing import cast, overload

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError

MAX_SIZE = 1 << 62

_NUM_ROUNDS = 8
_U64 = np.uint64


class KeyedPermutation:
    """`permutation(i)` for one index or an array of them.

    Args:
        size: number of elements, 1 to 2**62.
        key: parts of the key; the same parts give the same permutation on every machine.
    """

    def __init__(self, size: int, *key: int | str) -> None:
        if not 1 <= size <= MAX_SIZE:
            raise ArgumentError(f"size: expected 1 to {MAX_SIZE}, got {size}")
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(repr((size, *key)).encode(), digest_size=8 * _NUM_ROUNDS, person=b"pyengine permute")
        self._round_keys = np.frombuffer(digest.digest(), dtype="<u8").astype(_U64)

    @overload
    def __call__(self, index: int) -> int: ...
    @overload
    def __call__(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]: ...
    def __call__(self, index: int | npt.NDArray[np.int64]) -> int | npt.NDArray[np.int64]:
        scalar = not isinstance(index, np.ndarray)
        values = np.atleast_1d(np.asarray(index, dtype=np.int64))
        if values.size and (values.min() < 0 or values.max() >= self.size):
            raise ArgumentError(f"index: expected 0 to {self.size - 1}, got {values.min()} to {values.max()}")
        result = self._encrypt(values.astype(_U64))
        while (outside := result >= self.size).any():
            result[outside] = self._encrypt(result[outside])
        return int(result[0]) if scalar else cast("npt.NDArray[np.int64]", result.astype(np.int64))

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        shift, mask = _U64(self._half_bits), _U64((1 << self._half_bits) - 1)
        left, right = values >> shift, values & mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << shift) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014), modulo 2**64."""
    values = values + _U64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> _U64(27))) * _U64(0x94D049BB133111EB)
    return values ^ (values >> _U64(31))
