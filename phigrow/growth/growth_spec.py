"""`GrowthSpec`: everything that a user chooses about a growth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.growth.method import SETTINGS, Method, Value
from phigrow.growth.method_files import SUFFIX
from phigrow.growth.method_spec import resolve_method, spell_sources, with_paths
from phigrow.growth.registry import find_method


@dataclass(frozen=True)
class GrowthSpec:
    """Everything that a user chooses about a growth, besides source and destination.

    The same object goes through plan, expand, expand_model, studies and the command line.

    Attributes:
        method: width method as `phigrow.growth.method_spec` spells it: ``tile``, ``tile:scale=preserve`` or
            ``hidden=lossless,mlp=tile``. A name that ends in ``.py`` is the path of a method file. Or a
            `phigrow.growth.method.Method`.
        options: options of the width method given apart, such as ``{"scale": "preserve"}``.
        depth: depth method, one of `phigrow.growth.methods.depth.DEPTHS`; None for the width method's own.
        rounding: how the depth method ``interpose`` rounds, one of `phigrow.growth.methods.depth.ROUNDINGS`.
        seed: of new random values, 0 or more.
        noise: symmetry-breaking noise of ``tile``, as a fraction of each tensor's root mean square.
        maps: folder of learned maps, of a method that learns. Seed, depth and options are then those with which the
            maps were learned. Without a folder, the plan is the one from which learning starts.

    Raises:
        GrowthError: a seed or noise that is not a number of its range.

    >>> GrowthSpec.of("tile", scale="preserve", seed=3).options
    {'scale': 'preserve'}
    """

    method: str | Method = "wr"
    options: Mapping[str, Any] = field(default_factory=dict)
    depth: str | None = None
    rounding: str = "half-even"
    seed: int = 0
    noise: float = 0.0
    maps: str | Path | None = None

    def __post_init__(self) -> None:
        noise, seed = self.noise, self.seed
        if isinstance(noise, bool) or not isinstance(noise, int | float) or not (noise >= 0 and math.isfinite(noise)):
            raise GrowthError(f"noise {noise!r} is not allowed", where="noise", fix="give a number, 0 or more")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise GrowthError(f"seed {seed!r} is not allowed", where="seed", fix="give a whole number, 0 or more")

        if not isinstance(self.method, str | Method):
            raise GrowthError(
                f"the method is a {type(self.method).__name__}",
                where="method",
                fix="give the name of a method, the path of a method file, or a phigrow.methods.Method",
            )

    @classmethod
    def of(cls, method: str | Method = "wr", **settings: Any) -> GrowthSpec:
        """Build a spec from keywords; those that are no field of it are options of the method."""
        options = {name: value for name, value in settings.items() if name not in GROWTH_SETTINGS}
        own = {name: value for name, value in settings.items() if name in GROWTH_SETTINGS}
        return cls(method=method, options=options, **own)

    def resolve(self) -> tuple[Method, dict[str, Value]]:
        """Look up the width method, and resolve its options.

        Raises:
            GrowthError: a spelling that cannot be read, or an unknown method, option or value.
        """
        return resolve_method(self.method, self.options)

    @property
    def label(self) -> str:
        """The method as typed, with the name of a method in place of the path of its file.

        Raises:
            GrowthError: as `resolve`.
        """
        if isinstance(self.method, Method):
            return self.method.name
        return with_paths(self.method, lambda path: find_method(path).name)

    def spelled(self) -> str:
        """Return the method in one text: the path of its file, if it has one, and all options.

        Raises:
            GrowthError: as `resolve`.
        """
        return spell_sources(self.method, self.options)

    @property
    def method_files(self) -> dict[str, str | None]:
        """The hash of the file of every method from outside of phigrow, by the method's name.

        Raises:
            GrowthError: as `resolve`.
        """
        return {source.method: source.sha256 for source in self.resolve()[0].sources}

    def pinned(self, expected: Mapping[str, str | None] | None = None) -> GrowthSpec:
        """Return a spec that keeps to the content that method files have now.

        Args:
            expected: hashes of the files, by the names of the methods, as they were before.

        Raises:
            GrowthError: as `resolve`; or a file has another content than before.
        """
        if isinstance(self.method, str) and SUFFIX not in self.method:
            return self
        method, options = self.resolve()
        for source in method.sources:
            if expected is not None and expected.get(source.method) != source.sha256:
                raise GrowthError(
                    f"the file of method {source.method} has changed while this command ran",
                    where=str(source.path),
                    fix="run the same command again",
                )
        return replace(self, method=method, options=options)


GROWTH_SETTINGS = tuple(f.name for f in fields(GrowthSpec) if f.name not in ("method", "options"))
"""Settings of every growth, whatever its method; no option of a method may have one of these names."""

assert {*GROWTH_SETTINGS, "method", "options"} == set(SETTINGS), "a setting of a growth is in phigrow.growth.method"
