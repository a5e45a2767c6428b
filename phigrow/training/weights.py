"""Fill a model, one parameter at a time and at any ZeRO stage: seeded scratch weights, or a checkpoint's."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from phigrow.checkpoints.reader import CheckpointReader, StoredTensor
from phigrow.errors import GrowthError

if TYPE_CHECKING:
    from phigrow.training.process import World


@contextlib.contextmanager
def whole(parameter: nn.Parameter, *, write: bool = False) -> Iterator[None]:
    """Hold a parameter whole while the block runs, on every rank; with ``write``, what rank 0 puts in is kept."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0 if write else None):
        yield


def fill_from_scratch(model: nn.Module, seed: int, initializer_range: float, world: World) -> None:
    """Give every parameter its scratch value, as transformers does: N(0, initializer_range), biases 0, norms 1.

    Each parameter has a generator of its own, seeded by (seed, name), so that the weights are the same for any
    number of ranks and at any ZeRO stage.

    Raises:
        GrowthError: a parameter that is neither of a linear layer, an embedding nor a norm.
    """
    for parameter, drawn in _scratch(model, seed, initializer_range):
        with torch.no_grad(), whole(parameter, write=True):
            if parameter.numel() and (world.first or not hasattr(parameter, "ds_id")):
                parameter.copy_(drawn.rows(0, drawn.shape[0]))


@dataclass(frozen=True)
class ScratchTensor:
    """The scratch value of a parameter, fp32, drawn whole whenever some of it is asked for: a `StoredTensor` else."""

    name: str
    shape: tuple[int, ...]
    module: nn.Module
    seed: int
    initializer_range: float
    dtype: torch.dtype = torch.float32

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``."""
        return self._drawn()[start:stop]

    def values(self, start: int, stop: int) -> Tensor:
        """Values ``start`` to ``stop`` of all, flat."""
        return self._drawn().flatten()[start:stop]

    def _drawn(self) -> Tensor:
        if self.name.endswith("bias"):
            return torch.zeros(self.shape)
        if "Norm" in type(self.module).__name__ and len(self.shape) == 1:
            return torch.ones(self.shape)
        if isinstance(self.module, nn.Linear | nn.Embedding):
            digest = hashlib.sha256(f"{self.seed}/{self.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            value = torch.empty(self.shape).normal_(0.0, self.initializer_range, generator=generator)
            if isinstance(self.module, nn.Embedding) and self.module.padding_idx is not None:
                value[self.module.padding_idx] = 0.0
            return value
        raise GrowthError(
            f"no rule to initialise a {type(self.module).__name__}",
            where=self.name,
            fix="start from a checkpoint folder instead",
        )


def _scratch(model: nn.Module, seed: int, initializer_range: float) -> Iterator[tuple[Any, ScratchTensor]]:
    """Every parameter, once, with its scratch value."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        yield parameter, ScratchTensor(name, shape, modules[name.rpartition(".")[0]], seed, initializer_range)


def fill_from_checkpoint(model: nn.Module, folder: Path) -> None:
    """Copy a folder's safetensors into a model, strictly: same names, same shapes.

    Under ZeRO-3 every rank reads its own part of every tensor, at its offset in the file, and nothing else: no rank
    holds more of the checkpoint than it trains, and nothing is sent between ranks.

    Raises:
        GrowthError: no safetensors, a parameter that is missing, or one of another shape.
    """
    with CheckpointReader(folder) as reader, torch.no_grad():
        for parameter, tensor in _matched(model, reader):
            if not hasattr(parameter, "ds_id"):
                parameter.copy_(tensor.rows(0, tensor.shape[0]))
            elif _has_plain_partition(parameter):
                parameter.ds_tensor.copy_(_own_values(parameter, tensor))
            else:  # its part lies in a file (NVMe) or in several forms (ZeRO++): DeepSpeed cuts it
                with whole(parameter, write=True):
                    if parameter.numel() and torch.distributed.get_rank() == 0:
                        parameter.copy_(tensor.rows(0, tensor.shape[0]))


def masters_from_checkpoint(engine: Any, folder: Path) -> None:
    """Set the fp32 masters to the checkpoint's own values, of which the weights hold only a rounding.

    DeepSpeed makes its masters from the weights it is given, after it has rounded them to bf16 or fp16; a function
    that was preserved in fp32 would start as its rounding, and every later step would build on that. Each rank reads
    the values of its own masters. Weights stay what they are: the rounding of these masters.

    Raises:
        GrowthError: as `fill_from_checkpoint`; or DeepSpeed keeps masters where phigrow does not know them.
    """
    with CheckpointReader(folder) as reader:
        _set_masters(engine.optimizer, _matched(engine.module, reader))


