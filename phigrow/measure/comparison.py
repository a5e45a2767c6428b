"""Compare the arms of an experiment with its baseline, seed by seed, at the baseline's final held-out loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from phigrow.errors import GrowthError
from phigrow.measure.arms import labelled
from phigrow.measure.cost_of_ends import compare_ends, log_ratios, log_tokens_at, source_cost
from phigrow.measure.cost_to_target import CostToTarget
from phigrow.measure.crossing import Crossing
from phigrow.measure.ends import Ends
from phigrow.measure.errors_of_means import interval_of, over_runs
from phigrow.measure.estimates import (
    ACCOUNTINGS,
    STEPS,
    Arm,
    Basis,
    BudgetPoint,
    Comparison,
    Covered,
    Estimate,
    listed,
)
from phigrow.measure.frontier import frontier_of, frontier_savings
from phigrow.measure.intervals import Interval, speedup_intervals
from phigrow.measure.notebook import ShownComparison
from phigrow.measure.one_study import check_held_out_groups, check_one_study
from phigrow.measure.pairing import (
    BaselineSeeds,
    by_seed,
    check_same_text,
    chosen_budget,
    evaluated,
    finished_baseline,
    flat_differences,
    grouped,
    paired_runs,
    settings_that_differ,
)
from phigrow.measure.refined import refined_notes
from phigrow.measure.run_notes import no_ends, swept
from phigrow.measure.sizes import check_sizes, without_sources
from phigrow.measure.spacing import between_evaluations, coarse, widened
from phigrow.measure.surroundings import other_machine, surroundings_that_differ
from phigrow.measure.wording import amount, speedup_text
from phigrow.records.run import Budgets, Key, Run, Seeds
from phigrow.records.schema import UNITS, Unit

MID_SCHEDULE_POINTS = 12
"""Budgets on the curves of a study with one budget, spaced evenly in their logarithm."""

EARLIEST = 0.05
"""The smallest of them, as a share of the baseline's budget. Before it, a schedule is still warming up."""

Pair = tuple[CostToTarget, CostToTarget, float]
"""Costs of an arm's run, those of the baseline's run of the same seed, and the target."""


