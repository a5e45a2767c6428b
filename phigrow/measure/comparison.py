"""Compare the arms of an experiment with its baseline, seed by seed, at the baseline's final held-out loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from phigrow.errors import GrowthError
from phigrow.measure.arms import labelled
from phigrow.measure.cost_to_target import CostToTarget, TargetCrossing
from phigrow.measure.estimates import ACCOUNTINGS, STEPS, Arm, Basis, BudgetPoint, Comparison, Estimate
from phigrow.measure.intervals import speedup_intervals
from phigrow.measure.notebook import ShownComparison
from phigrow.measure.one_study import check_one_study
from phigrow.measure.pairing import (
    BaselineSeeds,
    by_seed,
    chosen_budget,
    grouped,
    paired_runs,
    settings_that_differ,
)
from phigrow.measure.sizes import check_sizes, without_sources
from phigrow.records.run import Budgets, Key, Run, Seeds
from phigrow.records.schema import UNITS, Unit

MID_SCHEDULE_POINTS = 12
"""Budgets on the curves of a study with one budget, spaced evenly in their logarithm."""

EARLIEST = 0.05
"""The smallest of them, as a share of the baseline's budget: before that a schedule is still warming up."""

Pair = tuple[CostToTarget, CostToTarget, float]
"""An arm's reach, the baseline's of the same seed, and the target."""


def compare(runs: Iterable[Run], baseline: str = "scratch", budget: int | None = None) -> Comparison:
    """Compare every arm with the baseline, seed by seed, at the held-out loss that the baseline ends at.

    The target of a seed is the baseline's last evaluation. Costs of reaching it are read off a monotone fit, for the
    baseline too, so a copy of the baseline has a speedup of exactly 1. An arm that was trained to several budgets is
    read between its decayed ends, an arm with one budget off its own curve (see `CostToTarget`). If noise makes the
    baseline's last evaluations rise, its fit reaches the target a little before its end. That makes speedups smaller.

    speedup = C_baseline / C_arm and saving = 1 - C_arm / C_baseline, of costs averaged over the paired seeds. Sunk
    leaves out the training of the source model. Charged adds it to the arm that was grown (``source_tokens``,
    ``source_flops`` and ``source_seconds`` of the run record). Both count the expansion (``expand_seconds``). With 3
    seeds or more there is an interval, see `speedup_intervals`.

    A run that another arm was grown from is not an arm: it is left out with a note.

    Args:
        runs: from ``load_runs``; one run for every arm, seed and budget.
        baseline: the arm that sets the target.
        budget: in steps, where the baseline was trained to several; by default the largest that all its seeds have.

    Raises:
        GrowthError: no run of the baseline; a seed or an arm that cannot be paired (two runs of one seed, none in
            the baseline, other data, schedule or evaluation text); an arm of two models; a baseline of another size
            than a grown arm; a baseline that is unfinished or diverged; no evaluations.

    >>> compare(load_runs("runs"))["wr"].estimate("tokens", "sunk").speedup  # doctest: +SKIP
    4.17
    """
    runs, sources = without_sources(runs)
    check_one_study(runs)
    arms = grouped(labelled(runs))
    left_out = [f"{folder} is left out: it is the source that {arm} was grown from" for folder, arm in sources.items()]
    if baseline not in arms:
        raise GrowthError(
            f"there is no run of the baseline {baseline!r}",
            where="; ".join([f"arms in these folders: {', '.join(sorted(arms)) or 'none'}", *left_out]),
            why="its final held-out loss is the target",
            fix="add the run folders of the grown model trained from scratch, or name another baseline",
        )
    check_sizes(arms, baseline)
    seeds = by_seed(arms.pop(baseline), baseline)
    at = chosen_budget(seeds, budget, baseline)
    base = {seed: CostToTarget.of(by_budget, by_budget[at]) for seed, by_budget in seeds.items() if at in by_budget}
    targets = {seed: _target(own, own.run) for seed, own in base.items()}
    described = _described([own.run for own in base.values()])
    notes = (
        *described.notes,
        *_swept(described.runs),
        *_no_ends(seeds.values(), at),
        *(note for seed, own in base.items() for note in _pooled_end(own, targets[seed])),
    )
    compared = []
    for name, found in arms.items():
        chosen, pairing_notes = paired_runs(found, seeds, at, baseline)
        if chosen:
            compared.append(_compared(chosen, found, seeds, base, targets, pairing_notes))
        else:
            left_out.append(f"{name} is left out: it has no run of {at} steps")
    with_baseline: dict[str, Seeds] = {baseline: {(None, seed): runs_at for seed, runs_at in seeds.items()}, **arms}
    ends = {
        name: tuple(run for by_budget in found.values() for run in by_budget.values())
        for name, found in with_baseline.items()
        if any(len(by_budget) > 1 for by_budget in found.values())
    }
    return ShownComparison(replace(described, notes=notes), tuple(compared), targets, ends, tuple(left_out))


