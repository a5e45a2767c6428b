"""Options of several commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

SRC_HELP = (
    "Source: a Hugging Face folder, any hub id, or phi-1, phi-1_5, phi-2 (microsoft's models). A local folder of that "
    "name takes precedence."
)
DST_CONFIG_HELP = (
    "Destination configuration: a JSON file, a folder, or a shipped one: phi-1-small.json, phi-1.json, phi-1_5.json, "
    "phi2.json."
)

Src = Annotated[str, typer.Option(help=SRC_HELP)]
DstConfig = Annotated[str, typer.Option(help=DST_CONFIG_HELP)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the source on the hub.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens of context.  \\[default: max_position_embeddings]", min=1)]

Method = Annotated[
    str | None,
    typer.Option(
        help="Check first that this method file, which ends in .py, made the plan. The file runs. Without the option, "
        "the plan itself is used, and no file runs."
    ),
]

WIDEST_METAVAR = 26
"""Characters. A wider metavar would leave no room for the help in 80 columns."""


def refuse_others(context: typer.Context, option: str, *beside: str) -> None:
    """Refuse flags that have no effect together with an option."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in (option, *beside) and source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(
                f"it has no effect together with --{option}: remove one of them", param_hint=parameter.opts[-1]
            )


def choice(names: Iterable[str]) -> dict[str, Any]:
    """Return the settings of a flag that takes one of several names. A long list of names is left to its help."""
    known = list(names)

    def parsed(value: str) -> str:
        if value not in known:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}")
        return value

    alternatives = "|".join(known)
    metavar = alternatives if len(alternatives) <= WIDEST_METAVAR else "name"
    return {"parser": parsed, "metavar": metavar, "autocompletion": completion(known)}


def completion(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Return the function that completes one of these names in a shell."""
    known = list(names)
    return lambda incomplete: [name for name in known if name.startswith(incomplete)]