def compare(runs: Iterable[Run], baseline: str = "scratch", budget: int | None = None) -> Comparison:
    """Compare every arm with the baseline, seed by seed, at the held-out loss that the baseline ends at.

    In a study of several budgets, a curve is fitted through the decayed ends of each arm (`LossFit`). The target is the
    loss of the baseline's curve at its budget. An arm's cost is the cost at which its own curve comes down to the
    target. With one budget, the target of a seed is the baseline's last evaluation, and costs are read off a monotone
    fit of each run's own curve. In both cases, a copy of the baseline has a speedup of exactly 1.

    speedup = C_baseline / C_arm and saving = 1 - C_arm / C_baseline, with costs averaged over the paired runs. Sunk
    leaves out the training of the source model. Charged adds it to the cost of a grown arm (``source_tokens``,
    ``source_flops`` and ``source_seconds`` of the run record). Both count the expansion (``expand_seconds``). From 3
    seeds on, a speedup has an interval, see `over_runs`, `over_text` and `speedup_intervals`.

    The source of a grown arm is not an arm: its run is left out with a note. So is a run without evaluations, which has
    just started, and a seed whose run of the baseline has not ended, if other seeds have one.

    Args:
        runs: from ``load_runs``; one run for every arm, source seed, seed and budget.
        baseline: the arm that sets the target.
        budget: in steps, if the baseline has several; by default the largest that all its seeds have.

    Raises:
        GrowthError: the baseline has no finished run, diverged, or has another size than a grown arm; a run has no run
            of the baseline to be paired with (same seed, data, schedule and held-out text); a flat model reads other
            text; a seed has two runs; an arm has two models.

    >>> compare(load_runs("runs"))["wr"].estimate("tokens", "sunk").speedup  # doctest: +SKIP
    4.17
    """
    runs, started = evaluated(runs)
    runs, sources = without_sources(runs)
    check_one_study(runs)
    arms = grouped(labelled(runs))
    left_out = [f"{run.name}: {run.folder} is left out, because it has no evaluations yet" for run in started]
    left_out += [f"{folder} is left out: it is the source of {grown}" for folder, grown in sources.items()]
    if baseline not in arms:
        raise GrowthError(
            f"there is no run of the baseline {baseline!r}",
            where="; ".join([f"arms in these folders: {', '.join(sorted(arms)) or 'none'}", *left_out]),
            why="the target is the final held-out loss of the baseline",
            fix="add the run folders of the model trained from scratch, or name another arm with --baseline",
        )
    check_held_out_groups(
        {arm: [run for by in runs_of.values() for run in by.values()] for arm, runs_of in arms.items()}
    )
    flat_arms = {name: arms.pop(name) for name in [*arms] if name != baseline and _is_flat(arms[name])}
    check_sizes(arms, baseline)
    seeds = by_seed(arms.pop(baseline), baseline)
    check_same_text(seeds, flat_arms)
    at = chosen_budget(seeds, budget, baseline)
    seeds, waiting = finished_baseline(seeds, at)
    waiting |= {run.seed for run in started if run.arm == baseline and run.seed not in seeds}
    flat = {
        name: tuple(run for by_budget in found.values() for run in by_budget.values() if run.finished)
        for name, found in flat_arms.items()
    }
    flat_notes = [
        *(note for found in flat_arms.values() for note in no_ends(found.values())),
        *(note for name, found in flat_arms.items() for note in flat_differences(name, found, seeds)),
    ]
    bases = _Bases(seeds, at)
    base = bases.at_budget
    targets = bases.targets()
    described = _described([own.run for own in base.values()])
    notes = (
        *described.notes,
        *swept(described.runs),
        *no_ends(seeds.values(), at),
        *(
            f"{baseline}, seed {seed}: left out with all runs of this seed, because it has not ended"
            for seed in sorted(waiting)
        ),
        *(bases.ends().notes if bases.several else ()),
        *(note for seed, own in base.items() for note in _pooled_end(own, targets[seed])),
    )
    compared = []
    for name, of_arm in arms.items():
        found = {key: by_budget for key, by_budget in of_arm.items() if key[1] not in waiting}
        if not found:
            left_out.append(f"{name} is left out: no run of {baseline} with its seeds has ended")
            continue
        chosen, pairing_notes = paired_runs(found, seeds, at, baseline)
        if chosen:
            compared.append(_compared(chosen, found, bases, targets, pairing_notes))
        else:
            left_out.append(f"{name} is left out: it has no run of {at} steps")
    with_baseline: dict[str, Seeds] = {baseline: {(None, seed): runs_at for seed, runs_at in seeds.items()}, **arms}
    ends = {
        name: tuple(run for by_budget in found.values() for run in by_budget.values())
        for name, found in with_baseline.items()
        if any(len(by_budget) > 1 for by_budget in found.values())
    }
    left_out += flat_notes
    result = ShownComparison(replace(described, notes=notes), tuple(compared), targets, ends, tuple(left_out), flat)
    return with_frontier(result) if flat else result


def _is_flat(found: Seeds) -> bool:
    return any(run.is_flat for by_budget in found.values() for run in by_budget.values())


def with_frontier(comparison: ShownComparison) -> ShownComparison:
    """Add to every arm its saving against the flat frontier."""
    frontier = frontier_of(comparison)
    if frontier is None:
        note = "there is no flat frontier, because the flat models lack FLOPs or decayed ends"
        return replace(comparison, notes=(*comparison.notes, note))
    arms = []
    for arm in comparison.arms:
        by_key: dict[Key, Budgets] = {run.key: {} for run in arm.runs}
        for run in comparison.ends.get(arm.name, arm.runs):
            if run.key in by_key:
                by_key[run.key][run.budget] = run
        arms.append(replace(arm, frontier=frontier_savings(frontier, arm, Ends.of(by_key, "flops"))))
    return replace(comparison, arms=tuple(arms))


