"""Arms of a report. Runs of one recorded arm with different sources, ages or texts become arms of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from phigrow.records.run import Run

Start = tuple[Any, ...]
"""Source, age, constant phase and text of a run."""


def source_age(run: Run) -> float | None:
    """Return the tokens that the source read before growth, per parameter, in three figures; None if unknown.

    Three figures, because whole steps make equal ages differ a little between sources of different sizes.
    """
    age = run.study.get("source_age")
    return None if age is None else float(f"{age:.3g}")


def labelled(runs: Iterable[Run]) -> list[Run]:
    """Rename the runs of arms with several sources or ages, so that each source and age is an arm.

    An arm with one source of one age keeps its name. Others get the source and the age in tokens per parameter, and are
    sorted by age.

    >>> [run.arm for run in labelled(load_runs("runs"))]  # doctest: +SKIP
    ['scratch', 'wr @ 2', 'wr @ 20']
    """
    runs = list(runs)
    starts: dict[str, list[Start]] = {}
    for run in runs:
        starts.setdefault(run.arm, []).append(_start(run))
    order = {arm: place for place, arm in enumerate(starts)}
    runs.sort(key=lambda run: (order[run.arm], source_age(run) or 0.0))
    return [replace(run, arm=_label(run, starts[run.arm])) for run in runs]


def _start(run: Run) -> Start:
    study = run.study
    return (study.get("source"), source_age(run), study.get("source_constant") is True, study.get("same_text") is True)


def _label(run: Run, starts: list[Start]) -> str:
    several = [len(set(values)) > 1 for values in zip(*starts, strict=True)]
    source, age, constant, same_text = _start(run)
    parts = [run.arm]
    if several[0] and source is not None:
        parts.append(f" from {source}")
    if several[1] and age is not None:
        parts.append(f" @ {age:g}")
    if several[2] and constant:
        parts.append(", constant rate")
    if several[3] and same_text:
        parts.append(", same text")
    return "".join(parts)
