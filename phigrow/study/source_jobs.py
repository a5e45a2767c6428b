"""Jobs that train the sources of a study: a trunk with a decayed end at each age, for each seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phigrow.study.job import Job
from phigrow.study.job_builder import JobBuilder, hash_of, result_keys
from phigrow.study.settings import CONTINUED, Arm, Source


class SourceJobs:
    """Jobs, keys and folders of sources."""

    def __init__(self, build: JobBuilder) -> None:
        self.build, self.study = build, build.study
        self._keys: dict[tuple[Any, ...], str] = {}
        self._jobs: dict[tuple[str, int], list[Job]] = {}

    def seeds(self, arm: Arm) -> tuple[int | None, ...]:
        """Return the seeds of an arm's source; ``(None,)`` if it has no source."""
        return self.study.source(arm.source).seeds if arm.needs_source else (None,)

    def of(self, arm: Arm, seed: int | None) -> list[Job]:
        """Return the jobs that train an arm's source up to its age; none if the source is a checkpoint."""
        if not arm.needs_source or seed is None or (source := self.study.source(arm.source)).path is not None:
            return []
        if (source.name, seed) not in self._jobs:
            self._jobs[source.name, seed] = self._jobs_of(source, seed)
        needed, chain = {self._name(source, seed, arm.source_steps, arm.constant)}, []
        for job in reversed(self._jobs[source.name, seed]):
            if job.name in needed:
                needed |= set(job.needs)
                chain.append(job)
        return chain[::-1]

    def weights(self, arm: Arm, source_seed: int | None) -> Path:
        """Return the folder of the weights of an arm's source."""
        source = self.study.source(arm.source)
        run = self._folder(source, source_seed, arm.source_steps, arm.constant)
        return run if source.path is not None else run / "export"

    def key(self, arm: Arm, seed: int | None) -> str:
        """Return a hash of everything on which an arm's source depends."""
        return self._key(self.study.source(arm.source), seed, arm.source_steps, arm.constant)

    def _jobs_of(self, source: Source, seed: int) -> list[Job]:
        name = self._title(source, seed)
        keys = self._train(source) | {"model": source.config, "arm": "source", "seed": seed} | self._parts()
        grown = [arm for arm in self.study.arms if arm.needs_source and arm.source == source.name]
        keeps = {arm.source_steps for arm in grown if arm.state is not None}
        arm = Arm(f"source of {source.name}", CONTINUED, source=source.name)
        jobs = [
            self.build.training(
                f"{name}/constant-{steps}", "source", self._key(source, seed, steps, constant=True),
                self._folder(source, seed, steps, constant=True), self.build.needs_data,
                keys | {"steps": steps, "schedule": "wsd", "decay": 0},
                arm=arm, source_seed=seed, steps=steps, keeps=steps in keeps,
            )
            for steps in sorted({arm.source_steps for arm in grown if arm.constant})
        ]  # fmt: skip
        if len(source.steps) == 1:
            (steps,) = source.steps
            return jobs + [
                self.build.training(
                    name, "source", self._key(source, seed, steps), self._folder(source, seed, steps),
                    self.build.needs_data, keys | self.build.schedule(steps),
                    arm=arm, source_seed=seed, steps=steps, keeps=steps in keeps,
                )
            ]  # fmt: skip
        folder = self._folder(source, seed, source.steps[0]).parent
        last = 0
        points: list[int] = []
        for steps in sorted(source.steps):
            point = self.build.branch_step(steps)
            points = [*points, point]
            trunk = f"{name}/trunk-{point}"
            before = (f"{name}/trunk-{last}",) if last else self.build.needs_data
            jobs.append(
                self.build.training(
                    trunk, "trunk", self._key(source, seed, None), folder / "trunk",
                    before, keys | self.build.constant(name, points),
                    arm=arm, source_seed=seed, first=last, steps=point,
                )
            )  # fmt: skip
            jobs.append(
                self.build.training(
                    f"{name}/{steps}", "source", self._key(source, seed, steps),
                    self._folder(source, seed, steps), (trunk,),
                    keys | self.build.schedule(steps) | self.build.branch(name, folder / "trunk"),
                    arm=arm, source_seed=seed, first=point, steps=steps, keeps=steps in keeps,
                )
            )  # fmt: skip
            last = point
        return jobs

    def _title(self, source: Source, seed: int) -> str:
        name = f"source-{source.name}" if source.name else "source"
        return f"{name}/seed{seed}" if len(source.seeds) > 1 or len(source.steps) > 1 else name

    def _name(self, source: Source, seed: int, steps: int, constant: bool) -> str:
        name = self._title(source, seed)
        if constant:
            return f"{name}/constant-{steps}"
        return name if len(source.steps) == 1 else f"{name}/{steps}"

    def _folder(self, source: Source, seed: int | None, steps: int, constant: bool = False) -> Path:
        """Return the folder of the run that trains a source; for a checkpoint, the checkpoint's folder."""
        if source.path is not None:
            return source.path
        assert seed is not None
        out, key = self.study.out, self._key(source, seed, steps, constant)
        if constant:
            return out / "sources" / f"{source.name or 'source'}-seed{seed}-constant-{steps}-{key}"
        if len(source.steps) == 1:
            return out / (f"source-{source.name}-{key}" if source.name else f"source-{key}")
        trunk = self._key(source, seed, None)
        ends = out / "sources" / f"{source.name or 'source'}-seed{seed}-{trunk}"
        return ends / f"{steps}-decay{self.study.decay_steps(steps)}"

    def _key(self, source: Source, seed: int | None, steps: int | None, constant: bool = False) -> str:
        if source.path is not None:
            return hash_of(str(source.path.resolve()))
        which = (source.name, seed, steps, constant)
        if which not in self._keys:
            identity = [source.config, steps, seed, result_keys(self._train(source))]
            decay = self.study.decay_steps(steps) if steps and not constant else 0
            text = [self.study.text.source] if self.study.text else []
            self._keys[which] = hash_of([*identity, self.build.data_key, decay, *text])
        return self._keys[which]

    def _train(self, source: Source) -> dict[str, Any]:
        study = self.study
        given = study.train | source.train
        if "lr" not in given and study.sweep:
            given["lr"] = study.sweep.lr[len(study.sweep.lr) // 2]
        return given | {"export": "export", "export_dtype": "fp32"}  # growth starts from the masters

    def _parts(self) -> dict[str, Any]:
        text = self.study.text
        return {"data_part": list(text.source), "eval_part": list(text.report)} if text else {}
