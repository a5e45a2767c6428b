"""DeepSpeed's internals: where each ZeRO stage keeps a parameter, its fp32 master and the optimizer's state.

This is the only module that knows them. At stage 3 a parameter is partitioned: each rank holds a flat part of it, the
last ones padded. At stages 1 and 2 parameters are complete, and a rank holds flat fragments of their masters. Without
ZeRO, DeepSpeed's bf16 optimizer keeps complete masters beside the parameters, and an fp32 run has none.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from phigrow.errors import GrowthError

BLOCK = 1 << 22
"""Values of a stored tensor that a rank reads at once, 16 MiB in fp32."""


class SourceTensor(Protocol):
    """A tensor that is read by rows, or by ranges of its flattened values."""

    @property
    def name(self) -> str:
        """Its name, for messages."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The data type of its values."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``."""
        ...

    def values(self, start: int, stop: int) -> Tensor:
        """Values ``start`` to ``stop`` of all, flat."""
        ...


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Return the shape of a parameter, of which this rank may hold a part."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_partitioned(parameter: Any) -> bool:
    """Return true at stage 3, where this rank holds a part of the parameter."""
    return hasattr(parameter, "ds_id")


@contextlib.contextmanager
def gathered(parameter: nn.Parameter, *, write: bool = False) -> Iterator[None]:
    """Make a parameter complete on every rank while the block runs; with ``write``, rank 0's changes are kept."""
    if not is_partitioned(parameter):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0 if write else None):
        yield


def fill_parameter(parameter: Any, tensor: SourceTensor) -> None:
    """Copy a tensor into a parameter, in blocks; at stage 3 each rank reads its own part of the tensor, and no more."""
    if not is_partitioned(parameter):
        rows = max(1, BLOCK // max(1, math.prod(tensor.shape[1:])))
        for start in range(0, tensor.shape[0], rows):
            stop = min(start + rows, tensor.shape[0])
            parameter[start:stop].copy_(tensor.rows(start, stop))
    elif _has_plain_partition(parameter):
        parameter.ds_tensor.copy_(_own_part(parameter, tensor))
    else:  # its part is in a file (NVMe) or in several forms (ZeRO++), so DeepSpeed must partition it
        with gathered(parameter, write=True):
            if parameter.numel() and torch.distributed.get_rank() == 0:
                parameter.copy_(tensor.rows(0, tensor.shape[0]))


def fill_master(parameter: Any, optimizer: Any, tensor: SourceTensor) -> None:
    """Copy a tensor into this rank's part of a parameter's fp32 master.

    Raises:
        GrowthError: the master belongs to another parameter, or is stored in a place that phigrow does not know.
    """
    if is_partitioned(parameter):
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, _own_part(parameter, tensor).float())
    elif hasattr(parameter, "_hp_mapping"):
        if (mapping := parameter._hp_mapping) is not None:  # None: all of it belongs to other ranks
            part, master = mapping.lp_fragment_address, mapping.hp_fragment
            held = parameter.detach().flatten()[part.start : part.start + part.numel]
            if not torch.equal(master, held.to(master)):
                raise GrowthError(
                    "a master differs from its weight",
                    where=tensor.name,
                    why="DeepSpeed makes masters from the weights, so this one is another parameter's",
                    fix="remove settings that reorder parameters from the DeepSpeed file, or choose another ZeRO stage",
                )
            master.copy_(tensor.values(part.start, part.start + part.numel))
    elif (unpartitioned := plain_masters(optimizer).get(id(parameter))) is not None:
        unpartitioned.copy_(tensor.rows(0, tensor.shape[0]))
    else:
        raise GrowthError(
            "a parameter has no fp32 master",
            where=f"{tensor.name} under {type(optimizer).__name__}",
            why="training would start from weights rounded to " + str(parameter.dtype).removeprefix("torch."),
            fix="choose another ZeRO stage, or store the checkpoint in the dtype of the run",
        )


