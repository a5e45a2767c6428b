"""The commands by name. Each is built on first use, because those that grow a model import numpy and every method."""

from __future__ import annotations

import ast
from collections.abc import Iterator, MutableMapping
from importlib import import_module
from pathlib import Path
from typing import Any

import typer.main
from typer.core import TyperGroup

from phigrow.cli.terminal import KINDS, Command, FlagsWithoutType, on_terminal, paragraphs

MODULES = {
    "expand": "growth",
    "learn-growth": "learning",
    "grow-optimizer": "growth",
    "plan": "growth",
    "diff": "growth",
    "capacity": "growth",
    "inspect": "growth",
    "verify": "growth",
    "data": "runs",
    "demo": "runs",
    "pretrain": "runs",
    "compare": "runs",
    "grow-train": "runs",
    "report": "runs",
    "evaluate": "evaluation",
    "recipes": "runs",
}
"""Command -> module of its function, in the order of the help."""


class Commands(MutableMapping[str, Any]):
    """Commands by name. The first look-up of a name imports its module."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            self._built[name] = _build(name, MODULES[name])
        return self._built[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._built[name] = command

    def __delitem__(self, name: str) -> None:
        del self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(MODULES)

    def __len__(self) -> int:
        return len(MODULES)

    def __contains__(self, name: object) -> bool:
        return name in MODULES


class Group(FlagsWithoutType, TyperGroup):
    """The command `phigrow` itself."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.commands = Commands()
        self._listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(MODULES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if self._listing and cmd_name in MODULES:
            return Command(name=cmd_name, help=_summary(cmd_name))
        return self.commands.get(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False


def _build(name: str, module: str) -> Any:
    function = getattr(import_module(f"phigrow.cli.{module}"), name.replace("-", "_"))
    kind, settings = KINDS.get(name, (Command, {}))
    one = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    help_text = paragraphs(function.__doc__ or "")
    one.command(name, cls=kind, help=help_text, context_settings=settings)(on_terminal(name, function))
    return typer.main.get_command(one)


def _summary(name: str) -> str:
    """Return the first paragraph of a command's docstring, read from its source without an import."""
    source = Path(__file__).with_name(f"{MODULES[name]}.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name.replace("-", "_"):
            return paragraphs(ast.get_docstring(node) or "").split("\n\n")[0]
    raise LookupError(f"no function of command {name!r} in {MODULES[name]}.py")
