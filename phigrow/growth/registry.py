"""All width methods: phigrow's own, those of installed packages, and the files and objects that a user gives."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from phigrow.errors import GrowthError
from phigrow.files.entry_points import installed, load, package_of
from phigrow.files.paths import user_path
from phigrow.growth.method import Method
from phigrow.growth.method_files import check_declaration, is_method_file, load_method_file, with_source
from phigrow.growth.methods import built_in_methods

GROUP = "phigrow.methods"
"""Group of the entry points by which packages add methods."""


@cache
def installed_methods() -> dict[str, Method]:
    """Name -> width method, of the entry points ``phigrow.methods`` of installed packages.

    Raises:
        GrowthError: a package that cannot be imported, an entry point that is not named as its method is, or a method
            that is declared wrongly or has the name of a built-in one.
    """
    methods: dict[str, Method] = {}
    for name, point in installed(GROUP).items():
        method: Method = load(point, Method)
        where = f"entry point {name} = {point.value} of {package_of(point)}"
        check_declaration(method, where)
        if method.name != name:
            raise GrowthError(
                f"the entry point is named {name!r}, but its method {method.name!r}",
                where=where,
                fix="give both the same name",
            )
        method = with_source(method)
        sources = tuple(replace(source, package=package_of(point)) for source in method.sources)
        methods[name] = replace(method, sources=sources)
    return methods


def all_methods() -> dict[str, Method]:
    """Name -> width method: the built-in ones, and those of installed packages.

    Raises:
        GrowthError: as `installed_methods`.
    """
    return {**built_in_methods(), **installed_methods()}


def find_method(name: str) -> Method:
    """Return the width method of a name, or of the path of a Python file, which ends in ``.py``.

    Raises:
        GrowthError: no method has the name, or the file cannot be used (`load_method_file`).
    """
    if name in built_in_methods():
        return built_in_methods()[name]
    if is_method_file(name):
        return load_method_file(name)
    if name not in all_methods():
        is_file = user_path(f"{name}.py").is_file()
        raise GrowthError(
            f"method {name!r} is unknown",
            where="method",
            fix=f"write {name}.py for the file of this name"
            if is_file
            else f"choose one of {', '.join(all_methods())}, or give the path of a method file, which ends in .py",
        )
    return all_methods()[name]
