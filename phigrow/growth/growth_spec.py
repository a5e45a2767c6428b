"""`GrowthSpec`: everything that a user chooses about a growth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.growth.method import Method, Value
from phigrow.growth.method_spec import resolve_method


@dataclass(frozen=True)
class GrowthSpec:
    """Everything that a user chooses about a growth, besides source and destination.

    The same object goes through plan, expand, expand_model, studies and the command line.

    Attributes:
        method: width method as `phigrow.growth.method_spec` spells it: ``tile``, ``tile:scale=preserve`` or
            ``hidden=lossless,mlp=tile``.
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

    method: str = "wr"
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

    @classmethod
    def of(cls, method: str = "wr", **settings: Any) -> GrowthSpec:
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


GROWTH_SETTINGS = tuple(f.name for f in fields(GrowthSpec) if f.name not in ("method", "options"))
"""Settings of every growth, whatever its method; no option of a method may have one of these names."""
