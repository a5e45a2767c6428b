"""Turn refusals of the operating system into errors that name the output."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from phigrow.errors import GrowthError, MachineError
from phigrow.files.portable import is_anothers

TEMPORARY = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT})
"""Numbers of errors that the same output may not meet later."""


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Convert an OSError in the block, which writes ``out``, to a GrowthError; a context.

    Raises:
        GrowthError: the operating system refuses: no permission, or a file where a folder is needed.
        MachineError: the disk is full or does not answer.

    >>> with writing(Path("/proc/here")):
    ...     Path("/proc/here").mkdir()
    Traceback (most recent call last):
        ...
    phigrow.errors.GrowthError: the output cannot be written
      where: /proc/here
      why: [Errno 2] No such file or directory: '/proc/here'
      what to do: choose a place where you may write and that has enough space
    """
    try:
        yield
    except OSError as error:
        raise (MachineError if error.errno in TEMPORARY else GrowthError)(
            "the output cannot be written",
            where=str(out),
            why=str(error),
            fix="choose a place where you may write and that has enough space",
        ) from error


def make_folder(folder: Path) -> None:
    """Make a folder and the folders above it, if they are missing.

    Raises:
        GrowthError: the folder cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def check_writable(out: Path) -> None:
    """Check that an output folder can be made later, and that an older one can be replaced. Nothing is left behind.

    Raises:
        GrowthError: the folder that holds ``out`` cannot be made or written, or files that would have to be removed
            belong to another user.
    """
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent)).rmdir()
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
    for each in (out, out.with_name(f".{out.name}.partial")):
        for root, _, _ in os.walk(each):
            if not os.access(
                root, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids
            ) and is_anothers(root):
                raise GrowthError(
                    "the output cannot be written",
                    where=str(out),
                    why=f"the folder {root} would have to be removed, and it belongs to another user",
                    fix="choose another place, or remove this folder",
                )


def check_file(path: Path, is_own: Callable[[Path], bool], content: str, option: str = "name") -> None:
    """Refuse to replace a file that phigrow did not write. A missing or empty file is no obstacle.

    Args:
        path: the output.
        is_own: recognises a file of this kind by its content.
        content: the kind, for the message, such as ``a certificate``.
        option: that names the file, for the message.

    Raises:
        GrowthError: ``path`` is a folder, or a file that is not phigrow's.
    """
    if not (path.exists() or path.is_symlink()):
        return
    with writing(path):
        if path.is_file() and (path.stat().st_size == 0 or is_own(path)):
            return
    raise GrowthError(
        f"the output exists, and it is not {content} that phigrow wrote",
        where=str(path),
        why="phigrow replaces only what it wrote",
        fix=f"choose another {option}, or move it away",
    )


def json_keys(path: Path) -> frozenset[str]:
    """Return the keys of the JSON object in a file; empty if it holds anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return frozenset()
    return frozenset(content) if isinstance(content, dict) else frozenset()


def check_replaceable(out: Path, markers: Collection[str], content: str) -> None:
    """Refuse to replace a folder or file that phigrow did not write. A missing or empty folder is no obstacle.

    Args:
        out: the output.
        markers: names of files, one of which phigrow puts into every folder of this kind.
        content: the kind, for the message, such as ``a grown checkpoint``.

    Raises:
        GrowthError: ``out`` holds other files, or it is a folder that holds the current folder.
    """
    if not out.exists():
        return
    here = Path.cwd()
    if out.resolve() in (here, *here.parents):
        raise GrowthError(
            "the output is the current folder, or a folder above it",
            where=str(out),
            why="phigrow replaces an output folder as a whole",
            fix="choose another --out",
        )
    if out.is_dir() and (not any(out.iterdir()) or any((out / marker).is_file() for marker in markers)):
        return
    raise GrowthError(
        f"the output exists, and it is not {content}",
        where=str(out),
        why="phigrow replaces only what it wrote",
        fix="choose another --out, or move these files away",
    )
