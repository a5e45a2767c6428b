"""Pairs of runs: one for every arm, seed and budget, on the same data and schedule as the baseline's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from phigrow.errors import GrowthError
from phigrow.measure.sizes import check_one_model
from phigrow.measure.surroundings import surroundings_that_differ, with_counterparts
from phigrow.records.run import Budgets, Columns, Key, Run, Seeds

BaselineSeeds = dict[int, Budgets]
"""Runs of the baseline: by seed, then by budget, both in order."""

SAME_META = ("eval_blocks",)
"""Keys of the run record that must be equal in a pair, if both runs have them. `check_one_study` checks texts."""

FIRST_RELEASE: dict[str, Any] = {
    "equal": ["steps", "batch", "schedule", "lr", "seed", "eval_blocks", "documents", "mixture"],
    "named": [
        "lr", "warmup", "min_lr", "decay", "schedule_start", "schedule_steps", "rewarm", "data_start", "weight_decay",
        "beta1", "beta2", "eps", "grad_clip", "fresh_lr", "fresh_warmup", "copied_lr", "dtype",
    ],
    "unset": {"schedule_start": 0, "rewarm": 0, "data_start": 0},
}  # fmt: skip
"""Keys of ``config`` to compare, for runs of the first release. Later records have their own lists (``compare``).

Keys in ``equal`` must be equal in a pair, if both runs have them. Of the keys in ``named``, a finding names those in
which an arm differs. ``unset`` maps a key to the value that null stands for; for other keys, null is the default.
"""


def _compared(one: Run, other: Run) -> tuple[list[str], list[str], dict[str, Any]]:
    """Return the keys of ``config`` that must be equal, the keys to name, and the values of null, for two runs."""
    recorded = [run.meta.get("compare") for run in (one, other)]
    lists = [each if isinstance(each, dict) else FIRST_RELEASE for each in recorded]
    equal, named = (
        list(dict.fromkeys(str(key) for each in lists for key in each.get(name) or ())) for name in ("equal", "named")
    )
    return equal, named, {key: value for each in lists for key, value in (each.get("unset") or {}).items()}


def evaluated(runs: Iterable[Run]) -> tuple[list[Run], list[Run]]:
    """Return the runs that have evaluations, and those that have none yet because they have just started."""
    runs = list(runs)
    return [run for run in runs if len(run.evals["step"])], [run for run in runs if not len(run.evals["step"])]


def grouped(runs: Iterable[Run]) -> dict[str, Seeds]:
    """Sort runs by arm, in order of appearance, then by seed and by budget.

    A branch gets the records of its trunk from before the branch. Trunks never decay and are left out.

    Raises:
        GrowthError: an arm has two runs of one source seed, seed and budget, or two models.
    """
    runs = list(runs)
    check_one_model(runs)
    trunks = {(run.arm, run.key, run.trunk): run for run in runs if run.is_trunk}
    arms: dict[str, Seeds] = {}
    for run in runs:
        if run.is_trunk:
            continue
        by_budget = arms.setdefault(run.arm, {}).setdefault(run.key, {})
        if (twin := by_budget.get(run.budget)) is not None:
            if twin is run:
                continue
            raise GrowthError(
                f"there are two runs of {run.name}" + ("" if run.budget is None else f", {run.budget} steps"),
                where=f"{twin.folder} and {run.folder}",
                why="an arm has one run for each seed and budget",
                fix="leave one of them out, or give them different arm names",
            )
        trunk = trunks.get((run.arm, run.key, run.trunk))
        by_budget[run.budget] = run if trunk is None else _grafted(run, trunk)
    return {
        arm: {
            key: dict(sorted(runs_at.items(), key=lambda item: item[0] or 0))
            for key, runs_at in sorted(seeds.items(), key=lambda item: (item[0][0] is not None, item[0]))
        }
        for arm, seeds in arms.items()
    }


def _grafted(run: Run, trunk: Run) -> Run:
    """Return a branch with the trunk's evaluations and steps from before the branch."""
    evals, sources = _before(trunk.evals, run.evals, trunk.sources, run.sources)
    steps, _ = _before(trunk.steps, run.steps, {}, {})
    return replace(run, evals=evals, steps=steps, sources=sources)


