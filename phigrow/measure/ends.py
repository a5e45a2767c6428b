"""The decayed ends of an arm as one fitted curve of loss over cost, and the effect of each run on a reading of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from phigrow.measure.loss_fit import LossFit, Reading
from phigrow.records.run import Budgets, Key, Run
from phigrow.records.schema import Unit

Floats = NDArray[np.float64]

DIVERGED = 1.1
"""An end has diverged if its loss is higher than this times that of a smaller budget of the same run."""

FEWEST_ENDS = 4
"""Ends that a run needs before one of them, no better than an end of half its budget, is left out."""


@dataclass(frozen=True)
class Effects:
    """Deviations of a reading, for each run and for each group of held-out blocks.

    ``runs`` has, for each key, the reading of this run alone minus the reading of all runs, to first order. ``text``
    has the same for each group of held-out blocks; None if the groups were not recorded.
    """

    runs: dict[Key, float]
    text: Floats | None

    def times(self, factor: float) -> Effects:
        """Return all effects multiplied by a number."""
        text = None if self.text is None else factor * self.text
        return Effects({key: factor * value for key, value in self.runs.items()}, text)

    def plus(self, other: Effects) -> Effects:
        """Return the sum with the effects of runs that are paired by their own seed, such as the baseline's."""
        shared = {seed: value for (_, seed), value in other.runs.items()}
        text = None if self.text is None or other.text is None else self.text + other.text
        return Effects({key: value + shared.get(key[1], 0.0) for key, value in self.runs.items()}, text)


