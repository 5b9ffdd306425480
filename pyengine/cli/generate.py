"""`pyengine generate`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import IO, Any

import click

from pyengine.cli.options import (
    adapter_option,
    engine_options,
    open_llm,
    sampling_options,
    speculation,
    speculation_options,
)


@click.command("generate")
@click.argument("model", type=click.Path())
@click.argument("prompts", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per completion.")
@click.option("--logprobs", type=int, default=None, help="With --json: log-probabilities and this many alternatives.")
@click.option("-n", "--n", type=int, default=1, show_default=True, help="Completions per prompt.")
@click.option("--best-of", type=int, default=None, help="Draw this many and keep the n likeliest.")
@click.option("--json-schema", type=click.File(encoding="utf-8"), default=None, help="File: the answer satisfies it.")
@click.option("--regex", default=None, help="The answer matches it as a whole.")
@click.option("--choice", multiple=True, help="The answer is one of these; give it several times.")
@click.option("--grammar", type=click.File(encoding="utf-8"), default=None, help="File: the answer's Lark grammar.")
@adapter_option
@engine_options
@speculation_options
@sampling_options
def command(
    model: str,
    prompts: tuple[str, ...],
    as_json: bool,
    logprobs: int | None,
    n: int,
    best_of: int | None,
    json_schema: IO[str] | None,
    regex: str | None,
    choice: tuple[str, ...],
    grammar: IO[str] | None,
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
    """Complete PROMPTS with MODEL, a .gguf file or a Hugging Face folder. Without prompts, each line of standard input
    is one; they run together.

    \b
    pyengine generate model.gguf "The capital of France is" --max-tokens 8
    pyengine generate model.gguf "One prime number:" --regex "[0-9]{1,3}"
    pyengine generate model.gguf "$(cat report.txt) In short:" --speculation prompt_lookup
    pyengine generate model/ --json <prompts.txt >completions.jsonl
    """
    from pyengine.infer import SamplingParams, StructuredOutputs

    forms: dict[str, Any] = {
        "json": json_schema and json_schema.read(),
        "regex": regex,
        "choice": choice or None,
        "grammar": grammar and grammar.read(),
    }
    outputs = None if all(form is None for form in forms.values()) else StructuredOutputs(**forms)
    params = SamplingParams(logprobs=logprobs, n=n, best_of=best_of, structured_outputs=outputs, **sampling)
    texts = list(prompts) or [line.rstrip("\n") for line in sys.stdin]
    proposals = speculation(method, draft_model, num_speculative_tokens)
    engine = {"weights": weights, "mode": mode, "threads": threads, "max_context": max_context}
    llm, name = open_llm(model, adapter, speculation=proposals, **engine)
    if len(texts) == 1 and params.num_drawn == 1 and not as_json:
        for piece in llm.stream(texts[0], params, adapter=name):
            click.echo(piece.text, nl=False)
        click.echo()
        return
    each = [text for text in texts for _ in range(n)]
    for text, completion in zip(each, llm.generate(texts, params, adapter=name), strict=True):
        if as_json:
            click.echo(json.dumps({"prompt": text, **asdict(completion)}, ensure_ascii=False))
        else:
            click.echo(f"--- {text}\n{completion.text}")
