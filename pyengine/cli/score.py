"""`pyengine score`."""

from __future__ import annotations

import json

import click

from pyengine.cli.options import adapter_option, engine_options, load_adapter


@click.command("score")
@click.argument("model", type=click.Path())
@click.argument("prompt")
@click.argument("completions", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per completion, with every token.")
@adapter_option
@engine_options
def command(
    model: str,
    prompt: str,
    completions: tuple[str, ...],
    as_json: bool,
    adapter: str | None,
    weights: str,
    mode: str,
    threads: int | None,
    max_context: int | None,
) -> None:
    """Log-probability of each of COMPLETIONS after PROMPT: the same bits as generation computes.

    \b
    pyengine score model.gguf "The sky is" " blue" " green"
    """
    from pyengine.infer import LLM

    llm = LLM(model, weights=weights, mode=mode, threads=threads, max_context=max_context)
    name = load_adapter(llm, adapter)
    scores = llm.score([prompt] * len(completions), completions, adapter=name)
    for text, score in zip(completions, scores, strict=True):
        if as_json:
            row = {"completion": text, "logprob": score.total, "token_ids": score.token_ids, "logprobs": score.logprobs}
            click.echo(json.dumps(row, ensure_ascii=False))
        else:
            click.echo(f"{score.total:10.4f}  {len(score.token_ids)} tokens  {text!r}")
