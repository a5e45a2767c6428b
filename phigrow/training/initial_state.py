"""Initial state of a run: optimizer state that was grown with the model, and the position in the data.

The state is a universal folder (`phigrow.checkpoints.universal`) for the checkpoint of ``init``. Its ``state.json`` has
the plan that the state was grown by and the position in the data. Training reads nothing else about the growth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints import universal
from phigrow.checkpoints.integrity import damage, read_marker
from phigrow.checkpoints.provenance import PROVENANCE_FILE, read_provenance
from phigrow.corpus.blocks import DataSource
from phigrow.errors import GrowthError
from phigrow.files.foreign import recognise
from phigrow.files.untrusted import read_json_strict
from phigrow.training import engine_state
from phigrow.training.configuration import RunConfig
from phigrow.training.process import on_rank_zero
from phigrow.training.settings import SCRATCH
from phigrow.training.training_cost import InitSource

if TYPE_CHECKING:
    from phigrow.training.optimizer_spec import OptimizerSpec
    from phigrow.training.process import World


@dataclass(frozen=True)
class InitialState:
    """State that a run begins with.

    Attributes:
        optimizer: folder of the optimizer's state; None for a fresh optimizer.
        first: first step of the run in the order of the data.
        position: position of a stream of data.
        state: name of the way in which the moments were grown.
        seconds: time that the growth of the state took.
        step: step of the checkpoint from which the state was grown.
    """

    optimizer: Path | None = None
    first: int = 0
    position: dict[str, Any] | None = None
    state: str | None = None
    seconds: float = 0.0
    step: int | None = None


def initial_state_of(config: RunConfig, blocks: DataSource) -> InitialState:
    """Return the initial state of a run, from its keys ``init_optimizer`` and ``data_start``.

    Raises:
        GrowthError: there is no such state, it belongs to another growth than ``init``, or the position in the data is
            unknown.
    """
    if config.init_optimizer is None:
        return InitialState(first=_steps(config.data_start or 0, config))
    folder = Path(config.init_optimizer)
    content = _checked(config, folder)
    data, grown = content.get("data"), content["grown"]
    made = (grown["state"], float(content.get("seconds") or 0.0), grown.get("step"))
    if config.data_start is not None:
        same = data is not None and data["blocks"] == config.data_start
        return InitialState(
            folder, _steps(config.data_start, config), data["position"] if data and same else None, *made
        )
    if data is None:
        raise _unknown(folder, "it does not record how many blocks the run before it read")
    own = {"seed": config.seed, "data_part": config.data_part, "data_fingerprint": blocks.fingerprint}
    if different := [key for key, value in own.items() if data.get(key) != value]:
        changes = ", ".join(f"{key} ({data.get(key)!r}, now {own[key]!r})" for key in different)
        raise _unknown(folder, f"the run before it read in another order: {changes}")
    return InitialState(folder, _steps(data["blocks"], config), data["position"], *made)


def with_state(source: InitSource, initial: InitialState) -> InitSource:
    """Return the source of a run, with the name of its optimizer state and the time that growing the state took."""
    if initial.optimizer is None or source.growth is None:
        return source
    took = (source.expand_seconds or 0.0) + initial.seconds
    return replace(source, growth=source.growth | {"state": initial.state}, expand_seconds=took)


def load(engine: Any, folder: Path, world: World, optimizer: OptimizerSpec) -> None:
    """Check the files of a state and fill an engine with it, on every rank.

    Raises:
        GrowthError: files differ from those that were written; or as `engine_state.load_state`.
    """

    def check() -> None:
        if wrong := damage(folder, read_marker(folder)["files"]):
            raise GrowthError(
                "the optimizer state is damaged",
                where=str(folder),
                why="; ".join(wrong[:3]),
                fix="delete the folder and run 'phigrow grow-optimizer' again",
            )

    on_rank_zero(world, check, patient=True)
    engine_state.load_state(engine, folder, optimizer)


def _steps(blocks: int, config: RunConfig) -> int:
    """Return the number of this run's steps that read so many blocks."""
    steps, rest = divmod(blocks, config.batch)
    if rest:
        raise GrowthError(
            f"the run starts after {blocks:,} blocks of its data, which is not a multiple of its batch size "
            f"{config.batch}",
            where="data_start",
            fix=f"set batch to a divisor of {blocks}, or set data_start: {blocks - rest}",
        )
    return steps


def _checked(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Return the content of ``state.json``, after checking that the state belongs to the run's checkpoint."""
    try:
        read_marker(folder)
    except ValueError as error:
        foreign = recognise(folder)
        raise GrowthError(
            "the folder holds no optimizer state",
            where=str(folder.absolute()),
            why=f"it is {foreign.what}" if foreign else str(error),
            fix="give a folder that 'phigrow grow-optimizer' wrote",
        ) from error
    content = _content(folder)
    if not isinstance(content.get("grown"), dict):
        raise GrowthError(
            "the optimizer state was not grown",
            where=str(folder),
            fix="give a folder that 'phigrow grow-optimizer' wrote. To resume a run, repeat its command without "
            "init_optimizer",
        )
    path = Path(config.init) / PROVENANCE_FILE
    weights = read_provenance(path.parent)
    if config.init == SCRATCH or weights is None or weights.plan_hash != content["grown"].get("plan"):
        raise GrowthError(
            "the optimizer state was grown by another plan than the weights",
            where=f"{folder}, and {path if config.init != SCRATCH else 'init: scratch'}",
            why="their plans differ" if weights else f"the weights have no {PROVENANCE_FILE}",
            fix="give 'phigrow grow-optimizer' the folder that 'phigrow expand' wrote, and that folder as init",
        )
    return content


def _content(folder: Path) -> dict[str, Any]:
    return read_json_strict(folder / universal.STATE, "the optimizer's state")


def _unknown(folder: Path, why: str) -> GrowthError:
    return GrowthError(
        "the position in the data is not known",
        where=str(folder),
        why=why,
        fix="set data_start to the number of blocks to skip (0 starts at the beginning)",
    )
