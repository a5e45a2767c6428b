"""Find the log of a run in a file or folder of another trainer, and read it."""

from __future__ import annotations

from pathlib import Path

from phigrow.errors import GrowthError
from phigrow.records.readers.delimited import read_delimited
from phigrow.records.readers.event_files import PATTERN, read_events
from phigrow.records.readers.json_log import is_trainer_state, read_history, read_trainer_state
from phigrow.records.readers.log_table import LogTable, several_runs
from phigrow.records.readers.parquet_log import read_parquet
from phigrow.records.readers.phigrow import has_records

STATE = "trainer_state.json"
TABLES = (".csv", ".tsv", ".txt")
LINES = (".jsonl", ".ndjson")
KINDS = "trainer_state.json, TensorBoard's event files, CSV, JSON lines or Parquet"


def read_log(path: Path, run: str | None = None, decimal: str | None = None) -> LogTable:
    """Read the log of one run.

    Args:
        path: a file, or a folder with a ``trainer_state.json`` (in the folder, else in its newest ``checkpoint-STEP``)
            or with event files.
        run: the run to read, where a file has several.
        decimal: the decimal mark of a CSV file, where it is not clear.

    Raises:
        GrowthError: there is no log, it cannot be read, or it has several runs.
    """
    if not path.exists():
        raise GrowthError("the log does not exist", where=str(path), fix="correct the path in the YAML file")
    if path.is_dir():
        return _read_folder(path)
    suffix = path.suffix.lower()
    if ".tfevents." in path.name:
        return read_events(path)
    if suffix in TABLES:
        return read_delimited(path, run, decimal)
    if suffix == ".parquet":
        return read_parquet(path, run)
    if suffix == ".json" and is_trainer_state(path):
        return read_trainer_state(path)
    if suffix in (*LINES, ".json"):
        return read_history(path, run)
    raise GrowthError(f"the log {path.name} is of an unknown kind", where=str(path), fix=f"give {KINDS}")


def _read_folder(folder: Path) -> LogTable:
    if has_records(folder):
        raise GrowthError(
            "the folder has records of phigrow, which need no YAML file",
            where=str(folder),
            fix=f"give it beside the YAML file: phigrow report {folder} FILE.yaml",
        )
    if (folder / STATE).is_file():
        return read_trainer_state(folder / STATE)
    states = {int(n): path for path in folder.glob(f"checkpoint-*/{STATE}") if (n := path.parent.name[11:]).isdigit()}
    if states:
        return read_trainer_state(states[max(states)])
    if list(folder.glob(PATTERN)):
        return read_events(folder)
    below = sorted({path.parent for path in folder.rglob(PATTERN)})
    if len(below) > 1:
        error = several_runs([str(path.relative_to(folder)) for path in below], folder)
        raise GrowthError(error.what, where=error.where, why=error.why, fix=f"give one of them: {below[0]}")
    if below:
        return read_events(below[0])
    raise GrowthError("the folder has no log", where=str(folder), fix=f"give {KINDS}")
