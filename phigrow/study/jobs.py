"""Jobs of a study, with the jobs that each one needs and the folder of each result.

The key of a job is a hash of everything on which its result depends, including the keys of the jobs before it. It is
part of the folder's name. So a changed study reuses every result that is still valid, and makes the others beside it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from phigrow.study.arm_jobs import ArmJobs
from phigrow.study.job import Job
from phigrow.study.job_builder import JobBuilder
from phigrow.study.rate_jobs import RateJobs
from phigrow.study.rates import Rates
from phigrow.study.refining import Refining
from phigrow.study.settings import Arm, Study
from phigrow.study.source_jobs import SourceJobs


def jobs_of(study: Study) -> list[Job]:
    """Return all jobs of a study in the order in which they run: each after those it needs.

    See `StudyJobs.all`.

    >>> [job.name for job in jobs_of(study)][:2]  # doctest: +SKIP
    ['data', 'source']
    """
    return StudyJobs(study).all()


class StudyJobs:
    """Jobs of a study, in order. If rates are chosen by halving, the jobs depend on results, which `all` reads anew."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.build = JobBuilder(study)
        self.sources = SourceJobs(self.build)
        self.arms = ArmJobs(self.build, self.sources)
        self.tried = RateJobs(self.arms)
        self.refining = Refining(study)

    def all(self) -> list[Job]:
        """Return all jobs in the order in which they run.

        The first seeds of all arms come first, then the other seeds, then longer budgets. Refined ends come last,
        because they depend on the other ends. The learning rate of an arm is chosen directly before its first run.
        """
        study = self.study
        self.tried.forget()
        jobs = [self.data()] if self.build.needs_data else []
        if all(len(source.steps) == 1 and len(source.seeds) == 1 for source in study.sources):
            jobs += [
                job for arm in study.arms for seed in self.sources.seeds(arm) for job in self.sources.of(arm, seed)
            ]
        if study.sweep and not study.sweep.halves:  # the sweeps of all arms come first, because they are short
            for arm in study.arms:
                jobs += self.tried.of(arm)
        replicates = [
            (arm, source_seed, seed)
            for seed in study.seeds
            for arm in study.arms
            for source_seed in self.sources.seeds(arm)
        ]
        firsts = [(arm, self.sources.seeds(arm)[0], study.seeds[0]) for arm in study.arms]
        for arm, source_seed, seed in [*firsts, *(each for each in replicates if each not in firsts)]:
            if study.sweep and study.sweep.halves:
                jobs += self.tried.of(arm)
            jobs += self._runs(arm, source_seed, seed, study.budgets_of(arm))
        for arm, source_seed, seed in replicates:
            if arm.longer:
                jobs += self._runs(arm, source_seed, seed, arm.longer, after=study.budgets_of(arm))
        refined = {arm.label: self.refining.steps(arm, jobs) for arm in study.arms}
        for arm, source_seed, seed in replicates:
            if (steps := refined[arm.label]) is not None:
                jobs.append(self._refined(arm, source_seed, seed, steps))
        return list({job.name: job for job in jobs}.values())  # a sweep and a run of the same seed share one start

    def data(self) -> Job:
        """Return the job that packs the text into blocks."""
        return Job("data", "data", self.build.data_key, self.build.data_folder)

    def rates(self, arm: Arm) -> Rates:
        """Return the state of an arm's choice of a learning rate."""
        return self.tried.rates(arm)

    def _runs(
        self, arm: Arm, source_seed: int | None, seed: int, budgets: tuple[int, ...], after: tuple[int, ...] = ()
    ) -> list[Job]:
        """Return the runs of one arm and seed: a trunk and a decayed end per budget, or one run for a single budget.

        Args:
            arm, source_seed, seed: identify the runs.
            budgets: budgets of the ends.
            after: shorter budgets that are trained before, off the same trunk.
        """
        jobs = self.arms.starts(arm, source_seed, seed)
        branches = len(self.study.budgets_of(arm)) + len(arm.longer) > 1
        if branches:
            jobs.append(self._trunk(arm, source_seed, seed, budgets, after))
        return jobs + [self._end(arm, source_seed, seed, budget, branches, bool(after)) for budget in budgets]

    def _trunk(
        self, arm: Arm, source_seed: int | None, seed: int, budgets: tuple[int, ...], after: tuple[int, ...]
    ) -> Job:
        """Return the job that trains at a constant rate until the decay of the last budget begins."""
        points = [self.build.branch_step(budget) for budget in (*after, *budgets)]
        first = self.build.branch_step(after[-1]) if after else 0
        name = self.arms.prefix(arm, source_seed, seed)
        return self.arms.training(
            f"{name}/trunk-longer" if after else f"{name}/trunk", "trunk",
            self.arms.run_key(arm, source_seed, seed, self._rate(arm)),
            self._run_folder(arm, source_seed, seed) / "trunk",
            (f"{name}/trunk",) if after else self._needs_of_runs(arm, source_seed, seed),
            self.arms.run_keys(arm, source_seed, seed) | self._shared(arm, source_seed, seed)
            | {"steps": points[-1], "schedule": "wsd", "decay": 0, "save_at": points, "export": None},
            arm=arm, source_seed=source_seed, seed=seed, first=first, steps=points[-1],
        )  # fmt: skip

    def _end(
        self, arm: Arm, source_seed: int | None, seed: int, budget: int, branches: bool, longer: bool = False
    ) -> Job:
        """Return the job that trains to the end of one budget, off the trunk if there are several budgets."""
        runs, schedule = self._run_folder(arm, source_seed, seed), self.build.schedule(budget)
        branch = {"branch_from": str(runs / "trunk")} if branches else {}
        name = self.arms.prefix(arm, source_seed, seed)
        return self.arms.training(
            f"{name}/{budget}", "end", self.arms.run_key(arm, source_seed, seed, self._rate(arm), budget),
            runs / f"{budget}-decay{schedule['decay']}",
            (f"{name}/trunk-longer" if longer else f"{name}/trunk",)
            if branches
            else self._needs_of_runs(arm, source_seed, seed),
            self.arms.run_keys(arm, source_seed, seed) | self._shared(arm, source_seed, seed) | schedule | branch,
            arm=arm, source_seed=source_seed, seed=seed, budget=budget,
            first=self.build.branch_step(budget) if branches else 0, steps=budget,
        )  # fmt: skip

    def _refined(self, arm: Arm, source_seed: int | None, seed: int, steps: int) -> Job:
        """Train a whole run to where the arm's cost was read; its trunk has no checkpoint at that step."""
        end = self._end(arm, source_seed, seed, steps, branches=False)
        return replace(end, keys=end.keys | {"study": {**end.keys.get("study", {}), "refined": True}})

    def _run_folder(self, arm: Arm, source_seed: int | None, seed: int) -> Path:
        key = self.arms.run_key(arm, source_seed, seed, self._rate(arm))
        return self.study.out / "runs" / arm.label / f"{self.arms.replicate(arm, source_seed, seed)}-{key}"

    def _rate(self, arm: Arm) -> Any:
        """Return the identity of the runs' learning rate: the rate, or the sweep of one length that chooses it."""
        if self.study.sweep is None:
            return self.study.train.get("lr")
        return self.rates(arm).best if self.study.sweep.halves else self.study.sweep.record()

    def _shared(self, arm: Arm, source_seed: int | None, seed: int) -> dict[str, Any]:
        """Return the keys that a trunk and its branches share."""
        shared: dict[str, Any] = {"trunk": self.arms.prefix(arm, source_seed, seed).replace("/", "-")}
        if self.study.sweep:
            rates = self.rates(arm)
            shared["lr_chosen_by"] = rates.record(self.study.sweep)
            if rates.best is not None:
                shared["lr"] = rates.best
        return shared

    def _needs_of_runs(self, arm: Arm, source_seed: int | None, seed: int) -> tuple[str, ...]:
        tried = [job.name for job in self.tried.of(arm) if job.kind == "sweep"] if self.study.sweep else []
        return (*self.arms.needs(arm, source_seed, seed), *tried)
