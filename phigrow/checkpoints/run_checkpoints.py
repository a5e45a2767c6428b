"""Checkpoints in the folder of a run: which of them are complete, and what their markers say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.checkpoints.integrity import MARKER, read_marker

FOLDER = "checkpoints"
UNIVERSAL = "universal"
RUN_FILE = "run.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps done, tokens seen, seconds of training; and where a stream of data is.

    ``blocks`` counts in the order of the data, those that runs before this one had read included.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data: dict[str, Any] | None = None
    blocks: int = 0


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint with its marker: folder, progress, the ranks and the ZeRO stage that wrote it."""

    folder: Path
    progress: Progress
    world_size: int
    stage: int
    marker: dict[str, Any]

    @property
    def place(self) -> str | None:
        """The device of the optimizer's state, as in `optimizer_device`; None if the marker does not record it."""
        return self.marker.get("place")

    def fits(self, ranks: int, stage: int, place: str) -> bool:
        """Return True if DeepSpeed can load the checkpoint without conversion."""
        return (self.world_size, self.stage) == (ranks, stage) and self.place in (None, place)


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that was complete once and is not what was written: which, and why."""

    folder: Path
    why: str

    def __str__(self) -> str:
        return f"{self.folder.name}: {self.why}"


def marked_checkpoints(out: Path) -> tuple[list[RunCheckpoint], list[Damaged]]:
    """Return the checkpoints of a run that have a marker, oldest first, and those whose marker is damaged.

    A checkpoint without a marker was never complete, and is passed over. The files are not read: see `newest_complete`.
    """
    found, damaged = [], []
    for path in (out / FOLDER).glob(f"step-*/{MARKER}"):
        try:
            content = read_marker(path.parent)
            progress = Progress(**content["progress"])
            found.append(RunCheckpoint(path.parent, progress, content["world_size"], content["stage"], content))
        except (ValueError, KeyError, TypeError) as error:
            damaged.append(Damaged(path.parent, str(error)))
    return sorted(found, key=lambda item: item.progress.step), damaged
