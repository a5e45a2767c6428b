"""The `phigrow` command: parsing and printing only. One file is for growth, one for text and runs."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from phigrow.cli import commands, terminal
from phigrow.errors import GrowthError

app = typer.Typer(
    name="phigrow",
    cls=commands.Group,
    help="Grow small pretrained Phi models into larger ones, pretrain them, and measure what growth saved.",
    epilog="Start with: phigrow demo",
    context_settings=terminal.HELP_NAMES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Run the command. Bad input prints its message to stderr and exits with code 2."""
    warnings.showwarning = _print_warning  # type: ignore[assignment]
    try:
        app(prog_name="phigrow")
    except GrowthError as error:
        from rich.console import Console

        from phigrow.cli.printing import escaped

        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escaped(str(error))}")
        sys.exit(2)
    except KeyboardInterrupt:
        terminal.tell_interrupted()
        sys.exit(terminal.INTERRUPTED)
    finally:
        _flush()


def _flush() -> None:
    """Flush stdout. If its reader has gone (``phigrow plan ... | head``), drop the rest without a message."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_warning(message: Warning | str, *_: object) -> None:
    typer.echo(f"warning: {message}", err=True)  # without the line of code, which does not help a user


def _version(shown: bool) -> None:
    if shown:
        from phigrow import __version__

        typer.echo(f"phigrow {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
