"""`pyengine chat`."""

from __future__ import annotations

import time
from typing import Any

import click

from pyengine.cli.options import (
    adapter_option,
    engine_options,
    open_llm,
    sampling_options,
    speculation,
    speculation_options,
)


@click.command("chat")
@click.argument("model", type=click.Path())
@click.option("--system", default=None, help="Instructions that stand before the conversation.")
@click.option("--message", "-m", multiple=True, help="Say this and leave; several are several turns.")
@click.option("--explain", "show_explain", is_flag=True, help="Print what was chosen, and the speed of each answer.")
@adapter_option
@engine_options
@speculation_options
@sampling_options
def command(
    model: str,
    system: str | None,
    message: tuple[str, ...],
    show_explain: bool,
    adapter: str | None,
    weights: str,
    mode: str,
    threads: int | None,
    max_context: int | None,
    method: str,
    draft_model: str | None,
    num_speculative_tokens: int | None,
    **sampling: Any,
) -> None:
    """Talk with MODEL, a .gguf file or a Hugging Face folder. An empty line or end of input leaves.

    \b
    pyengine chat model.gguf
    pyengine chat model.gguf -m "Name three prime numbers." --max-tokens 40
    pyengine chat large.gguf --draft-model small.gguf --explain
    """
    from pyengine.infer import SamplingParams

    proposals = speculation(method, draft_model, num_speculative_tokens)
    engine = {"weights": weights, "mode": mode, "threads": threads, "max_context": max_context}
    llm, name = open_llm(model, adapter, speculation=proposals, **engine)
    params = SamplingParams(**sampling)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    if show_explain:
        click.echo(str(llm.explain()) + "\n")
    turns = iter(message)
    while True:
        text = next(turns, "") if message else click.prompt("you", default="", show_default=False, prompt_suffix="> ")
        if not text:
            break
        messages.append({"role": "user", "content": text})
        start = time.perf_counter()
        answer, num_tokens = "", 0
        for piece in llm.chat(messages, params, stream=True, adapter=name):
            click.echo(piece.text, nl=False)
            answer += piece.text
            num_tokens += len(piece.token_ids)
        click.echo()
        if show_explain:
            click.echo(f"[{num_tokens} tokens, {num_tokens / (time.perf_counter() - start):.1f} tok/s with the prompt]")
        messages.append({"role": "assistant", "content": answer})
