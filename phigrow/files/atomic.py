"""Write a file whole or not at all.

Everything goes into a hidden file beside the final one first, is forced onto the disk, and is then renamed. A reader
sees the old file or the new one, and a power failure leaves one of the two. The hidden name is one that no file has: a
file of a user, or one that a killed process left, is never touched.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phigrow.files.portable import force_to_disk


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; text is encoded as UTF-8.

    A byte of a path that is not UTF-8 is half a character in Python, which UTF-8 does not have. It is written as an
    escape, as in messages: ``caf\\udce9``.

    Raises:
        OSError: the operating system refuses. An existing file is then unchanged.
    """
    with atomic_path(path) as unfinished:
        unfinished.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def atomic_json(path: Path, content: Any, *, indent: int | None = 1) -> None:
    """Write a JSON file, with a newline at its end, whole or not at all.

    Raises:
        OSError: as `atomic_write`.
    """
    atomic_write(path, json.dumps(content, indent=indent) + "\n")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a path to write to, which becomes ``path`` when the block ends without an error; a context.

    For writers that open files themselves, such as safetensors and matplotlib. The path has the suffix of ``path``,
    because some of them take the format from it.
    """
    unfinished = _new_file(path)
    try:
        yield unfinished
        force_to_disk(unfinished)
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _new_file(path: Path) -> Path:
    """Create an empty hidden file beside ``path`` under a name that is free."""
    for number in itertools.count(1):
        unfinished = path.with_name(f".{path.name}.partial{'' if number == 1 else f'-{number}'}{path.suffix}")
        with contextlib.suppress(FileExistsError):
            os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return unfinished
    raise AssertionError("count never ends")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure, where its file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
