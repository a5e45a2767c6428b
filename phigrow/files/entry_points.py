"""Find what installed packages add to phigrow through their entry points."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from phigrow.errors import GrowthError


@cache
def installed(group: str) -> dict[str, EntryPoint]:
    """Return name -> entry point of a group, ``phigrow.methods`` or ``phigrow.families``. Nothing is imported.

    Raises:
        GrowthError: two packages have an entry point of the same name.
    """
    points: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=group)):
        if (other := points.get(point.name)) is not None and other.value != point.value:
            raise GrowthError(
                f"two packages define {point.name!r}",
                where=f"entry points of {group}",
                why=f"they are {package_of(other)} ({other.value}) and {package_of(point)} ({point.value})",
                fix="uninstall one of them",
            )
        points[point.name] = point
    return points


def package_of(point: EntryPoint) -> str:
    """Return the name and version of the package that has an entry point."""
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown package"


def load(point: EntryPoint, kind: type) -> Any:
    """Import the object of an entry point.

    Raises:
        GrowthError: the import fails, or the object is of another kind.
    """
    place = f"entry point {point.name} = {point.value} of {package_of(point)}"
    try:
        value = point.load()
    except Exception as error:  # code of another package runs here
        raise GrowthError(
            f"an installed package cannot be imported: {type(error).__name__}: {error}",
            where=place,
            fix="update that package, or uninstall it",
        ) from error
    if not isinstance(value, kind):
        raise GrowthError(
            f"an entry point is a {type(value).__name__}, not a {kind.__name__}",
            where=place,
            fix=f"let it name an object of class {kind.__module__}.{kind.__name__}",
        )
    return value
