"""The `pyengine` command. Each verb is a module of this package, imported only when it is used."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

import click

from pyengine import __version__

# verb -> the line that `pyengine --help` shows; kept here so that help imports nothing else.
VERBS = {
    "demo": "The whole life of a model on this machine, with a report.",
    "chat": "Talk with a model.",
    "generate": "Complete prompts.",
    "score": "Log-probabilities of given completions.",
    "train": "Train a model: pretrain or sft.",
    "quantize": "Write a model with weights in 4 or 8 bits as a GGUF file.",
    "merge": "Fold an adapter into the weights of its model.",
    "doctor": "What this machine offers and what pyengine chose.",
}

EXIT_USAGE, EXIT_ENVIRONMENT, EXIT_BAD_FILE, EXIT_INTERRUPTED = 2, 3, 4, 130


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"pyengine.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pyengine")
def command() -> None:
    """One native engine for the whole life of a language model.

    \b
    pyengine demo                              see all of it in ten minutes
    pyengine chat model.gguf                   talk with a model
    pyengine generate model.gguf "Once upon"   complete a prompt
    pyengine VERB --help                       options and examples of a verb

    Exit codes: 0 done, 2 wrong usage, 3 something is missing on this machine, 4 bad input file, 130 interrupted.
    """


def main() -> NoReturn:
    """Run the command; turn the errors of pyengine into one line and an exit code."""
    sys.exit(_run())


def _run() -> int:
    try:
        command.main(standalone_mode=False)
    except click.exceptions.Abort:
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE
    except click.exceptions.Exit as error:
        return error.exit_code
    except Exception as error:
        from pyengine.data.errors import DataFileError
        from pyengine.errors import ArgumentError, ConfigError, ModelFileError, PyEngineError

        if not isinstance(error, PyEngineError):
            raise
        click.echo(f"pyengine: {error}", err=True)
        if isinstance(error, (ModelFileError, DataFileError)):
            return EXIT_BAD_FILE
        return EXIT_USAGE if isinstance(error, (ArgumentError, ConfigError)) else EXIT_ENVIRONMENT
    return 0