def _target(own: CostToTarget, run: Run) -> float:
    last = int(run.evals["step"][-1])
    if not run.finished:
        raise GrowthError(
            f"{run.name}, was last evaluated at step {last} of {run.budget}",
            where=str(run.folder),
            why="the target is the loss at the end of a fully decayed schedule",
            fix="let this run finish",
        )
    final = float(run.evals["loss"][-1])
    if not math.isfinite(final):
        raise GrowthError(
            f"{run.name}, ended at a held-out loss of {final}",
            where=str(run.folder),
            why="a run that diverged cannot set the target",
        )
    return own.end_loss(run)


def _swept(runs: Sequence[Run]) -> list[str]:
    """Note that learning rates were chosen by a sweep, which is in no cost."""
    sweep = (runs[0].meta.get("config") or {}).get("lr_chosen_by")
    if not isinstance(sweep, dict):
        return []
    return [
        f"every arm's learning rate was chosen by its own sweep: {len(sweep['lr'])} rates, {sweep['steps']} steps "
        f"each, with {len(sweep['seeds'])} of the seeds; no arm's cost includes its sweep"
    ]


def _pooled_end(own: CostToTarget, target: float) -> list[str]:
    found = own.cost("tokens", target)
    if found.cost is None or found.cost >= found.end_cost * (1 - 1e-9):
        return []
    return [
        f"{own.run.name}: its last evaluations do not improve, so its fit reaches the target "
        f"after {found.cost:.4g} of {found.end_cost:.4g} tokens"
    ]


def _no_ends(runs: Iterable[Budgets], at: int | None) -> list[str]:
    """Note the runs at other budgets that are left out because they are unfinished."""
    others = [run for by_budget in runs for budget, run in by_budget.items() if budget != at]
    return [
        f"{run.name}: the run of {run.budget} steps is left out: its last evaluation is at step {run.evals['step'][-1]}"
        for run in others
        if not run.finished
    ]


def _described(runs: list[Run]) -> Arm:
    losses = {step: [run.held_out(step) for run in runs] for step in STEPS}
    loss_at = {
        step: float(np.mean([loss for loss in found if loss is not None]))
        for step, found in losses.items()
        if None not in found
    }
    final = float(np.mean([run.evals["loss"][-1] for run in runs]))
    notes = tuple(f"{run.name}: {note}" for run in runs for note in run.notes)
    return Arm(runs[0].arm, tuple(runs), final, loss_at, notes=notes)


def _compared(
    runs: dict[Key, Run],
    found: Seeds,
    seeds: BaselineSeeds,
    base: dict[int, CostToTarget],
    targets: dict[int, float],
    pairing_notes: list[str],
) -> Arm:
    arm = _described(list(runs.values()))
    own = {key: CostToTarget.of(found[key], run) for key, run in runs.items()}
    pairs = [(own[key], base[key[1]], targets[key[1]]) for key in runs]
    estimates, reached = _estimates(pairs)
    notes = [
        *arm.notes,
        *pairing_notes,
        *(note for key in runs for note in _no_ends([found[key]], runs[key].budget)),
    ]
    for run, each in zip(runs.values(), reached, strict=True):
        if not run.finished:
            notes.append(f"{run.name}: unfinished, last evaluated at step {int(run.evals['step'][-1])} of {run.budget}")
        if each.censored:
            notes.append(
                f"{run.name}: censored, its fit ended at {each.fit_end:.4g}, "
                f"above the target of {targets[run.seed]:.4g}"
            )
        if each.upper_bound:
            notes.append(f"{run.name}: already below the target at its smallest budget, so its cost is an upper bound")
    for estimate in estimates:
        if not all(run.has_unit(estimate.unit) for run in runs.values()):
            if estimate.accounting == "sunk":
                notes.append(f"{arm.name}: {estimate.unit} were not recorded")
        elif estimate.accounting == "charged" and not math.isfinite(estimate.cost):
            notes.append(f"{arm.name}: source_{estimate.unit} was not recorded, so {estimate.unit} cannot be charged")
    several = any(len(by_budget) > 1 for by_budget in seeds.values())
    points = _at_budgets(own, seeds) if several else _mid_schedule(pairs, estimates)
    return replace(
        arm,
        estimates=estimates,
        censored_seeds=tuple(key[1] for key, each in zip(runs, reached, strict=True) if each.censored),
        notes=tuple(notes),
        basis=_basis(pairs),
        budgets=points,
        settings=settings_that_differ(found, seeds),
    )


def _basis(pairs: Sequence[Pair]) -> Basis:
    found = {own.basis for own, _, _ in pairs}
    return "curve" if "curve" in found else "constant" if "constant" in found else "ends"


