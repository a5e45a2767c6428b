"""Write records, one JSON object on each line. All measurements of a run come from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phigrow.files.atomic import atomic_write
from phigrow.records.readers.phigrow import lines_up_to
from phigrow.records.schema import FIELDS, FILE, Record


class RecordWriter:
    """Append records to a run's ``records.jsonl``, each flushed to the operating system at once.

    Only rank 0 has a writer. A fresh start replaces the file. A resumption keeps the ``run`` record and drops records
    past the checkpoint's step, so that no step appears twice.

    Args:
        folder: of the run.
        resume_step: step of the checkpoint that the run resumes from; None for a fresh start.
        trunk: folder of the run from which this one branches off at that step. Its records up to there are copied.
        run: the ``run`` record of a run that has none yet.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resume_step: int | None = None,
        trunk: Path | None = None,
        run: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.path = folder, folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else lines_up_to(trunk or folder, resume_step)
        if run is not None:
            kept = [_line("run", run), *(line for line in kept if _type(line) not in ("run", "resume"))]
        atomic_write(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, type: str, **values: Any) -> None:
        """Append one record. Numbers that are not finite are written as NaN, Infinity and -Infinity."""
        assert values.keys() <= FIELDS[type], f"{type} records have no {sorted(values.keys() - FIELDS[type])}"
        self._file.write(_line(type, values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Write all records to disk and close the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def write_records(folder: Path, records: Iterable[Record]) -> None:
    """Write ``records.jsonl`` atomically."""
    atomic_write(folder / FILE, "".join(json.dumps(record) + "\n" for record in records))


def _line(type: str, values: Mapping[str, Any]) -> str:
    return json.dumps({"type": type, **values})


def _type(line: str) -> Any:
    return json.loads(line).get("type")
