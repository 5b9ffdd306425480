"""`pyengine quantize`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from pyengine.cli.options import WEIGHT_FORMATS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Progress = Callable[[str, int, int], None]


@click.command("quantize")
@click.argument("model", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--weights", default="q4_1", show_default=True, type=click.Choice(WEIGHT_FORMATS), help="Format of matrices."
)
@click.option(
    "--embedding",
    default="q8_0",
    show_default=True,
    type=click.Choice(WEIGHT_FORMATS),
    help="Format of the embedding and the head.",
)
@click.option("--search", is_flag=True, help="Fit the scales of each block to its weights; about 80 times the work.")
@click.option(
    "--calibration",
    type=click.Path(dir_okay=False),
    help="Text to keep the outputs of the layers on: .txt, or .jsonl with documents or conversations. Needs [train].",
)
@click.option("--calibration-tokens", default=4096, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object.")
def command(
    model: str,
    out: str,
    weights: str,
    embedding: str,
    search: bool,
    calibration: str | None,
    calibration_tokens: int,
    as_json: bool,
) -> None:
    """Write MODEL, a Hugging Face folder or a .gguf file, as the GGUF file OUT.

    \b
    pyengine quantize model/ model.gguf                        4 bits and a minimum per 32 weights
    pyengine quantize model/ model.gguf --weights q8_0         nearly without loss
    pyengine quantize model/ model.gguf --search               slower to make, closer to the original
    pyengine quantize model/ model.gguf --calibration texts.jsonl   closer still in what it computes
    """
    from pyengine.quant import quantize_to_gguf

    with _progress() as progress:
        rounded = None
        if calibration is not None:
            rounded = _calibrate(model, weights, calibration, calibration_tokens, progress)
        result = quantize_to_gguf(
            model, out, weights=weights, embedding=embedding, search=search, rounded=rounded, progress=progress
        )
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        click.echo(
            f"{result.path}: {result.num_bytes / 1e6:.1f} MB, {result.bits_per_weight:.2f} bits per weight, "
            f"{result.num_parameters / 1e6:.1f} M parameters"
        )


def _calibrate(
    model: str, weights: str, path: str, max_tokens: int, progress: Progress
) -> dict[str, npt.NDArray[np.uint8]]:
    from pyengine.errors import ArgumentError, BackendUnavailable
    from pyengine.infer.source import open_source

    if weights not in ("q4_1", "q4_0", "q8_0"):
        raise ArgumentError(f"--calibration: expected --weights q4_1, q4_0 or q8_0, got {weights}")
    try:
        from pyengine.calibrate import read_sequences, round_to_calibration
        from pyengine.models import CausalLM
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"--calibration needs torch: pip install 'pyengine[train]' ({error})") from error
    source = open_source(model)
    seq_len = min(512, source.spec.max_position_embeddings)
    sequences = read_sequences(path, source.tokenizer(), source.chat_template(), max_tokens, seq_len=seq_len)
    return round_to_calibration(CausalLM.from_pretrained(model), sequences, weights, progress=progress)


@contextmanager
def _progress() -> Iterator[Progress]:
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
