"""Read a study from YAML, strictly: errors name the key, before anything runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.paths import user_path
from phigrow.files.shipped import find_shipped
from phigrow.models.config import Config
from phigrow.models.cost import count_cost
from phigrow.study.places import with_former_places
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
    read_recipe,
    run_keys,
    seeds,
    single,
    whole,
)
from phigrow.study.settings import CONTINUED, FLAT, SCRATCH, Arm, Source, Study, Sweep, Text
from phigrow.training.declaration import Role

KEYS = (
    "data", "text", "source", "sources", "dst", "arms", "flat", "baseline", "seeds", "budgets", "decay", "train",
    "sweep", "refine", "workers", "ranks", "out", "flops_per_second",
)  # fmt: skip
NEEDED = ("data", "dst", "arms", "budgets", "train")
PER_PARAMETER = "tokens_per_parameter"
LEARN: dict[str, type] = {"steps": int, "map_batch": int, "map_lr": float, "map_noise": float}
"""Keys of an arm with learned maps and their types; an arm with ``maps``, which were learned before, has none."""

MOST_WIDENINGS = 6
"""Default of the largest number of rates that an arm tries beyond the grid."""

DEFAULTS: dict[str, Any] = {"batch": 16, "eval_at": [1, 10, 100], "keep": 1, "export": None}


def load_study(
    path: str | Path, *, out: str | Path | None = None, workers: int | None = None, ranks: int | None = None
) -> Study:
    """Read a study file; relative paths in it are tried beside the file first.

    Args:
        path: a YAML file, or the name of a shipped study.
        out: folder of all results, in place of the file's ``out``.
        workers, ranks: in place of the file's.

    Raises:
        GrowthError: there is no such file; a key is unknown (with the nearest ones), missing, or has a wrong value; an
            arm cannot be grown; or a budget is too short for warmup and decay.

    >>> load_study("tiny").budgets
    (20, 40)
    """
    path = find_shipped(path, "study")
    given = mapping(read_recipe(path), str(path))
    only(given, KEYS, str(path))
    for key in NEEDED:
        if key not in given:
            raise GrowthError(f"the study has no {key!r}", where=str(path), fix=f"give all of {', '.join(NEEDED)}")
    data, seq_len = data_of(given["data"], path)
    train = run_keys(given["train"], Role.STUDY, f"train in {path}")
    train = DEFAULTS | train
    chosen_seeds = seeds(given.get("seeds", [0]), path)
    dst = config_of(given["dst"], path, "dst")
    batch_tokens = train["batch"] * seq_len
    sources = _sources(given, batch_tokens, path)
    budgets = _rising(given["budgets"], "budgets", dst, batch_tokens, path)
    arms = [
        arm
        for name, content in mapping(given["arms"], f"arms in {path}").items()
        for arm in _arms(name, content, sources, dst, batch_tokens, path)
    ]
    study = Study(
        name=path.stem,
        out=user_path(out or given.get("out") or Path("runs") / path.stem),
        data=data,
        seq_len=seq_len,
        sources=sources,
        dst=dst,
        arms=(*_in_order(arms, sources), *_flat(given.get("flat"), dst, budgets, batch_tokens, seq_len, path)),
        baseline=str(given.get("baseline", SCRATCH)),
        seeds=chosen_seeds,
        budgets=budgets,
        decay=number(given.get("decay", 0.2), "decay", path),
        train=train,
        sweep=_sweep(given["sweep"], chosen_seeds, dst, batch_tokens, path) if given.get("sweep") else None,
        text=_text(given["text"], path) if given.get("text") else None,
        workers=workers or optional(given, "workers", path),
        ranks=ranks or optional(given, "ranks", path),
        flops_per_second=number(given["flops_per_second"], "flops_per_second", path)
        if given.get("flops_per_second")
        else None,
        refine=_switch(given.get("refine", False), "refine", path),
    )
    study = with_former_places(study)
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
                made = make_plan(study.source(arm.source).config, study.dst, arm.spec(seed=0))
                if arm.state is not None:
                    check_state(made, arm.state)
            except GrowthError as error:
                raise error.at(f"arm {arm.name} in {path}") from error
    for arm in study.arms:
        folder = study.source(arm.source).path if arm.has_source else None
        if arm.state is not None and folder is not None and not marked_checkpoints(folder.parent)[0]:
            raise GrowthError(
                f"arm {arm.name} grows the optimizer's state, and the source has none",
                where=f"source in {path}",
                why=f"there is no checkpoint in {folder.parent}",
                fix="give as path the export inside the folder of a run that keeps its checkpoints",
            )
    names = [arm.label for arm in study.arms]
    for name in names:
        if names.count(name) > 1:
            raise GrowthError(f"two arms are called {name!r}", where=f"arms in {path}", fix="rename one of them")
    for job in jobs_of(study):
        if not job.trains:
            continue
        try:
            RunConfig(**job.keys)
        except GrowthError as error:
            raise error.at(f"{job.name} in {path}") from error


def _steps(value: Any, key: str, model: Config, batch_tokens: int, path: Path) -> tuple[int, ...]:
    """Return numbers of steps, given as they are, or as tokens or tokens per parameter of a model (rounded up)."""
    if isinstance(value, dict):
        where = f"{key} in {path}"
        only(value, ("tokens", PER_PARAMETER), where)
        if len(value) != 1:
            raise GrowthError(f"{key} is {value!r}", where=where, fix=f"give tokens: [...] or {PER_PARAMETER}: [...]")
        ((unit, items),) = value.items()
        scale = count_cost(model).parameters if unit == PER_PARAMETER else 1
        amounts = [number(item, key, path) for item in (items if isinstance(items, list) else [items])]
        value = [math.ceil(amount * scale / batch_tokens) for amount in amounts]
    return whole(value, key, path, least=2)


def _rising(value: Any, key: str, model: Config, batch_tokens: int, path: Path) -> tuple[int, ...]:
    return tuple(sorted(_steps(value, key, model, batch_tokens, path)))


def _sources(given: dict[str, Any], batch_tokens: int, path: Path) -> tuple[Source, ...]:
    if ("source" in given) == ("sources" in given):
        raise GrowthError(
            "the study has no 'source'" if "source" not in given else "source and sources are both set",
            where=str(path),
            fix="give source: {...} for one source, or sources: {name: {...}, ...} for several",
        )
    if "source" in given:
        return (_source(given["source"], "", batch_tokens, path, []),)
    sources: list[Source] = []
    for name, content in mapping(given["sources"], f"sources in {path}").items():
        sources.append(_source(content, _folder_name(name, path), batch_tokens, path, sources))
    return tuple(sources)


def _source(value: Any, name: str, batch_tokens: int, path: Path, earlier: list[Source]) -> Source:
    from phigrow.checkpoints.hub import locate
    from phigrow.checkpoints.stored_model import stored_model_config

    where = f"source {name} in {path}" if name else f"source in {path}"
    if isinstance(value, str):
        value = {"path": value}
    given = mapping(value, where)
    if "path" in given:
        only(given, ("path", "tokens", "flops", "seconds"), where)
        folder = locate(beside(str(given["path"]), path))
        cost = {key: number(value, key, path) for key, value in given.items() if key != "path"}
        return Source(config=stored_model_config(folder), path=folder, cost=cost, name=name)
    only(given, ("model", "steps", "seed", "seeds", "train", "grow"), where)
    for key in ("model", "steps"):
        if key not in given:
            raise GrowthError(f"the source has no {key!r}", where=where, fix="give a path, or a model and its steps")
    if "seed" in given and "seeds" in given:
        raise GrowthError("seed and seeds are both set", where=where, fix="remove one of them")
    config = config_of(given["model"], path, "model")
    growth = _growth(given["grow"], name, config, earlier, batch_tokens, path) if "grow" in given else None
    own = next((source.seeds for source in earlier if growth and source.name == growth.source), (0,))
    if "seeds" in given:
        own = seeds(given["seeds"], path)
    elif "seed" in given:
        own = (single(given["seed"], "seed", path, least=0),)
    return Source(
        config=config,
        steps=_steps(given["steps"], "steps", config, batch_tokens, path),
        seeds=own,
        train=run_keys(given.get("train"), Role.STUDY, f"train of {where}"),
        name=name,
        grown=growth,
    )


def _growth(value: Any, name: str, config: Config, earlier: list[Source], batch_tokens: int, path: Path) -> Arm:
    """Read how a source is grown from another one, which stands before it in the file."""
    from phigrow.growth.planner import make_plan

    where = f"grow of source {name} in {path}"
    given = mapping(value, where)
    parent, age = str(given.pop("source", "")), given.pop("age", None)
    names = [source.name for source in earlier]
    if not names:
        raise GrowthError("there is no source before this one", where=where, fix="write the source to grow from first")
    if parent not in names:
        raise near(f"there is no source {parent!r} before this one", where, parent, names)
    source = next(source for source in earlier if source.name == parent)
    arm = _arm(f"source-{name}", {"method": "wr"} | given, path)
    if not arm.grows or arm.train or arm.state is not None or arm.learn is not None:
        raise GrowthError(
            "a source is grown by a method and its options only", where=where, fix="give source, age, method and depth"
        )
    steps = 0
    if source.path is None:
        steps = source.steps[0] if age is None else _ages(age, source, batch_tokens, path)[0]
        if steps not in source.steps:
            raise GrowthError(
                f"the source {parent} has no age of {age} tokens per parameter",
                where=where, fix=f"add this age to the steps of {parent}, or leave age out to take its first one",
            )  # fmt: skip
    arm = replace(arm, source=parent, source_steps=steps, model=config)
    try:
        make_plan(source.config, config, arm.spec(seed=0))
    except GrowthError as error:
        raise error.at(where) from error
    return arm


def _flat(value: Any, dst: Config, budgets: tuple[int, ...], batch_tokens: int, seq_len: int, path: Path) -> list[Arm]:
    """Return the arms of the flat frontier; by default their budgets have the FLOPs of the destination's budgets."""
    arms = []
    for name, content in mapping(value or {}, f"flat in {path}").items():
        where = f"flat {name} in {path}"
        given = mapping(content, where)
        if "model" not in given:
            given = {"model": given}
        only(given, ("model", "budgets", "longer", "train"), where)
        model = config_of(given["model"], path, "model")
        share = count_cost(dst, seq_len).training_flops / count_cost(model, seq_len).training_flops
        own = _rising(given["budgets"], "budgets", model, batch_tokens, path) if "budgets" in given else None
        longer = _rising(given["longer"], "longer", model, batch_tokens, path) if "longer" in given else ()
        arms.append(
            Arm(
                _folder_name(name, path), FLAT, model=model, longer=longer,
                budgets=own or tuple(max(2, round(steps * share)) for steps in budgets),
                train=run_keys(given.get("train"), Role.STUDY | Role.ARMS | Role.START, f"train of {where}"),
            )
        )  # fmt: skip
        if arms[-1].is_taught:
            raise GrowthError(
                "teacher_steps is set for a flat model", where=f"train of {where}",
                why="the flat frontier has models that are trained without a source", fix="set it in an arm instead",
            )  # fmt: skip
    return arms


