"""Read phigrow's own records: ``records.jsonl``, or ``records.jsonl.gz``."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from phigrow.errors import GrowthError
from phigrow.records.schema import FILE, PACKED_FILE, Record

_TAIL_BYTES = 1 << 14


@dataclass(frozen=True)
class Lines:
    """Records of one file, each with its place in the file, and notes about lines that were left out."""

    path: Path
    records: tuple[tuple[str, Record], ...]
    notes: tuple[str, ...]


def has_records(folder: Path) -> bool:
    """Return True if the folder itself has a file of records."""
    return any((folder / name).is_file() for name in (FILE, PACKED_FILE))


def folders_below(folder: Path) -> list[Path]:
    """Return the folders at any depth that hold records, sorted by path."""
    return sorted({path.parent for name in (FILE, PACKED_FILE) for path in folder.rglob(name)})


def read_lines(folder: Path) -> Lines:
    """Read every record of a run's folder.

    If the run is going on or was killed, its last line may be incomplete. It is then left out with a note.

    Raises:
        GrowthError: the file does not exist or cannot be unpacked; a line is not JSON or has no type.
    """
    path, content = _content(folder)
    records: list[tuple[str, Record]] = []
    notes: list[str] = []
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:
            # Only the text after the last newline can be an incomplete record.
            if number == len(lines):
                notes.append(f"line {number} is incomplete and was left out")
                continue
            raise GrowthError(
                "the record is not valid JSON",
                where=where,
                why=str(error),
                fix="repair or delete this line, or copy the file again",
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("type"), str):
            raise GrowthError(
                "the record has no type",
                where=where,
                why="each line must be an object with a type",
                fix='write {"type": "run" | "step" | "eval", ...}',
            )
        records.append((where, record))
    return Lines(path, tuple(records), tuple(notes))


def written_so_far(folder: Path) -> list[Record]:
    """Return the records of a run that may be going on; empty if it has no ``run`` record yet."""
    records = [record for line in _text_lines(folder) if (record := _parsed(line)) is not None]
    return records if records and records[0].get("type") == "run" else []


def first_record(folder: Path) -> Record | None:
    """Return the ``run`` record of a run that may be going on; None if it has none yet."""
    try:
        with (folder / FILE).open("rb") as file:
            record = _parsed(file.readline())
    except OSError:
        return None
    return record if record is not None and record.get("type") == "run" else None


def last_record(folder: Path, kind: str, *, at_most: int | None = None) -> Record | None:
    """Return the last ``step`` or ``eval`` record of a run that may be going on, or None.

    Args:
        folder: of the run.
        kind: the record's type.
        at_most: ignore records of later steps.
    """
    # Without at_most the last part of the file mostly has it: files are long, and a progress display asks often.
    for most_bytes in [_TAIL_BYTES, None] if at_most is None else [None]:
        try:
            with (folder / FILE).open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0 if most_bytes is None else max(0, size - most_bytes))
                lines = file.read().splitlines()
        except OSError:
            return None
        for line in reversed(lines):
            record = _parsed(line)
            if record is not None and record.get("type") == kind and (at_most is None or record["step"] <= at_most):
                return record
    return None


def lines_up_to(folder: Path, step: int) -> list[str]:
    """Return the lines of a run's records up to a step, the ``run`` record included."""
    return [line for line in _text_lines(folder) if (r := _parsed(line)) is not None and r.get("step", 0) <= step]


def step_losses(folder: Path) -> list[float]:
    """Return the recorded training losses in order, without those of skipped steps."""
    records = (record for line in _text_lines(folder) if (record := _parsed(line)) is not None)
    return [record["loss"] for record in records if record.get("type") == "step" and not record.get("skipped")]


def last_source_tokens(folder: Path) -> tuple[int, dict[str, int]] | None:
    """Return the step of the last evaluation that counts tokens by source, and the counts; None without one."""
    for line in reversed(_text_lines(folder)):
        if '"tokens_by_source"' in line and (record := _parsed(line)) is not None and record.get("type") == "eval":
            return record["step"], record["tokens_by_source"]
    return None


def _text_lines(folder: Path) -> list[str]:
    path = folder / FILE
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _parsed(line: str | bytes) -> Record | None:
    """Return the record in a line, or None if the line is incomplete."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _content(folder: Path) -> tuple[Path, bytes]:
    path, packed = folder / FILE, folder / PACKED_FILE
    if path.is_file():
        return path, path.read_bytes()
    if not packed.is_file():
        raise GrowthError(
            "the run has no records", where=str(path), why="the file does not exist",
            fix="give the folder of a run",
        )  # fmt: skip
    try:
        return packed, gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise GrowthError(
            "the records cannot be unpacked", where=str(packed), why=str(error), fix="copy the file again"
        ) from error