def plain_masters(optimizer: Any) -> dict[int, Any]:
    """Return the complete fp32 masters of a bf16 run without ZeRO, by the identity of their parameters."""
    groups = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False)
    return {id(low): high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}


def full_value(parameter: nn.Parameter, optimizer: Any, *, master: bool) -> Tensor | None:
    """Return a complete parameter, on the CPU of rank 0 (other ranks may get None); with ``master`` its fp32 master.

    Every rank must call this for the same parameters in the same order.
    """
    if master:
        if (value := plain_masters(optimizer).get(id(parameter))) is not None:
            copied: Tensor = value.detach().cpu()
            return copied
        if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer"):
            from deepspeed.utils import safe_get_full_fp32_param

            full: Tensor | None = safe_get_full_fp32_param(parameter)
            if full is not None:
                return full.detach().cpu().reshape(full_shape(parameter))
    with gathered(parameter):
        return parameter.detach().cpu().clone() if torch.distributed.get_rank() == 0 else None


def flat_masters(optimizer: Any) -> list[Tensor]:
    """Return the flat tensors that hold this rank's masters at stages 1 to 3; empty without ZeRO.

    Raises:
        GrowthError: they lie in files.
    """
    flats: list[Tensor] = []
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
        flats = flats or list(getattr(optimizer, name, []))
    if any(flat is None or not flat.numel() for flat in flats):
        raise GrowthError(
            "learning rates for copied and fresh values require masters in memory, but they are offloaded to NVMe",
            where="fresh_lr, fresh_warmup, copied_lr",
            fix="do not offload to NVMe, or leave these settings out",
        )
    return flats


def write_master_part(parameter: Any, values: Tensor) -> None:
    """Write this rank's part of the flat values of a parameter into its masters, at stages 1 to 3."""
    if is_partitioned(parameter):
        from deepspeed.utils import safe_set_local_fp32_param

        length = parameter.ds_tensor.ds_numel
        start = min(length * parameter.ds_zero_partition_rank, len(values))
        own = values[start : start + length].float()
        safe_set_local_fp32_param(parameter, torch.nn.functional.pad(own, (0, length - len(own))))
    elif (mapping := parameter._hp_mapping) is not None:
        part = mapping.lp_fragment_address
        mapping.hp_fragment.copy_(values[part.start : part.start + part.numel])


def parameter_groups(engine: Any) -> list[list[Any]]:
    """Return the parameters of the optimizer's groups, in order; a checkpoint without ZeRO has them in this order."""
    groups: list[list[Any]] | None = getattr(engine.optimizer, "fp16_groups", None)
    return [group["params"] for group in engine.basic_optimizer.param_groups] if groups is None else groups


def make_states(engine: Any, states_of: Callable[[Mapping[str, Any]], Mapping[str, int]]) -> None:
    """Make the missing state tensors, which an optimizer otherwise makes at its first step, and link them.

    At some stages DeepSpeed takes an empty step when it makes an engine, so they exist already.
    """
    optimizer, base = engine.optimizer, engine.basic_optimizer
    counts_in_tensors = type(getattr(base, "aux_optimizer", None) or base).__module__.startswith("torch.")
    on_device = any(group.get("fused") or group.get("capturable") for group in base.param_groups)
    for parameter, marks, index in _stepped_parameters(engine):
        entry, names = base.state[parameter], list(states_of(marks))
        if names[0] in entry:
            continue
        if marks.get("use_muon"):
            size = parameter.numel()
            if _keeps_matrices(optimizer):
                size = sum(whole.numel() for whole in optimizer.params_in_partition[index])
            entry["momentum_buffer"] = torch.zeros(size, dtype=torch.float32, device=parameter.device)
            continue
        zero = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        entry["step"] = zero if counts_in_tensors else 0  # DeepSpeed's Adam counts in int
        entry |= {name: torch.zeros_like(parameter.data, dtype=torch.float32) for name in names}
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()  # stages 1 and 2 link states to parameters at the first step


