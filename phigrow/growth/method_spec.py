"""`--method`: a width method by name, with options, or one method an axis (``lossless,mlp=tile:scale=preserve``)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from phigrow.errors import GrowthError
from phigrow.growth.axes import AxisMap
from phigrow.growth.method import GrowthTask, Method
from phigrow.growth.methods import find_method

Parts = dict[str, tuple[Method, dict[str, Any]]]

REST = ""
"""The part of a mixture that grows every axis no other part names."""


def method_of(spec: str, options: dict[str, Any]) -> tuple[Method, dict[str, Any]]:
    """The method that ``--method`` spells, and its options with defaults filled in.

    Entries are separated by commas. ``name`` is a method for all axes, ``part=name`` for some: ``hidden`` (the stream
    and what is read of it), ``head`` (query, key and value coordinates), ``heads``, ``mlp``, ``vocab``. Each may carry
    options, ``name:option=value``. A mixture is one method that claims what its parts claim together.

    Args:
        spec: as typed.
        options: given apart, for every method of the mixture that has them.

    Raises:
        GrowthError: a spelling that cannot be read, an unknown method, part, option or value.

    >>> method_of("hidden=lossless,mlp=tile", {})[0].name
    'hidden=lossless,mlp=tile:anchor=edge:scale=none'
    """
    entries = [_entry(text.strip(), spec) for text in spec.split(",")]
    if len(entries) == 1 and entries[0][0] == REST:
        _, method, given = entries[0]
        return method, method.resolve_options({**options, **given})
    known = {option for _, method, _ in entries for option in method.options}
    if unknown := sorted(set(options) - known):
        raise GrowthError(f"no method of {spec!r} has an option {unknown[0]!r}", fix="leave it out")
    parts: Parts = {}
    for part, method, given in entries:
        if part in parts:
            raise GrowthError(f"two methods for {part or 'the rest'!r}", where=f"--method {spec}", fix="give it one")
        shared = {name: value for name, value in options.items() if name in method.options}
        parts[part] = method, method.resolve_options({**shared, **given})
        if method.learns:
            raise GrowthError(f"{method.name} in a mixture", why="its maps are learned together", fix="use it alone")
        if method.own_noise is not None and method.own_noise(parts[part][1]):
            quiet = "; take hypercloning:snr=none" if method.name == "hypercloning" else ""
            raise GrowthError(
                f"{method.name} in a mixture", why="its noise is added to whole matrices", fix=f"use it alone{quiet}"
            )
    return _mixture(parts), {}


def _entry(text: str, spec: str) -> tuple[str, Method, dict[str, Any]]:
    head, *rest = text.split(":")
    part, equals, name = head.rpartition("=")
    pairs = [pair.partition("=") for pair in rest]
    if (equals and not part) or not name or not all(key and sign and value for key, sign, value in pairs):
        raise GrowthError(
            f"a method that cannot be read: {spec!r}",
            fix="write it as lossless, tile:scale=preserve or hidden=lossless,mlp=tile",
        )
    return part, find_method(name), {key: value for key, _, value in pairs}


def _mixture(parts: Parts) -> Method:
    def axis_maps(task: GrowthTask, _: dict[str, Any]) -> dict[str, AxisMap]:
        maps: dict[str, AxisMap] = {}
        for axes, method, options in _shares(task, parts):
            made = method.axis_maps(_only(task, axes), options)
            maps.update({axis: made[axis] for axis in axes})
        if any(axis.legs is not None for axis in maps.values()) and any(a.ahead is not None for a in maps.values()):
            raise task.refuse(
                "aki beside a method that turns the stream",
                next(name for name, axis in maps.items() if axis.ahead is not None),
                "neurons from the layer above read through that layer's normalisation, which is folded into its own",
                "give the axis another method, such as lossless or lemon",
            )
        return {axis: maps[axis] for axis in task.family.axis_names}

    def approximations(task: GrowthTask, _: dict[str, Any]) -> list[str]:
        shares = _shares(task, parts)
        return [said for axes, m, options in shares for said in m.approximations(_only(task, axes), options)]

    first = parts.get("hidden", parts.get(REST, next(iter(parts.values()))))[0]
    return Method(
        name=",".join(_spelled(part, *chosen) for part, chosen in parts.items()),
        summary="a method for every axis",
        depth=first.depth,
        axis_maps=axis_maps,
        approximations=approximations,
        takes_noise=all(method.takes_noise for method, _ in parts.values()),
    )


def _spelled(part: str, method: Method, options: dict[str, Any]) -> str:
    head = f"{part}={method.name}" if part else method.name
    return ":".join([head, *(f"{name}={value}" for name, value in options.items())])


def _shares(task: GrowthTask, parts: Parts) -> list[tuple[list[str], Method, dict[str, Any]]]:
    """The axes of every part.

    Raises:
        GrowthError: an unknown part, or an axis that grows by no method.
    """
    family = task.family
    groups: dict[str, tuple[str, ...]] = {
        "hidden": (family.residual, family.normed, family.final),
        "head": (family.query, family.key, family.value),
        "heads": family.heads,
        "mlp": (family.mlp,),
        "vocab": (family.vocab,),
    }
    if unknown := [part for part in parts if part not in groups and part != REST]:
        raise GrowthError(f"no axes called {unknown[0]!r}", where="--method", fix=f"choose among {', '.join(groups)}")
    named = {axis for part in parts if part for axis in groups[part]}
    rest = [axis for axis in family.axis_names if axis not in named]
    if REST not in parts and (idle := [axis for axis in rest if task.grows(axis)]):
        raise task.refuse(
            f"no method for {idle[0]}, which grows {task.src[idle[0]]} -> {task.dst[idle[0]]}",
            idle[0],
            "every axis that grows needs one",
            "name it, or put a method for the rest first, as in lossless,mlp=tile",
        )
    shares = [(list(groups[part]) if part else rest, *chosen) for part, chosen in parts.items()]
    if REST not in parts:  # what does not grow is the same by any method
        method, options = next(iter(parts.values()))
        shares.append((rest, method, options))
    return shares


def _only(task: GrowthTask, axes: list[str]) -> GrowthTask:
    """The growth of some axes alone."""
    turning = ["rotary"] if task.family.query in axes else []
    sizes = {name: task.dst[name] if name in (*axes, *turning, "layer") else size for name, size in task.src.items()}
    return replace(task, dst=sizes)
