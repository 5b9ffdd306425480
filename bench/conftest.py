"""After the benchmarks, one table: the providers of each case below one another, and their speed against torch."""

import os
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest
import torch

from pyengine import _C


@dataclass
class Timing:
    """A provider in one case: its median call, and the rates of that call (None where no amount of work is stated)."""

    case: str
    provider: str
    seconds: float
    spread: float
    bytes_per_second: float | None
    flops_per_second: float | None


TIMINGS = pytest.StashKey[list[Timing]]()
LOAD_BEFORE = pytest.StashKey[float]()


def pytest_configure(config):
    config.stash[TIMINGS] = []
    config.stash[LOAD_BEFORE] = os.getloadavg()[0]


@pytest.fixture(autouse=True)
def _timing(benchmark, request):
    torch.manual_seed(0)
    yield
    if benchmark.stats is None:  # --benchmark-disable: it ran once, untimed
        return
    stats, info = benchmark.stats.stats, benchmark.extra_info
    request.config.stash[TIMINGS].append(
        Timing(
            case=benchmark.group.replace("torch.", ""),
            provider=request.node.callspec.params["provider"],
            # A timed function may make several calls, on weights that push each other out of the cache.
            seconds=stats.median / info.get("num_calls", 1),
            spread=stats.iqr / stats.median,
            bytes_per_second=info["num_bytes"] / stats.median if "num_bytes" in info else None,
            flops_per_second=info["num_flops"] / stats.median if "num_flops" in info else None,
        )
    )


def _readable(seconds):
    scale, unit = next(((s, u) for s, u in [(1, " s"), (1e3, "ms"), (1e6, "us")] if seconds * s >= 1), (1e9, "ns"))
    value = seconds * scale
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def _giga(rate, unit):
    return "" if rate is None else f"{rate / 1e9:9.1f} {unit}"


def _processor():
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found.group(1) if found else "unknown processor"


def pytest_terminal_summary(terminalreporter, config):
    if not config.stash[TIMINGS]:
        return
    write = terminalreporter.write_line
    write(f"\n{_processor()}")
    write(f"pyengine: {_C.num_threads()} threads, {_C.active_isa()}")
    write(f"torch: {torch.get_num_threads()} threads, {torch.__version__}")
    if (load := config.stash[LOAD_BEFORE]) > 0.5:
        write(f"NOT QUIET: a load of {load:.1f} before the run. Threads then wait for one another; repeat it alone.")
    write("Times are medians; +- is the interquartile range: rows closer than that are equal.")
    write("x torch: how many times as fast as torch (as its fastest row where it has several).")
    for case, timings in groupby(config.stash[TIMINGS], key=lambda timing: timing.case):
        rows = list(timings)
        write("\n" + case)
        peer = min((row.seconds for row in rows if row.provider.startswith("torch")), default=None)
        for row in rows:
            rates = _giga(row.bytes_per_second, "GB/s") + _giga(row.flops_per_second, "GFLOP/s")
            speed = "" if peer is None else f"{peer / row.seconds:9.2f} x torch"
            write(f"  {row.provider:<16}{_readable(row.seconds):>9} +-{row.spread:5.0%}{rates}{speed}")
