"""Write a sharded safetensors checkpoint, block by block, in any order and from any thread."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import xxhash

from phigrow.checkpoints.bits import Bits, as_bytes
from phigrow.checkpoints.reader import DTYPES, INDEX, ITEM_BYTES, SINGLE
from phigrow.files.portable import BINARY, NO_FOLLOW, read_at, write_at


class CheckpointWriter:
    """A sharded safetensors checkpoint whose values are written in any order.

    Args:
        folder: an existing folder; shards of the same layout that lie there are continued.
        shapes: name -> shape, in the order in which tensors are laid out.
        dtype: of all tensors, as torch names it (``bfloat16``).
        shard_bytes: most bytes of values in one file, unless one tensor alone has more.

    Attributes:
        files: names of the shards.
        shards: names of the tensors in each.
        total_bytes: of all values.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, shard_bytes: int) -> None:
        self._places: dict[str, tuple[int, int, int]] = {}
        # The kernel lets one writer into a file at a time; waiting here costs nothing, waiting there spins.
        self._turns: dict[int, Lock] = {}
        self._descriptors: list[int] = []
        code = next(code for code, name in DTYPES.items() if name == dtype)
        item = ITEM_BYTES[dtype]
        shards = _split([(name, math.prod(shape) * item) for name, shape in shapes.items()], shard_bytes)
        count = len(shards)
        self.files = [SINGLE if count == 1 else f"model-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
        self.shards = shards
        weight_map: dict[str, str] = {}
        self.total_bytes = 0
        for file, names in zip(self.files, shards, strict=True):
            descriptor = os.open(folder / file, os.O_RDWR | os.O_CREAT | NO_FOLLOW | BINARY, 0o644)
            self._descriptors.append(descriptor)
            self._turns[descriptor] = Lock()
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            offset = 0
            for name in names:
                size = math.prod(shapes[name]) * item
                header[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [offset, offset + size]}
                offset += size
                weight_map[name] = file
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # values start at a multiple of 8 bytes, as the library writes them
            _write_at(descriptor, struct.pack("<Q", len(text)) + text, 0)
            os.ftruncate(descriptor, 8 + len(text) + offset)
            for name in names:
                begin = 8 + len(text) + header[name]["data_offsets"][0]
                self._places[name] = (descriptor, begin, math.prod(shapes[name][1:]) * item)
            self.total_bytes += offset
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, first_row: int, bits: Bits) -> str:
        """Write consecutive rows of a tensor, as stored bits of the checkpoint's dtype, and return their checksum.

        Thread-safe for rows that do not overlap.
        """
        descriptor, begin, row_bytes = self._places[name]
        data = as_bytes(bits)
        with self._turns[descriptor]:
            _write_at(descriptor, data, begin + first_row * row_bytes)
        return xxhash.xxh3_64_hexdigest(data)

    def checksum(self, name: str, first_row: int, last_row: int) -> str:
        """Return the checksum of rows as stored in the file."""
        descriptor, begin, row_bytes = self._places[name]
        data = read_at(descriptor, (last_row - first_row) * row_bytes, begin + first_row * row_bytes)
        return xxhash.xxh3_64_hexdigest(data)

    def close(self, *, sync: bool) -> None:
        """Close all shards, after their values have reached the disk where ``sync`` is on."""
        for descriptor in self._descriptors:
            if sync:
                os.fsync(descriptor)
            os.close(descriptor)
        self._descriptors.clear()


def _split(sizes: list[tuple[str, int]], most: int) -> list[list[str]]:
    """Divide consecutive tensors into shards of about equal size, so that several can be written at once."""
    total = sum(size for _, size in sizes)
    even = total / max(1, math.ceil(total / most))
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if shards[-1] and (filled + size > most or filled >= even):
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += write_at(descriptor, view[done:], position + done)