def _text(value: Any, path: Path) -> Text:
    """Read the parts of the text, each ``[first, last, of]``."""
    names = ("source", "arms", "choose", "report")
    where = f"text in {path}"
    given = mapping(value, where)
    only(given, names, where)
    parts = {name: _part(given.get(name, [0, 1, 1]), f"{name} of {where}") for name in names}
    return Text(**parts)


def _part(value: Any, where: str) -> tuple[int, int, int]:
    items = value if isinstance(value, list) else []
    if len(items) != 3 or any(isinstance(item, bool) or not isinstance(item, int) for item in items):
        raise GrowthError(f"{value!r} is no part of the text", where=where, fix="give three whole numbers, [0, 4, 10]")
    first, last, of = items
    if not 0 <= first < last <= of:
        raise GrowthError(f"{value!r} is no part of the text", where=where, fix="give [first, last, of], rising")
    return first, last, of


def _sweep(value: Any, study_seeds: tuple[int, ...], dst: Config, batch_tokens: int, path: Path) -> Sweep:
    where = f"sweep in {path}"
    given = mapping(value, where)
    only(given, ("lr", "steps", "seeds", "widen"), where)
    for key in ("lr", "steps"):
        if key not in given:
            raise GrowthError(f"the sweep has no {key!r}", where=where, fix="give lr: [...] and steps")
    rates = given["lr"] if isinstance(given["lr"], list) else [given["lr"]]
    steps = _rising(given["steps"], "steps", dst, batch_tokens, path)
    return Sweep(
        lr=tuple(sorted({number(rate, "lr", path) for rate in rates})),
        steps=steps,
        seeds=seeds(given.get("seeds", [study_seeds[0]]), path),
        widen=single(given.get("widen", MOST_WIDENINGS if len(steps) > 1 else 0), "widen", path, least=0),
    )


