"""Read a history in a Parquet file, such as that of Weights & Biases."""

from __future__ import annotations

from pathlib import Path

from phigrow.errors import GrowthError
from phigrow.records.readers.json_log import WANDB_STEP
from phigrow.records.readers.log_table import LogTable, chosen_run, numbers_of


def read_parquet(path: Path, run: str | None = None) -> LogTable:
    """Read a Parquet file with one row for each call of the logger.

    Raises:
        GrowthError: pyarrow is not installed, the file cannot be read, or it has several runs.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise GrowthError(
            "Parquet files need the package pyarrow", where=str(path), fix="pip install pyarrow, or export CSV"
        ) from error
    try:
        rows = parquet.ParquetFile(path).read().to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise GrowthError(
            "the Parquet file cannot be read", where=str(path), why=str(error), fix="copy or export the file again"
        ) from error
    numbers = tuple(numbers_of(row) for row in chosen_run(rows, run, path))
    own = (WANDB_STEP,) if any(WANDB_STEP in row for row in numbers) else ()
    return LogTable(path, "history in Parquet", numbers, empty_is_nan=True, own_steps=own)
