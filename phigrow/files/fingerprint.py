"""Fingerprints of files by their content. Large files are sampled.

A fingerprint tells whether an input is still the one that a run or a study began with. Its path, its name and its time
play no part. A file of up to 1 MiB is read whole. Of a larger one, the size and 64 blocks of 16 KiB are read, evenly
spaced, the first and the last among them. So a large file that was replaced, trained further or cut off is noticed,
but a change of a few bytes between the blocks may not be.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.portable import read_at

BLOCK = 1 << 14
"""Bytes of a sampled block."""

BLOCKS = 64
"""Number of sampled blocks of one file."""

MISSING = "missing"
"""Stands for the fingerprint of an input whose file or folder does not exist any more."""

SHOWN = 12
"""Characters of a fingerprint in messages."""


def spans(size: int, blocks: int = BLOCKS, block: int = BLOCK) -> list[tuple[int, int]]:
    """Return the parts of ``size`` bytes that are read, each as its first byte and its end.

    >>> spans(100, blocks=2, block=10), spans(15, blocks=2, block=10)
    ([(0, 10), (90, 100)], [(0, 15)])
    """
    if size <= blocks * block:
        return [(0, size)]
    last = size - block
    starts = [last * number // max(1, blocks - 1) for number in range(blocks)]
    return [(start, start + block) for start in starts]


def file_fingerprint(path: Path, *, blocks: int = BLOCKS, starts: Iterable[int] = ()) -> str:
    """Return the fingerprint of one file.

    Args:
        path: the file.
        blocks: number of blocks to sample.
        starts: first bytes of further blocks, such as the first byte of every tensor.

    Raises:
        GrowthError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size}\n".encode())
            parts = spans(size, blocks)
            if len(parts) > 1:
                parts += [(start, min(size, start + BLOCK)) for start in sorted(starts)]
            for start, stop in parts:
                digest.update(read_at(file.fileno(), stop - start, start))
    except OSError as error:
        raise GrowthError(
            "the file cannot be read", where=str(path), why=str(error), fix="check its permissions, and the disk"
        ) from error
    return digest.hexdigest()


def json_fingerprint(content: Any) -> str:
    """Return the fingerprint of JSON data. The order of keys plays no part."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
