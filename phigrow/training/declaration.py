"""Declare a setting of a training run once: type, default, help, range, and its roles.

No other module lists settings. The roles decide which settings a resumed run must repeat, which ones the arms of a
comparison must share, and which ones a study sets.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import numbers
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.paths import user_text


class Role(enum.Flag):
    """Roles of a setting: other parts of the package that depend on it. A setting may have several roles, or none."""

    NONE = 0
    RESUME = enum.auto()
    """The loss curve depends on it, so a resumed run must have the same value."""
    ARMS = enum.auto()
    """All arms of a comparison must have the same value."""
    START = enum.auto()
    """It chooses the first weights, which differ between arms by design."""
    BRANCH = enum.auto()
    """A branch may have another value than its trunk."""
    STUDY = enum.auto()
    """A study decides it, so a study file must not set it."""
    STAGES = enum.auto()
    """A recipe of stages decides it, so the recipe must not set it."""
    OPERATIONAL = enum.auto()
    """It changes nothing in the records of a run except seconds, so finished runs stay valid."""
    HELDOUT = enum.auto()
    """It chooses the held-out text, so a resumed run must have the same value."""
    INPUT = enum.auto()
    """It names an input. A resumed run must have the same content, whatever the path."""


RESUME, ARMS, START, BRANCH = Role.RESUME, Role.ARMS, Role.START, Role.BRANCH
STUDY, STAGES, OPERATIONAL = Role.STUDY, Role.STAGES, Role.OPERATIONAL
HELDOUT, INPUT = Role.HELDOUT, Role.INPUT
DECIDED = STUDY | STAGES


def key(
    default: Any,
    help: str,
    *,
    role: Role = Role.NONE,
    ge: float | None = None,
    le: float | None = None,
    choices: tuple[str | bool, ...] = (),
    unset: Any = None,
    path: bool = False,
) -> Any:
    """Declare one setting, as a field of a dataclass.

    Args:
        default: value of a run that does not set it. A run folder or record without the setting has this value.
        help: one or two sentences, with the unit.
        role: the other parts of the package that depend on the setting.
        ge, le: smallest and largest allowed value; in a list, of every item.
        choices: allowed values: words, true or false.
        unset: value that None stands for, unless it depends on other settings.
        path: its text, or each key of its mapping, names a file or folder, so ``~`` is the home folder.
    """
    if OPERATIONAL in role and role & (RESUME | ARMS | START | HELDOUT | INPUT):
        raise ValueError(f"an operational setting cannot have the role {role & ~OPERATIONAL}")
    metadata = {"help": help, "role": role, "ge": ge, "le": le, "choices": choices, "unset": unset}
    metadata["path"] = path
    return dataclasses.field(default=default, metadata=metadata)


def expand_paths(settings: Any) -> None:
    """Replace ``~`` in every setting that names a file or folder.

    Raises:
        GrowthError: as `user_text`.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.metadata["path"] and isinstance(value, str):
            object.__setattr__(settings, field.name, user_text(value))
        elif field.metadata["path"] and isinstance(value, dict):
            object.__setattr__(settings, field.name, {user_text(name): part for name, part in value.items()})


def check_ranges(settings: Any) -> None:
    """Check every value of a dataclass of settings against its declared range and choices.

    Raises:
        GrowthError: a value is not finite, lies outside its range, or is none of its choices.
    """
    for field in dataclasses.fields(settings):
        value, choices = getattr(settings, field.name), field.metadata["choices"]
        if choices and value is not None and value not in choices:
            fix = f"choose one of {', '.join(words(choices))}"
            raise GrowthError(f"{field.name} is {value!r}", where=field.name, fix=fix)
        ge, le = field.metadata["ge"], field.metadata["le"]
        if value is None or (ge is None and le is None):
            continue
        for item in value if isinstance(value, list) else [value]:
            kind = numbers.Integral if isinstance(value, list) else numbers.Real
            wrong = isinstance(item, bool) or not isinstance(item, kind) or not _is_finite(item)
            if wrong or not (ge is None or item >= ge) or not (le is None or item <= le):
                text = f"{field.name} has {item!r}" if isinstance(value, list) else f"{field.name} is {value!r}"
                raise GrowthError(text, where=field.name, fix=f"give {allowed(field)}")


def _is_finite(number: numbers.Real) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number that no float can hold
        return False


def words(choices: tuple[str | bool, ...]) -> list[str]:
    """Return choices as a recipe spells them.

    >>> words((True, "auto"))
    ['true', 'auto']
    """
    return [str(choice).lower() if isinstance(choice, bool) else choice for choice in choices]


def allowed(field: dataclasses.Field[Any]) -> str:
    """Describe the range of a setting, such as ``1 or more``; empty if it has no range.

    >>> allowed(dataclasses.fields(dataclasses.make_dataclass("S", [("zero", int, key(1, "", ge=0, le=3))]))[0])
    'a value from 0 to 3'
    """
    ge, le = field.metadata["ge"], field.metadata["le"]
    if ge is not None and le is not None:
        return f"a value from {ge:g} to {le:g}"
    return f"{ge:g} or more" if ge is not None else f"{le:g} or less" if le is not None else ""


def names_with(settings: type, role: Role) -> tuple[str, ...]:
    """Name the settings that have any of the given roles, in the order of their declaration."""
    return tuple(field.name for field in dataclasses.fields(settings) if field.metadata["role"] & role)
