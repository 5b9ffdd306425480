"""`pyengine quantize`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click

FORMATS = ["q4_1", "q4_0", "q8_0", "bfloat16", "float32"]


@click.command("quantize")
@click.argument("model", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--weights", default="q4_1", show_default=True, type=click.Choice(FORMATS), help="Format of matrices.")
@click.option(
    "--embedding",
    default="q8_0",
    show_default=True,
    type=click.Choice(FORMATS),
    help="Format of the embedding and the head.",
)
@click.option("--search", is_flag=True, help="Fit the scales of each block to its weights; about 80 times the work.")
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object.")
def command(model: str, out: str, weights: str, embedding: str, search: bool, as_json: bool) -> None:
    """Write MODEL, a Hugging Face folder or a .gguf file, as the GGUF file OUT.

    \b
    pyengine quantize model/ model.gguf                        4 bits and a minimum per 32 weights
    pyengine quantize model/ model.gguf --weights q8_0         nearly without loss
    pyengine quantize model/ model.gguf --search               slower to make, closer to the original
    """
    from pyengine.quant import quantize_to_gguf

    with _progress() as progress:
        result = quantize_to_gguf(model, out, weights=weights, embedding=embedding, search=search, progress=progress)
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        click.echo(
            f"{result.path}: {result.num_bytes / 1e6:.1f} MB, {result.bits_per_weight:.2f} bits per weight, "
            f"{result.num_parameters / 1e6:.1f} M parameters"
        )


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error where that is a terminal, else nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("quantize", total=None)

        def update(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)

        yield update
