"""A model as its files store it: the configuration that its weights have, and its tensors by the table's names.

Files may contradict their ``config.json``, and may spell names in several ways. `StoredModel` settles this once, for
everything that reads a model:

- Where ``tie_word_embeddings`` is true and the head is stored beside the embedding, their values decide. Equal: the
  second copy is left out. Different: the model is not tied, as in transformers 5. A tied model whose file has the head
  alone gets its embedding from there.
- Names are those of the family's table, whether the file has these or those of live models.
- Tensors that no model learns (causal masks, rotary tables) are left out, whatever their dtype.
- ``quantization_config`` is left out where every tensor is stored as floating point numbers: it has no effect on them.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from phigrow.checkpoints.bits import as_bytes, widen
from phigrow.checkpoints.pickles import PickleReader, has_pickles, has_safetensors, open_checkpoint
from phigrow.checkpoints.reader import NamedTensors, StoredTensor
from phigrow.errors import GrowthError
from phigrow.models.config import Config, load_config
from phigrow.models.families import family_of
from phigrow.models.family import TIE, Family

QUANTIZATION = "quantization_config"
BLOCK_VALUES = 1 << 20
"""Values that are compared at once."""

SETTLED = 2_000_000_000
"""Nanoseconds after which a further change of a file must change its times; clocks of file systems are coarse."""

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")

Tensor = TypeVar("Tensor")


class UntiedHead(UserWarning):
    """A configuration ties the head to the embedding, but the two are stored with different values."""


class StoredModel(NamedTensors):
    """The model of a checkpoint folder, open for reading; see this module.

    Args:
        folder: the checkpoint.
        config: its configuration; by default that of its ``config.json``.

    Attributes:
        config: the configuration of the stored weights.
        family: the table of its architecture.
        tensors: name in the table -> stored tensor.
        files: the files with the weights, in order.
        pickled: the files are pickles.

    Raises:
        GrowthError: a configuration or a file that cannot be read, or two tensors that stand for one parameter.
    """

    def __init__(self, folder: Path, config: Config | None = None) -> None:
        config = load_config(folder) if config is None else config
        self.folder, self.family = folder, family_of(config, str(folder))
        self._reader = open_checkpoint(folder, self.family.ignored_tensors)
        try:
            self.files, self.pickled = self._reader.files, isinstance(self._reader, PickleReader)
            self.config, self.tensors = as_stored(self.family, config, self._reader.tensors, equal, str(folder))
        except BaseException:
            self.close()
            raise

    def check(self, config: Config | None = None) -> None:
        """Check the tensors against the family table.

        Raises:
            GrowthError: tensors are missing, unexpected, or of another shape than the configuration demands.
        """
        self.family.check_tensors(self.config if config is None else config, self.shapes, where=str(self.folder))

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> StoredModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def stored_model_config(folder: Path) -> Config:
    """Return the configuration of the weights that a folder stores; that of ``config.json`` in a folder without any.

    Weights are opened only where they can contradict ``config.json``, and once as long as no file changes.

    Raises:
        GrowthError: as `StoredModel`.
    """
    config = load_config(folder)
    if not (has_safetensors(folder) or has_pickles(folder)):
        return config
    if not (family_of(config, str(folder)).ties(config) or QUANTIZATION in config):
        return config
    stamps = _stamps(folder)
    if folder in _read and _read[folder][:2] == (stamps, config):
        stored, caught = _read[folder][2:]
    else:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with StoredModel(folder, config) as model:
                stored = model.config
        if all(max(times) + SETTLED < time.time_ns() for _, _, _, *times in stamps):
            _read[folder] = stamps, copy.deepcopy(config), stored, caught
    for each in caught:
        warnings.warn(each.message, each.category, stacklevel=2)
    return copy.deepcopy(stored)


_read: dict[Path, tuple[list[tuple[Any, ...]], Config, Config, list[warnings.WarningMessage]]] = {}
"""Folder -> stamps of its files, its configuration, that of its weights, and the warnings of reading them."""


def _stamps(folder: Path) -> list[tuple[Any, ...]]:
    """Return the name, inode, size and times of every file of weights."""
    files = sorted({path for pattern in WEIGHT_FILES for path in folder.glob(pattern) if path.is_file()})
    stamps = []
    for path in files:
        status = path.stat()
        stamps.append((path.name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return stamps


def as_stored(
    family: Family, config: Config, tensors: Mapping[str, Tensor], same: Callable[[Tensor, Tensor], bool], where: str
) -> tuple[Config, dict[str, Tensor]]:
    """Return the configuration of stored weights, and the weights by the table's names.

    Args:
        family: the table.
        config: the configuration that came with the weights.
        tensors: name in a file or in a live model -> tensor, all of floating point numbers.
        same: compares the values of two tensors.
        where: for messages.

    Raises:
        GrowthError: two tensors of different values stand for one parameter.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(family.ignored_tensors):
            continue
        stored = family.stored_name(name)
        if stored in named and not same(named[stored], tensor):
            raise GrowthError(
                f"two tensors of different values stand for {stored}",
                where=where,
                why=f"{family.live_names[stored]} is another name for it",
                fix="remove the one that does not belong to the model",
            )
        named[stored] = tensor
    config = {key: value for key, value in config.items() if key != QUANTIZATION}
    head, embedding = family.head_matrix, family.embedding
    if head is None or head not in named or not family.ties(config):
        return config, named
    if embedding not in named:
        named[embedding] = named.pop(head)
    elif same(named[embedding], named[head]):
        del named[head]
    else:
        config[TIE] = False
        warnings.warn(
            f"{where}: {TIE} is true, but {head} and {embedding} have different values; they are read as two matrices, "
            f"as transformers 5 does (set {TIE}: false in config.json)",
            UntiedHead,
            stacklevel=4,
        )
    return config, named


def equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Return True if two tensors have the same shape and values, whatever their dtypes."""
    if one.shape != other.shape:
        return False
    rows = one.shape[0] if one.shape else 0
    step = max(1, BLOCK_VALUES // max(1, int(np.prod(one.shape[1:], dtype=np.int64))))
    for start in range(0, rows, step):
        a, b = (tensor.bits(start, min(start + step, rows)) for tensor in (one, other))
        if one.dtype_name == other.dtype_name:
            if as_bytes(a) != as_bytes(b):
                return False
        elif not np.array_equal(widen(a, one.dtype_name, np.float64), widen(b, other.dtype_name, np.float64)):
            return False
    return True
