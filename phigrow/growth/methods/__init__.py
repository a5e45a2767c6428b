"""Growth methods, one file each; every module here that defines ``METHOD`` is registered by its name.

`phigrow.growth.registry` adds those of installed packages and of the user's files.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from phigrow.growth.method import Method


@cache
def built_in_methods() -> dict[str, Method]:
    """Name -> width method, of every module in this package."""
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    methods = [module.METHOD for module in modules if hasattr(module, "METHOD")]
    return {method.name: method for method in sorted(methods, key=lambda method: method.name)}
