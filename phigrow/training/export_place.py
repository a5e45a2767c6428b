"""Check, before a run trains, that its export may be written where it shall be."""

from __future__ import annotations

from pathlib import Path

from phigrow.checkpoints.provenance import TRAINING_FILE
from phigrow.errors import GrowthError
from phigrow.files.output import check_replaceable


def check_export(out: Path, export: str | None) -> None:
    """Refuse an export that would replace the run folder, or anything else that is no export of a run.

    Raises:
        GrowthError: the folder of the export is the run folder, or above it; or it holds other files.
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
