"""`pyengine train`."""

from __future__ import annotations

from pathlib import Path

import click

STAGES = ("pretrain", "sft")


@click.command("train")
@click.argument("stage", type=click.Choice(STAGES))
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--print-config", is_flag=True, help="Print the resolved configuration and leave.")
def command(stage: str, config: Path, overrides: tuple[str, ...], print_config: bool) -> None:
    """Train by a YAML file; OVERRIDES are dotted, such as optim.learning_rate=3e-4. Needs the extra [train].

    A run that was interrupted goes on from its last checkpoint when it is started again.

    \b
    pyengine train pretrain examples/pretrain.yaml
    pyengine train sft examples/sft.yaml loop.num_steps=200 --print-config
    """
    import importlib
    import importlib.util
    import logging

    if importlib.util.find_spec("torch") is None:
        from pyengine.errors import BackendUnavailable

        raise BackendUnavailable("training needs torch: pip install 'pyengine[train]'")
    from pyengine.train.config import load_config, to_yaml

    recipe = importlib.import_module(f"pyengine.recipes.{stage}")
    resolved = load_config(getattr(recipe, f"{stage.capitalize()}Config"), config, list(overrides))
    if print_config:
        click.echo(to_yaml(resolved), nl=False)
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = recipe.run(resolved)
    click.echo(f"model {result.model_folder}, {result.num_steps} steps, {result.num_tokens:,} tokens")
