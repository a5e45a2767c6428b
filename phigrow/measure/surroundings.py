"""Surroundings of runs: machine, versions and evaluations. They are no settings of the training, but change figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from phigrow.records.run import Run, Seeds

Named = dict[str, str]
"""Name of a surrounding -> its value as text. A missing name means that the run did not record it."""


def surroundings(run: Run) -> Named:
    """Return the machine of a run, its evaluations, its versions of libraries and its commit, as text."""
    config, versions = run.meta.get("config"), run.meta.get("versions")
    values: dict[str, Any] = {
        key: config[key] for key in ("eval_every", "eval_at") if isinstance(config, dict) and key in config
    }
    for key in ("device", "world_size"):
        launches = [record[key] for record in (run.meta, *run.resumes) if record.get(key) is not None]
        if launches:
            values[key] = " then ".join(dict.fromkeys(map(str, launches)))
    values |= {f"version of {name}": value for name, value in versions.items()} if isinstance(versions, dict) else {}
    if run.meta.get("commit"):
        values["commit"] = str(run.meta["commit"])[:12]
    return {key: "none" if value is None else str(value) for key, value in values.items()}


def surroundings_that_differ(arm_runs: Seeds, seeds: dict[int, Any]) -> tuple[str, ...]:
    """Name the surroundings in which runs of an arm differ from those of the baseline.

    A surrounding that only one of two runs recorded does not count as a difference.

    Args:
        arm_runs: the runs of the arm.
        seeds: the runs of the baseline by seed and budget. A run is compared with the one of its seed and budget, else
            with one of its seed, else with any.

    Returns:
        One text for each surrounding and pair of values, such as ``world_size 8 (scratch: 1)``.
    """
    texts: dict[str, dict[str, None]] = {}
    for run, other in with_counterparts(arm_runs, seeds):
        mine, theirs = surroundings(run), surroundings(other)
        for name, value in mine.items():
            if name in theirs and theirs[name] != value:
                texts.setdefault(name, {})[f"{name} {value} ({other.arm}: {theirs[name]})"] = None
    return tuple(text for each in texts.values() for text in each)


def with_counterparts(arm_runs: Seeds, seeds: dict[int, Any]) -> Iterable[tuple[Run, Run]]:
    """Give every run of an arm with the run of the baseline that is nearest to it: by seed, then by budget."""
    for (_, seed), by_budget in arm_runs.items():
        theirs = seeds.get(seed) or next(iter(seeds.values()))
        for budget, run in by_budget.items():
            yield run, theirs.get(budget) or next(iter(theirs.values()))


def other_machine(runs: Iterable[tuple[Run, Run]]) -> str:
    """Return the reason why seconds cannot be compared: a pair of runs from two machines; empty if there is none.

    A machine is a device and a number of ranks. A pair of which one run did not record them is not refused.

    Args:
        runs: pairs of a run and the baseline's run.
    """
    for run, base in runs:
        mine, theirs = surroundings(run), surroundings(base)
        for name in ("device", "world_size"):
            if name in mine and name in theirs and mine[name] != theirs[name]:
                return f"{run.arm} was trained on {_machine(mine)}, and {base.arm} on {_machine(theirs)}"
    return ""


def _machine(named: Named) -> str:
    return f"{named.get('device', 'an unknown device')} with world_size {named.get('world_size', 'unknown')}"
