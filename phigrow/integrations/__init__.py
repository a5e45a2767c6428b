"""Write phigrow's records from other training loops: Hugging Face's Trainer, TRL and accelerate.

Importing this package loads neither transformers nor accelerate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phigrow.integrations.accelerate_tracker import RecordsTracker
    from phigrow.integrations.run_recorder import RunRecorder
    from phigrow.integrations.trainer_callback import RecordsCallback

__all__ = ["RecordsCallback", "RecordsTracker", "RunRecorder"]

_HOME = {
    "RecordsCallback": "trainer_callback",
    "RecordsTracker": "accelerate_tracker",
    "RunRecorder": "run_recorder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
