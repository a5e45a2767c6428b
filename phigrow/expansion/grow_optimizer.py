"""Grow the optimizer's state with the model: from a DeepSpeed checkpoint to a universal one of the destination.

The masters take the plan's legs and the moments those of gradients (`phigrow.growth.moments`), tensor by tensor: in
memory there is one destination tensor and blocks of its source. The output has the layout of
`phigrow.checkpoints.universal`, which training reads into any number of ranks at any ZeRO stage.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phigrow.checkpoints import universal
from phigrow.checkpoints.bits import is_finite, tensor_of
from phigrow.checkpoints.integrity import MARKER, damage, digest, read_marker, write_marker
from phigrow.checkpoints.provenance import Provenance
from phigrow.checkpoints.run_checkpoints import RUN_FILE, UNIVERSAL, marked_checkpoints
from phigrow.checkpoints.stored_model import StoredModel
from phigrow.errors import GrowthError
from phigrow.expansion.progress_bar import progress_bar
from phigrow.expansion.provenance import installed_version
from phigrow.expansion.write_tensors import block_rows
from phigrow.files.atomic import atomic_json
from phigrow.files.foreign import recognise
from phigrow.files.output import check_replaceable
from phigrow.files.paths import user_path
from phigrow.files.staged_folder import StagedFolder
from phigrow.files.untrusted import read_json_strict
from phigrow.growth.lift import InMemory, Lift, SourceTensor
from phigrow.growth.method import Method
from phigrow.growth.moments import STATES, moment_recipe, moment_source
from phigrow.growth.plan import Plan
from phigrow.growth.planner import check_method_of
from phigrow.growth.recipe import TensorRecipe
from phigrow.inspection.plan_file import read_plan_file

if TYPE_CHECKING:
    import torch

SAME_WEIGHTS = 0.005
"""Largest distance of lifted masters from grown weights, relative to these: that of rounding to bfloat16 is 0.0017, and
weights may have been rounded twice."""


def grow_optimizer(
    checkpoint: str | Path,
    grown: str | Path,
    out: str | Path | None = None,
    *,
    state: str = "scale",
    overwrite: bool = False,
    progress: bool = False,
    method: str | Path | Method | None = None,
) -> Path:
    """Grow a checkpoint's fp32 masters and Adam's moments by the plan of a grown folder.

    Args:
        checkpoint: the folder of a run (its newest checkpoint is taken), one of its ``checkpoints/step-N``, any folder
            that DeepSpeed's ``save_checkpoint`` wrote at ZeRO 1 to 3, on any number of ranks, or an earlier result of
            this function.
        grown: the folder that `phigrow.expand` made from that checkpoint's weights.
        out: the new folder, by default ``GROWN-optimizer``. It is written completely or not at all. The hidden folder
            of a killed run, beside it, is continued.
        state: the way to grow moments: ``scale``, ``copy``, ``asymmetric`` or ``reset``; see `phigrow.growth.moments`.
        overwrite: replace an existing ``out``.
        progress: show a progress bar.
        method: check first that this method made the plan, see `phigrow.growth.planner.check_method_of`.

    Returns:
        The new folder: ``zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt`` (float32), ``state.json`` and
        ``complete.json``. A run starts from it with ``init: GROWN`` and ``init_optimizer: OUT``.

    Raises:
        GrowthError: a checkpoint that is damaged, of another model, or not the one whose weights were grown; state that
            is not finite or was offloaded to NVMe; an ``out`` that exists.

    >>> grow_optimizer("runs/small", "small-to-large", state="scale")  # doctest: +SKIP
    PosixPath('small-to-large-optimizer')
    """
    began = time.perf_counter()
    grown, made = user_path(grown), read_plan_file(grown)
    plan = made.plan
    if method is not None:
        check_method_of(plan, method)
    named = grown if grown.name not in ("", "..") else grown.resolve()
    out = user_path(out) if out is not None else named.with_name(named.name + "-optimizer")
    if out.exists() and not overwrite:
        raise GrowthError("the output folder exists", where=str(out), fix="choose another --out, or --overwrite")
    check_replaceable(out, [universal.STATE], "a grown optimizer state")
    check_state(plan, state)
    source = _find_checkpoint(user_path(checkpoint))
    _check_step(source, made.provenance)
    identity = {
        "phigrow": installed_version("phigrow"),
        "plan": plan.hash,
        "state": state,
        "checkpoint": str(source.folder.resolve()),
        "files": source.marker["files"] if source.marker else source.sizes(),
    }
    with StagedFolder(out, identity) as unfinished:
        work = unfinished.hidden / "source"
        try:
            _check_space(plan, source, unfinished.path, work)
            folder = _as_universal(source, work, progress)
            with StoredModel(grown) as weights:
                files = _Writer(plan, folder, weights, unfinished, state).write(progress)
            content = _content(source, folder, plan, state)
            content["seconds"] = round(time.perf_counter() - began, 3)
            atomic_json(unfinished.path / universal.STATE, content)
            files[universal.STATE] = digest(unfinished.path / universal.STATE)
            write_marker(unfinished.path, {"universal": True, "grown": content["grown"]}, files)
            unfinished.finish(overwrite=overwrite)
        except KeyboardInterrupt:
            raise  # finished files stay for the next run, as after a kill
        except OSError as error:
            unfinished.discard()
            raise GrowthError(
                "a file cannot be read or written",
                where=str(out),
                why=str(error),
                fix="check the permissions of the checkpoint, or choose another --out",
            ) from error
        except BaseException:
            unfinished.discard()
            raise
    return out


def check_state(plan: Plan, state: str) -> None:
    """Refuse a state that a plan's moments cannot have.

    Raises:
        GrowthError: an unknown state; any but ``reset`` for a learned plan; or any but ``scale`` and ``reset`` for a
            plan that rotates the stream.
    """
    if state not in STATES:
        raise GrowthError(f"state {state!r} is unknown", where="state", fix=f"choose one of {', '.join(STATES)}")
    if state == "reset":
        return
    if plan.maps is not None:
        raise GrowthError(
            f"moments cannot be grown by a learned plan ({plan.method})",
            where="state",
            why="learned matrices have no inverse, so there is no rule for gradients",
            fix="grow with state reset: fp32 masters without moments",
        )
    mixed = [name for name, axis in plan.axes.items() if axis.dense is not None]
    if mixed and state != "scale":
        raise GrowthError(
            f"state {state} does not work with a plan that mixes coordinates ({plan.method})",
            where=f"axis {mixed[0]}",
            why="a mixture is no copy",
            fix="grow with state scale, or reset",
        )


def _check_space(plan: Plan, source: SourceCheckpoint, place: Path, work: Path) -> None:
    def values(shapes: Iterator[tuple[int, ...]]) -> int:
        return sum(map(math.prod, shapes))

    kinds = 1 + len(source.states)
    needed = 4 * kinds * values(recipe.shape for recipe in plan.recipes())
    if not source.is_universal and not source.converted.is_dir() and not work.is_dir():
        # The conversion needs the state's space twice.
        needed += 8 * kinds * values(iter(plan.table.state_shapes(plan.src_config).values()))
    there = sum(file.stat().st_blocks * 512 for file in place.rglob("*"))
    free = shutil.disk_usage(place).free + there
    if needed > free:
        raise GrowthError(
            f"too little space is left: the optimizer state needs {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free",
            where=str(place.parent),
            fix="choose another --out",
        )


class _Writer:
    """Writes the state of every tensor, leaving out the files that an earlier run of the same growth wrote."""

    def __init__(self, plan: Plan, folder: Path, weights: StoredModel, unfinished: StagedFolder, state: str) -> None:
        self.plan, self.folder, self.weights, self.unfinished, self.state = plan, folder, weights, unfinished, state
        self.live = _live_names(plan, folder)
        self.shapes = plan.table.state_shapes(plan.src_config)
        self.step = 0.0 if state == "reset" else adam_step(folder)
        self.powers: dict[str, int] = universal.read_state(folder)["states"]
        self.files: dict[str, Any] = {}

    def write(self, progress: bool) -> dict[str, Any]:
        """Write the state of every tensor, and return name -> digest of every file."""
        import torch

        recipes = list(self.plan.recipes())
        kinds = {recipe.name: ("fp32", *self._states(recipe.source)) for recipe in recipes}
        label = f"{self.state}: {'resuming' if self.unfinished.done else 'writing'} the state of {len(recipes)} tensors"
        with (
            progress_bar(label, sum(map(len, kinds.values())), progress) as advance,
            ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        ):
            for recipe in recipes:
                for kind in kinds[recipe.name]:
                    self._keep(recipe, kind, partial(self._value, recipe, kind, pool))
                    advance(None)
                self._keep(recipe, "step", partial(torch.tensor, self.step))
        return self.files

    def _keep(self, recipe: TensorRecipe, kind: str, make: Callable[[], torch.Tensor]) -> None:
        name = f"zero/{self.live.get(recipe.name, recipe.name)}/{kind}.pt"
        path = self.unfinished.path / name
        known = self.unfinished.done.get((name, 0))
        if known is not None and path.is_file() and (written := digest(path))["xxh3_128"] == known:
            self.files[name] = written
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        save_value(make(), path)
        self.files[name] = digest(path)
        self.unfinished.record(name, 0, self.files[name]["xxh3_128"])

    def _value(self, recipe: TensorRecipe, kind: str, pool: ThreadPoolExecutor) -> torch.Tensor:
        """A destination tensor, whole, float32."""
        import torch

        master = kind == "fp32"
        how = recipe if master else moment_recipe(recipe, self.plan, kind, self.state, power=self.powers[kind])
        if how is None:
            return torch.zeros(recipe.shape)
        tensors: dict[str, SourceTensor] = {name: self._source(name, kind) for name in how.sources}
        if not master:
            tensors[recipe.source] = moment_source(recipe, kind, self._source, power=self.powers[kind])
        lift = Lift(how, tensors, "float32")
        out = np.empty(recipe.shape, dtype=np.uint32)

        def fill(block: tuple[int, int]) -> None:
            out[slice(*block)] = lift.rows(*block)

        list(pool.map(fill, block_rows(recipe.shape)))
        if not is_finite(out, "float32"):
            raise GrowthError(
                "the optimizer state holds NaN or infinities",
                where=f"{kind} of {recipe.name}",
                fix="take a checkpoint from before the training diverged",
            )
        value = tensor_of(out, "float32")
        if master:
            _check_weights(value, self.weights, recipe)
        if kind == "exp_avg_sq" and "exp_avg" in self.powers and how.is_dense:
            # The mean square of a mixture is unknown, but it is at least the square of its mean.
            value = torch.maximum(value, self._value(recipe, "exp_avg", pool).square())
        return value

    def _states(self, name: str) -> tuple[str, ...]:
        """Return the states that a tensor of the source has."""
        return universal.states_of(self.folder, self.live.get(name, name))

    def _source(self, name: str, kind: str) -> InMemory:
        """A tensor of the source, mapped from its file.

        Muon's matrices and AdamW's biases average gradients in states of different names. For a tensor without the
        state of that name, its state of the same power is read.
        """
        if kind != "fp32" and kind not in (own := self._states(name)):
            kind = next((state for state in own if self.powers[state] == self.powers[kind]), kind)
        read = universal.stored(self.folder, self.live.get(name, name), kind)
        return InMemory(read.float().reshape(self.shapes[name]))


def _live_names(plan: Plan, folder: Path) -> dict[str, str]:
    """Return stored name -> name in the folder.

    Raises:
        GrowthError: the folder has the state of another model.
    """
    there = universal.parameters(folder)
    expected, shapes = plan.table.state_shapes(plan.src_config), {}
    for model_name in there:
        name, shape = plan.table.stored_name(model_name), tuple(universal.stored(folder, model_name, "fp32").shape)
        flat = name in expected and math.prod(shape) == math.prod(expected[name])  # ZeRO 3 stores values flat
        shapes[name] = expected[name] if flat else shape
    try:
        plan.table.check_tensors(plan.src_config, shapes, where=str(folder))
    except GrowthError as error:
        raise GrowthError(
            "the checkpoint is not of the model that was grown",
            where=error.where,
            why=f"{error.what}" + (f": {error.why}" if error.why else ""),
            fix="give the checkpoint whose weights were expanded",
        ) from error
    return {plan.table.stored_name(model_name): model_name for model_name in there}


def adam_step(folder: Path) -> float:
    """Return the number of Adam's steps in a universal folder."""
    return float(universal.read_state(folder)["adam_step"])


