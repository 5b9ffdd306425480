"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pyengine.infer import LLM
    from pyengine.infer.speculation import Speculation

F = TypeVar("F", bound=Callable[..., Any])

# Formats that weights can be converted to; read before anything native is imported.
WEIGHT_FORMATS = [
    "float32", "bfloat16", "q8_0", "q6_k", "q5_1", "q5_k", "q5_0", "q4_1", "q4_k", "q4_0", "iq4_nl",
]  # fmt: skip


def engine_options(function: F) -> F:
    """--weights, --mode, --threads, --max-context: how `LLM` runs the model."""
    for option in reversed(
        [
            click.option(
                "--weights",
                default="auto",
                show_default=True,
                type=click.Choice(["auto", *WEIGHT_FORMATS]),
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


def speculation_options(function: F) -> F:
    """--speculation, --draft-model, --num-speculative-tokens: see `speculation`."""
    for option in reversed(
        [
            click.option(
                "--speculation",
                "method",
                default="none",
                show_default=True,
                type=click.Choice(["none", "prompt_lookup"]),
                help="prompt_lookup: guess tokens from prompt and answer, several per step; the answer stays the same.",
            ),
            click.option(
                "--draft-model",
                type=click.Path(),
                default=None,
                help="Let this smaller model of the same vocabulary guess; the answer stays the same.",
            ),
            click.option(
                "--num-speculative-tokens",
                type=int,
                default=None,
                help="Most tokens to guess per step; default: 8 with prompt_lookup, 4 with a draft model.",
            ),
        ]
    ):
        function = option(function)
    return function


def speculation(method: str, draft_model: str | None, num_speculative_tokens: int | None) -> Speculation | None:
    """What LLM takes, from the values of the options above."""
    from pyengine.infer import DraftModel, PromptLookup

    chosen: Speculation | None = PromptLookup() if method == "prompt_lookup" else None
    if draft_model is not None:
        if chosen is not None:
            raise click.UsageError("--draft-model: expected no --speculation beside it")
        chosen = DraftModel(model=draft_model)
    if num_speculative_tokens is None:
        return chosen
    if chosen is None:
        raise click.UsageError("--num-speculative-tokens: expected --speculation or --draft-model beside it")
    return replace(chosen, num_speculative_tokens=num_speculative_tokens)


def adapter_option(function: F) -> F:
    """--adapter."""
    return click.option(
        "--adapter", type=click.Path(), default=None, help="Folder of a low-rank adapter in the format of PEFT."
    )(function)


def open_llm(
    model: str, adapter: str | None, *, speculation: Speculation | None = None, **engine: Any
) -> tuple[LLM, str | None]:
    """The model, and the name that the adapter of --adapter is served by; `engine`: see engine_options."""
    from pyengine.infer import LLM

    llm = LLM(model, speculation=speculation, **engine)
    return llm, None if adapter is None else llm.load_adapter("adapter", adapter).name


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
