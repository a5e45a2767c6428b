"""A log of another trainer as rows of numbers, and the choice of one run where a file has several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError

RUN_COLUMNS = ("run", "run_name", "run_id", "Run", "Name", "name", "_run", "trial", "experiment")
"""Columns that tell the runs of a file apart, where several runs stand below each other."""

MOST_NAMES = 12
"""Most columns or runs that a message names."""


@dataclass(frozen=True)
class LogTable:
    """Numbers of one run, in the order in which they were written.

    Attributes:
        path: of the file.
        kind: the format in words.
        rows: column -> number. A value that a row does not have is missing from it.
        empty_is_nan: the format writes NaN for missing values, as pandas does, so a NaN says nothing by itself.
        own_steps: columns that count calls of the logger instead of updates.
    """

    path: Path
    kind: str
    rows: tuple[dict[str, float], ...]
    empty_is_nan: bool = False
    own_steps: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """Names of the columns that have a value, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a row that are numbers. The texts NaN and Infinity count as numbers.

    >>> numbers_of({"step": 1, "loss": "NaN", "note": "x", "done": True, "lr": None})
    {'step': 1.0, 'loss': nan}
    """
    words = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    values = {name: words.get(value, value) if isinstance(value, str) else value for name, value in row.items()}
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def chosen_run(rows: Sequence[Mapping[str, Any]], run: str | None, path: Path) -> list[Mapping[str, Any]]:
    """Return the rows of one run of a file.

    Raises:
        GrowthError: the file has several runs and none was chosen, or not the chosen one.
    """
    for column in RUN_COLUMNS:
        names = list(dict.fromkeys(str(row[column]) for row in rows if row.get(column) not in (None, "")))
        if run is None and len(names) > 1:
            raise several_runs(names, path)
        if run is not None and names:
            if run not in names:
                raise no_run(run, names, path)
            return [row for row in rows if str(row.get(column)) == run]
    if run is not None:
        raise no_run(run, [], path)
    return list(rows)


def several_runs(names: Iterable[str], path: Path) -> GrowthError:
    """Return the error for a file that has several runs."""
    names = list(names)
    return GrowthError(
        f"the log has {len(names)} runs: {shown(names)}",
        where=str(path),
        why="each log of an arm is one run",
        fix=f"choose one: {{log: {path.name}, run: {names[0]}}}",
    )


def no_run(run: str, names: Iterable[str], path: Path) -> GrowthError:
    """Return the error for a run that a file does not have."""
    return GrowthError(
        f"the log has no run {run!r}",
        where=str(path),
        why=f"it has {shown(names)}" if names else "nothing in it names a run",
        fix="choose one of these runs" if names else "leave 'run' out",
    )


def shown(names: Iterable[str]) -> str:
    """Return names in words, the first few of many.

    >>> shown(["a", "b"])
    'a, b'
    """
    names = list(names)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