def masters_from_scratch(engine: Any, seed: int, initializer_range: float) -> None:
    """Set the fp32 masters to the scratch values before rounding: else arms that start from fp32 would be ahead.

    Every rank draws what it has a part of, a parameter at a time.

    Raises:
        GrowthError: as `masters_from_checkpoint`.
    """
    _set_masters(engine.optimizer, _scratch(engine.module, seed, initializer_range))


@torch.no_grad()
def _set_masters(optimizer: Any, tensors: Iterable[tuple[Any, StoredTensor | ScratchTensor]]) -> None:
    for parameter, tensor in tensors:
        if parameter.dtype in (torch.float32, tensor.dtype) or not parameter.requires_grad:
            continue  # the weights are not rounded, so neither are their masters
        if hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_set_local_fp32_param

            safe_set_local_fp32_param(parameter, _own_values(parameter, tensor).float())
        elif hasattr(parameter, "_hp_mapping"):
            if (mapping := parameter._hp_mapping) is not None:  # None: all of it belongs to other ranks
                part, master = mapping.lp_fragment_address, mapping.hp_fragment
                held = parameter.detach().flatten()[part.start : part.start + part.numel]
                if not torch.equal(master, held.to(master)):
                    raise GrowthError(
                        "a master that is not its weight",
                        where=tensor.name,
                        why="DeepSpeed makes masters from the weights, so this one is another parameter's",
                        fix="leave out of the DeepSpeed file what reorders parameters, or choose another ZeRO stage",
                    )
                master.copy_(tensor.values(part.start, part.start + part.numel))
        elif (master := unfused_master(parameter, optimizer)) is not None:
            master.copy_(tensor.rows(0, tensor.shape[0]))
        else:
            raise GrowthError(
                "masters that cannot be found",
                where=f"{tensor.name} under {type(optimizer).__name__}",
                why="they would start from weights rounded to " + str(parameter.dtype).removeprefix("torch."),
                fix="choose another ZeRO stage, or store the checkpoint in the dtype of the run",
            )


def _matched(model: nn.Module, reader: CheckpointReader) -> Iterator[tuple[Any, StoredTensor]]:
    """Every parameter with its stored tensor, whose shape is the same."""
    for name, parameter in model.named_parameters():
        tensor = reader.tensors.get(name)
        if tensor is None:
            raise GrowthError(
                "a parameter that the checkpoint does not have",
                where=f"{name} in {reader.folder}",
                fix="give a checkpoint whose config.json describes its weights",
            )
        wanted = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if tensor.shape != wanted:
            raise GrowthError(
                f"a tensor of shape {list(tensor.shape)} for a parameter of {list(wanted)}",
                where=f"{name} in {reader.folder}",
            )
        yield parameter, tensor


def _has_plain_partition(parameter: Any) -> bool:
    """Whether this rank's part of a ZeRO-3 parameter is a tensor in memory, and the only form of it."""
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


def _own_values(parameter: Any, tensor: StoredTensor | ScratchTensor) -> Tensor:
    """This rank's values of a ZeRO-3 parameter, flat; the last ranks' may end in padding, which is 0."""
    length = parameter.ds_tensor.ds_numel
    size = parameter.ds_numel
    start = min(length * parameter.ds_zero_partition_rank, size)
    found = tensor.values(start, min(start + length, size))
    return torch.nn.functional.pad(found, (0, length - len(found)))


def full_value(parameter: nn.Parameter, optimizer: Any, *, master: bool) -> Tensor | None:
    """Return a parameter whole, on the CPU, on rank 0 (elsewhere None is fine); with ``master`` its fp32 master.

    Every rank must call this for the same parameters in the same order.
    """
    if master:
        if (value := unfused_master(parameter, optimizer)) is not None:
            return value.detach().cpu()
        if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer"):
            from deepspeed.utils import safe_get_full_fp32_param

            found = safe_get_full_fp32_param(parameter)
            if found is not None:
                return found.detach().cpu().reshape(getattr(parameter, "ds_shape", parameter.shape))
    with whole(parameter):
        return parameter.detach().cpu().clone() if torch.distributed.get_rank() == 0 else None


def unfused_master(parameter: nn.Parameter, optimizer: Any) -> Tensor | None:
    """The master of a parameter where DeepSpeed runs bf16 without ZeRO."""
    groups = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False)
    for low, masters in groups:
        for candidate, master in zip(low, masters, strict=True):
            if candidate is parameter:
                found: Tensor = master
                return found
    return None
