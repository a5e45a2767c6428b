"""Optimizers, one file each; `phigrow.training.optimizer_spec` finds a module here by the name of its file."""

from __future__ import annotations

import importlib
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


def default_grad_clip(name: str) -> float:
    """Return the default of the setting ``grad_clip`` for an optimizer."""
    value: float = importlib.import_module(f"{__name__}.{name}").OPTIMIZER.grad_clip
    return value


def check_optimizer(name: str) -> None:
    """Refuse a name that no optimizer has.

    Raises:
        GrowthError: there is no optimizer of this name.
    """
    if name not in optimizer_names():
        raise GrowthError(
            f"there is no optimizer {name!r}",
            where="optimizer",
            fix=f"choose one of {', '.join(optimizer_names())}. A folder of 'phigrow grow-optimizer' belongs into "
            "init_optimizer",
        )
