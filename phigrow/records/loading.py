"""Load runs: read the records of a folder, check them, and turn them into columns."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from phigrow.errors import GrowthError
from phigrow.files.paths import user_path
from phigrow.records.arms_file import is_arms_file, read_arms
from phigrow.records.readers.phigrow import folders_below, has_records, read_lines
from phigrow.records.run import Columns, Run
from phigrow.records.schema import DIAGNOSTICS, FILE
from phigrow.records.validation import FLAGS, POINT, STEP_ONLY, Row, Validated, validate

FOLDERS_TO_GIVE = "give the folders that runs were trained into (their --out), or a folder that holds them"
LOGS_TO_NAME = "name logs of another trainer in a YAML file, arms: {scratch: [LOG], mine: [LOG]}, and give this file"


def load_run(folder: str | Path) -> Run:
    """Load the run whose ``records.jsonl`` or ``records.jsonl.gz`` is in ``folder``.

    An incomplete last line is left out with a note. A loss that is not finite is kept, and a note says that the run
    diverged. Records of an unknown type are skipped with a note.

    Raises:
        GrowthError: the file does not exist; a line is not JSON, lacks a field or has a value of the wrong type; steps
            do not increase, or costs decrease; there is no ``run`` record, or a second one.

    >>> load_run("runs/wr-seed0").evals["loss"][-1]  # doctest: +SKIP
    np.float64(3.61)
    """
    lines = read_lines(user_path(folder))
    checked = validate(lines.records, str(lines.path))
    return _as_columns(user_path(folder), checked, lines.notes)


def load_runs(folders: str | Path | Iterable[str | Path], *, notes: list[str] | None = None) -> list[Run]:
    """Load several runs from run folders, or from parents of run folders at any depth.

    A YAML file names runs of other trainers and their logs (docs/other-trainers.md).

    Args:
        folders: one, or several; YAML files among them.
        notes: if given, a folder without records, or with a file that has no record yet, is skipped if others have
            some, and a sentence about it is added to this list.

    Returns:
        The runs, in the order of ``folders`` and, below a parent, of their paths.

    Raises:
        GrowthError: a folder does not exist, or has no records in it or below it; as ``load_run``.
    """
    roots = [folders] if isinstance(folders, str | Path) else list(folders)
    chosen: dict[Path, Path] = {}  # resolved -> as given, so that a folder named twice is read once
    empty: list[Path] = []
    foreign: list[Run] = []
    for root in map(user_path, roots):
        if is_arms_file(root):
            named = read_arms(root)
            foreign += [_as_columns(run.path, validate(run.records, str(run.path)), run.notes) for run in named.runs]
            if notes is not None:
                notes += named.notes
            continue
        if root.is_file():
            raise GrowthError("this is a file, and not the folder of a run", where=str(root), fix=LOGS_TO_NAME)
        below = [root] if has_records(root) else folders_below(root)
        if not below:
            if not root.exists():
                raise GrowthError("the folder does not exist", where=str(root), fix=FOLDERS_TO_GIVE)
            empty.append(root)
        for folder in below:
            chosen.setdefault(folder.resolve(), folder)
    if not (chosen or foreign) or (empty and notes is None):
        where = ", ".join(map(str, empty)) or None
        raise GrowthError(
            "the folders hold no runs",
            where=where,
            why=f"there is no {FILE} in them or below them",
            fix=FOLDERS_TO_GIVE,
        )
    if notes is not None:
        notes += [f"{root} is left out: there is no {FILE} in it or below it" for root in empty]
    runs: list[Run] = []
    for folder in chosen.values():
        lines = read_lines(folder)
        if notes is not None and not lines.records:
            notes.append(f"{folder} is left out: its {FILE} has no record yet")
        else:
            runs.append(_as_columns(folder, validate(lines.records, str(lines.path)), lines.notes))
    if not (runs or foreign):
        raise GrowthError(
            "the folders hold no runs with records",
            where=", ".join(map(str, chosen.values())),
            why="their files of records are empty",
            fix="wait until the runs have started, or give other folders",
        )
    return runs + foreign


def _as_columns(folder: Path, checked: Validated, notes: Iterable[str]) -> Run:
    named = dict.fromkeys(name for row in checked.sources for name in row)
    measured = [key for key in DIAGNOSTICS if any(key in row for row in checked.diagnostics)]
    diagnostics = [dict.fromkeys(measured, math.nan) | row for row in checked.diagnostics]
    run = Run(
        folder,
        checked.meta["arm"],
        checked.meta["seed"],
        checked.meta,
        steps=_columns(checked.steps, (*POINT, *STEP_ONLY, *FLAGS)),
        evals=_columns(checked.evals, POINT),
        sources={name: np.array([row.get(name, math.nan) for row in checked.sources]) for name in named},
        diagnostics=_columns(diagnostics, ("step", *measured)),
        group_losses=np.array(checked.group_losses),
        group_blocks=np.array(checked.group_blocks),
        resumes=tuple(checked.resumes),
    )
    return replace(run, notes=(*notes, *checked.notes, *_unusual(run)))


def _unusual(run: Run) -> list[str]:
    notes = []
    total = len(run.steps["step"])
    for flag, words in (("skipped", "no update was made"), ("spike", "the loss jumped")):
        if count := int(run.steps[flag].sum()):
            notes.append(f"{words} in {count} of {total} steps")
    if run.diverged_at is not None:
        notes.append(f"diverged: the loss is not finite at step {run.diverged_at}")
    return notes


def _columns(rows: list[Row], keys: Iterable[str]) -> Columns:
    return {key: np.array([row[key] for row in rows], dtype=np.int64 if key == "step" else np.float64) for key in keys}
