"""`pyengine doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from typing import Any

import click

# extra -> a module that shows whether it is installed
EXTRAS = {"train": "torch", "structured": "llguidance"}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="The same as one JSON object.")
def command(as_json: bool) -> None:
    """What this machine offers, what pyengine chose, and why."""
    from pyengine import _C

    info: dict[str, Any] = dict(_C.build_info())
    info["extras"] = {name: _version(module) for name, module in EXTRAS.items()}
    info["packages"] = {name: _version(name) for name in ("numpy", "tokenizers", "minijinja", "safetensors")}
    if as_json:
        click.echo(json.dumps(info, indent=2))
        return
    click.echo(f"pyengine      {info['version']}, built by {info['compiler']}")
    click.echo(f"cpu           {info['cpu'] or 'unknown'}")
    click.echo(f"isa           {info['isa']} (this machine has {', '.join(info['available_isas'])})")
    if info["isa_limit_reason"]:
        click.echo(f"              {info['isa_limit_reason']}")
    if info["isa_emulation"]:
        click.echo(f"              {info['isa_emulation']}")
    click.echo(f"threads       {info['num_threads']} (CPUs granted: {_C.available_cpus()})")
    for name, version in info["packages"].items():
        click.echo(f"{name:13s} {version or 'missing'}")
    for name, version in info["extras"].items():
        hint = version or f"not installed: pip install 'pyengine[{name}]'"
        click.echo(f"[{name}]".ljust(14) + hint)


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    return importlib.metadata.version(module)
