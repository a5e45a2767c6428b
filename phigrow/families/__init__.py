"""Architectures, one file each; a module here that defines ``FAMILY`` is found by its name."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from phigrow.config import Config
from phigrow.errors import GrowthError
from phigrow.family import Family


@cache
def all_families() -> dict[str, Family]:
    """Name -> family, of every module in this package."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").FAMILY for name in names}


def family_of(config: Config, where: str) -> Family:
    """The family of a configuration, by its ``model_type``.

    Raises:
        GrowthError: no family has that model type.
    """
    model_type = config.get("model_type")
    for family in all_families().values():
        if family.model_type == model_type:
            return family
    known = ", ".join(sorted(family.model_type for family in all_families().values()))
    raise GrowthError(
        f"not a Phi: model_type is {model_type!r}",
        where=where,
        why=f"phigrow has tables for these model types: {known}",
        fix="use a checkpoint of one of them; the first phi uploads ('phi-msft', 'mixformer-sequential') need their "
        "current revision",
    )
