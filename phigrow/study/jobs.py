"""Jobs of a study: the work it takes, the jobs that each one needs, and the folder of each result.

The key of a job is a hash of everything that its result depends on, the keys of the jobs before it included. It is part
of the folder's name: a changed study reuses every result that is still valid, and makes the others beside it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from phigrow.models.cost import count_cost
from phigrow.study import progress
from phigrow.study.job import Job, Kind
from phigrow.study.rates import Rates, choose
from phigrow.study.settings import CONTINUED, FLAT, Arm, Source, Study
from phigrow.training.configuration import RunConfig
from phigrow.training.declaration import Role


def jobs_of(study: Study) -> list[Job]:
    """Return all jobs of a study in the order in which they run: each after those it needs.

    See `StudyJobs.all`.

    >>> [job.name for job in jobs_of(study)][:2]  # doctest: +SKIP
    ['data', 'source']
    """
    return StudyJobs(study).all()


class StudyJobs:
    """Jobs of a study, one method for each kind, and the keys and folders that they share.

    Where rates are chosen by halving, the jobs depend on results: `all` reads them anew.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        data = study.data
        self.data_key = _hash(str(data) if isinstance(data, Path) else data)
        self.data_folder = data if isinstance(data, Path) else study.out / f"data-{self.data_key}"
        self.needs_data = () if isinstance(data, Path) else ("data",)
        self._source_keys: dict[tuple[Any, ...], str] = {}
        self._start_keys: dict[tuple[str, int | None, int], str] = {}
        self._flops: dict[str, float] = {}
        self._sources: dict[tuple[str, int], list[Job]] = {}
        self._rates: dict[str, Rates] = {}
        self._choices: dict[str, list[Job]] = {}

    def all(self) -> list[Job]:
        """Return all jobs in the order in which they run.

        First the first seed of all arms, from the first source; then the others; then longer budgets. The learning rate
        of an arm is chosen right before its first run.
        """
        study = self.study
        self._rates, self._choices = {}, {}
        jobs = [self.data()] if self.needs_data else []
        if all(len(source.steps) == 1 and len(source.seeds) == 1 for source in study.sources):
            jobs += [
                job for arm in study.arms for seed in self._source_seeds(arm) for job in self._source_of(arm, seed)
            ]
        if study.sweep and not study.sweep.halves:  # all of them first, as short runs
            for arm in study.arms:
                jobs += self._choice(arm)
        replicates = [
            (arm, source_seed, seed)
            for seed in study.seeds
            for arm in study.arms
            for source_seed in self._source_seeds(arm)
        ]
        firsts = [(arm, self._source_seeds(arm)[0], study.seeds[0]) for arm in study.arms]
        for arm, source_seed, seed in [*firsts, *(each for each in replicates if each not in firsts)]:
            if study.sweep and study.sweep.halves:
                jobs += self._choice(arm)
            jobs += self._runs(arm, source_seed, seed, study.budgets_of(arm))
        for arm, source_seed, seed in replicates:
            if arm.longer:
                jobs += self._runs(arm, source_seed, seed, arm.longer, after=study.budgets_of(arm))
        return list({job.name: job for job in jobs}.values())  # a start is made once for a sweep and a run of one seed

    def data(self) -> Job:
        """Pack the text into blocks."""
        return Job("data", "data", self.data_key, self.data_folder)

    def rates(self, arm: Arm) -> Rates:
        """Return what is known of an arm's learning rate."""
        if arm.label not in self._rates:
            sweep = self.study.sweep
            assert sweep is not None

            def loss_of(rate: float, length: int) -> float | None:
                losses = []
                for seed in sweep.seeds:
                    job = self._sweep_end(arm, seed, rate, length)
                    if (ended := progress.done(job)) is None:
                        return None
                    losses.append(float("inf") if ended["heldout_loss"] is None else ended["heldout_loss"])
                return sum(losses) / len(losses)

            self._rates[arm.label] = choose(sweep, loss_of)
        return self._rates[arm.label]

    # Sources

    def _source_seeds(self, arm: Arm) -> tuple[int | None, ...]:
        return self.study.source(arm.source).seeds if arm.needs_source else (None,)

    def _source_of(self, arm: Arm, seed: int | None) -> list[Job]:
        """Train the source of an arm up to its age; none where it is a checkpoint."""
        if not arm.needs_source or seed is None or (source := self.study.source(arm.source)).path is not None:
            return []
        if (source.name, seed) not in self._sources:
            self._sources[source.name, seed] = self._source_jobs(source, seed)
        needed, chain = {self._source_name(source, seed, arm.source_steps, arm.constant)}, []
        for job in reversed(self._sources[source.name, seed]):
            if job.name in needed:
                needed |= set(job.needs)
                chain.append(job)
        return chain[::-1]

    def _source_jobs(self, source: Source, seed: int) -> list[Job]:
        name = self._source_title(source, seed)
        keys = self._source_train(source) | {"model": source.config, "arm": "source", "seed": seed}
        grown = [arm for arm in self.study.arms if arm.needs_source and arm.source == source.name]
        keeps = {arm.source_steps for arm in grown if arm.state is not None}
        arm = Arm(f"source of {source.name}", CONTINUED, source=source.name)
        jobs = [
            self._training(
                f"{name}/constant-{steps}", "source", self._source_key(source, seed, steps, constant=True),
                self._source_folder(source, seed, steps, constant=True), self.needs_data,
                keys | {"steps": steps, "schedule": "wsd", "decay": 0},
                arm=arm, source_seed=seed, steps=steps, keeps=steps in keeps,
            )
            for steps in sorted({arm.source_steps for arm in grown if arm.constant})
        ]  # fmt: skip
        if len(source.steps) == 1:
            (steps,) = source.steps
            return jobs + [
                self._training(
                    name, "source", self._source_key(source, seed, steps), self._source_folder(source, seed, steps),
                    self.needs_data, keys | self._schedule(steps),
                    arm=arm, source_seed=seed, steps=steps, keeps=steps in keeps,
                )
            ]  # fmt: skip
        folder = self._source_folder(source, seed, source.steps[0]).parent
        last = 0
        points: list[int] = []
        for steps in sorted(source.steps):
            point = self._branch_step(steps)
            points = [*points, point]
            trunk = f"{name}/trunk-{point}"
            jobs.append(
                self._training(
                    trunk, "trunk", self._source_key(source, seed, None), folder / "trunk",
                    (f"{name}/trunk-{last}",) if last else self.needs_data, keys | self._constant(name, points),
                    arm=arm, source_seed=seed, first=last, steps=point,
                )
            )  # fmt: skip
            jobs.append(
                self._training(
                    f"{name}/{steps}", "source", self._source_key(source, seed, steps),
                    self._source_folder(source, seed, steps), (trunk,),
                    keys | self._schedule(steps) | self._branch(name, folder / "trunk"),
                    arm=arm, source_seed=seed, first=point, steps=steps, keeps=steps in keeps,
                )
            )  # fmt: skip
            last = point
        return jobs

    def _source_title(self, source: Source, seed: int) -> str:
        name = f"source-{source.name}" if source.name else "source"
        return f"{name}/seed{seed}" if len(source.seeds) > 1 or len(source.steps) > 1 else name

    def _source_name(self, source: Source, seed: int, steps: int, constant: bool) -> str:
        name = self._source_title(source, seed)
        if constant:
            return f"{name}/constant-{steps}"
        return name if len(source.steps) == 1 else f"{name}/{steps}"

    def _source_folder(self, source: Source, seed: int | None, steps: int, constant: bool = False) -> Path:
        """The folder of the run that trained a source; of a checkpoint, its own."""
        if source.path is not None:
            return source.path
        assert seed is not None
        out, key = self.study.out, self._source_key(source, seed, steps, constant)
        if constant:
            return out / "sources" / f"{source.name or 'source'}-seed{seed}-constant-{steps}-{key}"
        if len(source.steps) == 1:
            return out / (f"source-{source.name}-{key}" if source.name else f"source-{key}")
        trunk = self._source_key(source, seed, None)
        ends = out / "sources" / f"{source.name or 'source'}-seed{seed}-{trunk}"
        return ends / f"{steps}-decay{self.study.decay_steps(steps)}"

    def _source_key(self, source: Source, seed: int | None, steps: int | None, constant: bool = False) -> str:
        if source.path is not None:
            return _hash(str(source.path.resolve()))
        which = (source.name, seed, steps, constant)
        if which not in self._source_keys:
            identity = [source.config, steps, seed, result_keys(self._source_train(source))]
            decay = self.study.decay_steps(steps) if steps and not constant else 0
            text = [self.study.text.source] if self.study.text else []
            self._source_keys[which] = _hash([*identity, self.data_key, decay, *text])
        return self._source_keys[which]

    def _source_train(self, source: Source) -> dict[str, Any]:
        study = self.study
        given = study.train | source.train
        if "lr" not in given and study.sweep:
            given["lr"] = study.sweep.lr[len(study.sweep.lr) // 2]
        return given | {"export": "export", "export_dtype": "fp32"}  # growth starts from the masters

    def _source_parts(self) -> dict[str, Any]:
        text = self.study.text
        return {"data_part": list(text.source), "eval_part": list(text.report)} if text else {}

    # What an arm starts from

    def _starts(self, arm: Arm, source_seed: int | None, seed: int) -> list[Job]:
        """Make what an arm starts from: the source, its expansion, and the grown state of the optimizer."""
        jobs = self._source_of(arm, source_seed)
        if not arm.grows:
            return jobs
        start, needs = self._source_folder_of(arm, source_seed), tuple(job.name for job in jobs if job.kind == "source")
        prefix, key = self._prefix(arm, source_seed, seed), self._start_key(arm, source_seed, seed)
        folder = self._start(arm, source_seed, seed)
        shared = {"arm": arm, "source_seed": source_seed, "seed": seed, "start": start}
        text = self.needs_data if arm.learn is not None else ()
        jobs.append(Job(f"{prefix}/start", "expand", key, folder, (*text, *needs), **shared))  # type: ignore[arg-type]
        if arm.state is not None:
            state = self._state(arm, source_seed, seed)
            made = (f"{prefix}/start", *text, *needs)
            jobs.append(Job(f"{prefix}/state", "state", key, state, made, **shared))  # type: ignore[arg-type]
        return jobs

    def _source_folder_of(self, arm: Arm, source_seed: int | None) -> Path:
        """The weights of the source of an arm."""
        source = self.study.source(arm.source)
        run = self._source_folder(source, source_seed, arm.source_steps, arm.constant)
        return run if source.path is not None else run / "export"

    def _start_key(self, arm: Arm, source_seed: int | None, seed: int) -> str:
        """A hash of everything that the first weights depend on; of a growth the resolved plan, so that a changed
        method is noticed."""
        from phigrow.growth.planner import make_plan

        study = self.study
        if not arm.has_source:
            return _hash(study.model_of(arm))
        source = study.source(arm.source)
        source_key = self._source_key(source, source_seed, arm.source_steps, arm.constant)
        if arm.method == CONTINUED:
            return source_key
        identity = (arm.label, source_seed, seed)
        if identity not in self._start_keys:
            plan = make_plan(source.config, study.dst, arm.spec(seed))
            learning = [arm.learn, self.data_key] if arm.learn is not None else []
            self._start_keys[identity] = _hash([source_key, plan.hash, *learning])
        return self._start_keys[identity]

    def _start(self, arm: Arm, source_seed: int | None, seed: int) -> Path:
        if not arm.grows:
            return self._source_folder_of(arm, source_seed)
        key = self._start_key(arm, source_seed, seed)
        return self.study.out / "starts" / arm.label / f"{self._replicate(arm, source_seed, seed)}-{key}"

    def _state(self, arm: Arm, source_seed: int | None, seed: int) -> Path:
        start = self._start(arm, source_seed, seed)
        return start.with_name(f"{start.name}-{arm.state}")

    # Learning rates

    def _choice(self, arm: Arm) -> list[Job]:
        """Try learning rates: the runs that are known, and for each that is not one that stands for it."""
        if arm.label not in self._choices:
            self._choices[arm.label] = self._choice_jobs(arm)
        return self._choices[arm.label]

    def _choice_jobs(self, arm: Arm) -> list[Job]:
        sweep = self.study.sweep
        assert sweep is not None
        jobs: list[Job] = []
        rates = self.rates(arm)
        source_seed = self._source_seeds(arm)[0]
        for seed in sweep.seeds:
            jobs += self._starts(arm, source_seed, seed)
        for rate in sorted(rates.tried):
            for seed in sweep.seeds:
                for length in range(rates.tried[rate]):
                    if sweep.halves:
                        jobs.append(self._sweep_trunk(arm, seed, rate, length))
                    jobs.append(self._sweep_end(arm, seed, rate, length))
        known = tuple(job.name for job in jobs if job.kind == "sweep")
        for length, count in enumerate(rates.undecided):
            first = self._branch_step(self._lengths(arm)[length - 1]) if length else 0
            for number in range(count * len(sweep.seeds)):
                job = self._sweep_end(arm, sweep.seeds[0], sweep.lr[0], length)
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
        """Steps of the sweep's runs; a flat arm's are those that spend as many FLOPs."""
        study = self.study
        assert study.sweep is not None
        if arm.method != FLAT:
            return study.sweep.steps
        share = study.budgets_of(arm)[-1] / study.budgets[-1]
        return tuple(max(2, round(steps * share)) for steps in study.sweep.steps)

    def _sweep_trunk(self, arm: Arm, seed: int, rate: float, length: int) -> Job:
        sweep = self.study.sweep
        assert sweep is not None
        folder, name = self._sweep_folder(arm, seed, rate), f"{arm.label}/sweep/lr{rate:g}/seed{seed}"
        points = [self._branch_step(steps) for steps in self._lengths(arm)[: length + 1]]
        first, point = points[-2] if length else 0, points[-1]
        source_seed = self._source_seeds(arm)[0]
        return self._training(
            f"{name}/trunk-{point}", "trunk", self._run_key(arm, source_seed, seed, rate), folder / "trunk",
            (f"{name}/trunk-{first}",) if first else self._needs(arm, source_seed, seed),
            self._sweep_keys(arm, seed, rate) | self._constant(name, points),
            arm=arm, source_seed=source_seed, seed=seed, first=first, steps=point,
        )  # fmt: skip

    def _sweep_end(self, arm: Arm, seed: int, rate: float, length: int) -> Job:
        """The decayed end of one rate at one of the sweep's lengths."""
        sweep = self.study.sweep
        assert sweep is not None
        steps, source_seed = self._lengths(arm)[length], self._source_seeds(arm)[0]
        name, keys = f"{arm.label}/sweep/lr{rate:g}/seed{seed}", self._sweep_keys(arm, seed, rate)
        folder, needs, first = self._sweep_folder(arm, seed, rate, steps), self._needs(arm, source_seed, seed), 0
        if sweep.halves:
            trunk, first = folder / "trunk", self._branch_step(steps)
            needs, folder = (f"{name}/trunk-{first}",), folder / f"{steps}-decay{steps - first}"
            keys |= self._branch(name, trunk)
            name = f"{name}/{steps}"
        return self._training(
            name, "sweep", self._run_key(arm, source_seed, seed, rate, steps), folder, needs,
            keys | self._schedule(steps), arm=arm, source_seed=source_seed, seed=seed, first=first, steps=steps,
        )  # fmt: skip

    def _sweep_folder(self, arm: Arm, seed: int, rate: float, steps: int | None = None) -> Path:
        sweep = self.study.sweep
        assert sweep is not None
        key = self._run_key(arm, self._source_seeds(arm)[0], seed, rate, None if sweep.halves else steps)
        return self.study.out / "sweep" / arm.label / f"lr{rate:g}-seed{seed}-{key}"

    def _sweep_keys(self, arm: Arm, seed: int, rate: float) -> dict[str, Any]:
        keys = self._keys(arm, self._source_seeds(arm)[0], seed, choosing=True)
        return keys | {"lr": rate, "export": None, "nonfinite_limit": 0}  # a rate that diverges has lost

    # Runs

    def _runs(
        self, arm: Arm, source_seed: int | None, seed: int, budgets: tuple[int, ...], after: tuple[int, ...] = ()
    ) -> list[Job]:
        """All runs of one arm and seed: a trunk, and a decayed end for each budget; of a single budget one run.

        Args:
            arm, source_seed, seed: which.
            budgets: whose ends to train.
            after: shorter budgets that are trained before, off the same trunk.
        """
        jobs = self._starts(arm, source_seed, seed)
        branches = len(self.study.budgets_of(arm)) + len(arm.longer) > 1
        if branches:
            jobs.append(self._trunk(arm, source_seed, seed, budgets, after))
        return jobs + [self._end(arm, source_seed, seed, budget, branches, bool(after)) for budget in budgets]

    def _trunk(
        self, arm: Arm, source_seed: int | None, seed: int, budgets: tuple[int, ...], after: tuple[int, ...]
    ) -> Job:
        """Train at a constant rate up to where the last budget begins to decay."""
        points = [self._branch_step(budget) for budget in (*after, *budgets)]
        first = self._branch_step(after[-1]) if after else 0
        name = self._prefix(arm, source_seed, seed)
        return self._training(
            f"{name}/trunk-longer" if after else f"{name}/trunk", "trunk",
            self._run_key(arm, source_seed, seed, self._rate(arm)), self._run_folder(arm, source_seed, seed) / "trunk",
            (f"{name}/trunk",) if after else self._needs_of_runs(arm, source_seed, seed),
            self._keys(arm, source_seed, seed) | self._shared(arm, source_seed, seed)
            | {"steps": points[-1], "schedule": "wsd", "decay": 0, "save_at": points, "export": None},
            arm=arm, source_seed=source_seed, seed=seed, first=first, steps=points[-1],
        )  # fmt: skip

    def _end(
        self, arm: Arm, source_seed: int | None, seed: int, budget: int, branches: bool, longer: bool = False
    ) -> Job:
        """Train to the end of one budget, off the trunk where there are several budgets."""
        runs, schedule = self._run_folder(arm, source_seed, seed), self._schedule(budget)
        branch = {"branch_from": str(runs / "trunk")} if branches else {}
        name = self._prefix(arm, source_seed, seed)
        return self._training(
            f"{name}/{budget}", "end", self._run_key(arm, source_seed, seed, self._rate(arm), budget),
            runs / f"{budget}-decay{schedule['decay']}",
            (f"{name}/trunk-longer" if longer else f"{name}/trunk",)
            if branches
            else self._needs_of_runs(arm, source_seed, seed),
            self._keys(arm, source_seed, seed) | self._shared(arm, source_seed, seed) | schedule | branch,
            arm=arm, source_seed=source_seed, seed=seed, budget=budget,
            first=self._branch_step(budget) if branches else 0, steps=budget,
        )  # fmt: skip

    def _training(
        self,
        name: str,
        kind: Kind,
        key: str,
        folder: Path,
        needs: tuple[str, ...],
        keys: dict[str, Any],
        *,
        arm: Arm,
        first: int = 0,
        steps: int,
        **which: Any,
    ) -> Job:
        """A job that trains, with its tokens and FLOPs."""
        study = self.study
        tokens = (steps - first) * study.batch_tokens
        if arm.label not in self._flops:
            self._flops[arm.label] = count_cost(study.model_of(arm), study.seq_len).training_flops
        flops = tokens * self._flops[arm.label]
        if arm.is_taught:
            taught = min(steps, arm.train["teacher_steps"]) - min(first, arm.train["teacher_steps"])
            teacher = count_cost(study.source(arm.source).config, study.seq_len)
            flops += taught * study.batch_tokens * teacher.forward_flops
        is_source = arm not in study.arms
        start = self._source_folder_of(arm, which.get("source_seed")) if arm.needs_source and not is_source else None
        keys = keys | (self._source_parts() if is_source else {}) | {"data": str(self.data_folder), "out": str(folder)}
        return Job(
            name, kind, key, folder, needs, keys,
            arm=None if is_source else arm, first=first, steps=steps, tokens=tokens, flops=flops, start=start, **which,
        )  # fmt: skip

    def _run_key(self, arm: Arm, source_seed: int | None, seed: int, rate: Any, steps: int | None = None) -> str:
        decay = steps and self.study.decay_steps(steps)
        train = result_keys(self.study.train | arm.train)
        state = [arm.state] if arm.state is not None else []
        more = [text] if (text := self._parts(arm)) else []
        if arm.is_taught and not arm.has_source:  # elsewhere the teacher is part of what the arm starts from
            teacher = self.study.source(arm.source)
            more.append({"teacher": self._source_key(teacher, source_seed, arm.source_steps, arm.constant)})
        start = self._start_key(arm, source_seed, seed)
        return _hash([self.data_key, start, train, seed, rate, steps, decay, *state, *more])

    def _run_folder(self, arm: Arm, source_seed: int | None, seed: int) -> Path:
        key = self._run_key(arm, source_seed, seed, self._rate(arm))
        return self.study.out / "runs" / arm.label / f"{self._replicate(arm, source_seed, seed)}-{key}"

    def _replicate(self, arm: Arm, source_seed: int | None, seed: int) -> str:
        several = arm.needs_source and len(self.study.source(arm.source).seeds) > 1
        return f"source{source_seed}-seed{seed}" if several else f"seed{seed}"

    def _prefix(self, arm: Arm, source_seed: int | None, seed: int) -> str:
        return f"{arm.label}/{self._replicate(arm, source_seed, seed)}"

    def _branch_step(self, budget: int) -> int:
        return budget - self.study.decay_steps(budget)

    def _rate(self, arm: Arm) -> Any:
        """What identifies the learning rate of the runs: the rate, or the sweep of fixed length that chooses it."""
        if self.study.sweep is None:
            return self.study.train.get("lr")
        return self.rates(arm).best if self.study.sweep.halves else self.study.sweep.record()

    def _schedule(self, steps: int) -> dict[str, Any]:
        return {"steps": steps, "schedule": "wsd", "decay": self.study.decay_steps(steps)}

    def _constant(self, trunk: str, points: list[int]) -> dict[str, Any]:
        """Keys of a trunk that is trained piece by piece, up to the last of the points where ends branch off."""
        keys = {"steps": points[-1], "schedule": "wsd", "decay": 0, "save_at": points, "export": None}
        return keys | {"trunk": trunk.replace("/", "-")}

    def _branch(self, trunk: str, folder: Path) -> dict[str, Any]:
        """Keys of an end that branches off such a trunk."""
        return {"trunk": trunk.replace("/", "-"), "branch_from": str(folder)}

    def _parts(self, arm: Arm, *, choosing: bool = False) -> dict[str, Any]:
        """Which blocks an arm reads and is evaluated on."""
        if (text := self.study.text) is None:
            return {}
        return {
            "data_part": list(text.source if arm.same_text else text.arms),
            "eval_part": list(text.choose if choosing else text.report),
        }

    def _keys(self, arm: Arm, source_seed: int | None, seed: int, *, choosing: bool = False) -> dict[str, Any]:
        study = self.study
        keys = study.train | arm.train | {"arm": arm.name, "seed": seed} | self._parts(arm, choosing=choosing)
        if facts := self._facts(arm, source_seed):
            keys["study"] = facts
        if not arm.needs_source:
            return keys | {"model": study.model_of(arm)}
        if arm.is_taught:
            keys["teacher"] = str(self._source_folder_of(arm, source_seed))
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

    def _shared(self, arm: Arm, source_seed: int | None, seed: int) -> dict[str, Any]:
        """Keys that a trunk and its branches share."""
        shared: dict[str, Any] = {"trunk": self._prefix(arm, source_seed, seed).replace("/", "-")}
        if self.study.sweep:
            rates = self.rates(arm)
            shared["lr_chosen_by"] = rates.record(self.study.sweep)
            if rates.best is not None:
                shared["lr"] = rates.best
        return shared

    def _needs(self, arm: Arm, source_seed: int | None, seed: int) -> tuple[str, ...]:
        starts = self._starts(arm, source_seed, seed)
        wanted = ("expand", "state") if arm.grows else ("source",)
        return (*self.needs_data, *(job.name for job in starts if job.kind in wanted))

    def _needs_of_runs(self, arm: Arm, source_seed: int | None, seed: int) -> tuple[str, ...]:
        tried = [job.name for job in self._choice(arm) if job.kind == "sweep"] if self.study.sweep else []
        return (*self._needs(arm, source_seed, seed), *tried)


def result_keys(train: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a training run that its result depends on: those that are set and not operational.

    >>> result_keys({"warmup": 20, "threads": 2, "decay": None})
    {'warmup': 20}
    """
    return {key: value for key, value in train.items() if key not in _operational() and value is not None}


@functools.cache  # asked for once for each job
def _operational() -> frozenset[str]:
    return frozenset(RunConfig.keys_with(Role.OPERATIONAL))


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:10]
