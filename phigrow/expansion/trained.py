"""Find and check a training checkpoint to grow from, and convert it to the universal format."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.checkpoints import universal
from phigrow.checkpoints.integrity import MARKER, damage, read_marker
from phigrow.checkpoints.provenance import Provenance
from phigrow.checkpoints.run_checkpoints import RUN_FILE, UNIVERSAL, marked_checkpoints
from phigrow.errors import GrowthError
from phigrow.expansion.progress_bar import progress_bar
from phigrow.files.untrusted import read_json_strict


@dataclass(frozen=True)
class Trained:
    """A checkpoint to grow from: its folder, and its marker (None if phigrow did not write it)."""

    folder: Path
    marker: dict[str, Any] | None

    @property
    def is_universal(self) -> bool:
        return bool(self.marker and self.marker.get("universal"))

    @property
    def converted(self) -> Path:
        """Folder in which its run keeps it in the universal format, if it does."""
        return self.folder.parent.parent / UNIVERSAL / self.folder.name

    def sizes(self) -> dict[str, list[int]]:
        """Return bytes and time of change of every file, which identify a folder without a marker."""
        files = {file.name: file.stat() for file in sorted(self.folder.iterdir()) if file.is_file()}
        return {name: [found.st_size, found.st_mtime_ns] for name, found in files.items()}

    @property
    def states(self) -> dict[str, int]:
        """State tensors of its optimizer -> power of the gradient that each averages."""
        states: dict[str, int] = ((self.marker or {}).get("optimizer") or {}).get("states", universal.ADAM_STATES)
        return states

    @property
    def step(self) -> int | None:
        return self.marker["progress"]["step"] if self.marker and "progress" in self.marker else None


def find_trained(path: Path) -> Trained:
    """Return the checkpoint that a path means. Its files are checked if phigrow wrote them."""
    if not (path / MARKER).is_file():
        found, damaged = marked_checkpoints(path)
        latest = path / "latest"
        if found:
            path = found[-1].folder
        elif damaged:
            raise GrowthError("a checkpoint that is damaged", where=str(damaged[-1].folder), why=damaged[-1].why)
        elif latest.is_file():  # DeepSpeed's own; it names the newest folder beside it
            path = path / Path(latest.read_text(encoding="utf-8").strip()).name
    if (path / MARKER).is_file():
        try:
            marker = read_marker(path)
        except ValueError as error:
            raise GrowthError("a checkpoint that is damaged", where=str(path), why=str(error)) from error
        if wrong := damage(path, marker["files"]):
            raise GrowthError("a checkpoint that is damaged", where=str(path), why="; ".join(wrong[:3]))
        return Trained(path, marker)
    if not any(path.glob("*_optim_states.pt")):
        raise GrowthError(
            "no checkpoint with an optimizer's state",
            where=str(path),
            why=None if path.is_dir() else "there is no such folder",
            fix="give the folder of a run that saved one (save_every, or keep), or one that DeepSpeed wrote",
        )
    return Trained(path, None)


def check_step(source: Trained, provenance: Provenance | None) -> None:
    """Refuse a checkpoint of another step than the weights that were grown, where both are known."""
    steps = ((provenance.source_training if provenance else None) or {}).get("steps")
    if steps is not None and source.step is not None and not source.is_universal and steps != source.step:
        raise GrowthError(
            f"a checkpoint of step {source.step}, and weights that were grown from step {steps}",
            where=str(source.folder),
            fix="expand the export of this checkpoint, or give the checkpoint of that step",
        )


def as_universal(source: Trained, work: Path, progress: bool) -> Path:
    """Return the checkpoint as a universal folder: itself, the one that its run made, or a conversion in ``work``."""
    if source.is_universal:
        return source.folder
    if source.marker and universal.is_complete(source.converted):
        return source.converted
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it found no GPU
    try:
        with progress_bar("reading the checkpoint", 1, progress) as advance:
            universal.convert(source.folder, work, source.marker or {})
            advance(None)
    except (GrowthError, OSError):
        raise
    except Exception as error:  # whatever DeepSpeed and torch say of a file that is not what they expect
        raise GrowthError(
            "a checkpoint that cannot be converted to DeepSpeed's universal format",
            where=str(source.folder),
            why=f"{type(error).__name__}: {error}",
            fix="give one that is whole: ZeRO 1 to 3 with Adam is read, phigrow's own at ZeRO 0 too",
        ) from error
    return work


def position_in_data(source: Trained) -> dict[str, Any] | None:
    """Return the position of the run in its data, so that the grown run continues there; None if it is unknown."""
    path = source.folder.parent.parent / RUN_FILE
    if not source.marker or "progress" not in source.marker or not path.is_file():
        return None
    run, progress = read_json_strict(path, "the settings of a run"), source.marker["progress"]
    blocks = progress.get("blocks") or progress["step"] * run["batch"]
    known = {key: run.get(key) for key in ("seed", "data_part", "data_fingerprint", "mixture")}
    return {"blocks": blocks, "position": progress.get("data"), **known}