class _Bases:
    """The baseline's runs by seed and budget, and its decayed ends for the seeds that an arm is paired with."""

    def __init__(self, seeds: BaselineSeeds, at: int | None) -> None:
        self.seeds, self.at = seeds, at
        self.several = any(len(by_budget) > 1 for by_budget in seeds.values())
        self.at_budget = {
            seed: CostToTarget(by_budget[at], at_end=self.several)
            for seed, by_budget in seeds.items()
            if at in by_budget
        }
        self._ends: dict[tuple[int, ...], Ends] = {}

    def ends(self, seeds: Iterable[int] | None = None) -> Ends:
        """Return the decayed ends of some seeds, or of all that have the budget."""
        chosen = tuple(sorted(set(self.at_budget if seeds is None else seeds)))
        if chosen not in self._ends:
            self._ends[chosen] = Ends.of({(None, seed): self.seeds[seed] for seed in chosen})
        return self._ends[chosen]

    def runs_at(self, budget: int | None) -> dict[int, Run]:
        """Return the finished runs of a budget that end at a finite loss, by seed."""
        runs = {seed: by_budget[budget] for seed, by_budget in self.seeds.items() if budget in by_budget}
        return {seed: run for seed, run in runs.items() if run.finished and math.isfinite(float(run.evals["loss"][-1]))}

    def targets(self) -> dict[int, float]:
        """Return the target of every seed: its fitted loss at the budget, or the end of its own curve.

        Raises:
            GrowthError: a run of the baseline is unfinished or diverged.
        """
        for own in self.at_budget.values():
            _check_end(own.run)
        if not self.several:
            return {seed: own.end_loss() for seed, own in self.at_budget.items()}
        ends = self.ends()
        for own in self.at_budget.values():
            for run, why in ends.left_out:
                if run is own.run and why.startswith("diverged"):
                    raise _diverged(run)
        reading = ends.fit.read(log_tokens_at(ends, {seed: own.run for seed, own in self.at_budget.items()}))
        effects = ends.effects(reading).runs
        return {seed: reading.loss + effects.get((None, seed), 0.0) for seed in self.at_budget}


def _check_end(run: Run) -> None:
    if not run.finished:
        raise GrowthError(
            f"{run.name}, was last evaluated at step {int(run.evals['step'][-1])} of {run.budget}",
            where=str(run.folder),
            why="the target is the loss at the end of a fully decayed schedule",
            fix="run the same command again to let this run finish, or compare at a smaller --budget",
        )
    if not math.isfinite(float(run.evals["loss"][-1])):
        raise _diverged(run)


def _diverged(run: Run) -> GrowthError:
    return GrowthError(
        f"{run.name}, ended at a held-out loss of {float(run.evals['loss'][-1]):.4g}",
        where=str(run.folder),
        why="a run that diverged cannot set the target",
        fix="train it again with a lower learning rate, or compare at another --budget",
    )


def _pooled_end(own: CostToTarget, target: float) -> list[str]:
    found = own.cost("tokens", target)
    if found.cost is None or found.cost >= found.end_cost * (1 - 1e-9):
        return []
    return [
        f"{own.run.name}: its last evaluations do not improve, so its fit reaches the target "
        f"after {found.cost:.4g} of {found.end_cost:.4g} tokens"
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
    bases: _Bases,
    targets: dict[int, float],
    pairing_notes: list[str],
) -> Arm:
    arm = _described(list(runs.values()))
    ends = Ends.of({key: found[key] for key in runs})
    notes = [
        *arm.notes,
        *pairing_notes,
        *(note for key in runs for note in no_ends([found[key]], runs[key].budget)),
        *(f"{run.name}: unfinished, last evaluated at step {int(run.evals['step'][-1])} of {run.budget}"
          for run in runs.values() if not run.finished),
    ]  # fmt: skip
    if ends.budgets > 1:
        read = _read_from_ends(arm, runs, found, ends, bases)
    else:
        read = _read_from_curves(arm, runs, bases, targets)
    notes += read.notes
    for estimate in read.estimates:
        if not all(run.has_unit(estimate.unit) for run in runs.values()):
            if estimate.accounting == "sunk":
                notes.append(f"{arm.name}: {estimate.unit} were not recorded")
        elif estimate.unknown:
            if estimate.accounting == "sunk":
                notes.append(f"{arm.name}: {estimate.unit} are not compared, because {estimate.unknown}")
        elif estimate.accounting == "charged" and not math.isfinite(estimate.cost):
            notes.append(f"{arm.name}: source_{estimate.unit} was not recorded, so {estimate.unit} cannot be charged")
    return replace(
        read,
        notes=tuple(notes),
        settings=settings_that_differ(found, bases.seeds),
        surroundings=surroundings_that_differ(found, bases.seeds),
    )


