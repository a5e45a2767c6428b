"""What a growth method is: a name, options, one axis map an axis, and what it claims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from phigrow.errors import GrowthError
from phigrow.growth.axes import AxisMap
from phigrow.models.config import Config
from phigrow.models.family import Family, Sizes


@dataclass(frozen=True)
class GrowthTask:
    """The two architectures between which a method is asked for maps."""

    family: Family
    src_config: Config
    dst_config: Config
    src: Sizes
    dst: Sizes
    seed: int = 0

    @property
    def tied(self) -> bool:
        """The head is the embedding."""
        return bool(self.dst_config.get("tie_word_embeddings"))

    @property
    def grown_axes(self) -> list[str]:
        return [axis for axis in self.family.axis_names if self.grows(axis)]

    def grows(self, axis: str) -> bool:
        return self.dst[axis] != self.src[axis]

    def sizes(self, axis: str) -> tuple[int, int]:
        """Source and destination size of an axis."""
        return self.src[axis], self.dst[axis]

    def head_parts(self, axis: str) -> list[tuple[int, int]]:
        """(source, destination) sizes of the parts of a query or key head that must not mix.

        The rotary coordinates come first and rotate in pairs (i, i + rotary / 2), so they are two parts; the rest
        is the third.
        """
        (src, dst), (src_rotary, dst_rotary) = self.sizes(axis), self.sizes("rotary")
        half = (src_rotary // 2, dst_rotary // 2)
        return [half, half, (src - 2 * half[0], dst - 2 * half[1])]

    def refuse(self, what: str, axis: str, why: str, fix: str) -> GrowthError:
        """An error that names the axis and the first parameter that has it."""
        first = axis if axis in self.family.axis_names else self.family.query
        return GrowthError(what, where=f"axis {axis}, met first in {self.family.first_use(first)}", why=why, fix=fix)


@dataclass(frozen=True)
class Option:
    """An option of a method: its allowed values, the first being the default, and what it does."""

    choices: tuple[str, ...]
    help: str

    @property
    def default(self) -> str:
        return self.choices[0]


@dataclass(frozen=True)
class Method:
    """A width method.

    Attributes:
        name: as in ``--method``.
        summary: one line for ``--help`` and tables.
        depth: its default depth method.
        axis_maps: task and options -> one map an axis of the family; raises GrowthError for what it cannot do.
        approximations: task and options -> why the function is not preserved; empty when it is.
        options: name -> option.
        takes_noise: whether symmetry-breaking noise means something for it.
        own_noise: resolved options -> the symmetry-breaking noise that belongs to the method.
        noise_on: ``copies`` or ``pairs`` of them, where it cancels, or ``all`` values of matrices (`Plan.noise_on`).
        learns: matrices that a training run learns take the place of its copies, where a plan is given them.
        always_exact: it preserves the function or refuses, so configurations must compute the same function.
    """

    name: str
    summary: str
    depth: str
    axis_maps: Callable[[GrowthTask, dict[str, Any]], dict[str, AxisMap]]
    approximations: Callable[[GrowthTask, dict[str, Any]], list[str]]
    options: dict[str, Option] = field(default_factory=dict)
    takes_noise: bool = False
    own_noise: Callable[[dict[str, Any]], float] | None = None
    noise_on: Literal["copies", "pairs", "all"] = "copies"
    always_exact: bool = False
    learns: bool = False

    def resolve_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """All options with defaults filled in.

        Raises:
            GrowthError: an option that the method does not have, or a value that it does not take.
        """
        # In Python and in YAML a number is written without quotes.
        given = {k: f"{v:g}" if isinstance(v, int | float) and not isinstance(v, bool) else v for k, v in given.items()}
        for name, value in given.items():
            if name not in self.options:
                having = ", ".join(self.options) or "no options"
                raise GrowthError(f"method {self.name} has no option {name!r}", why=f"it has: {having}")
            if value not in self.options[name].choices:
                raise GrowthError(
                    f"{name} {value!r} is unknown",
                    where=f"method {self.name}",
                    fix=f"choose one of {', '.join(self.options[name].choices)}",
                )
        return {name: given.get(name, option.default) for name, option in self.options.items()}
