"""`pyengine demo`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("demo")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@click.option("--model", type=click.Path(path_type=Path), default=None, help="Start from this instead of SmolLM2.")
@click.option("--pretrain-seconds", type=float, default=120.0, show_default=True, help="About how long to pretrain.")
@click.option("--sft-seconds", type=float, default=75.0, show_default=True, help="About how long to fine-tune.")
@click.option("--seed", type=int, default=0, show_default=True)
def command(out: Path, model: Path | None, pretrain_seconds: float, sft_seconds: float, seed: int) -> None:
    """The whole life of a language model on this machine, in about seven minutes on two cores.

    Chats with a pretrained model; builds a corpus and a tokenizer from the Python standard library; pretrains a small
    decoder; fine-tunes the pretrained model; quantises both to int4; writes OUT/report.html. Needs the extra [train].

    \b
    pyengine demo
    pyengine demo --out runs/quick --pretrain-seconds 20 --sft-seconds 10
    """
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        from pyengine.errors import BackendUnavailable

        raise BackendUnavailable("the demo trains, which needs torch: pip install 'pyengine[train]'")
    from pyengine.demo import DemoOptions, run_demo

    run_demo(DemoOptions(out=out, model=model, pretrain_seconds=pretrain_seconds, sft_seconds=sft_seconds, seed=seed))
