"""Width methods: a name, typed options, one axis map for each axis, and a claim about the function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from phigrow.errors import GrowthError
from phigrow.growth.axes import AxisMap
from phigrow.growth.axis_groups import axis_label
from phigrow.models.config import Config
from phigrow.models.family import Family, Sizes


@dataclass(frozen=True)
class GrowthTask:
    """Source and destination of a growth, as a method needs them: configurations, sizes and the seed."""

    family: Family
    src_config: Config
    dst_config: Config
    src: Sizes
    dst: Sizes
    seed: int = 0

    @property
    def tied(self) -> bool:
        """True if the head is the embedding."""
        return bool(self.dst_config.get("tie_word_embeddings"))

    @property
    def grown_axes(self) -> list[str]:
        return [axis for axis in self.family.axis_names if self.grows(axis)]

    def grows(self, axis: str) -> bool:
        return self.dst[axis] != self.src[axis]

    def sizes(self, axis: str) -> tuple[int, int]:
        """Source and destination size of an axis."""
        return self.src[axis], self.dst[axis]

    def parts(self, axis: str) -> list[tuple[int, int]]:
        """(source, destination) sizes of the parts of an axis whose coordinates must not mix.

        A query or key head has three. Its rotary coordinates come first and rotate in pairs (i, i + rotary / 2), so
        they are two parts; the rest is the third. Any other axis is one part.
        """
        if axis not in (self.family.query, self.family.key):
            return [self.sizes(axis)]
        (src, dst), (src_rotary, dst_rotary) = self.sizes(axis), self.sizes("rotary")
        half = (src_rotary // 2, dst_rotary // 2)
        return [half, half, (src - 2 * half[0], dst - 2 * half[1])]

    def refuse(self, what: str, axis: str, why: str, fix: str) -> GrowthError:
        """An error that names the axis and the first parameter that has it."""
        first = axis if axis in self.family.axis_names else self.family.query
        where = f"axis {axis_label(self.family, axis)}, met first in {self.family.first_use(first)}"
        return GrowthError(what, where=where, why=why, fix=fix)


class MethodError(GrowthError):
    """A fault of a method, not of the growth that it was asked for."""


Value = str | int | float
LayerMap = tuple[tuple[int, ...], frozenset[int]]
"""The source layer of each destination layer, `NEW` where it has none, and the set of identity layers."""

NEW = -1
"""In place of a source layer: the layer holds new random values."""

SETTINGS = ("method", "options", "depth", "rounding", "seed", "noise", "maps")
"""Settings of every growth (`phigrow.growth.growth_spec.GrowthSpec`); no option of a method may have such a name."""

Options = Mapping[str, Any]
"""Option name -> value, of the type that the option declares."""


@dataclass(frozen=True)
class Option:
    """A typed option of a method.

    Command-line flags, their help and the checks of values are generated from it.

    Attributes:
        type: ``str``, ``int`` or ``float``.
        default: the value where none is given.
        help: one line, without the default and the allowed values.
        choices: the words that it takes; a number may take words besides, such as ``none``.
        range: smallest and largest number.

    Raises:
        ValueError: a declaration that contradicts itself.

    >>> Option(float, 10, "signal to noise, in decibels", choices=("none",), range=(0, 100)).parse("20")
    20.0
    """

    type: type[Value]
    default: Value
    help: str
    choices: tuple[str, ...] = ()
    range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.type not in (str, int, float):
            raise ValueError(f"an option is of type str, int or float, not {self.type}")
        if self.type is str and not self.choices:
            raise ValueError("an option of type str needs choices")
        object.__setattr__(self, "default", self.parse(self.default))

    def parse(self, given: object) -> Value:
        """Convert a value from Python, YAML or the command line.

        Raises:
            ValueError: it is not allowed; the message is `allowed`.
        """
        if isinstance(given, str) and given in self.choices:
            return given
        if self.type is str or isinstance(given, bool) or not isinstance(given, str | int | float):
            raise ValueError(self.allowed)
        try:
            number = given if isinstance(given, int) else float(given)
            finite = math.isfinite(number)
        except (ValueError, OverflowError) as error:
            raise ValueError(self.allowed) from error
        low, high = self.range or (-math.inf, math.inf)
        whole = self.type is float or number == math.floor(number) if finite else False
        if not (finite and whole and low <= number <= high):
            raise ValueError(self.allowed)
        return self.type(number + 0)  # -0.0 becomes 0.0

    def spell(self, value: Value) -> str:
        """Write a value as it stands in plans and in the names of methods; `parse` reads it back.

        Whole numbers are written as the default is: ``10`` beside a default of 10, ``1.0`` beside one of 0.4.
        """
        if isinstance(value, float) and not (isinstance(self.default, float) and not self.default.is_integer()):
            return repr(value).removesuffix(".0")
        return str(value)

    @property
    def allowed(self) -> str:
        """The allowed values, in words: ``edge or center``, ``a number from 0 to 100, or none``."""
        words = " or ".join([", ".join(self.choices[:-1]), self.choices[-1]] if len(self.choices) > 1 else self.choices)
        if self.type is str:
            return words
        number = "a whole number" if self.type is int else "a number"
        if self.range is not None:
            number += f" from {self.range[0]:g} to {self.range[1]:g}"
        return f"{number}, or {words}" if words else number


@dataclass(frozen=True)
class MethodSource:
    """The origin of a method that does not come with phigrow.

    Attributes:
        method: name of the method.
        path: the Python file that defines it; None if it has none, as in an interactive session.
        sha256: of the file's content; None without a file.
        package: name and version of the installed package that registers it, or None.
    """

    method: str
    path: Path | None
    sha256: str | None
    package: str | None = None


@dataclass(frozen=True)
class Method:
    """A width method.

    Attributes:
        name: as in ``--method``.
        summary: the weights of a grown model in one line, for tables, ``phigrow.json`` and reports.
        depth: its default depth method.
        axis_maps: task and options -> one map an axis of the family; raises GrowthError for growth that it cannot do.
        approximations: task and options -> reasons for which the function changes; empty if it is preserved.
        options: name -> option.
        takes_noise: True if the user may add symmetry-breaking noise.
        own_noise: resolved options -> the symmetry-breaking noise that belongs to the method.
        noise_on: ``copies`` or ``pairs`` of them, where it cancels, or ``all`` values of matrices (`Plan.noise_on`).
        learns: True if a training run can learn matrices that replace its copies.
        notes: task and options -> remarks for the user.
        always_exact: it preserves the function or refuses, so configurations must compute the same function.
        layers: task and options -> the source layer of each destination layer, -1 for a layer of new values, and the
            identity layers. None for the depth method ``depth``. It acts where the user names no depth method.
        sources: files that define the method, if it does not come with phigrow. phigrow fills them in.
    """

    name: str
    summary: str
    depth: str
    axis_maps: Callable[[GrowthTask, Options], dict[str, AxisMap]]
    approximations: Callable[[GrowthTask, Options], list[str]]
    options: dict[str, Option] = field(default_factory=dict)
    takes_noise: bool = False
    own_noise: Callable[[Options], float] | None = None
    noise_on: Literal["copies", "pairs", "all"] = "copies"
    always_exact: bool = False
    learns: bool = False
    notes: Callable[[GrowthTask, Options], list[str]] = lambda task, options: []
    layers: Callable[[GrowthTask, Options], LayerMap] | None = None
    sources: tuple[MethodSource, ...] = ()

    def resolve_options(self, given: Options) -> dict[str, Value]:
        """Check given options and fill in the defaults of the others.

        Raises:
            GrowthError: an option that the method does not have, or a value that is not allowed.

        >>> find_method("hypercloning").resolve_options({"snr": "20"})  # doctest: +SKIP
        {'snr': 20.0}
        """
        resolved = {name: option.default for name, option in self.options.items()}
        for name, value in given.items():
            if name not in self.options:
                raise GrowthError(
                    f"method {self.name} has no option {name!r}",
                    where="method",
                    why=f"it has: {', '.join(self.options) or 'no options'}",
                    fix=f"use one of {', '.join(self.options)}" if self.options else "leave it out",
                )
            try:
                resolved[name] = self.options[name].parse(value)
            except ValueError as error:
                raise GrowthError(
                    f"{name} {value!r} is not allowed", where=f"method {self.name}", fix=f"give {error}"
                ) from error
        return resolved

    def spell_options(self, options: Options) -> dict[str, str]:
        """Write resolved options as they stand in plans and in the names of methods."""
        return {name: self.options[name].spell(value) for name, value in options.items()}
