"""Pretrain a causal language model with DeepSpeed, from scratch or from any checkpoint folder.

This package knows nothing of growth. It treats a grown checkpoint like any other folder, so growth cannot influence the
from-scratch arm. Importing this package loads neither torch, transformers nor deepspeed.

>>> from phigrow.training import load_run_config, train
>>> config = load_run_config(steps=200, out="runs/first")
>>> train(config)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phigrow.training.configuration import DEMO_MODEL, RunConfig
    from phigrow.training.entry import main
    from phigrow.training.loop import Summary, train
    from phigrow.training.options import load_run_config
    from phigrow.training.value_rates import freeze_copied, fresh_lr

__all__ = ["DEMO_MODEL", "RunConfig", "Summary", "freeze_copied", "fresh_lr", "load_run_config", "main", "train"]

_HOME = {
    "DEMO_MODEL": "configuration",
    "RunConfig": "configuration",
    "Summary": "loop",
    "freeze_copied": "value_rates",
    "fresh_lr": "value_rates",
    "load_run_config": "options",
    "main": "entry",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
