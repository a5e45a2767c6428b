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
    """Return the value of the setting ``grad_clip`` with an optimizer, if it is not set."""
    value: float = importlib.import_module(f"{__name__}.{name}").OPTIMIZER.grad_clip
    return value


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