def _check_weights(value: torch.Tensor, weights: StoredModel, recipe: TensorRecipe) -> None:
    """Compare lifted masters with the grown weights, which are a rounding of them.

    Raises:
        GrowthError: the grown weights were grown from other weights.
    """
    stored, apart, size = weights.tensors[recipe.name], 0.0, 0.0
    for start, stop in block_rows(recipe.shape):
        block = stored.rows(start, stop).float()
        apart += float((block - value[start:stop]).square().sum())
        size += float(block.square().sum())
    if math.sqrt(apart) > SAME_WEIGHTS * math.sqrt(size):
        raise GrowthError(
            "the grown weights do not come from this checkpoint",
            where=recipe.name,
            why=f"its masters, grown by the same plan, are off by {math.sqrt(apart / size) if size else apart:.2g} "
            "of the weights",
            fix="expand the export of this checkpoint, or give the checkpoint of that export",
        )


def save_value(value: torch.Tensor, path: Path) -> None:
    """Write one tensor of the state as DeepSpeed's universal format has it, and wait until the disk has it."""
    import torch

    with path.open("wb") as file:
        torch.save({"param": value} if value.ndim else value, file)
        file.flush()
        os.fsync(file.fileno())


def _content(source: SourceCheckpoint, folder: Path, plan: Plan, state: str) -> dict[str, Any]:
    """Return the content of ``state.json``: Adam's step, the loss scale, the origin, and the position in the data."""
    former = universal.read_state(folder)
    return {
        "states": former["states"],
        "adam_step": 0.0 if state == "reset" else former["adam_step"],
        "loss_scaler": former["loss_scaler"],
        "grown": {"plan": plan.hash, "method": plan.method, "state": state, "step": source.step},
        "data": former.get("data") or _position_in_data(source),
    }


