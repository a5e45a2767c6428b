"""List the checkpoints in the folder of a run, with the content of their markers."""

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
    """Progress of a run: steps, tokens and seconds of training; and the position of its data, if that is a stream.

    ``blocks`` counts all blocks in the order of the data, including those that earlier runs read.
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
    def optimizer_device(self) -> str | None:
        """The device of the optimizer's state: device, cpu or nvme; None if the marker does not record it."""
        return self.marker.get("place")

    def fits(self, ranks: int, stage: int, optimizer_device: str) -> bool:
        """Return True if DeepSpeed can load the checkpoint without conversion."""
        same_device = self.optimizer_device in (None, optimizer_device)
        return same_device and (self.world_size, self.stage) == (ranks, stage)


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that was complete and whose files have changed since, with the reason."""

    folder: Path
    why: str

    def __str__(self) -> str:
        return f"{self.folder.name}: {self.why}"


def marked_checkpoints(out: Path) -> tuple[list[RunCheckpoint], list[Damaged]]:
    """Return the checkpoints of a run that have a marker, oldest first, and those whose marker is damaged.

    A checkpoint without a marker was never complete and is left out. This function reads markers only.
    """
    complete, damaged = [], []
    for path in (out / FOLDER).glob(f"step-*/{MARKER}"):
        try:
            content = read_marker(path.parent)
            progress = Progress(**content["progress"])
            if not isinstance(progress.step, int):
                raise ValueError(f"its step is {progress.step!r}, not a whole number")
            complete.append(RunCheckpoint(path.parent, progress, content["world_size"], content["stage"], content))
        except (ValueError, KeyError, TypeError) as error:
            damaged.append(Damaged(path.parent, str(error)))
    return sorted(complete, key=lambda checkpoint: checkpoint.progress.step), damaged