def _before(early: Columns, late: Columns, early_more: Columns, late_more: Columns) -> tuple[Columns, Columns]:
    first = late["step"][0] if len(late["step"]) else np.inf
    kept = early["step"] < first
    joined = {key: np.concatenate((early[key][kept], late[key])) for key in late}
    nothing_early, nothing_late = np.full(int(kept.sum()), np.nan), np.full(len(late["step"]), np.nan)
    more = {
        key: np.concatenate(
            (early_more[key][kept] if key in early_more else nothing_early, late_more.get(key, nothing_late))
        )
        for key in {**early_more, **late_more}
    }
    return joined, more


def by_seed(seeds: Seeds, baseline: str) -> BaselineSeeds:
    """Return the runs of the baseline by their own seed, because arms are paired by it.

    Raises:
        GrowthError: a seed has runs of two sources.
    """
    found: BaselineSeeds = {}
    for (source_seed, seed), by_budget in seeds.items():
        if seed in found:
            raise GrowthError(
                f"{baseline} has runs of several sources with seed {seed}, source seed {source_seed} among them",
                where=str(next(iter(by_budget.values())).folder),
                why="a baseline has one run for each seed and budget",
                fix="name a baseline that was not grown, or leave out all sources but one",
            )
        found[seed] = by_budget
    return found


def chosen_budget(seeds: BaselineSeeds, wanted: int | None, baseline: str) -> int | None:
    """Return the budget to compare at: ``wanted``, or the largest that every seed of the baseline has finished.

    Seeds of the baseline that have finished no run do not count, unless no seed has finished one.

    Raises:
        GrowthError: no run of the baseline has the budget ``wanted``.
    """
    known = {budget for by_budget in seeds.values() for budget in by_budget}
    finished = [{budget for budget, run in by_budget.items() if run.finished} for by_budget in seeds.values()]
    finished = [budgets for budgets in finished if budgets]
    if wanted is None:
        common = set.intersection(*finished) if finished else known
        return max(common or known, key=lambda budget: budget or 0)
    if wanted not in known:
        raise GrowthError(
            f"no run of {baseline} has a budget of {wanted} steps",
            where=f"budgets of {baseline}: {', '.join(sorted(map(str, known)))}",
            fix="choose one of these budgets with --budget",
        )
    return wanted


def finished_baseline(seeds: BaselineSeeds, at: int | None) -> tuple[BaselineSeeds, set[int]]:
    """Leave out seeds whose run of the baseline at a budget is unfinished, if another seed's is finished.

    Returns:
        The seeds that are kept, which are all if no run at the budget is finished; and those that are left out.
    """
    ended = {seed for seed, by_budget in seeds.items() if at in by_budget and by_budget[at].finished}
    waiting = {seed for seed, by_budget in seeds.items() if ended and at in by_budget and seed not in ended}
    return {seed: by_budget for seed, by_budget in seeds.items() if seed not in waiting}, waiting


def paired_runs(
    arm_runs: Seeds, seeds: BaselineSeeds, at: int | None, baseline: str
) -> tuple[dict[Key, Run], list[str]]:
    """Return the runs of an arm at one budget, by key, and notes on the keys without such a run.

    Raises:
        GrowthError: as ``check_pair``, for each run at a budget that the baseline has; in a study of one budget, for
            every run.
    """
    chosen, notes = {}, []
    for key, by_budget in arm_runs.items():
        theirs = seeds.get(key[1], {})
        for budget, run in by_budget.items():
            if budget in theirs or not theirs:
                check_pair(run, theirs.get(budget), baseline)
        if at in by_budget and at in theirs:
            chosen[key] = by_budget[at]
        elif len(theirs) < 2 and len(by_budget) < 2:
            chosen[key] = next(iter(by_budget.values()))
            check_pair(chosen[key], theirs.get(at), baseline)
        else:
            name = next(iter(by_budget.values())).name
            notes.append(f"{name}: left out, because it and {baseline} do not both have a run of {at} steps")
    return chosen, notes


