"""Save DeepSpeed checkpoints completely or not at all, and continue from the newest complete one."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints import universal
from phigrow.checkpoints.integrity import (
    MARKER,
    damage,
    digests,
    restricted_pickles,
    write_marker,
)
from phigrow.checkpoints.run_checkpoints import (
    FOLDER,
    RUN_FILE,
    UNIVERSAL,
    Damaged,
    Progress,
    RunCheckpoint,
    marked_checkpoints,
)
from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_json
from phigrow.files.output import writing
from phigrow.records.schema import FILE as RECORDS
from phigrow.training import engine_state
from phigrow.training.configuration import RunConfig
from phigrow.training.declaration import Role
from phigrow.training.inputs import CONTENTS, changed_contents, former_settings, merged, same_place
from phigrow.training.optimizers import default_grad_clip, optimizer_names
from phigrow.training.process import gather_objects, on_rank_zero

if TYPE_CHECKING:
    from phigrow.training.optimizer_spec import OptimizerSpec
    from phigrow.training.process import World
    from phigrow.training.resolved import ResolvedRun

_DAMAGED = "damaged-"
_ABOUT_INPUTS = ". The run also continues from its own checkpoint if the changed folder is moved away"
_REPEATED = Role.RESUME | Role.HELDOUT
_DEVICES = {"device": "on the device", "cpu": "in the host's memory", "nvme": "on a disk"}


def newest_complete(out: Path, world: World) -> tuple[RunCheckpoint | None, list[Damaged]]:
    """Return the newest checkpoint whose files are all unchanged since they were written, and the damaged newer ones.

    All ranks read; each reads the files that carry its number. If a complete checkpoint exists, the damaged ones are
    renamed, so that they are neither counted by ``keep`` nor tried again.

    Raises:
        GrowthError: there are checkpoints, but none is complete. Nothing is renamed.
    """
    complete, damaged = on_rank_zero(world, lambda: marked_checkpoints(out))
    for item in reversed(complete):
        wrong = gather_objects(world, damage(item.folder, item.marker["files"], world.rank, world.size))
        if not (wrong := [text for part in wrong for text in part]):
            on_rank_zero(world, lambda: _set_aside(damaged))
            return item, damaged
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        damaged.append(Damaged(item.folder, wrong[0] + more))
    if damaged:
        raise GrowthError(
            "no checkpoint of this run is complete",
            where=str(out / FOLDER),
            why="; ".join(str(item) for item in damaged),
            fix="put the files back (is the folder on a disk that all hosts share?), or delete the run's folder to "
            "start over",
        )
    return None, []


def _set_aside(damaged: list[Damaged]) -> None:
    for item in damaged:
        aside = item.folder.with_name(_DAMAGED + item.folder.name)
        shutil.rmtree(aside, ignore_errors=True)
        item.folder.rename(aside)


def has_begun(out: Path) -> bool:
    """Return true if a folder has records or checkpoints of a run. A run that failed to start has neither."""
    return (out / RECORDS).is_file() or any((out / FOLDER).glob("step-*"))


def changed_keys(former: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare the settings and the inputs on which two loss curves depend.

    A missing key has its default: a run that began before a setting existed did not use it. Inputs are compared by
    content. Where a run of an earlier release has no fingerprints, their paths are compared.

    Args:
        former, now: results of `RunConfig.reproducibility_keys` together with the keys of the data and the ``contents``
            of the inputs, as JSON data.

    Returns:
        The keys that differ, each with its former and its new value.

    >>> changed_keys({"lr": 1e-3}, {"lr": 2e-3, "warmup": 20})
    {'lr': (0.001, 0.002)}
    """
    inputs, names = RunConfig.keys_with(Role.INPUT), {key: None for key in {**former, **now} if key != CONTENTS}
    one, other = _defaults(former), _defaults(now)
    pairs = {key: (former.get(key, one.get(key)), now.get(key, other.get(key))) for key in names}
    was, is_now = former.get(CONTENTS), now.get(CONTENTS)
    if isinstance(was, dict) and isinstance(is_now, dict):
        changed = {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and key not in inputs}
        return changed | changed_contents(was, is_now)
    return {
        key: pair
        for key, pair in pairs.items()
        if pair[0] != pair[1] and not (key in inputs and same_place(pair[0], pair[1]))
    }


def _defaults(curve: dict[str, Any]) -> dict[str, Any]:
    """Return the values of missing settings; the one of ``grad_clip`` depends on the optimizer."""
    defaults = {field.name: field.default for field in fields(RunConfig) if field.metadata["role"] & _REPEATED}
    optimizer = curve.get("optimizer", defaults["optimizer"])
    return defaults | {"grad_clip": default_grad_clip(optimizer if optimizer in optimizer_names() else "adamw")}


