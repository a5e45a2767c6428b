"""Read pickled weights (``pytorch_model.bin``) of folders without safetensors, by torch's restricted loader only.

A pickle is a program. ``torch.load(weights_only=True)`` only rebuilds tensors from it and refuses everything else.
Values are mapped from the file, so the model is never in memory. The grown model is written as safetensors.
"""

from __future__ import annotations

import math
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.bits import Bits, bits_of
from phigrow.checkpoints.hub_cache import incomplete_cache
from phigrow.checkpoints.reader import (
    DTYPES,
    INDEX,
    NO_FLOATS,
    SINGLE,
    CheckpointReader,
    StoredTensor,
    check_index,
    read_weight_map,
)
from phigrow.errors import GrowthError
from phigrow.files.foreign import pickled_elsewhere
from phigrow.files.untrusted import contained

if TYPE_CHECKING:
    import torch

PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE = "pytorch_model.bin"

_SAFER = "save the model again with transformers' save_pretrained, which writes safetensors"


class PickledWeights(UserWarning):
    """Weights were read from a pickle."""


def open_checkpoint(folder: Path, optional: tuple[str, ...] = ()) -> CheckpointReader:
    """Open a checkpoint folder: its safetensors where it has any, else its pickled weights, with a warning.

    Tensors have the names and values of the files. `phigrow.checkpoints.stored_model.StoredModel` reads them as a
    model.

    Raises:
        GrowthError: the folder has neither, or its files cannot be trusted.
    """
    reader = PickleReader if has_pickles(folder) and not has_safetensors(folder) else CheckpointReader
    return reader(folder, optional)


def has_safetensors(folder: Path) -> bool:
    """Return True if a folder has weights that transformers would take before pickled ones."""
    return any((folder / name).exists() for name in (INDEX, SINGLE))


def has_pickles(folder: Path) -> bool:
    """Return True if a folder has pickled weights under the names of transformers."""
    return any((folder / name).exists() for name in (PICKLE_INDEX, PICKLE))


@dataclass(frozen=True)
class PickledTensor(StoredTensor):
    """One tensor of a pickle, read by rows from its mapped file."""

    value: torch.Tensor

    def bits(self, start: int, stop: int) -> Bits:
        return bits_of(self.value[start:stop])

    def _read(self, start: int, stop: int) -> Bits:
        return bits_of(self.value.reshape(-1)[start:stop])


class PickleReader(CheckpointReader):
    """The tensors of a folder with ``pytorch_model.bin``, whole or in shards with an index; as `CheckpointReader`.

    Raises:
        GrowthError: a pickle is more than named tensors, torch's restricted loader refuses it, or an index does not
            fit the files.
    """

    def __init__(self, folder: Path, optional: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.tensors, self.places = {}, {}
        self._descriptors = []
        index = contained(folder, PICKLE_INDEX)
        weight_map = read_weight_map(index, ".bin") if index.is_file() else None
        names = sorted(set(weight_map.values())) if weight_map is not None else [PICKLE]
        self.files = [contained(folder, name) for name in names]
        for path in self.files:
            for name, value in _load(path).items():
                if name in self.places:
                    raise GrowthError(
                        "two files hold the same tensor",
                        where=f"{name} in {path}",
                        why=f"{self.places[name]} holds it too",
                        fix=_SAFER,
                    )
                tensor = _pickled(name, value, path, optional)
                self.places[name] = path.name
                if tensor is not None:
                    self.tensors[name] = tensor
        if weight_map is not None:
            check_index(index, weight_map, self.places, optional)
        if not self.tensors:
            raise GrowthError("the checkpoint has no tensors", where=str(folder), fix=_SAFER)
        warnings.warn(
            f"{', '.join(path.name for path in self.files)} in {folder}: pickled weights, read without running their "
            f"code and written as safetensors; {_SAFER}",
            PickledWeights,
            stacklevel=3,
        )


def _load(path: Path) -> dict[Any, Any]:
    import torch

    if not path.is_file():
        if (incomplete := incomplete_cache(path.parent, path.name)) is not None:
            raise incomplete
        raise GrowthError(
            f"the file {path.name} is missing",
            where=str(path.parent),
            fix="download the checkpoint again, with all files",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own internals
            # Files older than torch 1.6 are no archives and cannot be mapped.
            content = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle may raise any exception
        raise GrowthError(
            "the pickled weights cannot be read safely",
            where=str(path),
            why=_first_lines(str(error)) or type(error).__name__,
            fix=f"load it in another way only if you trust its author; then {_SAFER}",
        ) from error
    if not isinstance(content, dict):
        raise GrowthError(
            "the pickled weights are not a state dict",
            where=str(path),
            why=f"the file holds a {type(content).__name__}",
            fix=_SAFER,
        )
    return content


def _first_lines(text: str) -> str:
    """Return the beginning of torch's message, without its advice to turn the protection off."""
    return text.split("\n\n")[0].split("(1)")[0].split("Re-running")[0].strip()[:500]


def _pickled(name: Any, value: Any, path: Path, optional: tuple[str, ...]) -> PickledTensor | None:
    """Return a tensor of a pickle, after checking it; None if it is optional and has a dtype without reader."""
    import torch

    where = f"{name} in {path}"
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise GrowthError(
            "the pickled weights are not a state dict",
            where=where,
            why=f"{name!r} is a {type(value).__name__}",
            fix=pickled_elsewhere(path).fix if isinstance(value, dict) else _SAFER,
        )
    value = value.detach()
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES.values() and name.endswith(optional):
        return None
    if dtype not in DTYPES.values() or value.is_quantized:
        raise GrowthError(
            f"the weights have dtype {dtype}",
            where=where,
            why=f"phigrow grows {', '.join(DTYPES.values())}",
            fix=NO_FLOATS,
        )
    if value.layout != torch.strided or value.device.type != "cpu":
        raise GrowthError(
            "the pickled tensor is not dense on the CPU",
            where=where,
            why=f"it has {value.layout} on {value.device}",
            fix=_SAFER,
        )
    shape = tuple(value.shape)
    if math.prod(shape) * value.element_size() > value.untyped_storage().nbytes():
        # A tensor of strides 0 is a few bytes that claim to be terabytes.
        raise GrowthError(
            f"the pickled tensor of shape {list(shape)} has fewer stored values than its shape needs",
            where=where,
            fix=_SAFER,
        )
    return PickledTensor(name, path, -1, 0, shape, dtype, value)
