"""Growth methods, one file each; every module here that defines ``METHOD`` is registered by its name."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from phigrow.errors import GrowthError
from phigrow.growth.method import Method


@cache
def all_methods() -> dict[str, Method]:
    """Name -> width method, of every module in this package."""
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    methods = [module.METHOD for module in modules if hasattr(module, "METHOD")]
    return {method.name: method for method in sorted(methods, key=lambda method: method.name)}


def find_method(name: str) -> Method:
    """Return the width method of a name.

    Raises:
        GrowthError: no method has the name.
    """
    if name not in all_methods():
        raise GrowthError(
            f"method {name!r} is unknown", where="method", fix=f"choose one of {', '.join(all_methods())}"
        )
    return all_methods()[name]