def _read_from_ends(arm: Arm, runs: dict[Key, Run], found: Seeds, ends: Ends, bases: _Bases) -> Arm:
    """Return the arm with costs that are read off the curve through its decayed ends."""
    seeds = [seed for _, seed in runs]
    base_ends = bases.ends(seeds)
    base_runs = {seed: bases.at_budget[seed].run for seed in seeds}
    result = compare_ends(runs, ends, base_runs, base_ends)
    missing = [key for key in runs if key not in ends.keys]
    censored = result.estimates[0].censored
    notes = list(ends.notes)
    notes += [f"{runs[key].name}: censored, because all its ends diverged" for key in missing]
    if result.crossing.where == "after":
        end, target = ends.fit.read(float(ends.fit.logs[-1])).loss, result.crossing.target
        notes.append(f"{arm.name}: censored, its fit ended at {end:.4g}, above the target of {target:.4g}")
    if result.crossing.where == "before":
        notes.append(f"{arm.name}: already below the target at its smallest budget, so its cost is an upper bound")
    if result.crossing.where == "inside" and (beyond := ends.fit.beyond(result.crossing.log_tokens)):
        notes.append(f"{arm.name}: its cost lies {beyond}, to which its curve was extended")
    notes += refined_notes(arm.name, {key: found[key] for key in runs}, base_runs, base_ends, result.crossing)
    points = []
    for budget in sorted({budget for by_budget in bases.seeds.values() for budget in by_budget if budget is not None}):
        there = bases.runs_at(budget)
        chosen = {key: run for key, run in runs.items() if key[1] in there}
        if not chosen:
            continue
        mine = ends if len(chosen) == len(runs) else Ends.of({key: found[key] for key in chosen})
        if not mine.keys:
            continue
        base_there = {seed: there[seed] for _, seed in chosen}
        point = compare_ends(chosen, mine, base_there, bases.ends(base_there))
        tokens = float(np.mean([base_there[seed].evals["tokens"][-1] for _, seed in chosen]))
        points.append(
            BudgetPoint(tokens, point.crossing.target, "ends", _seeds(chosen), point.estimates, point.covered)
        )
    return replace(
        arm,
        estimates=result.estimates,
        censored_seeds=tuple(dict.fromkeys(seed for _, seed in missing or runs)) if censored else (),
        notes=tuple(notes),
        basis="ends",
        budgets=tuple(points),
        target=result.crossing.target,
        covered=result.covered,
    )


def _seeds(keys: Iterable[Key]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(seed for _, seed in keys))


def _read_from_curves(arm: Arm, runs: dict[Key, Run], bases: _Bases, targets: dict[int, float]) -> Arm:
    """Return the arm with costs that are read off the curve of each of its runs."""
    pairs = [(CostToTarget(run), bases.at_budget[seed], targets[seed]) for (_, seed), run in runs.items()]
    estimates, reached, covered = _estimates(pairs)
    notes = [
        f"{own.run.name}: censored, its fit ended at {each.fit_end:.4g}, above the target of {target:.4g}"
        for (own, _, target), each in zip(pairs, reached, strict=True)
        if each.censored
    ]
    notes += [*_at_start(arm.name, pairs, reached), *coarse(arm.name, estimates[0])]
    points: tuple[BudgetPoint, ...] = ()
    if not any(each.run.has_unknown_schedule for own, base, _ in pairs for each in (own, base)):
        points = _at_budgets(pairs, bases) if bases.several else _mid_schedule(pairs, estimates)
    return replace(
        arm,
        estimates=estimates,
        censored_seeds=_seeds(key for key, each in zip(runs, reached, strict=True) if each.censored),
        notes=tuple(notes),
        basis=_basis(pairs),
        budgets=points,
        covered=covered,
    )


