"""Ask a method for its maps and its claims, and check what it returns."""

from __future__ import annotations

from typing import Any

import numpy as np

from phigrow.growth.axes import AxisMap
from phigrow.growth.axis_groups import axis_label
from phigrow.growth.method import NEW, GrowthTask, LayerMap, Method, MethodError, Options
from phigrow.growth.method_files import call, place_of

_COLUMNS = {
    "source": np.int64, "is_mean": np.bool_, "write": np.float64, "read": np.float64, "write_random": np.bool_,
    "read_random": np.bool_,
}  # fmt: skip
"""The arrays of an axis map, one value a destination coordinate, and their dtypes."""


def maps_of(method: Method, task: GrowthTask, options: Options) -> dict[str, AxisMap]:
    """Return the axis maps of a method, one for every axis of the family.

    Raises:
        GrowthError: the method refuses the growth.
        MethodError: a map is missing, of the wrong sizes, or holds gains that are not finite. The message has the axis
            and the line of the method's function.
    """
    maps = call(method, method.axis_maps, task, options)
    place, names = place_of(method, method.axis_maps), task.family.axis_names
    if not isinstance(maps, dict):
        raise MethodError(
            f"axis_maps of method {method.name} returned a {type(maps).__name__}",
            where=place,
            fix="return a dict: axis name -> AxisMap",
        )
    if missing := [name for name in names if name not in maps]:
        raise MethodError(
            f"axis_maps of method {method.name} returned no map for {', '.join(missing)}",
            where=place,
            why=f"the axes of a {task.family.model_type} are {', '.join(names)}",
            fix="return a map for each of task.family.axis_names",
        )
    for name in names:
        if (problem := _problem(maps[name], *task.sizes(name))) is not None:
            label = axis_label(task.family, name)
            raise MethodError(
                f"method {method.name} returned a wrong map for axis {name}: {problem}",
                where=f"{place}, axis {label}, met first in {task.family.first_use(name)}",
                fix="build the map with phigrow.methods.axis_map, from sources of the axis",
            )
    return {name: axis for name, axis in maps.items() if name in names}


def _problem(axis: Any, src_size: int, dst_size: int) -> str | None:
    """Return the first fault of an axis map, or None."""
    if not isinstance(axis, AxisMap):
        return f"it is a {type(axis).__name__}, not an AxisMap"
    for column, dtype in _COLUMNS.items():
        values = getattr(axis, column)
        if not isinstance(values, np.ndarray) or values.shape != (dst_size,):
            shape = list(values.shape) if isinstance(values, np.ndarray) else f"of a {type(values).__name__}"
            return f"{column} has shape {shape}, and the destination has {dst_size} coordinates"
        if values.dtype != dtype:
            return f"{column} has dtype {values.dtype}, not {np.dtype(dtype)}"
    if axis.src_size != src_size:
        return f"src_size is {axis.src_size}, and the source has {src_size} coordinates"
    if (wrong := np.flatnonzero((axis.source < -1) | (axis.source >= src_size))).size:
        k = int(wrong[0])
        return f"coordinate {k} copies source coordinate {axis.source[k]}, and the source has {src_size}"
    for column in ("write", "read"):
        if (wrong := np.flatnonzero(~np.isfinite(getattr(axis, column)))).size:
            k = int(wrong[0])
            return f"the {column} gain of coordinate {k} is {getattr(axis, column)[k]}"
    return None if np.isfinite(axis.fresh_bias) else f"fresh_bias is {axis.fresh_bias}"


def reasons_of(method: Method, task: GrowthTask, options: Options) -> list[str]:
    """Return the reasons for which a method changes the function.

    Raises:
        MethodError: the method returned something other than a list of texts.
    """
    return _texts(method, "approximations", call(method, method.approximations, task, options))


def notes_of(method: Method, task: GrowthTask, options: Options) -> list[str]:
    """Return the remarks of a method for the user.

    Raises:
        MethodError: the method returned something other than a list of texts.
    """
    return _texts(method, "notes", call(method, method.notes, task, options))


def _texts(method: Method, field: str, given: Any) -> list[str]:
    if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
        raise MethodError(
            f"{field} of method {method.name} returned {given!r}",
            where=place_of(method, getattr(method, field)),
            fix="return a list of texts; an empty list claims that the function is preserved"
            if field == "approximations"
            else "return a list of texts",
        )
    return list(given)


def noise_of(method: Method, options: Options) -> float | None:
    """Return the noise that belongs to a method, or None.

    Raises:
        MethodError: it is not a number of 0 or more.
    """
    if method.own_noise is None:
        return None
    noise = call(method, method.own_noise, options)
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not (np.isfinite(noise) and noise >= 0):
        raise MethodError(
            f"own_noise of method {method.name} returned {noise!r}",
            where=place_of(method, method.own_noise),
            fix="return a number, 0 or more",
        )
    return float(noise)


def layers_of(method: Method, task: GrowthTask, options: Options) -> LayerMap:
    """Return the layer map of a method that has its own.

    Raises:
        MethodError: it does not fit the numbers of layers.
    """
    assert method.layers is not None, "the method has a layer map of its own"
    given, (src, dst) = call(method, method.layers, task, options), task.sizes("layer")
    try:
        layers, identity = tuple(map(int, given[0])), frozenset(map(int, given[1]))
        fits = len(given) == 2 and len(layers) == dst and all(NEW <= layer < src for layer in layers)
        fits = fits and all(0 <= k < dst and layers[k] != NEW for k in identity)
    except (TypeError, ValueError, IndexError):
        fits = False
    if not fits:
        raise MethodError(
            f"layers of method {method.name} returned {given!r}",
            where=place_of(method, method.layers),
            why=f"the source has {src} layers and the destination {dst}",
            fix="return the source layer of every destination layer (-1 for a layer of new values), and the set of "
            "identity layers",
        )
    return layers, identity
