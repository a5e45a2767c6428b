"""Every setting of a training run, from its declaration."""

from __future__ import annotations

import dataclasses

from phigrow.training.configuration import RunConfig

KINDS = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "dict": "mapping"}


def page() -> str:
    """Markdown: one table row for each setting."""
    lines = [
        "# Settings of a run",
        "",
        "Write a setting as `key: value` in a recipe, or as `--key value` on the command line, which comes first. "
        "Dashes and underscores are the same. A setting marked *fixed* must keep its value when a run is resumed.",
        "",
        "| setting | value | default | meaning | fixed |",
        "|---|---|---|---|---|",
    ]
    for field in dataclasses.fields(RunConfig):
        choices = field.metadata["choices"]
        value = ", ".join(f"`{choice}`" for choice in choices) if choices else _kind(str(field.type))
        default = "" if field.default is None else f"`{field.default}`"
        fixed = "yes" if field.metadata["curve"] else ""
        cells = [f"`{field.name}`", value, default, field.metadata["help"], fixed]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _kind(annotation: str) -> str:
    """A type in words: ``str | dict[str, Any] | None`` is text or mapping."""
    if annotation.startswith("list"):
        return "list of integers"
    return " or ".join(KINDS[part.split("[")[0]] for part in annotation.split(" | ") if part != "None")
