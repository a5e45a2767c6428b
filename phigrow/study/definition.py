"""Read a study from YAML, strictly: errors name the key, before anything runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.shipped import find_shipped
from phigrow.models.config import load_config
from phigrow.study.reading import (
    GROWTH,
    beside,
    config_of,
    data_of,
    mapping,
    near,
    number,
    only,
    optional,
    read_yaml,
    run_keys,
    single,
    whole,
)
from phigrow.study.settings import CONTINUED, SCRATCH, Arm, Source, Study, Sweep
from phigrow.training.declaration import Role

KEYS = (
    "data", "source", "dst", "arms", "baseline", "seeds", "budgets", "decay", "train", "sweep", "workers", "ranks",
    "out", "flops_per_second",
)  # fmt: skip
NEEDED = ("data", "source", "dst", "arms", "budgets", "train")
LEARN: dict[str, type] = {"steps": int, "map_batch": int, "map_lr": float, "map_noise": float}
"""Of an arm whose method is learned: how; or else ``maps``, what was learned before."""

DEFAULTS: dict[str, Any] = {"batch": 16, "eval_at": [1, 10, 100], "keep": 1, "export": None}


def load_study(
    path: str | Path, *, out: str | Path | None = None, workers: int | None = None, ranks: int | None = None
) -> Study:
    """Read a study file; configurations that it names are looked for beside it first.

    Args:
        path: a YAML file, or the name of a shipped study.
        out: folder of everything, in place of the file's ``out``.
        workers, ranks: in place of the file's.

    Raises:
        GrowthError: no such file; an unknown key (with the nearest ones), a missing one, a value of the wrong kind; an
            arm that cannot be grown; budgets too short for warmup and decay.

    >>> load_study("tiny").budgets
    (20, 40)
    """
    path = find_shipped(path, "study")
    given = mapping(read_yaml(path), str(path))
    only(given, KEYS, str(path))
    for key in NEEDED:
        if key not in given:
            raise GrowthError(f"the study has no {key!r}", where=str(path), fix=f"it needs {', '.join(NEEDED)}")
    data, seq_len = data_of(given["data"], path)
    train = run_keys(given["train"], Role.STUDY, f"train in {path}")
    train = DEFAULTS | train
    seeds = whole(given.get("seeds", [0]), "seeds", path, least=0)
    source = _source(given["source"], path)
    study = Study(
        name=path.stem,
        out=Path(out or given.get("out") or Path("runs") / path.stem),
        data=data,
        seq_len=seq_len,
        source=source,
        dst=config_of(given["dst"], path, "dst"),
        arms=tuple(_arm(name, content, path) for name, content in mapping(given["arms"], f"arms in {path}").items()),
        baseline=str(given.get("baseline", SCRATCH)),
        seeds=seeds,
        budgets=_budgets(given["budgets"], train["batch"] * seq_len, path),
        decay=number(given.get("decay", 0.2), "decay", path),
        train=train,
        sweep=_sweep(given["sweep"], seeds, path) if given.get("sweep") else None,
        workers=workers or optional(given, "workers", path),
        ranks=ranks or optional(given, "ranks", path),
        flops_per_second=number(given["flops_per_second"], "flops_per_second", path)
        if given.get("flops_per_second")
        else None,
    )
    _check(study, path)
    return study


def _check(study: Study, path: Path) -> None:
    """Check combinations of keys."""
    from phigrow.checkpoints.run_checkpoints import marked_checkpoints
    from phigrow.expansion.grow_optimizer import check_state
    from phigrow.growth.planner import make_plan
    from phigrow.study.jobs import jobs_of
    from phigrow.training import RunConfig

    if study.baseline not in [arm.name for arm in study.arms]:
        raise near(
            f"there is no arm {study.baseline!r}", f"baseline in {path}", study.baseline, [a.name for a in study.arms]
        )
    if not 0 < study.decay < 1:
        raise GrowthError(f"decay is {study.decay:g}", where=f"decay in {path}", fix="give a fraction of each budget")
    if study.sweep and "lr" in study.train:
        raise GrowthError("lr and sweep are both set", where=f"train in {path}", fix="remove one of them")
    for arm in study.arms:
        if arm.grows:
            try:
                made = make_plan(study.source.config, study.dst, arm.spec(seed=0))
                if arm.state is not None:
                    check_state(made, arm.state)
            except GrowthError as error:
                raise error.at(f"arm {arm.name} in {path}") from error
    kept = [arm.name for arm in study.arms if arm.state is not None]
    if kept and study.source.path is not None and not marked_checkpoints(study.source.path.parent)[0]:
        raise GrowthError(
            f"arm {kept[0]} grows the optimizer's state, and the source has none",
            where=f"source in {path}",
            why=f"there is no checkpoint in {study.source.path.parent}",
            fix="give as path the export inside the folder of a run that keeps its checkpoints",
        )
    for job in jobs_of(study):
        if not job.trains:
            continue
        try:
            RunConfig(**job.keys)
        except GrowthError as error:
            raise error.at(f"{job.name} in {path}") from error


def _budgets(value: Any, batch_tokens: int, path: Path) -> tuple[int, ...]:
    """Steps as they are, or ``{tokens: [...]}``, rounded up to whole steps."""
    if isinstance(value, dict):
        where = f"budgets in {path}"
        only(value, ("tokens",), where)
        items = value.get("tokens")
        tokens = [number(item, "budgets", path) for item in (items if isinstance(items, list) else [items])]
        value = [math.ceil(number / batch_tokens) for number in tokens]
    return tuple(sorted(whole(value, "budgets", path, least=2)))


def _source(value: Any, path: Path) -> Source:
    from phigrow.checkpoints.hub import locate

    where = f"source in {path}"
    if isinstance(value, str):
        value = {"path": value}
    given = mapping(value, where)
    if "path" in given:
        only(given, ("path", "tokens", "flops", "seconds"), where)
        folder = locate(beside(str(given["path"]), path))
        cost = {key: number(value, key, path) for key, value in given.items() if key != "path"}
        return Source(config=load_config(folder), path=folder, cost=cost)
    only(given, ("model", "steps", "seed", "train"), where)
    for key in ("model", "steps"):
        if key not in given:
            raise GrowthError(f"the source has no {key!r}", where=where, fix="give a path, or a model and its steps")
    return Source(
        config=config_of(given["model"], path, "model"),
        steps=single(given["steps"], "steps", path, least=2),
        seed=single(given.get("seed", 0), "seed", path, least=0),
        train=run_keys(given.get("train"), Role.STUDY, f"train of source in {path}"),
    )


def _sweep(value: Any, seeds: tuple[int, ...], path: Path) -> Sweep:
    where = f"sweep in {path}"
    given = mapping(value, where)
    only(given, ("lr", "steps", "seeds"), where)
    for key in ("lr", "steps"):
        if key not in given:
            raise GrowthError(f"the sweep has no {key!r}", where=where, fix="give lr: [...] and steps")
    rates = given["lr"] if isinstance(given["lr"], list) else [given["lr"]]
    return Sweep(
        lr=tuple(sorted({number(rate, "lr", path) for rate in rates})),
        steps=single(given["steps"], "steps", path, least=2),
        seeds=whole(given.get("seeds", [seeds[0]]), "seeds", path, least=0),
    )


def _arm(name: str, content: Any, path: Path) -> Arm:
    from phigrow.growth.methods import all_methods, find_method

    where = f"arm {name} in {path}"
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise GrowthError(
            f"{name!r} is not a valid name of an arm",
            where=where,
            why="an arm names a folder",
            fix="use letters, digits, -",
        )
    given = mapping(content or {}, where)
    method = str(given.pop("method", name))
    mixture = bool(set(method) & set(",=:"))  # one method an axis: what it is made of is checked by its plan
    known = [SCRATCH, CONTINUED, *all_methods()]
    if method not in known and not mixture:
        raise near(f"there is no method {method!r}", where, method, known)
    shared = Role.STUDY | Role.ARMS | Role.START
    train = run_keys(given.pop("train", None), shared, f"train of {where}", "it is the same for every arm")
    grows = method not in (SCRATCH, CONTINUED)
    state = given.pop("state", None) if grows else None
    learns = grows and not mixture and find_method(method).learns
    if not mixture:
        more = (*GROWTH, *find_method(method).options) if grows else ()
        only(given, ("method", "train", *more, *((*LEARN, "maps") if learns else ())), where)
    learn = _learn(given, path, where) if learns else None
    return Arm(name, method, given, train, None if state is None else str(state), learn)


def _learn(given: dict[str, Any], path: Path, where: str) -> dict[str, Any] | None:
    """Take how its maps are learned out of an arm's keys; None where they were learned before."""
    how = {key: given.pop(key) for key in LEARN if key in given}
    if "maps" in given:
        if how:
            raise GrowthError(
                f"maps and {next(iter(how))} are both set", where=where, fix="give learned maps, or how to learn them"
            )
        given["maps"] = str(beside(str(given["maps"]), path))
        return None
    made = {"steps": 100} | {
        key: whole(value, key, path, least=1)[0] if LEARN[key] is int else number(value, key, path)
        for key, value in how.items()
    }
    return {key.removeprefix("map_"): value for key, value in made.items()}
