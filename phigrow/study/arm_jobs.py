"""What the arms of a study start from, and the keys of their runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phigrow.study.job import Job
from phigrow.study.job_builder import JobBuilder, hash_of, result_keys
from phigrow.study.settings import CONTINUED, FLAT, Arm
from phigrow.study.source_jobs import SourceJobs


class ArmJobs:
    """Starts of arms, and the keys, hashes and names that their runs and sweeps share.

    A run of an arm is identified by the seed of its source and its own seed.
    """

    def __init__(self, build: JobBuilder, sources: SourceJobs) -> None:
        self.build, self.sources, self.study = build, sources, build.study
        self._start_keys: dict[tuple[str, int | None, int], str] = {}

    def starts(self, arm: Arm, source_seed: int | None, seed: int) -> list[Job]:
        """Make what an arm starts from: the source, its expansion, and the grown state of the optimizer."""
        jobs = self.sources.of(arm, source_seed)
        if not arm.grows:
            return jobs
        start, needs = self.sources.weights(arm, source_seed), tuple(job.name for job in jobs if job.kind == "source")
        prefix, key = self.prefix(arm, source_seed, seed), self._start_key(arm, source_seed, seed)
        folder = self._start(arm, source_seed, seed)
        shared = {"arm": arm, "source_seed": source_seed, "seed": seed, "start": start}
        text = self.build.needs_data if arm.learn is not None else ()
        jobs.append(Job(f"{prefix}/start", "expand", key, folder, (*text, *needs), **shared))  # type: ignore[arg-type]
        if arm.state is not None:
            state = self._state(arm, source_seed, seed)
            made = (f"{prefix}/start", *text, *needs)
            jobs.append(Job(f"{prefix}/state", "state", key, state, made, **shared))  # type: ignore[arg-type]
        return jobs

    def needs(self, arm: Arm, source_seed: int | None, seed: int) -> tuple[str, ...]:
        """Names of the jobs before a run."""
        starts = self.starts(arm, source_seed, seed)
        wanted = ("expand", "state") if arm.grows else ("source",)
        return (*self.build.needs_data, *(job.name for job in starts if job.kind in wanted))

    def prefix(self, arm: Arm, source_seed: int | None, seed: int) -> str:
        """What the names of the jobs of a run begin with."""
        return f"{arm.label}/{self.replicate(arm, source_seed, seed)}"

    def replicate(self, arm: Arm, source_seed: int | None, seed: int) -> str:
        """Name the seeds of a run."""
        several = arm.needs_source and len(self.study.source(arm.source).seeds) > 1
        return f"source{source_seed}-seed{seed}" if several else f"seed{seed}"

    def run_key(self, arm: Arm, source_seed: int | None, seed: int, rate: Any, steps: int | None = None) -> str:
        """A hash of everything that a run of ``steps`` depends on; without steps, that its trunk depends on."""
        decay = steps and self.study.decay_steps(steps)
        train = result_keys(self.study.train | arm.train)
        state = [arm.state] if arm.state is not None else []
        more = [text] if (text := self._parts(arm)) else []
        if arm.is_taught and not arm.has_source:  # elsewhere the teacher is part of what the arm starts from
            more.append({"teacher": self.sources.key(arm, source_seed)})
        start = self._start_key(arm, source_seed, seed)
        return hash_of([self.build.data_key, start, train, seed, rate, steps, decay, *state, *more])

    def run_keys(self, arm: Arm, source_seed: int | None, seed: int, *, choosing: bool = False) -> dict[str, Any]:
        """Keys of a training run; ``choosing``: one by which a learning rate is chosen."""
        study = self.study
        keys = study.train | arm.train | {"arm": arm.name, "seed": seed} | self._parts(arm, choosing=choosing)
        if facts := self._facts(arm, source_seed):
            keys["study"] = facts
        if not arm.needs_source:
            return keys | {"model": study.model_of(arm)}
        if arm.is_taught:
            keys["teacher"] = str(self.sources.weights(arm, source_seed))
        cost = {f"source_{unit}": spent for unit, spent in study.source(arm.source).cost.items()}
        if not arm.has_source:
            return keys | {"model": study.model_of(arm)} | cost
        # Every arm reads the same text at the same step, whatever state it starts with.
        state = (
            {"init_optimizer": str(self._state(arm, source_seed, seed)), "data_start": 0}
            if arm.state is not None
            else {}
        )
        return keys | {"init": str(self._start(arm, source_seed, seed))} | cost | state

    def training(self, *given: Any, arm: Arm, source_seed: int | None, **which: Any) -> Job:
        """A job that trains an arm; see `JobBuilder.training`."""
        start = self.sources.weights(arm, source_seed) if arm.needs_source else None
        return self.build.training(*given, arm=arm, source_seed=source_seed, start=start, **which)

    def _parts(self, arm: Arm, *, choosing: bool = False) -> dict[str, Any]:
        """Which blocks an arm reads and is evaluated on."""
        if (text := self.study.text) is None:
            return {}
        return {
            "data_part": list(text.source if arm.same_text else text.arms),
            "eval_part": list(text.choose if choosing else text.report),
        }

    def _facts(self, arm: Arm, source_seed: int | None) -> dict[str, Any]:
        """What the records of a run say about its place in the study."""
        facts: dict[str, Any] = {}
        if arm.method == FLAT:
            facts["flat"] = True
        if arm.needs_source and self.study.source(arm.source).path is None:
            facts |= {"source_seed": source_seed, "source_age": arm.age}
            facts |= {"source": arm.source} if arm.source else {}
            facts |= {"source_constant": True} if arm.constant else {}
            facts |= {"same_text": True} if arm.same_text else {}
        return facts

    def _start_key(self, arm: Arm, source_seed: int | None, seed: int) -> str:
        """A hash of everything that the first weights depend on; of a growth the resolved plan, so that a changed
        method is noticed."""
        from phigrow.growth.planner import make_plan

        study = self.study
        if not arm.has_source:
            return hash_of(study.model_of(arm))
        source = study.source(arm.source)
        source_key = self.sources.key(arm, source_seed)
        if arm.method == CONTINUED:
            return source_key
        identity = (arm.label, source_seed, seed)
        if identity not in self._start_keys:
            plan = make_plan(source.config, study.dst, arm.spec(seed))
            learning = [arm.learn, self.build.data_key] if arm.learn is not None else []
            self._start_keys[identity] = hash_of([source_key, plan.hash, *learning])
        return self._start_keys[identity]

    def _start(self, arm: Arm, source_seed: int | None, seed: int) -> Path:
        if not arm.grows:
            return self.sources.weights(arm, source_seed)
        key = self._start_key(arm, source_seed, seed)
        return self.study.out / "starts" / arm.label / f"{self.replicate(arm, source_seed, seed)}-{key}"

    def _state(self, arm: Arm, source_seed: int | None, seed: int) -> Path:
        start = self._start(arm, source_seed, seed)
        return start.with_name(f"{start.name}-{arm.state}")
