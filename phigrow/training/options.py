"""Read a `RunConfig` from a YAML file and ``--key value`` options, with errors that name key, file and type."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import textwrap
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.paths import user_path
from phigrow.files.shipped import find_shipped, shipped_names
from phigrow.files.strict_yaml import parse_yaml, read_yaml
from phigrow.training.configuration import RunConfig
from phigrow.training.declaration import Role, allowed, words
from phigrow.training.settings import SECTIONS

USAGE = """usage: phigrow pretrain [RECIPE] [--key value ...]
       deepspeed --module phigrow.training [RECIPE] [--key value ...]
       deepspeed recipes/pretrain.py [RECIPE] [--key value ...]   (in a checkout)

Pretrain a causal language model on packed blocks, from scratch or from a
checkpoint. Without arguments it trains the demo model on the embedded corpus
for some minutes. RECIPE is a YAML file, or a name that 'phigrow recipes' lists.
Options override it. Dashes and underscores are the same. An option that is true
or false needs no value: --compile is --compile true.
"""

PAGE = """# Settings of a training run

Each of these is a key of a recipe (YAML) and an option on the command line: `grad_clip: 0.5` is `--grad-clip 0.5`.
[Training](training.md) explains how to use them. This page is generated from `phigrow/training/settings.py`.

Marks after a meaning:

- **R**: the loss curve depends on it. A run that is resumed must have the same value.
- **H**: it chooses the held-out text. A run that is resumed must have the same value.
- **I**: it names an input. A run that is resumed must have the same content; the path may differ.
- **A**: all arms of a comparison must have the same value.
- **O**: it changes nothing in the records except seconds. A study keeps its finished runs when it changes.
- **S**: a study decides it, so the study's file cannot set it.
- **G**: a recipe of stages decides it, so that recipe cannot set it.
"""

ROLE_NOTES = {
    Role.RESUME: "**R**",
    Role.HELDOUT: "**H**",
    Role.INPUT: "**I**",
    Role.ARMS: "**A**",
    Role.OPERATIONAL: "**O**",
    Role.STUDY: "**S**",
    Role.STAGES: "**G**",
}
"""Marks of roles on the page of settings."""

_TYPES = typing.get_type_hints(RunConfig)
_FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "whole numbers",
}
_SHORT = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    dict: "mapping",
    list: "integers",
}
_TRUE, _FALSE, _NONE = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("none", "null", "")


def load_run_config(recipe: str | Path | None = None, options: Sequence[str] = (), **overrides: Any) -> RunConfig:
    """Read a recipe; options replace its values.

    Args:
        recipe: a YAML file of keys of `RunConfig`, the name of a shipped recipe, or None for the defaults.
        options: command-line words, ``--key value``, ``--key=value`` or, for true/false keys, ``--key`` alone.
        overrides: keys and values that replace those of both.

    Raises:
        GrowthError: there is no such file, a key is unknown (with the nearest ones), or a value has the wrong type.

    >>> load_run_config(options=["--steps", "40", "--grad-clip=0.5"]).grad_clip
    0.5
    """
    values: dict[str, Any] = {}
    if recipe is not None:
        path = find_shipped(recipe, "recipe")
        values |= checked(_read(path), str(path))
        values |= _beside(path, values)
    values |= {key: _coerced(key, value, "the command line") for key, value in _words(options).items()}
    values |= {_known(key, "overrides"): value for key, value in overrides.items()}
    return RunConfig(**values)


def checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return keys of `RunConfig` with values of their types; texts of the command line become numbers.

    Raises:
        GrowthError: as `load_run_config`; the error names ``where``.
    """
    known: dict[str, Any] = {}
    for key, value in values.items():
        if (name := _known(str(key), where)) in known:
            raise GrowthError(
                f"{name} stands twice, as {name} and as {name.replace('_', '-')}", where=where, fix="remove one of them"
            )
        known[name] = value
    return {key: _coerced(key, value, where) for key, value in known.items()}


def parse(words: Sequence[str]) -> RunConfig | None:
    """Turn a command line into a configuration; None if it asks for help.

    Raises:
        GrowthError: as `load_run_config`.
    """
    words = list(words)
    if "--help" in words or "-h" in words:
        return None
    # DeepSpeed's launcher adds --local_rank=N before the words of the user.
    words = [word for word in words if not word.replace("-", "_").startswith("__local_rank=")]
    recipe = words.pop(0) if words and not words[0].startswith("-") else None
    return load_run_config(recipe, words)


def usage() -> str:
    """Return the text of ``--help``: every key by section, with its type, default and meaning."""
    return f"{USAGE.rstrip()}\n\n{settings_help()}"


def settings_help() -> str:
    """Return every key of a run by section, with its type, default and meaning, in 80 columns."""
    lines: list[str] = []
    for section in SECTIONS:
        lines += ["", f"{section.__doc__}:"]
        for name in section.__annotations__:
            field = _FIELDS[name]
            kind = "" if _TYPES[name] is bool else f" <{_kind_words(field)}>"
            lines.append(f"  --{name.replace('_', '-')}{kind}{_default_words(field)}")
            text = textwrap.fill(field.metadata["help"], 72, break_on_hyphens=False)
            lines.append(textwrap.indent(text, " " * 8))
    return "\n".join(lines).strip()


