"""Read a YAML file that names the arms of a comparison and the logs of another trainer that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.paths import user_path
from phigrow.files.strict_yaml import read_yaml
from phigrow.records.foreign_runs import KNOWN, LogColumns, foreign_records
from phigrow.records.readers.any_log import read_log
from phigrow.records.schema import UNITS, Record

SUFFIXES = (".yaml", ".yml")
SHARED = ("columns", "tokens_per_step", "config", "seq_len", "decimal", "decayed", "paired")
"""Keys of the file that an arm may set for itself."""

OF_AN_ARM = ("logs", "source", "expand", *SHARED)
OF_A_LOG = ("log", "run", "seed")
OF_A_SOURCE = (*UNITS, "config", "loss")

ABSENT = {
    "decayed": "their logs do not record the learning-rate schedule. Costs are read off each run's own curve, and "
    "there are no speedups at several budgets. If the rate of every run has decayed at its last step, write "
    "decayed: true",
    "paired": "their logs do not record which text a run read. There are no intervals over pairs of seeds. If runs of "
    "one seed read the same text in the same order, write paired: true",
}
"""Key that a user may set -> what is missing without it."""

NEVER = "their logs have no held-out loss by source or by group of text, so no interval covers the choice of text"


@dataclass(frozen=True)
class ForeignRun:
    """The records of one log, and notes about it.

    Attributes:
        path: of the log.
        records: each with its place, the ``run`` record first.
        notes: sentences about anything unusual.
    """

    path: Path
    records: tuple[tuple[str, Record], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ArmsFile:
    """The runs that a YAML file names, and notes about what their logs lack."""

    runs: tuple[ForeignRun, ...]
    notes: tuple[str, ...]


def is_arms_file(path: Path) -> bool:
    """Return True if a path is that of a YAML file."""
    return path.suffix.lower() in SUFFIXES


def read_arms(path: Path) -> ArmsFile:
    """Read the runs of a YAML file, which docs/other-trainers.md describes. Paths in it begin at its folder.

    Raises:
        GrowthError: the file is not valid, or a log cannot be read.
    """
    content = _mapping(read_yaml(path, "file of arms", "give a YAML file with arms, or folders of runs"), str(path))
    where = str(path)
    _check_keys(content, ("arms", *SHARED), where)
    arms = _mapping(content.get("arms"), f"{where}: arms")
    if not arms:
        raise GrowthError("no arms are named", where=where, fix="write arms: {scratch: [LOG], mine: [LOG]}")
    runs: list[ForeignRun] = []
    lacking: dict[str, list[str]] = {key: [] for key in ABSENT}
    for name, given in arms.items():
        at = f"{where}: arms.{name}"
        own = {"logs": given} if isinstance(given, list | str) else _mapping(given, at)
        _check_keys(own, OF_AN_ARM, at)
        settings = {key: content[key] for key in SHARED if key in content} | own
        try:
            runs += _runs_of(str(name), settings, path.parent, bool(own.get("source") or own.get("expand")))
        except GrowthError as error:
            raise error.at(at) from error
        for key, names in lacking.items():
            if settings.get(key) is not True:
                names.append(str(name))
    notes = [f"{', '.join(names)}: {ABSENT[key]}" for key, names in lacking.items() if names]
    return ArmsFile(tuple(runs), (*notes, f"{', '.join(map(str, arms))}: {NEVER}"))


def _runs_of(arm: str, settings: Mapping[str, Any], folder: Path, is_grown: bool) -> list[ForeignRun]:
    logs = settings.get("logs")
    logs = [logs] if isinstance(logs, str | dict) else logs
    if not isinstance(logs, list) or not logs:
        raise GrowthError("the arm has no logs", where="logs", fix="write a list of files or folders")
    for key in ("decayed", "paired"):
        if not isinstance(settings.get(key, False), bool):
            raise GrowthError(f"{key} is {settings[key]!r}", where=key, fix="write true or false")
    if (decimal := settings.get("decimal")) not in (None, ".", ","):
        raise GrowthError(f"decimal is {decimal!r}", where="decimal", fix="write '.' or ','")
    columns = LogColumns(_names(settings.get("columns")), _positive(settings, "tokens_per_step"))
    model, flops_per_token = _model(settings, folder)
    source = _source(settings.get("source"), folder)
    expand = {f"expand_{unit}": cost for unit, cost in _costs(settings.get("expand"), UNITS, "expand").items()}
    runs = []
    for place, entry in enumerate(logs):
        entry = {"log": entry} if isinstance(entry, str) else _mapping(entry, f"logs, number {place + 1}")
        _check_keys(entry, OF_A_LOG, f"logs, number {place + 1}")
        if not isinstance(entry.get("log"), str):
            raise GrowthError("an entry names no log", where=f"logs, number {place + 1}", fix="write {log: PATH}")
        seed = entry.get("seed", place)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise GrowthError(f"the seed is {seed!r}", where=f"logs, number {place + 1}", fix="write a whole number")
        table = read_log(folder / user_path(entry["log"]), _text(entry.get("run")), decimal)
        found = foreign_records(table, columns, flops_per_token)
        run: Record = {"type": "run", "arm": arm, "seed": seed, **model, **source, **expand}
        if is_grown and any(source.get(f"source_{unit}") for unit in UNITS):
            run["growth"] = {"method": arm}
        last = max(record["step"] for _, record in found.records if record["type"] == "eval")
        decayed = settings.get("decayed", False)
        run["log"] = {"kind": table.kind, "paired": settings.get("paired", False), "decayed": decayed}
        run |= {"budget": last} if decayed else {}
        runs.append(ForeignRun(table.path, ((str(table.path), run), *found.records), found.notes))
    return runs


def _model(settings: Mapping[str, Any], folder: Path) -> tuple[Record, float | None]:
    """Return the fields of the run record that describe the model, and its FLOPs of training on a token."""
    if (given := settings.get("config")) is None:
        return {}, None
    model, seq_len = _config(given, folder), settings.get("seq_len")
    from phigrow.models.cost import count_cost

    if seq_len is not None and (not isinstance(seq_len, int) or isinstance(seq_len, bool) or seq_len < 1):
        raise GrowthError(f"seq_len is {seq_len!r}", where="seq_len", fix="write the tokens of a sequence")
    cost = count_cost(model, seq_len)
    sizes = {"parameters": cost.parameters, "non_embedding_parameters": cost.non_embedding_parameters}
    fields = {"model": model, **sizes, "flops_per_token": cost.training_flops}
    return fields | ({"seq_len": seq_len} if seq_len is not None else {}), cost.training_flops


def _config(given: Any, folder: Path) -> dict[str, Any]:
    from phigrow.models.config import load_config, shipped_name

    if not isinstance(given, str):
        raise GrowthError(f"config is {given!r}", where="config", fix="write the path of a config.json")
    path = folder / user_path(given)
    return load_config(given if not path.exists() and shipped_name(given) else path)


def _source(given: Any, folder: Path) -> Record:
    """Return the cost of a source: what the file gives, and FLOPs from its tokens and its configuration."""
    if given is None:
        return {}
    if given == "none":
        return {f"source_{unit}": 0.0 for unit in UNITS}
    source = _mapping(given, "source")
    costs = _costs({key: value for key, value in source.items() if key != "config"}, (*UNITS, "loss"), "source")
    if (config := source.get("config")) is not None and "tokens" in costs:
        from phigrow.models.cost import count_cost

        costs.setdefault("flops", costs["tokens"] * count_cost(_config(config, folder)).training_flops)
    study = {"study": {"source_loss": costs.pop("loss")}} if "loss" in costs else {}
    return {**{f"source_{unit}": cost for unit, cost in costs.items()}, **study}


def _costs(given: Any, keys: tuple[str, ...], where: str) -> dict[str, float]:
    costs = _mapping(given or {}, where)
    _check_keys(costs, (*keys, "config") if where == "source" else keys, where)
    for key, value in costs.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise GrowthError(f"{key} is {value!r}", where=where, fix="write a number of at least 0")
    return {key: float(value) for key, value in costs.items()}


def _names(given: Any) -> dict[str, str]:
    names = _mapping(given or {}, "columns")
    _check_keys(names, tuple(KNOWN), "columns")
    return {key: str(name) for key, name in names.items()}


def _positive(settings: Mapping[str, Any], key: str) -> float | None:
    value = settings.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise GrowthError(f"{key} is {value!r}", where=key, fix="write a positive number")
    return float(value)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise GrowthError(f"this is {value!r}, and not a mapping", where=where, fix="write KEY: VALUE lines")
    return value


def _check_keys(content: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in known:
            raise GrowthError(f"the key {key!r} is not known", where=where, fix=f"use {', '.join(known)}")
