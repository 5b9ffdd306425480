"""What the machine gives at this moment, in a few milliseconds: clock, memory stream, arithmetic.

Other tenants of a machine change all three within seconds. A timing is worth something only between equal probes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

# Before numpy: a product of the probe must not start threads of its own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

STREAM_BYTES = 96 << 20
REPEATS = 8


class Probes:
    """Rates on `num_threads` threads at once, each the best of eight."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        count = STREAM_BYTES // 4 // num_threads
        self._streams = [np.ones(count, np.float32) for _ in range(num_threads)]
        self._factors = [np.ones((256, 256), np.float32) for _ in range(num_threads)]

    def __call__(self) -> dict[str, float]:
        """clock: million steps of a Python loop a second; stream: GB/s; fma: GFLOP/s of float32 products."""
        return {
            "clock": 0.1 / self._best(_count, single=True),
            "stream": STREAM_BYTES / 1e9 / self._best(lambda i: self._streams[i].max()),
            "fma": 4 * 2 * 256**3 * self._num_threads / 1e9 / self._best(self._multiply),
        }

    def _multiply(self, i: int) -> None:
        for _ in range(4):
            self._factors[i] @ self._factors[i]

    def _best(self, work: Callable[[int], object], *, single: bool = False) -> float:
        return min(self._seconds(work, 1 if single else self._num_threads) for _ in range(REPEATS))

    @staticmethod
    def _seconds(work: Callable[[int], object], num_threads: int) -> float:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(1, num_threads)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        work(0)
        for thread in threads:
            thread.join()
        return time.perf_counter() - start


def _count(_: int) -> None:
    for _ in range(100_000):
        pass


def largest_move(probes: list[dict[str, float]]) -> float:
    """How far any probe moved among these: 0.15 means that the best was 15 % above the worst."""
    return max(max(p[name] for p in probes) / min(p[name] for p in probes) - 1 for name in probes[0])
