"""Turn refusals of the operating system into errors that name the output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phigrow.errors import GrowthError


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Convert an OSError in the block, which writes ``out``, to a GrowthError; a context.

    Raises:
        GrowthError: the operating system refuses: no permission, no space, or a file where a folder is needed.

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
        raise GrowthError(
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