@dataclass(frozen=True)
class Ends:
    """Decayed ends of several runs of one arm.

    Attributes:
        keys: of the runs, in order.
        run: for each end, the place of its run in ``keys``.
        budget: for each end, the place of its budget among all budgets, rising.
        tokens, losses: for each end.
        groups: losses of the groups of held-out blocks, shape (ends, groups); None if an end has none.
        blocks: number of blocks in each group.
        runs: for each end, its run; empty for ends that were simulated.
        left_out: ends that are not in the fit, each with the reason in words.
    """

    keys: tuple[Key, ...]
    run: NDArray[np.int64]
    budget: NDArray[np.int64]
    tokens: Floats
    losses: Floats
    groups: Floats | None = None
    blocks: Floats | None = None
    runs: tuple[Run, ...] = ()
    left_out: tuple[tuple[Run, str], ...] = ()

    @classmethod
    def of(cls, arm_runs: Mapping[Key, Budgets], unit: Unit = "tokens") -> Ends:
        """Collect the ends of runs whose schedule has decayed.

        Ends that diverged are left out: the loss is not finite, or more than 10 % above that of a smaller budget. A
        single end that is no better than one of half its budget is left out too. Two such ends in one run, or such an
        end in most runs, are no accident and are kept.

        Args:
            arm_runs: runs by key and budget.
            unit: of the costs, which are in the field ``tokens`` in any unit.
        """
        kept: list[Run] = []
        left_out: list[tuple[Run, str]] = []
        for by_budget in arm_runs.values():
            least = math.inf
            for run in by_budget.values():
                if run.budget is None or not run.finished or not run.evals["tokens"][-1] > 0:
                    continue
                loss = _loss(run)
                if not math.isfinite(loss) or loss > DIVERGED * least:
                    left_out.append((run, f"diverged (loss {loss:.4g})"))
                    continue
                least = min(least, loss)
                kept.append(run)
        wrong = _wrong_ends(kept)
        kept = [run for run in kept if all(run is not other for other, _ in wrong)]
        left_out += [
            (run, f"is no better than the one of {better.budget} steps ({_loss(run):.4g} against {_loss(better):.4g})")
            for run, better in wrong
        ]
        keys = tuple(dict.fromkeys(run.key for run in kept))
        budgets = sorted({run.budget for run in kept if run.budget is not None})
        grouped = bool(kept) and all(len(run.group_losses) for run in kept)
        grouped = grouped and all(np.isfinite(run.group_losses).all() for run in kept)
        return cls(
            keys,
            np.array([keys.index(run.key) for run in kept], dtype=np.int64),
            np.array([budgets.index(run.budget) for run in kept if run.budget is not None], dtype=np.int64),
            np.array([float(run.evals[unit][-1]) for run in kept]),
            np.array([float(run.evals["loss"][-1]) for run in kept]),
            np.stack([run.group_losses for run in kept]) if grouped else None,
            kept[0].group_blocks if grouped else None,
            tuple(kept),
            tuple(left_out),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about ends that were left out, and about a curve through only two ends."""
        sentences = [
            f"{run.name}: its end of {run.budget} steps {why}, so it is left out of the fit"
            for run, why in self.left_out
        ]
        if self.budgets == 2:
            name = self.runs[0].arm if self.runs else "an arm"
            sentences.append(f"{name}: it has two decayed ends, so costs are read on a straight line over log cost")
        return tuple(sentences)

    @property
    def budgets(self) -> int:
        """Number of different budgets."""
        return len(np.unique(self.budget))

    @cached_property
    def _means(self) -> Floats:
        """Matrix that maps the losses of all ends to one mean for each budget.

        A loss is modelled as an effect of its budget plus an effect of its run. The effects of the runs have mean zero.
        A run that is better or worse than the others therefore shifts no mean by lacking some budgets.
        """
        ends, runs = len(self.losses), len(self.keys)
        columns = np.zeros((ends, self.budgets + runs - 1))
        columns[np.arange(ends), self.budget] = 1.0
        for place in range(runs - 1):
            columns[self.run == place, self.budgets + place] = 1.0
            columns[self.run == runs - 1, self.budgets + place] = -1.0
        return np.asarray(np.linalg.pinv(columns)[: self.budgets])

    @property
    def longest(self) -> float:
        """Logarithm of the largest cost of an end, including ends that were left out."""
        left_out = [float(run.evals["tokens"][-1]) for run, _ in self.left_out]
        return math.log(max([float(self.tokens.max()), *left_out]))

    @cached_property
    def fit(self) -> LossFit:
        """The curve through the mean losses."""
        counts = np.bincount(self.budget).astype(np.float64)
        logs = np.bincount(self.budget, weights=np.log(self.tokens)) / counts
        return LossFit(logs, self._means @ self.losses, counts / counts.max())

    def effects(self, reading: Reading) -> Effects:
        """Return the effects of each run and of each group of held-out blocks on the loss of a reading."""
        influence = reading.influence @ self._means
        rest = influence * (self.losses - reading.fitted[self.budget])
        by_run = len(self.keys) * np.bincount(self.run, weights=rest, minlength=len(self.keys))
        text = None
        if self.groups is not None:
            text = influence @ (self.groups - self.losses[:, None])
        return Effects(dict(zip(self.keys, by_run.tolist(), strict=True)), text)

    def unit_cost(self, key: Key, unit: Unit, log_tokens: float) -> float:
        """Return the cost of a run at a number of tokens, without its expansion; nan if it was not recorded."""
        mine = [run for run in self.runs if run.key == key]
        if unit == "tokens":
            return math.exp(log_tokens)
        if not mine or not all(run.has_unit(unit) for run in mine):
            return math.nan
        tokens = np.log([float(run.evals["tokens"][-1]) for run in mine])
        spent = np.log([max(float(run.evals[unit][-1]), 1e-12) for run in mine])
        inside = float(np.clip(log_tokens, tokens[0], tokens[-1]))
        return math.exp(float(np.interp(inside, tokens, spent)) + log_tokens - inside)


def _loss(run: Run) -> float:
    return float(run.evals["loss"][-1])


def _wrong_ends(ends: list[Run]) -> list[tuple[Run, Run]]:
    """Return single ends that are no better than an end of half their budget or less, each with that end."""
    by_key: dict[Key, list[Run]] = {}
    for run in ends:
        by_key.setdefault(run.key, []).append(run)
    wrong: list[tuple[Run, Run]] = []
    for mine in by_key.values():
        pairs = {
            id(run): (run, other)
            for run in mine
            for other in mine
            if 2 * other.evals["tokens"][-1] <= 1.001 * run.evals["tokens"][-1] and _loss(run) >= _loss(other)
        }
        if len(pairs) == 1 and len(mine) >= FEWEST_ENDS:
            wrong += pairs.values()
    budgets = [run.budget for run, _ in wrong]
    return [(run, other) for run, other in wrong if budgets.count(run.budget) <= max(1, len(by_key) // 2)]


@dataclass(frozen=True)
class Crossing:
    """The cost at which an arm reaches the baseline's fitted loss at one of its budgets.

    Attributes:
        target: the baseline's fitted loss.
        log_tokens: the arm's cost.
        where: ``inside`` its ends; ``before`` the first or ``after`` the last, too far away to extend the curve;
            ``start`` if the arm was at the target before its first update.
        effects: on log cost; positive for a run that needs more.
    """

    target: float
    log_tokens: float
    where: str
    effects: Effects


def cross(arm: Ends, base: Ends, log_budget: float, start_loss: float = math.inf) -> Crossing:
    """Return the cost at which the curve of ``arm`` has the loss of the curve of ``base`` at a budget.

    A copy of the baseline has the same fit, so its cost is the baseline's budget.

    Args:
        arm, base: decayed ends.
        log_budget: logarithm of the baseline's tokens.
        start_loss: the arm's loss before its first update.
    """
    goal = base.fit.read(log_budget)
    if start_loss <= goal.loss:
        return Crossing(goal.loss, -math.inf, "start", Effects(dict.fromkeys(arm.keys, 0.0), None))
    there, where = arm.fit.crossing(goal.loss, log_budget, arm.longest)
    slope = min(there.slope, -1e-12)
    effects = arm.effects(there).times(-1 / slope).plus(base.effects(goal).times(1 / slope))
    at = {"before": float(arm.fit.logs[0]), "after": float(arm.fit.logs[-1])}.get(where, there.at)
    return Crossing(goal.loss, at, where, effects)
