"""DeepSpeed checkpoints that are complete or not there, and the rule for continuing one."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.errors import GrowthError

if TYPE_CHECKING:
    from phigrow.training.process import World

FOLDER = "checkpoints"
MARKER = "complete.json"
RUN_FILE = "run.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps done, tokens seen, seconds of training; and where a stream of data is."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class Found:
    """A complete checkpoint: its folder, its progress, and the number of ranks that wrote it."""

    folder: Path
    progress: Progress
    world_size: int


def complete_checkpoints(out: Path) -> list[Found]:
    """Return the complete checkpoints of a run, oldest first; one without its marker is passed over."""
    found = []
    for marker in (out / FOLDER).glob(f"step-*/{MARKER}"):
        try:
            content = json.loads(marker.read_text(encoding="utf-8"))
            found.append(Found(marker.parent, Progress(**content["progress"]), content["world_size"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda item: item.progress.step)


def claim(out: Path, curve: dict[str, Any], *, resume: bool) -> Found | None:
    """Make a folder this run's, and return the checkpoint to continue from, if any.

    Args:
        out: the folder of the run.
        curve: what its loss curve depends on: settings, and the fingerprint of the data.
        resume: whether an earlier run may be continued.

    Raises:
        GrowthError: the folder belongs to a run with other settings (each is named), or may not be continued.
    """
    path = out / RUN_FILE
    curve = json.loads(json.dumps(curve))
    if path.is_file():
        former = json.loads(path.read_text(encoding="utf-8"))
        if not resume:
            raise GrowthError(
                "the run folder is taken", where=str(out), why="resume is never", fix="choose another out, or delete it"
            )
        if different := [key for key in {**former, **curve} if former.get(key) != curve.get(key)]:
            changes = ", ".join(f"{key} ({former.get(key)!r}, now {curve.get(key)!r})" for key in different)
            raise GrowthError(
                "the run folder holds a run of another configuration",
                where=str(out),
                why=f"these keys differ: {changes}",
                fix="choose another out, delete the folder, or go back to the former values",
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, curve)
    found = complete_checkpoints(out)
    return found[-1] if found else None


def save(engine: Any, out: Path, progress: Progress, world: World, *, keep: int) -> Path:
    """Save model, optimizer and schedule on all ranks; the marker is written last, by rank 0.

    Returns:
        The folder of the checkpoint, ``out/checkpoints/step-N``.
    """
    import torch.distributed as dist

    root, tag = out / FOLDER, f"step-{progress.step}"
    if world.first:
        shutil.rmtree(root / tag, ignore_errors=True)  # what a killed run may have left
    dist.barrier()
    engine.save_checkpoint(str(root), tag=tag, client_state={"phigrow": asdict(progress)})
    dist.barrier()
    if world.first:
        write_json(root / tag / MARKER, {"progress": asdict(progress), "world_size": world.size})
        for old in complete_checkpoints(out)[: -keep or None] if keep else []:
            (old.folder / MARKER).unlink()
            shutil.rmtree(old.folder)
    dist.barrier()
    return root / tag


def load(engine: Any, found: Found, world: World) -> Progress:
    """Load a complete checkpoint into an engine, on all ranks.

    Raises:
        GrowthError: another number of ranks wrote it (its optimizer state is cut for them), or DeepSpeed finds nothing.
    """
    if found.world_size != world.size:
        raise GrowthError(
            f"the checkpoint was written by {found.world_size} ranks, this run has {world.size}",
            where=str(found.folder),
            why="ZeRO cuts the optimizer's state by rank",
            fix=f"run with {found.world_size} ranks",
        )
    path, _ = engine.load_checkpoint(str(found.folder.parent), tag=found.folder.name)
    if path is None:
        raise GrowthError("DeepSpeed found no checkpoint", where=str(found.folder), fix="delete this folder")
    return found.progress


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