def claim(out: Path, curve: dict[str, Any], *, resume: bool) -> bool:
    """Claim a folder for this run, and return true if an earlier run is continued.

    A run that failed before its first record has trained nothing, so another run may claim its folder.

    Args:
        out: the folder of the run.
        curve: the settings and properties of the data on which its loss curve depends.
        resume: allow an earlier run to be continued.

    Raises:
        GrowthError: the folder belongs to a run with other settings (each is named) or to one that may not be
            continued, or it cannot be written.
    """
    path = out / RUN_FILE
    curve = json.loads(json.dumps(curve))
    if continued := path.is_file() and has_begun(out):
        former = former_settings(out)
        if not resume:
            raise GrowthError(
                "the run folder already holds a run",
                where=str(out),
                why="resume is never",
                fix="choose another out, or delete the folder",
            )
        if different := changed_keys(former, curve):
            changes = ", ".join(f"{key} ({one!r}, now {other!r})" for key, (one, other) in different.items())
            raise GrowthError(
                "the run folder holds a run with other settings",
                where=str(out),
                why=f"these keys differ: {changes}",
                fix="choose another out, delete the folder, or go back to the former values" + _ABOUT_INPUTS
                if any(key.startswith("content of init") for key in different)
                else "choose another out, delete the folder, or go back to the former values",
            )
        if CONTENTS not in former and CONTENTS in curve:
            print(f"note: {out} was begun by an earlier phigrow, which kept no fingerprints of its inputs", flush=True)
        if CONTENTS in former and CONTENTS in curve:
            curve[CONTENTS] = merged(former[CONTENTS], curve[CONTENTS])
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        atomic_json(path, curve)
    return continued


def resumable(out: Path, curve: dict[str, Any], world: World, *, resume: bool) -> RunCheckpoint | None:
    """Claim a folder and return the checkpoint to continue from, None to start; rank 0 prints the damaged ones.

    Raises:
        GrowthError: as `claim` and `newest_complete`.
    """
    continued = on_rank_zero(world, lambda: claim(out, curve, resume=resume))
    checkpoint, damaged = newest_complete(out, world)
    if not world.first:
        return checkpoint
    for item in damaged:
        where = f"it is now {_DAMAGED}{item.folder.name}"
        print(f"warning: a damaged checkpoint, {item}; {where}", file=sys.stderr, flush=True)
    if damaged and checkpoint:
        print(f"falling back to the checkpoint of step {checkpoint.progress.step}, which is complete", flush=True)
    if continued and checkpoint is None:
        print(f"{out} has no complete checkpoint yet: starting at step 0", flush=True)
    return checkpoint


def save(
    engine: Any,
    out: Path,
    progress: Progress,
    world: World,
    *,
    keep: int,
    stage: int,
    device: str = "device",
    optimizer: OptimizerSpec,
    stay: Collection[int] = (),
) -> Path:
    """Save model, optimizer and schedule on all ranks; each rank hashes its files, and rank 0 writes the marker.

    The marker has the device of the optimizer's state, because DeepSpeed's Adam for the host stores another state than
    PyTorch's. It also has the names of the state tensors, by which the checkpoint is converted and grown. The last
    ``keep`` checkpoints are kept, and those of the steps in ``stay``.

    Returns:
        The folder of the checkpoint, ``out/checkpoints/step-N``.
    """
    import torch.distributed as dist

    root, tag = out / FOLDER, f"step-{progress.step}"
    if world.first:
        (root / tag / MARKER).unlink(missing_ok=True)  # first, so that a half-deleted checkpoint is not complete
        shutil.rmtree(root / tag, ignore_errors=True)
    dist.barrier()
    client = {"phigrow": asdict(progress) | {"groups": _group_names(engine)}}
    engine.save_checkpoint(str(root), tag=tag, client_state=client, save_latest=False)
    dist.barrier()
    parts = gather_objects(world, digests(root / tag, world.rank, world.size))
    if world.first:
        files = {name: digest for part in parts for name, digest in part.items()}
        content = {"progress": asdict(progress), "world_size": world.size, "stage": stage, "place": device}
        content |= {"optimizer": {"name": optimizer.name, "states": dict(optimizer.states)}}
        write_marker(root / tag, content, files)
        _prune(out, keep, stay)
    dist.barrier()
    return root / tag


def _prune(out: Path, keep: int, stay: Collection[int]) -> None:
    """Delete all but the last ``keep`` checkpoints and those that stay, and universal folders of deleted ones."""
    passing = [checkpoint for checkpoint in marked_checkpoints(out)[0] if checkpoint.progress.step not in stay]
    for old in passing[: -keep or None] if keep else []:
        (old.folder / MARKER).unlink()
        shutil.rmtree(old.folder)
    for converted in (out / UNIVERSAL).glob("*"):
        if not (out / FOLDER / converted.name / MARKER).is_file():
            (converted / MARKER).unlink(missing_ok=True)
            shutil.rmtree(converted)


