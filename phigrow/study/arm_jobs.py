"""Jobs before the runs of an arm (source, expansion, optimizer state), and the keys of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phigrow.study.job import Job
from phigrow.study.job_builder import JobBuilder, hash_of, result_keys
from phigrow.study.settings import CONTINUED, FLAT, Arm
from phigrow.study.source_jobs import SourceJobs


class ArmJobs:
    """Starts of arms, and the keys, hashes and names that their runs and sweeps share.

    The seed of its source and its own seed identify a run of an arm.
    """

    def __init__(self, build: JobBuilder, sources: SourceJobs) -> None:
        self.build, self.sources, self.study = build, sources, build.study
        self._start_keys: dict[tuple[str, int | None, int], str] = {}

    def starts(self, arm: Arm, source_seed: int | None, seed: int) -> list[Job]:
        """Return the jobs that make the start of an arm: the source, its expansion, and the grown optimizer state."""
        jobs = self.sources.of(arm, source_seed)
        if not arm.grows:
            return jobs
        start, needs = self.sources.weights(arm, source_seed), tuple(job.name for job in jobs[-1:])
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
        """Return the names of the jobs that a run needs."""
        starts = self.starts(arm, source_seed, seed)
        last = 2 if arm.grows and arm.state is not None else 1  # the expansion and the state, or the source
        return (*self.build.needs_data, *(job.name for job in starts[-last:]))

    def prefix(self, arm: Arm, source_seed: int | None, seed: int) -> str:
        """Return the common beginning of the names of a run's jobs."""
        return f"{arm.label}/{self.replicate(arm, source_seed, seed)}"

    def replicate(self, arm: Arm, source_seed: int | None, seed: int) -> str:
        """Return a name made of the seeds of a run."""
        several = arm.needs_source and len(self.study.source(arm.source).seeds) > 1
        return f"source{source_seed}-seed{seed}" if several else f"seed{seed}"

    def run_key(self, arm: Arm, source_seed: int | None, seed: int, rate: Any, steps: int | None = None) -> str:
        """Return a hash of everything on which a run of ``steps`` depends, or its trunk if ``steps`` is None."""
        decay = steps and self.study.decay_steps(steps)
        train = result_keys(self.study.train | arm.train)
        state = [arm.state] if arm.state is not None else []
        more = [text] if (text := self._parts(arm)) else []
        if arm.is_taught and not arm.has_source:  # in other arms the teacher is part of the start, which is hashed
            more.append({"teacher": self.sources.key(arm, source_seed)})
        start = self._start_key(arm, source_seed, seed)
        return hash_of([self.build.data_key, start, train, seed, rate, steps, decay, *state, *more])

    def run_keys(self, arm: Arm, source_seed: int | None, seed: int, *, choosing: bool = False) -> dict[str, Any]:
        """Return the keys of a training run; with ``choosing``, of a run that helps to choose a learning rate."""
        study = self.study
        keys = study.train | arm.train | {"arm": arm.name, "seed": seed} | self._parts(arm, choosing=choosing)
        if properties := self._properties(arm, source_seed):
            keys["study"] = properties
        if not arm.needs_source:
            return keys | {"model": study.model_of(arm)}
        if arm.is_taught:
            keys["teacher"] = str(self.sources.weights(arm, source_seed))
        cost = {f"source_{unit}": spent for unit, spent in study.source(arm.source).cost.items()}
        if not arm.has_source:
            return keys | {"model": study.model_of(arm)} | cost
        # data_start 0: every arm reads the same text at the same step, with or without grown optimizer state.
        state = (
            {"init_optimizer": str(self._state(arm, source_seed, seed)), "data_start": 0}
            if arm.state is not None
            else {}
        )
        return keys | {"init": str(self._start(arm, source_seed, seed))} | cost | state

    def training(self, *given: Any, arm: Arm, source_seed: int | None, **which: Any) -> Job:
        """Return a job that trains an arm; see `JobBuilder.training`."""
        start = self.sources.weights(arm, source_seed) if arm.needs_source else None
        return self.build.training(*given, arm=arm, source_seed=source_seed, start=start, **which)

    def _parts(self, arm: Arm, *, choosing: bool = False) -> dict[str, Any]:
        """Return the keys of the blocks that an arm reads and is evaluated on."""
        if (text := self.study.text) is None:
            return {}
        return {
            "data_part": list(text.source if arm.same_text else text.arms),
            "eval_part": list(text.choose if choosing else text.report),
        }

    def _properties(self, arm: Arm, source_seed: int | None) -> dict[str, Any]:
        """Return the properties of a run in its study, for the records."""
        properties: dict[str, Any] = {}
        if arm.method == FLAT:
            properties["flat"] = True
        if arm.needs_source and self.study.source(arm.source).path is None:
            properties |= {"source_seed": source_seed, "source_age": arm.age}
            properties |= {"source": arm.source} if arm.source else {}
            properties |= {"source_constant": True} if arm.constant else {}
            properties |= {"same_text": True} if arm.same_text else {}
        return properties

    def _start_key(self, arm: Arm, source_seed: int | None, seed: int) -> str:
        """Return a hash of everything on which the first weights depend.

        For a growth it includes the hash of the plan, so that it changes if the method changes.
        """
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
