"""The spelling of ``--method``: one width method with options, or one for each group of axes.

Entries are separated by commas. ``name`` grows all axes, ``group=name`` those of one group: ``hidden``, ``head``,
``heads``, ``mlp`` or ``vocab`` (`phigrow.growth.axis_groups`). Each entry may have options, ``name:option=value``.
A name that ends in ``.py`` is the path of a method file (`phigrow.growth.method_files`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.paths import user_path
from phigrow.growth.axes import AxisMap
from phigrow.growth.axis_groups import AXIS_GROUPS, axis_groups, group_of, groups_of_axis
from phigrow.growth.method import GrowthTask, Method, Options, Value
from phigrow.growth.method_files import SUFFIX, is_method_file, with_source
from phigrow.growth.method_results import layers_of, maps_of, noise_of, reasons_of
from phigrow.growth.registry import find_method

_FILE = re.compile(r"(?P<path>.*\.py)(?P<options>(:\w+=[^:,=]+)*)")
REST = ""
"""The group of an entry without one: all axes that no other entry names."""

Chosen = dict[str, tuple[Method, dict[str, Value]]]
"""Group -> method and resolved options."""


@dataclass(frozen=True)
class MethodEntry:
    """One entry of a spelling: a group of axes (`REST` for the others), a method's name and its options as typed."""

    group: str
    method: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        head = f"{self.group}={self.method}" if self.group else self.method
        return ":".join([head, *(f"{name}={value}" for name, value in self.options)])


def parse_method(spelling: str) -> tuple[MethodEntry, ...]:
    """Split a spelling into its entries; names are not looked up.

    The path of an existing file may hold commas, colons and equals signs, if it is the only entry.

    Raises:
        GrowthError: a spelling that cannot be read, or two entries for one group.

    >>> parse_method("lossless,mlp=tile:scale=rms")[1]
    MethodEntry(group='mlp', method='tile', options=(('scale', 'rms'),))
    """
    if (alone := _FILE.fullmatch(spelling.strip())) is not None and user_path(alone["path"]).is_file():
        pairs = [pair.partition("=") for pair in alone["options"].split(":")[1:]]
        return (MethodEntry(REST, alone["path"], tuple((key, value) for key, _, value in pairs)),)
    entries: dict[str, MethodEntry] = {}
    for text in spelling.split(","):
        head, *rest = text.strip().split(":")
        group, equals, name = head.rpartition("=")
        pairs = [pair.partition("=") for pair in rest]
        if (equals and not group) or not name or not all(key and sign and value for key, sign, value in pairs):
            raise GrowthError(
                f"the method {spelling!r} cannot be read",
                where="method",
                fix="write it as lossless, tile:scale=preserve or hidden=lossless,mlp=tile",
            )
        if group in entries:
            raise GrowthError(
                f"{group or 'the rest'!r} is given two methods", where=f"--method {spelling}", fix="give it one"
            )
        entries[group] = MethodEntry(group, name, tuple((key, value) for key, _, value in pairs))
    return tuple(entries.values())


def is_one_name(spelling: str) -> bool:
    """Return True if a spelling is the name of one method, or the path of its file, without options and groups.

    >>> is_one_name("tile"), is_one_name("tile:scale=rms"), is_one_name("mlp=tile")
    (True, False, False)
    """
    if not set(spelling) & set(",=:"):
        return True
    return is_method_file(spelling) and user_path(spelling).is_file()


def with_paths(spelling: str, path_of: Callable[[str], Any]) -> str:
    """Return a spelling in which every path of a method file is replaced.

    Args:
        spelling: as typed.
        path_of: path as typed -> path.

    Raises:
        GrowthError: as `parse_method`.

    >>> with_paths("mlp=mine.py:gain=2", lambda path: f"methods/{path}"), with_paths("tile", str.upper)
    ('mlp=methods/mine.py:gain=2', 'tile')
    """
    if SUFFIX not in spelling:
        return spelling
    return spell_method(
        tuple(
            replace(entry, method=str(path_of(entry.method))) if is_method_file(entry.method) else entry
            for entry in parse_method(spelling)
        )
    )


