"""The `phigrow` command: parsing and printing, no logic. One file for growth, one for text and runs."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

from phigrow.cli import growth, learning, runs
from phigrow.errors import GrowthError

app = typer.Typer(
    name="phigrow",
    help="Grow small pretrained Phi models into larger ones, pretrain them, and measure what growth saved.",
    epilog="Start with: phigrow demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

for command in (
    growth.expand, learning.learn_growth, growth.grow_optimizer, growth.plan, growth.inspect, growth.verify, runs.data,
    runs.demo, runs.compare, runs.grow_train, runs.report,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Run the command; bad input ends with its message on stderr and exit code 2."""
    warnings.showwarning = _print_warning  # type: ignore[assignment]
    try:
        app()
    except GrowthError as error:
        from rich.console import Console

        from phigrow.cli.printing import escaped

        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escaped(str(error))}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _print_warning(message: Warning | str, *_: object) -> None:
    typer.echo(f"warning: {message}", err=True)  # the line of code that warns tells a user nothing


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
