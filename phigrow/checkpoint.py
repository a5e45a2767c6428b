"""Safetensors checkpoints, read by rows on demand.

Reading goes through `pread` rather than a memory map, so that what was read does not count as resident memory. The
format is that of the safetensors library (an 8-byte length, a JSON header, raw values); `phigrow.shards` writes it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from phigrow.errors import GrowthError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library: a longer header is damage or an attack."""

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
        """Rows ``start .. stop``, [stop - start, ...], in the stored dtype.

        Raises:
            GrowthError: the file ended early.
        """
        import torch

        out = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        row_bytes = math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype_name]
        view = bytes_of(out)
        position = self.offset + start * row_bytes
        done = 0
        while done < len(view):
            got = os.preadv(self.file, [view[done:]], position + done)
            if got == 0:
                raise GrowthError("a safetensors file ended early", where=f"{self.name} in {self.path}")
            done += got
        return out


class CheckpointReader:
    """The tensors of a Hugging Face folder, in one safetensors file or in shards with an index.

    Args:
        folder: the checkpoint.

    Attributes:
        tensors: name -> stored tensor.
        files: the safetensors files, in order.

    Raises:
        GrowthError: no safetensors, a damaged or dishonest header, an index that does not fit the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._descriptors: list[int] = []
        index = folder / INDEX
        weight_map = _read_index(index) if index.is_file() else None
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
        self.files = [folder / name for name in names]
        try:
            for path in self.files:
                self._open(path)
            if weight_map is not None:
                self._check_index(index, weight_map)
        except BaseException:
            self.close()
            raise

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

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
            pickles = sorted(p.name for p in self.folder.glob("*.bin"))
            raise GrowthError(
                f"no {path.name}",
                where=str(self.folder),
                why=f"there are only pickled weights ({', '.join(pickles)}), which are not opened" if pickles else None,
                fix="give a folder with safetensors files (transformers writes them with save_pretrained)",
            )
        descriptor = os.open(path, os.O_RDONLY)
        self._descriptors.append(descriptor)
        data_start, header = _read_header(path, descriptor)
        size = os.fstat(descriptor).st_size - data_start
        spans = []
        for name, entry in header.items():
            tensor = _stored(name, entry, path, descriptor, data_start, size)
            if name in self.tensors:
                raise GrowthError("a tensor that is stored twice", where=f"{name} in {path}")
            self.tensors[name] = tensor
            spans.append((*entry["data_offsets"], name))
        spans.sort()
        for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
            if begin < end:
                raise GrowthError("tensors that overlap", where=f"{first} and {second} in {path}")

    def _check_index(self, index: Path, weight_map: dict[str, str]) -> None:
        for name, tensor in self.tensors.items():
            if weight_map.get(name) != tensor.path.name:
                listed = weight_map.get(name, "in no file")
                raise GrowthError(
                    "an index that does not fit its files",
                    where=f"{name} in {index}",
                    why=f"it is in {tensor.path.name}, the index says {listed}",
                )
        if missing := [name for name in weight_map if name not in self.tensors]:
            raise GrowthError(
                "an index that does not fit its files",
                where=f"{missing[0]} in {index}",
                why=f"{weight_map[missing[0]]} does not hold it",
            )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = dict(weight_map)
    except (ValueError, KeyError, TypeError) as error:
        raise GrowthError("a safetensors index that cannot be read", where=str(path), why=repr(error)) from error
    for name, file in pairs.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise GrowthError(
                "an index that points outside its folder",
                where=f"{name} in {path}",
                why=f"it names {file!r}, not a safetensors file beside it",
            )
    return pairs


def _read_header(path: Path, descriptor: int) -> tuple[int, dict[str, Any]]:
    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
    if not 0 < length <= min(size - 8, MOST_HEADER_BYTES):
        raise GrowthError("not a whole safetensors file", where=str(path), why=f"{size} bytes, header of {length}")
    try:
        header = json.loads(os.pread(descriptor, length, 8))
        header.pop("__metadata__", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise GrowthError("a safetensors header that cannot be read", where=str(path), why=str(error)) from error
    return 8 + length, header


def _stored(name: str, entry: Any, path: Path, descriptor: int, data_start: int, size: int) -> StoredTensor:
    where = f"{name} in {path}"
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        sound = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise GrowthError("a safetensors header that cannot be read", where=where, why=repr(error)) from error
    if dtype not in DTYPES:
        raise GrowthError(
            f"weights of dtype {dtype}",
            where=where,
            why=f"phigrow grows {', '.join(DTYPES.values())}",
            fix="dequantise",
        )
    if not sound or end > size or end - begin != math.prod(shape) * ITEM_BYTES[DTYPES[dtype]]:
        raise GrowthError(
            "a safetensors header that lies about its tensors",
            where=where,
            why=f"shape {list(shape)} of {dtype} at bytes {begin}..{end} of {size}",
            fix="the file is truncated or damaged: fetch it again",
        )
    return StoredTensor(name, path, descriptor, data_start + begin, shape, DTYPES[dtype])


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor; numpy has no bfloat16, so it is taken as bytes."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