@dataclass(frozen=True)
class SourceCheckpoint:
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
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}

    @property
    def states(self) -> dict[str, int]:
        """State tensors of its optimizer -> power of the gradient that each averages."""
        states: dict[str, int] = ((self.marker or {}).get("optimizer") or {}).get("states", universal.ADAM_STATES)
        return states

    @property
    def step(self) -> int | None:
        return self.marker["progress"]["step"] if self.marker and "progress" in self.marker else None


def _find_checkpoint(path: Path) -> SourceCheckpoint:
    """Return the checkpoint of a path. Its files are checked if phigrow wrote them."""
    if not (path / MARKER).is_file():
        finished, damaged = marked_checkpoints(path)
        latest = path / "latest"
        if finished:
            path = finished[-1].folder
        elif damaged:
            raise _damaged(damaged[-1].folder, damaged[-1].why)
        elif latest.is_file():  # DeepSpeed's own; it names the newest folder beside it
            path = path / Path(latest.read_text(encoding="utf-8").strip()).name
    if (path / MARKER).is_file():
        try:
            marker = read_marker(path)
        except ValueError as error:
            raise _damaged(path, str(error)) from error
        if wrong := damage(path, marker["files"]):
            raise _damaged(path, "; ".join(wrong[:3]))
        return SourceCheckpoint(path, marker)
    if not any(path.glob("*_optim_states.pt")):
        foreign = recognise(path)
        raise GrowthError(
            "there is no checkpoint with an optimizer's state",
            where=str(path),
            why=f"it is {foreign.what}" if foreign else None if path.is_dir() else "there is no such folder",
            fix="give the folder of a run that saved one (save_every, or keep), or one that DeepSpeed wrote",
        )
    return SourceCheckpoint(path, None)


