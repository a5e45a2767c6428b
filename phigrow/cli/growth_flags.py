"""Command-line flags of a growth, generated from `GrowthSpec` and from the options of phigrow's width methods.

Options of other methods have no flags: they are spelled behind the name, as in ``my_method.py:gain=2``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from phigrow.cli.options import choice, completion
from phigrow.growth.growth_spec import GROWTH_SETTINGS, GrowthSpec
from phigrow.growth.method import Method, Option
from phigrow.growth.methods import built_in_methods
from phigrow.growth.methods.depth import DEPTHS, ROUNDINGS

METHOD_PANEL = "Width methods and their options"
"""Heading in ``--help`` of the flags that are generated from the registry of methods."""


def learning_methods() -> dict[str, Method]:
    """Return the width methods with maps that phigrow learn-growth learns."""
    return {name: method for name, method in built_in_methods().items() if method.learns}


def growth_flags(
    *, only: tuple[str, ...] | None = None, methods: Mapping[str, Method] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's parameter ``growth`` by one flag for each choice in a `GrowthSpec`.

    Args:
        only: fields of the spec that get a flag, by default all.
        methods: methods with options that get a flag, by default all of phigrow's.

    Returns:
        A decorator for a function with a parameter ``growth``, which gets the spec.

    Raises:
        ValueError: an option of a method has the name of another flag of the command.
    """
    flags = [flag for flag in _spec_flags() if only is None or flag.name in only]
    options = _option_flags(built_in_methods() if methods is None else methods)
    return lambda command: _with_flags(command, flags, options)


def _with_flags(
    command: Callable[..., None], flags: list[inspect.Parameter], options: list[inspect.Parameter]
) -> Callable[..., None]:
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "growth"]
    taken = {parameter.name for parameter in (*own, *flags)} | set(GROWTH_SETTINGS)
    if clash := [option.name for option in options if option.name in taken]:
        raise ValueError(f"--{clash[0]} is a flag of {command.__name__}: give the method's option another name")

    @functools.wraps(command)
    def with_spec(**given: Any) -> None:
        chosen = {flag.name: given.pop(flag.name) for flag in flags}
        of_method = {option.name: given.pop(option.name) for option in options}
        options_given = {name: value for name, value in of_method.items() if value is not None}
        command(growth=GrowthSpec(options=options_given, **chosen), **given)

    place = list(signature.parameters).index("growth")
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own[:place], *flags, *options, *own[place:])]
    with_spec.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_spec.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_spec


def _spec_flags() -> list[inspect.Parameter]:
    annotations = {
        "method": Annotated[
            str,
            typer.Option(
                help=_method_help(), rich_help_panel=METHOD_PANEL, autocompletion=completion(built_in_methods())
            ),
        ],
        "depth": Annotated[
            str | None,
            typer.Option(
                help=f"Depth method: {', '.join(DEPTHS)}.  \\[default: the width method's own]", **choice(DEPTHS)
            ),
        ],
        "rounding": Annotated[str, typer.Option(help="Rounding of the depth method interpose.", **choice(ROUNDINGS))],
        "seed": Annotated[int, typer.Option(help="Seed of all new random values.", min=0)],
        "noise": Annotated[
            float,
            typer.Option(
                help="For tile: noise that breaks the symmetry of copies, as a fraction of each tensor's root mean "
                "square. It cancels between the copies.",
                min=0.0,
            ),
        ],
        "maps": Annotated[Path | None, typer.Option(help="For ligo: folder written by phigrow learn-growth.")],
    }
    defaults = GrowthSpec()
    return [_parameter(name, annotation, getattr(defaults, name)) for name, annotation in annotations.items()]


def _method_help() -> str:
    return (
        f"One of {', '.join(built_in_methods())}. tile:scale=preserve gives an option; hidden=lossless,mlp=tile gives "
        "each group of axes (hidden, head, heads, mlp, vocab) its own method, and the first method to groups not "
        "named. A path that ends in .py runs your own method file."
    )


def _option_flags(methods: Mapping[str, Method]) -> list[inspect.Parameter]:
    """Return one flag for each name of an option. Methods that share an option share its flag."""
    shared: dict[str, dict[str, Option]] = {}
    for method in methods.values():
        for name, option in method.options.items():
            shared.setdefault(name, {})[method.name] = option
    return [_parameter(name, _option_annotation(name, takers), None) for name, takers in shared.items()]


def _option_annotation(name: str, methods: dict[str, Option]) -> Any:
    """Return help and type of one flag. The chosen method checks its values."""
    by_option: dict[Option, list[str]] = {}
    for method, option in methods.items():
        by_option.setdefault(option, []).append(method)
    help_text = " ".join(
        f"{', '.join(names)}: {option.help}{_range(option)}.  \\[default: {option.spell(option.default)}]"
        for option, names in by_option.items()
    )
    words = list(dict.fromkeys(word for option in by_option for word in option.choices))
    numbers = ["number"] if any(option.type is not str for option in by_option) else []
    metavar = "|".join([*numbers, *words])
    flag = f"--{name.replace('_', '-')}"
    return Annotated[str | None, typer.Option(flag, help=help_text, metavar=metavar, rich_help_panel=METHOD_PANEL)]


def _range(option: Option) -> str:
    return "" if option.type is str else f" ({option.allowed})"


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
