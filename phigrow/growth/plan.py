"""A growth plan: one axis map for every named axis and one source layer for every layer. Data, not code."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from phigrow.errors import GrowthError
from phigrow.growth.axes import AxisMap, kronecker, part_map
from phigrow.growth.learned import Learned
from phigrow.growth.matrices import FILE, Maps
from phigrow.growth.method import NEW
from phigrow.growth.recipe import Noise, NoiseOn, Resolver, TensorRecipe
from phigrow.models.config import Config
from phigrow.models.cost import ModelCost, count_cost
from phigrow.models.families import all_families, find_family
from phigrow.models.family import Axis, Family, Sizes
from phigrow.models.function import function_differences, function_of

FORMAT = 1
_SHA256 = re.compile("[0-9a-f]{64}")
_AGAIN = "make it again with phigrow plan --json"


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that decides the grown weights, without the weights.

    Attributes:
        family: name of the family table.
        method, options: the width method and its options, resolved.
        depth, depth_options: the depth method and its options, resolved.
        axes: axis name -> map.
        layers: source layer of each destination layer, -1 where it holds new values.
        identity_layers: destination layers that write nothing to the residual stream.
        seed: of all new random values.
        noise: symmetry-breaking noise, as a fraction of each source tensor's root mean square; 0 for none.
        noise_on: ``copies``, which cancel it together; ``pairs`` of copies in matrices of layers, with opposite signs;
            or ``all`` values of matrices, as a fraction of ``initializer_range``.
        src_config, dst_config: the configurations as they were spelled.
        approximations: reasons for which the plan changes the function; empty if it claims to preserve it.
        notes: remarks for the user.
        maps: of a learned method, the matrices that replace the copies in ``axes`` and ``layers``.
        method_files: name -> sha256 of the Python file that defines it, for methods that do not come with phigrow; None
            for a method without a file.
    """

    family: str
    method: str
    options: dict[str, Any]
    depth: str
    depth_options: dict[str, Any]
    axes: dict[str, AxisMap]
    layers: tuple[int, ...]
    identity_layers: frozenset[int]
    seed: int
    noise: float
    noise_on: NoiseOn
    src_config: Config
    dst_config: Config
    approximations: tuple[str, ...]
    notes: tuple[str, ...]
    maps: Maps | None = None
    method_files: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """The plan claims to preserve the function (in evaluation mode)."""
        return not self.approximations

    @cached_property
    def table(self) -> Family:
        family = find_family(self.family)
        assert family is not None, "`_check` has refused a plan of an unknown family"
        return family

    @cached_property
    def src_sizes(self) -> Sizes:
        return self.table.sizes_of(self.src_config)

    @cached_property
    def dst_sizes(self) -> Sizes:
        return self.table.sizes_of(self.dst_config)

    @property
    def initializer_range(self) -> float:
        """Standard deviation of new random weights: the destination configuration's."""
        return float(self.dst_config.get("initializer_range", 0.02))

    def cost(self, seq_len: int | None = None) -> tuple[ModelCost, ModelCost]:
        """Parameters and FLOPs per token of source and destination."""
        return count_cost(self.src_config, seq_len), count_cost(self.dst_config, seq_len)

    @cached_property
    def composites(self) -> dict[Axis, AxisMap]:
        """The map of every axis that a parameter has, composite ones among them, as the lift uses it."""
        axes = {axis for p in self.table.parameters for axis in (*p.axes, p.read or p.written)}
        made = {axis: kronecker(axis, [part_map(self.axes, part) for part in axis]) for axis in axes}
        return {axis: self.learned.grown(axis, start) for axis, start in made.items()} if self.learned else made

    @cached_property
    def learned(self) -> Learned | None:
        """The learned matrices of a plan of a learned method; None of any other plan."""
        if self.maps is None:
            return None
        src_layers = self.src_sizes["layer"]
        return Learned(self.maps, self.table, self.dst_config, self.axes, self.layers, self.identity_layers, src_layers)

    @cached_property
    def _resolver(self) -> Resolver:
        return Resolver(
            family=self.table,
            src_config=self.src_config,
            dst_config=self.dst_config,
            axes=self.axes,
            composites=self.composites,
            layers=self.layers,
            identity_layers=self.identity_layers,
            learned=self.learned,
            seed=self.seed,
            std=self.initializer_range,
            noise=Noise(self.noise, self.noise_on) if self.noise else None,
        )

    def recipes(self) -> Iterator[TensorRecipe]:
        """Recipes of all destination tensors, in the order of the family table."""
        return self._resolver.recipes()

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` turns it back into an equal plan."""
        return {
            "format": FORMAT,
            "family": self.family,
            "method": self.method,
            "options": self.options,
            "depth": {
                "method": self.depth,
                "options": self.depth_options,
                "layers": list(self.layers),
                "identity_layers": sorted(self.identity_layers),
            },
            "seed": self.seed,
            "noise": self.noise,
            "noise_on": self.noise_on,
            "exact": self.exact,
            "approximations": list(self.approximations),
            "notes": list(self.notes),
            "axes": {name: axis.to_json() for name, axis in self.axes.items()},
            "source": dict(self.src_config),
            "destination": dict(self.dst_config),
            **({"maps": {"sha256": self.maps.sha256}} if self.maps else {}),
            **({"method_files": dict(self.method_files)} if self.method_files else {}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], folder: Path | None = None) -> Plan:
        """Read a plan from the JSON of `to_json`.

        Args:
            data: the JSON object.
            folder: the folder of its learned maps, if it has any.

        Raises:
            GrowthError: another format, a missing key, or maps that do not fit the configurations.
        """
        if data.get("format") != FORMAT:
            raise GrowthError(
                f"the plan has format {data.get('format')!r}, not {FORMAT}",
                where="format",
                fix=_AGAIN,
            )
        try:
            depth = data["depth"]
            plan = cls(
                family=data["family"],
                method=data["method"],
                options=dict(data["options"]),
                depth=depth["method"],
                depth_options=dict(depth["options"]),
                axes={name: AxisMap.from_json(axis) for name, axis in data["axes"].items()},
                layers=tuple(depth["layers"]),
                identity_layers=frozenset(depth["identity_layers"]),
                seed=int(data["seed"]),
                noise=float(data["noise"]),
                noise_on=data["noise_on"],
                src_config=dict(data["source"]),
                dst_config=dict(data["destination"]),
                approximations=tuple(data["approximations"]),
                notes=tuple(data["notes"]),
                maps=Maps(data["maps"]["sha256"], folder and folder / FILE) if "maps" in data else None,
                method_files=dict(data.get("method_files", {})),
            )
        except KeyError as error:
            raise GrowthError(f"the plan has no {error}", where="the keys of the plan", fix=_AGAIN) from error
        plan._check()
        return plan

    def _check(self) -> None:
        if find_family(self.family) is None:
            raise GrowthError(
                f"the plan is for an unknown family {self.family!r}",
                where="family",
                fix=f"use one of {', '.join(all_families())}",
            )
        for name in self.table.axis_names:
            sizes = self.src_sizes[name], self.dst_sizes[name]
            axis = self.axes.get(name)
            if axis is None or (axis.src_size, axis.dst_size) != sizes:
                there = "missing" if axis is None else f"{axis.src_size} -> {axis.dst_size}"
                raise GrowthError(
                    "the axis maps of the plan do not fit its configurations",
                    where=f"axis {name}",
                    why=f"the map is {there}, the configurations have {sizes[0]} -> {sizes[1]}",
                    fix=_AGAIN,
                )
        if self.maps is not None and not isinstance(self.maps.sha256, str | None):
            raise GrowthError("the maps of the plan have no hash", where="maps", fix=_AGAIN)
        for name, digest in self.method_files.items():
            if digest is not None and not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
                raise GrowthError(
                    f"the hash of the file of method {name!r} is {digest!r}", where="method_files", fix=_AGAIN
                )
        if self.noise_on not in get_args(NoiseOn):
            raise GrowthError(f"the plan has noise on {self.noise_on!r}", where="noise_on", fix=_AGAIN)
        src_layers, dst_layers = self.src_sizes["layer"], self.dst_sizes["layer"]
        fits = len(self.layers) == dst_layers and all(type(k) is int and NEW <= k < src_layers for k in self.layers)
        if not fits or not all(type(k) is int and 0 <= k < dst_layers for k in self.identity_layers):
            raise GrowthError(
                "the layer map of the plan does not fit its configurations",
                where=f"layers {list(self.layers)}, identity layers {list(self.identity_layers)}",
                why=f"the source has {src_layers} layers, the destination {dst_layers}",
                fix=_AGAIN,
            )

    @cached_property
    def hash(self) -> str:
        """sha256 of the plan's JSON: equal for equal plans, whatever machine made them."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def function_changes(family: Family, src: Config, dst: Config) -> list[str]:
    """Differences of two configurations that change the function, as ``key: source -> destination``."""
    return function_differences(function_of(family, src), function_of(family, dst))
