"""Fill a model, one parameter at a time and at any ZeRO stage: seeded scratch weights, or a checkpoint's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from phigrow.checkpoints.reader import StoredTensor
from phigrow.checkpoints.stored_model import StoredModel
from phigrow.errors import GrowthError
from phigrow.training.zero import fill_master, fill_parameter, full_shape, gathered, is_partitioned

if TYPE_CHECKING:
    from phigrow.training.process import World


def fill_from_scratch(model: nn.Module, seed: int, initializer_range: float, world: World) -> None:
    """Give every parameter its scratch value, as transformers does: N(0, initializer_range), biases 0, norms 1.

    Each parameter has a generator of its own, seeded by (seed, name), so that the weights are the same for any
    number of ranks and at any ZeRO stage.

    Raises:
        GrowthError: a parameter belongs to no linear layer, embedding or norm.
    """
    for parameter, drawn in _scratch(model, seed, initializer_range):
        with torch.no_grad(), gathered(parameter, write=True):
            if parameter.numel() and (world.first or not is_partitioned(parameter)):
                parameter.copy_(drawn.rows(0, drawn.shape[0]))


@dataclass(frozen=True)
class ScratchTensor:
    """The scratch value of a parameter in fp32, with the methods of `StoredTensor`; each call draws all of it."""

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
            f"there is no rule to initialise a {type(self.module).__name__}",
            where=self.name,
            fix="start from a checkpoint folder instead",
        )


def _scratch(model: nn.Module, seed: int, initializer_range: float) -> Iterator[tuple[Any, ScratchTensor]]:
    """Yield every parameter once, with its scratch value."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        shape = full_shape(parameter)
        yield parameter, ScratchTensor(name, shape, modules[name.rpartition(".")[0]], seed, initializer_range)


def fill_from_checkpoint(model: nn.Module, folder: Path) -> None:
    """Copy a folder's weights into a model, strictly: every parameter and every tensor, of the same shape.

    Under ZeRO-3 every rank reads its own part of every tensor, at its offset in the file, and nothing else: no rank
    holds more of the checkpoint than it trains, and nothing is sent between ranks.

    Raises:
        GrowthError: no weights, a parameter that is missing, one of another shape, or a tensor that is no parameter.
    """
    with StoredModel(folder) as reader, torch.no_grad():
        for parameter, tensor in _matched(model, reader):
            fill_parameter(parameter, tensor)


def masters_from_checkpoint(engine: Any, folder: Path) -> None:
    """Set the fp32 masters to the checkpoint's own values, of which the weights hold only a rounding.

    DeepSpeed makes its masters from the weights it is given, after it has rounded them to bf16 or fp16; a function
    that was preserved in fp32 would start as its rounding, and every later step would build on that. Each rank reads
    the values of its own masters. Weights stay what they are: the rounding of these masters.

    Raises:
        GrowthError: as `fill_from_checkpoint`; or DeepSpeed keeps masters where phigrow does not know them.
    """
    with StoredModel(folder) as reader:
        fill_masters(engine.optimizer, _matched(engine.module, reader))


def masters_from_scratch(engine: Any, seed: int, initializer_range: float) -> None:
    """Set the fp32 masters to the scratch values before rounding: else arms that start from fp32 would be ahead.

    Every rank draws what it has a part of, a parameter at a time.

    Raises:
        GrowthError: as `masters_from_checkpoint`.
    """
    fill_masters(engine.optimizer, _scratch(engine.module, seed, initializer_range))


@torch.no_grad()
def fill_masters(optimizer: Any, tensors: Iterable[tuple[Any, StoredTensor | ScratchTensor]]) -> None:
    """Fill the masters of parameters with tensors, where the parameters hold only a rounding of these.

    Raises:
        GrowthError: as `zero.fill_master`.
    """
    for parameter, tensor in tensors:
        if parameter.dtype in (torch.float32, tensor.dtype) or not parameter.requires_grad:
            continue  # the weights are not rounded, so neither are their masters
        fill_master(parameter, optimizer, tensor)


def _matched(model: nn.Module, reader: StoredModel) -> Iterator[tuple[Any, StoredTensor]]:
    """Yield every parameter with its stored tensor, after checking that their shapes are equal and that none is left.

    `StoredModel` has already left out second copies of tied matrices, and tensors that no model learns.
    """
    parameters = dict(model.named_parameters())
    wanted_names = {reader.family.stored_name(name) for name in parameters}
    left = [name for name in reader.tensors if name not in wanted_names]
    for name, parameter in parameters.items():
        tensor = reader.tensors.get(reader.family.stored_name(name))
        if tensor is None:
            reader.check()  # says more, where it knows the kind of the files
            raise GrowthError(
                "the checkpoint does not have a parameter of the model",
                where=f"{name} in {reader.folder}",
                fix="give a checkpoint whose config.json describes its weights",
            )
        wanted = full_shape(parameter)
        if tensor.shape != wanted:
            raise GrowthError(
                f"a tensor has shape {list(tensor.shape)}, but the model's parameter has {list(wanted)}",
                where=f"{name} in {reader.folder}",
                fix="give a checkpoint whose config.json describes its weights",
            )
        if left:
            reader.check()
            raise GrowthError(
                f"the checkpoint has {len(left)} tensors that are no parameters of the model",
                where=f"{', '.join(left[:4])} in {reader.folder}",
                why="the model would compute another function without them",
                fix="give a checkpoint whose config.json describes its weights",
            )
        yield parameter, tensor