def _estimates(pairs: Sequence[Pair], *, on_curve: bool = False) -> tuple[tuple[Estimate, ...], list[TargetCrossing]]:
    """All units and accountings of one arm at one target a seed, and the crossings in tokens."""
    reached: dict[Unit, list[TargetCrossing]] = {
        unit: [own.cost(unit, target, on_curve=on_curve) for own, _, target in pairs] for unit in UNITS
    }
    censored = any(each.censored for each in reached["tokens"])
    upper_bound = not censored and any(each.upper_bound for each in reached["tokens"])
    costs, against = [], []
    for unit in UNITS:
        mine = np.array([each.end_cost if each.cost is None else each.cost for each in reached[unit]])
        theirs = np.array([_baseline_cost(base, unit, target, on_curve) for _, base, target in pairs])
        costs += [mine, mine + [_source_cost(own.run, unit, grown=True) for own, _, _ in pairs]]
        against += [theirs, theirs + [_source_cost(base.run, unit, grown=False) for _, base, _ in pairs]]
    several = len({own.run.source_seed for own, _, _ in pairs}) > 1  # runs of several sources are no paired seeds
    none = censored or upper_bound or several
    intervals = [None] * len(costs) if none else speedup_intervals(np.array(costs), np.array(against))
    estimates = [
        Estimate(unit, accounting, float(mine.mean()), float(theirs.mean()), censored, interval, upper_bound)
        for (unit, accounting), mine, theirs, interval in zip(
            ((unit, accounting) for unit in UNITS for accounting in ACCOUNTINGS), costs, against, intervals, strict=True
        )
    ]
    return tuple(estimates), reached["tokens"]


def _at_budgets(own: dict[Key, CostToTarget], seeds: BaselineSeeds) -> tuple[BudgetPoint, ...]:
    """The arm at every decayed end of the baseline."""
    points = []
    for budget in sorted({budget for by_budget in seeds.values() for budget in by_budget if budget is not None}):
        pairs: list[Pair] = []
        for (_, seed), mine in own.items():
            run = seeds[seed].get(budget)
            if run is None or not run.finished or not math.isfinite(float(run.evals["loss"][-1])):
                continue
            base = CostToTarget.of(seeds[seed], run)
            pairs.append((mine, base, base.end_loss(run)))
        if pairs:
            estimates, _ = _estimates(pairs)
            points.append(_point(pairs, estimates, [float(base.run.evals["tokens"][-1]) for _, base, _ in pairs]))
    return tuple(points)


def _mid_schedule(pairs: list[Pair], at_end: tuple[Estimate, ...]) -> tuple[BudgetPoint, ...]:
    """The arm at losses that the baseline passes on its way, both read off curves whose schedule goes on."""
    ends = [float(base.run.evals["tokens"][-1]) for _, base, _ in pairs]
    last = point = _point(pairs, at_end, ends)
    if any(own.basis == "ends" for own, _, _ in pairs):
        return (last,)
    tokens = pairs[0][1].run.evals["tokens"]
    places = np.unique(np.searchsorted(tokens, np.geomspace(EARLIEST * tokens[-1], tokens[-1], MID_SCHEDULE_POINTS)))
    points = []
    for share in (tokens[places] / tokens[-1])[:-1]:
        budgets = [share * end for end in ends]
        targets = [
            base.curve.loss_at(base.run.evals["tokens"], at) for (_, base, _), at in zip(pairs, budgets, strict=True)
        ]
        there = [(own, base, target) for (own, base, _), target in zip(pairs, targets, strict=True)]
        if not np.isfinite(targets).all() or any(_started_below(base, target) for _, base, target in there):
            continue
        estimates, _ = _estimates(there, on_curve=True)
        point = _point(there, estimates, budgets)
        points.append(point)
    return (*points, last)


def _point(pairs: list[Pair], estimates: tuple[Estimate, ...], budgets: list[float]) -> BudgetPoint:
    target = float(np.mean([target for _, _, target in pairs]))
    seeds = tuple(own.run.seed for own, _, _ in pairs)
    return BudgetPoint(float(np.mean(budgets)), target, _basis(pairs), seeds, estimates)


def _started_below(base: CostToTarget, target: float) -> bool:
    return base.cost("tokens", target, on_curve=True).cost in (None, 0.0)


def _baseline_cost(base: CostToTarget, unit: Unit, target: float, on_curve: bool) -> float:
    cost = base.cost(unit, target, on_curve=on_curve).cost
    assert cost is not None, "a target is never below the end of the baseline's own fit"
    if cost == 0:
        raise GrowthError(
            f"{base.run.name}, never fell below its first loss",
            where=str(base.run.folder),
            why="the baseline has no cost to compare with",
        )
    return cost


def _source_cost(run: Run, unit: Unit, *, grown: bool) -> float:
    """Cost of the source; nan where it is unknown. Only a baseline that was not grown may leave it out."""
    cost = run.source_cost(unit)
    return 0.0 if math.isnan(cost) and not grown and not run.meta.get("growth") else cost
