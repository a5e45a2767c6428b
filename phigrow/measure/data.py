"""A comparison as JSON-ready data: its numbers at full precision, and the curves for the page."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phigrow.measure.estimates import ACCOUNTINGS, Arm, BudgetPoint, Comparison, Estimate, FrontierSaving
from phigrow.measure.frontier import frontier_of
from phigrow.measure.intervals import CONFIDENCE
from phigrow.measure.provenance import all_runs
from phigrow.measure.study_figures import age_lines, mean_ends
from phigrow.measure.wording import findings, is_grown
from phigrow.records.run import Columns, Run
from phigrow.records.schema import DIAGNOSTICS, UNITS

MOST_POINTS = 400
"""Most points of a curve on the page. A point of a training curve is the mean over several steps. Of evaluations, a
subset is kept, with the first and the last, so that every point is a recorded one."""


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as JSON-ready data, at full precision; null for numbers that are unknown or infinite."""
    return {
        "format": 3,
        "baseline": comparison.baseline.name,
        "targets": {str(seed): target for seed, target in comparison.targets.items()},
        "confidence": CONFIDENCE,
        "findings": findings(comparison),
        "notes": list(comparison.notes),
        **({"flat": flat_data(comparison)} if comparison.flat else {}),
        "arms": [_arm(arm) for arm in (comparison.baseline, *comparison.arms)],
        "runs": [_plain(run.meta) for run in all_runs(comparison)],
    }


