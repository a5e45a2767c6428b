"""The `phigrow` command: parsing and printing only. One file is for growth, one for text and runs."""

from __future__ import annotations

import contextlib
import sys
import warnings
from typing import Annotated

import typer

from phigrow.cli import commands, terminal
from phigrow.errors import GrowthError
from phigrow.files.machine_errors import flush_stdout, machine_errors_explained

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
    """Run the command. Bad input, and what the machine refuses, print one message to stderr and exit with code 2."""
    warnings.showwarning = _WarningPrinter()  # type: ignore[assignment]
    code: str | int | None = 0
    try:
        with machine_errors_explained():
            app(prog_name="phigrow")
    except SystemExit as ended:
        code = ended.code
    except GrowthError as error:
        code = _fail(error)
    except KeyboardInterrupt:
        terminal.tell_interrupted()
        code = terminal.INTERRUPTED
    finally:
        unwritten = flush_stdout()
    if unwritten is not None and not code:
        code = _fail(unwritten)
    sys.exit(code)


def _fail(error: GrowthError) -> int:
    """Print an error, and return its exit code."""
    from rich.console import Console

    from phigrow.cli.printing import escaped

    with contextlib.suppress(OSError):  # stderr may be full, too
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escaped(str(error))}")
    return 2


class _WarningPrinter:
    """Prints every warning once, without its line of code, which does not help a user.

    Python forgets which warnings it showed whenever a library changes the filters.
    """

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def __call__(self, message: Warning | str, *_: object) -> None:
        if (text := str(message)) not in self._shown:
            self._shown.add(text)
            typer.echo(f"warning: {text}", err=True)


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
