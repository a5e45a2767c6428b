"""Cost of the training of a checkpoint, and its growth, read from the files in its folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.checkpoints.provenance import Provenance, TrainingCost, read_provenance, read_training, training_cost
from phigrow.training.configuration import RunConfig
from phigrow.training.settings import SCRATCH

NOTHING = TrainingCost(0, 0.0, 0.0)
DISTILLED = "-distilled"
"""End of the name of an arm that has a teacher, where the run does not name it."""


@dataclass(frozen=True)
class InitSource:
    """Origin of a run's first weights: the arm's name, the cost of earlier training, and the growth, if any.

    ``expand_seconds`` is the time of expanding the weights and growing the optimizer's state. The FLOPs of an
    expansion, one multiplication per value, are fewer than those of one token and are not counted. The cost of learned
    maps is part of all three ``expand_`` fields.
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

    A folder of ``phigrow expand`` has its source's cost in ``phigrow.json``, and a run's export has its own cost in
    ``training.json``. The cost of any other folder is unknown unless the run gives it. The training of a teacher counts
    too, but only once if the teacher is the source of the growth.

    Raises:
        GrowthError: one of these files cannot be read.
    """
    taught = DISTILLED if config.teacher is not None else ""
    if config.init == SCRATCH:
        cost = NOTHING if config.teacher is None else _with_given(config, _own_cost(Path(config.teacher)))
        return InitSource(config.arm or SCRATCH + taught, cost)
    folder, growth, cost, took, learning = Path(config.init), None, TrainingCost(), None, NOTHING
    grown = read_provenance(folder)
    if grown is not None:
        growth = {
            "method": grown.plan.get("method"),
            "depth": grown.plan.get("depth"),
            "plan_hash": grown.plan_hash,
            "source": grown.source_name,
        }
        if isinstance(files := grown.plan.get("method_files"), dict) and files:
            growth["method_files"] = files
        if grown.method_summary is not None:
            growth["summary"] = grown.method_summary
        cost, learning, took = grown.source_cost, grown.learning_cost, grown.seconds
        took = None if took is None else took + (learning.seconds or 0.0)
    else:
        cost = _own_cost(folder)
    cost = _with_given(config, cost)
    if config.teacher is not None and not _is_counted(Path(config.teacher), folder, grown):
        cost = cost.plus(_own_cost(Path(config.teacher)))
    arm = config.arm or ((growth or {}).get("method") or "continued") + taught
    return InitSource(arm, cost, growth, took, learning.tokens or 0, learning.flops or 0.0)


def _own_cost(folder: Path) -> TrainingCost:
    """Return what an exported checkpoint records about its own training."""
    return training_cost(read_training(folder))


def _with_given(config: RunConfig, cost: TrainingCost) -> TrainingCost:
    """Return a cost with the parts that the run gives instead."""
    given = (config.source_tokens, config.source_flops, config.source_seconds)
    return TrainingCost(
        *(own if own is not None else recorded for own, recorded in zip(given, cost.values(), strict=True))
    )


def _is_counted(teacher: Path, init: Path, grown: Provenance | None) -> bool:
    """Return true if a teacher is the run's initial checkpoint, or the source from which it was grown.

    The weights decide, and not the folder's name: their sizes and hashes must equal those in ``phigrow.json``.
    """
    if teacher.resolve() == init.resolve():
        return True
    files = grown.source_files if grown else {}
    return bool(files) and all(_is_file(teacher / name, entry) for name, entry in files.items())


def _is_file(path: Path, entry: dict[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    with path.open("rb") as file:
        return bool(hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"])
