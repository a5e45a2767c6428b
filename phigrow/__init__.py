"""phigrow: grow small pretrained Phi language models into larger ones, and measure the saving.

Importing it has no effects. A public name is loaded from its module at its first use, so that the command line, the
ranks of a training run and the measurement of records load only what they need; neither torch nor transformers is
loaded by the import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phigrow.errors import GrowthError
    from phigrow.expansion.expand import expand, expand_model
    from phigrow.expansion.grow_optimizer import grow_optimizer
    from phigrow.expansion.verify import Certificate, verify
    from phigrow.growth.plan import Plan
    from phigrow.growth.planner import plan

__version__ = "0.1.0"

__all__ = ["Certificate", "GrowthError", "Plan", "expand", "expand_model", "grow_optimizer", "plan", "verify"]

_MODULES = {
    "Certificate": "phigrow.expansion.verify",
    "GrowthError": "phigrow.errors",
    "Plan": "phigrow.growth.plan",
    "expand": "phigrow.expansion.expand",
    "expand_model": "phigrow.expansion.expand",
    "grow_optimizer": "phigrow.expansion.grow_optimizer",
    "plan": "phigrow.growth.planner",
    "verify": "phigrow.expansion.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
