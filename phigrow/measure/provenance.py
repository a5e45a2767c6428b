"""Provenance of a report's numbers: runs, versions, common settings, and settings that differ."""

from __future__ import annotations

import json
from typing import Any

from phigrow.measure.estimates import Comparison
from phigrow.measure.tables import Rows
from phigrow.measure.wording import amount
from phigrow.records.run import Key, Run

EXPECTED = ("config.arm", "config.seed", "config.out")
"""Settings that differ in every comparison and are not listed."""

MOST_VALUES = 4
"""Most values of a setting that are listed. A setting with more, such as a folder for every run, has one row."""

MOST_NAMES = 6
"""Most runs of an arm that are named one by one."""


def all_runs(comparison: Comparison) -> list[Run]:
    """Return the compared runs and those at other budgets, each once, arm by arm."""
    collected: dict[tuple[str, Key, int | None], Run] = {}
    for arm in (comparison.baseline, *comparison.arms):
        for run in (*arm.runs, *comparison.ends.get(arm.name, ())):
            collected.setdefault((run.arm, run.key, run.budget), run)
    return list(collected.values())


def run_rows(comparison: Comparison) -> Rows:
    """Return one row for each run: its arm and seeds, its costs, and the costs of its source and expansion."""
    return [_run_row(run) for run in all_runs(comparison)]


def version_lines(comparison: Comparison) -> list[str]:
    """Return the versions of libraries in the runs, one line for every different set."""
    groups: dict[str, list[str]] = {}
    for run in all_runs(comparison):
        versions = run.meta.get("versions")
        if isinstance(versions, dict) and versions:
            text = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
            groups.setdefault(text, []).append(run.name.replace(",", ""))
    if len(groups) == 1:
        return [f"All runs: {text}." for text in groups]
    return [f"{', '.join(names)}: {text}." for text, names in groups.items()]


def difference_rows(comparison: Comparison) -> Rows:
    """Return one row for each value of a setting that differs between runs, with the runs that have it."""
    runs = all_runs(comparison)
    expected = {*EXPECTED, *(["config.steps"] if comparison.ends else [])}
    rows: Rows = []
    for key, groups in _values(runs).items():
        if len(groups) > MOST_VALUES and key not in expected:
            rows.append({"setting": key, "value": f"{len(groups)} different values", "runs": "see the run records"})
        elif len(groups) > 1 and key not in expected:
            rows += [
                {"setting": key, "value": value, "runs": _named(members, runs)} for value, members in groups.items()
            ]
    return rows


def common_rows(comparison: Comparison) -> Rows:
    """Return one row for each setting with one value in all runs, unless the value is null."""
    return [
        {"setting": key, "value": value}
        for key, groups in _values(all_runs(comparison)).items()
        if len(groups) == 1 and (value := next(iter(groups))) != "null" and not key.startswith("versions.")
    ]


def _values(runs: list[Run]) -> dict[str, dict[str, list[Run]]]:
    """Return setting -> value -> the runs that have it."""
    flat = [_flat(run.meta) for run in runs]
    values: dict[str, dict[str, list[Run]]] = {}
    for key in dict.fromkeys(key for settings in flat for key in settings):
        groups = values.setdefault(key, {})
        for run, settings in zip(runs, flat, strict=True):
            groups.setdefault(settings.get(key, "not recorded"), []).append(run)
    return values


def _flat(meta: dict[str, Any]) -> dict[str, str]:
    """Return the settings of a run, its model, its growth and its machine, as text."""
    collected = {}
    for part in ("config", "model", "growth", "versions"):
        values = meta.get(part)
        for key, value in values.items() if isinstance(values, dict) else ():
            collected[f"{part}.{key}"] = _text(value)
    for key in ("seq_len", "world_size", "device", "commit", "data_fingerprint"):
        if key in meta:
            collected[key] = _text(meta[key])
    return collected


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _named(members: list[Run], runs: list[Run]) -> str:
    """Name runs in words: by arm alone if all runs of the arm are among them."""
    names = []
    for arm in dict.fromkeys(run.arm for run in members):
        mine = [run for run in members if run.arm == arm]
        whole = len(mine) == sum(run.arm == arm for run in runs)
        listed = ", ".join(_short(run) for run in mine[:MOST_NAMES])
        more = f" and {len(mine) - MOST_NAMES} more" if len(mine) > MOST_NAMES else ""
        names.append(arm if whole else f"{arm} ({listed}{more})")
    return ", ".join(names)


def _short(run: Run) -> str:
    source = "" if run.source_seed is None else f"source seed {run.source_seed}, "
    return f"{source}seed {run.seed}" + (f" at {run.budget}" if run.budget is not None else "")


def _run_row(run: Run) -> dict[str, str]:
    meta, evals = run.meta, run.evals
    source, expand = meta.get("source_tokens"), meta.get("expand_seconds")
    count = meta.get("parameters")
    return {
        "arm": run.arm,
        "seed": str(run.seed) if run.source_seed is None else f"{run.seed}, source {run.source_seed}",
        "parameters": f"{count:,}" if isinstance(count, int) else "unknown",
        "steps": str(evals["step"][-1]),
        "tokens": amount(float(evals["tokens"][-1]), "tokens"),
        "FLOPs": amount(float(evals["flops"][-1]), "flops"),
        "seconds": amount(float(evals["seconds"][-1]), "seconds"),
        "source's tokens": amount(float(source), "tokens") if isinstance(source, int | float) else "not recorded",
        "expansion, seconds": amount(float(expand), "seconds") if isinstance(expand, int | float) else "",
        "evaluations": str(len(evals["step"])),
        "commit": str(meta.get("commit") or "unknown")[:12],
    }
