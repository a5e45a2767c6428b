"""Cost of the training of a checkpoint, and its growth, read from the files in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.checkpoints.provenance import TrainingCost, read_provenance, read_training, training_cost
from phigrow.training.configuration import RunConfig
from phigrow.training.settings import SCRATCH

NOTHING = TrainingCost(0, 0.0, 0.0)


@dataclass(frozen=True)
class InitSource:
    """Origin of a run's first weights: the arm's name, the cost of earlier training, and the growth, if any.

    ``expand_seconds`` is what the expansion took, of weights and of the optimizer's state; its FLOPs, one
    multiplication a value, are fewer than a token's. Where its maps were learned, all three count that.
    """

    arm: str
    cost: TrainingCost
    growth: dict[str, Any] | None = None
    expand_seconds: float | None = None
    expand_tokens: float = 0
    expand_flops: float = 0.0

    @property
    def before(self) -> TrainingCost:
        """Everything that was spent before the run's first step, the expansion included."""
        return self.cost.plus(TrainingCost(self.expand_tokens, self.expand_flops, self.expand_seconds or 0.0))


def run_folder(config: RunConfig, source: InitSource | None = None) -> Path:
    """Return the folder of a run: the one that it names, else one made of the names of its model and its arm."""
    if config.out is not None:
        return Path(config.out)
    source = source or source_of(config)
    return Path(f"runs/{config.model_name}-{source.arm}-seed{config.seed}")


def source_of(config: RunConfig) -> InitSource:
    """Return the name, the sunk cost and the growth of a run's initialisation.

    A folder that ``phigrow expand`` wrote carries its source's cost in ``phigrow.json``; one that a run exported
    carries its own in ``training.json``; any other says nothing, and its cost is unknown unless the run gives it.

    Raises:
        GrowthError: one of these files cannot be read.
    """
    if config.init == SCRATCH:
        return InitSource(config.arm or SCRATCH, NOTHING)
    folder, growth, cost, took, learning = Path(config.init), None, TrainingCost(), None, NOTHING
    if (grown := read_provenance(folder)) is not None:
        growth = {
            "method": grown.plan.get("method"),
            "depth": grown.plan.get("depth"),
            "plan_hash": grown.plan_hash,
            "source": grown.source_name,
        }
        if grown.method_summary is not None:
            growth["summary"] = grown.method_summary
        cost, learning, took = grown.source_cost, grown.learning_cost, grown.seconds
        took = None if took is None else took + (learning.seconds or 0.0)
    elif (trained := read_training(folder)) is not None:
        cost = training_cost(trained)
    given = (config.source_tokens, config.source_flops, config.source_seconds)
    cost = TrainingCost(
        *(own if own is not None else recorded for own, recorded in zip(given, cost.values(), strict=True))
    )
    arm = config.arm or (growth or {}).get("method") or "continued"
    return InitSource(arm, cost, growth, took, learning.tokens or 0, learning.flops or 0.0)
