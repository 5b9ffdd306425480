"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def engine_options(function: F) -> F:
    """--weights, --mode, --threads, --max-context: how `LLM` runs the model."""
    for option in reversed(
        [
            click.option(
                "--weights",
                default="auto",
                show_default=True,
                type=click.Choice(["auto", "float32", "bfloat16", "q8_0", "q4_1", "q4_0"]),
                help="Format of the weights in memory; auto keeps the file's.",
            ),
            click.option(
                "--mode",
                default="auto",
                show_default=True,
                type=click.Choice(["auto", "exact", "bf16", "fast"]),
                help="exact: float activations. bf16, fast: block formats take activations in bfloat16, in int8.",
            ),
            click.option("--threads", type=int, default=None, help="Threads of the native pool; default: all CPUs."),
            click.option("--max-context", type=int, default=None, help="Most tokens of one conversation."),
        ]
    ):
        function = option(function)
    return function


def sampling_options(function: F) -> F:
    """The fields of SamplingParams."""
    for option in reversed(
        [
            click.option("--max-tokens", type=int, default=256, show_default=True, help="Stop after this many tokens."),
            click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest."),
            click.option("--top-k", type=int, default=0, show_default=True, help="Keep the k likeliest; 0 keeps all."),
            click.option("--top-p", type=float, default=1.0, show_default=True, help="Keep this much probability."),
            click.option("--min-p", type=float, default=0.0, show_default=True, help="Drop tokens below this share."),
            click.option("--repetition-penalty", type=float, default=1.0, show_default=True),
            click.option("--frequency-penalty", type=float, default=0.0, show_default=True),
            click.option("--presence-penalty", type=float, default=0.0, show_default=True),
            click.option("--bad-word", "bad_words", multiple=True, help="Text that the answer must not hold."),
            click.option("--min-tokens", type=int, default=0, show_default=True, help="Do not end before."),
            click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same text."),
            click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times."),
        ]
    ):
        function = option(function)
    return function
