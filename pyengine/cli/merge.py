"""`pyengine merge`."""

from __future__ import annotations

import click


@click.command("merge")
@click.argument("model", type=click.Path())
@click.argument("adapter", type=click.Path())
@click.argument("out", type=click.Path())
def command(model: str, adapter: str, out: str) -> None:
    """Write MODEL, a Hugging Face folder, with ADAPTER, a folder in the format of PEFT, folded in, as the folder OUT.

    \b
    pyengine merge model/ adapter/ merged/
    pyengine quantize merged/ merged.gguf
    """
    from pyengine.quant import merge_adapter

    merge_adapter(model, adapter, out)
