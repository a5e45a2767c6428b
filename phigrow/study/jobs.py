"""Jobs of a study: the work it takes, the jobs that each one needs, and the folder of each result.

The key of a job is a hash of everything that its result depends on, the keys of the jobs before it included. It is part
of the folder's name: a changed study reuses every result that is still valid, and makes the others beside it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from phigrow.models.config import Config
from phigrow.models.cost import count_cost
from phigrow.study.settings import CONTINUED, SCRATCH, Arm, Study, Sweep
from phigrow.training.configuration import RunConfig
from phigrow.training.declaration import Role

Kind = Literal["data", "source", "expand", "state", "sweep", "trunk", "end"]


@dataclass(frozen=True)
class Job:
    """One piece of work with one result.

    Attributes:
        name: in words, unique in its study.
        kind: ``expand`` makes the weights that an arm starts from, ``state`` the optimizer's state for them. ``trunk``
            is the part of training that decayed ends share, ``end`` the rest of one budget.
        key: hash of everything that the result depends on.
        folder: of the result.
        needs: names of the jobs before it.
        keys: of the training run, without those that are known only when it starts.
        arm, seed, budget: identify the run; ``budget`` is the steps of an end.
        first, steps: the run trains from after step ``first`` up to ``steps``.
        tokens, flops: cost of that training.
        keeps: keep its last checkpoint, because states are grown from it.
    """

    name: str
    kind: Kind
    key: str
    folder: Path
    needs: tuple[str, ...] = ()
    keys: dict[str, Any] = field(default_factory=dict)
    arm: Arm | None = None
    seed: int = 0
    budget: int | None = None
    first: int = 0
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    keeps: bool = False

    @property
    def trains(self) -> bool:
        """True for a training run."""
        return self.kind not in ("data", "expand", "state")


def jobs_of(study: Study) -> list[Job]:
    """Return all jobs of a study in the order in which they run: each after those it needs, seed by seed.

    >>> [job.name for job in jobs_of(study)][:2]  # doctest: +SKIP
    ['data', 'source']
    """
    jobs = _Jobs(study)
    arms, sweep = study.arms, study.sweep
    all_jobs = [jobs.data()] if jobs.needs_data else []
    if study.source.path is None and any(arm.method != SCRATCH for arm in arms):
        all_jobs.append(jobs.source())
    if sweep:
        for arm in arms:
            all_jobs += [job for seed in sweep.seeds for job in jobs.start(arm, seed)]
            all_jobs += [jobs.sweep(arm, rate, seed, sweep) for rate in sweep.lr for seed in sweep.seeds]
    for seed in study.seeds:
        for arm in arms:
            all_jobs += jobs.start(arm, seed)
            if len(study.budgets) > 1:
                all_jobs.append(jobs.trunk(arm, seed))
            all_jobs += [jobs.end(arm, seed, budget) for budget in study.budgets]
    return list({job.name: job for job in all_jobs}.values())  # a start of a sweep's seed is made once


class _Jobs:
    """One method for each kind of job, and the keys and folders that they share."""

    def __init__(self, study: Study) -> None:
        self.study = study
        data = study.data
        self.data_key = _hash(str(data) if isinstance(data, Path) else data)
        self.data_folder = data if isinstance(data, Path) else study.out / f"data-{self.data_key}"
        self.needs_data = () if isinstance(data, Path) else ("data",)
        self.source_key, self.source_run = self._source_key()
        self.source_folder = study.source.path or self.source_run / "export"

    def data(self) -> Job:
        """Pack the text into blocks."""
        return Job("data", "data", self.data_key, self.data_folder)

    def source(self) -> Job:
        """Train the small model."""
        source = self.study.source
        keys = self._source_train() | self._schedule(source.steps) | {"model": source.config, "arm": "source"}
        return self._training(
            "source", "source", self.source_key, self.source_run, self.needs_data, keys | {"seed": source.seed},
            steps=source.steps, keeps=any(arm.state is not None for arm in self.study.arms),
        )  # fmt: skip

    def start(self, arm: Arm, seed: int) -> list[Job]:
        """Make what an arm starts from: the expansion, and the grown state of the optimizer where it has one."""
        if not arm.grows:
            return []
        return [self.expand(arm, seed), *([self.state(arm, seed)] if arm.state is not None else [])]

    def expand(self, arm: Arm, seed: int) -> Job:
        """Expand the source."""
        name = f"{arm.name}/seed{seed}/start"
        return Job(
            name, "expand", self._start_key(arm, seed), self._start(arm, seed), self._needs_of_expansion(arm),
            arm=arm, seed=seed,
        )  # fmt: skip

    def state(self, arm: Arm, seed: int) -> Job:
        """Grow the state of the optimizer for an expansion."""
        needs = (f"{arm.name}/seed{seed}/start", *self._needs_of_expansion(arm))
        name = f"{arm.name}/seed{seed}/state"
        return Job(name, "state", self._start_key(arm, seed), self._state(arm, seed), needs, arm=arm, seed=seed)

    def sweep(self, arm: Arm, rate: float, seed: int, sweep: Sweep) -> Job:
        """Try one learning rate."""
        keys = self._keys(arm, seed) | self._schedule(sweep.steps)
        keys |= {"lr": rate, "export": None, "nonfinite_limit": 0}  # a rate that diverges has lost; it does not fail
        key = self._run_key(arm, seed, rate, sweep.steps)
        folder = self.study.out / "sweep" / arm.name / f"lr{rate:g}-seed{seed}-{key}"
        name = f"{arm.name}/sweep/lr{rate:g}/seed{seed}"
        needs = self._needs(arm, seed)
        return self._training(name, "sweep", key, folder, needs, keys, steps=sweep.steps, arm=arm, seed=seed)

    def trunk(self, arm: Arm, seed: int) -> Job:
        """Train at a constant rate up to where the last budget begins to decay."""
        points = [self._branch_step(budget) for budget in self.study.budgets]
        constant = {"steps": points[-1], "schedule": "wsd", "decay": 0, "save_at": points, "export": None}
        return self._training(
            self._trunk_name(arm, seed), "trunk", self._run_key(arm, seed, self._rate()),
            self._runs(arm, seed) / "trunk", self._needs_of_runs(arm, seed),
            self._keys(arm, seed) | self._shared(arm, seed) | constant, steps=points[-1], arm=arm, seed=seed,
        )  # fmt: skip

    def end(self, arm: Arm, seed: int, budget: int) -> Job:
        """Train to the end of one budget, off the trunk where there are several budgets."""
        runs, schedule = self._runs(arm, seed), self._schedule(budget)
        branches = len(self.study.budgets) > 1
        branch = {"branch_from": str(runs / "trunk")} if branches else {}
        return self._training(
            f"{arm.name}/seed{seed}/{budget}", "end", self._run_key(arm, seed, self._rate(), budget),
            runs / f"{budget}-decay{schedule['decay']}",
            (self._trunk_name(arm, seed),) if branches else self._needs_of_runs(arm, seed),
            self._keys(arm, seed) | self._shared(arm, seed) | schedule | branch,
            first=self._branch_step(budget) if branches else 0, steps=budget, arm=arm, seed=seed, budget=budget,
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
        first: int = 0,
        steps: int,
        **which: Any,
    ) -> Job:
        """A job that trains, with its tokens and FLOPs."""
        study = self.study
        arm: Arm | None = which.get("arm")
        model: Config = study.source.config if arm is None or arm.method == CONTINUED else study.dst
        tokens = (steps - first) * study.batch_tokens
        flops = tokens * count_cost(model, study.seq_len).training_flops
        keys = keys | {"data": str(self.data_folder), "out": str(folder)}
        return Job(name, kind, key, folder, needs, keys, first=first, steps=steps, tokens=tokens, flops=flops, **which)

    def _source_key(self) -> tuple[str, Path]:
        source = self.study.source
        if source.path is not None:
            return _hash(str(source.path.resolve())), source.path
        identity = [source.config, source.steps, source.seed, result_keys(self._source_train())]
        key = _hash([*identity, self.data_key, self.study.decay_steps(source.steps)])
        return key, self.study.out / f"source-{key}"

    def _source_train(self) -> dict[str, Any]:
        study = self.study
        given = study.train | study.source.train
        if "lr" not in given and study.sweep:
            given["lr"] = study.sweep.lr[len(study.sweep.lr) // 2]
        return given | {"export": "export", "export_dtype": "fp32"}  # growth starts from the masters

    def _start_key(self, arm: Arm, seed: int) -> str:
        """A hash of everything that the first weights depend on; of a growth the resolved plan, so that a changed
        method is noticed."""
        from phigrow.growth.planner import make_plan

        study = self.study
        if arm.method == SCRATCH:
            return _hash(study.dst)
        if arm.method == CONTINUED:
            return self.source_key
        plan_hash = make_plan(study.source.config, study.dst, arm.spec(seed)).hash
        learning = [arm.learn, self.data_key] if arm.learn is not None else []
        return _hash([self.source_key, plan_hash, *learning])

    def _run_key(self, arm: Arm, seed: int, rate: Any, steps: int | None = None) -> str:
        decay = steps and self.study.decay_steps(steps)
        train = result_keys(self.study.train | arm.train)
        state = [arm.state] if arm.state is not None else []
        return _hash([self.data_key, self._start_key(arm, seed), train, seed, rate, steps, decay, *state])

    def _start(self, arm: Arm, seed: int) -> Path:
        if not arm.grows:
            return self.source_folder
        return self.study.out / "starts" / arm.name / f"seed{seed}-{self._start_key(arm, seed)}"

    def _state(self, arm: Arm, seed: int) -> Path:
        return self._start(arm, seed).with_name(f"{self._start(arm, seed).name}-{arm.state}")

    def _runs(self, arm: Arm, seed: int) -> Path:
        return self.study.out / "runs" / arm.name / f"seed{seed}-{self._run_key(arm, seed, self._rate())}"

    def _trunk_name(self, arm: Arm, seed: int) -> str:
        return f"{arm.name}/seed{seed}/trunk"

    def _branch_step(self, budget: int) -> int:
        return budget - self.study.decay_steps(budget)

    def _rate(self) -> Any:
        """The learning rate of the runs, or the sweep that chooses it."""
        return self.study.sweep.record() if self.study.sweep else self.study.train.get("lr")

    def _schedule(self, steps: int) -> dict[str, Any]:
        return {"steps": steps, "schedule": "wsd", "decay": self.study.decay_steps(steps)}

    def _keys(self, arm: Arm, seed: int) -> dict[str, Any]:
        study = self.study
        keys = study.train | arm.train | {"arm": arm.name, "seed": seed}
        if arm.method == SCRATCH:
            return keys | {"model": study.dst}
        cost = {f"source_{unit}": spent for unit, spent in study.source.cost.items()}
        # Every arm reads the same text at the same step, whatever state it starts with.
        state = {"init_optimizer": str(self._state(arm, seed)), "data_start": 0} if arm.state is not None else {}
        return keys | {"init": str(self._start(arm, seed))} | cost | state

    def _shared(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Keys that a trunk and its branches share."""
        sweep = self.study.sweep
        return {"trunk": f"{arm.name}-seed{seed}"} | ({"lr_chosen_by": sweep.record()} if sweep else {})

    def _needs_of_expansion(self, arm: Arm) -> tuple[str, ...]:
        needs = ("source",) if self.study.source.path is None else ()
        return (*self.needs_data, *needs) if arm.learn is not None else needs

    def _needs(self, arm: Arm, seed: int) -> tuple[str, ...]:
        if arm.grows:
            state = (f"{arm.name}/seed{seed}/state",) if arm.state is not None else ()
            return (*self.needs_data, f"{arm.name}/seed{seed}/start", *state)
        if arm.method == CONTINUED and self.study.source.path is None:
            return (*self.needs_data, "source")
        return self.needs_data

    def _needs_of_runs(self, arm: Arm, seed: int) -> tuple[str, ...]:
        sweep = self.study.sweep
        tried = [f"{arm.name}/sweep/lr{lr:g}/seed{s}" for lr in sweep.lr for s in sweep.seeds] if sweep else []
        return (*self._needs(arm, seed), *tried)


def result_keys(train: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a training run that its result depends on: those that are set and not operational.

    >>> result_keys({"warmup": 20, "threads": 2, "decay": None})
    {'warmup': 20}
    """
    operational = RunConfig.keys_with(Role.OPERATIONAL)
    return {key: value for key, value in train.items() if key not in operational and value is not None}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:10]
