"""Make a folder completely or not at all.

A folder OUT is made as ``.OUT.partial/content`` and renamed at the end, so that no reader meets half of it. One process
at a time owns the hidden folder ``.OUT.partial``, and everything temporary is inside it. A user's folder of that name,
which has no journal of phigrow, is refused.

`staged_folder` starts afresh every time. `StagedFolder` can be resumed: the first line of ``journal.jsonl`` identifies
the work, and each further line names a block that is in place, with its checksum. The next run of the same work checks
these blocks and writes only the others, so its bytes are the same. The journal stays until the folder has its final
name, so a kill at any moment loses no block.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.atomic import sync_folder
from phigrow.files.lock import locked
from phigrow.files.output import writing

JOURNAL = "journal.jsonl"
CONTENT = "content"
FORMER = "former"
"""Name that an older ``out`` has inside the hidden folder while it is being replaced."""

Block = tuple[str, int]
"""A tensor and the first row of a block of it."""


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder, which becomes ``out`` when the block ends without an error; a context.

    An older ``out`` is replaced at that moment. The parent of the given folder is scratch space, and is removed at the
    end of the block.

    Raises:
        GrowthError: another process makes the same folder, or the hidden folder is not phigrow's or cannot be made.
        OSError: the folder cannot be renamed.
    """
    with StagedFolder(out, None) as staged:
        try:
            yield staged.path
            staged.finish(overwrite=True)
        except BaseException:
            staged.discard()
            raise