def spell_method(entries: tuple[MethodEntry, ...]) -> str:
    """Write entries as `parse_method` reads them."""
    return ",".join(map(str, entries))


def resolve_method(spelling: str | Method, options: Options) -> tuple[Method, dict[str, Value]]:
    """Look up the method of a spelling, and resolve its options.

    Several entries become one method. Its claim combines the claims of its parts, and its name holds their options.

    Args:
        spelling: as typed, or a method.
        options: options given apart, for every entry whose method has them.

    Raises:
        GrowthError: a spelling that cannot be read, an unknown method, group, option or value.

    >>> resolve_method("hidden=lossless,mlp=tile", {})[0].name
    'hidden=lossless,mlp=tile:anchor=edge:scale=none'
    """
    if isinstance(spelling, Method):
        method = with_source(spelling)
        return method, method.resolve_options(options)
    entries = [(entry, find_method(entry.method)) for entry in parse_method(spelling)]
    if len(entries) == 1 and entries[0][0].group == REST:
        entry, method = entries[0]
        return method, method.resolve_options({**options, **dict(entry.options)})
    known = {option for _, method in entries for option in method.options}
    if unknown := sorted(set(options) - known):
        raise GrowthError(f"no method of {spelling!r} has an option {unknown[0]!r}", where="method", fix="leave it out")
    chosen: Chosen = {}
    for entry, method in entries:
        if entry.group not in AXIS_GROUPS and entry.group != REST:
            raise _no_group(entry)
        shared = {name: value for name, value in options.items() if name in method.options}
        resolved = method.resolve_options({**shared, **dict(entry.options)})
        chosen[entry.group] = method, resolved
        _refuse_in_mixture(method, resolved)
    return _mixture(chosen), {}


def spell_sources(spelling: str | Method, options: Options) -> str:
    """Spell a method from outside of phigrow with the paths of its files and with all of its options.

    A method without a file is spelled by its name.

    Raises:
        GrowthError: as `resolve_method`.
    """
    if isinstance(spelling, Method):
        method = with_source(spelling)
        path = method.sources[0].path if len(method.sources) == 1 and method.sources[0].package is None else None
        entries = [(MethodEntry(REST, str(path or method.name)), method)]
    else:
        entries = [(entry, find_method(entry.method)) for entry in parse_method(spelling)]
    spelled = []
    for entry, method in entries:
        given = {name: value for name, value in options.items() if name in method.options} | dict(entry.options)
        pairs = method.spell_options(method.resolve_options(given)).items()
        spelled.append(replace(entry, options=tuple(pairs)))
    return spell_method(tuple(spelled))


def _no_group(entry: MethodEntry) -> GrowthError:
    groups = groups_of_axis(entry.group)
    if not groups:
        return GrowthError(
            f"there are no axes called {entry.group!r}", where="method", fix=f"choose among {', '.join(AXIS_GROUPS)}"
        )
    instead = str(replace(entry, group=groups[0]))
    return GrowthError(
        f"{entry.group!r} is one axis of the group {groups[0]}",
        where="method",
        why=f"axes of a group grow by one method ({groups[0]}: {AXIS_GROUPS[groups[0]]})",
        fix=f"write {instead}; the groups are {', '.join(AXIS_GROUPS)}",
    )


def _refuse_in_mixture(method: Method, options: dict[str, Value]) -> None:
    if method.learns:
        raise GrowthError(
            f"{method.name} cannot be mixed with other methods",
            where="method",
            why="its maps are learned together",
            fix="use it alone",
        )
    if noise_of(method, options):
        quiet = "; take hypercloning:snr=none" if method.name == "hypercloning" else ""
        raise GrowthError(
            f"{method.name} cannot be mixed with other methods",
            where="method",
            why="its noise is added to whole matrices",
            fix=f"use it alone{quiet}",
        )