def _switch(value: Any, key: str, path: Path) -> bool:
    if not isinstance(value, bool):
        raise GrowthError(f"{key} is {value!r}", where=f"{key} in {path}", fix=f"give {key}: true or {key}: false")
    return value


def _folder_name(name: str, path: Path) -> str:
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise GrowthError(
            f"{name!r} is not a valid name",
            where=f"{name} in {path}",
            why="it names a folder",
            fix="use letters, digits, -, _ and ., and do not begin with .",
        )
    return name


def _arms(
    name: str, content: Any, sources: tuple[Source, ...], dst: Config, batch_tokens: int, path: Path
) -> list[Arm]:
    """Read one arm, once for each age of its source."""
    where = f"arm {name} in {path}"
    given = mapping(content or {}, where)
    named = given.pop("source", None)
    ages, constant, same_text = given.pop("ages", None), given.pop("constant", False), given.pop("same_text", False)
    longer, at_ages = given.pop("longer", None), None
    if isinstance(longer, dict) and "ages" in longer:
        at_ages, longer = longer["ages"], {key: value for key, value in longer.items() if key != "ages"}
    budgets = _rising(longer, "longer", dst, batch_tokens, path) if longer else ()
    arm = replace(_arm(name, given, path), longer=budgets)
    if not arm.needs_source:
        extra = {"source": named, "ages": ages or at_ages, "constant": constant, "same_text": same_text}
        for key, value in extra.items():
            if value:
                raise GrowthError(f"{key} is set, but the arm starts from scratch", where=where, fix=f"remove {key}")
        return [arm]
    known = [source.name for source in sources]
    if named is None and len(sources) > 1:
        raise GrowthError("the arm names no source", where=where, fix=f"give source: one of {', '.join(known)}")
    if named is not None and named not in known:
        raise near(f"there is no source {named!r}", where, str(named), [name for name in known if name])
    source = next(source for source in sources if named in (None, source.name))
    arm = replace(arm, source=source.name, same_text=bool(same_text), constant=bool(constant))
    if source.path is not None:
        if ages or at_ages or constant or same_text:
            raise GrowthError(
                "ages, constant and same_text require a source that the study trains",
                where=where,
                fix="remove them, or give the source a model and steps instead of a path",
            )
        return [arm]
    parameters = count_cost(source.config).parameters
    per_step = batch_tokens / parameters
    steps = _ages(ages, source, batch_tokens, path) if ages else source.steps
    longer_at = _ages(at_ages, source, batch_tokens, path) if at_ages else steps
    for length in (*steps, *longer_at):
        if length not in source.steps and not constant:
            have = ", ".join(f"{own * per_step:.3g}" for own in source.steps)
            raise GrowthError(
                f"the source has no age of {length * per_step:.3g} tokens per parameter",
                where=where, fix=f"choose ages from {have}, or add this age to the source's steps",
            )  # fmt: skip
    return [
        replace(
            arm, source_steps=own, age=float(f"{own * per_step:.3g}"), several_ages=len(source.steps) > 1,
            longer=arm.longer if own in longer_at else (),
        )
        for own in steps
    ]  # fmt: skip


