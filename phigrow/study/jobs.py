"""What a study takes: its jobs, what each needs, and the folder whose name says what it was made from.

A job's key is a hash of everything that its result depends on, the keys of the jobs before it included. It is part of
the folder's name: a changed study finds what is still valid under the same names, and makes the rest beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
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
        kind: data, source and sweep as they say; expand makes a start, state the optimizer's that goes with it, a trunk
            is what decayed ends share.
        key: hash of all that the result depends on.
        folder: of the result.
        needs: names of the jobs before it.
        keys: of the training run, without those that are known only when it starts.
        arm, seed, budget: which run it is; budget is the steps of an end.
        first, steps: the training it does, from after ``first`` up to ``steps``.
        tokens, flops: of that training.
        keeps: its last checkpoint stays, because states are grown from it.
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
        """Whether this is a training run."""
        return self.kind not in ("data", "expand", "state")


def jobs_of(study: Study) -> list[Job]:
    """All jobs of a study, in the order in which they run: each after what it needs, all arms of a seed together.

    >>> [job.name for job in jobs_of(study)][:2]  # doctest: +SKIP
    ['data', 'source']
    """
    return list(_Jobs(study).all())


class _Jobs:
    def __init__(self, study: Study) -> None:
        self.study = study
        data = study.data
        self.data_key = _hash(str(data) if isinstance(data, Path) else data)
        self.data_folder = data if isinstance(data, Path) else study.out / f"data-{self.data_key}"
        self.needs_data = () if isinstance(data, Path) else ("data",)
        self.source_key, self.source_run = self._source_key()
        self.source_folder = study.source.path or self.source_run / "export"

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

    def all(self) -> Iterator[Job]:
        """See `jobs_of`."""
        study = self.study
        if self.needs_data:
            yield Job("data", "data", self.data_key, self.data_folder)
        if study.source.path is None and any(arm.method != SCRATCH for arm in study.arms):
            steps = study.source.steps
            keys = self._source_train() | self._schedule(steps) | {"model": study.source.config, "arm": "source"}
            keys |= {"seed": study.source.seed}
            keeps = any(arm.state is not None for arm in study.arms)
            yield self._run(
                "source", "source", self.source_key, self.source_run, self.needs_data, keys, steps=steps, keeps=keeps
            )
        sweep = study.sweep
        expanded: set[str] = set()
        if sweep:
            for arm in study.arms:
                for seed in sweep.seeds:
                    yield from self._expansion(arm, seed, expanded)
                for rate in sweep.lr:
                    for seed in sweep.seeds:
                        yield self._tried(arm, rate, seed, sweep)
        for seed in study.seeds:
            for arm in study.arms:
                yield from self._expansion(arm, seed, expanded)
                yield from self._ends(arm, seed)

    def _expansion(self, arm: Arm, seed: int, expanded: set[str]) -> Iterator[Job]:
        if not arm.grows or (name := f"{arm.name}/seed{seed}/start") in expanded:
            return
        expanded.add(name)
        key = self._start_key(arm, seed)
        needs = ("source",) if self.study.source.path is None else ()
        if arm.learn is not None:
            needs = (*self.needs_data, *needs)
        yield Job(name, "expand", key, self._start(arm, seed), needs, arm=arm, seed=seed)
        if arm.state is not None:
            made = self._state(arm, seed)
            yield Job(f"{arm.name}/seed{seed}/state", "state", key, made, (name, *needs), arm=arm, seed=seed)

    def _start_key(self, arm: Arm, seed: int) -> str:
        """What the first weights depend on: for a growth the resolved plan, so that a changed method is noticed."""
        from phigrow.growth.planner import plan

        study = self.study
        if arm.method == SCRATCH:
            return _hash(study.dst)
        if arm.method == CONTINUED:
            return self.source_key
        made = plan(study.source.config, study.dst, arm.method, seed=seed, **arm.growth).hash
        learning = [arm.learn, self.data_key] if arm.learn is not None else []
        return _hash([self.source_key, made, *learning])

    def _start(self, arm: Arm, seed: int) -> Path:
        if not arm.grows:
            return self.source_folder
        return self.study.out / "starts" / arm.name / f"seed{seed}-{self._start_key(arm, seed)}"

    def _state(self, arm: Arm, seed: int) -> Path:
        return self._start(arm, seed).with_name(f"{self._start(arm, seed).name}-{arm.state}")

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

    def _tried(self, arm: Arm, rate: float, seed: int, sweep: Sweep) -> Job:
        keys = self._keys(arm, seed) | self._schedule(sweep.steps)
        keys |= {"lr": rate, "export": None, "nonfinite_limit": 0}  # a rate that diverges has lost; it does not fail
        key = self._run_key(arm, seed, rate, sweep.steps)
        folder = self.study.out / "sweep" / arm.name / f"lr{rate:g}-seed{seed}-{key}"
        name = f"{arm.name}/sweep/lr{rate:g}/seed{seed}"
        before = self._before(arm, seed)
        return self._run(name, "sweep", key, folder, before, keys, steps=sweep.steps, arm=arm, seed=seed)

    def _ends(self, arm: Arm, seed: int) -> Iterator[Job]:
        study = self.study
        sweep = study.sweep
        rate = sweep.record() if sweep else study.train.get("lr")
        before = self._before(arm, seed)
        if sweep:
            before += tuple(f"{arm.name}/sweep/lr{lr:g}/seed{s}" for lr in sweep.lr for s in sweep.seeds)
        trunk_key = self._run_key(arm, seed, rate)
        folder = study.out / "runs" / arm.name / f"seed{seed}-{trunk_key}"
        points = [budget - study.decay_steps(budget) for budget in study.budgets]
        shared: dict[str, Any] = {"trunk": f"{arm.name}-seed{seed}"}
        shared |= {"lr_chosen_by": sweep.record()} if sweep else {}
        trunk = f"{arm.name}/seed{seed}/trunk"
        keys = self._keys(arm, seed)
        if len(points) > 1:
            steps = points[-1]
            constant = {"steps": steps, "schedule": "wsd", "decay": 0, "save_at": points, "export": None}
            yield self._run(
                trunk, "trunk", trunk_key, folder / "trunk", before, keys | shared | constant,
                steps=steps, arm=arm, seed=seed,
            )  # fmt: skip
        for budget, point in zip(study.budgets, points, strict=True):
            branch = {"branch_from": str(folder / "trunk")} if len(points) > 1 else {}
            schedule = self._schedule(budget)
            yield self._run(
                f"{arm.name}/seed{seed}/{budget}", "end", self._run_key(arm, seed, rate, budget),
                folder / f"{budget}-decay{schedule['decay']}", (trunk,) if branch else before,
                keys | shared | schedule | branch,
                first=point if branch else 0, steps=budget, arm=arm, seed=seed, budget=budget,
            )  # fmt: skip

    def _before(self, arm: Arm, seed: int) -> tuple[str, ...]:
        if arm.grows:
            state = (f"{arm.name}/seed{seed}/state",) if arm.state is not None else ()
            return (*self.needs_data, f"{arm.name}/seed{seed}/start", *state)
        if arm.method == CONTINUED and self.study.source.path is None:
            return (*self.needs_data, "source")
        return self.needs_data

    def _run_key(self, arm: Arm, seed: int, rate: Any, steps: int | None = None) -> str:
        decay = steps and self.study.decay_steps(steps)
        train = result_keys(self.study.train | arm.train)
        state = [arm.state] if arm.state is not None else []
        return _hash([self.data_key, self._start_key(arm, seed), train, seed, rate, steps, decay, *state])

    def _run(
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
        study = self.study
        arm: Arm | None = which.get("arm")
        model: Config = study.source.config if arm is None or arm.method == CONTINUED else study.dst
        tokens = (steps - first) * study.batch_tokens
        flops = tokens * count_cost(model, study.seq_len).training_flops
        keys = keys | {"data": str(self.data_folder), "out": str(folder)}
        return Job(name, kind, key, folder, needs, keys, first=first, steps=steps, tokens=tokens, flops=flops, **which)


def result_keys(train: dict[str, Any]) -> dict[str, Any]:
    """The keys of a training run that its result depends on: those that are set and not operational.

    >>> result_keys({"warmup": 20, "threads": 2, "decay": None})
    {'warmup': 20}
    """
    operational = RunConfig.keys_with(Role.OPERATIONAL)
    return {key: value for key, value in train.items() if key not in operational and value is not None}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:10]