def check_pair(run: Run, base: Run | None, baseline: str) -> None:
    """Refuse a run that differs from the baseline's run of its seed in more than the initial weights.

    Raises:
        GrowthError: the baseline has no run of this seed, or a setting differs that all arms must share. Learning
            rates may differ if the same sweep chose both.
    """
    if base is None:
        raise GrowthError(
            f"{run.name}, has no run of {baseline} to compare with",
            where=str(run.folder),
            why="each run is compared with the baseline's run of the same seed and budget",
            fix=f"run {baseline} with seed {run.seed} too, or leave this run out",
        )
    sweeps = [(each.meta.get("config") or {}).get("lr_chosen_by") for each in (run, base)]
    equal, _, _ = _compared(run, base)
    _check_equal(run, base, equal, but="lr" if _same_sweep(*sweeps) else "")


FLAT_MAY_DIFFER = ("steps", "seed", "lr", "batch", "schedule")
"""Keys that must be equal in a pair, and that a flat model may choose for its size. A report names them if they
differ. The others decide which text is read, and how its loss is measured."""


def check_same_text(seeds: BaselineSeeds, flat_arms: Mapping[str, Seeds]) -> None:
    """Refuse flat models, and runs of the baseline, that read other text than the baseline's first run.

    Losses are then no measure of the same thing: documents that are kept apart have other losses than plain blocks.

    Raises:
        GrowthError: a key that all arms must share differs, other than those in ``FLAT_MAY_DIFFER``.
    """
    of_base = [run for by_budget in seeds.values() for run in by_budget.values()]
    flat = [run for found in flat_arms.values() for by_budget in found.values() for run in by_budget.values()]
    base = of_base[0]
    for run in (*of_base[1:], *flat):
        equal, _, _ = _compared(run, base)
        _check_equal(run, base, [key for key in equal if key not in FLAT_MAY_DIFFER])


def _check_equal(run: Run, base: Run, keys: Iterable[str], but: str = "") -> None:
    mine, theirs = run.meta.get("config") or {}, base.meta.get("config") or {}
    for label, names, one, other in (("", SAME_META, run.meta, base.meta), ("config.", keys, mine, theirs)):
        for key in names:
            if key != but and key in one and key in other and one[key] != other[key]:
                raise _unpaired(run, base, label + key, one[key], other[key])


def flat_differences(name: str, found: Seeds, seeds: BaselineSeeds) -> list[str]:
    """Name settings and surroundings of a flat model that differ from the baseline's, as a note."""
    texts: dict[str, None] = {}
    base_name = next(run.arm for by_budget in seeds.values() for run in by_budget.values())
    for run, other in with_counterparts(found, seeds):
        mine, base = _by_stage(run)[0], _by_stage(other)[0]
        equal, named, unset = _compared(run, other)
        for key in dict.fromkeys([*equal, *named]):
            if key in ("steps", "seed") or key not in mine or key not in base:
                continue
            one, two = (unset.get(key) if stage[key] is None else stage[key] for stage in (mine, base))
            if one != two and not (key == "decay" and _same_share(mine, base)):
                texts[f"{key} {_value(one)} ({other.arm}: {_value(two)})"] = None
    texts |= dict.fromkeys(surroundings_that_differ(found, seeds))
    return [f"{name}: it differs from {base_name} in {', '.join(texts)}"] if texts else []


