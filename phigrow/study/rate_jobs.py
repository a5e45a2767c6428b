"""Jobs by which arms choose their learning rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from phigrow.study import progress
from phigrow.study.arm_jobs import ArmJobs
from phigrow.study.job import Job
from phigrow.study.rates import Rates, choose
from phigrow.study.settings import FLAT, Arm


class RateJobs:
    """Jobs that try learning rates, and their results so far. Later jobs depend on the results of earlier ones."""

    def __init__(self, arms: ArmJobs) -> None:
        self.arms, self.build, self.study = arms, arms.build, arms.study
        self._rates: dict[str, Rates] = {}
        self._choices: dict[str, list[Job]] = {}

    def forget(self) -> None:
        """Forget the results, so that they are read again."""
        self._rates, self._choices = {}, {}

    def rates(self, arm: Arm) -> Rates:
        """Return the state of an arm's choice of a learning rate."""
        if arm.label not in self._rates:
            sweep = self.study.sweep
            assert sweep is not None

            def loss_of(rate: float, length: int) -> float | None:
                losses = []
                for seed in sweep.seeds:
                    job = self._end(arm, seed, rate, length)
                    if (ended := progress.done(job)) is None:
                        return None
                    losses.append(float("inf") if ended["heldout_loss"] is None else ended["heldout_loss"])
                return sum(losses) / len(losses)

            self._rates[arm.label] = choose(sweep, loss_of)
        return self._rates[arm.label]

    def of(self, arm: Arm) -> list[Job]:
        """Return the jobs that try learning rates: the known runs, and a placeholder for each undecided run."""
        if arm.label not in self._choices:
            self._choices[arm.label] = self._made(arm)
        return self._choices[arm.label]

    def _made(self, arm: Arm) -> list[Job]:
        sweep = self.study.sweep
        assert sweep is not None
        jobs: list[Job] = []
        rates = self.rates(arm)
        source_seed = self.arms.sources.seeds(arm)[0]
        for seed in sweep.seeds:
            jobs += self.arms.starts(arm, source_seed, seed)
        for rate in sorted(rates.tried):
            for seed in sweep.seeds:
                for length in range(rates.tried[rate]):
                    if sweep.halves:
                        jobs.append(self._trunk(arm, seed, rate, length))
                    jobs.append(self._end(arm, seed, rate, length))
        known = tuple(job.name for job in jobs if job.kind == "sweep")
        for length, count in enumerate(rates.undecided):
            first = self.build.branch_step(self._lengths(arm)[length - 1]) if length else 0
            for number in range(count * len(sweep.seeds)):
                job = self._end(arm, sweep.seeds[0], sweep.lr[0], length)
                flops = job.flops / job.tokens * self.study.batch_tokens if job.tokens else 0.0
                steps = job.steps - first
                jobs.append(
                    replace(
                        job, name=f"{arm.label}/sweep/{job.steps}/{number}", key="", needs=known, undecided=True,
                        folder=self.study.out / "undecided", first=first, tokens=steps * self.study.batch_tokens,
                        flops=steps * flops,
                    )
                )  # fmt: skip
        return jobs

    def _lengths(self, arm: Arm) -> tuple[int, ...]:
        """Return the steps of the sweep's runs; a flat arm has the steps that cost the same FLOPs."""
        study = self.study
        assert study.sweep is not None
        if arm.method != FLAT:
            return study.sweep.steps
        share = study.budgets_of(arm)[-1] / study.budgets[-1]
        return tuple(max(2, round(steps * share)) for steps in study.sweep.steps)

    def _trunk(self, arm: Arm, seed: int, rate: float, length: int) -> Job:
        sweep = self.study.sweep
        assert sweep is not None
        folder, name = self._folder(arm, seed, rate), f"{arm.label}/sweep/lr{rate:g}/seed{seed}"
        points = [self.build.branch_step(steps) for steps in self._lengths(arm)[: length + 1]]
        first, point = points[-2] if length else 0, points[-1]
        source_seed = self.arms.sources.seeds(arm)[0]
        return self.arms.training(
            f"{name}/trunk-{point}", "trunk", self.arms.run_key(arm, source_seed, seed, rate), folder / "trunk",
            (f"{name}/trunk-{first}",) if first else self.arms.needs(arm, source_seed, seed),
            self._keys(arm, seed, rate) | self.build.constant(name, points),
            arm=arm, source_seed=source_seed, seed=seed, first=first, steps=point,
        )  # fmt: skip

    def _end(self, arm: Arm, seed: int, rate: float, length: int) -> Job:
        """Return the decayed end of one rate at one of the sweep's lengths."""
        sweep = self.study.sweep
        assert sweep is not None
        steps, source_seed = self._lengths(arm)[length], self.arms.sources.seeds(arm)[0]
        name, keys = f"{arm.label}/sweep/lr{rate:g}/seed{seed}", self._keys(arm, seed, rate)
        folder, needs, first = self._folder(arm, seed, rate, steps), self.arms.needs(arm, source_seed, seed), 0
        if sweep.halves:
            trunk, first = folder / "trunk", self.build.branch_step(steps)
            needs, folder = (f"{name}/trunk-{first}",), folder / f"{steps}-decay{steps - first}"
            keys |= self.build.branch(name, trunk)
            name = f"{name}/{steps}"
        return self.arms.training(
            name, "sweep", self.arms.run_key(arm, source_seed, seed, rate, steps), folder, needs,
            keys | self.build.schedule(steps), arm=arm, source_seed=source_seed, seed=seed, first=first, steps=steps,
        )  # fmt: skip

    def _folder(self, arm: Arm, seed: int, rate: float, steps: int | None = None) -> Path:
        sweep = self.study.sweep
        assert sweep is not None
        key = self.arms.run_key(arm, self.arms.sources.seeds(arm)[0], seed, rate, None if sweep.halves else steps)
        return self.study.out / "sweep" / arm.label / f"lr{rate:g}-seed{seed}-{key}"

    def _keys(self, arm: Arm, seed: int, rate: float) -> dict[str, Any]:
        keys = self.arms.run_keys(arm, self.arms.sources.seeds(arm)[0], seed, choosing=True)
        return keys | {"lr": rate, "export": None, "nonfinite_limit": 0}  # a rate that diverges has lost
