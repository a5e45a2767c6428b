"""Calls of the operating system that Windows does not have, with what takes their place there.

Growing, verifying, inspecting and reporting need nothing else of Linux. Training does, because DeepSpeed does.
"""

from __future__ import annotations

import os
import signal
import subprocess
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
"""Flag of `os.open` that refuses a link."""

BINARY = getattr(os, "O_BINARY", 0)
"""Flag of `os.open` for Windows, which would translate line ends otherwise."""

_LOCKED_BYTE = 1 << 40
"""Position of the byte that stands for a whole file in locks of Windows: beyond its end, so that it can be read."""

_turn = Lock()
"""One thread at a time moves the position of a descriptor and reads or writes there."""


def read_at(descriptor: int, size: int, position: int) -> bytes:
    """Return up to ``size`` bytes from a position, as `os.pread`."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, position)
    with _turn:
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.read(descriptor, size)


def read_into(descriptor: int, buffer: memoryview, position: int) -> int:
    """Fill a buffer from a position, as far as one call reads; return the number of bytes, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], position)
    data = read_at(descriptor, min(len(buffer), 1 << 24), position)
    buffer[: len(data)] = data
    return len(data)


def write_at(descriptor: int, data: memoryview, position: int) -> int:
    """Write to a position, as far as one call writes, as `os.pwrite`; return the number of bytes."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, position)
    with _turn:
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.write(descriptor, data)


def lock(file: BinaryIO) -> None:
    """Lock an open file for this process, until it ends or closes the file.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        windows: Any = import_module("msvcrt")
        with _turn:
            here = os.lseek(file.fileno(), 0, os.SEEK_CUR)
            os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
            try:
                windows.locking(file.fileno(), windows.LK_NBLCK, 1)
            except PermissionError as error:
                raise BlockingIOError(*error.args) from error
            finally:
                os.lseek(file.fileno(), here, os.SEEK_SET)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_anothers(path: str | Path) -> bool:
    """Return True if a file belongs to another user; False where files have no owners."""
    return hasattr(os, "geteuid") and os.stat(path).st_uid != os.geteuid()


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the process group that a process leads to end; without groups, the process alone."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.terminate()


def group_runs(number: int) -> bool:
    """Return True if a process of a group runs. Without groups none was started."""
    if not hasattr(os, "killpg"):
        return False
    try:
        os.killpg(number, 0)
    except OSError:
        return False
    return True


def force_to_disk(path: Path) -> None:
    """Wait until the disk has the content of a file. Windows wants it open for writing, Linux not."""
    with path.open("rb" if os.name == "posix" else "r+b") as file:
        os.fsync(file.fileno())