class StagedFolder:
    """The hidden folder in which ``out`` is made. One process at a time owns it, and a killed one can be continued.

    Args:
        out: the final folder.
        identity: everything that decides the bytes of ``out``. An unfinished folder of another identity is emptied;
            with None every one is.

    Attributes:
        path: the folder to be filled.
        hidden: the folder that holds it. Callers may put other temporary files into it.
        resumed: an unfinished folder of the same identity was there.
        done: checksum of every block that the journal names.

    Raises:
        GrowthError: another process owns the folder, phigrow did not make it, or it cannot be made.
    """

    def __init__(self, out: Path, identity: dict[str, Any] | None) -> None:
        self.out = out
        self.hidden = out.parent / f".{out.name}.partial"
        self.path = self.hidden / CONTENT
        self.done: dict[Block, str] = {}
        self._writing = Lock()
        self._owned = ExitStack()
        self._made = [folder for folder in self.hidden.parents if not folder.exists()]
        with writing(out):
            if not _may_be_own(self.hidden):
                raise _foreign(self.hidden)
            self.hidden.mkdir(parents=True, exist_ok=True)
            self._journal = self._owned.enter_context(
                locked(
                    self.hidden / JOURNAL,
                    "another process is writing this output",
                    where=out,
                    fix="wait for it, or choose another --out",
                )
            )
            try:
                self._take_over(identity)
            except BaseException:
                self._owned.close()
                raise

    def _take_over(self, identity: dict[str, Any] | None) -> None:
        """Continue the work in the hidden folder if it has this identity. Otherwise empty the folder.

        Raises:
            GrowthError: the journal is not phigrow's.
        """
        if not self._has_own_journal():
            raise _foreign(self.hidden)
        former = self.hidden / FORMER
        if former.exists() and not (self.out.exists() or self.out.is_symlink()):
            former.rename(self.out)  # a kill came between the two renames of a replacement
        self.resumed = identity is not None and self.path.is_dir() and self._read(identity)
        if not self.resumed:
            self._start_afresh(identity)
            self.path.mkdir()
        for left in self.path.glob(".*.partial*"):
            remove(left)  # a file that a killed process did not finish

    def _has_own_journal(self) -> bool:
        self._journal.seek(0)
        first = self._journal.readline()
        if first.endswith(b"\n"):
            try:
                return isinstance(json.loads(first), dict | None)
            except ValueError:
                return False
        # Nothing else is in the folder when the first line is written. Former releases could leave the content alone.
        return {each.name for each in self.hidden.iterdir()} <= {JOURNAL, CONTENT}

    def _read(self, identity: dict[str, Any]) -> bool:
        self._journal.seek(0)
        content = self._journal.read()
        lines = content.split(b"\n")[:-1]  # a kill may have cut off the last line
        try:
            if json.loads(lines[0]) != identity:
                return False
            for line in lines[1:]:
                name, row, checksum = json.loads(line)
                self.done[name, row] = checksum
        except (IndexError, ValueError, TypeError):
            self.done.clear()
            return False
        self._journal.truncate(sum(len(line) + 1 for line in lines))
        return True

    def _start_afresh(self, identity: dict[str, Any] | None) -> None:
        for each in self.hidden.iterdir():
            if each.name != JOURNAL:
                remove(each)
        self._journal.truncate(0)
        self._append(json.dumps(identity))

    def record(self, name: str, row: int, checksum: str) -> None:
        """Note in the journal that a block is in place; thread-safe."""
        self._append(json.dumps([name, row, checksum]))

    def _append(self, line: str) -> None:
        with self._writing:
            self._journal.write(line.encode() + b"\n")
            self._journal.flush()

    def finish(self, *, overwrite: bool) -> None:
        """Give the folder its final name. An older folder is removed only when the new one is in place.

        Raises:
            GrowthError: ``out`` exists and ``overwrite`` is off.
        """
        exists = self.out.exists() or self.out.is_symlink()
        if exists and not overwrite:
            raise GrowthError("the output folder exists", where=str(self.out), fix="choose another --out")
        former = self.hidden / FORMER
        remove(former)
        if exists:
            _rename(self.out, former)
        try:
            self.path.rename(self.out)
        except BaseException:
            if exists and not self.out.exists():
                former.rename(self.out)
            raise
        sync_folder(self.out.parent)
        discard(self.hidden)

    def discard(self) -> None:
        """Remove the hidden folder, and the folders above it that were made for it."""
        discard(self.hidden)
        for folder in self._made:
            with contextlib.suppress(OSError):  # another file was put into it meanwhile
                folder.rmdir()

    def close(self) -> None:
        """Release the lock."""
        self._owned.close()

    def __enter__(self) -> StagedFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _rename(path: Path, new: Path) -> None:
    """Rename a folder into another one, even if its owner may not write into it."""
    try:
        path.rename(new)
    except PermissionError:
        path.chmod(path.stat().st_mode | 0o700)
        path.rename(new)


def _may_be_own(hidden: Path) -> bool:
    """True if a hidden folder has a journal, or nothing but a folder of content that former releases could leave."""
    if hidden.is_symlink() or not hidden.exists():
        return not hidden.is_symlink()
    return hidden.is_dir() and ((hidden / JOURNAL).is_file() or {each.name for each in hidden.iterdir()} <= {CONTENT})


def _foreign(hidden: Path) -> GrowthError:
    return GrowthError(
        f"{hidden.name} exists, and phigrow did not make it",
        where=str(hidden),
        why="phigrow makes an output under this name first, and removes only what it wrote",
        fix="move it away, or choose another --out",
    )


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if there is one; a folder even if its owner may not write into it.

    Raises:
        OSError: it belongs to another user, who gave no right to remove it.
    """
    if path.is_dir() and not path.is_symlink():
        try:
            shutil.rmtree(path)
        except PermissionError:
            _open_folders(path)
            shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()


def _open_folders(path: Path) -> None:
    """Give the owner of a folder the right to change it and the folders in it."""
    path.chmod(0o700)
    for root, folders, _ in os.walk(path):
        for name in folders:
            folder = Path(root, name)
            if not folder.is_symlink():
                folder.chmod(0o700)


def discard(path: Path) -> None:
    """Remove a file or folder that is left over; one that cannot be removed stays."""
    with contextlib.suppress(OSError):
        remove(path)
