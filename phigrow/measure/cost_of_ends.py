"""Costs of arms at the loss of the baseline's decayed ends: estimates with intervals over sources, seeds and text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from phigrow.measure.ends import Crossing, Effects, Ends, cross
from phigrow.measure.errors_of_means import MeanError, interval_of, over_runs, over_text
from phigrow.measure.estimates import ACCOUNTINGS, Covered, Estimate
from phigrow.measure.intervals import Interval
from phigrow.measure.surroundings import other_machine
from phigrow.records.run import Key, Run
from phigrow.records.schema import UNITS, Unit


@dataclass(frozen=True)
class EndsResult:
    """Costs of an arm at the baseline's loss at one budget.

    Attributes:
        crossing: of the arm's curve with the baseline's loss.
        estimates: costs in every unit and accounting.
        covered: sources of error in the intervals; None without intervals.
    """

    crossing: Crossing
    estimates: tuple[Estimate, ...]
    covered: Covered | None


def compare_ends(runs: Mapping[Key, Run], arm: Ends, base_runs: Mapping[int, Run], base: Ends) -> EndsResult:
    """Compare an arm with the baseline at the fitted loss that the baseline has at a budget.

    Args:
        runs: runs of the arm by key, for the costs of source and expansion.
        arm, base: decayed ends of the arm and of the baseline.
        base_runs: runs of the baseline at the budget, by seed.
    """
    log_budget = log_tokens_at(base, base_runs)
    starts = [run.held_out(0) for run in runs.values()]
    start = math.inf if None in starts else float(np.mean([loss for loss in starts if loss is not None]))
    crossing = cross(arm, base, log_budget, start)
    missing = [key for key in runs if key not in arm.keys]  # all their ends diverged
    censored = crossing.where == "after" or bool(missing)
    upper_bound = not censored and crossing.where == "before"
    two_machines = other_machine((run, base_runs[seed]) for (_, seed), run in runs.items())
    unpaired = any(run.has_unknown_text for run in (*runs.values(), *base_runs.values()))
    estimates, covered = [], None
    for unit in UNITS:
        spent = {
            key: 0.0 if crossing.where == "start" else arm.unit_cost(key, unit, crossing.log_tokens) for key in runs
        }
        for key in missing:
            spent[key] = float(runs[key].evals[unit][-1])
        unknown = two_machines if unit == "seconds" else ""
        if unknown:
            spent = dict.fromkeys(spent, math.nan)
        for accounting in ACCOUNTINGS:
            costs = {
                key: spent[key]
                + run.expand_cost(unit)
                + (source_cost(run, unit, grown=True) if accounting == "charged" else 0.0)
                for key, run in runs.items()
            }
            against = {
                seed: base.unit_cost((None, seed), unit, log_budget)
                + run.expand_cost(unit)
                + (source_cost(run, unit, grown=False) if accounting == "charged" else 0.0)
                for seed, run in base_runs.items()
            }
            interval = None
            shared = unit == "seconds" and any(run.shared_machine for run in (*runs.values(), *base_runs.values()))
            if not (censored or upper_bound or shared or unpaired or crossing.where == "start"):
                errors = errors_of_ratio(costs, against, spent, crossing.effects, arm)
                interval, covers = _interval(costs, against, errors)
                covered = covered or covers
            estimates.append(
                Estimate(
                    unit,
                    accounting,
                    float(np.mean(list(costs.values()))),
                    float(np.mean([against[seed] for _, seed in runs])),
                    censored,
                    interval,
                    upper_bound,
                    shared and not unknown,
                    unknown=unknown,
                )
            )
    return EndsResult(crossing, tuple(estimates), covered)


def log_tokens_at(base: Ends, base_runs: Mapping[int, Run]) -> float:
    """Return the mean logarithm of the tokens of the baseline's runs at a budget."""
    return float(np.mean([math.log(float(run.evals["tokens"][-1])) for run in base_runs.values()]))


def errors_of_ratio(
    costs: Mapping[Key, float], against: Mapping[int, float], spent: Mapping[Key, float], effects: Effects, arm: Ends
) -> list[MeanError]:
    """Return the errors of the logarithm of the speedup: over runs, and over text if its groups were recorded."""
    deviations = log_ratios(costs, against)
    mean = float(np.mean(list(costs.values())))
    values = {key: deviations[key] - effects.runs[key] * spent[key] / mean for key in costs}
    if not np.isfinite(list(values.values())).all():
        return []
    of_runs = over_runs(values)
    if of_runs is None:
        return []
    errors = [of_runs]
    if effects.text is not None and arm.blocks is not None and len(effects.text) > 1:
        share = float(np.mean(list(spent.values()))) / mean
        errors.append(over_text(effects.text * share, arm.blocks))
    return errors


def log_ratios(costs: Mapping[Key, float], against: Mapping[int, float]) -> dict[Key, float]:
    """Return the deviation that each run causes in log(mean(against) / mean(costs)), to first order."""
    mine = float(np.mean(list(costs.values())))
    theirs = float(np.mean([against[seed] for _, seed in costs]))
    return {key: (against[key[1]] - theirs) / theirs - (cost - mine) / mine for key, cost in costs.items()}


def _interval(
    costs: Mapping[Key, float], against: Mapping[int, float], errors: Sequence[MeanError]
) -> tuple[Interval | None, Covered | None]:
    if not errors:
        return None, None
    ratio = math.log(float(np.mean([against[seed] for _, seed in costs])) / float(np.mean(list(costs.values()))))
    return interval_of(ratio, errors), Covered(errors[0].sources, errors[0].seeds, len(errors) > 1)


def source_cost(run: Run, unit: Unit, *, grown: bool) -> float:
    """Return the cost of the source; nan if it is unknown. For a baseline that was not grown, unknown counts as 0."""
    cost = run.source_cost(unit)
    return 0.0 if math.isnan(cost) and not grown and not run.meta.get("growth") else cost
