"""Locks: one process at a time holds a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from phigrow.errors import GrowthError
from phigrow.files import portable


@contextmanager
def locked(path: Path, message: str, *, where: Path, fix: str) -> Iterator[BinaryIO]:
    """Hold a lock file while the block runs, and give the open file; a context.

    The lock ends with the process, even if it is killed. The file is created if it is missing, and stays.

    Args:
        path: the lock file.
        message, where, fix: parts of the error if another process holds the lock.

    Raises:
        GrowthError: another process holds the lock.
        OSError: the file cannot be opened, or its file system has no locks.
    """
    with path.open("a+b") as file:
        try:
            portable.lock(file)
        except BlockingIOError as error:
            raise GrowthError(message, where=str(where), fix=fix) from error
        yield file