def settings_page() -> str:
    """Return docs/settings.md: every key by section, with its type, default, range, meaning and roles."""
    lines = [PAGE.strip()]
    for section in SECTIONS:
        lines += ["", f"## {section.__doc__}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for name in section.__annotations__:
            field = _FIELDS[name]
            kind = _kind_words(field).replace("|", " or ")
            kind += f", {text}" if (text := allowed(field).removeprefix("a value ")) else ""
            roles = field.metadata["role"]
            if Role.INPUT in roles:
                roles &= ~Role.RESUME  # its content counts, and not its value
            notes = [text for role, text in ROLE_NOTES.items() if role in roles]
            meaning = " ".join([field.metadata["help"].replace("<", "&lt;"), *notes])
            lines.append(f"| `{name}` | {kind} | {_default_words(field).strip(' []')} | {meaning} |")
    return "\n".join(lines) + "\n"


def _kind_words(field: dataclasses.Field[Any]) -> str:
    if field.metadata["choices"]:
        return "|".join(words(field.metadata["choices"]))
    return " or ".join(_SHORT[kind] for kind in _kinds(field.name) if kind is not type(None))


def _default_words(field: dataclasses.Field[Any]) -> str:
    if field.default is None:
        return ""
    return f" [{str(field.default).lower() if isinstance(field.default, bool) else field.default}]"


def _read(path: Path) -> dict[str, Any]:
    shipped = shipped_names("recipe")
    content = read_yaml(path, "recipe", f"give a YAML file, the name of a shipped recipe ({shipped}), or --key value")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise GrowthError("the recipe is not a mapping", where=str(path), fix="write 'key: value' lines")
    return content


def _beside(recipe: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Return paths of files beside the recipe that it names, so that a recipe works from any folder."""
    out = {}
    for key in ("deepspeed", "model"):
        value = values.get(key)
        if isinstance(value, str) and (recipe.parent / user_path(value)).is_file():
            out[key] = str(recipe.parent / user_path(value))
    return out


def _words(options: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    words = list(options)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise GrowthError(f"{word!r} does not belong to a key", where="the command line", fix="write --key value")
        name, equals, value = word[2:].partition("=")
        key = _known(name, "the command line")
        if equals:
            values[key] = value
        elif words and not words[0].startswith("--"):
            values[key] = words.pop(0)
        elif bool in _kinds(key):
            values[key] = True
        else:
            raise GrowthError(
                f"--{name} has no value", where="the command line", fix=f"write --{name} {_expected(key)}"
            )
    return values


def _known(name: str, where: str) -> str:
    key = name.replace("-", "_")
    if key in _TYPES:
        return key
    near = difflib.get_close_matches(key, _TYPES, n=3)
    raise GrowthError(
        f"there is no key {name!r}",
        where=where,
        fix=f"did you mean {' or '.join(near)}?" if near else "--help lists every key",
    )


def _kinds(key: str) -> tuple[type, ...]:
    hint = _TYPES[key]
    args = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(typing.get_origin(arg) or arg for arg in args)


def _expected(key: str) -> str:
    if choices := _FIELDS[key].metadata["choices"]:
        return f"one of {', '.join(words(choices))}"
    kinds = [_WORDS[kind] for kind in _kinds(key) if kind is not type(None)]
    return " or ".join(kinds) + (" or none" if type(None) in _kinds(key) else "")


def _coerced(key: str, value: Any, where: str) -> Any:
    kinds = _kinds(key)
    text = value.strip() if isinstance(value, str) else None
    if type(None) in kinds and (value is None or (text is not None and text.lower() in _NONE)):
        return None
    if bool in kinds and isinstance(value, bool):
        return value
    if bool in kinds and text is not None and text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    # The command line gives texts, and YAML reads 1_000 as one: both are meant as numbers here.
    for kind in (int, float):
        if kind in kinds and not isinstance(value, bool) and isinstance(value, int | float | str):
            try:
                number = kind(value)
            except (OverflowError, ValueError):  # an infinite float has no int
                continue
            if isinstance(value, str) or number == value:
                return number
    if list in kinds:
        items = text.split(",") if text is not None else value if isinstance(value, list) else [value]
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if all(not isinstance(item, bool) and int(item) == float(item) for item in items):
                return [int(item) for item in items]
    if dict in kinds and text is not None and text.startswith("{"):
        value = _mapping(key, text, where)
    if key == "monitor" and isinstance(value, list) and all(isinstance(name, str) for name in value):
        return ",".join(value)
    # A word in place of true or false is checked here, where the file is known.
    if str in kinds and isinstance(value, str) and (bool not in kinds or value in _FIELDS[key].metadata["choices"]):
        if value.lower() in (*_TRUE[:3], *_FALSE[:3]) and value not in _FIELDS[key].metadata["choices"]:
            fix = (
                f"write none, or ./{value} for a file of this name" if type(None) in kinds else f"give {_expected(key)}"
            )
            raise GrowthError(f"{key} is {value!r}", where=f"{key} in {where}", why="it is no switch", fix=fix)
        return value
    if dict in kinds and isinstance(value, dict):
        return value
    raise GrowthError(f"{key} is {value!r}", where=f"{key} in {where}", fix=f"give {_expected(key)}")


def _mapping(key: str, text: str, where: str) -> Any:
    try:
        return parse_yaml(text, f"{key} in {where}")
    except GrowthError as error:
        raise GrowthError(
            f"{key} is {text!r}", where=f"{key} in {where}", why=error.why or "", fix="write {name: value}"
        ) from error
