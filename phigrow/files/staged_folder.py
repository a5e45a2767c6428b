"""The unfinished output folder of an expansion: locked, resumable, and visibly not a checkpoint.

``.NAME.partial`` holds the shards at their final size and ``journal.jsonl``: what is being made, then one line for
every block of rows whose values are in place, with a checksum. A run that was killed leaves both; the next run of the
same expansion checks the blocks that the journal names and writes only the others, so the bytes are the same. A run of
anything else starts afresh. The folder gets its real name when everything is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.output import writing

JOURNAL = "journal.jsonl"

Block = tuple[str, int]
"""A tensor and the first row of a block of it."""


class PartialFolder:
    """The folder beside ``out`` in which it is made, held by one process at a time.

    Args:
        out: the folder that will be.
        identity: everything that decides its bytes; an unfinished folder of another identity is discarded.

    Attributes:
        path: the unfinished folder.
        resumed: it was there, of the same identity.
        done: checksum of every block that the journal names.

    Raises:
        GrowthError: another process is writing it, or it cannot be made.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out = out
        self.path = out.parent / f".{out.name}.partial"
        self.done: dict[Block, str] = {}
        self._writing = Lock()
        self._made = [folder for folder in self.path.parents if not folder.exists()]
        with writing(out):
            self.path.mkdir(parents=True, exist_ok=True)
            self._file = (self.path / JOURNAL).open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise GrowthError(
                "another process is writing this output", where=str(out), fix="wait for it, or choose another --out"
            ) from error
        self.resumed = self._read(identity)
        if not self.resumed:
            self._start_afresh(identity)

    def _read(self, identity: dict[str, Any]) -> bool:
        self._file.seek(0)
        content = self._file.read()
        lines = content.split(b"\n")[:-1]  # a line without its end was cut off by the kill
        try:
            if json.loads(lines[0]) != identity:
                return False
            for line in lines[1:]:
                name, row, checksum = json.loads(line)
                self.done[name, row] = checksum
        except (IndexError, ValueError, TypeError):
            self.done.clear()
            return False
        self._file.truncate(sum(len(line) + 1 for line in lines))
        return True

    def _start_afresh(self, identity: dict[str, Any]) -> None:
        for each in self.path.iterdir():
            if each.name != JOURNAL:
                shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
        self._file.truncate(0)
        self._append(json.dumps(identity))

    def record(self, name: str, row: int, checksum: str) -> None:
        """Say that a block is in place; thread-safe."""
        self._append(json.dumps([name, row, checksum]))

    def _append(self, line: str) -> None:
        with self._writing:
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    def finish(self, *, overwrite: bool) -> None:
        """Give the folder its real name; what stood there goes only when the new one is in place.

        Raises:
            GrowthError: something stands there and may not be replaced.
        """
        (self.path / JOURNAL).unlink()
        former = self.out.parent / f".{self.out.name}.replaced"
        if overwrite and (self.out.exists() or self.out.is_symlink()):
            remove(former)
            self.out.rename(former)
        elif self.out.exists():
            raise GrowthError("the output folder exists", where=str(self.out), fix="choose another --out")
        self.path.rename(self.out)
        sync_folder(self.out.parent)
        remove(former)

    def discard(self) -> None:
        """Remove the unfinished folder, and the folders above it that were made for it."""
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in self._made:
            with contextlib.suppress(OSError):  # something else has come to lie in it
                folder.rmdir()

    def close(self) -> None:
        """Let go of the lock."""
        self._file.close()

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
