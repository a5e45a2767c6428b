"""``records.jsonl``: one JSON object a line, from which everything about a run is measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from phigrow.files.atomic import atomic_write

FILE = "records.jsonl"


class RecordWriter:
    """Appends records, each flushed to the operating system at once; rank 0 owns the only one.

    On a fresh start it replaces what is there; on resume it drops what lies past the checkpoint's step, so that no
    step appears twice, and keeps the ``run`` record, which is written once.

    Args:
        folder: of the run.
        resume_step: the step of the checkpoint from which it goes on; None where it starts.
        trunk: the run that it branches off at that step, whose records it goes on from.
        run: the ``run`` record, of a run that has none yet.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resume_step: int | None = None,
        trunk: Path | None = None,
        run: dict[str, Any] | None = None,
    ) -> None:
        self.path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        before = trunk / FILE if trunk else self.path
        kept = [] if resume_step is None else truncated(before, resume_step)
        if run is not None:
            kept = [_line("run", run), *(line for line in kept if _type(line) not in ("run", "resume"))]
        atomic_write(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, type: str, **values: Any) -> None:
        """Append one record; numbers that are not finite are written as JavaScript's NaN and Infinity."""
        self._file.write(_line(type, values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file, on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _line(type: str, values: dict[str, Any]) -> str:
    return json.dumps({"type": type, **values})


def _type(line: str) -> Any:
    return json.loads(line).get("type")


def truncated(path: Path, step: int) -> list[str]:
    """Return the lines of a records file up to a step: the run record, and steps and evaluations not past it."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line that was being written when the run was killed
        if isinstance(record, dict) and record.get("step", 0) <= step:
            kept.append(line)
    return kept


def recorded_losses(path: Path) -> list[float]:
    """The losses of the recorded steps, in order, those of skipped steps left out."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record["loss"] for record in records if record["type"] == "step" and not record.get("skipped")]
