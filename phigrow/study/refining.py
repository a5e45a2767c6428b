"""Steps at which `refine` trains one more decayed end: where the cost of an arm was read between two ends."""

from __future__ import annotations

from collections.abc import Sequence

from phigrow.errors import GrowthError
from phigrow.study import progress
from phigrow.study.job import Job
from phigrow.study.settings import FLAT, Arm, Study

CLOSE = 0.02
"""An end this close to the crossing, relative to its steps, is near enough."""


class Refining:
    """Chooses the steps of refined ends; known once all ends of an arm and of the baseline are done."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._steps: dict[str, int | None] = {}

    def steps(self, arm: Arm, jobs: Sequence[Job]) -> int | None:
        """Return the steps of an arm's refined ends.

        Args:
            arm: an arm of the study.
            jobs: of the study, without refined ends.

        Returns:
            None while an end of the arm or the baseline is missing, for the baseline and flat models, and where
            nothing was interpolated: the arm's curve crosses the target beyond its ends, or at one of them.
        """
        if not self.study.refine or arm.method == FLAT or arm.name == self.study.baseline:
            return None
        if arm.label not in self._steps:
            ends = [job for job in jobs if job.kind == "end" and job.arm is not None]
            mine = [job for job in ends if job.arm == arm]
            base = [job for job in ends if job.arm is not None and job.arm.name == self.study.baseline]
            if any(progress.done(job) is None for job in (*mine, *base)):
                return None
            try:
                self._steps[arm.label] = self._crossing(mine, base)
            except GrowthError:  # records that cannot be read: the report says so, and other jobs go on
                self._steps[arm.label] = None
        return self._steps[arm.label]

    def _crossing(self, mine: list[Job], base: list[Job]) -> int | None:
        from phigrow.measure import load_run
        from phigrow.measure.ends import Ends
        from phigrow.measure.refined import tokens_to_refine
        from phigrow.records.run import Run, Seeds

        budgets = {job.budget for job in mine}
        shared = [job.budget for job in base if job.budget in budgets]
        if not shared:
            return None
        at = max(budget for budget in shared if budget is not None)
        found: Seeds = {}
        for job in mine:
            found.setdefault((job.source_seed, job.seed), {})[job.budget] = load_run(job.folder)
        by_seed: dict[int, dict[int | None, Run]] = {}
        for job in base:
            by_seed.setdefault(job.seed, {})[job.budget] = load_run(job.folder)
        ends = Ends.of({(None, seed): by_budget for seed, by_budget in by_seed.items()})
        tokens = tokens_to_refine(found, {seed: runs[at] for seed, runs in by_seed.items()}, ends)
        if tokens is None:
            return None
        steps = round(tokens / self.study.batch_tokens)
        near = any(abs(steps - budget) <= CLOSE * budget for budget in budgets if budget is not None)
        return None if near or steps <= self.study.decay_steps(steps) else steps
