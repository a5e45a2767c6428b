"""A run that goes on from another's optimizer: state that was grown with the model, and the place in the data.

The state is a universal folder (`phigrow.checkpoints.universal`) for the checkpoint of ``init``. Its ``state.json``
says where it comes from and where the data stood, and that is all that is read: training knows nothing of growth.
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
    """State that a run begins with: the optimizer's (None: fresh), and its first step in the order of the data.

    ``position`` is where a stream stood; ``state`` what was done with the moments, ``seconds`` what that took, and
    ``step`` that of the checkpoint which they come from.
    """

    optimizer: Path | None = None
    first: int = 0
    position: dict[str, Any] | None = None
    state: str | None = None
    seconds: float = 0.0
    step: int | None = None


def initial_state_of(config: RunConfig, blocks: DataSource) -> InitialState:
    """Return where a run begins, from its keys ``init_optimizer`` and ``data_start``.

    Raises:
        GrowthError: no such state, state of another growth than ``init``, or data in which nobody knows where to go on.
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
    ours = {"seed": config.seed, "data_part": config.data_part, "data_fingerprint": blocks.fingerprint}
    if different := [key for key, value in ours.items() if data.get(key) != value]:
        changes = ", ".join(f"{key} ({data.get(key)!r}, now {ours[key]!r})" for key in different)
        raise _unknown(folder, f"the run before it read in another order: {changes}")
    return InitialState(folder, _steps(data["blocks"], config), data["position"], *made)


def with_state(source: InitSource, initial: InitialState) -> InitSource:
    """Return the source of a run with the optimizer state that it starts with, and the time to grow that state."""
    if initial.optimizer is None or source.growth is None:
        return source
    took = (source.expand_seconds or 0.0) + initial.seconds
    return replace(source, growth=source.growth | {"state": initial.state}, expand_seconds=took)


def load(engine: Any, folder: Path, world: World, optimizer: OptimizerSpec) -> None:
    """Check the files of a state and fill an engine with it, on every rank.

    Raises:
        GrowthError: files that are not what was written; or as `engine_state.load_state`.
    """

    def check() -> None:
        if wrong := damage(folder, read_marker(folder)["files"]):
            raise GrowthError(
                "the optimizer state is damaged", where=str(folder), why="; ".join(wrong[:3]), fix="grow it again"
            )

    on_rank_zero(world, check, patient=True)
    engine_state.load_state(engine, folder, optimizer)


def _steps(blocks: int, config: RunConfig) -> int:
    """Steps of this run's batch that make up blocks."""
    steps, rest = divmod(blocks, config.batch)
    if rest:
        raise GrowthError(
            f"the run before read {blocks:,} blocks, which is not a multiple of the batch size {config.batch}",
            where="data_start",
            fix=f"give a batch that divides them, or data_start: {blocks - rest}",
        )
    return steps


def _checked(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The content of ``state.json``, if the state belongs to the run's checkpoint."""
    try:
        read_marker(folder)
    except ValueError as error:
        raise GrowthError(
            "the folder holds no optimizer state",
            where=str(folder.absolute()),
            why=str(error),
            fix="give the folder of 'phigrow grow-optimizer'",
        ) from error
    content = _content(folder)
    if not isinstance(content.get("grown"), dict):
        raise GrowthError(
            "the optimizer state was not grown",
            where=str(folder),
            fix="give the folder of 'phigrow grow-optimizer'; a run that only goes on finds its checkpoint itself",
        )
    path = Path(config.init) / PROVENANCE_FILE
    weights = read_provenance(path.parent)
    if config.init == SCRATCH or weights is None or weights.plan_hash != content["grown"].get("plan"):
        raise GrowthError(
            "the optimizer state was grown by another plan than the weights",
            where=f"{folder}, and {path if config.init != SCRATCH else 'init: scratch'}",
            why="their plans differ" if weights else f"the weights have no {PROVENANCE_FILE}",
            fix="grow both by one plan: 'phigrow grow-optimizer' takes the folder of 'phigrow expand'",
        )
    return content


def _content(folder: Path) -> dict[str, Any]:
    return read_json_strict(folder / universal.STATE, "the optimizer's state")


def _unknown(folder: Path, why: str) -> GrowthError:
    return GrowthError(
        "the position in the data is not known",
        where=str(folder),
        why=why,
        fix="give data_start: the blocks to pass over (0 starts at the beginning)",
    )
