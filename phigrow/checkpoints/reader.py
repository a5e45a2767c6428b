"""Read safetensors checkpoints by rows, on demand.

Reading goes through `pread` rather than a memory map, so that pages read once do not count as resident memory. The
format is that of the safetensors library: an 8-byte length, a JSON header, raw values. `phigrow.checkpoints.writer`
writes it.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from phigrow.checkpoints.bits import STORED, Bits, as_bytes, tensor_of
from phigrow.checkpoints.hub_cache import incomplete_cache
from phigrow.errors import GrowthError
from phigrow.files.foreign import recognise
from phigrow.files.portable import BINARY, read_at, read_into
from phigrow.files.untrusted import MOST_JSON_BYTES, contained, parse_json_strict, read_json_strict

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_AXES, MOST_SIZE = 8, 1 << 62
"""Limits of a tensor: numpy and torch can index no more. They keep products of sizes cheap for any header."""

FETCH = "download the checkpoint again: the file is damaged, or was made to mislead"
NO_FLOATS = "give the checkpoint from which these quantised or integer weights were made"
"""Advice of several errors."""

DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file, read by rows."""

    name: str
    path: Path
    file: int
    offset: int
    shape: tuple[int, ...]
    dtype_name: str

    @property
    def dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start .. stop``, [stop - start, ...], in the stored dtype; errors as `bits`."""
        return tensor_of(self.bits(start, stop), self.dtype_name)

    def values(self, start: int, stop: int) -> torch.Tensor:
        """Return values ``start .. stop`` of the flattened tensor in the stored dtype; errors as `bits`."""
        return tensor_of(self._read(start, stop), self.dtype_name)

    def bits(self, start: int, stop: int) -> Bits:
        """Return rows ``start .. stop`` as stored, [stop - start, ...], unsigned integers of the dtype's width.

        Raises:
            GrowthError: the file ended early.
        """
        row = math.prod(self.shape[1:])
        return self._read(start * row, stop * row).reshape(stop - start, *self.shape[1:])

    def _read(self, start: int, stop: int) -> Bits:
        out = np.empty(stop - start, dtype=STORED[self.dtype_name])
        view = as_bytes(out)
        position = self.offset + start * out.itemsize
        done = 0
        while done < len(view):
            got = read_into(self.file, view[done:], position + done)
            if got == 0:
                raise GrowthError(
                    "the safetensors file became shorter while it was read",
                    where=f"{self.name} in {self.path}",
                    fix=FETCH,
                )
            done += got
        return out


class NamedTensors:
    """Stored tensors by name.

    Attributes:
        tensors: name -> stored tensor.
    """

    tensors: dict[str, StoredTensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def dtype_name(self) -> str:
        """dtype of the tensor with the most values, which stands for the model's."""
        return max(self.tensors.values(), key=lambda tensor: math.prod(tensor.shape)).dtype_name


