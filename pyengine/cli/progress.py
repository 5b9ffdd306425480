"""How far a long command is, on standard error: a line that renews itself on a terminal, every 30 seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import click

T = TypeVar("T")

TERMINAL_SECONDS, LINE_SECONDS = 0.2, 30.0


def counted(items: Iterable[T], unit: str, *, weigh: Callable[[T], int]) -> Iterator[T]:
    """`items`, with their number and their tokens per second; `weigh`: tokens of one."""
    is_terminal = sys.stderr.isatty()
    begin = last = time.monotonic()
    count = num_tokens = 0
    shown = ""

    def show() -> None:
        nonlocal shown
        rate = num_tokens / max(time.monotonic() - begin, 1e-9)
        text = f"{count:,} {unit}, {num_tokens:,} tokens, {rate:,.0f} tokens/s"
        click.echo(f"\r{text:<{len(shown)}}" if is_terminal else text, err=True, nl=not is_terminal)
        shown = text

    try:
        for item in items:
            count += 1
            num_tokens += weigh(item)
            if time.monotonic() - last >= (TERMINAL_SECONDS if is_terminal else LINE_SECONDS):
                last = time.monotonic()
                show()
            yield item
    finally:
        if count:
            show()
            if is_terminal:
                click.echo(err=True)