def _at_start(name: str, pairs: Sequence[Pair], reached: Sequence[Crossing]) -> list[str]:
    """Note the seeds that were at the target in their first evaluation, if others were not."""
    early = [each.at_start for each in reached]
    if all(early) or not any(early):
        return []
    seeds = _seeds(own.run.key for (own, _, _), is_early in zip(pairs, early, strict=True) if is_early)
    rest = [pair for pair, is_early in zip(pairs, early, strict=True) if not is_early]
    others = _estimates(rest)[0][0]
    first = float(np.mean([each.cost for each in reached if each.at_start]))
    return [
        f"{name}: at its first evaluation, seed{'s' if len(seeds) > 1 else ''} {listed([str(s) for s in seeds])} had "
        f"reached the target, so the mean counts {amount(first, 'tokens')} tokens there; the speedup in tokens over "
        f"the other {len(rest)} of {len(pairs)} runs is {speedup_text(others)}"
    ]


def _basis(pairs: Sequence[Pair]) -> Basis:
    return "curve" if any(own.basis == "curve" for own, _, _ in pairs) else "constant"


def _estimates(pairs: Sequence[Pair]) -> tuple[tuple[Estimate, ...], list[Crossing], Covered | None]:
    """Return the estimates of one arm at the targets of its seeds, its crossings in tokens, and `Covered`."""
    reached: dict[Unit, list[Crossing]] = {unit: [own.cost(unit, target) for own, _, target in pairs] for unit in UNITS}
    censored = any(each.censored for each in reached["tokens"])
    costs, against, ranges = [], [], []
    two_machines = other_machine((own.run, base.run) for own, base, _ in pairs)
    for unit in UNITS:
        mine = np.array([each.end_cost if each.cost is None else each.cost for each in reached[unit]])
        of_base = [_baseline_crossing(base, unit, target) for _, base, target in pairs]
        theirs = np.array([each.cost for each in of_base])
        if unit == "seconds" and two_machines:
            mine = np.full_like(mine, np.nan)
        spans = [np.array([each.span or (np.nan, np.nan) for each in side]) for side in (reached[unit], of_base)]
        for sources in (
            (np.zeros(len(pairs)), np.zeros(len(pairs))),
            (
                np.array([source_cost(own.run, unit, grown=True) for own, _, _ in pairs]),
                np.array([source_cost(base.run, unit, grown=False) for _, base, _ in pairs]),
            ),
        ):
            costs.append(mine + sources[0])
            against.append(theirs + sources[1])
            ranges.append(between_evaluations(spans[0] + sources[0][:, None], spans[1] + sources[1][:, None]))
    intervals: list[Interval | None] = [None] * len(costs)
    covered = None
    keys = [own.run.key for own, _, _ in pairs]
    unpaired = any(each.run.has_unknown_text for own, base, _ in pairs for each in (own, base))
    if censored or unpaired:
        pass
    elif len({source for source, _ in keys}) > 1:
        found = [_over_sources(keys, mine, theirs) for mine, theirs in zip(costs, against, strict=True)]
        intervals = [interval for interval, _ in found]
        covered = next((each for _, each in found if each), None)
    else:
        intervals = speedup_intervals(np.array(costs), np.array(against))
    shared = any(run.shared_machine for own, base, _ in pairs for run in (own.run, base.run))
    estimates = [
        Estimate(
            unit,
            accounting,
            float(mine.mean()),
            float(theirs.mean()),
            censored,
            None if shared and unit == "seconds" else widened(interval, between),
            shared_machine=shared and unit == "seconds" and not two_machines,
            between_evaluations=None if censored or not np.isfinite(mine.mean()) else between,
            unknown=two_machines if unit == "seconds" else "",
        )
        for (unit, accounting), mine, theirs, interval, between in zip(
            ((unit, accounting) for unit in UNITS for accounting in ACCOUNTINGS),
            costs,
            against,
            intervals,
            ranges,
            strict=True,
        )
    ]
    return tuple(estimates), reached["tokens"], covered


