"""Which runs may be compared: one run for every arm and seed, on the same data and schedule as the baseline's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from phigrow.errors import GrowthError
from phigrow.measure.records import Run

SAME_META = ("data_fingerprint", "eval_fingerprint", "eval_blocks")
SAME_CONFIG = ("steps", "batch", "schedule", "lr", "seed", "eval_blocks")
"""Keys of the run record, and of its ``config``, that must agree within a pair wherever both runs have them."""


def grouped(runs: Iterable[Run]) -> dict[str, dict[int, Run]]:
    """Sort runs by arm, in order of appearance, and by seed.

    Raises:
        GrowthError: two runs of one arm and seed, or a run without evaluations.
    """
    arms: dict[str, dict[int, Run]] = {}
    for run in runs:
        if not len(run.evals["step"]):
            raise GrowthError(
                f"{run.arm}, seed {run.seed}, has no evaluations",
                where=str(run.folder),
                why="arms are compared by held-out loss",
            )
        twin = arms.setdefault(run.arm, {}).setdefault(run.seed, run)
        if twin is not run:
            raise GrowthError(
                f"two runs of {run.arm}, seed {run.seed}",
                where=f"{twin.folder} and {run.folder}",
                fix="leave one of them out",
            )
    return {arm: dict(sorted(by_seed.items())) for arm, by_seed in arms.items()}


def check_pair(run: Run, base: Run | None, baseline: str) -> None:
    """Refuse a run that differs from the baseline's run of its seed in anything but the model's beginning.

    Raises:
        GrowthError: no such baseline run, or one of ``SAME_META`` and ``SAME_CONFIG`` differs.
    """
    if base is None:
        raise GrowthError(
            f"{run.arm}, seed {run.seed}, has no {baseline} run to be paired with",
            where=str(run.folder),
            fix=f"run {baseline} with seed {run.seed} too, or leave this run out",
        )
    mine, theirs = run.meta.get("config") or {}, base.meta.get("config") or {}
    for label, keys, one, other in (("", SAME_META, run.meta, base.meta), ("config.", SAME_CONFIG, mine, theirs)):
        for key in keys:
            if key in one and key in other and one[key] != other[key]:
                raise _unpaired(run, base, label + key, one[key], other[key])


def _unpaired(run: Run, base: Run, key: str, one: Any, other: Any) -> GrowthError:
    return GrowthError(
        f"{run.arm}, seed {run.seed}, is not paired with {base.arm}: {key} is {one!r} against {other!r}",
        where=f"{run.folder} and {base.folder}",
        why="arms are compared on the same data, schedule and held-out text",
        fix="run the arm again with the baseline's settings, or leave it out",
    )
