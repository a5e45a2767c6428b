"""phigrow: grow small pretrained Phi language models into larger ones, and measure what growth saved.

Importing it has no effects and loads neither torch nor transformers.
"""

from typing import TYPE_CHECKING, Any

from phigrow.errors import GrowthError
from phigrow.expansion.expand import expand, expand_model
from phigrow.expansion.verify import Certificate, verify
from phigrow.growth.plan import Plan

# These two come last: `plan` and `verify` are functions here, and the submodules of the same names stay importable.
from phigrow.growth.planner import plan

if TYPE_CHECKING:
    from phigrow.expansion.grow_optimizer import grow_optimizer

__version__ = "0.1.0"

__all__ = ["Certificate", "GrowthError", "Plan", "expand", "expand_model", "grow_optimizer", "plan", "verify"]


def __getattr__(name: str) -> Any:
    if name != "grow_optimizer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from phigrow.expansion.grow_optimizer import (
        grow_optimizer,  # it knows training's checkpoints, which measuring must not load
    )

    return grow_optimizer