def _damaged(folder: Path, why: str) -> GrowthError:
    return GrowthError(
        "the checkpoint is damaged", where=str(folder), why=why, fix="give another checkpoint of the run, or a copy"
    )


def _check_step(source: SourceCheckpoint, provenance: Provenance | None) -> None:
    """Refuse a checkpoint whose step differs from that of the grown weights, if both are known."""
    steps = ((provenance.source_training if provenance else None) or {}).get("steps")
    if steps is not None and source.step is not None and not source.is_universal and steps != source.step:
        raise GrowthError(
            f"the checkpoint is of step {source.step}, but the weights were grown from step {steps}",
            where=str(source.folder),
            fix="expand the export of this checkpoint, or give the checkpoint of that step",
        )


def _as_universal(source: SourceCheckpoint, work: Path, progress: bool) -> Path:
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
    except Exception as error:  # DeepSpeed and torch may raise any exception for an unexpected file
        raise GrowthError(
            "the checkpoint cannot be converted to DeepSpeed's universal format",
            where=str(source.folder),
            why=f"{type(error).__name__}: {error}",
            fix="give one that is whole: ZeRO 1 to 3 with Adam is read, phigrow's own at ZeRO 0 too",
        ) from error
    return work


def _position_in_data(source: SourceCheckpoint) -> dict[str, Any] | None:
    """Return the position of the run in its data, so that the grown run continues there; None if it is unknown."""
    path = source.folder.parent.parent / RUN_FILE
    if not source.marker or "progress" not in source.marker or not path.is_file():
        return None
    run, progress = read_json_strict(path, "the settings of a run"), source.marker["progress"]
    blocks = progress.get("blocks") or None
    if blocks is None and isinstance(run.get("batch"), int):
        blocks = progress["step"] * run["batch"]
    if blocks is None:
        return None
    known = {key: run.get(key) for key in ("seed", "data_part", "data_fingerprint", "mixture")}
    return {"blocks": blocks, "position": progress.get("data"), **known}
