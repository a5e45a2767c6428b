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
        self._grown_keys: dict[tuple[str, int | None], str] = {}

    def seeds(self, arm: Arm) -> tuple[int | None, ...]:
        """Return the seeds of an arm's source; ``(None,)`` if it has no source."""
        return self.study.source(arm.source).seeds if arm.needs_source else (None,)

    def of(self, arm: Arm, seed: int | None) -> list[Job]:
        """Return the jobs that train an arm's source up to its age; none if the source is a checkpoint.

        The jobs of the source that it was grown from come first.
        """
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
        keys = self._train(source) | {"arm": "source", "seed": seed} | self._parts()
        start, needs = self._start_of(source, seed)
        keys |= {"model": source.config} if source.grown is None else self._first_weights(source, seed)
        grown = [arm for arm in self.study.arms if arm.needs_source and arm.source == source.name]
        keeps = {arm.source_steps for arm in grown if arm.state is not None}
        arm = Arm(f"source of {source.name}", CONTINUED, source=source.name)
        jobs = start + [
            self.build.training(
                f"{name}/constant-{steps}", "source", self._key(source, seed, steps, constant=True),
                self._folder(source, seed, steps, constant=True), needs,
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
                    needs, keys | self.build.schedule(steps),
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
            before = (f"{name}/trunk-{last}",) if last else needs
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

    def _start_of(self, source: Source, seed: int) -> tuple[list[Job], tuple[str, ...]]:
        """Return the jobs that make a source's first weights, and the names of the jobs before its training."""
        if (growth := source.grown) is None:
            return [], self.build.needs_data
        before = self.of(growth, seed)
        name = f"{self._title(source, seed)}/start"
        trained = tuple(job.name for job in before[-1:])
        made = Job(
            name, "expand", self._grown_key(source, seed), self._grown_folder(source, seed), trained,
            arm=growth, source_seed=seed, seed=seed, start=self.weights(growth, seed),
        )  # fmt: skip
        return [*before, made], (*self.build.needs_data, name)

    def _first_weights(self, source: Source, seed: int) -> dict[str, Any]:
        """Return the keys of a grown source: its first weights, and the text that no source before it has read."""
        return {"init": str(self._grown_folder(source, seed)), "data_start": self._blocks_before(source)}

    def _blocks_before(self, source: Source) -> int:
        """Return the number of blocks that the sources before a grown one have read."""
        if (growth := source.grown) is None:
            return 0
        before = self.study.source(growth.source)
        return self._blocks_before(before) + growth.source_steps * int(self._train(before)["batch"])

    def _grown_key(self, source: Source, seed: int | None) -> str:
        """Return a hash of a grown source's first weights."""
        from phigrow.growth.planner import make_plan

        growth = source.grown
        assert growth is not None
        if (source.name, seed) not in self._grown_keys:
            plan = make_plan(self.study.source(growth.source).config, source.config, growth.spec(seed or 0))
            self._grown_keys[source.name, seed] = hash_of([self.key(growth, seed), plan.hash])
        return self._grown_keys[source.name, seed]

    def _grown_folder(self, source: Source, seed: int) -> Path:
        key = self._grown_key(source, seed)
        return self.study.out / "starts" / f"source-{source.name}" / f"seed{seed}-{key}"

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
            place = str(source.path.resolve())
            return hash_of(self.study.former_places.get(place, place))
        which = (source.name, seed, steps, constant)
        if which not in self._keys:
            identity = [source.config, steps, seed, result_keys(self._train(source))]
            decay = self.study.decay_steps(steps) if steps and not constant else 0
            text = [self.study.text.source] if self.study.text else []
            grown = [self._grown_key(source, seed), self._blocks_before(source)] if source.grown else []
            self._keys[which] = hash_of([*identity, self.build.data_key, decay, *text, *grown])
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
