"""How far a run is: a bar on a terminal, a line of the log every 30 seconds elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 30.0

logger = logging.getLogger("pyengine")


class ProgressReport:
    """Use as a context; `update` after every step.

    Args:
        num_steps: of the whole run.
        first_step: steps done before it starts.
        stream: where a bar would go; a bar is drawn only if it is a terminal.
    """

    def __init__(self, num_steps: int, *, first_step: int = 0, stream: TextIO | None = None) -> None:
        stream = sys.stderr if stream is None else stream
        self.num_steps = num_steps
        self._first_step = first_step
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if stream.isatty():
            columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=Console(file=stream))

    def __enter__(self) -> ProgressReport:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("step", total=self.num_steps, completed=self._first_step, text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` steps are done."""
        text = f"loss {metrics['train/loss']:.4f}  {metrics['train/tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_SECONDS or step == self.num_steps:
            self._last_line = now
            logger.info("step %d of %d  %s", step, self.num_steps, text)
