"""Architectures, one file each; each module here defines ``FAMILY``."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from phigrow.errors import GrowthError
from phigrow.models.config import Config
from phigrow.models.family import Family


@cache
def all_families() -> dict[str, Family]:
    """Return name -> family for every module in this package."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").FAMILY for name in names}


def family_of(config: Config, where: str) -> Family:
    """Return the family of a configuration, by its ``model_type``.

    Raises:
        GrowthError: no family has that model type.
    """
    model_type = config.get("model_type")
    for family in all_families().values():
        if family.model_type == model_type:
            return family
        if model_type in family.former_model_types:
            raise GrowthError(
                f"phigrow does not read the first {family.model_type} uploads, which have model_type {model_type!r}",
                where=where,
                why="transformers loads them only by running code that comes with the weights, which phigrow never "
                "does, and their tensors have other names and a fused Wqkv",
                fix=family.former_advice,
            )
    known = ", ".join(sorted(family.model_type for family in all_families().values()))
    raise GrowthError(
        f"phigrow does not support model_type {model_type!r}",
        where=where,
        why=f"it has family tables for these model types: {known}",
        fix="use a checkpoint of one of them; phigrow never runs code that comes with a checkpoint (auto_map)",
    )