def curves_data(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the curves of every compared run by arm: evaluations, training losses, diagnostics, cost of the source."""
    return [
        {"arm": arm.name, "runs": [_curves(run, own=arm is comparison.baseline) for run in arm.runs]}
        for arm in (comparison.baseline, *comparison.arms)
    ]


def _arm(arm: Arm) -> dict[str, Any]:
    return {
        "arm": arm.name,
        **({"lr_edge": arm.lr_edge} if arm.lr_edge else {}),
        **({"source_loss": arm.source_loss} if arm.source_loss is not None else {}),
        **({"source_meets_target": True} if is_grown(arm) and arm.target and arm.source_meets(arm.target) else {}),
        "seeds": list(arm.seeds),
        "final_loss": _finite(arm.final_loss),
        "final_loss_by_seed": {_key(run): _finite(float(run.evals["loss"][-1])) for run in arm.runs},
        "loss_at_step": {str(step): _finite(loss) for step, loss in arm.loss_at.items()},
        "censored_seeds": list(arm.censored_seeds),
        "diverged_at_step": {_key(run): run.diverged_at for run in arm.runs if run.diverged_at is not None},
        "basis": arm.basis,
        "estimates": [_estimate(estimate) for estimate in arm.estimates],
        "budgets": [_point(arm, point) for point in arm.budgets],
        "vanishing": [
            {"unit": unit, "accounting": accounting, "state": vanishing.state, "budget": vanishing.budget}
            for unit in UNITS
            for accounting in ACCOUNTINGS
            if (vanishing := arm.vanishing(unit, accounting)) and arm.budgets
        ],
        "notes": list(arm.notes),
        "differences": [*arm.settings, *arm.surroundings],
        **({"frontier": [_frontier(saving) for saving in arm.frontier]} if arm.frontier else {}),
    }


def _frontier(saving: FrontierSaving) -> dict[str, Any]:
    return {
        "accounting": saving.accounting,
        "loss": _finite(saving.loss),
        "flops": _finite(saving.cost),
        "flat_flops": _finite(saving.flat_cost),
        "saving": _finite(saving.saving),
        "saving_interval": [_finite(end) for end in saving.interval or ()] or None,
        "bound": saving.bound or None,
    }


def ages_data(comparison: Comparison) -> list[dict[str, Any]]:
    """Return, for each method with sources of several ages, its name and the age and place of its arms."""
    arms = (comparison.baseline, *comparison.arms)
    return [
        {"method": name, "points": [{"age": age, "arm": arms.index(arm)} for age, arm in line]}
        for name, line in age_lines(comparison)
    ]


def flat_data(comparison: Comparison) -> dict[str, Any]:
    """Return decayed ends of flat models, their envelope, and mean ends of every arm, all as (FLOPs, loss)."""
    frontier = frontier_of(comparison)
    sizes = frontier.sizes if frontier else {}
    return {
        "sizes": [
            {
                "arm": name,
                "ends": [[_finite(x), y] for x, y in zip(size.tokens.tolist(), size.losses.tolist(), strict=True)],
            }
            for name, size in sizes.items()
        ],
        "envelope": [[math.exp(x), y] for x, y, _ in frontier.hull] if frontier else [],
        "arms": [
            {accounting: mean_ends(comparison.ends.get(arm.name, arm.runs), accounting) for accounting in ACCOUNTINGS}
            for arm in (comparison.baseline, *comparison.arms)
        ]
        if frontier
        else [],
    }


def _point(arm: Arm, point: BudgetPoint) -> dict[str, Any]:
    return {
        "budget": point.budget,
        "target": point.target,
        "basis": point.basis,
        "seeds": list(point.seeds),
        **({"source_meets_target": True} if is_grown(arm) and arm.source_meets(point.target) else {}),
        "estimates": [_estimate(estimate) for estimate in point.estimates],
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {
        "unit": estimate.unit,
        "accounting": estimate.accounting,
        "cost": _finite(estimate.cost),
        "baseline_cost": _finite(estimate.baseline_cost),
        "speedup": _finite(estimate.speedup),
        "speedup_interval": [_finite(end) for end in estimate.speedup_interval or ()] or None,
        "saving": _finite(estimate.saving),
        "saving_interval": [_finite(end) for end in estimate.saving_interval or ()] or None,
        "censored": estimate.censored,
        "upper_bound": estimate.upper_bound,
        "at_target_from_the_start": estimate.cost == 0,
        "between_evaluations": [_finite(end) for end in estimate.between_evaluations or ()] or None,
        **({"shared_machine": True} if estimate.shared_machine else {}),
        **({"unknown": estimate.unknown} if estimate.unknown else {}),
    }


def _curves(run: Run, *, own: bool) -> dict[str, Any]:
    before = {unit: run.source_cost(unit) for unit in UNITS}
    if own and not run.meta.get("growth"):
        before = {unit: 0.0 if math.isnan(cost) else cost for unit, cost in before.items()}
    columns = ("step", *UNITS)
    return {
        "seed": run.seed,
        **({} if run.source_seed is None else {"source_seed": run.source_seed}),
        "source": {unit: _finite(cost) for unit, cost in before.items()},
        "expansion": {unit: run.expand_cost(unit) for unit in UNITS},
        "evals": {key: _list(_picked(run.evals[key])) for key in (*columns, "loss")},
        "sources": {name: _list(_picked(losses)) for name, losses in run.sources.items()},
        "train": {key: _list(values) for key, values in _thinned(run.steps, (*columns, "loss")).items()},
        "diagnostics": {
            key: _list(_picked(run.diagnostics[key])) for key in ("step", *DIAGNOSTICS) if key in run.diagnostics
        },
    }


def _picked(values: NDArray[Any]) -> NDArray[Any]:
    if len(values) <= MOST_POINTS:
        return values
    picked: NDArray[Any] = values[np.unique(np.linspace(0, len(values) - 1, MOST_POINTS).astype(int))]
    return picked


def _thinned(columns: Columns, keys: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    count = len(columns["step"])
    if count <= MOST_POINTS:
        return {key: columns[key] for key in keys}
    starts = np.linspace(0, count, MOST_POINTS, endpoint=False).astype(int)
    sizes = np.diff([*starts, count])
    return {key: np.add.reduceat(columns[key].astype(float), starts) / sizes for key in keys}


def _list(values: NDArray[Any]) -> list[float | None]:
    """Round to six figures, which are more than a screen shows and half the bytes."""
    return [_finite(float(f"{value:.6g}")) for value in values]


def _key(run: Run) -> str:
    """Return the run's seed, with the source's seed before it if that was recorded: ``0/2``."""
    return str(run.seed) if run.source_seed is None else f"{run.source_seed}/{run.seed}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """Return data from a record with null for NaN and infinities, which standard JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return _finite(value) if isinstance(value, float) else value