def _group_names(engine: Any) -> list[list[str]]:
    """Return the names of the parameters in the optimizer's groups."""
    from phigrow.training.zero import parameter_groups

    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    return [[names[id(p)] for p in group if id(p) in names] for group in parameter_groups(engine)]


def check_fits(checkpoint: RunCheckpoint, world: World, stage: int, *, convert: bool, device: str = "device") -> None:
    """Refuse a checkpoint with another number of ranks, ZeRO stage or optimizer device, unless ``convert`` is set.

    Raises:
        GrowthError: the checkpoint does not fit.
    """
    if convert or checkpoint.fits(world.size, stage, device):
        return
    if (checkpoint.world_size, checkpoint.stage) == (world.size, stage):
        raise GrowthError(
            f"the checkpoint's optimizer state was {_DEVICES.get(str(checkpoint.optimizer_device), 'elsewhere')}, "
            f"but in this run it is {_DEVICES[device]}",
            where=str(checkpoint.folder),
            why="DeepSpeed's Adam for the host keeps its state in another form",
            fix="add --universal, which converts the checkpoint, or set offload_optimizer as it was",
        )
    raise GrowthError(
        f"the checkpoint was written by {ranks(checkpoint.world_size)} at ZeRO {checkpoint.stage}, but this run has "
        f"{ranks(world.size)} at ZeRO {stage}",
        where=str(checkpoint.folder),
        why="ZeRO cuts the optimizer's state by rank, and each stage does so differently",
        fix="add --universal, which converts the checkpoint, or run as it was written",
    )


def load(engine: Any, checkpoint: RunCheckpoint, run: ResolvedRun) -> Progress:
    """Load a checkpoint into an engine on all ranks, after its files have been checked.

    With the same ranks, ZeRO stage and offload the run continues to the bit. Otherwise the checkpoint is first
    converted to DeepSpeed's universal format, into ``out/universal``, and the run continues up to rounding.

    Raises:
        GrowthError: DeepSpeed does not load the checkpoint, or it cannot be converted.
    """
    world = run.world
    if checkpoint.fits(world.size, run.stage, run.optimizer_device):
        with restricted_pickles(), _mapped_weights(engine, run.stage):
            path, _ = engine.load_checkpoint(str(checkpoint.folder.parent), tag=checkpoint.folder.name)
        if path is None:
            raise GrowthError(
                "DeepSpeed did not load the checkpoint",
                where=str(checkpoint.folder),
                fix="delete this folder; the run then continues from the checkpoint before it",
            )
        return checkpoint.progress
    folder = checkpoint.folder.parent.parent / UNIVERSAL / checkpoint.folder.name
    if world.first:
        was = f"{ranks(checkpoint.world_size)} at ZeRO {checkpoint.stage}"
        print(f"converting the checkpoint of {was} for {ranks(world.size)} at ZeRO {run.stage}: {folder}", flush=True)
    on_rank_zero(world, lambda: universal.convert(checkpoint.folder, folder, checkpoint.marker), patient=True)
    engine_state.load(engine, folder, run.optimizer)
    return checkpoint.progress


@contextlib.contextmanager
def _mapped_weights(engine: Any, stage: int) -> Iterator[None]:
    """Map the file with all weights while the block runs, so that the ranks of a host share the pages that they read.

    Every rank reads it at stages 1 and 2, and copies from it. The other files are a rank's own. At stage 0 the file has
    the optimizer's state too, which torch may keep as it is, so nothing is mapped there.
    """
    from torch.utils.serialization import config

    reader = engine.checkpoint_engine
    read = reader.load

    def load(path: str, map_location: Any = None) -> Any:
        mapped = Path(path).name.endswith("model_states.pt") and zipfile.is_zipfile(path)
        with config.patch("load.mmap", mapped):  # type: ignore[attr-defined]
            return read(path, map_location=map_location)

    if stage in (1, 2):
        reader.load = load
    try:
        yield
    finally:
        if stage in (1, 2):
            del reader.load


def ranks(count: int) -> str:
    """Return a number of ranks in words, such as ``1 rank`` or ``2 ranks``."""
    return f"{count} rank" + "s" * (count != 1)


def how_to_continue(out: Path) -> str:
    """Return one sentence on how to continue a run that was interrupted, with the step of its last checkpoint."""
    complete = marked_checkpoints(out)[0]
    if not complete:
        return f"There is no complete checkpoint in {out}: the same command starts at step 0."
    return (
        f"The same command continues from the checkpoint of step {complete[-1].progress.step} in {out}; "
        "on fewer ranks, or more, add --universal."
    )