def check_muon(engine: Any) -> None:
    """Refuse an engine in which DeepSpeed would not orthogonalise the update of every parameter that is Muon's.

    Several versions of DeepSpeed train such parameters by plain gradients without a message (its issue 8441, and pull
    requests 8438 and 8442).

    Raises:
        GrowthError: at least one would not be orthogonalised.
    """
    optimizer = engine.optimizer
    marked = [parameter for parameter in engine.module.parameters() if getattr(parameter, "use_muon", False)]
    served: list[Any] = []
    if hasattr(optimizer, "sub_groups_using_muon"):  # stage 3
        for group, uses_muon in zip(optimizer.fp16_groups, optimizer.sub_groups_using_muon, strict=True):
            served += group if uses_muon else []
    elif hasattr(optimizer, "_muon_exchange_layouts"):  # bf16 at stage 1
        for group, layout in zip(optimizer.bf16_groups, optimizer._muon_exchange_layouts, strict=True):
            served += [] if layout is None else group
    elif hasattr(optimizer, "_is_muon_group"):  # stages 1 and 2
        for group in optimizer.bit16_groups:
            served += group if len(group) and optimizer._is_muon_group(group) else []
    if {id(parameter) for parameter in served} != {id(parameter) for parameter in marked} or not marked:
        raise GrowthError(
            f"DeepSpeed would orthogonalise the updates of {len(served)} of {len(marked)} matrices.",
            where="optimizer muon",
            why="This version of DeepSpeed applies Muon in another place, or not at all.",
            fix="Install the version that phigrow requires, or use optimizer: adamw.",
        )


def run_muon_eagerly(engine: Any) -> None:
    """Run Muon's update without compiling it: DeepSpeed asks for compilation, which a short run does not earn back."""
    eagerly = torch.compiler.set_stance("force_eager")
    for name in ("backward", "step"):
        setattr(engine, name, eagerly(getattr(engine, name)))