class CheckpointReader(NamedTensors):
    """The tensors of a Hugging Face folder, in one safetensors file or in shards with an index.

    Args:
        folder: the checkpoint.
        optional: ends of the names of tensors that are left out if their dtype cannot be read, such as masks of BOOL.

    Attributes:
        tensors: name -> stored tensor.
        places: name -> name of its file, of every tensor, also of those that were left out.
        files: the safetensors files, in order.

    Raises:
        GrowthError: there are no safetensors, a header is damaged or false, or the index does not fit the files.
    """

    def __init__(self, folder: Path, optional: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self._optional = optional
        self.tensors = {}
        self.places: dict[str, str] = {}
        self._descriptors: list[int] = []
        index, single = contained(folder, INDEX), contained(folder, SINGLE)
        weight_map = read_weight_map(index, ".safetensors") if index.is_file() else None
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
        if SINGLE not in names and single.is_file():
            raise GrowthError(
                "the folder holds two sets of weights",
                where=str(folder),
                why=f"{INDEX} does not list {SINGLE}, which transformers would load",
                fix="remove the set that you do not want",
            )
        self.files = [contained(folder, name) for name in names]
        try:
            for path in self.files:
                self._open(path)
            if weight_map is not None:
                check_index(index, weight_map, self.places, optional)
            if not self.tensors:
                raise GrowthError("the checkpoint has no tensors", where=str(folder), fix=FETCH)
        except OSError as error:
            self.close()
            raise GrowthError(
                "a safetensors file cannot be read",
                where=str(folder),
                why=str(error),
                fix="check the permissions of its files, and the disk",
            ) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _open(self, path: Path) -> None:
        if not path.is_file():
            if (incomplete := incomplete_cache(self.folder, path.name)) is not None:
                raise incomplete
            if path.name == SINGLE and (foreign := recognise(self.folder)) is not None:
                raise foreign.error(f"the file {SINGLE} is missing", str(self.folder))
            pickles = sorted(p.name for p in self.folder.glob("*.bin"))
            is_shard = path.name != SINGLE
            raise GrowthError(
                f"the file {path.name} is missing",
                where=str(self.folder),
                why=f"{INDEX} names it"
                if is_shard
                else f"the folder holds only pickled weights ({', '.join(pickles)})"
                if pickles
                else None,
                fix="download the checkpoint again, with all files"
                if is_shard
                else "give a folder with safetensors files, which save_pretrained of transformers writes",
            )
        descriptor = os.open(path, os.O_RDONLY | BINARY)
        self._descriptors.append(descriptor)
        data_start, header = _read_header(path, descriptor)
        size = os.fstat(descriptor).st_size - data_start
        spans = []
        for name, entry in header.items():
            tensor = _stored(name, entry, path, descriptor, data_start, size, optional=name.endswith(self._optional))
            if name in self.places:
                other = self.places[name]
                raise GrowthError(
                    "two files hold the same tensor", where=f"{name} in {path}", why=f"{other} holds it too", fix=FETCH
                )
            self.places[name] = path.name
            if tensor is not None:
                self.tensors[name] = tensor
            spans.append((*entry["data_offsets"], name))
        _check_cover(sorted(spans), size, path)


def _check_cover(spans: list[tuple[int, int, str]], size: int, path: Path) -> None:
    """Check that every byte of the values belongs to exactly one tensor, as the format demands."""
    reached, former = 0, "the header"
    for begin, end, name in spans:
        if begin < reached:
            raise GrowthError("two tensors overlap in the file", where=f"{former} and {name} in {path}", fix=FETCH)
        if begin > reached:
            raise GrowthError(
                "the safetensors file has a gap between its tensors",
                where=f"between {former} and {name} in {path}",
                why=f"bytes {reached}..{begin} belong to no tensor",
                fix=FETCH,
            )
        reached, former = end, name
    if reached < size:
        raise GrowthError(
            "the safetensors file is longer than its tensors",
            where=f"after {former} in {path}",
            why=f"bytes {reached}..{size} belong to no tensor",
            fix=FETCH,
        )


def read_weight_map(path: Path, suffix: str) -> dict[str, str]:
    """Return tensor name -> file name from an index of shards.

    Raises:
        GrowthError: there is no index, or it names anything but files of that suffix beside it.
    """
    weight_map = read_json_strict(path, "the index of shards").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        why = "its weight_map is not an object of tensor names and file names"
        raise GrowthError("the index of shards cannot be read", where=str(path), why=why, fix=FETCH)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(suffix) or any(mark in file for mark in "/\\\0"):
            raise GrowthError(
                "the index of shards names a file outside its folder",
                where=f"{name} in {path}",
                why=f"it names {file!r}, but must name a {suffix} file beside it",
                fix=FETCH,
            )
    return weight_map


def check_index(
    index: Path, weight_map: dict[str, str], file_of: dict[str, str], optional: tuple[str, ...] = ()
) -> None:
    """Compare an index with the content of its files; both map tensor names to file names.

    Tensors whose names end with one of ``optional`` may be missing: transformers stopped saving rotary tables, and some
    indices still list them.

    Raises:
        GrowthError: a tensor is in another file, or missing on either side.
    """
    for name, file in file_of.items():
        if weight_map.get(name) != file:
            listed = f"in {weight_map[name]}" if name in weight_map else "in no file"
            raise GrowthError(
                "the index of shards does not match its files",
                where=f"{name} in {index}",
                why=f"the tensor is in {file}, but the index lists it {listed}",
                fix=FETCH,
            )
    if missing := [name for name in weight_map if name not in file_of and not name.endswith(optional or "\0")]:
        raise GrowthError(
            "the index of shards does not match its files",
            where=f"{missing[0]} in {index}",
            why=f"{weight_map[missing[0]]} does not hold this tensor",
            fix=FETCH,
        )


def _read_header(path: Path, descriptor: int) -> tuple[int, dict[str, Any]]:
    size = os.fstat(descriptor).st_size
    prefix = read_at(descriptor, 8, 0)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
    if not 0 < length <= min(size - 8, MOST_JSON_BYTES):
        raise GrowthError(
            "the file is not a complete safetensors file",
            where=str(path),
            why=f"it has {size} bytes, and its header has {length}" if length >= 0 else f"it has {size} bytes",
            fix="download it again: it is truncated, or a placeholder (git lfs) for the real file",
        )
    header = parse_json_strict(read_at(descriptor, length, 8), "the safetensors header", str(path))
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # other writers store null, and transformers reads it
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        why = "__metadata__ is not an object of strings"
        raise GrowthError("the safetensors header cannot be read", where=str(path), why=why, fix=FETCH)
    return 8 + length, header


def _stored(
    name: str, entry: Any, path: Path, descriptor: int, data_start: int, size: int, *, optional: bool
) -> StoredTensor | None:
    """Return a tensor of a header, after checking its entry; None if it is optional and has a dtype without reader."""
    where = f"{name} in {path}"
    try:
        dtype, shape = str(entry["dtype"]), entry["shape"]
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        why = f"its entry is wrong: {error!r}"
        raise GrowthError("the safetensors header cannot be read", where=where, why=why, fix=FETCH) from error
    if dtype not in DTYPES and not optional:
        raise GrowthError(
            f"the weights have dtype {dtype}",
            where=where,
            why=f"phigrow grows {', '.join(DTYPES.values())}",
            fix=NO_FLOATS,
        )
    sound = isinstance(shape, list) and len(shape) <= MOST_AXES
    # A bool is an int in Python, and a size of 4300 digits is one in JSON.
    sound = sound and all(type(n) is int and 0 <= n < MOST_SIZE for n in (*shape, begin, end))
    if sound and dtype in DTYPES:
        sound = end - begin == math.prod(shape) * ITEM_BYTES[DTYPES[dtype]]
    if not sound or not begin <= end <= size:
        raise GrowthError(
            "the safetensors header gives a tensor a wrong shape or position",
            where=where,
            why=f"it has shape {shape} of {dtype} at bytes {begin}..{end}, and the file has {size} bytes of values",
            fix=FETCH,
        )
    if dtype not in DTYPES:
        return None
    return StoredTensor(name, path, descriptor, data_start + begin, tuple(shape), DTYPES[dtype])
