"""What the demo prints."""

from __future__ import annotations

import time

import click


class Console:
    """Headings with the time since the start, and facts below them."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def stage(self, title: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        click.echo("\n" + click.style(f"[{minutes}:{seconds:02d}] {title}", bold=True))

    def fact(self, name: str, value: object) -> None:
        click.echo(f"  {name:24s} {value}")

    def text(self, text: str) -> None:
        for line in text.splitlines():
            click.echo(f"  {line}")

    def stream(self, piece: str) -> None:
        click.echo(piece, nl=False)