def _stepped_parameters(engine: Any) -> Iterator[tuple[Any, Mapping[str, Any], int]]:
    """Yield each tensor that the inner optimizer steps, with the marks of its group and the group's number."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3 empties the optimizer's groups
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            group = optimizer.fp16_groups[index]
            yield flat, vars(group[0]) if group else {}, index
        return
    for index, group in enumerate(engine.basic_optimizer.param_groups):
        for parameter in group["params"]:
            yield parameter, group, index


def _keeps_matrices(optimizer: Any) -> bool:
    """Return true where ranks keep the momentum of complete matrices: stages 1 and 2, except bf16 at stage 1."""
    return hasattr(optimizer, "_is_muon_group") and hasattr(optimizer, "params_in_partition")


def momentum_parts(engine: Any) -> dict[int, list[tuple[Tensor, int]]]:
    """Return where this rank keeps Muon's momentum at stages 1 and 2, by the identity of parameters.

    Each entry is a view of the optimizer's buffer, and the position of its first value in the flattened parameter.
    DeepSpeed does not link these buffers to parameters. At stage 3 it does, and the result is empty.
    """
    optimizer, out = engine.optimizer, {}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return {}
    for index, group in enumerate(engine.basic_optimizer.param_groups):
        if not group.get("use_muon") or engine.optimizer is engine.basic_optimizer:
            continue
        buffer = engine.basic_optimizer.state[group["params"][0]]["momentum_buffer"]
        if _keeps_matrices(optimizer):
            start = 0
            for parameter in optimizer.params_in_partition[index]:
                out[id(parameter)] = [(buffer[start : start + parameter.numel()], 0)]
                start += parameter.numel()
            everyone = optimizer.bit16_groups[index]
        else:
            everyone = optimizer.bf16_groups[index]
            for parameter in everyone:
                if (mapping := parameter._hp_mapping) is not None:
                    place = mapping.hp_fragment_address
                    view = buffer[place.start : place.start + place.numel]
                    out[id(parameter)] = [(view, mapping.lp_fragment_address.start)]
        for parameter in everyone:
            out.setdefault(id(parameter), [])
    return out


@contextlib.contextmanager
def writing_states(optimizer: Any) -> Iterator[None]:
    """Let parameters and states be written while the block runs: at stage 3 no parameter stays complete."""
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    yield
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()


def fill_states(parameter: Any, values: dict[str, Tensor], base: Any, masters: dict[int, Any]) -> None:
    """Fill a parameter, its master (``fp32``) and its state tensors with this rank's parts of complete values.

    Args:
        parameter: of the model.
        values: ``fp32`` and one tensor for each state, each of the full shape.
        base: the optimizer inside DeepSpeed's.
        masters: as `plain_masters` returns them.
    """
    states = [key for key in values if key != "fp32"]
    if is_partitioned(parameter):  # its own setter for complete values fails where the last rank's part is padded
        length = parameter.ds_tensor.numel()
        start = length * parameter._z3_optimizer._get_param_partition_rank(parameter)
        for key, value in values.items():
            mine = value.flatten()[start : start + length]
            mine = torch.nn.functional.pad(mine, (0, length - len(mine)))
            parameter._z3_optimizer.set_local_hp_param(mine, parameter, None if key == "fp32" else key)
            if key == "fp32":
                parameter.ds_tensor.data.copy_(mine)
        return
    parameter.data.copy_(values["fp32"])
    if hasattr(parameter, "_hp_mapping"):  # stages 1 and 2
        parameter.set_full_hp_param(values["fp32"])
        for key in states:
            parameter.set_full_hp_param(values[key], key)
        return
    master = masters.get(id(parameter), parameter)
    master.data.copy_(values["fp32"])
    for key in states:
        base.state[master][key].copy_(values[key])


def release(engine: Any) -> None:
    """Remove an engine's hooks, and itself from two places where stage 3 keeps every engine of the process alive.

    The engine, its weights and its buffers are then freed with their last reference, by the garbage collector.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    module = engine.module
    engine.destroy()
    entered = getattr(parameter_offload, "FWD_MODULE_STACK", [])
    entered[:] = [each for each in entered if each is not module]
    # A cached method, wrapped by a decorator that does not name it: the cache has the coordinator of every engine.
    wrapped = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(wrapped, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
    restore_linear()


def restore_linear() -> None:
    """Give PyTorch its own ``linear`` back. Stage 3 replaces it in the whole process, and torch cannot compile that."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patch

    torch.nn.functional.linear = getattr(Patch, "linear_bk", torch.nn.functional.linear)


def restore_loss_scale(optimizer: Any, saved: dict[str, Any]) -> None:
    """Give DeepSpeed's loss scaler, where there is one, the scale, counters and window that were saved."""
    scaler = getattr(optimizer, "loss_scaler", None)
    for key, value in saved.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def _has_plain_partition(parameter: Any) -> bool:
    """Return true where this rank's part of a parameter is a tensor in memory, and the only form of it."""
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus

    part = parameter.ds_tensor
    return (
        parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE
        and part.status is PartitionedParamStatus.AVAILABLE
        and part.final_location is None
        and part.is_floating_point()
        and getattr(parameter, "ds_secondary_tensor", None) is None
        and hasattr(parameter, "ds_zero_partition_rank")
    )


def _own_part(parameter: Any, tensor: SourceTensor) -> Tensor:
    """Return this rank's values of a partitioned parameter, flat; the last ranks' may end in padding, which is 0."""
    length = parameter.ds_tensor.ds_numel
    size = parameter.ds_numel
    start = min(length * parameter.ds_zero_partition_rank, size)
    own = tensor.values(start, min(start + length, size))
    return torch.nn.functional.pad(own, (0, length - len(own)))
