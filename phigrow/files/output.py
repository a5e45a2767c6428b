"""Where something is written: the one answer to a folder that cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phigrow.errors import GrowthError


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Make what a user asked to have in ``out``; a context.

    Raises:
        GrowthError: the operating system refuses: no permission, no space, a file where a folder is wanted.

    >>> with writing(Path("/proc/here")):
    ...     Path("/proc/here").mkdir()
    Traceback (most recent call last):
        ...
    phigrow.errors.GrowthError: the output cannot be written
      where: /proc/here
      why: [Errno 2] No such file or directory: '/proc/here'
    """
    try:
        yield
    except OSError as error:
        raise GrowthError("the output cannot be written", where=str(out), why=str(error)) from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, if they are not there.

    Raises:
        GrowthError: it cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
