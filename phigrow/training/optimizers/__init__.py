"""Optimizers, one file each; `phigrow.training.optimizer_spec` finds a module here by the name of its file."""

from __future__ import annotations

import pkgutil
from functools import cache

from phigrow.errors import GrowthError


@cache
def optimizer_names() -> tuple[str, ...]:
    """Return the names of all optimizers, without importing them.

    >>> "adamw" in optimizer_names()
    True
    """
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def check_optimizer(name: str) -> None:
    """Refuse a name that no optimizer has.

    Raises:
        GrowthError: there is none.
    """
    if name not in optimizer_names():
        raise GrowthError(
            f"there is no optimizer {name!r}",
            where="optimizer",
            fix=f"choose one of {', '.join(optimizer_names())}; give the folder of 'phigrow grow-optimizer' as "
            "init_optimizer",
        )