def _ages(value: Any, source: Source, batch_tokens: int, path: Path) -> tuple[int, ...]:
    """Return the steps of a source at ages in tokens per parameter of the source."""
    return _steps({PER_PARAMETER: value}, "ages", source.config, batch_tokens, path)


def _in_order(arms: list[Arm], sources: tuple[Source, ...]) -> list[Arm]:
    """Sort arms: those without a source first, then those at the first age of their source, and so on."""

    def rank(arm: Arm) -> int:
        if not arm.needs_source:
            return -1
        steps = next(source.steps for source in sources if source.name == arm.source)
        return steps.index(arm.source_steps) if arm.source_steps in steps else 0

    return sorted(arms, key=rank)


def _arm(name: str, content: Any, path: Path) -> Arm:
    from phigrow.growth.method_files import SUFFIX, is_method_file
    from phigrow.growth.method_spec import is_one_name, with_paths
    from phigrow.growth.methods import built_in_methods
    from phigrow.growth.registry import all_methods, find_method

    where = f"arm {name} in {path}"
    _folder_name(name, path)
    given = mapping(content or {}, where)
    method = with_paths(str(given.pop("method", name)), lambda file: beside(file, path))
    mixture = not is_one_name(method)  # several methods, or one with options; the plan checks it
    known = [SCRATCH, CONTINUED, *built_in_methods()]
    if method not in known and not mixture and not is_method_file(method):
        known = [SCRATCH, CONTINUED, *all_methods()]
        if method not in known:
            raise near(f"there is no method {method!r}", where, method, known)
    shared = Role.STUDY | Role.ARMS | Role.START
    train = run_keys(given.pop("train", None), shared, f"train of {where}", "it is the same for every arm")
    grows = method not in (SCRATCH, CONTINUED)
    state = given.pop("state", None) if grows else None
    base = built_in_methods().get(method.partition(":")[0])  # only phigrow's own methods learn
    learns = grows and base is not None and base.learns
    if not mixture:
        try:
            more = (*GROWTH, *find_method(method).options) if grows else ()
        except GrowthError as error:
            raise error.at(where) from error
        only(given, ("method", "train", *more, *((*LEARN, "maps") if learns else ())), where)
    learn = _learn(given, path, where) if learns else None
    files = _method_files(method, where) if grows and SUFFIX in method else {}
    return Arm(name, method, given, train, None if state is None else str(state), learn, method_files=files)


def _method_files(method: str, where: str) -> dict[str, str | None]:
    from phigrow.growth.growth_spec import GrowthSpec

    try:
        return GrowthSpec(method).method_files
    except GrowthError as error:
        raise error.at(where) from error


def _learn(given: dict[str, Any], path: Path, where: str) -> dict[str, Any] | None:
    """Take the keys of learning its maps out of an arm's keys; None if the maps were learned before."""
    how = {key: given.pop(key) for key in LEARN if key in given}
    if "maps" in given:
        if how:
            raise GrowthError(
                f"maps and {next(iter(how))} are both set",
                where=where,
                fix=f"remove maps to learn new ones, or remove {', '.join(how)}",
            )
        given["maps"] = str(beside(str(given["maps"]), path))
        return None
    made = {"steps": 100} | {
        key: whole(value, key, path, least=1)[0] if LEARN[key] is int else number(value, key, path)
        for key, value in how.items()
    }
    return {key.removeprefix("map_"): value for key, value in made.items()}
