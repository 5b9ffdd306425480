"""The parent's side of `template_worker`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyengine.tokenizer.worker_process import WorkerProcess, frame


@dataclass(frozen=True, kw_only=True)
class TemplateLimits:
    """What one compilation or rendering may cost. Times are per request; wall time is the net under CPU time."""

    fuel: int = 500_000
    source_bytes: int = 1 << 20
    input_bytes: int = 16 << 20
    output_bytes: int = 4 << 20
    memory_bytes: int = 512 << 20
    cpu_seconds: int = 2
    wall_seconds: float = 30.0


class TemplateProcess(WorkerProcess):
    """One template, compiled in a process of its own."""

    def __init__(self, source: str, limits: TemplateLimits) -> None:
        super().__init__(
            "chat templates",
            Path(__file__).with_name("template_worker.py"),
            "minijinja",
            [limits.memory_bytes, limits.cpu_seconds, limits.fuel, limits.output_bytes],
            memory_bytes=limits.memory_bytes,
            cpu_seconds=limits.cpu_seconds,
            wall_seconds=limits.wall_seconds,
        )
        self._source = source
        self._limits = limits

    def compile(self) -> dict[str, Any]:
        """The reply to the compilation; starts the process if there is none."""
        with self._locked():
            return self._compile()

    def render(self, variables: dict[str, Any], now: str) -> dict[str, Any]:
        """The reply to a rendering. A process that dies is replaced at the next call."""
        request = frame({"variables": variables, "now": now}, "messages", self._limits.input_bytes)
        with self._locked():
            if self._child is None and "text" not in (reply := self._compile()):
                return reply
            return self._ask(request)

    def _compile(self) -> dict[str, Any]:
        return self._start(frame({"source": self._source}, "messages", 8 * self._limits.source_bytes))
