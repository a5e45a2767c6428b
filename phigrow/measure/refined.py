"""Refined ends: decayed ends trained at a cost that was read between two others, to see how far off the reading was."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from phigrow.measure.cost_of_ends import log_tokens_at
from phigrow.measure.ends import Crossing, Ends, cross
from phigrow.records.run import Run, Seeds

NEAR = 0.1
"""Distance in log cost from a reading up to which a refined end was trained for it, and not for another budget."""


def tokens_to_refine(found: Seeds, base_runs: Mapping[int, Run], base: Ends) -> float | None:
    """Return the tokens at which an arm's curve meets the baseline's loss; None where that is not between its ends.

    Args:
        found: runs of the arm. Refined ends are not read, so the answer stays the same when they are there.
        base_runs: of the baseline, at the budget that sets the target, by seed.
        base: decayed ends of the baseline.
    """
    crossing = _without_refined(found, base_runs, base)
    return None if crossing is None else math.exp(crossing.log_tokens)


def refined_notes(name: str, found: Seeds, base_runs: Mapping[int, Run], base: Ends, now: Crossing) -> list[str]:
    """Say how far off the reading between decayed ends was, for an arm that has a refined end.

    Args:
        name: of the arm.
        found, base_runs, base: as for `tokens_to_refine`.
        now: the crossing that was read with the refined ends.
    """
    before = _without_refined(found, base_runs, base)
    if before is None or now.where != "inside":
        return []
    refined = [
        run
        for by_budget in found.values()
        for run in by_budget.values()
        if run.is_refined and run.finished and abs(math.log(float(run.evals["tokens"][-1])) - before.log_tokens) < NEAR
    ]
    if not refined:
        return []
    loss = float(np.mean([float(run.evals["loss"][-1]) for run in refined]))
    off = math.expm1(before.log_tokens - now.log_tokens)
    steps = ", ".join(str(budget) for budget in sorted({run.budget for run in refined if run.budget is not None}))
    return [
        f"{name}: refined by ends of {steps} steps, which have a loss of {loss:.4f} (target {now.target:.4f}); "
        f"without them its cost would read {abs(off):.1%} {'more' if off > 0 else 'less'}"
    ]


def _without_refined(found: Seeds, base_runs: Mapping[int, Run], base: Ends) -> Crossing | None:
    regular: Seeds = {
        key: {budget: run for budget, run in by_budget.items() if not run.is_refined}
        for key, by_budget in found.items()
        if key[1] in base_runs
    }
    ends = Ends.of(regular)
    if not base.keys or ends.budgets < 2 or any(key not in ends.keys for key in regular):
        return None
    runs = [run for by_budget in regular.values() for run in by_budget.values()]
    starts = [run.held_out(0) for run in runs]
    start = math.inf if None in starts else float(np.mean([loss for loss in starts if loss is not None]))
    crossing = cross(ends, base, log_tokens_at(base, base_runs), start)
    inside = crossing.where == "inside" and not ends.fit.beyond(crossing.log_tokens)
    return crossing if inside else None
