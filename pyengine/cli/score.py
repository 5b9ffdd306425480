"""`pyengine score`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
import msgspec

from pyengine.cli.options import adapter_option, engine_options, open_llm

if TYPE_CHECKING:
    from pyengine.infer import Score


class Pair(msgspec.Struct):
    """A line of --input: texts or lists of token ids; other keys are left alone."""

    prompt: str | list[int]
    completion: str | list[int]


@click.command("score")
@click.argument("model", type=click.Path())
@click.argument("prompt", required=False)
@click.argument("completions", nargs=-1)
@click.option(
    "--input",
    "pairs_file",
    type=click.Path(dir_okay=False),
    help='A .jsonl file of {"prompt": ..., "completion": ...}, texts or token ids, in the place of arguments.',
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per completion, with every token.")
@adapter_option
@engine_options
def command(
    model: str,
    prompt: str | None,
    completions: tuple[str, ...],
    pairs_file: str | None,
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
    pyengine score model.gguf --input pairs.jsonl --json >scores.jsonl
    """
    if (pairs_file is None) == (prompt is None) or (prompt is not None and not completions):
        raise click.UsageError("expected PROMPT and COMPLETIONS, or --input")
    from pyengine.cli.progress import counted
    from pyengine.data.jsonl import read_jsonl

    llm, name = open_llm(model, adapter, weights=weights, mode=mode, threads=threads, max_context=max_context)
    if pairs_file is None:
        assert prompt is not None
        for text, score in zip(
            completions, llm.score([prompt] * len(completions), completions, adapter=name), strict=True
        ):
            _show(text, score, as_json)
        return
    waiting: list[str | list[int]] = []

    def pairs() -> Iterator[tuple[str | list[int], str | list[int]]]:
        for pair in read_jsonl(pairs_file, Pair):
            waiting.append(pair.completion)
            yield pair.prompt, pair.completion

    for score in counted(llm.score_stream(pairs(), adapter=name), "pairs", weigh=lambda score: len(score.token_ids)):
        _show(waiting.pop(0), score, as_json)


def _show(completion: str | list[int], score: Score, as_json: bool) -> None:
    if as_json:
        row = {"completion": completion, "logprob": score.total, "token_ids": score.token_ids}
        click.echo(json.dumps(row | {"logprobs": score.logprobs}, ensure_ascii=False))
    else:
        click.echo(f"{score.total:10.4f}  {len(score.token_ids)} tokens  {completion!r}")
