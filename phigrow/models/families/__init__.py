"""Architectures, one file each; each module here defines ``FAMILY``. Installed packages may add others."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from phigrow.errors import GrowthError
from phigrow.files.entry_points import installed, load, package_of
from phigrow.models.config import Config
from phigrow.models.family import Family

GROUP = "phigrow.families"
"""Group of the entry points by which packages add families."""


@cache
def built_in_families() -> dict[str, Family]:
    """Return name -> family for every module in this package."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").FAMILY for name in names}


@cache
def installed_families() -> dict[str, Family]:
    """Return name -> family of the entry points ``phigrow.families`` of installed packages.

    Raises:
        GrowthError: a package that cannot be imported, an entry point that is not named as its family is, or a family
            with the name or the model type of another one.
    """
    families: dict[str, Family] = {}
    for name, point in installed(GROUP).items():
        family: Family = load(point, Family)
        others = {**built_in_families(), **families}
        taken = name in others or family.model_type in {other.model_type for other in others.values()}
        if family.name != name or taken:
            raise GrowthError(
                f"the family {family.name!r} of model_type {family.model_type!r} cannot be added",
                where=f"entry point {name} = {point.value} of {package_of(point)}",
                why="another family has that name or model_type"
                if taken
                else f"the entry point is named {name!r}, but the family {family.name!r}",
                fix="uninstall that package, or give its family a name and a model_type of its own",
            )
        families[name] = family
    return families


_used: ContextVar[tuple[Family, ...]] = ContextVar("_used", default=())


@contextmanager
def use_family(family: Family) -> Iterator[None]:
    """Let phigrow know a family that no package has registered, in place of any other of its model type; a context."""
    token = _used.set((family, *_used.get()))
    try:
        yield
    finally:
        _used.reset(token)


def used_families() -> dict[str, Family]:
    """Return name -> family of the contexts `use_family` around the caller; the innermost comes first."""
    families: dict[str, Family] = {}
    for family in _used.get():
        families.setdefault(family.name, family)
    return families


def all_families() -> dict[str, Family]:
    """Return name -> family: the built-in ones, those of installed packages, and those of `use_family`.

    Raises:
        GrowthError: as `installed_families`.
    """
    return {**built_in_families(), **installed_families(), **used_families()}


def find_family(name: object) -> Family | None:
    """Return the family of a name; None if there is none. Packages are imported only for names of their own."""
    for families in (used_families, built_in_families, installed_families):
        for family in families().values():
            if family.name == name:
                return family
    return None


def family_of(config: Config, where: str) -> Family:
    """Return the family of a configuration, by its ``model_type``.

    Raises:
        GrowthError: no family has that model type.
    """
    model_type = config.get("model_type")
    for families in (used_families, built_in_families, installed_families):
        for family in families().values():
            if family.model_type == model_type:
                return family
            if model_type in family.former_model_types:
                raise GrowthError(
                    f"phigrow does not read the first {family.model_type} uploads, which have model_type "
                    f"{model_type!r}",
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
