"""Read logs of JSON: Trainer's ``trainer_state.json``, and a history as JSON lines or a list of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.records.readers.log_table import LogTable, chosen_run, numbers_of

WANDB_STEP = "_step"
"""W&B's count of the calls of its logger."""


def read_trainer_state(path: Path) -> LogTable:
    """Read the history in a ``trainer_state.json`` of Hugging Face's Trainer.

    Raises:
        GrowthError: the file cannot be read, or has no ``log_history``.
    """
    state = _parsed(path)
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise GrowthError(
            "the file has no log_history",
            where=str(path),
            why="Trainer writes its log there",
            fix="give the trainer_state.json of a Trainer run, or a table as JSON lines (.jsonl) or CSV",
        )
    return LogTable(path, "trainer_state.json", tuple(numbers_of(row) for row in history))


def read_history(path: Path, run: str | None = None) -> LogTable:
    """Read a history of rows: one JSON object a line, or a list of objects.

    Raises:
        GrowthError: the file cannot be read, a row is no object, or the file has several runs.
    """
    rows = _parsed(path) if path.suffix == ".json" else _parsed_lines(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise GrowthError(
            "the history is not a list of rows", where=str(path), fix='write one object a line: {"step": 1, ...}'
        )
    numbers = tuple(numbers_of(row) for row in chosen_run(rows, run, path))
    own = (WANDB_STEP,) if any(WANDB_STEP in row for row in numbers) else ()
    return LogTable(path, "history in JSON", numbers, own_steps=own)


def is_trainer_state(path: Path) -> bool:
    """Return True if a JSON file is an object, and thus no list of rows."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(64).lstrip()[:1] == "{"
    except (OSError, UnicodeDecodeError):
        return False


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from error


def _parsed_lines(path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, str(error)) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise _unreadable(f"{path}, line {number}", str(error)) from error
    return rows


def _unreadable(where: Path | str, why: str) -> GrowthError:
    return GrowthError("the log is not valid JSON", where=str(where), why=why, fix="copy or export the file again")