def _same_share(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return true if two schedules decay over the same share of their steps, rounded to whole steps.

    A flat model takes more steps for the same FLOPs, so the same share is another number of steps.
    """
    try:
        rounding = (one["steps"] + other["steps"]) / 2
        return bool(abs(one["decay"] * other["steps"] - other["decay"] * one["steps"]) <= rounding)
    except (KeyError, TypeError):
        return False


def _same_sweep(one: Any, other: Any) -> bool:
    """True if two learning rates were chosen in the same way.

    A sweep that records the losses of all rates widens the grid of each arm until the best rate is inside. The rates of
    such sweeps may differ, but not their budgets and seeds.
    """
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    keys = ("steps", "seeds") if "losses" in one and "losses" in other else ("lr", "steps", "seeds")
    return all(one.get(key) == other.get(key) for key in keys)


def settings_that_differ(arm_runs: Seeds, seeds: BaselineSeeds) -> tuple[str, ...]:
    """Name the settings in which an arm's training differs from the baseline's.

    A key that only one of two runs recorded does not count as a difference. Settings that a later stage of a staged run
    changes are included.

    Args:
        arm_runs: the runs of the arm.
        seeds: the runs of the baseline. A run is compared with the one of its seed and budget.

    Returns:
        One text for each key and pair of values, such as ``warmup 0 (scratch: 20)`` or ``rewarm 0 then 5 from stage 2
        (scratch: 0)``.
    """
    texts: dict[str, dict[str, None]] = {}
    order: dict[str, None] = {}
    for (_, seed), by_budget in arm_runs.items():
        theirs = seeds.get(seed, {})
        only = next(iter(theirs.values())) if len(theirs) == len(by_budget) == 1 else None
        for budget, run in by_budget.items():
            if (other := theirs.get(budget, only)) is None:
                continue
            mine, base = _by_stage(run), _by_stage(other)
            equal, named, unset = _compared(run, other)
            changed = [key for stage in (*mine[1:], *base[1:]) for key in equal if key in stage]
            order |= dict.fromkeys([*named, *changed])
            for key in dict.fromkeys([*named, *changed]):
                if key not in mine[0] or key not in base[0] or (key == "decay" and run.schedule != "wsd"):
                    continue
                one, two = (_values(stages, key, unset.get(key)) for stages in (mine, base))
                if one != two:
                    texts.setdefault(key, {})[f"{key} {_in_words(one)} ({other.arm}: {_in_words(two)})"] = None
    return tuple(text for key in order for text in texts.get(key, ()))


def _by_stage(run: Run) -> list[dict[str, Any]]:
    """Return the settings of a run, then the settings that each later stage changed."""
    later = run.meta.get("stage_settings")
    stages = later if isinstance(later, list) else []
    return [run.meta.get("config") or {}, *(stage if isinstance(stage, dict) else {} for stage in stages)]


def _values(stages: list[dict[str, Any]], key: str, unset: Any) -> dict[int, Any]:
    """Return the value of a setting in the first stage, and in each later stage that changes it."""
    values: dict[int, Any] = {}
    for number, stage in enumerate(stages, start=1):
        value = stage.get(key, stages[0][key])
        value = unset if value is None else value
        if number == 1 or value != values[max(values)]:
            values[number] = value
    return values


def _in_words(values: dict[int, Any]) -> str:
    """Return values by stage as text, such as ``0 then 5 from stage 2``."""
    first, *later = values.items()
    return " then ".join([_value(first[1]), *(f"{_value(value)} from stage {number}" for number, value in later)])


def _value(value: Any) -> str:
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _unpaired(run: Run, base: Run, key: str, one: Any, other: Any) -> GrowthError:
    return GrowthError(
        f"{run.name}, cannot be compared with {base.arm}: {key} is {one!r} against {other!r}",
        where=f"{run.folder} and {base.folder}",
        why="arms are compared only on the same data, schedule and held-out text",
        fix="run the arm again with the baseline's settings, or leave it out",
    )
