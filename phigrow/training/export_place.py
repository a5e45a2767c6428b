"""Check, before a run trains, that its export may be written, and after it has trained, that it was."""

from __future__ import annotations

from pathlib import Path

from phigrow.checkpoints.provenance import TRAINING_FILE
from phigrow.checkpoints.reader import CheckpointReader
from phigrow.errors import GrowthError
from phigrow.files.output import check_replaceable, check_writable
from phigrow.records.readers.phigrow import last_record
from phigrow.training.configuration import RunConfig


def check_export(out: Path, export: str | None) -> None:
    """Refuse an export that would replace the run folder or other files, or that cannot be written.

    Raises:
        GrowthError: the folder of the export is the run folder, or above it; it holds other files; or its place cannot
            be written.
    """
    if export is None:
        return
    folder, run = (out / export).resolve(), out.resolve()
    if folder == run or folder in run.parents:
        raise GrowthError(
            f"the export {export!r} would replace the run folder", where=str(out / export),
            why="an export replaces its folder as a whole", fix="give a folder of its own, such as --export export",
        )  # fmt: skip
    check_replaceable(out / export, [TRAINING_FILE], "an export of a run")
    check_writable(out / export)


STORED = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Data types of exports, and their names in checkpoints."""


def is_exported(folder: Path | None, dtype: str) -> bool:
    """Return True if a finished run has nothing left to export.

    Args:
        folder: folder of the export; None for a run that exports nothing.
        dtype: data type that the run is asked for. An export of another one is made again.
    """
    if folder is None:
        return True
    if not folder.is_dir():
        return False
    try:
        with CheckpointReader(folder) as weights:
            return weights.dtype_name == STORED[dtype]
    except GrowthError:  # a file is missing or damaged
        return False


def check_other_export(out: Path, export: Path, config: RunConfig) -> None:
    """Refuse to train a finished run again because it is asked for another export and has no checkpoint any more.

    Raises:
        GrowthError: the records reach the last step, and the export has another data type.
    """
    last = last_record(out, "step")
    if last is None or last["step"] < config.steps or not export.is_dir() or is_exported(export, config.stored_dtype):
        return
    raise GrowthError(
        f"the run is complete and has no checkpoint, so it cannot be exported in {config.stored_dtype}",
        where=str(out),
        why=f"{export} has another data type, and the weights of higher precision are in a checkpoint only",
        fix="convert the export with transformers, or train again with another --out",
    )
