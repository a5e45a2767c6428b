"""Every command of `phigrow` with its arguments and options, from the declarations that print its help."""

from __future__ import annotations

import inspect
from typing import Any

import typer.main

from phigrow.cli import app


def page() -> str:
    """Markdown: one section for each command."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    parts = ["# Commands", "Every command prints its options with `--help`."]
    for name, command in commands.items():
        parts += [f"## phigrow {name}", _described(command.help), *_tables(command)]
    return "\n\n".join(parts) + "\n"


def _described(text: str) -> str:
    """A command's help, with each example that it gives as code."""
    paragraphs = inspect.cleandoc(text).replace("\b\n", "").split("\n\n")
    return "\n\n".join(f"```sh\n{p.strip()}\n```" if p.strip().startswith("phigrow ") else p for p in paragraphs)


def _tables(command: Any) -> list[str]:
    rows: dict[str, list[str]] = {"argument": [], "option": []}
    for parameter in command.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        kind = parameter.param_type_name
        name = ", ".join(f"`{word}`" for word in (*parameter.opts, *parameter.secondary_opts))
        if kind == "argument":
            name = f"`{parameter.metavar or parameter.name.upper()}`"
        cells = [name, _value(parameter), _default(parameter), parameter.help or ""]
        rows[kind].append("| " + " | ".join(_plain(cell) for cell in cells) + " |")
    return [
        "\n".join([f"| {kind} | value | default | meaning |", "|---|---|---|---|", *lines])
        for kind, lines in rows.items()
        if lines
    ]


def _value(parameter: Any) -> str:
    choices = getattr(parameter.type, "choices", None)
    if choices:
        return ", ".join(f"`{getattr(choice, 'value', choice)}`" for choice in choices)
    if getattr(parameter, "is_flag", False):
        return "flag"
    low, high = (getattr(parameter.type, side, None) for side in ("min", "max"))
    bounds = [f"at least {low:g}"] * (low is not None) + [f"at most {high:g}"] * (high is not None)
    kind = {"integer": "integer", "integer range": "integer", "float": "number", "float range": "number"}
    return ", ".join([kind.get(parameter.type.name, "text"), *bounds])


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    shown = parameter.show_default
    if isinstance(shown, str):
        return shown
    default = parameter.default
    if default is None or default is False or callable(default) or default == () or parameter.multiple:
        return ""
    return f"`{getattr(default, 'value', default)}`"


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
