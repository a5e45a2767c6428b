"""Notes on runs: sweeps of the learning rate, and ends that are missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from phigrow.records.run import Budgets, Run


def swept(runs: Sequence[Run]) -> list[str]:
    """Note that learning rates were chosen by a sweep, and that no cost includes it."""
    sweep = (runs[0].meta.get("config") or {}).get("lr_chosen_by")
    if not isinstance(sweep, dict) or not {"steps", "lr", "seeds"} <= sweep.keys():
        return []
    steps = sweep["steps"]
    if isinstance(steps, list):
        how = (
            f"halved after {', '.join(map(str, steps[:-1]))} of {steps[-1]} steps"
            if len(steps) > 1
            else f"{steps[0]} steps each"
        )
        return [
            f"every arm's learning rate was chosen by its own sweep: {len(sweep['lr'])} rates, {how}, with seeds "
            f"{', '.join(map(str, sweep['seeds']))}, which are not reported; no arm's cost includes its sweep"
        ]
    return [
        f"every arm's learning rate was chosen by its own sweep: {len(sweep['lr'])} rates, {steps} steps "
        f"each, with {len(sweep['seeds'])} of the seeds; no arm's cost includes its sweep"
    ]


def no_ends(runs: Iterable[Budgets], at: int | None = None) -> list[str]:
    """Note the runs that are left out because they are unfinished, but not those at the budget ``at``."""
    others = [run for by_budget in runs for budget, run in by_budget.items() if budget != at]
    return [
        f"{run.name}: the run of {run.budget} steps is left out: its last evaluation is at step {run.evals['step'][-1]}"
        for run in others
        if not run.finished
    ]
