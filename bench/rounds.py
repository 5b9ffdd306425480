"""Peers in one run: a process each, stopped while another is timed, in rotating order, with probes in between."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from probes import largest_move

Call = Callable[["Worker"], float]


class Worker:
    """A peer in a process of its own. It is stopped (SIGSTOP) whenever no request runs."""

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | (env or {})
        )
        self.info: dict[str, Any] = self("info")

    def __call__(self, method: str, **arguments: Any) -> Any:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.send_signal(signal.SIGCONT)
        process.stdin.write(json.dumps({"method": method, **arguments}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: the process ended with code {process.wait()} during {method}")
        process.send_signal(signal.SIGSTOP)
        return json.loads(line)["result"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        """A stopped process would outlive this one."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        self._process.wait()


@dataclass
class Row:
    """One workload: values of every accepted round, by peer."""

    name: str
    unit: str
    """"tok/s", more is better; or "s", less is better."""
    values: dict[str, list[float]] = field(default_factory=dict)
    probes: list[list[dict[str, float]]] = field(default_factory=list)
    num_rejected: int = 0

    def ratio(self, peer: str, base: str) -> tuple[float, float, float]:
        """How many times better `peer` is than `base`, round by round: median, first and third quartile."""
        pairs = zip(self.values[peer], self.values[base], strict=True)
        ratios = [a / b if self.unit == "tok/s" else b / a for a, b in pairs]
        return statistics.median(ratios), *quartiles(ratios)


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def run_row(
    row: Row,
    workers: list[Worker],
    call: Call,
    probe: Callable[[], dict[str, float]],
    num_rounds: int,
    *,
    max_move: float,
) -> None:
    """Time `call` on every worker in each round. Rounds in which a probe moved by more than `max_move` are thrown away.

    When three in four had to be thrown away, the row keeps no values.
    """
    row.values = {worker.name: [] for worker in workers}
    attempt = 0
    while len(row.values[workers[0].name]) < num_rounds:
        if attempt >= 4 * num_rounds:
            progress(f"{row.name}: left out, the machine is not quiet: {row.num_rejected} of {attempt} rounds rejected")
            row.values, row.probes = {}, []
            return
        shift = attempt % len(workers)
        order = workers[shift:] + workers[:shift]
        attempt += 1
        probes, values = [], {}
        for worker in order:
            probes.append(probe())
            values[worker.name] = call(worker)
        probes.append(probe())
        if largest_move(probes) > max_move:
            row.num_rejected += 1
            continue
        row.probes.append(probes)
        for name, value in values.items():
            row.values[name].append(value)
    progress(f"{row.name}: {num_rounds} rounds, {row.num_rejected} rejected")


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(rows: list[Row], base: str) -> str:
    """Medians with quartiles, the best, and the ratio to `base`."""
    lines = [f"{'workload':<22} {'peer':<16} {'median':>9} {'quartiles':>19} {'best':>9} {'unit':<6} ratio [quartiles]"]
    for row in rows:
        for name, values in row.values.items():
            low, high = quartiles(values)
            best = max(values) if row.unit == "tok/s" else min(values)
            has_ratio = name != base and base in row.values
            ratio = "{:.2f}x [{:.2f}, {:.2f}]".format(*row.ratio(name, base)) if has_ratio else ""
            spread = f"{low:.4g} .. {high:.4g}"
            median = statistics.median(values)
            lines.append(f"{row.name:<22} {name:<16} {median:>9.4g} {spread:>19} {best:>9.4g} {row.unit:<6} {ratio}")
    return "\n".join(lines)


def machine() -> dict[str, str | int]:
    """CPU, cores and kernel."""
    fields = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in fields}
    return {
        "cpu": info.get("model name", "unknown"),
        "family": "/".join(info.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "num_cpus": len(os.sched_getaffinity(0)),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
    }


def commit(root: Path) -> str:
    """The commit of the source tree, with "-dirty" if files differ from it."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
