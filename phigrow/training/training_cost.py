"""What the training of a checkpoint cost, and how it was grown: read from the files that lie in its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.training.configuration import RunConfig
from phigrow.training.settings import SCRATCH

GROWN_FILE = "phigrow.json"
TRAINING_FILE = "training.json"


@dataclass(frozen=True)
class Cost:
    """Tokens, FLOPs and seconds of training; None where nobody knows."""

    tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None

    def plus(self, other: Cost) -> Cost:
        """The sum; what either does not know, the sum does not know."""
        return Cost(
            *(
                None if mine is None or theirs is None else mine + theirs
                for mine, theirs in zip(self.values(), other.values(), strict=True)
            )
        )

    def values(self) -> tuple[float | None, float | None, float | None]:
        """tokens, flops, seconds."""
        return self.tokens, self.flops, self.seconds


NOTHING = Cost(0, 0.0, 0.0)


@dataclass(frozen=True)
class Source:
    """Where a run starts: the arm's name, what training came before it, and the growth that made it (None: none did).

    ``expand_seconds`` is what the expansion took, of weights and of the optimizer's state; its FLOPs, one
    multiplication a value, are fewer than a token's. Where its maps were learned, all three count that.
    """

    arm: str
    cost: Cost
    growth: dict[str, Any] | None = None
    expand_seconds: float | None = None
    expand_tokens: float = 0
    expand_flops: float = 0.0

    @property
    def before(self) -> Cost:
        """Everything that was spent before the run's first step, the expansion included."""
        return self.cost.plus(Cost(self.expand_tokens, self.expand_flops, self.expand_seconds or 0.0))


def source_of(config: RunConfig) -> Source:
    """Return the name, the sunk cost and the growth of a run's initialisation.

    A folder that ``phigrow expand`` wrote carries its source's cost in ``phigrow.json``; one that a run exported
    carries its own in ``training.json``; any other says nothing, and its cost is unknown unless the run gives it.

    Raises:
        GrowthError: one of these files cannot be read.
    """
    if config.init == SCRATCH:
        return Source(config.arm or SCRATCH, NOTHING)
    folder, growth, cost, took, learning = Path(config.init), None, Cost(), None, NOTHING
    if (grown := _read(folder / GROWN_FILE)) is not None:
        plan = _mapping(grown.get("plan"))
        growth = {
            "method": plan.get("method"),
            "depth": plan.get("depth"),
            "plan_hash": plan.get("hash"),
            "source": _mapping(grown.get("source")).get("name"),
        }
        cost = _cost(_mapping(grown.get("source")).get("training"))
        took = _cost(grown).seconds
        if (learned := grown.get("learning")) is not None:
            learning = _cost(_mapping(learned).get("cost"))
            took = None if took is None else took + (learning.seconds or 0.0)
    elif (trained := _read(folder / TRAINING_FILE)) is not None:
        cost = _cost(trained)
    given = (config.source_tokens, config.source_flops, config.source_seconds)
    cost = Cost(*(own if own is not None else found for own, found in zip(given, cost.values(), strict=True)))
    arm = config.arm or (growth or {}).get("method") or "continued"
    return Source(arm, cost, growth, took, learning.tokens or 0, learning.flops or 0.0)


def _cost(training: Any) -> Cost:
    values = (_mapping(training).get(key) for key in ("tokens", "flops", "seconds"))
    return Cost(*(value if isinstance(value, int | float) else None for value in values))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GrowthError("a file of costs that cannot be read", where=str(path), why=str(error)) from error
    return _mapping(content)
