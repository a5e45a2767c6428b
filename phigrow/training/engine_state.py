"""Fill a DeepSpeed engine from a universal folder, at any ZeRO stage and on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phigrow.checkpoints import universal
from phigrow.errors import GrowthError
from phigrow.models.families import family_of
from phigrow.training.optimizer_spec import OptimizerSpec


def load(engine: Any, folder: Path, optimizer: OptimizerSpec) -> None:
    """Fill an engine as `load_state` does, and restore the schedule and DeepSpeed's counters.

    Raises:
        GrowthError: as `load_state`.
    """
    state = load_state(engine, folder, optimizer)
    engine.lr_scheduler.load_state_dict(state["lr_scheduler"])
    for group, lr in zip(engine.basic_optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
    for key, value in state["counters"].items():
        setattr(engine, key, value)


def load_state(engine: Any, folder: Path, optimizer: OptimizerSpec) -> dict[str, Any]:
    """Fill an engine on every rank from a universal folder whose files have been checked.

    Weights, masters and state tensors are copied parameter by parameter from files mapped into memory, so a rank reads
    little more than its share. The optimizer's step and the loss scale are restored, too.

    Returns:
        The content of ``state.json``.

    Raises:
        GrowthError: the state belongs to another optimizer, a parameter is missing or has another size, or the
            optimizer is offloaded to NVMe.
    """
    from phigrow.training import zero

    if engine.zero_nvme_offload_optimizer():
        raise GrowthError(
            "an optimizer offloaded to NVMe cannot be loaded from another number of ranks or another ZeRO stage",
            where=str(folder),
            fix="resume with offload_optimizer on cpu, or with the ranks and stage that wrote the checkpoint",
        )
    state = universal.read_state(folder)
    if set(state["states"]) != set(optimizer.states):
        raise GrowthError(
            f"the optimizer state has {', '.join(state['states'])}, but {optimizer.name} needs "
            f"{', '.join(optimizer.states)}",
            where=str(folder),
            why="another optimizer wrote this state",
            fix="set optimizer to the one that wrote it",
        )
    names = names_in(folder, engine.module)
    zero.make_states(engine, optimizer.states_of)
    with zero.writing_states(engine.optimizer):
        masters = zero.plain_masters(engine.optimizer)
        momenta = zero.momentum_parts(engine)
        for name, parameter in engine.module.named_parameters():
            shape, kinds = zero.full_shape(parameter), ("fp32", *optimizer.states_of(vars(parameter)))
            values = {key: universal.stored_in_shape(folder, names[name], key, shape) for key in kinds}
            for part, start in momenta.get(id(parameter), ()):
                part.copy_(values["momentum_buffer"].flatten()[start : start + part.numel()])
            if id(parameter) in momenta:
                del values["momentum_buffer"]
            zero.fill_states(parameter, values, engine.basic_optimizer, masters)
    for entry in engine.basic_optimizer.state.values():
        if "step" in entry:
            _set_step(entry, state["adam_step"])
    zero.restore_loss_scale(engine.optimizer, state["loss_scaler"])
    return state


def names_in(folder: Path, model: Any) -> dict[str, str]:
    """Return name of a parameter in the model -> in a universal folder.

    Raises:
        GrowthError: the folder has a parameter that the model does not have.
    """
    family = family_of(model.config.to_dict(), "the model")
    there = set(universal.parameters(folder))
    names = {name: family.name_among(name, there) for name, _ in model.named_parameters()}
    if extra := sorted(there - set(names.values())):
        raise GrowthError(
            f"the optimizer state has a parameter that the model does not have: {extra[0]}",
            where=str(folder),
            why="it is the state of another model, such as one whose head is not tied to its embedding",
            fix="give the state that belongs to the weights of init",
        )
    return names


def _set_step(entry: dict[str, Any], step: float) -> None:
    if hasattr(entry["step"], "fill_"):
        entry["step"].fill_(step)
    else:
        entry["step"] = int(step)
