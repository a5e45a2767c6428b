"""Settings that runs of earlier releases recorded under other names."""

from __future__ import annotations

from typing import Any


def with_current_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run under their names of today.

    Before ``init_optimizer`` existed, ``optimizer`` was the folder of a grown optimizer state, and AdamW
    the only optimizer.

    >>> with_current_names({"lr": 0.001, "optimizer": "grown-optimizer"})
    {'lr': 0.001, 'init_optimizer': 'grown-optimizer'}
    >>> with_current_names({"optimizer": "adamw", "init_optimizer": None})
    {'optimizer': 'adamw', 'init_optimizer': None}
    """
    if "init_optimizer" in settings or settings.get("optimizer") == "adamw":
        return settings
    return {"init_optimizer" if key == "optimizer" else key: value for key, value in settings.items()}
