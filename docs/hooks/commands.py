"""Every command of `phigrow` with its arguments and options, from the declarations that print its help."""

from __future__ import annotations

import enum
import inspect
import re
import typing
from typing import Any

import typer.main

from phigrow.cli import app

WORDS = {int: "integer", float: "number"}


def page() -> str:
    """Markdown: one section for each command."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    parts = [
        "# Commands",
        "Every command prints its options with `--help`. `phigrow pretrain` also takes every [setting](settings.md) of "
        "a run: `grad_clip` is `--grad-clip`.",
    ]
    for name, command in commands.items():
        if not command.hidden:
            parts += [f"## phigrow {name}", _described(command.help), *_tables(command)]
    return "\n\n".join(parts) + "\n"


def _described(text: str) -> str:
    """A command's help, with each example that it gives as code."""
    paragraphs = inspect.cleandoc(text).replace("\b\n", "").split("\n\n")
    return "\n\n".join(
        f"```sh\n{p.strip()}\n```" if p.strip().startswith("phigrow ") else _plain(p) for p in paragraphs
    )


def _tables(command: Any) -> list[str]:
    """A table of the arguments, if there are any, and one of the options."""
    tables = {kind: [f"| {kind} | value | default | meaning |", "|---|---|---|---|"] for kind in ("argument", "option")}
    for parameter in command.params:
        if parameter.hidden or "--help" in parameter.opts:
            continue
        kind = parameter.param_type_name
        names = [parameter.metavar or parameter.opts[0].upper()] if kind == "argument" else parameter.opts
        # Help escapes the bracket, so that rich prints it.
        meaning, _, stated = (parameter.help or "").replace("\\[", "[").rstrip("]").partition("[default:")
        cells = [", ".join(f"`{name}`" for name in names), _value(parameter), stated or _default(parameter), meaning]
        tables[kind].append("| " + " | ".join(_plain(cell) for cell in cells) + " |")
    return ["\n".join(lines) for lines in tables.values() if len(lines) > 2]


def _value(parameter: Any) -> str:
    """The values that a parameter takes."""
    kind = parameter.type_descriptor.annotation
    choices: tuple[Any, ...] = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        choices = tuple(member.value for member in kind)
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    if kind is bool:
        return "flag"
    if parameter.metavar and parameter.param_type_name == "option":
        return f"`{parameter.metavar}`"
    bounds = [f"at least {parameter.min:g}"] if parameter.min is not None else []
    bounds += [f"at most {parameter.max:g}"] if parameter.max is not None else []
    return ", ".join([WORDS.get(kind, "text"), *bounds])


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    shown = parameter.type_descriptor.parameter_info.show_default
    if isinstance(shown, str):
        return shown
    default = parameter.default
    if default is None or default is False or callable(default):
        return ""
    return f"`{getattr(default, 'value', default)}`"


def _plain(text: str) -> str:
    """A text in one line, as Markdown, with links to the pages that it names."""
    line = " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
    return re.sub(r"docs/(\w+\.md)", r"[docs/\1](\1)", line)
