"""Read a study from YAML, strictly: what is wrong is said by key, before anything runs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from phigrow.config import Config, load_config
from phigrow.errors import GrowthError
from phigrow.study.settings import CONTINUED, SCRATCH, Arm, Source, Study, Sweep

KEYS = (
    "data", "source", "dst", "arms", "baseline", "seeds", "budgets", "decay", "train", "sweep", "workers", "ranks",
    "out", "flops_per_second",
)  # fmt: skip
NEEDED = ("data", "source", "dst", "arms", "budgets", "train")
GROWTH = ("depth", "rounding", "noise")
"""Options of every growth; the method has more."""

MANAGED = (
    "init", "model", "data", "stream", "arm", "out", "seed", "steps", "schedule", "decay", "trunk", "branch_from",
    "save_at", "lr_chosen_by", "resume", "universal", "source_tokens", "source_flops", "source_seconds",
)  # fmt: skip
"""Keys of a training run that the study decides."""

SAME = ("lr", "batch", "eval_blocks", "vocab_size", "documents", "mixture")
"""Keys that no arm may have for itself: arms are compared on the same data, batch and held-out text."""

DEFAULTS: dict[str, Any] = {"batch": 16, "eval_at": [1, 10, 100], "keep": 1, "export": None}


def load_study(
    path: str | Path, *, out: str | Path | None = None, workers: int | None = None, ranks: int | None = None
) -> Study:
    """Read a study file; configurations that it names are looked for beside it first.

    Args:
        path: a YAML file.
        out: folder of everything, in place of the file's ``out``.
        workers, ranks: in place of the file's.

    Raises:
        GrowthError: no such file; an unknown key (with the nearest ones), a missing one, a value of the wrong kind; an
            arm that cannot be grown; budgets too short for warmup and decay.

    >>> load_study("recipes/studies/tiny.yaml").budgets  # doctest: +SKIP
    (20, 40)
    """
    path = Path(path)
    found = _mapping(_read(path), str(path))
    _only(found, KEYS, str(path))
    for key in NEEDED:
        if key not in found:
            raise GrowthError(f"a study without {key!r}", where=str(path), fix=f"it needs {', '.join(NEEDED)}")
    data, seq_len = _data(found["data"], path)
    train = _run_keys(found["train"], MANAGED, f"train in {path}")
    train = DEFAULTS | train
    seeds = _whole(found.get("seeds", [0]), "seeds", path, least=0)
    source = _source(found["source"], path)
    study = Study(
        name=path.stem,
        out=Path(out or found.get("out") or Path("runs") / path.stem),
        data=data,
        seq_len=seq_len,
        source=source,
        dst=_config(found["dst"], path, "dst"),
        arms=tuple(_arm(name, content, path) for name, content in _mapping(found["arms"], f"arms in {path}").items()),
        baseline=str(found.get("baseline", SCRATCH)),
        seeds=seeds,
        budgets=_budgets(found["budgets"], train["batch"] * seq_len, path),
        decay=_number(found.get("decay", 0.2), "decay", path),
        train=train,
        sweep=_sweep(found["sweep"], seeds, path) if found.get("sweep") else None,
        workers=workers or _optional(found, "workers", path),
        ranks=ranks or _optional(found, "ranks", path),
        flops_per_second=_number(found["flops_per_second"], "flops_per_second", path)
        if found.get("flops_per_second")
        else None,
    )
    _check(study, path)
    return study


def _check(study: Study, path: Path) -> None:
    """What takes more than one key to see."""
    from phigrow.resolve import plan
    from phigrow.study.jobs import jobs_of
    from phigrow.training import RunConfig

    if study.baseline not in [arm.name for arm in study.arms]:
        raise _near(f"no arm {study.baseline!r}", f"baseline in {path}", study.baseline, [a.name for a in study.arms])
    if not 0 < study.decay < 1:
        raise GrowthError(f"decay is {study.decay:g}", where=f"decay in {path}", fix="give a fraction of each budget")
    if study.sweep and "lr" in study.train:
        raise GrowthError("lr and a sweep of lr", where=f"train in {path}", fix="leave one of them out")
    for arm in study.arms:
        if arm.grows:
            try:
                plan(study.source.config, study.dst, arm.method, **arm.growth)
            except GrowthError as error:
                where = f"arm {arm.name} in {path}" + (f": {error.where}" if error.where else "")
                raise GrowthError(error.what, where=where, why=error.why, fix=error.fix) from error
    for job in jobs_of(study):
        if not job.trains:
            continue
        try:
            RunConfig(**job.keys)
        except GrowthError as error:
            where = f"{error.where}, for {job.name} in {path}"
            raise GrowthError(error.what, where=where, why=error.why, fix=error.fix) from error


def _read(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise GrowthError("no such study", where=str(path.absolute()), fix="give a YAML file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise GrowthError("a study that cannot be read", where=str(path), why=str(error)) from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise GrowthError(f"{value!r} is no mapping", where=where, fix="write 'key: value' lines")
    return {str(key): content for key, content in value.items()}


def _only(found: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in found:
        if key not in known:
            raise _near(f"no key {key!r}", where, key, known)


def _near(what: str, where: str, word: str, known: list[str]) -> GrowthError:
    near = difflib.get_close_matches(word, known, n=3)
    fix = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    return GrowthError(what, where=where, fix=fix)


def _run_keys(value: Any, refused: Iterable[str], where: str, why: str = "the study decides it") -> dict[str, Any]:
    from phigrow.training.options import checked

    keys = checked(_mapping(value or {}, where), where)
    for key in keys:
        if key in refused:
            raise GrowthError(f"{key} is no key of this place", where=where, why=why, fix="leave it out")
    return keys


def _number(value: Any, key: str, path: Path) -> float:
    try:  # 1e-3 is text in YAML 1.1
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise GrowthError(f"{key} is {value!r}", where=f"{key} in {path}", fix="give a positive number")
    return number


def _whole(value: Any, key: str, path: Path, *, least: int) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [value]
    if not items or any(isinstance(n, bool) or not isinstance(n, int) or n < least for n in items):
        raise GrowthError(f"{key} is {value!r}", where=f"{key} in {path}", fix=f"give whole numbers, {least} or more")
    if len(set(items)) < len(items):
        raise GrowthError(f"{key} names a value twice", where=f"{key} in {path}", fix="give each once")
    return tuple(items)


def _optional(found: dict[str, Any], key: str, path: Path) -> int | None:
    return _whole(found[key], key, path, least=1)[0] if found.get(key) else None


def _budgets(value: Any, batch_tokens: int, path: Path) -> tuple[int, ...]:
    """Steps as they are, or ``{tokens: [...]}``, rounded up to whole steps."""
    if isinstance(value, dict):
        where = f"budgets in {path}"
        _only(value, ("tokens",), where)
        items = value.get("tokens")
        tokens = [_number(item, "budgets", path) for item in (items if isinstance(items, list) else [items])]
        value = [math.ceil(number / batch_tokens) for number in tokens]
    return tuple(sorted(_whole(value, "budgets", path, least=2)))


def _data(value: Any, path: Path) -> tuple[Path | dict[str, Any], int]:
    from phigrow.corpus.build import prepare
    from phigrow.corpus.facts import read_facts

    if isinstance(value, str):
        folder = _beside(value, path)
        return folder, int(read_facts(folder)["seq_len"])
    arguments = _mapping(value, f"data in {path}")
    known = [key for key in prepare.__annotations__ if key not in ("out", "overwrite", "progress", "return")]
    _only(arguments, known, f"data in {path}")
    return arguments, _whole(arguments.get("seq_len", 256), "seq_len", path, least=2)[0]


def _config(value: Any, path: Path, key: str) -> Config:
    if not isinstance(value, str | dict):
        raise GrowthError(f"{key} is {value!r}", where=f"{key} in {path}", fix="give a config.json or a mapping")
    return load_config(_beside(value, path) if isinstance(value, str) else value)


def _beside(value: str, path: Path) -> Path:
    beside = path.parent / value
    return beside if beside.exists() else Path(value)


def _source(value: Any, path: Path) -> Source:
    from phigrow.hub import locate

    where = f"source in {path}"
    if isinstance(value, str):
        value = {"path": value}
    found = _mapping(value, where)
    if "path" in found:
        _only(found, ("path", "tokens", "flops", "seconds"), where)
        folder = locate(_beside(str(found["path"]), path))
        cost = {key: _number(value, key, path) for key, value in found.items() if key != "path"}
        return Source(config=load_config(folder), path=folder, cost=cost)
    _only(found, ("model", "steps", "seed", "train"), where)
    for key in ("model", "steps"):
        if key not in found:
            raise GrowthError(f"a source without {key!r}", where=where, fix="give a path, or a model and its steps")
    return Source(
        config=_config(found["model"], path, "model"),
        steps=_whole(found["steps"], "steps", path, least=2)[0],
        seed=_whole(found.get("seed", 0), "seed", path, least=0)[0],
        train=_run_keys(found.get("train"), MANAGED, f"train of source in {path}"),
    )


def _sweep(value: Any, seeds: tuple[int, ...], path: Path) -> Sweep:
    where = f"sweep in {path}"
    found = _mapping(value, where)
    _only(found, ("lr", "steps", "seeds"), where)
    for key in ("lr", "steps"):
        if key not in found:
            raise GrowthError(f"a sweep without {key!r}", where=where, fix="give lr: [...] and steps")
    rates = found["lr"] if isinstance(found["lr"], list) else [found["lr"]]
    return Sweep(
        lr=tuple(sorted({_number(rate, "lr", path) for rate in rates})),
        steps=_whole(found["steps"], "steps", path, least=2)[0],
        seeds=_whole(found.get("seeds", [seeds[0]]), "seeds", path, least=0),
    )


def _arm(name: str, content: Any, path: Path) -> Arm:
    from phigrow.methods import all_methods, find_method

    where = f"arm {name} in {path}"
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise GrowthError(f"an arm called {name!r}", where=where, why="it names a folder", fix="use letters, digits, -")
    found = _mapping(content or {}, where)
    method = str(found.pop("method", name))
    mixture = bool(set(method) & set(",=:"))  # one method an axis: what it is made of is checked by its plan
    known = [SCRATCH, CONTINUED, *all_methods()]
    if method not in known and not mixture:
        raise _near(f"no method {method!r}", where, method, known)
    train = _run_keys(found.pop("train", None), (*MANAGED, *SAME), f"train of {where}", "it is the same for every arm")
    if not mixture:
        grows = method not in (SCRATCH, CONTINUED)
        _only(found, ("method", "train", *((*GROWTH, *find_method(method).options) if grows else ())), where)
    return Arm(name, method, found, train)
