"""One recorded training run, as columns of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Key = tuple[int | None, int]
"""Seed of the source (None if it does not exist or was not recorded) and seed of the run."""

Columns = Mapping[str, NDArray[Any]]
"""One array a key, all of one length; ``step`` is int64, everything else float64."""


@dataclass(frozen=True)
class Run:
    """One recorded training run.

    Attributes:
        folder: of its records.
        arm, seed: name of the arm and seed of the run.
        meta: the ``run`` record without its type.
        steps: columns ``step``, ``tokens``, ``flops``, ``seconds``, ``loss`` (nats per token), ``lr``, ``grad_norm``,
            ``tokens_per_second`` and ``data_wait`` (share of the step spent waiting for data), nan where they were not
            recorded; ``skipped`` and ``spike`` are 0 or 1.
        evals: columns ``step``, ``tokens``, ``flops``, ``seconds`` and ``loss``.
        notes: sentences about anything unusual in the records.
        sources: held-out loss of each named source, one value an evaluation, nan where it is missing.
        diagnostics: ``step`` and the recorded columns of ``DIAGNOSTICS``.
        group_losses, group_blocks: of the last evaluation, the loss of each group of held-out blocks and the number of
            its blocks; empty where they were not recorded.
        resumes: the ``resume`` records, in order. ``meta`` has the machine that began the run.
    """

    folder: Path
    arm: str
    seed: int
    meta: dict[str, Any]
    steps: Columns
    evals: Columns
    notes: tuple[str, ...] = ()
    sources: Columns = field(default_factory=dict)
    diagnostics: Columns = field(default_factory=dict)
    group_losses: NDArray[Any] = field(default_factory=lambda: np.empty(0))
    group_blocks: NDArray[Any] = field(default_factory=lambda: np.empty(0))
    resumes: tuple[dict[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Arm and seeds in words, for messages."""
        source = "" if self.source_seed is None else f"source seed {self.source_seed}, "
        return f"{self.arm}, {source}seed {self.seed}"

    @property
    def study(self) -> dict[str, Any]:
        """Information that a study added to the record (``StudyInfo``); empty for a run without a study."""
        info = self.meta.get("study")
        return info if isinstance(info, dict) else {}

    @property
    def source_seed(self) -> int | None:
        """The seed of the source's own training, if it was recorded."""
        return self.study.get("source_seed")

    @property
    def key(self) -> Key:
        """Seed of the source and seed of the run. It is unique among the runs of one arm and budget."""
        return (self.source_seed, self.seed)

    @property
    def is_flat(self) -> bool:
        """True for a model of another size that was trained from scratch for the flat frontier."""
        return self.study.get("flat") is True

    @property
    def is_source_of_study(self) -> bool:
        """True for a source that a study trained: it is no arm, even if nothing that was grown from it is there."""
        return self.meta.get("arm") == "source" and "side_by_side" in self.study

    @property
    def is_refined(self) -> bool:
        """True for an end that was added where a cost had been read between two other ends."""
        return self.study.get("refined") is True

    @property
    def shared_machine(self) -> bool:
        """True if other runs shared the machine. The seconds are then no measure of the run's cost."""
        return bool(self.study.get("side_by_side", 1) > 1)

    @property
    def has_unknown_schedule(self) -> bool:
        """True for the log of another trainer, if nobody states that its learning rate has decayed at its end."""
        return self._log.get("decayed") is False

    @property
    def has_unknown_text(self) -> bool:
        """True for the log of another trainer, if nobody states that it read the text of the other runs of its seed."""
        return self._log.get("paired") is False

    @property
    def _log(self) -> dict[str, Any]:
        log = self.meta.get("log")
        return log if isinstance(log, dict) else {}

    @property
    def trunk(self) -> str | None:
        """The name that a trunk and its branches share; None for a run that stands alone."""
        return self.meta.get("trunk")

    @property
    def is_trunk(self) -> bool:
        """True for a trunk, whose own schedule never decays: its record has ``"budget": null``."""
        return self.trunk is not None and "budget" in self.meta and self.meta["budget"] is None

    @property
    def budget(self) -> int | None:
        """Steps after which the schedule has decayed: ``budget``, else ``config.steps``, else None."""
        config = self.meta.get("config")
        for value in (self.meta.get("budget"), config.get("steps") if isinstance(config, dict) else None):
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None

    @property
    def schedule(self) -> str | None:
        """The name of the learning-rate schedule, if it was recorded."""
        config = self.meta.get("config")
        return config.get("schedule") if isinstance(config, dict) else None

    @property
    def finished(self) -> bool:
        """True if the last evaluation is at the end of the schedule, or if no length was recorded."""
        return self.budget is None or int(self.evals["step"][-1]) >= self.budget

    @property
    def diverged_at(self) -> int | None:
        """The first step whose training or held-out loss is not finite; None if all are finite.

        Skipped steps do not count, because they changed nothing.
        """
        broken = [c["step"][~np.isfinite(c["loss"]) & (c.get("skipped", 0.0) == 0)] for c in (self.steps, self.evals)]
        return min((int(steps[0]) for steps in broken if len(steps)), default=None)

    def has_unit(self, unit: str) -> bool:
        """Return True if all evaluations have this cost."""
        return bool(np.isfinite(self.evals[unit]).all())

    def held_out(self, step: int) -> float | None:
        """Return the held-out loss after exactly ``step`` updates (0: before the first update), or None."""
        (hits,) = np.nonzero(self.evals["step"] == step)
        return float(self.evals["loss"][hits[0]]) if len(hits) else None

    def source_cost(self, unit: str) -> float:
        """Return the cost of the source's training (``source_tokens``, ...); nan if it was not recorded."""
        return self._meta_number(f"source_{unit}", math.nan)

    def expand_cost(self, unit: str) -> float:
        """Return the cost of the expansion, learned maps included (``expand_seconds``, ...); 0 if not recorded."""
        return self._meta_number(f"expand_{unit}", 0.0)

    def _meta_number(self, key: str, otherwise: float) -> float:
        value = self.meta.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


Budgets = dict[int | None, Run]
"""Runs of one arm and key by budget (steps after which the schedule has decayed), in order."""

Seeds = dict[Key, Budgets]
"""Runs of one arm: by seed of the source and seed of the run, then by budget, both in order."""