def _over_sources(
    keys: Sequence[Key], costs: NDArray[np.float64], against: NDArray[np.float64]
) -> tuple[Interval | None, Covered | None]:
    """Return the interval of a speedup over sources and seeds."""
    if not (np.isfinite(costs).all() and np.isfinite(against).all() and costs.mean() > 0):
        return None, None
    by_seed = {seed: cost for (_, seed), cost in zip(keys, against.tolist(), strict=True)}
    error = over_runs(log_ratios(dict(zip(keys, costs.tolist(), strict=True)), by_seed))
    if error is None:
        return None, None
    return interval_of(math.log(against.mean() / costs.mean()), [error]), Covered(error.sources, error.seeds, False)


def _at_budgets(pairs: Sequence[Pair], bases: _Bases) -> tuple[BudgetPoint, ...]:
    """Compare an arm of one budget with every decayed end of the baseline."""
    points = []
    for budget in sorted({budget for by_budget in bases.seeds.values() for budget in by_budget if budget is not None}):
        there = bases.runs_at(budget)
        if not (seeds := [own.run.seed for own, _, _ in pairs if own.run.seed in there]):
            continue
        ends = bases.ends(seeds)
        reading = ends.fit.read(log_tokens_at(ends, {seed: there[seed] for seed in seeds}))
        effects = ends.effects(reading).runs
        chosen: list[Pair] = [
            (own, CostToTarget(there[own.run.seed], at_end=True), reading.loss + effects.get((None, own.run.seed), 0.0))
            for own, _, _ in pairs
            if own.run.seed in there
        ]
        estimates, _, covered = _estimates(chosen)
        points.append(_point(chosen, estimates, [float(b.run.evals["tokens"][-1]) for _, b, _ in chosen], covered))
    return tuple(points)


def _mid_schedule(pairs: list[Pair], at_end: tuple[Estimate, ...]) -> tuple[BudgetPoint, ...]:
    """Compare the arm at losses that the baseline passes before its end, where neither schedule has decayed."""
    ends = [float(base.run.evals["tokens"][-1]) for _, base, _ in pairs]
    last = _point(pairs, at_end, ends)
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
        estimates, _, covered = _estimates(there)
        points.append(_point(there, estimates, budgets, covered))
    return (*points, last)


def _point(
    pairs: list[Pair], estimates: tuple[Estimate, ...], budgets: list[float], covered: Covered | None = None
) -> BudgetPoint:
    target = float(np.mean([target for _, _, target in pairs]))
    seeds = _seeds(own.run.key for own, _, _ in pairs)
    return BudgetPoint(float(np.mean(budgets)), target, _basis(pairs), seeds, estimates, covered)


def _started_below(base: CostToTarget, target: float) -> bool:
    return base.cost("tokens", target).cost in (None, 0.0)


def _baseline_crossing(base: CostToTarget, unit: Unit, target: float) -> Crossing:
    """Return the crossing of the target by the baseline's own curve.

    Raises:
        GrowthError: its cost is 0.
    """
    crossing = base.cost(unit, target)
    assert crossing.cost is not None, "a target is never below the end of the baseline's own fit"
    if crossing.cost == 0 and base.cost("tokens", target).cost != 0:
        raise GrowthError(
            f"{base.run.name}, recorded 0 {unit} where it reached a loss of {target:.4g}",
            where=str(base.run.folder),
            why="no speedup can be computed against a cost of 0",
            fix=f"correct {unit!r} in its eval records, or remove it from all of them: it may be missing",
        )
    if crossing.cost == 0:
        raise GrowthError(
            f"{base.run.name}, never fell below its first loss",
            where=str(base.run.folder),
            why="the baseline has no cost to compare with",
            fix="train it for more steps, and check the losses of its eval records",
        )
    return crossing
