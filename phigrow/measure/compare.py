"""Compare the arms of an experiment with its baseline, seed by seed, at the baseline's final held-out loss."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from phigrow.errors import GrowthError
from phigrow.measure.crossing import Crossing, Floats, cost_to_loss, monotone
from phigrow.measure.estimates import (
    ACCOUNTINGS,
    CONFIDENCE,
    FEWEST_SEEDS,
    STEPS,
    UNITS,
    Arm,
    Comparison,
    Estimate,
    Interval,
    Unit,
)
from phigrow.measure.pairing import check_pair, grouped
from phigrow.measure.records import Run

RESAMPLES = 9999


def compare(runs: Iterable[Run], baseline: str = "scratch") -> Comparison:
    """Compare every arm with the baseline at the held-out loss that the baseline ends at, seed by seed.

    The target of a seed is the baseline's last evaluation. What either arm spent to get there, the baseline included,
    is read off a monotone fit by one rule (``cost_to_loss``), so that a copy of the baseline scores exactly 1. While
    the baseline's loss still falls at the end this is its full budget; where noise makes its last evaluations rise,
    the fit pools them, their mean lies below the target, and the baseline too is credited with getting there a little
    before its end. That errs towards a smaller speedup.

    speedup = C_baseline / C_arm and saving = 1 - C_arm / C_baseline, of costs averaged over the paired seeds; sunk
    leaves the training of the source model out, charged adds it (``source_tokens``, ``source_flops``,
    ``source_seconds`` of the run record) to the arm that was grown. From 3 seeds on there is a percentile bootstrap
    interval; with few seeds it is rather too narrow than too wide.

    Args:
        runs: from ``load_runs``; one run for every arm and seed.
        baseline: the arm that sets the target.

    Raises:
        GrowthError: no run of the baseline; a seed or an arm that cannot be paired (two runs of one seed, none in
            the baseline, other data, schedule or evaluation text); a baseline that is unfinished or diverged; no
            evaluations.

    >>> compare(load_runs("runs"))["wr"].estimate("tokens", "sunk").speedup  # doctest: +SKIP
    4.17
    """
    arms = grouped(runs)
    if baseline not in arms:
        raise GrowthError(
            f"no run of the baseline {baseline!r}",
            where=f"arms found: {', '.join(sorted(arms)) or 'none'}",
            why="its final held-out loss is the target",
            fix="add its run folders, or name another baseline",
        )
    base = arms.pop(baseline)
    targets = {seed: _target(run) for seed, run in base.items()}
    for by_seed in arms.values():
        for seed, run in by_seed.items():
            check_pair(run, base.get(seed), baseline)
    compared = [_compared(list(by_seed.values()), base, targets) for by_seed in arms.values()]
    described = _described(list(base.values()))
    notes = (*described.notes, *(note for seed, run in base.items() for note in _pooled_end(run, targets[seed])))
    return Comparison(replace(described, notes=notes), tuple(compared), targets)


def _target(run: Run) -> float:
    planned, last = (run.meta.get("config") or {}).get("steps"), int(run.evals["step"][-1])
    if isinstance(planned, int) and last < planned:
        raise GrowthError(
            f"{run.arm}, seed {run.seed}, was last evaluated at step {last} of {planned}",
            where=str(run.folder),
            why="the target is the loss at the end of a fully decayed schedule",
            fix="let it finish",
        )
    final = float(run.evals["loss"][-1])
    if not math.isfinite(final):
        raise GrowthError(
            f"{run.arm}, seed {run.seed}, ended at a held-out loss of {final}",
            where=str(run.folder),
            why="a run that diverged sets no target",
        )
    # The fit's last level is a mean that ends in this very point, so it is above it by rounding alone.
    return max(final, float(monotone(run.evals["tokens"], run.evals["loss"])[-1]))


def _pooled_end(run: Run, target: float) -> list[str]:
    crossing = _crossing(run, "tokens", target)
    if crossing.cost is None or crossing.cost >= crossing.end_cost:
        return []
    return [
        f"{run.arm}, seed {run.seed}: its last evaluations do not fall, and its fit gets to the target "
        f"after {crossing.cost:.4g} of {crossing.end_cost:.4g} tokens"
    ]


def _described(runs: list[Run]) -> Arm:
    losses = {step: [run.held_out(step) for run in runs] for step in STEPS}
    loss_at = {
        step: float(np.mean([loss for loss in found if loss is not None]))
        for step, found in losses.items()
        if None not in found
    }
    final = float(np.mean([run.evals["loss"][-1] for run in runs]))
    notes = tuple(f"{run.arm}, seed {run.seed}: {note}" for run in runs for note in run.notes)
    return Arm(runs[0].arm, tuple(runs), final, loss_at, notes=notes)


def _compared(runs: list[Run], base: dict[int, Run], targets: dict[int, float]) -> Arm:
    arm = _described(runs)
    crossings = {unit: [_crossing(run, unit, targets[run.seed]) for run in runs] for unit in UNITS}
    censored = [run.seed for run, crossing in zip(runs, crossings["tokens"], strict=True) if crossing.censored]
    notes = list(arm.notes)
    for run, crossing in zip(runs, crossings["tokens"], strict=True):
        planned, last = (run.meta.get("config") or {}).get("steps"), int(run.evals["step"][-1])
        if isinstance(planned, int) and last < planned:
            notes.append(f"{run.arm}, seed {run.seed}: unfinished, last evaluated at step {last} of {planned}")
        if crossing.censored:
            notes.append(
                f"{run.arm}, seed {run.seed}: censored, its fit ended at {crossing.fit_end:.4g}, "
                f"above the target of {targets[run.seed]:.4g}"
            )
    estimates: list[Estimate] = []
    for unit in UNITS:
        own = np.array([c.end_cost if c.cost is None else c.cost for c in crossings[unit]])
        theirs = np.array([_baseline_cost(base[run.seed], unit, targets[run.seed]) for run in runs])
        for accounting in ACCOUNTINGS:
            charged = accounting == "charged"
            costs = own + [_source_cost(run, unit, grown=True) for run in runs] if charged else own
            against = theirs + [_source_cost(base[run.seed], unit, grown=False) for run in runs] if charged else theirs
            interval = None if censored else _speedup_interval(costs, against)
            estimates.append(
                Estimate(unit, accounting, float(costs.mean()), float(against.mean()), bool(censored), interval)
            )
            if charged and not np.isfinite(costs).all():
                notes.append(f"{arm.name}: source_{unit} was not recorded, so {unit} cannot be charged")
    return replace(arm, estimates=tuple(estimates), censored_seeds=tuple(censored), notes=tuple(notes))


def _crossing(run: Run, unit: Unit, target: float) -> Crossing:
    return cost_to_loss(run.evals[unit], run.evals["loss"], target)


def _baseline_cost(run: Run, unit: Unit, target: float) -> float:
    cost = _crossing(run, unit, target).cost
    assert cost is not None, "a target is never below the end of the baseline's own fit"
    if cost == 0:
        raise GrowthError(
            f"{run.arm}, seed {run.seed}, did not get below the loss it started at",
            where=str(run.folder),
            why="there is no cost to compare with",
        )
    return cost


def _source_cost(run: Run, unit: Unit, *, grown: bool) -> float:
    """Cost of the source; nan where it is unknown. Only a baseline that was not grown may leave it out."""
    cost = run.source_cost(unit)
    return 0.0 if math.isnan(cost) and not grown and not run.meta.get("growth") else cost


def _speedup_interval(costs: Floats, against: Floats) -> Interval | None:
    """Percentile bootstrap of the ratio of mean costs, over paired seeds; None where there is nothing to resample."""
    if len(costs) < FEWEST_SEEDS or not np.isfinite(costs).all() or not np.isfinite(against).all():
        return None
    from scipy.stats import bootstrap

    # The inverse of the speedup is resampled: it stays finite where an arm is at the target from the start.
    found = bootstrap(
        (costs, against),
        lambda c, b, axis=-1: c.mean(axis) / b.mean(axis),
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=0,
    ).confidence_interval
    low, high = (math.inf if ratio == 0 else 1.0 / float(ratio) for ratio in (found.high, found.low))
    return low, high
