"""Terminal behaviour of all commands: -h, --quiet, progress, and one sentence at Ctrl-C."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from phigrow.files.machine_errors import machine_errors_explained, replace_odd_characters
from phigrow.files.paths import user_path

HELP_NAMES = {"help_option_names": ["-h", "--help"]}

RESUMES = frozenset({"expand", "grow-optimizer", "pretrain", "demo", "compare", "grow-train", "evaluate"})
"""Commands that continue after an interruption if the same command is run again."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells define it: 128 + SIGINT."""

_quiet = False

Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print results, warnings and errors only.")]


class FlagsWithoutType:
    """Mixin that shows flags without a type in the help: ``--json``, not ``--json <bool>``."""

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""
        return params


class Command(FlagsWithoutType, TyperCommand):
    """One command of phigrow."""


class PretrainCommand(Command):
    """The command `pretrain`. Its help ends with all keys of a run."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[RECIPE]", "[--KEY VALUE]...", "[OPTIONS]"]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from phigrow.training.options import settings_help

        super().format_help(ctx, formatter)
        typer.echo(settings_help())


KINDS: dict[str, tuple[type[Command], dict[str, Any]]] = {
    "pretrain": (PretrainCommand, {"allow_extra_args": True, "ignore_unknown_options": True}),
}
"""Class and click's settings of the commands that `Command` does not parse."""


def on_terminal(name: str, function: Callable[..., None]) -> Callable[..., None]:
    """Add ``--quiet`` to the parameters of a command, and end it with one sentence at Ctrl-C."""

    @functools.wraps(function)
    def command(*args: Any, quiet: bool = False, **keywords: Any) -> None:
        begin(quiet)
        resumes = "Then run the same command again: it continues where it stopped." if name in RESUMES else ""
        try:
            with machine_errors_explained(resumes):
                function(*args, **{name: _at_home(value) for name, value in keywords.items()})
        except KeyboardInterrupt:
            tell_interrupted(name)
            raise typer.Exit(INTERRUPTED) from None

    signature = inspect.signature(function, eval_str=True)
    quiet = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet)
    command.__signature__ = signature.replace(parameters=[*signature.parameters.values(), quiet])  # type: ignore[attr-defined]
    return command


def _at_home(value: Any) -> Any:
    """Replace ``~`` in an option that is a path, or a list of paths."""
    if isinstance(value, list | tuple):
        return [_at_home(item) for item in value]
    return user_path(value) if isinstance(value, Path) else value


def paragraphs(docstring: str) -> str:
    """Join the lines of each paragraph, so that the terminal wraps them at its own width."""
    return "\n\n".join(" ".join(part.split()) for part in docstring.split("\n\n"))


def tell_interrupted(name: str = "") -> None:
    """Print that a command was interrupted, and the way to continue."""
    if os.environ.get("RANK", "0") != "0":
        return  # rank 0 prints for all ranks
    after = "Run the same command again to continue." if name in RESUMES else "Its output was not completed."
    typer.echo(f"\nstopped: phigrow {name} was interrupted. {after}" if name else "\nstopped", err=True)


def begin(quiet: bool) -> None:
    """Set the output of a command, before it loads a library with progress bars of its own."""
    global _quiet
    _quiet = quiet
    replace_odd_characters()
    if not shows_progress():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def shows_progress() -> bool:
    """Return True if stderr is a terminal and --quiet was not given."""
    return not _quiet and sys.stderr.isatty()


def is_quiet() -> bool:
    """Return True after --quiet."""
    return _quiet


def say(text: object = "") -> None:
    """Print a line about progress, or a hint; with --quiet, print nothing."""
    if not _quiet:
        typer.echo(text)


def complete_shipped(kind: str) -> Callable[[str], list[str]]:
    """Return the function that completes the name of a shipped file of a kind."""

    def complete(incomplete: str) -> list[str]:
        from phigrow.files.shipped import shipped_files

        return [file.name for file in shipped_files(kind) if file.name.startswith(incomplete)]

    return complete
