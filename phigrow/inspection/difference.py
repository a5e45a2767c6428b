"""Differences between two plans, in exactly the content that their hashes cover."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from phigrow.growth.axes import AxisMap, Bools
from phigrow.growth.plan import Plan

ABSENT = "(absent)"


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    Attributes:
        part: the part of the plan, such as ``method``, ``depth``, ``axis``, ``layer``, or ``source`` and
            ``destination`` (configurations).
        name: the axis, layer or key in that part; empty for a part with one value.
        first, second: the two values; `ABSENT` if one plan has none.
        coordinates: of an axis map, how many coordinates differ.
        span: of an axis map, the first run of coordinates (start, stop) that differ; the values are those there.
    """

    part: str
    name: str
    first: Any
    second: Any
    coordinates: int | None = None
    span: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        place = {} if self.span is None else {"coordinates": self.coordinates, "span": list(self.span)}
        return {"part": self.part, "name": self.name, "first": self.first, "second": self.second, **place}


def differences(first: Plan, second: Plan) -> list[Difference]:
    """Compare two plans; the list is empty if and only if they have the same hash.

    >>> [d.part for d in differences(plan, dataclasses.replace(plan, seed=plan.seed + 1))]  # doctest: +SKIP
    ['seed']
    """
    return [
        *_values("", {key: _plain(first, key) for key in _PLAIN}, {key: _plain(second, key) for key in _PLAIN}),
        *_values("options", first.options, second.options),
        *_values("depth options", first.depth_options, second.depth_options),
        *_values("source size", first.src_sizes, second.src_sizes),
        *_values("destination size", first.dst_sizes, second.dst_sizes),
        *_values("maps", _maps_of(first), _maps_of(second)),
        *_values("method file", first.method_files, second.method_files),
        *_layers(first, second),
        *_axes(first.axes, second.axes),
        *_values("source", first.src_config, second.src_config),
        *_values("destination", first.dst_config, second.dst_config),
    ]


def _maps_of(plan: Plan) -> dict[str, Any]:
    return {"sha256": plan.maps.sha256} if plan.maps else {}


_PLAIN = ("family", "method", "depth", "seed", "noise", "noise_on", "exact", "approximations", "notes")


def _plain(plan: Plan, key: str) -> Any:
    value = getattr(plan, key)
    return list(value) if isinstance(value, tuple) else value


def _values(part: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Difference]:
    for key in dict.fromkeys([*first, *second]):
        # As JSON, because the hash is made of that: 1, 1.0 and true are three values.
        sides = [json.dumps(side[key], sort_keys=True) if key in side else None for side in (first, second)]
        if sides[0] != sides[1]:
            yield Difference(part or key, key if part else "", first.get(key, ABSENT), second.get(key, ABSENT))


def _layers(first: Plan, second: Plan) -> Iterator[Difference]:
    sides = [
        [
            f"{source}, identity layer" if k in plan.identity_layers else str(source) if source >= 0 else "new"
            for k, source in enumerate(plan.layers)
        ]
        for plan in (first, second)
    ]
    for layer in range(max(map(len, sides))):
        old, new = (side[layer] if layer < len(side) else ABSENT for side in sides)
        if old != new:
            yield Difference("layer", str(layer), old, new)


def _axes(first: Mapping[str, AxisMap], second: Mapping[str, AxisMap]) -> Iterator[Difference]:
    for name in dict.fromkeys([*first, *second]):
        old, new = first.get(name), second.get(name)
        if old is None or new is None:
            yield Difference("axis", name, _sizes(old) if old else ABSENT, _sizes(new) if new else ABSENT)
        else:
            yield from _maps(name, old, new)


def _maps(name: str, first: AxisMap, second: AxisMap) -> Iterator[Difference]:
    if _sizes(first) != _sizes(second):
        yield Difference("axis", name, _sizes(first), _sizes(second))
    if first.fresh_bias != second.fresh_bias:
        yield Difference("axis", f"{name}, bias of new coordinates", first.fresh_bias, second.fresh_bias)
    structures = first.structure_json(), second.structure_json()
    for key in dict.fromkeys([*structures[0], *structures[1]]):
        old, new = (structure.get(key, ABSENT) for structure in structures)
        if old != new:
            yield Difference("axis", f"{name}, {key}", old, new)
    common = min(first.dst_size, second.dst_size)
    legs: dict[str, tuple[list[Any], list[Any]]] = {
        "source": (first.words()[:common], second.words()[:common]),
        "write gain": (_leg(first.write, first.write_random, common), _leg(second.write, second.write_random, common)),
        "read gain": (_leg(first.read, first.read_random, common), _leg(second.read, second.read_random, common)),
    }
    for what, (old, new) in legs.items():
        differing = np.array([a != b for a, b in zip(old, new, strict=True)], dtype=bool)
        if differing.any():
            start, stop = _first_run(differing, old, new)
            yield Difference(
                "axis",
                f"{name}, {what}",
                _run_value(old, start, stop),
                _run_value(new, start, stop),
                int(differing.sum()),
                (start, stop),
            )


def _sizes(axis: AxisMap) -> str:
    return f"{axis.src_size} -> {axis.dst_size}"


def _leg(gains: np.ndarray, random: Bools, common: int) -> list[Any]:
    return ["random" if flag else float(gain) for gain, flag in zip(gains[:common], random[:common], strict=True)]


def _first_run(differing: Bools, *sides: list[Any]) -> tuple[int, int]:
    """Return the first run of coordinates that differ and continue evenly on both sides."""
    start = int(np.flatnonzero(differing)[0])
    stop = start + 1
    while stop < len(differing) and differing[stop] and all(_continues(side, stop) for side in sides):
        stop += 1
    return start, stop


def _continues(side: list[Any], at: int) -> bool:
    before, here = side[at - 1], side[at]
    return bool(here == before + 1) if isinstance(before, int) and isinstance(here, int) else bool(here == before)


def _run_value(side: list[Any], start: int, stop: int) -> Any:
    """One value for a run: ``0..511`` of sources that count up, else the value that repeats."""
    value = side[start]
    return f"{value}..{side[stop - 1]}" if isinstance(value, int) and stop - start > 1 else value