def _mixture(chosen: Chosen) -> Method:
    """One method that gives each group of axes its own."""

    def axis_maps(task: GrowthTask, _: Options) -> dict[str, AxisMap]:
        maps: dict[str, AxisMap] = {}
        for axes, method, options in _shares(task, chosen):
            made = maps_of(method, _restricted(task, axes), options)
            maps.update({axis: made[axis] for axis in axes})
        if any(axis.dense is not None for axis in maps.values()) and any(
            axis.from_next_layer is not None for axis in maps.values()
        ):
            raise task.refuse(
                "aki cannot be mixed with a method that rotates the residual stream",
                next(name for name, axis in maps.items() if axis.from_next_layer is not None),
                "neurons from the layer above read through that layer's normalisation, which is fused into its readers",
                "give the axis another method, such as lossless or lemon",
            )
        return {axis: maps[axis] for axis in task.family.axis_names}

    def approximations(task: GrowthTask, _: Options) -> list[str]:
        shares = _shares(task, chosen)
        return [reason for axes, m, options in shares for reason in reasons_of(m, _restricted(task, axes), options)]

    def notes(task: GrowthTask, _: Options) -> list[str]:
        unnamed = _unnamed(task, chosen)
        groups = dict.fromkeys(group_of(task.family, axis) for axis in unnamed if task.grows(axis))
        if not groups:
            return []
        return [f"{', '.join(groups)}: not named in the method, so grown by its first entry, {_first(chosen)[0].name}"]

    spelled = (
        MethodEntry(group, method.name, tuple(method.spell_options(options).items()))
        for group, (method, options) in chosen.items()
    )
    name = spell_method(tuple(spelled))
    noise_on = {method.noise_on for method, _ in chosen.values()}
    deepest, of_deepest = chosen.get("hidden", chosen.get(REST, _first(chosen)))
    return Method(
        name=name,
        summary=f"one method for each group of axes ({name})",
        depth=deepest.depth,
        axis_maps=axis_maps,
        approximations=approximations,
        notes=notes,
        takes_noise=all(method.takes_noise for method, _ in chosen.values()) and len(noise_on) == 1,
        noise_on=deepest.noise_on,
        layers=None if deepest.layers is None else lambda task, _: layers_of(deepest, task, of_deepest),
        sources=tuple(source for method, _ in chosen.values() for source in method.sources),
    )


def _first(chosen: Chosen) -> tuple[Method, dict[str, Value]]:
    """The first entry's method, which grows the axes that no entry names."""
    return next(iter(chosen.values()))


def _unnamed(task: GrowthTask, chosen: Chosen) -> list[str]:
    """Axes that no entry covers."""
    if REST in chosen:
        return []
    groups = axis_groups(task.family)
    return [axis for axis in task.family.axis_names if not any(axis in groups[group] for group in chosen)]


def _shares(task: GrowthTask, chosen: Chosen) -> list[tuple[list[str], Method, dict[str, Any]]]:
    """The axes of every entry, and the first entry's method for axes that none names."""
    groups = axis_groups(task.family)
    named = {axis for group in chosen if group != REST for axis in groups[group]}
    rest = [axis for axis in task.family.axis_names if axis not in named]
    shares = [(rest if group == REST else list(groups[group]), *choice) for group, choice in chosen.items()]
    if REST not in chosen:
        shares.append((rest, *_first(chosen)))
    return shares


def _restricted(task: GrowthTask, axes: list[str]) -> GrowthTask:
    """The task in which no axis grows but the given ones."""
    rotary = ["rotary"] if task.family.query in axes else []
    sizes = {name: task.dst[name] if name in (*axes, *rotary, "layer") else size for name, size in task.src.items()}
    return replace(task, dst=sizes)
